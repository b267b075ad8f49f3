// Checks of last_layer_step_, for any backend that provides, besides what last_layer.h asks for,
//   step(like, arguments): one step of SGD; writes the mean loss before the step
// `like` names the device.
#pragma once

#include "last_layer.h"

namespace twophase {

struct LastLayerStep : LastLayer {
  int64_t b;
  const void* h;      // [b, m]
  int64_t h_stride;   // elements from one row of h to the next
  void* loss_result;  // one element
};

template <class Backend>
Tensor last_layer_step_op(Tensor weight, std::optional<Tensor> bias,
                          std::optional<Tensor> weight_buffer, std::optional<Tensor> bias_buffer,
                          Tensor h, Tensor target, int64_t loss, double lr, double momentum,
                          double dampening, double weight_decay, bool nesterov,
                          bool is_first_step) {
  LastLayerStep s{};
  require(h.dim() == 2, "h: expected 2 dimensions, got ", h.dim());
  s.dtype = dtype_of(h, "h");
  require(s.dtype == Dtype::kFloat32 || s.dtype == Dtype::kFloat64,
          "h: expected float32 or float64, got ", torch::headeronly::toString(h.scalar_type()));
  require(weight.dim() == 2, "weight: expected 2 dimensions, got ", weight.dim());
  s.b = h.size(0), s.m = h.size(1), s.k = weight.size(0);
  require(s.b > 0, "h: expected at least one sample, got ", shape_of(h));
  require(s.k > 0, "weight: expected at least one output, got ", shape_of(weight));
  LastLayerTensors tensors{weight, bias, weight_buffer, bias_buffer, h, target, &h, "h"};
  const SgdRule rule{lr, momentum, dampening, weight_decay, nesterov, false};
  const Tensor packed = checked_layer<Backend>(s, tensors, s.b, loss, rule, is_first_step);

  const Tensor h_rows = with_packed_rows(h);
  Tensor result = torch::stable::new_empty(h, {});
  s.h = h_rows.const_data_ptr();
  s.h_stride = h_rows.stride(0);
  s.loss_result = result.mutable_data_ptr();
  Backend::step(h, s);
  return result;
}

}  // namespace twophase
