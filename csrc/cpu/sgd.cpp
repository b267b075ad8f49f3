#include "../sgd.h"

#include <torch/csrc/stable/library.h>

#include "kernels/sgd.h"
#include "multi_tensor.h"

namespace twophase {
namespace {

struct Cpu {
  static void sgd(const Tensor&, const std::vector<SgdTarget>& targets, const SgdOptions& o) {
    parallel_targets(targets, [&](size_t k, int64_t begin, int64_t end) {
      const SgdTarget& t = targets[k];
      const int64_t offset = begin * (t.dtype == Dtype::kFloat64 ? 8 : 4);
      TP_DISPATCH(sgd)
      (t.dtype, static_cast<char*>(t.p) + offset, static_cast<const char*>(t.g) + offset,
       t.b ? static_cast<char*>(t.b) + offset : nullptr, end - begin, t.fresh, o.lr, o.momentum,
       o.dampening, o.weight_decay, o.nesterov, o.maximize);
    });
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("sgd_", TORCH_BOX(&twophase::sgd_op<twophase::Cpu>));
}
