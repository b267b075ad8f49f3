#include <torch/csrc/stable/library.h>

#include "../gram_logdet.h"
#include "bodies/gram_logdet.h"
#include "launch.h"

namespace twophase {
namespace {

static_assert(kGramLimit == kGramSmall);

// scratch: n * ld doubles for every block, or null where they fit behind GramShared.
template <class T>
__global__ void __launch_bounds__(kBlock)
    gram_logdet(const T* features, int64_t batch, int n, int64_t m, bool append_ones,
                double* scratch, GramResult result) {
  extern __shared__ __align__(16) unsigned char memory[];
  GramShared& shared = *reinterpret_cast<GramShared*>(memory);
  const DeviceContext ctx;
  double* square = scratch ? scratch + ctx.block() * n * leading_dimension(n)
                           : reinterpret_cast<double*>(memory + sizeof(GramShared));
  gram_logdet_body(ctx, shared, features, batch, n, m, append_ones, square, result);
}

template <class T>
void run(const OnDeviceOf& device, const Tensor& like, const GramLogdet& g) {
  const int n = static_cast<int>(g.n);
  const int64_t square = int64_t{n} * leading_dimension(n);
  const size_t in_shared = sizeof(GramShared) + square * sizeof(double);
  const bool fits =
      in_shared <= static_cast<size_t>(device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  // Blocks beyond two a multiprocessor would only cost scratch memory.
  const int64_t blocks =
      fits ? device.grid(g.batch, kBlock)
           : std::min(g.batch, int64_t{2} * device.attribute(cudaDevAttrMultiProcessorCount));
  const Tensor scratch =
      torch::stable::new_empty(like, {fits ? 0 : blocks * square}, ScalarType::Double);
  const size_t bytes = fits ? in_shared : sizeof(GramShared);
  TP_CUDA_CHECK(cudaFuncSetAttribute(gram_logdet<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(bytes)));
  launch("gram_logdet", gram_logdet<T>, blocks, kBlock, bytes, device.stream(),
         static_cast<const T*>(g.features), g.batch, n, g.m, g.append_ones,
         fits ? nullptr : static_cast<double*>(scratch.mutable_data_ptr()),
         GramResult{g.rank, g.logabsdet, g.info, g.rcond, g.logabsdet_error});
}

struct Cuda {
  static constexpr int64_t most_rows = kGramSmall;

  static void run(const Tensor& like, const GramLogdet& g) {
    const OnDeviceOf device(like);
    if (g.dtype == Dtype::kFloat32)
      twophase::run<float>(device, like, g);
    else
      twophase::run<double>(device, like, g);
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CUDA, m) {
  m.impl("gram_logdet", TORCH_BOX(&twophase::gram_logdet_op<twophase::Cuda>));
}
