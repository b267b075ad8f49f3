// What a kernel body may ask of the machine, and nothing else:
//   ctx.thread(), ctx.threads()   position in the block, threads per block
//   ctx.block(), ctx.blocks()     position in the grid, blocks per grid
//   ctx.sync()                    barrier of the block
//   ctx.shuffle_xor(x, mask)      x of lane (lane ^ mask) of the same warp, every lane taking part
// and, of a context for persistent kernels, whose blocks all run at once:
//   ctx.grid_sync()               barrier of the grid; writes before it are seen after it
//   ctx.copy_async(to, from)      one element into shared memory, there after ctx.copy_wait()
//   ctx.prefetch(p)               a hint that the cache line at p is read soon
// Bodies take (ctx, shared, raw pointers): csrc/cuda/<op>.cu hands them the GPU's context
// (csrc/cuda/device_context.h), tests/shim/host_context.h one made of threads and barriers. A
// __shared__ variable inside a body would be global on the host, so shared memory is a struct that
// the caller owns.
#pragma once

#include <cstdint>

#include "../../math/macros.h"

#if defined(__CUDACC__)
#define TP_BODY __device__ __forceinline__
#define TP_MEMBER __host__ __device__ __forceinline__
#else
#define TP_BODY inline
#define TP_MEMBER inline
#endif

namespace twophase {

constexpr int kWarp = 32;
constexpr int kBlock = 128;  // threads of the kernels whose tiles depend on it

struct NoShared {};

// One 16-byte memory access.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

template <class... P>
TP_BODY bool aligned16(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15u) == 0;
}

template <class T>
TP_BODY Pack<T>* packs(T* p) {
  return reinterpret_cast<Pack<T>*>(p);
}
template <class T>
TP_BODY const Pack<T>* packs(const T* p) {
  return reinterpret_cast<const Pack<T>*>(p);
}

TP_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
TP_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace twophase
