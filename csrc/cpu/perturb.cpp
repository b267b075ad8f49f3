#include "../perturb.h"

#include <torch/csrc/stable/library.h>

#include "kernels/perturb.h"
#include "multi_tensor.h"

namespace twophase {
namespace {

struct Cpu {
  static void perturb(const Tensor&, const std::vector<NoiseTarget>& targets) {
    parallel_targets(targets, [&](size_t k, int64_t begin, int64_t end) {
      const NoiseTarget& t = targets[k];
      char* p = static_cast<char*>(t.p) + begin * (t.dtype == Dtype::kFloat64 ? 8 : 4);
      TP_DISPATCH(perturb)(t.dtype, p, begin, end - begin, t.key, t.sigma);
    });
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("perturb_", TORCH_BOX(&twophase::perturb_op<twophase::Cpu>));
}
