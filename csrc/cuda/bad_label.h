// Labels out of range, found before a kernel reads them.
#pragma once

#include <utility>
#include <vector>

#include "launch.h"

namespace twophase {

// (row, label) of the first label outside [0, k), row -1 if there is none. Waits for the labels.
// While a CUDA graph is captured nothing can be read: there a label out of range makes the loss and
// the weights NaN.
inline std::pair<int64_t, int64_t> first_bad_label(const Tensor& labels, int64_t b, int64_t k) {
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

}  // namespace twophase
