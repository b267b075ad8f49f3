#include <torch/csrc/stable/library.h>

#include "../sgd.h"
#include "bodies/sgd.h"
#include "multi_tensor.h"

namespace twophase {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    sgd(const __grid_constant__ TensorTable<SgdTensor<T>> table, SgdRule rule,
        SgdScalars<T> scalars) {
  NoShared none;
  sgd_body(DeviceContext{}, none, table, rule, scalars);
}

template <class T>
void run(const OnDeviceOf& device, Dtype dtype, const std::vector<SgdTarget>& targets,
         const SgdOptions& o) {
  launch_tables<SgdTensor<T>>(
      targets, dtype,
      [](const SgdTarget& t) {
        return SgdTensor<T>{static_cast<T*>(t.p),
                            static_cast<const T*>(t.g),
                            static_cast<T*>(t.b),
                            t.n,
                            0,
                            t.fresh};
      },
      [&](const TensorTable<SgdTensor<T>>& table) {
        launch("sgd_", sgd<T>, device.grid(table.chunks, kThreads), kThreads, 0, device.stream(),
               table, SgdRule{o.weight_decay != 0, o.nesterov},
               sgd_scalars<T>(o.lr, o.momentum, o.dampening, o.weight_decay, o.maximize));
      });
}

struct Cuda {
  static void sgd(const Tensor& like, const std::vector<SgdTarget>& targets, const SgdOptions& o) {
    const OnDeviceOf device(like);
    run<float>(device, Dtype::kFloat32, targets, o);
    run<double>(device, Dtype::kFloat64, targets, o);
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CUDA, m) {
  m.impl("sgd_", TORCH_BOX(&twophase::sgd_op<twophase::Cuda>));
}
