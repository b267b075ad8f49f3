#include "perturb.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../math/normal.h"

namespace twophase::TP_ISA {
namespace {

// Compilers vectorise the 32 x 32 -> 64 bit product of Philox poorly (half the speed of the whole
// kernel), so it is written out: one word in the lower half of each 64-bit element. The upper
// halves hold anything: neither the product nor the result reads them.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef uint64_t Vector __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 8;

struct Lanes {
  Vector v;
};
TP_HD Lanes operator^(Lanes a, Lanes b) { return {a.v ^ b.v}; }
TP_HD Lanes operator^(Lanes a, uint32_t b) { return {a.v ^ static_cast<uint64_t>(b)}; }

TP_HD WideProduct<Lanes> multiply_wide(uint32_t a, Lanes b) {
  const Vector factor = Vector{} + static_cast<uint64_t>(a);
#if defined(__AVX512F__)
  // The unmasked form makes GCC 12 warn of an uninitialised operand.
  const Vector product = (Vector)_mm512_maskz_mul_epu32(0xff, (__m512i)factor, (__m512i)b.v);
#elif defined(__AVX2__)
  const Vector product = (Vector)_mm256_mul_epu32((__m256i)factor, (__m256i)b.v);
#elif defined(__x86_64__)
  const Vector product = (Vector)_mm_mul_epu32((__m128i)factor, (__m128i)b.v);
#else
  const Vector product = factor * (b.v & 0xffffffffu);
#endif
  return {{product >> 32}, {product}};
}

constexpr int64_t kCounters = 64;  // a batch's words and noise, 3 KiB, stay in the L1 cache

struct Words {
  alignas(64) uint64_t w[4][kCounters];
};

void philox_batch(uint64_t key, uint64_t counter, Words* out) {
  Vector lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint64_t>(i);
  for (int64_t j = 0; j < kCounters; j += kLanes) {
    const Vector counters = lane + (counter + static_cast<uint64_t>(j));
    const PhiloxWords<Lanes> c =
        philox4x32_10<Lanes>({{counters}, {counters >> 32}, {Vector{}}, {Vector{}}},
                             static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
    *reinterpret_cast<Vector*>(&out->w[0][j]) = c.w0.v;
    *reinterpret_cast<Vector*>(&out->w[1][j]) = c.w1.v;
    *reinterpret_cast<Vector*>(&out->w[2][j]) = c.w2.v;
    *reinterpret_cast<Vector*>(&out->w[3][j]) = c.w3.v;
  }
}

template <class T>
void perturb_as(void* p_, int64_t first, int64_t n, uint64_t key, float sigma) {
  T* p = static_cast<T*>(p_);
  for (int64_t done = 0; done < n; done += 4 * kCounters) {
    Words words;
    philox_batch(key, static_cast<uint64_t>(first + done) / 4, &words);
    const auto& w = words.w;
    float z[4 * kCounters];
#pragma omp simd
    for (int64_t j = 0; j < kCounters; ++j) {
      const NormalPair low =
          box_muller(static_cast<uint32_t>(w[0][j]), static_cast<uint32_t>(w[1][j]));
      const NormalPair high =
          box_muller(static_cast<uint32_t>(w[2][j]), static_cast<uint32_t>(w[3][j]));
      z[4 * j] = low.even;
      z[4 * j + 1] = low.odd;
      z[4 * j + 2] = high.even;
      z[4 * j + 3] = high.odd;
    }
    const int64_t count = n - done < 4 * kCounters ? n - done : 4 * kCounters;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) p[done + i] = add_noise(p[done + i], z[i], sigma);
  }
}

}  // namespace

void perturb(Dtype dtype, void* p, int64_t first, int64_t n, uint64_t key, float sigma) {
  if (dtype == Dtype::kFloat64) return perturb_as<double>(p, first, n, key, sigma);
  perturb_as<float>(p, first, n, key, sigma);
}

}  // namespace twophase::TP_ISA
