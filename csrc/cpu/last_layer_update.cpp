#include <torch/csrc/stable/library.h>

#include <vector>

#include "last_layer_passes.h"
#include "last_layer_rows.h"

namespace twophase {
namespace {

template <class T>
double update(const Rows& rows, const LastLayer& u, const double* logits) {
  const Slices slices(rows.m);
  const int64_t b = rows.b, k = rows.k;
  const double scale = mean_scale(b);
  std::vector<double> z(k), losses(b);
  std::vector<T> delta(b * k), gradient(k);
  for (int64_t r = 0; r < b; ++r) {
    std::copy_n(logits + r * k, k, z.begin());
    losses[r] = TP_DISPATCH(last_layer_loss)(rows.dtype, u.loss, z.data(), u.bias, k, u.target, r,
                                             scale, delta.data() + r * k);
  }
  torch::stable::parallel_for(0, slices.count, 1, [&](int64_t begin, int64_t end) {
    TP_DISPATCH(last_layer_update)
    (rows.dtype, rows.h_dtype, rows.pointers.data(), delta.data(), b, k, rows.m,
     slices.begin(begin), slices.end(end - 1), slices.length, u.weight, u.weight_buffer,
     u.is_first_step, u.rule);
  });
  if (u.bias) {
    TP_DISPATCH(last_layer_sum)(rows.dtype, delta.data(), b, k, k, z.data());
    for (int64_t j = 0; j < k; ++j) gradient[j] = static_cast<T>(z[j]);
    TP_DISPATCH(sgd)
    (rows.dtype, u.bias, gradient.data(), u.bias_buffer, k, u.is_first_step, u.rule);
  }
  return mean_loss_of(losses.data(), b);
}

Tensor last_layer_update_op(Tensor weight, std::optional<Tensor> bias,
                            std::optional<Tensor> weight_buffer, std::optional<Tensor> bias_buffer,
                            Tensor h, Tensor index, Tensor logits, Tensor target, int64_t loss,
                            double lr, double momentum, double dampening, double weight_decay,
                            bool nesterov, bool is_first_step) {
  const Rows rows(h, index, weight);
  require(logits.scalar_type() == ScalarType::Double && logits.is_cpu() && logits.dim() == 2 &&
              logits.size(0) == rows.b && logits.size(1) == rows.k && logits.is_contiguous(),
          "logits: expected contiguous float64 [", rows.b, ", ", rows.k, "] on the CPU, got ",
          shape_of(logits));
  LastLayer u{};
  u.dtype = rows.dtype, u.k = rows.k, u.m = rows.m;
  LastLayerTensors tensors{weight, bias, weight_buffer, bias_buffer, h, target, &weight, "weight"};
  const SgdRule rule{lr, momentum, dampening, weight_decay, nesterov, false};
  const Tensor packed =
      checked_layer<CpuLabels>(u, tensors, rows.b, loss, rule, is_first_step, &logits);
  Tensor mean = torch::stable::new_empty(logits, {});
  const auto run = rows.dtype == Dtype::kFloat64 ? update<double> : update<float>;
  *static_cast<double*>(mean.mutable_data_ptr()) =
      run(rows, u, static_cast<const double*>(logits.const_data_ptr()));
  return mean;
}

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("last_layer_update_", TORCH_BOX(&twophase::last_layer_update_op));
}
