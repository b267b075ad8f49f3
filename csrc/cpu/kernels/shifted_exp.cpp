// The exponentials of a softmax, a vector at a time: a scalar library's would take as long as the
// two products of a narrow last layer.
#include "shifted_exp.h"

#include "vector.h"

namespace twophase::TP_ISA {
namespace {

using V = DoubleVector;
using Bits = int64_t __attribute__((vector_size(kVectorBytes)));
constexpr int N = kLanes<double>;

// exp(x) = 2^n exp(r), n = round(x / log 2), |r| <= log(2) / 2: the Taylor polynomial of degree 13
// errs by 4e-18.
TP_HD V exp_of(V x) {
  constexpr double kLowest = -708.0, kRound = 0x1.8p52;  // adding it rounds to an integer
  const auto far_below = x < kLowest;
  x = far_below ? broadcast(kLowest) : x;
  const V shifted = fused(x, broadcast(0x1.71547652b82fep0), broadcast(kRound));
  const V n = shifted - kRound;
  V r =
      fused(n, broadcast(-0x1.62e42fefa3800p-1), x);  // log 2 in two parts, n times the first exact
  r = fused(n, broadcast(-0x1.ef35793c76730p-45), r);
  constexpr double kInverseFactorials[] = {1.0 / 6227020800.0,
                                           1.0 / 479001600.0,
                                           1.0 / 39916800.0,
                                           1.0 / 3628800.0,
                                           1.0 / 362880.0,
                                           1.0 / 40320.0,
                                           1.0 / 5040.0,
                                           1.0 / 720.0,
                                           1.0 / 120.0,
                                           1.0 / 24.0,
                                           1.0 / 6.0,
                                           0.5,
                                           1.0,
                                           1.0};
  V p = broadcast(kInverseFactorials[0]);
  TP_UNROLL
  for (int i = 1; i < 14; ++i) p = fused(p, r, broadcast(kInverseFactorials[i]));
  const V scale = reinterpret_cast<V>((reinterpret_cast<Bits>(shifted) + 1023) << 52);
  return far_below ? V{} : p * scale;
}

}  // namespace

void shifted_exp(double* z, int64_t k, double max) {
  int64_t j = 0;
  for (; j + N <= k; j += N) store_vector(z + j, exp_of(load_vector(z + j) - max));
  if (j == k) return;
  double rest[N];
  store_vector(rest, exp_of(load_vector(z + j, k - j) - max));
  for (int64_t i = 0; j + i < k; ++i) z[j + i] = rest[i];
}

}  // namespace twophase::TP_ISA
