// The GPU's side of csrc/cuda/bodies/context.h.
#pragma once

#include "bodies/context.h"

namespace twophase {

struct DeviceContext {
  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int threads() const { return static_cast<int>(blockDim.x); }
  __device__ __forceinline__ int64_t block() const { return blockIdx.x; }
  __device__ __forceinline__ int64_t blocks() const { return gridDim.x; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  template <class T>
  __device__ __forceinline__ T shuffle_xor(T x, int mask) const {
    static_assert(sizeof(T) % 4 == 0);
    unsigned words[sizeof(T) / 4];
    memcpy(words, &x, sizeof(T));
#pragma unroll
    for (unsigned& word : words) word = __shfl_xor_sync(0xffffffffu, word, mask);
    memcpy(&x, words, sizeof(T));
    return x;
  }
};

}  // namespace twophase
