#include <torch/csrc/stable/library.h>

#include "../last_layer_step.h"
#include "bad_label.h"
#include "last_layer_kernels.h"

namespace twophase {
namespace {

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
                             labels ? nullptr : static_cast<const T*>(s.target), nullptr};
  const StepState<T> state{
      static_cast<T*>(s.weight),      static_cast<T*>(s.bias), static_cast<T*>(s.weight_buffer),
      static_cast<T*>(s.bias_buffer), s.is_first_step,         sgd_scalars<T>(s.rule)};
  const cudaStream_t stream = device.stream();
  if (partial_count)
    launch("last_layer_step_: logits", partial_logits<T>,
           device.grid(shape.partial_blocks(), kBlock), kBlock, 0, stream, h, state.weight, partial,
           shape);
  launch("last_layer_step_: loss", loss<T>, device.grid(s.b, kBlock), kBlock, 0, stream, partial,
         state.bias, target, logits, delta, row_loss, shape);
  launch("last_layer_step_: update", update<T, T>, device.grid(shape.update_blocks(), kBlock),
         kBlock, 0, stream, h, delta, row_loss, static_cast<T*>(s.loss_result), state, shape);
}

struct Cuda {
  static std::pair<int64_t, int64_t> bad_label(const Tensor& labels, int64_t b, int64_t k) {
    return first_bad_label(labels, b, k);
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
