// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011).
#pragma once

#include <cstdint>

#include "macros.h"

namespace twophase {

template <class Word>
struct PhiloxWords {
  Word w0, w1, w2, w3;
};

template <class Word>
struct WideProduct {
  Word high, low;
};

TP_HD WideProduct<uint32_t> multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return {__umulhi(a, b), a * b};
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
#endif
}

// Ten rounds on four counter words under two key words. Word is uint32_t, or a vector of words with
// operator^ and multiply_wide of its own.
template <class Word>
TP_HD PhiloxWords<Word> philox4x32_10(PhiloxWords<Word> c, uint32_t key0, uint32_t key1) {
  TP_UNROLL
  for (int round = 0; round < 10; ++round) {
    const WideProduct<Word> a = multiply_wide(0xD2511F53u, c.w0);
    const WideProduct<Word> b = multiply_wide(0xCD9E8D57u, c.w2);
    c = {b.high ^ c.w1 ^ key0, b.low, a.high ^ c.w3 ^ key1, a.low};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// The block of a 64-bit counter under a 64-bit key; the upper two counter words are 0.
TP_HD PhiloxWords<uint32_t> philox_block(uint64_t key, uint64_t counter) {
  return philox4x32_10<uint32_t>(
      {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0u, 0u},
      static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

}  // namespace twophase
