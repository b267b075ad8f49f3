// Checks and results of gram_logdet, for any backend that provides
//   most_rows: the largest n that it takes
//   run(like, arguments): the results of every matrix; `like` names the device
//
// For each matrix M = [features, 1] (without the ones where append_ones is false), rows scaled as
// in math/cholesky.h, in float64:
//   1. a NaN or infinity among the features: info = -1, rank = 0, logabsdet = NaN, rcond = 0,
//      logabsdet_error = infinity, nothing else;
//   2. G = M M^T;
//   3. Cholesky of G, no pivoting: info = 0 and logabsdet = sum of the logarithms of the pivots
//      l_jj^2 + 2 ln 2 sum of the row exponents; or info = j, 1-based, the first pivot that is not
//      positive, and logabsdet = -infinity;
//   4. Cholesky of G - s I: rank = n where it runs to completion. If not, and n <= kGramSmall, with
//      diagonal pivoting (the largest remaining diagonal element, the first of equals): rank = the
//      number of positive pivots before the first that is not. Larger n: rank = 0, undecided.
//   5. rcond <= sigma_rank / sigma_1 of M (math/cholesky.h), 0 where rank = 0; logabsdet_error: log
//      det of G less that of G - s I, to first order a bound of logabsdet's error; infinity where
//      either broke down.
#pragma once

#include <tuple>

#include "check.h"
#include "math/cholesky.h"

namespace twophase {

constexpr int64_t kGramSmall = 256;  // the largest n of which ranks below n are told

struct GramLogdet {
  Dtype dtype;  // float32 or float64
  int64_t batch, n, m;
  bool append_ones;
  const void* features;     // [batch, n, m]
  int64_t* rank;            // [batch]
  double* logabsdet;        // [batch]
  int64_t* info;            // [batch]
  double* rcond;            // [batch]
  double* logabsdet_error;  // [batch]
};

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gram_logdet_op(const Tensor& features,
                                                                  bool append_ones) {
  require(features.dim() == 3, "features: expected 3 dimensions, got ", features.dim());
  GramLogdet g{};
  g.dtype = dtype_of(features, "features");
  require(g.dtype == Dtype::kFloat32 || g.dtype == Dtype::kFloat64,
          "features: expected float32 or float64, got ",
          torch::headeronly::toString(features.scalar_type()));
  g.batch = features.size(0), g.n = features.size(1), g.m = features.size(2);
  require(g.n <= Backend::most_rows, "features: expected at most ", Backend::most_rows,
          " rows, got ", g.n);
  g.append_ones = append_ones;
  const Tensor packed = torch::stable::contiguous(features);
  Tensor rank = torch::stable::new_empty(packed, {g.batch}, ScalarType::Long);
  Tensor logabsdet = torch::stable::new_empty(packed, {g.batch}, ScalarType::Double);
  Tensor info = torch::stable::new_empty(packed, {g.batch}, ScalarType::Long);
  Tensor rcond = torch::stable::new_empty(packed, {g.batch}, ScalarType::Double);
  Tensor error = torch::stable::new_empty(packed, {g.batch}, ScalarType::Double);
  g.features = packed.const_data_ptr();
  g.rank = static_cast<int64_t*>(rank.mutable_data_ptr());
  g.logabsdet = static_cast<double*>(logabsdet.mutable_data_ptr());
  g.info = static_cast<int64_t*>(info.mutable_data_ptr());
  g.rcond = static_cast<double*>(rcond.mutable_data_ptr());
  g.logabsdet_error = static_cast<double*>(error.mutable_data_ptr());
  if (g.batch > 0) Backend::run(packed, g);
  return {rank, logabsdet, info, rcond, error};
}

}  // namespace twophase
