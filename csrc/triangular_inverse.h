// Checks and results of triangular_inverse_squares, for any backend that provides
//   run(arguments): squares
//
// L [n, n] is lower triangular, row by row: entries starts_i <= e < starts_{i+1}, at columns_e in
// increasing order, the diagonal last. Column j of X is what plain forward substitution makes of
//   L x = e_j,  x_i = (e_ij - sum_k l_ik x_k) / l_ii, in any order, fused or not;
// numbers that are zero as nothing leads to them are left out. squares_j = sum_i x_ij^2.
#pragma once

#include "check.h"

namespace twophase {

constexpr int64_t kInverseColumns = 16;  // at a time

struct TriangularInverse {
  int64_t n;
  const int64_t* starts;   // [n + 1]
  const int64_t* columns;  // [starts_n]
  const double* values;    // [starts_n]
  double* squares;         // [n]
};

template <class Backend>
Tensor triangular_inverse_squares_op(const Tensor& starts, const Tensor& columns,
                                     const Tensor& values) {
  for (const auto& [tensor, name] : {std::pair{&starts, "starts"}, std::pair{&columns, "columns"}})
    require(tensor->scalar_type() == ScalarType::Long && tensor->dim() == 1, name,
            ": expected int64 of one dimension, got shape ", shape_of(*tensor));
  require(values.scalar_type() == ScalarType::Double && values.dim() == 1 &&
              values.size(0) == columns.size(0),
          "values: expected float64 [", columns.size(0), "], got ",
          torch::headeronly::toString(values.scalar_type()), " ", shape_of(values));
  require(starts.size(0) > 0, "starts: expected n + 1 numbers, got none");
  const Tensor rows = torch::stable::contiguous(starts),
               places = torch::stable::contiguous(columns),
               numbers = torch::stable::contiguous(values);
  TriangularInverse t{};
  t.n = starts.size(0) - 1;
  t.starts = static_cast<const int64_t*>(rows.const_data_ptr());
  t.columns = static_cast<const int64_t*>(places.const_data_ptr());
  t.values = static_cast<const double*>(numbers.const_data_ptr());
  require(t.starts[0] == 0 && t.starts[t.n] == columns.size(0),
          "starts: expected 0 first and the number of values last");
  for (int64_t i = 0; i < t.n; ++i) {
    require(t.starts[i] < t.starts[i + 1] && t.starts[i + 1] <= columns.size(0) &&
                t.columns[t.starts[i + 1] - 1] == i,
            "columns: expected the diagonal last in row ", i);
    int64_t before = -1;
    for (int64_t e = t.starts[i]; e < t.starts[i + 1]; ++e) {
      require(before < t.columns[e], "columns: expected increasing ones in row ", i);
      before = t.columns[e];
    }
  }
  Tensor squares = torch::stable::new_empty(numbers, {t.n});
  t.squares = static_cast<double*>(squares.mutable_data_ptr());
  Backend::run(t);
  return squares;
}

}  // namespace twophase
