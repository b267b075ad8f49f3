#include "../sgd.h"

#include <torch/csrc/stable/library.h>

#include "kernels/sgd.h"
#include "multi_tensor.h"

namespace twophase {
namespace {

struct Cpu {
  static void sgd(const Tensor&, const std::vector<SgdTarget>& targets, const SgdRule& rule) {
    parallel_targets(targets, [&](size_t k, int64_t begin, int64_t end) {
      const SgdTarget& t = targets[k];
      const int64_t offset = begin * size_of(t.dtype);
      TP_DISPATCH(sgd)
      (t.dtype, static_cast<char*>(t.p) + offset, static_cast<const char*>(t.g) + offset,
       t.b ? static_cast<char*>(t.b) + offset : nullptr, end - begin, t.is_first_step, rule);
    });
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("sgd_", TORCH_BOX(&twophase::sgd_op<twophase::Cpu>));
}
