// Checks and results of gram_logdet, for any backend that provides
//   run(like, arguments): certified rank, log det and info of every matrix; `like` names the device
//
// For each matrix M = [features, 1] (without the ones where append_ones is false), rows scaled as
// in math/cholesky.h, in float64:
//   1. a NaN or infinity among the features: info = -1, rank = 0, logabsdet = NaN, nothing else;
//   2. G = M M^T;
//   3. Cholesky of G, no pivoting: info = 0 and logabsdet = sum of the logarithms of the pivots
//      l_jj^2 + 2 ln 2 sum of the row exponents; or info = j, 1-based, the first pivot that is not
//      positive, and logabsdet = -infinity;
//   4. Cholesky of G - s I with diagonal pivoting (the largest remaining diagonal element, the
//   first
//      of equals): rank = the number of positive pivots before the first that is not.
#pragma once

#include <tuple>

#include "check.h"
#include "math/cholesky.h"

namespace twophase {

constexpr int64_t kGramSmall = 256;  // the largest n

struct GramLogdet {
  Dtype dtype;  // float32 or float64
  int64_t batch, n, m;
  bool append_ones;
  const void* features;  // [batch, n, m]
  int64_t* rank;         // [batch]
  double* logabsdet;     // [batch]
  int64_t* info;         // [batch]
};

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> gram_logdet_op(const Tensor& features, bool append_ones) {
  require(features.dim() == 3, "features: expected 3 dimensions, got ", features.dim());
  GramLogdet g{};
  g.dtype = dtype_of(features, "features");
  require(g.dtype == Dtype::kFloat32 || g.dtype == Dtype::kFloat64,
          "features: expected float32 or float64, got ",
          torch::headeronly::toString(features.scalar_type()));
  g.batch = features.size(0), g.n = features.size(1), g.m = features.size(2);
  require(g.n <= kGramSmall, "features: expected at most ", kGramSmall, " rows, got ", g.n);
  g.append_ones = append_ones;
  const Tensor packed = torch::stable::contiguous(features);
  Tensor rank = torch::stable::new_empty(packed, {g.batch}, ScalarType::Long);
  Tensor logabsdet = torch::stable::new_empty(packed, {g.batch}, ScalarType::Double);
  Tensor info = torch::stable::new_empty(packed, {g.batch}, ScalarType::Long);
  g.features = packed.const_data_ptr();
  g.rank = static_cast<int64_t*>(rank.mutable_data_ptr());
  g.logabsdet = static_cast<double*>(logabsdet.mutable_data_ptr());
  g.info = static_cast<int64_t*>(info.mutable_data_ptr());
  if (g.batch > 0) Backend::run(packed, g);
  return {rank, logabsdet, info};
}

}  // namespace twophase
