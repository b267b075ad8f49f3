// Devices, streams, launches and their errors, without a libtorch_cuda to link against.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../check.h"
#include "device_context.h"

namespace twophase {

inline void cuda_check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report this error again
  throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(status));
}
// STD_CUDA_CHECK would need libtorch_cuda.
#define TP_CUDA_CHECK(call) ::twophase::cuda_check((call), #call)

// torch's current stream of a device. The symbol lives in libtorch_cuda, which CPU builds of torch
// lack and which `import torch` loads with RTLD_LOCAL: a weak reference in this library stays null
// there, so the loaded library is asked for it.
inline cudaStream_t current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, kName);
    if (!symbol)
      if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD))
        symbol = dlsym(library, kName);
    return reinterpret_cast<Getter>(symbol);
  }();
  if (!getter)
    throw std::runtime_error("CUDA: this torch has no libtorch_cuda.so that tells its stream");
  void* stream = nullptr;
  if (getter(device, &stream) != 0) throw std::runtime_error("CUDA: no current stream");
  return static_cast<cudaStream_t>(stream);
}

// Makes a tensor's device current in this library's own (static) CUDA runtime, and goes back.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : device_(t.get_device_index()) {
    TP_CUDA_CHECK(cudaGetDevice(&previous_));
    if (previous_ != device_) TP_CUDA_CHECK(cudaSetDevice(device_));
  }
  ~OnDeviceOf() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

  cudaStream_t stream() const { return current_stream(device_); }
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    TP_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }
  // Blocks of a grid-stride kernel: enough for `units` blocks' worth of work, at most what is
  // resident at once, at least one.
  int64_t grid(int64_t units, int threads) const {
    const int64_t resident = static_cast<int64_t>(attribute(cudaDevAttrMultiProcessorCount)) *
                             (attribute(cudaDevAttrMaxThreadsPerMultiProcessor) / threads);
    return std::max<int64_t>(1, std::min(units, resident));
  }

 private:
  int device_;
  int previous_ = 0;
};

// Calls f(T{}) with the element type of `dtype`.
template <class F>
void by_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat16:
      return f(Half{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kFloat64:
      return f(double{});
  }
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads, size_t shared,
            cudaStream_t stream, const A&... arguments) {
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared, stream>>>(
      static_cast<P>(arguments)...);
  cuda_check(cudaGetLastError(), name);
}

}  // namespace twophase
