// softplus_beta(z) = max(z, 0) + log1p(exp(-beta |z|)) / beta, exact for every z, and its
// derivative from the output y: s = sigmoid(beta z) = -expm1(-beta y).
//
// No threshold (torch returns z beyond beta z = 20, which is not analytic) and no subnormal number
// on the way: on many processors one stalls the vector unit for a hundred cycles. exp(-beta a) is
// 2^-n 2^f with n an integer and |f| <= 1/2. The polynomials come from fit.py.
#pragma once

#include "dtype.h"

namespace twophase {

template <class T>
struct SoftplusConstants;

template <>
struct SoftplusConstants<float> {
  using Bits = uint32_t;
  static constexpr float kSmallest = 1.17549435e-38f;  // 2^-126: results below it return it
  static constexpr double kMargin = 1e-4;              // keeps t / beta normal after its roundings
  static constexpr float kRound = 12582912.0f;         // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kMantissa = 23;
  static constexpr Bits kOne = 0x3f800000u;
  static constexpr double kSaturated = 30.0;           // 1 - exp(-30) rounds to 1
  static constexpr double kVanished = 86.9;            // exp(-86.9) is still normal
  static constexpr float kNegligible = 5.421011e-20f;  // 2^-64: a derivative below it counts as 0
};

template <>
struct SoftplusConstants<double> {
  using Bits = uint64_t;
  static constexpr double kSmallest = 2.2250738585072014e-308;
  static constexpr double kMargin = 1e-10;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  static constexpr Bits kOne = 0x3ff0000000000000ull;
  static constexpr double kSaturated = 60.0;
  static constexpr double kVanished = 707.9;
  static constexpr double kNegligible = 7.458340731200207e-155;  // 2^-512
};

template <class T, int N>
TP_HD T horner(const T (&c)[N], T x) {
  T y = c[N - 1];
  TP_UNROLL
  for (int k = N - 2; k >= 0; --k) y = fused(y, x, c[k]);
  return y;
}

// 2^f, |f| <= 1/2
TP_HD float exp2_polynomial(float f) {
  constexpr float c[] = {1.000000076f,    6.93147188e-1f,  2.402210727e-1f,
                         5.550357093e-2f, 9.676043527e-3f, 1.339087485e-3f};
  return horner(c, f);
}
TP_HD double exp2_polynomial(double f) {
  constexpr double c[] = {
      9.999999999999999969e-1, 6.931471805599453093e-1, 2.402265069591015966e-1,
      5.550410866482162709e-2, 9.618129107587223664e-3, 1.333355814640645311e-3,
      1.54035304637665961e-4,  1.525273384157928824e-5, 1.321543251418964871e-6,
      1.017805707615538929e-7, 7.07419815879134628e-9,  4.455819966572141666e-10};
  return horner(c, f);
}

// (2^f - 1) / f, |f| <= 1/2
TP_HD float exp2m1_polynomial(float f) {
  constexpr float c[] = {6.93147188e-1f,  2.402265076e-1f, 5.550357093e-2f,
                         9.618082539e-3f, 1.339087485e-3f, 1.545317289e-4f};
  return horner(c, f);
}
TP_HD double exp2m1_polynomial(double f) {
  constexpr double c[] = {
      6.931471805599453093e-1, 2.402265069591007123e-1,  5.550410866482162709e-2,
      9.618129107628479495e-3, 1.333355814640645311e-3,  1.54035303933707247e-4,
      1.525273384157928824e-5, 1.321548680871670747e-6,  1.017805707615538929e-7,
      7.05489729842442407e-9,  4.455819966572141666e-10, 2.57293343650632574e-11};
  return horner(c, f);
}

// scale * log1p(t), 0 < t <= 1. The float form is t * q(t): the square of a tiny t would be
// subnormal. The scaled coefficients do not depend on t: compilers hoist them out of the loop.
TP_HD float log1p_unit(float t, float scale) {
  constexpr float c[] = {9.999999659e-1f,  -4.999944498e-1f, 3.331812171e-1f,
                         -2.483539899e-1f, 1.907688074e-1f,  -1.360224762e-1f,
                         7.751608674e-2f,  -2.907406468e-2f, 5.126102141e-3f};
  float scaled[sizeof(c) / sizeof(c[0])];
  TP_UNROLL
  for (int k = 0; k < static_cast<int>(sizeof(c) / sizeof(c[0])); ++k) scaled[k] = c[k] * scale;
  return t * horner(scaled, t);
}
// The double form is 2 atanh(s), s = t / (2 + t), half the degree for one division; s is kept above
// 2^-500 before it is squared.
TP_HD double log1p_unit(double t, double scale) {
  constexpr double c[] = {3.333333333333333344e-1, 1.999999999999976125e-1, 1.428571428580004965e-1,
                          1.111111109911838528e-1, 9.090909948981357191e-2, 7.692271982430274643e-2,
                          6.667589315724627918e-2, 5.86713953065159873e-2,  5.422589197440007411e-2,
                          3.74607189777538365e-2,  7.815288900461425223e-2};
  const double s = t / (2.0 + t);
  const double root = s < 3.0549363634996047e-151 ? 3.0549363634996047e-151 : s;
  const double z = root * root;
  const double doubled = (s + s) * scale;
  return fused(doubled, z * horner(c, z), doubled);
}

template <class T>
struct SoftplusParameters {
  T beta;
  T inverse;  // 1 / beta
  T rate;     // beta / ln 2, and what its rounding lost
  T rate_low;
  T magnitude;  // |z| from which log1p(exp(-beta |z|)) / beta is taken as kSmallest
  T saturated;  // y from which the derivative rounds to 1
  T vanished;   // y from which 1 - the derivative is taken as 0
};

template <class T>
TP_HD SoftplusParameters<T> softplus_parameters(double beta, double log_beta) {
  using C = SoftplusConstants<T>;
  constexpr double kLn2 = 0.69314718055994530942;
  constexpr double kLog2e = 1.4426950408889634074, kLog2eLow = 2.0355273740931033e-17;
  const double lowest =
      (sizeof(T) == 4 ? -126 : -1022) * kLn2 + C::kMargin + (log_beta > 0 ? log_beta : 0.0);
  const double rate = beta * kLog2e;
  const T high = static_cast<T>(rate);
  const double product_error = __builtin_fma(beta, kLog2e, -rate) + beta * kLog2eLow;
  return {static_cast<T>(beta),
          static_cast<T>(1.0 / beta),
          high,
          static_cast<T>((rate - high) + product_error),
          static_cast<T>(lowest < 0 ? -lowest / beta : 0.0),
          static_cast<T>(C::kSaturated / beta),
          static_cast<T>(C::kVanished / beta)};
}

// exp(-beta a) = 2^n 2^f for a in [0, magnitude]: returns f; `shifted` holds n in its low bits.
template <class T>
TP_HD T reduce(T a, const SoftplusParameters<T>& p, T* shifted) {
  constexpr T kRound = SoftplusConstants<T>::kRound;
  *shifted = fused(-a, p.rate, kRound);
  // fused: rate * a enters unrounded, so a large beta * a costs no relative accuracy.
  return fused(-a, p.rate_low, fused(-a, p.rate, kRound - *shifted));
}

// The bits of `shifted` moved to the exponent: n * 2^mantissa, modulo the word.
template <class T>
TP_HD typename SoftplusConstants<T>::Bits exponent(T shifted) {
  using C = SoftplusConstants<T>;
  return bit_cast<typename C::Bits>(shifted) << C::kMantissa;
}

template <class T>
TP_HD T softplus(T z, const SoftplusParameters<T>& p) {
  using C = SoftplusConstants<T>;
  using Bits = typename C::Bits;
  const T size = absolute(z);
  T shifted;
  const T f = reduce(size > p.magnitude ? p.magnitude : size, p, &shifted);
  const T t =
      bit_cast<T>(static_cast<Bits>(bit_cast<Bits>(exp2_polynomial(f)) + exponent(shifted)));
  const T smooth = size >= p.magnitude ? C::kSmallest : log1p_unit(t, p.inverse);
  return (z < 0 ? T(0) : z) + smooth;  // a NaN passes through z
}

// s = d softplus / dz from y = softplus(z)
template <class T>
TP_HD T softplus_derivative(T y, const SoftplusParameters<T>& p) {
  using C = SoftplusConstants<T>;
  using Bits = typename C::Bits;
  T shifted;
  const T f = reduce(y > p.saturated ? p.saturated : y, p, &shifted);  // a NaN passes
  const T power = bit_cast<T>(static_cast<Bits>(C::kOne + exponent(shifted)));
  const T s = (T(1) - power) - power * (f * exp2m1_polynomial(f));
  return s < C::kNegligible ? T(0) : s;
}

// 1 - s = exp(-beta y): the difference itself would be 0 as soon as s rounds to 1
template <class T>
TP_HD T softplus_complement(T y, const SoftplusParameters<T>& p) {
  using C = SoftplusConstants<T>;
  using Bits = typename C::Bits;
  T shifted;
  const T f = reduce(y > p.vanished ? p.vanished : y, p, &shifted);  // a NaN passes
  const T power = bit_cast<T>(static_cast<Bits>(C::kOne + exponent(shifted)));
  return y > p.vanished ? T(0) : power * exp2_polynomial(f);
}

}  // namespace twophase
