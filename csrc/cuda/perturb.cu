#include <torch/csrc/stable/library.h>

#include "../perturb.h"
#include "bodies/perturb.h"
#include "multi_tensor.h"

namespace twophase {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    perturb(const __grid_constant__ TensorTable<NoisyTensor<T>> table) {
  NoShared none;
  perturb_body(DeviceContext{}, none, table);
}

template <class T>
void run(const OnDeviceOf& device, Dtype dtype, const std::vector<NoiseTarget>& targets) {
  launch_tables<NoisyTensor<T>>(
      targets, dtype,
      [](const NoiseTarget& t) {
        return NoisyTensor<T>{static_cast<T*>(t.p), t.key, t.n, 0, t.sigma};
      },
      [&](const TensorTable<NoisyTensor<T>>& table) {
        launch("perturb_", perturb<T>, device.grid(table.chunks, kThreads), kThreads, 0,
               device.stream(), table);
      });
}

struct Cuda {
  static void perturb(const Tensor& like, const std::vector<NoiseTarget>& targets) {
    const OnDeviceOf device(like);
    run<float>(device, Dtype::kFloat32, targets);
    run<double>(device, Dtype::kFloat64, targets);
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CUDA, m) {
  m.impl("perturb_", TORCH_BOX(&twophase::perturb_op<twophase::Cuda>));
}
