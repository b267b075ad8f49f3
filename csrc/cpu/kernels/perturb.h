#pragma once

#include <cstdint>

#include "../../math/dtype.h"
#include "../isa.h"

// Adds sigma times elements first .. first + n - 1 of the key's stream to p[0 .. n), of `dtype`
// (kFloat32 or kFloat64). first is a multiple of 4.
TP_KERNEL(void, perturb,
          (Dtype dtype, void* p, int64_t first, int64_t n, uint64_t key, float sigma))
