#pragma once

#include <cstdint>

#include "../../math/dtype.h"
#include "../../math/sgd.h"
#include "../isa.h"

// One SGD step (math/sgd.h) on p[0 .. n) with gradient g, of `dtype` (kFloat32 or kFloat64). b is
// the momentum buffer, null without momentum; is_first_step: it holds nothing yet.
TP_KERNEL(void, sgd,
          (Dtype dtype, void* p, const void* g, void* b, int64_t n, bool is_first_step,
           const SgdRule& rule))
