// softplus_beta(z) = max(z, 0) + log1p(exp(-beta |z|)) / beta, exact for every z, and its
// derivative from the output y: s = sigmoid(beta z) = -expm1(-beta y).
//
// No threshold (torch returns z beyond beta z = 20, which is not analytic) and no subnormal number
// on the way: subnormals stall the vector unit by a factor of twenty. Coefficients: fit.py.
#pragma once

#include "dtype.h"

namespace twophase {

template <class T>
struct SoftplusConstants;

template <>
struct SoftplusConstants<float> {
  using Bits = uint32_t;
  static constexpr float kSmallest = 1.17549435e-38f;  // 2^-126: results below it return it
  static constexpr float kLogSmallest = -87.3365448f;  // ln 2^-126
  static constexpr float kMargin = 1e-4f;  // keeps t / beta normal after its roundings
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f;  // 9 bits: n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kMantissa = 23;
  static constexpr Bits kOne = 0x3f800000u;
  static constexpr float kSaturated = 45.0f;          // exp(-45) < 2^-64: the derivative is 1
  static constexpr float kNegligible = 5.421011e-20f;  // 2^-64: a derivative below it counts as 0
};

template <>
struct SoftplusConstants<double> {
  using Bits = uint64_t;
  static constexpr double kSmallest = 2.2250738585072014e-308;
  static constexpr double kLogSmallest = -708.39641853226408;
  static constexpr double kMargin = 1e-10;
  static constexpr double kLog2e = 1.4426950408889634;
  static constexpr double kLn2High = 6.93147180369123816490e-01;  // 32 bits
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  static constexpr Bits kOne = 0x3ff0000000000000ull;
  static constexpr double kSaturated = 360.0;
  static constexpr double kNegligible = 7.458340731200207e-155;  // 2^-512
};

template <class T, int N>
TP_HD T horner(const T (&c)[N], T x) {
  T y = c[N - 1];
#if !defined(__CUDA_ARCH__)
#pragma GCC unroll 16
#else
#pragma unroll
#endif
  for (int k = N - 2; k >= 0; --k) y = fused(y, x, c[k]);
  return y;
}

// exp(r), |r| <= ln2 / 2
TP_HD float exp_polynomial(float r) {
  constexpr float c[] = {1.0f,           1.000000038f,    5.000000047e-1f, 1.666641541e-1f,
                         4.166635277e-2f, 8.375134775e-3f, 1.39411189e-3f};
  return horner(c, r);
}
TP_HD double exp_polynomial(double r) {
  constexpr double c[] = {1.0,
                          1.0,
                          5.000000000000018404e-1,
                          1.666666666666668082e-1,
                          4.166666666648795252e-2,
                          8.333333333319589616e-3,
                          1.388888895235286287e-3,
                          1.984126989007640283e-4,
                          2.480148544156131297e-5,
                          2.75572408872298686e-6,
                          2.763265472252779189e-7,
                          2.511004920481865979e-8};
  return horner(c, r);
}

// (exp(r) - 1) / r, |r| <= ln2 / 2
TP_HD float expm1_polynomial(float r) {
  constexpr float c[] = {1.0f,           5.000000047e-1f, 1.666666672e-1f, 4.166635277e-2f,
                         8.33329847e-3f, 1.39411189e-3f,  1.989928558e-4f};
  return horner(c, r);
}
TP_HD double expm1_polynomial(double r) {
  constexpr double c[] = {1.0,
                          5.0e-1,
                          1.666666666666668082e-1,
                          4.166666666666667677e-2,
                          8.333333333319589616e-3,
                          1.388888888887907399e-3,
                          1.984126989007640283e-4,
                          2.480158733644223786e-5,
                          2.75572408872298686e-6,
                          2.755726327908849691e-7,
                          2.511004920481865979e-8,
                          2.091813773764273643e-9};
  return horner(c, r);
}

// log1p(t), 0 < t <= 1. The float form is t * q(t): the square of a tiny t would be subnormal.
TP_HD float log1p_unit(float t, float scale) {
  constexpr float c[] = {9.999999947e-1f, -4.999989265e-1f, 3.33297105e-1f,  -2.495161626e-1f,
                         1.966327426e-1f, -1.526966707e-1f, 1.05436238e-1f,  -5.637361283e-2f,
                         1.954252726e-2f, -3.176057018e-3f};
  return (t * scale) * horner(c, t);
}
// The double form is 2 atanh(s), s = t / (2 + t), half the degree for one division; s is kept above
// 2^-500 before it is squared.
TP_HD double log1p_unit(double t, double scale) {
  constexpr double c[] = {3.333333333333333344e-1, 1.999999999999976125e-1,
                          1.428571428580004965e-1, 1.111111109911838528e-1,
                          9.090909948981357191e-2, 7.692271982430274643e-2,
                          6.667589315724627918e-2, 5.86713953065159873e-2,
                          5.422589197440007411e-2, 3.74607189777538365e-2,
                          7.815288900461425223e-2};
  const double s = t / (2.0 + t);
  const double root = s < 3.0549363634996047e-151 ? 3.0549363634996047e-151 : s;
  const double z = root * root;
  const double doubled = (s + s) * scale;
  return fused(doubled, z * horner(c, z), doubled);
}

template <class T>
struct SoftplusParameters {
  T beta;
  T inverse;    // 1 / beta
  T magnitude;  // |z| from which log1p(exp(-beta |z|)) / beta is taken as kSmallest
};

template <class T>
TP_HD SoftplusParameters<T> softplus_parameters(double beta, double log_beta) {
  using C = SoftplusConstants<T>;
  const double lowest = C::kLogSmallest + C::kMargin + (log_beta > 0 ? log_beta : 0.0);
  const double magnitude = lowest < 0 ? -lowest / beta : 0.0;
  return {static_cast<T>(beta), static_cast<T>(1.0 / beta), static_cast<T>(magnitude)};
}

template <class T>
TP_HD T softplus(T z, SoftplusParameters<T> p) {
  using C = SoftplusConstants<T>;
  using Bits = typename C::Bits;
  const T size = z < 0 ? -z : z;
  const T a = size > p.magnitude ? p.magnitude : size;  // a NaN passes
  const T n_shifted = fused(-(p.beta * a), C::kLog2e, C::kRound);
  const T n = n_shifted - C::kRound;
  // fused: beta * a enters unrounded, so a large beta * a costs no relative accuracy.
  const T r = fused(-n, C::kLn2Low, fused(-p.beta, a, -(n * C::kLn2High)));
  const T power = bit_cast<T>(static_cast<Bits>((bit_cast<Bits>(n_shifted) << C::kMantissa) + C::kOne));
  const T t = exp_polynomial(r) * power;
  const T smooth = size >= p.magnitude ? C::kSmallest : log1p_unit(t, p.inverse);
  return (z > 0 ? z : T(0)) + smooth;
}

// s = d softplus / dz from y = softplus(z)
template <class T>
TP_HD T softplus_derivative(T y, SoftplusParameters<T> p) {
  using C = SoftplusConstants<T>;
  using Bits = typename C::Bits;
  const T u = p.beta * y;
  const T v = u > C::kSaturated ? C::kSaturated : u;
  const T n_shifted = fused(-v, C::kLog2e, C::kRound);
  const T n = n_shifted - C::kRound;
  const T r = fused(-n, C::kLn2Low, fused(-n, C::kLn2High, -v));
  const T power = bit_cast<T>(static_cast<Bits>((bit_cast<Bits>(n_shifted) << C::kMantissa) + C::kOne));
  const T tail = r * expm1_polynomial(r);
  const T s = (T(1) - power) - power * tail;
  return s < C::kNegligible ? T(0) : (u > C::kSaturated ? T(1) : s);
}

}  // namespace twophase
