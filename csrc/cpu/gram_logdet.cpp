#include "../gram_logdet.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/gram_logdet.h"

namespace twophase {
namespace {

constexpr double kLn2 = 0.69314718055994530942;

struct Cpu {
  static void run(const Tensor&, const GramLogdet& g) {
    const int64_t stride = g.n * g.m * (g.dtype == Dtype::kFloat64 ? 8 : 4);
    // About 20 microseconds of work a thread at least.
    const int64_t flops = g.n * g.n * (g.m + 1 + g.n);
    const int64_t grain = std::max<int64_t>(1, 200000 / std::max<int64_t>(1, flops));
    torch::stable::parallel_for(0, g.batch, grain, [&](int64_t begin, int64_t end) {
      std::vector<double> workspace(gram_workspace(g.n)), pivots(g.n);
      for (int64_t i = begin; i < end; ++i) {
        g.rank[i] = g.info[i] = 0;
        int64_t exponents = 0;
        if (g.n > 0) TP_DISPATCH(gram_logdet_small)
        (g.dtype, static_cast<const char*>(g.features) + i * stride, g.n, g.m, g.append_ones,
         workspace.data(), &g.rank[i], &g.info[i], pivots.data(), &exponents);
        g.logabsdet[i] = logarithm(g.info[i], pivots, exponents);
      }
    });
  }

 private:
  static double logarithm(int64_t info, const std::vector<double>& pivots, int64_t exponents) {
    if (info < 0) return std::numeric_limits<double>::quiet_NaN();
    if (info > 0) return -std::numeric_limits<double>::infinity();
    double sum = 0;
    for (double pivot : pivots) sum += std::log(pivot);
    return sum + 2.0 * kLn2 * static_cast<double>(exponents);
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("gram_logdet", TORCH_BOX(&twophase::gram_logdet_op<twophase::Cpu>));
}
