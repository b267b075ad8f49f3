#include "../smooth_max_pool.h"

#include <torch/csrc/stable/library.h>

#include <memory>

#include "huge_pages.h"
#include "kernels/smooth_max_pool.h"
#include "parallel.h"

namespace twophase {
namespace {

constexpr int64_t kCells = 1 << 15;  // of a band's grids together: half a second-level cache
constexpr int64_t kWeights = 4096;   // of a chunk: with its grids' part, within a first-level cache

int64_t clamp(int64_t x, int64_t low, int64_t high) { return std::max(low, std::min(x, high)); }

struct Plan {
  PoolBands bands{};
  std::vector<int64_t> offsets;

  // whole: never two bands of what belongs together, whose gradients would be rounded in between.
  Plan(const Windows& w, bool whole) {
    PoolBands& b = bands;
    int64_t grid[kWindowDims];
    b.remainders = product(w.stride);
    b.taps = product(w.kernel);
    for (int d = 0; d < kWindowDims; ++d) {
      b.shift[d] = (w.kernel[d] - 1) * w.dilation[d] / w.stride[d];
      grid[d] = d == 0 ? 1 : w.out[d] + b.shift[d];
    }
    const int64_t unit = product(grid) * b.remainders;
    while (unit > kCells && !whole && b.dim < kWindowDims - 1 && (b.dim == 0 || w.out[b.dim] == 1))
      ++b.dim;
    const int64_t one = unit / grid[b.dim];  // cells for a step along dim
    b.each = clamp(kCells / one - b.shift[b.dim], 1, w.out[b.dim]);
    b.count = (w.out[b.dim] + b.each - 1) / b.each;
    b.units_outside = w.out[0];
    grid[b.dim] = b.each + b.shift[b.dim];
    b.cells = 1;
    for (int d = kWindowDims - 1; d >= 0; --d) b.step[d] = b.cells, b.cells *= grid[d];
    b.chunk = clamp(kWeights / b.taps, 64, 512) / 16 * 16;
    b.line = grid[kWindowDims - 1] * w.stride[kWindowDims - 1];

    int64_t t[kWindowDims] = {};
    for (int64_t k = 0; k < b.taps; ++k) {
      int64_t remainder = 0, cell = 0;
      for (int d = 0; d < kWindowDims; ++d) {
        remainder = remainder * w.stride[d] + t[d] * w.dilation[d] % w.stride[d];
        cell += t[d] * w.dilation[d] / w.stride[d] * b.step[d];
      }
      offsets.push_back(remainder * b.cells + cell);
      for (int d = kWindowDims - 1; d >= 0 && ++t[d] == w.kernel[d]; --d) t[d] = 0;
    }
    b.offset = offsets.data();
  }
};

// Aligned to a vector; the bytes behind it are not initialised.
struct Scratch {
  std::unique_ptr<char[]> memory;
  void* begin;

  Scratch(int64_t numbers, Dtype dtype)
      : memory(new char[numbers * (dtype == Dtype::kFloat64 ? 8 : 4) + 64]) {
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    begin = memory.get() + (64 - address % 64) % 64;
  }
};

struct Cpu {
  static void forward(const Tensor&, const Windows& w, Dtype dtype, const void* x, void* y,
                      double beta) {
    hint_huge_pages(y, product(w.out) * size_of(dtype));
    const Plan plan(w, false);
    parallel_chunks(plan.bands.units() * plan.bands.bands(), 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(forward_scratch(plan.bands), dtype);
      TP_DISPATCH(smooth_max_pool_forward)
      (w, plan.bands, dtype, x, y, begin, end, scratch.begin, beta, std::log(beta));
    });
  }
  static void backward(const Tensor&, const Windows& w, Dtype dtype, const void* grad,
                       const void* x, void* out, double beta) {
    hint_huge_pages(out, product(w.in) * size_of(dtype));
    const Plan plan(w, dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16);
    parallel_chunks(plan.bands.units(), 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(backward_scratch(plan.bands), dtype);
      TP_DISPATCH(smooth_max_pool_backward)
      (w, plan.bands, dtype, grad, x, out, begin, end, scratch.begin, beta, std::log(beta));
    });
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("smooth_max_pool", TORCH_BOX(&twophase::smooth_max_pool_op<twophase::Cpu>));
  m.impl("smooth_max_pool_backward",
         TORCH_BOX(&twophase::smooth_max_pool_backward_op<twophase::Cpu>));
}
