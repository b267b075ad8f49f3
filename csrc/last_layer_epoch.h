// Checks of last_layer_epoch_, for any backend that provides, besides what last_layer.h asks for,
//   epoch(like, arguments): the steps of SGD; writes the mean loss before each of them
#pragma once

#include <vector>

#include "last_layer.h"

namespace twophase {

struct LastLayerEpoch : LastLayer {  // rule.lr is not read
  Dtype h_dtype;                     // dtype, or bfloat16 where dtype is float32
  int64_t n, steps, largest;         // largest: rows of the largest step
  const void* h;                     // [n, m]
  int64_t h_stride;                  // elements from one row of h to the next
  const int64_t* order;              // host, [bounds[steps]]
  const int64_t* bounds;             // host, [steps + 1]: step s: order[bounds[s] .. bounds[s + 1])
  const double* lr;                  // host, [steps]
  bool mapped;                       // h is a file: the system is told of the next step's rows
  double* losses;                    // on h's device, [steps]

  SgdRule rule_of(int64_t step) const {
    SgdRule one = rule;
    one.lr = lr[step];
    return one;
  }
};

template <class Backend>
Tensor last_layer_epoch_op(Tensor weight, std::optional<Tensor> bias,
                           std::optional<Tensor> weight_buffer, std::optional<Tensor> bias_buffer,
                           Tensor h, Tensor target, Tensor order, std::vector<int64_t> bounds,
                           int64_t loss, std::vector<double> lr, double momentum, double dampening,
                           double weight_decay, bool nesterov, bool is_first_step, bool mapped) {
  LastLayerEpoch e{};
  require_features(h, weight, &e.dtype, &e.h_dtype);
  e.n = h.size(0), e.k = weight.size(0), e.m = weight.size(1);

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
  LastLayerTensors tensors{weight, bias, weight_buffer, bias_buffer, h, target, &weight, "weight"};
  const SgdRule rule{0.0, momentum, dampening, weight_decay, nesterov, false};
  const Tensor packed = checked_layer<Backend>(e, tensors, e.n, loss, rule, is_first_step);

  if (lr.size() == 1) lr.resize(std::max<int64_t>(1, e.steps), lr[0]);
  const Tensor h_rows = with_packed_rows(h);
  Tensor losses = torch::stable::new_empty(h, {e.steps}, ScalarType::Double);
  if (e.steps == 0) return losses;
  e.h = h_rows.const_data_ptr();
  e.h_stride = h_rows.stride(0);
  e.bounds = bounds.data(), e.lr = lr.data();
  e.mapped = mapped;
  e.losses = static_cast<double*>(losses.mutable_data_ptr());
  Backend::epoch(h, e);
  return losses;
}

}  // namespace twophase
