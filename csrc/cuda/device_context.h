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

// Of a cooperative launch. arrived: a counter in global memory, 0 at the start.
struct GridContext : DeviceContext {
  unsigned* arrived;
  mutable unsigned target = 0;

  __device__ explicit GridContext(unsigned* counter) : arrived(counter) {}

  __device__ __forceinline__ void grid_sync() const {
    __syncthreads();
    target += gridDim.x;
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1u);
      while (*static_cast<volatile unsigned*>(arrived) - target > 0x7fffffffu) {
      }
      __threadfence();
    }
    __syncthreads();
  }
  template <class T>
  __device__ __forceinline__ void copy_async(T* to, const T* from) const {
    if constexpr (sizeof(T) == 4 || sizeof(T) == 8) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(
                       static_cast<unsigned>(__cvta_generic_to_shared(to))),
                   "l"(from), "n"(sizeof(T))
                   : "memory");
    } else {
      *to = *from;  // 16 bits are less than an asynchronous copy moves
    }
  }
  __device__ __forceinline__ void copy_wait() const {
    asm volatile("cp.async.wait_all;" ::: "memory");
  }
  template <class T>
  __device__ __forceinline__ void prefetch(const T* p) const {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
  }
};

}  // namespace twophase
