// Checks of last_layer_epoch_, for any backend that provides bad_label, as last_layer_step.h, and
//   epoch(like, arguments): the steps of SGD; writes the mean loss before each of them
#pragma once

#include <vector>

#include "last_layer_step.h"

namespace twophase {

struct LastLayerEpoch {
  Dtype dtype;    // float32 or float64: of every array but h, the labels and the losses
  Dtype h_dtype;  // dtype, or bfloat16 where dtype is float32
  int64_t n, k, m, steps, largest;  // largest: rows of the largest step
  void* weight;                     // [k, m]
  void* bias;                       // [k] or null
  void* weight_buffer;              // [k, m]; null without momentum
  void* bias_buffer;                // [k]; null without momentum or bias
  const void* h;                    // [n, m]
  int64_t h_stride;                 // elements from one row of h to the next
  Loss loss;
  const void* target;     // cross-entropy: int64 [n]; squared error: [n, k]
  const int64_t* order;   // host, [bounds[steps]]
  const int64_t* bounds;  // host, [steps + 1]: step s takes order[bounds[s] .. bounds[s + 1])
  const double* lr;       // host, [steps]
  double momentum, dampening, weight_decay;
  bool nesterov, fresh;
  bool mapped;     // h is a file: the system is told of the next step's rows
  double* losses;  // on h's device, [steps]
};

// h [n, m] beside a weight [k, m]: float32 or float64 as the weight, or bfloat16 beside float32.
inline void require_features(const Tensor& h, const Tensor& weight, Dtype* dtype, Dtype* h_dtype) {
  require(weight.dim() == 2, "weight: expected 2 dimensions, got ", weight.dim());
  require(weight.size(0) > 0, "weight: expected at least one output, got ", shape_of(weight));
  *dtype = dtype_of(weight, "weight");
  require(*dtype == Dtype::kFloat32 || *dtype == Dtype::kFloat64,
          "weight: expected float32 or float64, got ",
          torch::headeronly::toString(weight.scalar_type()));
  require(h.dim() == 2, "h: expected 2 dimensions, got ", h.dim());
  require(h.size(1) == weight.size(1), "h: expected ", weight.size(1), " features, got ",
          shape_of(h));
  *h_dtype = dtype_of(h, "h");
  require(*h_dtype == *dtype || (*h_dtype == Dtype::kBFloat16 && *dtype == Dtype::kFloat32),
          "h: expected the dtype of weight, or bfloat16 beside float32, got ",
          torch::headeronly::toString(h.scalar_type()));
  require(h.device() == weight.device(), "h: expected the device of weight");
}

template <class Backend>
Tensor last_layer_epoch_op(Tensor weight, std::optional<Tensor> bias,
                           std::optional<Tensor> weight_buffer, std::optional<Tensor> bias_buffer,
                           Tensor h, Tensor target, Tensor order, std::vector<int64_t> bounds,
                           int64_t loss, std::vector<double> lr, double momentum, double dampening,
                           double weight_decay, bool nesterov, bool fresh, bool mapped) {
  LastLayerEpoch e{};
  require_features(h, weight, &e.dtype, &e.h_dtype);
  e.n = h.size(0), e.k = weight.size(0), e.m = weight.size(1);
  require_updatable(weight, "weight", {e.k, e.m}, weight, "weight");
  if (bias) require_updatable(*bias, "bias", {e.k}, weight, "weight");

  require(order.scalar_type() == ScalarType::Long && order.is_cpu() && order.dim() == 1 &&
              order.is_contiguous(),
          "order: expected contiguous int64 indices [total] on the CPU");
  e.order = static_cast<const int64_t*>(order.const_data_ptr());
  for (int64_t i = 0; i < order.size(0); ++i)
    require(e.order[i] >= 0 && e.order[i] < e.n, "order: expected indices from 0 to ", e.n - 1,
            ", got ", e.order[i], " at ", i);
  e.steps = static_cast<int64_t>(bounds.size()) - 1;
  require(e.steps >= 0 && bounds.front() == 0 && bounds.back() == order.size(0),
          "bounds: expected numbers from 0 to ", order.size(0), ", the length of order");
  for (int64_t s = 0; s < e.steps; ++s) {
    require(bounds[s] < bounds[s + 1], "bounds: expected ascending numbers, got ", bounds[s],
            " before ", bounds[s + 1]);
    e.largest = std::max(e.largest, bounds[s + 1] - bounds[s]);
  }
  require(static_cast<int64_t>(lr.size()) == e.steps || lr.size() == 1,
          "lr: expected one number or one for each of ", e.steps, " steps, got ", lr.size());
  for (double rate : lr) require_rate(rate);
  require_rule(momentum, dampening, weight_decay, nesterov);
  if (momentum != 0)
    require_buffers(weight_buffer, bias_buffer, bias.has_value(), e.k, e.m, weight, "weight");
  const Tensor packed_target = checked_target<Backend>(target, loss, e.n, e.k, weight, "weight");
  require_own_memory(weight, bias, weight_buffer, bias_buffer, momentum != 0, h, target);

  if (lr.size() == 1) lr.resize(std::max<int64_t>(1, e.steps), lr[0]);
  const Tensor h_rows = with_packed_rows(h);
  Tensor losses = torch::stable::new_empty(h, {e.steps}, ScalarType::Double);
  if (e.steps == 0) return losses;
  e.weight = weight.mutable_data_ptr();
  e.bias = bias ? bias->mutable_data_ptr() : nullptr;
  e.weight_buffer = momentum != 0 ? weight_buffer->mutable_data_ptr() : nullptr;
  e.bias_buffer = momentum != 0 && bias ? bias_buffer->mutable_data_ptr() : nullptr;
  e.h = h_rows.const_data_ptr();
  e.h_stride = h_rows.stride(0);
  e.loss = static_cast<Loss>(loss);
  e.target = packed_target.const_data_ptr();
  e.bounds = bounds.data(), e.lr = lr.data();
  e.momentum = momentum, e.dampening = dampening, e.weight_decay = weight_decay;
  e.nesterov = nesterov, e.fresh = fresh, e.mapped = mapped;
  e.losses = static_cast<double*>(losses.mutable_data_ptr());
  Backend::epoch(h, e);
  return losses;
}

}  // namespace twophase
