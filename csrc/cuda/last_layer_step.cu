#include <torch/csrc/stable/library.h>

#include <vector>

#include "../last_layer_step.h"
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
  __shared__ LossShared shared;
  loss_body(DeviceContext{}, shared, partial, bias, target, logits, delta, row_loss, shape);
}
template <class T>
__global__ void __launch_bounds__(kBlock)
    update(const T* h, const T* delta, const double* row_loss, T* mean_loss, StepState<T> state,
           StepShape shape) {
  __shared__ UpdateShared<T> shared;
  update_body(DeviceContext{}, shared, h, delta, row_loss, mean_loss, state, shape);
}

template <class T>
void step(const OnDeviceOf& device, const Tensor& like, const LastLayerStep& s) {
  const StepShape shape{s.b, s.k, s.m, s.h_stride};
  const int64_t logit_count = s.b * s.k, partial_count = shape.slices() * logit_count;
  // One allocation: doubles first, so that everything is aligned.
  const Tensor scratch =
      torch::stable::new_empty(like,
                               {static_cast<int64_t>((s.b + logit_count) * sizeof(double) +
                                                     (logit_count + partial_count) * sizeof(T))},
                               ScalarType::Byte);
  double* row_loss = static_cast<double*>(scratch.mutable_data_ptr());
  double* logits = row_loss + s.b;
  T* delta = reinterpret_cast<T*>(logits + logit_count);
  T* partial = delta + logit_count;

  const T* h = static_cast<const T*>(s.h);
  const bool labels = s.loss == Loss::kCrossEntropy;
  const StepTarget<T> target{labels ? static_cast<const int64_t*>(s.target) : nullptr,
                             labels ? nullptr : static_cast<const T*>(s.target)};
  const StepState<T> state{
      static_cast<T*>(s.weight),
      static_cast<T*>(s.bias),
      static_cast<T*>(s.weight_buffer),
      static_cast<T*>(s.bias_buffer),
      s.fresh,
      {s.weight_decay != 0, s.nesterov},
      sgd_scalars<T>(s.lr, s.momentum, s.dampening, s.weight_decay, /*maximize=*/false)};
  const cudaStream_t stream = device.stream();
  if (partial_count)
    launch("last_layer_step_: logits", partial_logits<T>,
           device.grid(shape.partial_blocks(), kBlock), kBlock, 0, stream, h, state.weight, partial,
           shape);
  launch("last_layer_step_: loss", loss<T>, device.grid(s.b, kBlock), kBlock, 0, stream, partial,
         state.bias, target, logits, delta, row_loss, shape);
  launch("last_layer_step_: update", update<T>, device.grid(shape.update_blocks(), kBlock), kBlock,
         0, stream, h, delta, row_loss, static_cast<T*>(s.loss_result), state, shape);
}

struct Cuda {
  // Waits for the labels. While a CUDA graph is captured nothing can be read: there a label out of
  // range makes the loss and the weights NaN.
  static std::pair<int64_t, int64_t> bad_label(const Tensor& labels, int64_t b, int64_t k) {
    const OnDeviceOf device(labels);
    const cudaStream_t stream = device.stream();
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    TP_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
    if (capture != cudaStreamCaptureStatusNone) return {-1, 0};
    std::vector<int64_t> host(static_cast<size_t>(b));
    TP_CUDA_CHECK(cudaMemcpyAsync(host.data(), labels.const_data_ptr(), host.size() * 8,
                                  cudaMemcpyDeviceToHost, stream));
    TP_CUDA_CHECK(cudaStreamSynchronize(stream));
    for (int64_t row = 0; row < b; ++row)
      if (host[row] < 0 || host[row] >= k) return {row, host[row]};
    return {-1, 0};
  }
  static void step(const Tensor& like, const LastLayerStep& s) {
    const OnDeviceOf device(like);
    if (s.dtype == Dtype::kFloat32)
      twophase::step<float>(device, like, s);
    else
      twophase::step<double>(device, like, s);
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CUDA, m) {
  m.impl("last_layer_step_", TORCH_BOX(&twophase::last_layer_step_op<twophase::Cuda>));
}
