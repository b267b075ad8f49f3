// Smooth maximum of x_1 .. x_k: y = m + log(s) / beta, m = max x_j, s = sum exp(beta (x_j - m)), so
// that 1 <= s <= k, and its gradient, the weights exp(beta (x_j - m)) / s.
//
// m is taken as 0 where it is -inf: a window that holds nothing has s = 0. s >= 1 fails there and
// where a number is NaN or +inf: smooth_max_exception is the result then.
#pragma once

#include "softplus.h"

namespace twophase {

// Weights below kNegligible count as 0: no product with one is subnormal.
template <class T>
TP_HD SoftplusParameters<T> smooth_max_parameters(double beta, double log_beta) {
  constexpr double kLn2 = 0.69314718055994530942;
  SoftplusParameters<T> p = softplus_parameters<T>(beta, log_beta);
  p.vanished = static_cast<T>((sizeof(T) == 4 ? 64 : 512) * kLn2 / beta);
  return p;
}

template <class T>
TP_HD T larger(T x, T m) {
  return x > m ? x : m;  // of a NaN x: m
}

template <class T>
TP_HD T smooth_max_origin(T m) {
  return m == -T(__builtin_inf()) ? T(0) : m;
}

// exp(beta (x - m)), x <= m; a NaN passes
template <class T>
TP_HD T smooth_max_weight(T x, T m, const SoftplusParameters<T>& p) {
  return softplus_complement(m - x, p);
}

// log(s) / beta, s >= 1: two terms that are not negative, s = 2^n (1 + t), 0 <= t < 1.
template <class T>
TP_HD T smooth_max_log(T s, const SoftplusParameters<T>& p) {
  using C = SoftplusConstants<T>;
  using Bits = typename C::Bits;
  constexpr T kLn2 = T(0.69314718055994530942);
  constexpr T kShift = C::kRound / T(1.5);  // 2^mantissa: its last bit is worth 1
  const Bits bits = bit_cast<Bits>(s);
  const Bits n = (bits - C::kOne) >> C::kMantissa;
  const T t = bit_cast<T>(static_cast<Bits>(bits - (n << C::kMantissa))) - T(1);
  const T whole = bit_cast<T>(static_cast<Bits>(bit_cast<Bits>(kShift) | n)) - kShift;
  return fused(whole, kLn2 * p.inverse, log1p_unit(t, p.inverse));
}

// NaN where a number of the window is one, else its largest (each calls f with each number).
template <class T, class Each>
TP_HD T smooth_max_exception(const Each& each) {
  T m = -T(__builtin_inf());
  bool nan = false;
  each([&](T x) {
    m = larger(x, m);
    nan = nan || x != x;
  });
  return nan ? T(__builtin_nan("")) : m;
}

// What a window's weights are multiplied by: grad / s, and 0 where there is no gradient.
template <class T>
TP_HD T smooth_max_share(T grad, T s) {
  return grad == 0 ? T(0) : grad / s;
}

}  // namespace twophase
