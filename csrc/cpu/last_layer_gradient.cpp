// Mean loss and gradient over all rows, a block of them at a time.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "last_layer_passes.h"
#include "team.h"

namespace twophase {
namespace {

constexpr int64_t kBlock = 64;  // rows whose second pass finds them in the cache

template <class T>
void gradient_of(const void* weight, const void* bias, const void* h, int64_t h_stride,
                 Dtype h_dtype, int64_t n, int64_t k, int64_t m, Loss loss, const void* target,
                 double* mean, void* by_weight, void* by_bias) {
  const int64_t blocks = (n + kBlock - 1) / kBlock, stride = h_stride * size_of(h_dtype);
  Passes<T> passes(std::min(n, kBlock), k, m, h_dtype);
  const int threads = team_size(passes.slices.count);
  std::vector<const void*> pointers(threads * kBlock);
  std::vector<double> scratch(threads * apart(k)), losses(blocks), bias_sums(k);
  const double scale = mean_scale(n);
  Team::run(threads, [&](int thread, Team& team) {
    const Share slices(passes.slices.count, thread, team.size());
    const void** rows = pointers.data() + thread * kBlock;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = i * kBlock, b = std::min(kBlock, n - first);
      for (int64_t r = 0; r < b; ++r) rows[r] = static_cast<const char*>(h) + (first + r) * stride;
      passes.logits(rows, b, weight, slices.begin, slices.end);
      team.barrier();
      const Share mine(b, thread, team.size());
      const char* own = static_cast<const char*>(target) +
                        first * (loss == Loss::kCrossEntropy ? 8 : k * sizeof(T));
      passes.losses(mine.begin, mine.end, b, bias, loss, own, nullptr, scale,
                    scratch.data() + thread * apart(k));
      team.barrier();
      passes.add_gradient(rows, b, by_weight, slices.begin, slices.end);
      if (thread > 0) continue;
      losses[i] = passes.loss_sum(b);
      const double* sums = passes.bias_sums(b);
      for (int64_t j = 0; j < k; ++j) bias_sums[j] += sums[j];
    }
  });
  *mean = mean_loss(pairwise_sum(losses.data(), blocks), n);
  for (int64_t j = 0; j < k; ++j) static_cast<T*>(by_bias)[j] = static_cast<T>(bias_sums[j]);
}

std::tuple<Tensor, Tensor, Tensor> last_layer_gradient_op(Tensor weight, std::optional<Tensor> bias,
                                                          Tensor h, Tensor target, int64_t loss) {
  Dtype dtype, h_dtype;
  require_features(h, weight, &dtype, &h_dtype);
  const int64_t n = h.size(0), k = weight.size(0), m = weight.size(1);
  require(n > 0, "h: expected at least one sample, got ", shape_of(h));
  if (bias) require_updatable(*bias, "bias", {k}, weight, "weight");
  const Tensor packed_target = checked_target<CpuLabels>(target, loss, n, k, weight, "weight");
  const Tensor packed_weight = torch::stable::contiguous(weight);
  const Tensor h_rows = with_packed_rows(h);
  Tensor mean = torch::stable::new_empty(weight, {}, ScalarType::Double);
  Tensor by_weight = torch::stable::new_zeros(weight, {k, m});
  Tensor by_bias = torch::stable::new_empty(weight, {k});
  const auto run = dtype == Dtype::kFloat64 ? gradient_of<double> : gradient_of<float>;
  run(packed_weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
      h_rows.const_data_ptr(), h_rows.stride(0), h_dtype, n, k, m, static_cast<Loss>(loss),
      packed_target.const_data_ptr(), static_cast<double*>(mean.mutable_data_ptr()),
      by_weight.mutable_data_ptr(), by_bias.mutable_data_ptr());
  return {mean, by_weight, by_bias};
}

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("last_layer_gradient", TORCH_BOX(&twophase::last_layer_gradient_op));
}
