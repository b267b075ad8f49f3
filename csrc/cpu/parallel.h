// Splits [0, n) over torch's threads in chunks that start at multiples of `unit`.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace twophase {

template <class F>
void parallel_chunks(int64_t n, int64_t unit, const F& f) {
  if (n == 0) return;
  const int64_t units = (n + unit - 1) / unit;
  torch::stable::parallel_for(
      0, units, 1, [&](int64_t begin, int64_t end) { f(begin * unit, std::min(end * unit, n)); });
}

}  // namespace twophase
