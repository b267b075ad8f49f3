#include <torch/csrc/stable/library.h>

#include "../sgd.h"
#include "bodies/sgd.h"
#include "multi_tensor.h"

namespace twophase {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    sgd(const __grid_constant__ TensorTable<SgdTensor<T>> table, SgdScalars<T> scalars) {
  NoShared none;
  sgd_body(DeviceContext{}, none, table, scalars);
}

template <class T>
void run(const OnDeviceOf& device, Dtype dtype, const std::vector<SgdTarget>& targets,
         const SgdRule& rule) {
  launch_tables<SgdTensor<T>>(
      targets, dtype,
      [](const SgdTarget& t) {
        return SgdTensor<T>{
            static_cast<T*>(t.p), static_cast<const T*>(t.g), static_cast<T*>(t.b), t.n, 0,
            t.is_first_step};
      },
      [&](const TensorTable<SgdTensor<T>>& table) {
        launch("sgd_", sgd<T>, device.grid(table.chunks, kThreads), kThreads, 0, device.stream(),
               table, sgd_scalars<T>(rule));
      });
}

struct Cuda {
  static void sgd(const Tensor& like, const std::vector<SgdTarget>& targets, const SgdRule& rule) {
    const OnDeviceOf device(like);
    run<float>(device, Dtype::kFloat32, targets, rule);
    run<double>(device, Dtype::kFloat64, targets, rule);
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CUDA, m) {
  m.impl("sgd_", TORCH_BOX(&twophase::sgd_op<twophase::Cuda>));
}
