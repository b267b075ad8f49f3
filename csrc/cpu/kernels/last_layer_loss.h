#pragma once

#include <cstdint>

#include "../../math/dtype.h"
#include "../../math/loss.h"
#include "../isa.h"

// The loss of one sample from its logits z [k], to which `bias` [k] is added where not null, and
// `scale` times its derivative by them, in z and, rounded to `dtype`, in delta [k]. target: of all
// samples, as LastLayer has it; dtype: of bias, delta and the squared error's target.
TP_KERNEL(double, last_layer_loss,
          (Dtype dtype, Loss loss, double* z, const void* bias, int64_t k, const void* target,
           int64_t sample, double scale, void* delta))

// sums [k] = the sum of n rows, each `stride` after the one before, in their order
TP_KERNEL(void, last_layer_sum,
          (Dtype dtype, const void* rows, int64_t n, int64_t stride, int64_t k, double* sums))
