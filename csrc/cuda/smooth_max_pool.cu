#include <torch/csrc/stable/library.h>

#include "../smooth_max_pool.h"
#include "bodies/smooth_max_pool.h"
#include "launch.h"

namespace twophase {
namespace {

constexpr int kThreads = 256;  // one block a multiprocessor is enough: ptxas would spill for more

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    smooth_max_pool(Windows w, Sizes sizes, const T* x, T* y, SoftplusParameters<Compute<T>> p) {
  NoShared none;
  smooth_max_pool_body(DeviceContext{}, none, w, sizes, x, y, p);
}
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    smooth_max_pool_shares(Windows w, Sizes sizes, const T* grad, const T* x, Compute<T>* origin,
                           Compute<T>* share, SoftplusParameters<Compute<T>> p) {
  NoShared none;
  smooth_max_pool_shares_body(DeviceContext{}, none, w, sizes, grad, x, origin, share, p);
}
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    smooth_max_pool_backward(Windows w, Sizes sizes, const T* x, const Compute<T>* origin,
                             const Compute<T>* share, T* out, SoftplusParameters<Compute<T>> p) {
  NoShared none;
  smooth_max_pool_backward_body(DeviceContext{}, none, w, sizes, x, origin, share, out, p);
}

// Launches kernel(windows, sizes, pointers..., parameters) with a thread for each of product(sizes)
// numbers.
template <class T, class Kernel, class... Pointers>
void run(const char* name, Kernel kernel, const OnDeviceOf& device, const Windows& w,
         const int64_t (&sizes)[kWindowDims], double beta, Pointers... pointers) {
  launch(name, kernel, device.grid(ceil_div(product(sizes), kThreads), kThreads), kThreads, 0,
         device.stream(), w, sizes_of(sizes), pointers...,
         smooth_max_parameters<Compute<T>>(beta, std::log(beta)));
}

struct Cuda {
  static void forward(const Tensor& like, const Windows& w, Dtype dtype, const void* x, void* y,
                      double beta) {
    const OnDeviceOf device(like);
    by_dtype(dtype, [&](auto tag) {
      using T = decltype(tag);
      run<T>("smooth_max_pool", smooth_max_pool<T>, device, w, w.out, beta,
             static_cast<const T*>(x), static_cast<T*>(y));
    });
  }
  static void backward(const Tensor& like, const Windows& w, Dtype dtype, const void* grad,
                       const void* x, void* out, double beta) {
    const OnDeviceOf device(like);
    const int64_t n = product(w.out);
    const bool wide = dtype == Dtype::kFloat64;
    const Tensor scratch =
        torch::stable::new_empty(like, {2 * n}, wide ? ScalarType::Double : ScalarType::Float);
    by_dtype(dtype, [&](auto tag) {
      using T = decltype(tag);
      auto* origin = static_cast<Compute<T>*>(scratch.mutable_data_ptr());
      run<T>("smooth_max_pool_shares", smooth_max_pool_shares<T>, device, w, w.out, beta,
             static_cast<const T*>(grad), static_cast<const T*>(x), origin, origin + n);
      run<T>("smooth_max_pool_backward", smooth_max_pool_backward<T>, device, w, w.in, beta,
             static_cast<const T*>(x), origin, origin + n, static_cast<T*>(out));
    });
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CUDA, m) {
  m.impl("smooth_max_pool", TORCH_BOX(&twophase::smooth_max_pool_op<twophase::Cuda>));
  m.impl("smooth_max_pool_backward",
         TORCH_BOX(&twophase::smooth_max_pool_backward_op<twophase::Cuda>));
}
