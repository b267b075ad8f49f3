// Checks and results of screen_products, for any backend that provides
//   run(arguments, found): largest and where of every row; found(row, column) for every pair
//
// p_ij = sum_k rows_ik column_jk in float32, k = 0, 1, ... in this order, each step one fused
// multiply-add or a product and a sum. panels hold the columns kScreenPanel at a time, packed:
// column j is panels[j / kScreenPanel][:][j % kScreenPanel]. Columns are those of the threshold.
//   largest_i = max_j p_ij, where_i the first j that attains it (-infinity and 0 without columns);
//   a pair (i, j) for every product that is not <= threshold_j, a NaN on either side included; once
//   there are more than `most`, some of them may be left out, but never so many that they are not.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"

namespace twophase {

constexpr int64_t kScreenPanel = 32;

struct ScreenProducts {
  int64_t count, depth, panel_count, most;
  const float* rows;       // [count, depth]
  const float* panels;     // [panel_count, depth, kScreenPanel]
  const float* threshold;  // [panel_count * kScreenPanel]
  float* largest;          // [count]
  int64_t* where;          // [count]
};

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> screen_products_op(const Tensor& rows, const Tensor& panels,
                                                      const Tensor& threshold, int64_t most) {
  for (const auto& [tensor, name] :
       {std::pair{&rows, "rows"}, std::pair{&panels, "panels"}, std::pair{&threshold, "threshold"}})
    require(tensor->scalar_type() == ScalarType::Float, name, ": expected float32, got ",
            torch::headeronly::toString(tensor->scalar_type()));
  require(rows.dim() == 2, "rows: expected 2 dimensions, got ", rows.dim());
  ScreenProducts s{};
  require(most >= 0, "most: expected a number >= 0, got ", most);
  s.count = rows.size(0), s.depth = rows.size(1), s.most = most;
  require(panels.dim() == 3 && panels.size(1) == s.depth && panels.size(2) == kScreenPanel,
          "panels: expected shape [p, ", s.depth, ", ", kScreenPanel, "], got ", shape_of(panels));
  require(threshold.dim() == 1 && threshold.size(0) % kScreenPanel == 0 &&
              threshold.size(0) <= panels.size(0) * kScreenPanel,
          "threshold: expected a multiple of ", kScreenPanel, " numbers, at most ",
          panels.size(0) * kScreenPanel, ", got shape ", shape_of(threshold));
  s.panel_count = threshold.size(0) / kScreenPanel;
  const Tensor packed = torch::stable::contiguous(rows),
               columns = torch::stable::contiguous(panels),
               limits = torch::stable::contiguous(threshold);
  Tensor largest = torch::stable::new_empty(packed, {s.count});
  Tensor where = torch::stable::new_empty(packed, {s.count}, ScalarType::Long);
  s.rows = static_cast<const float*>(packed.const_data_ptr());
  s.panels = static_cast<const float*>(columns.const_data_ptr());
  s.threshold = static_cast<const float*>(limits.const_data_ptr());
  s.largest = static_cast<float*>(largest.mutable_data_ptr());
  s.where = static_cast<int64_t*>(where.mutable_data_ptr());
  const std::vector<int64_t> found = Backend::run(s);  // row, column, row, column, ...
  Tensor pairs = torch::stable::new_empty(packed, {static_cast<int64_t>(found.size() / 2), 2},
                                          ScalarType::Long);
  std::copy(found.begin(), found.end(), static_cast<int64_t*>(pairs.mutable_data_ptr()));
  return {largest, where, pairs};
}

}  // namespace twophase
