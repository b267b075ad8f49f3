#include "pivoted_cholesky.h"

#include "vector.h"

namespace twophase::TP_ISA {
namespace {

constexpr int N = kLanes<double>;
using V = DoubleVector;

struct Matrix {
  int64_t n, ld;
  double* rows;
  double* diagonal;
  double* column;
};

void swap(double* x, double* y) {
  const double t = *x;
  *x = *y;
  *y = t;
}

// Exchanges rows and columns j and q > j of the rest, and the columns of the factor above it.
void exchange(const Matrix& a, int64_t j, int64_t q) {
  double* u = a.rows;
  for (int64_t t = 0; t < j; ++t) swap(&u[t * a.ld + j], &u[t * a.ld + q]);
  for (int64_t t = j + 1; t < q; ++t) swap(&u[j * a.ld + t], &u[t * a.ld + q]);
  for (int64_t t = q + 1; t < a.n; ++t) swap(&u[j * a.ld + t], &u[q * a.ld + t]);
  swap(&a.diagonal[j], &a.diagonal[q]);
}

// Row j of U, U^T U = the matrix, right of the diagonal: u_ji = (a_ji - sum_t u_tj u_ti) / u_jj;
// takes its squares off the diagonal. Starts at a whole vector: elements left of the diagonal are
// never read.
void factor_row(const Matrix& a, int64_t j, double root) {
  constexpr int kVectors = 4;
  double* u = a.rows;
  for (int64_t t = 0; t < j; ++t) a.column[t] = -u[t * a.ld + j];
  const V pivot = broadcast(root);
  for (int64_t i = (j + 1) / N * N; i < a.ld; i += kVectors * N)
    with_constant<kVectors>((a.ld - i) / N < kVectors ? (a.ld - i) / N : kVectors, [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      V rest[kCount];
      for (int v = 0; v < kCount; ++v) rest[v] = load_vector(u + j * a.ld + i + v * N);
      for (int64_t t = 0; t < j; ++t) {
        const V c = broadcast(a.column[t]);
        TP_UNROLL
        for (int v = 0; v < kCount; ++v)
          rest[v] = fused(c, load_vector(u + t * a.ld + i + v * N), rest[v]);
      }
      for (int v = 0; v < kCount; ++v) {
        const V x = rest[v] / pivot;
        double* d = a.diagonal + i + v * N;
        store_vector(u + j * a.ld + i + v * N, x);
        store_vector(d, fused(-x, x, load_vector(d)));
      }
    });
}

}  // namespace

int64_t pivoted_cholesky(int64_t n, int64_t ld, double* rows, double* diagonal, double* column) {
  const Matrix a{n, ld, rows, diagonal, column};
  for (int64_t j = 0; j < n; ++j) {
    int64_t q = j;
    for (int64_t i = j + 1; i < n; ++i)
      if (diagonal[i] > diagonal[q]) q = i;
    if (q != j) exchange(a, j, q);
    if (!(diagonal[j] > 0)) return j;
    factor_row(a, j, __builtin_sqrt(diagonal[j]));
  }
  return n;
}

}  // namespace twophase::TP_ISA
