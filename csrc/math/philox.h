// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011).
#pragma once

#include <cstdint>

#include "macros.h"

namespace twophase {

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

TP_HD uint32_t multiply_high(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

// Ten rounds on four counter words under two key words.
TP_HD PhiloxWords philox4x32_10(PhiloxWords c, uint32_t key0, uint32_t key1) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  TP_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(kMultiplier0, c.w0), low0 = kMultiplier0 * c.w0;
    const uint32_t high1 = multiply_high(kMultiplier1, c.w2), low1 = kMultiplier1 * c.w2;
    c = {high1 ^ c.w1 ^ key0, low1, high0 ^ c.w3 ^ key1, low0};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return c;
}

// The block of a 64-bit counter under a 64-bit key; the upper two counter words are 0.
TP_HD PhiloxWords philox_block(uint64_t key, uint64_t counter) {
  return philox4x32_10(
      {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0u, 0u},
      static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

}  // namespace twophase
