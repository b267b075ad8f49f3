// Scalar parts of the certified rank of M [n, p]: exact row scaling, and the shift s.
//
// Rump (BIT 46, 2006): if the Cholesky factorization of fl(M M^T) - s I runs to completion in
// floating point, then lambda_min(M M^T) >= s - e_G - e_C, where
//   e_G = gamma_k T bounds || fl(M M^T) - M M^T ||_2 where no product passes more than k roundings
//         (k = p: whatever the order of summation): the error is at most gamma_k |M||M|^T entry by
//         entry, and for entries of any sign
//         || |M||M|^T ||_2 <= trace(|M||M|^T) = trace(M M^T) = T;
//   e_C = c u T. Whatever the order, c = n + 2 (sum_j k_j u g_jj, k_j = j + 3, j from 0). Where no
//         product passes more than c roundings on its way into l_ij l_jj, L L^T differs from the
//         shifted matrix by gamma_c |L||L|^T at most, entry by entry, hence in norm by
//         gamma_c ||L||_F^2 <= gamma_c / (1 - gamma_c) T.
// With s above e_G + e_C the rows of M are independent: a proof. The same holds for every principal
// submatrix, so r pivots of a factorization with diagonal pivoting prove rank >= r.
// Assumed: rounding to nearest and no flush-to-zero, the defaults.
//
// And more than the rank: s = (1 + kReserve) (e_G + e_C), so that the smallest eigenvalue of the r
// rows that were factored is at least kReserve (k + c) u T, and T at least the largest one. M is
// 2^e_i times the scaled row i; with e_i in an interval of length `spread`,
//   sigma_r(M) >= rcond sigma_1(M), rcond = sqrt(kReserve (k + c) u) 2^-spread.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace twophase {

constexpr double kUnitRoundoff = 0x1p-53;
constexpr double kSlack = 1.0 + 0x1p-20;  // covers the rounding of the bound itself and of T
// More than all underflow together: n p eta + 6 n (n + max g_jj) eta, eta = 2^-1074, and that of
// the row scaling, while n < 2^20, p < 2^40 and g_jj < 2^90.
constexpr double kUnderflow = 0x1p-900;

constexpr double kReserve = 0x1p-10;

// s for a product of at most `gram` roundings and a factorization of at most `cholesky`: k and c.
// `trace`: computed trace of fl(M M^T).
TP_HD double certificate_shift(int64_t gram, int64_t cholesky, double trace) {
  const double ku = static_cast<double>(gram) * kUnitRoundoff;
  const double e_G = ku / (1.0 - ku) * trace;
  const double e_C = static_cast<double>(cholesky) * kUnitRoundoff * trace;
  return (e_G + e_C) * (kSlack * kSlack) * (1.0 + kReserve) + kUnderflow;
}

// A lower bound of sigma_r / sigma_1 where r pivots of the factorization with that shift were
// positive, 0 < r; half of kReserve stands for all rounding.
TP_HD double certificate_rcond(int64_t gram, int64_t cholesky, int spread) {
  const double reserve = kReserve / 2 * kUnitRoundoff * static_cast<double>(gram + cholesky);
  return __builtin_ldexp(__builtin_sqrt(reserve), -spread);
}

// The largest double below a finite x.
TP_HD double next_below(double x) {
  if (x == 0) return -0x1p-1074;
  const uint64_t bits = bit_cast<uint64_t>(x);
  return bit_cast<double>(x > 0 ? bits - 1 : bits + 1);
}

// A diagonal element of fl(M M^T) - s I, rounded down.
TP_HD double shifted_down(double g, double s) { return next_below(g - s); }

// Rows are multiplied by 2^-e, which keeps rank and signs of pivots and moves log det by
// 2 e ln 2: e is the exponent of the row's largest magnitude, within [-1000, 1000] so that 2^-e is
// normal. 0 for a row of zeros. An appended 1 is part of the row.
TP_HD int row_exponent(double largest) {
  if (largest == 0) return 0;
  const int e = static_cast<int>(bit_cast<uint64_t>(largest) >> 52 & 0x7ff) - 1023;
  return e < -1000 ? -1000 : e > 1000 ? 1000 : e;
}

// 2^e for a normal result
TP_HD double power_of_two(int e) { return bit_cast<double>(static_cast<uint64_t>(e + 1023) << 52); }

TP_HD bool is_finite(double x) { return (bit_cast<uint64_t>(x) >> 52 & 0x7ff) != 0x7ff; }

}  // namespace twophase
