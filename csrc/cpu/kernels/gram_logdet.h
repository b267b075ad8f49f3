#pragma once

#include <cstdint>

#include "../../math/dtype.h"
#include "../isa.h"

namespace twophase {

// Doubles of scratch that gram_logdet_small needs for n rows.
constexpr int64_t kGramPanel = 128;  // columns of M that are packed at a time
constexpr int64_t gram_padded(int64_t n) { return (n + 7) / 8 * 8; }
constexpr int64_t gram_workspace(int64_t n) {
  return (2 * gram_padded(n) + kGramPanel + 4) * gram_padded(n);
}

}  // namespace twophase

// Steps 1 to 4 of csrc/gram_logdet.h for one matrix, features [n, m] of dtype kFloat32 or kFloat64,
// n > 0. pivots[j], j < n, gets the squared diagonal of the unshifted factor where info is 0, and
// exponents the sum of the rows' exponents.
TP_KERNEL(void, gram_logdet_small,
          (Dtype dtype, const void* features, int64_t n, int64_t m, bool append_ones,
           double* workspace, int64_t* rank, int64_t* info, double* pivots, int64_t* exponents))
