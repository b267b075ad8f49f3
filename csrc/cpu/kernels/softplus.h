#pragma once

#include <cstdint>

#include "../../math/dtype.h"
#include "../isa.h"

// All arrays hold n elements of `dtype`; y may be x, and out may be any input. log_beta = ln beta.
// stream: store past the caches, for results that exceed them; the output is then not an input.
TP_KERNEL(void, softplus_forward,
          (Dtype dtype, const void* x, void* y, int64_t n, bool stream, double beta,
           double log_beta))
TP_KERNEL(void, softplus_backward,
          (Dtype dtype, const void* grad, const void* y, void* out, int64_t n, bool stream,
           double beta, double log_beta))
// out_grad = gg * s, out_y = gg * g * beta * (1 - s)
TP_KERNEL(void, softplus_double_backward,
          (Dtype dtype, const void* grad_grad, const void* grad, const void* y, void* out_grad,
           void* out_y, int64_t n, double beta, double log_beta))
