// The Gaussian stream of perturb_: element i of a tensor takes lane i mod 4 of
// normal_block(key, i / 4). Box-Muller in float32:
//   u(w) = (w + 1/2) 2^-32, each operation rounded, so 2^-33 <= u <= 1 and never 0
//   even lane = sqrt(-2 ln u(a)) cos(2 pi u(b)), odd lane = sqrt(-2 ln u(a)) sin(2 pi u(b))
//
// Only correctly rounded operations in a fixed order, none of them fused: compiled without
// contraction (-ffp-contract=off, --fmad=false) every processor gives the same bits.
// Error bound against the exact value for the same words: 5.3 * 2^-24 |z|, the sum of the largest
// relative errors over all reachable u of the radius (2.0), of cos and sin (2.25) and of their
// product (1). The polynomials come from fit.py.
#pragma once

#include "dtype.h"
#include "philox.h"

namespace twophase {

TP_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

// Horner's rule with two roundings a step (softplus.h's is fused where the hardware can).
template <int N>
TP_HD float horner_unfused(const float (&c)[N], float x) {
  float y = c[N - 1];
  TP_UNROLL
  for (int k = N - 2; k >= 0; --k) y = y * x + c[k];
  return y;
}

TP_HD float unit_interval(uint32_t w) { return (static_cast<float>(w) + 0.5f) * 0x1p-32f; }

// -2 ln u, 2^-33 <= u <= 1. u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt 2), and
// ln(1 + f) = f - f^2 P(f). e * kLn2High is exact: the constant has 16 bits, e has 6.
TP_HD float minus_two_log(float u) {
  constexpr float kLn2High = 1.38629150390625f, kLn2Low = 2.857213641e-6f;  // 2 ln 2
  constexpr float c[] = {4.999999713e-1f, -3.333367061e-1f, 2.500114768e-1f, -1.997204971e-1f,
                         1.658848853e-1f, -1.483478684e-1f, 1.415964701e-1f, -8.787265491e-2f};
  constexpr int32_t kRootHalf = 0x3f3504f3;
  const int32_t bits = bit_cast<int32_t>(u);
  const int32_t shift = (bits - kRootHalf) & static_cast<int32_t>(0xff800000u);  // e << 23
  const float f = bit_cast<float>(bits - shift) - 1.0f;
  const float e = static_cast<float>(-(shift >> 23));
  const float tail = f * f * horner_unfused(c, f);
  return (e * kLn2High - 2.0f * f) + (2.0f * tail + e * kLn2Low);
}

struct NormalPair {
  float even, odd;
};

// cos and sin of 2 pi u, 0 <= u <= 1, times `radius`. u = q/4 + r with q an integer and |r| <= 1/8,
// exactly.
TP_HD NormalPair on_circle(float radius, float u) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kSine[] = {6.283185288f, -4.134166257e+1f, 8.159254287e+1f, -7.54016127e+1f};
  constexpr float kCosine[] = {1.0f, -1.973920879e+1f, 6.493936905e+1f, -8.544882009e+1f,
                               5.942410598e+1f};
  const float shifted = 4.0f * u + kRound;
  const float r = u - 0.25f * (shifted - kRound);
  const uint32_t q = bit_cast<uint32_t>(shifted);
  const float z = r * r;
  const uint32_t sine = bit_cast<uint32_t>(radius * (r * horner_unfused(kSine, z)));
  const uint32_t cosine = bit_cast<uint32_t>(radius * horner_unfused(kCosine, z));
  // A quarter turn maps (cos, sin) to (-sin, cos).
  const bool odd_quarter = (q & 1u) != 0;
  const uint32_t even_sign = ((q + 1u) & 2u) << 30, odd_sign = (q & 2u) << 30;
  return {bit_cast<float>((odd_quarter ? sine : cosine) ^ even_sign),
          bit_cast<float>((odd_quarter ? cosine : sine) ^ odd_sign)};
}

TP_HD NormalPair box_muller(uint32_t a, uint32_t b) {
  return on_circle(square_root(minus_two_log(unit_interval(a))), unit_interval(b));
}

struct NormalBlock {
  float z0, z1, z2, z3;
};

TP_HD NormalBlock normal_block(uint64_t key, uint64_t counter) {
  const PhiloxWords<uint32_t> w = philox_block(key, counter);
  const NormalPair low = box_muller(w.w0, w.w1), high = box_muller(w.w2, w.w3);
  return {low.even, low.odd, high.even, high.odd};
}

// p + sigma z: the product is rounded once in float32, the sum once in p's type.
TP_HD float add_noise(float p, float z, float sigma) { return p + z * sigma; }
TP_HD double add_noise(double p, float z, float sigma) {
  return p + static_cast<double>(z * sigma);
}

}  // namespace twophase
