// Checks and memory layout of the softplus operators, for any backend that provides
//   forward(like, dtype, x, y, n, beta), backward(like, dtype, grad, y, out, n, beta) and
//   double_backward(like, dtype, grad_grad, grad, y, out_grad, out_y, n, beta)
// over flat memory; `like` names the device.
#pragma once

#include <cmath>
#include <tuple>

#include "overlap.h"

namespace twophase {

inline Dtype check_softplus(const Tensor& x, const char* name, double beta) {
  require(std::isfinite(beta) && beta >= 1e-30 && beta <= 1e30,
          "beta: expected a number between 1e-30 and 1e30, got ", beta);
  return dtype_of(x, name);
}

template <class Backend>
Tensor softplus_op(const Tensor& x, double beta) {
  const Dtype dtype = check_softplus(x, "x", beta);
  Tensor y = torch::stable::empty_like(x);
  // empty_like keeps the strides of every dense tensor; one with gaps or overlaps is packed first.
  const bool dense = same_layout(x, y);
  if (!dense) torch::stable::copy_(y, x);
  Backend::forward(x, dtype, dense ? x.const_data_ptr() : y.const_data_ptr(), y.mutable_data_ptr(),
                   y.numel(), beta);
  return y;
}

template <class Backend>
void softplus_inplace_op(Tensor x, double beta) {
  const Dtype dtype = check_softplus(x, "x", beta);
  require_no_overlap(x, "x");
  require_own_memory({{&x, "x"}});
  if (is_dense(x)) {
    Backend::forward(x, dtype, x.const_data_ptr(), x.mutable_data_ptr(), x.numel(), beta);
    return;
  }
  Tensor y = softplus_op<Backend>(x, beta);
  torch::stable::copy_(x, y);
}

template <class Backend>
Tensor softplus_backward_op(const Tensor& grad, const Tensor& y, double beta) {
  const Dtype dtype = check_softplus(y, "y", beta);
  require_same_shape(grad, "grad", y, "y");
  Tensor out = torch::stable::empty_like(y);
  const Tensor g = in_layout_of(grad, out), flat_y = in_layout_of(y, out);
  Backend::backward(y, dtype, g.const_data_ptr(), flat_y.const_data_ptr(), out.mutable_data_ptr(),
                    out.numel(), beta);
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor> softplus_double_backward_op(const Tensor& grad_grad, const Tensor& grad,
                                                       const Tensor& y, double beta) {
  const Dtype dtype = check_softplus(y, "y", beta);
  require_same_shape(grad_grad, "grad_grad", y, "y");
  require_same_shape(grad, "grad", y, "y");
  Tensor out_grad = torch::stable::empty_like(y), out_y = torch::stable::empty_like(y);
  const Tensor gg = in_layout_of(grad_grad, out_y), g = in_layout_of(grad, out_y),
               flat_y = in_layout_of(y, out_y);
  Backend::double_backward(y, dtype, gg.const_data_ptr(), g.const_data_ptr(),
                           flat_y.const_data_ptr(), out_grad.mutable_data_ptr(),
                           out_y.mutable_data_ptr(), out_y.numel(), beta);
  return {out_grad, out_y};
}

}  // namespace twophase
