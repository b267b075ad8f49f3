#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../softplus.h"
#include "bodies/softplus.h"
#include "launch.h"

namespace twophase {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    softplus_forward(const T* x, T* y, int64_t n, SoftplusParameters<Compute<T>> p) {
  NoShared none;
  softplus_forward_body(DeviceContext{}, none, x, y, n, p);
}
template <class T>
__global__ void __launch_bounds__(kThreads)
    softplus_backward(const T* grad, const T* y, T* out, int64_t n,
                      SoftplusParameters<Compute<T>> p) {
  NoShared none;
  softplus_backward_body(DeviceContext{}, none, grad, y, out, n, p);
}
template <class T>
__global__ void __launch_bounds__(kThreads)
    softplus_double_backward(const T* grad_grad, const T* grad, const T* y, T* out_grad, T* out_y,
                             int64_t n, SoftplusParameters<Compute<T>> p) {
  NoShared none;
  softplus_double_backward_body(DeviceContext{}, none, grad_grad, grad, y, out_grad, out_y, n, p);
}

// Launches kernel(pointers..., n, parameters) over n elements.
template <class T, class Kernel, class... Pointers>
void run(const char* name, Kernel kernel, const Tensor& like, int64_t n, double beta,
         Pointers... pointers) {
  if (n == 0) return;  // a grid of no blocks is an error
  const OnDeviceOf device(like);
  const int64_t units = ceil_div(n, int64_t{kThreads} * kSoftplusPacks * Pack<T>::kSize);
  launch(name, kernel, device.grid(units, kThreads), kThreads, 0, device.stream(), pointers..., n,
         softplus_parameters<Compute<T>>(beta, std::log(beta)));
}

struct Cuda {
  static void forward(const Tensor& like, Dtype dtype, const void* x, void* y, int64_t n,
                      double beta) {
    by_dtype(dtype, [&](auto tag) {
      using T = decltype(tag);
      run<T>("softplus", softplus_forward<T>, like, n, beta, static_cast<const T*>(x),
             static_cast<T*>(y));
    });
  }
  static void backward(const Tensor& like, Dtype dtype, const void* grad, const void* y, void* out,
                       int64_t n, double beta) {
    by_dtype(dtype, [&](auto tag) {
      using T = decltype(tag);
      run<T>("softplus_backward", softplus_backward<T>, like, n, beta, static_cast<const T*>(grad),
             static_cast<const T*>(y), static_cast<T*>(out));
    });
  }
  static void double_backward(const Tensor& like, Dtype dtype, const void* grad_grad,
                              const void* grad, const void* y, void* out_grad, void* out_y,
                              int64_t n, double beta) {
    by_dtype(dtype, [&](auto tag) {
      using T = decltype(tag);
      run<T>("softplus_double_backward", softplus_double_backward<T>, like, n, beta,
             static_cast<const T*>(grad_grad), static_cast<const T*>(grad),
             static_cast<const T*>(y), static_cast<T*>(out_grad), static_cast<T*>(out_y));
    });
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CUDA, m) {
  m.impl("softplus", TORCH_BOX(&twophase::softplus_op<twophase::Cuda>));
  m.impl("softplus_", TORCH_BOX(&twophase::softplus_inplace_op<twophase::Cuda>));
  m.impl("softplus_backward", TORCH_BOX(&twophase::softplus_backward_op<twophase::Cuda>));
  m.impl("softplus_double_backward",
         TORCH_BOX(&twophase::softplus_double_backward_op<twophase::Cuda>));
}
