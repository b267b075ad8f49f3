#include "../last_layer_step.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "last_layer_passes.h"

namespace twophase {
namespace {

template <class T>
void step(const LastLayerStep& s) {
  Passes<T> passes(s.b, s.k, s.m, s.dtype);
  std::vector<const void*> rows(s.b);
  for (int64_t r = 0; r < s.b; ++r) rows[r] = static_cast<const T*>(s.h) + r * s.h_stride;
  const int64_t slices = passes.slices.count;
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    passes.logits(rows.data(), s.b, s.weight, begin, end);
  });
  const double scale = mean_scale(s.b);
  const int64_t grain = std::max<int64_t>(1, 4096 / s.k);
  torch::stable::parallel_for(0, s.b, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> z(s.k);
    passes.losses(begin, end, s.b, s.bias, s.loss, s.target, nullptr, scale, z.data());
  });
  *static_cast<T*>(s.loss_result) = static_cast<T>(passes.mean_loss(s.b));
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    passes.update(rows.data(), s.b, s.weight, s.weight_buffer, s.is_first_step, s.rule, begin, end);
  });
  if (s.bias) passes.update_bias(s.b, s.bias, s.bias_buffer, s.is_first_step, s.rule);
}

struct Cpu : CpuLabels {
  static void step(const Tensor&, const LastLayerStep& s) {
    s.dtype == Dtype::kFloat64 ? twophase::step<double>(s) : twophase::step<float>(s);
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("last_layer_step_", TORCH_BOX(&twophase::last_layer_step_op<twophase::Cpu>));
}
