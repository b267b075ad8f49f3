#include <torch/csrc/stable/library.h>

#include <type_traits>
#include <vector>

#include "../last_layer_epoch.h"
#include "bad_label.h"
#include "bodies/last_layer_epoch.h"
#include "last_layer_kernels.h"

namespace twophase {
namespace {

constexpr int kThreads = 256;

template <class T, class H>
__global__ void __launch_bounds__(kThreads, 1) epoch(EpochArguments<T, H> a, unsigned* arrived) {
  extern __shared__ __align__(32) unsigned char memory[];
  __shared__ LossShared<kThreads> loss_shared;
  const EpochShared<T, H> shared(memory, a, kThreads / kWarp);
  epoch_body<kThreads>(GridContext(arrived), shared, loss_shared, a);
}

// The rows of one step, side by side in the type that they are computed in.
template <class T, class H>
__global__ void __launch_bounds__(kBlock)
    gather(const H* h, int64_t stride, const int64_t* index, int64_t b, int64_t m, T* rows) {
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; e < b * m;
       e += static_cast<int64_t>(gridDim.x) * kBlock)
    rows[e] = static_cast<T>(load(h[index[e / m] * stride + e % m]));
}
Tensor bytes(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {std::max<int64_t>(count, 1)}, ScalarType::Byte);
}

// A device copy of `count` numbers of the host. The source is pageable: the call returns when it
// has been read.
template <class N>
Tensor on_device(const Tensor& like, const N* host, int64_t count, cudaStream_t stream) {
  Tensor copy = bytes(like, count * static_cast<int64_t>(sizeof(N)));
  TP_CUDA_CHECK(cudaMemcpyAsync(copy.mutable_data_ptr(), host, count * sizeof(N),
                                cudaMemcpyHostToDevice, stream));
  return copy;
}

template <class T, class H>
class Epoch {
 public:
  Epoch(const OnDeviceOf& device, const Tensor& like, const LastLayerEpoch& e)
      : device_(device), like_(like), e_(e), stream_(device.stream()) {
    order_ = on_device(like, e.order, e.bounds[e.steps], stream_);
    bounds_ = on_device(like, e.bounds, e.steps + 1, stream_);
    lr_ = on_device(like, e.lr, e.steps, stream_);
    const bool labels = e.loss == Loss::kCrossEntropy;
    target_ = {labels ? static_cast<const int64_t*>(e.target) : nullptr,
               labels ? nullptr : static_cast<const T*>(e.target),
               static_cast<const int64_t*>(order_.const_data_ptr())};
  }

  void run() {
    if (!persistent()) step_by_step();
  }

