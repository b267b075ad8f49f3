// A step of the last layer in two calls, for a caller that holds some of the features (columns of h
// and of the weight) and adds the logits of all of them up in between.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../last_layer_epoch.h"
#include "last_layer_passes.h"

namespace twophase {
namespace {

struct Cpu {
  static std::pair<int64_t, int64_t> bad_label(const Tensor& labels, int64_t b, int64_t k) {
    return first_bad_label(static_cast<const int64_t*>(labels.const_data_ptr()), b, k);
  }
};

// The rows of h that a step takes, and its sizes.
struct Rows {
  Dtype dtype, h_dtype;
  int64_t b, k, m;
  Tensor h;  // keeps the rows alive
  std::vector<const void*> pointers;

  Rows(const Tensor& h_, const Tensor& index, const Tensor& weight)
      : h((require_features(h_, weight, &dtype, &h_dtype), with_packed_rows(h_))) {
    require(index.scalar_type() == ScalarType::Long && index.is_cpu() && index.dim() == 1 &&
                index.is_contiguous() && index.size(0) > 0,
            "index: expected contiguous int64 indices [b] on the CPU, at least one");
    b = index.size(0), k = weight.size(0), m = weight.size(1);
    const auto* i = static_cast<const int64_t*>(index.const_data_ptr());
    const int64_t bytes = h.stride(0) * (h_dtype == Dtype::kFloat64   ? 8
                                         : h_dtype == Dtype::kFloat32 ? 4
                                                                      : 2);
    for (int64_t r = 0; r < b; ++r) {
      require(i[r] >= 0 && i[r] < h.size(0), "index: expected indices from 0 to ", h.size(0) - 1,
              ", got ", i[r], " at ", r);
      pointers.push_back(static_cast<const char*>(h.const_data_ptr()) + i[r] * bytes);
    }
  }
};

template <class T>
void logits_of(const Rows& rows, const void* weight, double* logits) {
  const Slices slices(rows.m);
  const int64_t numbers = rows.b * rows.k;
  std::vector<T> partial(slices.count * numbers);
  torch::stable::parallel_for(0, slices.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) TP_DISPATCH(last_layer_logits)
    (rows.dtype, rows.h_dtype, rows.pointers.data(), weight, rows.b, rows.k, rows.m,
     slices.begin(i), slices.end(i), partial.data() + i * numbers);
  });
  for (int64_t i = 0; i < slices.count; ++i)
    for (int64_t j = 0; j < numbers; ++j)
      logits[j] += static_cast<double>(partial[i * numbers + j]);
}

Tensor last_layer_logits_op(Tensor weight, Tensor h, Tensor index) {
  const Rows rows(h, index, weight);
  const Tensor packed = torch::stable::contiguous(weight);
  Tensor logits =
      torch::stable::new_zeros(weight, {rows.b, rows.k}, torch::headeronly::ScalarType::Double);
  const auto run = rows.dtype == Dtype::kFloat64 ? logits_of<double> : logits_of<float>;
  run(rows, packed.const_data_ptr(), static_cast<double*>(logits.mutable_data_ptr()));
  return logits;
}

struct Update {
  void *weight, *bias, *weight_buffer, *bias_buffer;
  const double* logits;  // [b, k], without the bias
  const void* target;
  Loss loss;
  Rule rule;
};

template <class T>
double update(const Rows& rows, const Update& u) {
  const Slices slices(rows.m);
  const int64_t b = rows.b, k = rows.k;
  const double scale = mean_scale(b);
  std::vector<double> z(k), losses(b), bias_sums(k);
  std::vector<T> delta(b * k), gradient(k);
  for (int64_t r = 0; r < b; ++r) {
    for (int64_t j = 0; j < k; ++j)
      z[j] = u.logits[r * k + j] + (u.bias ? static_cast<double>(static_cast<T*>(u.bias)[j]) : 0.0);
    losses[r] = loss_row<T>(u.loss, z.data(), k, u.target, r, scale);
    for (int64_t j = 0; j < k; ++j) {
      delta[r * k + j] = static_cast<T>(z[j]);
      bias_sums[j] += static_cast<double>(delta[r * k + j]);
    }
  }
  const Rule& rule = u.rule;
  // Backwards: the first call has left the end of the rows in the cache.
  torch::stable::parallel_for(0, slices.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) TP_DISPATCH(last_layer_update)
    (rows.dtype, rows.h_dtype, rows.pointers.data(), delta.data(), b, k, rows.m, slices.begin(i),
     slices.end(i), u.weight, u.weight_buffer, rule.fresh, rule.lr, rule.momentum, rule.dampening,
     rule.weight_decay, rule.nesterov);
  });
  if (u.bias) {
    for (int64_t j = 0; j < k; ++j) gradient[j] = static_cast<T>(bias_sums[j]);
    TP_DISPATCH(sgd)
    (rows.dtype, u.bias, gradient.data(), u.bias_buffer, k, rule.fresh, rule.lr, rule.momentum,
     rule.dampening, rule.weight_decay, rule.nesterov, false);
  }
  return mean_loss_of(losses.data(), b);
}

Tensor last_layer_update_op(Tensor weight, std::optional<Tensor> bias,
                            std::optional<Tensor> weight_buffer, std::optional<Tensor> bias_buffer,
                            Tensor h, Tensor index, Tensor logits, Tensor target, int64_t loss,
                            double lr, double momentum, double dampening, double weight_decay,
                            bool nesterov, bool fresh) {
  const Rows rows(h, index, weight);
  require_updatable(weight, "weight", {rows.k, rows.m}, weight, "weight");
  if (bias) require_updatable(*bias, "bias", {rows.k}, weight, "weight");
  require_rate(lr);
  require_rule(momentum, dampening, weight_decay, nesterov);
  if (momentum != 0)
    require_buffers(weight_buffer, bias_buffer, bias.has_value(), rows.k, rows.m, weight, "weight");
  require(logits.scalar_type() == ScalarType::Double && logits.is_cpu() && logits.dim() == 2 &&
              logits.size(0) == rows.b && logits.size(1) == rows.k && logits.is_contiguous(),
          "logits: expected contiguous float64 [", rows.b, ", ", rows.k, "] on the CPU, got ",
          shape_of(logits));
  const Tensor packed = checked_target<Cpu>(target, loss, rows.b, rows.k, weight, "weight");
  require_own_memory(weight, bias, weight_buffer, bias_buffer, momentum != 0, h, target, &logits);
  Tensor mean = torch::stable::new_empty(logits, {});
  const Update u{weight.mutable_data_ptr(),
                 bias ? bias->mutable_data_ptr() : nullptr,
                 momentum != 0 ? weight_buffer->mutable_data_ptr() : nullptr,
                 momentum != 0 && bias ? bias_buffer->mutable_data_ptr() : nullptr,
                 static_cast<const double*>(logits.const_data_ptr()),
                 packed.const_data_ptr(),
                 static_cast<Loss>(loss),
                 {fresh, lr, momentum, dampening, weight_decay, nesterov}};
  *static_cast<double*>(mean.mutable_data_ptr()) =
      rows.dtype == Dtype::kFloat64 ? update<double>(rows, u) : update<float>(rows, u);
  return mean;
}

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("last_layer_logits", TORCH_BOX(&twophase::last_layer_logits_op));
  m.impl("last_layer_update_", TORCH_BOX(&twophase::last_layer_update_op));
}
