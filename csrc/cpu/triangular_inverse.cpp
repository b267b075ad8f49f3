#include "../triangular_inverse.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "kernels/triangular_inverse.h"

namespace twophase {
namespace {

struct Cpu {
  static void run(const TriangularInverse& t) {
    const int64_t tasks = (t.n + kInverseColumns - 1) / kInverseColumns;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(t.n * kInverseColumns);
      std::vector<uint8_t> on(t.n, 0);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * kInverseColumns;
        TP_DISPATCH(triangular_inverse)
        (t.n, t.starts, t.columns, t.values, first, std::min(kInverseColumns, t.n - first),
         scratch.data(), on.data(), t.squares);
      }
    });
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("triangular_inverse_squares",
         TORCH_BOX(&twophase::triangular_inverse_squares_op<twophase::Cpu>));
}