 private:
  // False where a slice does not fit into shared memory or the device cannot run all blocks at
  // once.
  bool persistent() {
    if (e_.largest > kEpochRows || !device_.attribute(cudaDevAttrCooperativeLaunch)) return false;
    // One block an SM; fewer where slices would be shorter than a warp's accesses.
    const int64_t most = device_.attribute(cudaDevAttrMultiProcessorCount);
    const int64_t wanted = std::min(most, std::max<int64_t>(1, ceil_div(e_.m, kWarp)));
    EpochArguments<T, H> a{};
    a.m = e_.m, a.k = e_.k, a.steps = e_.steps, a.rows = e_.largest;
    a.width = ceil_div(ceil_div(e_.m, wanted), kEpochPack) * kEpochPack;
    if (a.width == 0) return false;
    const int64_t blocks = std::max<int64_t>(1, ceil_div(e_.m, a.width));
    a.weight = static_cast<T*>(e_.weight), a.bias = static_cast<T*>(e_.bias);
    a.weight_buffer = static_cast<T*>(e_.weight_buffer);
    a.bias_buffer = static_cast<T*>(e_.bias_buffer);
    const int64_t shared = a.shared_bytes(kThreads / kWarp);
    const auto limit = static_cast<int64_t>(
        device_.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - sizeof(LossShared<kThreads>));
    if (shared > limit) return false;
    TP_CUDA_CHECK(cudaFuncSetAttribute(epoch<T, H>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shared)));
    int each = 0;
    TP_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, epoch<T, H>, kThreads,
                                                                static_cast<size_t>(shared)));
    if (each * most < blocks) return false;

    a.h = static_cast<const H*>(e_.h), a.h_stride = e_.h_stride;
    a.target = target_;
    a.bounds = static_cast<const int64_t*>(bounds_.const_data_ptr());
    a.lr = static_cast<const double*>(lr_.const_data_ptr());
    a.is_first_step = e_.is_first_step;
    a.scalars = sgd_scalars<T>(e_.rule);
    const int64_t count = a.rows * a.k;
    const Tensor doubles = bytes(like_, 8 * (count + a.rows) + 8);
    const Tensor values = bytes(like_, static_cast<int64_t>(sizeof(T)) * count * (blocks + 1));
    a.row_loss = static_cast<double*>(doubles.mutable_data_ptr());
    a.logits = a.row_loss + a.rows;
    auto* arrived = reinterpret_cast<unsigned*>(a.logits + count);
    a.delta = static_cast<T*>(values.mutable_data_ptr());
    a.partial = a.delta + count;
    a.losses = e_.losses;
    TP_CUDA_CHECK(cudaMemsetAsync(arrived, 0, sizeof(unsigned), stream_));
    void* arguments[] = {&a, &arrived};
    TP_CUDA_CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(epoch<T, H>),
                                              dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                                              arguments, static_cast<size_t>(shared), stream_));
    return true;
  }

  // Four kernels a step: the rows gathered, then those of last_layer_step_.
  void step_by_step() {
    const StepShape largest{e_.largest, e_.k, e_.m, e_.m};
    const int64_t count = largest.b * e_.k;
    const Tensor doubles = bytes(like_, 8 * (count + largest.b));
    const Tensor values = bytes(
        like_, static_cast<int64_t>(sizeof(T)) * (largest.b * e_.m + count * (1 + most_slices())));
    double* row_loss = static_cast<double*>(doubles.mutable_data_ptr());
    double* logits = row_loss + largest.b;
    T* rows = static_cast<T*>(values.mutable_data_ptr());
    T* delta = rows + largest.b * e_.m;
    T* partial = delta + count;
    for (int64_t s = 0; s < e_.steps; ++s) {
      const StepShape shape{e_.bounds[s + 1] - e_.bounds[s], e_.k, e_.m, e_.m};
      StepTarget<T> target = target_;
      target.index += e_.bounds[s];
      const StepState<T> state{static_cast<T*>(e_.weight),        static_cast<T*>(e_.bias),
                               static_cast<T*>(e_.weight_buffer), static_cast<T*>(e_.bias_buffer),
                               e_.is_first_step && s == 0,        sgd_scalars<T>(e_.rule_of(s))};
      if (e_.m > 0) {
        launch("last_layer_epoch_: gather", gather<T, H>,
               device_.grid(ceil_div(shape.b * e_.m, kBlock), kBlock), kBlock, 0, stream_,
               static_cast<const H*>(e_.h), e_.h_stride, target.index, shape.b, e_.m, rows);
        launch("last_layer_epoch_: logits", partial_logits<T>,
               device_.grid(shape.partial_blocks(), kBlock), kBlock, 0, stream_, rows, state.weight,
               partial, shape);
      }
      launch("last_layer_epoch_: loss", loss<T>, device_.grid(shape.b, kBlock), kBlock, 0, stream_,
             partial, state.bias, target, logits, delta, row_loss, shape);
      launch("last_layer_epoch_: update", update<T, double>,
             device_.grid(shape.update_blocks(), kBlock), kBlock, 0, stream_, rows, delta, row_loss,
             e_.losses + s, state, shape);
    }
  }

  // Fewer rows are cut into more slices.
  int64_t most_slices() const {
    int64_t most = 0;
    for (int64_t s = 0; s < e_.steps; ++s)
      most = std::max(most, StepShape{e_.bounds[s + 1] - e_.bounds[s], e_.k, e_.m, e_.m}.slices());
    return most;
  }

  const OnDeviceOf& device_;
  const Tensor& like_;
  const LastLayerEpoch& e_;
  cudaStream_t stream_;
  Tensor order_, bounds_, lr_;
  StepTarget<T> target_{};
};

struct Cuda {
  static std::pair<int64_t, int64_t> bad_label(const Tensor& labels, int64_t b, int64_t k) {
    return first_bad_label(labels, b, k);
  }
  static void epoch(const Tensor& like, const LastLayerEpoch& e) {
    const OnDeviceOf device(like);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    TP_CUDA_CHECK(cudaStreamIsCapturing(device.stream(), &capture));
    if (capture != cudaStreamCaptureStatusNone)
      throw std::runtime_error(
          "last_layer_epoch_: cannot be captured in a CUDA graph, order lies on the host");
    if (e.dtype == Dtype::kFloat64)
      Epoch<double, double>(device, like, e).run();
    else if (e.h_dtype == Dtype::kBFloat16)
      Epoch<float, BFloat16>(device, like, e).run();
    else
      Epoch<float, float>(device, like, e).run();
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CUDA, m) {
  m.impl("last_layer_epoch_", TORCH_BOX(&twophase::last_layer_epoch_op<twophase::Cuda>));
}
