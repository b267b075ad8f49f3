#include "../screen_products.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <vector>

#include "kernels/screen_products.h"

namespace twophase {
namespace {

struct Pairs {
  size_t most;
  std::vector<int64_t> numbers;
};

void keep(void* sink, int64_t row, int64_t column) {
  auto* pairs = static_cast<Pairs*>(sink);
  if (pairs->numbers.size() / 2 > pairs->most) return;
  pairs->numbers.push_back(row);
  pairs->numbers.push_back(column);
}

struct Cpu {
  static std::vector<int64_t> run(const ScreenProducts& s) {
    const int64_t tasks = (s.count + kScreenRows - 1) / kScreenRows;
    // by task: the order is that of one thread
    std::vector<Pairs> pairs(tasks, {static_cast<size_t>(s.most), {}});
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(kScreenRows * s.depth);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task * kScreenRows;
        TP_DISPATCH(screen_products)
        (s.rows + row * s.depth, std::min(kScreenRows, s.count - row), s.depth, s.panels,
         s.panel_count, s.threshold, row, scratch.data(), s.largest + row, s.where + row, keep,
         &pairs[task]);
      }
    });
    std::vector<int64_t> all;
    for (const auto& [most, part] : pairs) all.insert(all.end(), part.begin(), part.end());
    return all;
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("screen_products", TORCH_BOX(&twophase::screen_products_op<twophase::Cpu>));
}
