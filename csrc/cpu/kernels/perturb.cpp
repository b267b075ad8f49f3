#include "perturb.h"

#include "../../math/normal.h"

namespace twophase::TP_ISA {
namespace {

constexpr int64_t kCounters = 64;  // whole vectors, and 2 KiB of noise: stays in the L1 cache

template <class T>
void perturb_as(void* p_, int64_t first, int64_t n, uint64_t key, float sigma) {
  T* p = static_cast<T*>(p_);
  for (int64_t done = 0; done < n; done += 4 * kCounters) {
    const uint64_t counter = static_cast<uint64_t>(first + done) / 4;
    NormalBlock noise[kCounters];
#pragma omp simd
    for (int64_t j = 0; j < kCounters; ++j)
      noise[j] = normal_block(key, counter + static_cast<uint64_t>(j));
    const float* z = &noise[0].z0;
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
