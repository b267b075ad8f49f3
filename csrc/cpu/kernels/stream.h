// Results that no cache will hold until they are read: stored past the caches, so that their lines
// are not first read from memory (a third of an elementwise kernel's traffic).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../math/macros.h"

namespace twophase {

constexpr int64_t kStreamTile = 4096;  // bytes computed in the first-level cache, then stored

// bytes: a multiple of 64; to: aligned to 64.
TP_HD void stream_tile(char* to, const char* from, int64_t bytes) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(from + i));
#elif defined(__AVX__)
  for (int64_t i = 0; i < bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i)));
#elif defined(__x86_64__)
  for (int64_t i = 0; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
#else
  memcpy(to, from, bytes);
#endif
}

TP_HD void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// compute(begin, count, out) writes elements [begin, begin + count) to `out`; all n of them end in
// y, aligned whole tiles past the caches.
template <class T, class Compute>
TP_HD void stream_elements(T* y, int64_t n, const Compute& compute) {
  alignas(64) T tile[kStreamTile / sizeof(T)];
  constexpr int64_t kCount = kStreamTile / sizeof(T);
  const int64_t misaligned = (64 - reinterpret_cast<uintptr_t>(y) % 64) % 64 / sizeof(T);
  int64_t i = misaligned < n ? misaligned : n;
  compute(0, i, y);
  for (; i + kCount <= n; i += kCount) {
    compute(i, kCount, tile);
    stream_tile(reinterpret_cast<char*>(y + i), reinterpret_cast<const char*>(tile), kStreamTile);
  }
  compute(i, n - i, y + i);
  stream_fence();
}

}  // namespace twophase
