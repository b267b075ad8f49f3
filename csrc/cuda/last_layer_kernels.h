// The three kernels of a step of the last layer (bodies/last_layer_step.h).
#pragma once

#include "bodies/last_layer_step.h"
#include "launch.h"

namespace twophase {
namespace {

template <class T>
__global__ void __launch_bounds__(kBlock)
    partial_logits(const T* h, const T* weight, T* partial, StepShape shape) {
  __shared__ PartialShared<T> shared;
  partial_logits_body(DeviceContext{}, shared, h, weight, partial, shape);
}
template <class T>
__global__ void __launch_bounds__(kBlock)
    loss(const T* partial, const T* bias, StepTarget<T> target, double* logits, T* delta,
         double* row_loss, StepShape shape) {
  __shared__ LossShared<kBlock> shared;
  loss_body(DeviceContext{}, shared, partial, bias, target, logits, delta, row_loss, shape,
            shape.slices());
}
template <class T, class Mean>
__global__ void __launch_bounds__(kBlock)
    update(const T* h, const T* delta, const double* row_loss, Mean* mean_loss, StepState<T> state,
           StepShape shape) {
  __shared__ UpdateShared<T> shared;
  update_body(DeviceContext{}, shared, h, delta, row_loss, mean_loss, state, shape);
}

}  // namespace
}  // namespace twophase
