#pragma once

#include <cstdint>

#include "../../math/dtype.h"
#include "../../math/sgd.h"
#include "../isa.h"

// The two passes of a step of the last layer over its features [begin, end), slices of `length` but
// for the last one, for b samples whose rows may lie anywhere: a batch, or rows of a cache picked
// by a permutation. dtype: kFloat32 or kFloat64; h_dtype: of the rows, the same or kBFloat16 beside
// kFloat32. The result for a slice does not depend on the other slices.

// partial[s, r, j] = sum over slice s of rows[r][i] weight[j, i]; partial: [slices, b, k]
TP_KERNEL(void, last_layer_logits,
          (Dtype dtype, Dtype h_dtype, const void* const* rows, const void* weight, int64_t b,
           int64_t k, int64_t m, int64_t begin, int64_t end, int64_t length, void* partial))

// One SGD step of weight[:, begin : end] with the gradient delta^T rows; delta: [b, k]. buffer: the
// momentum, laid out as the weight, or null; is_first_step: it holds nothing yet.
TP_KERNEL(void, last_layer_update,
          (Dtype dtype, Dtype h_dtype, const void* const* rows, const void* delta, int64_t b,
           int64_t k, int64_t m, int64_t begin, int64_t end, int64_t length, void* weight,
           void* buffer, bool is_first_step, const SgdRule& rule))

// gradient[:, begin : end] += delta^T rows
TP_KERNEL(void, last_layer_add_gradient,
          (Dtype dtype, Dtype h_dtype, const void* const* rows, const void* delta, int64_t b,
           int64_t k, int64_t m, int64_t begin, int64_t end, int64_t length, void* gradient))
