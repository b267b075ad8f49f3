#include "gram_logdet.h"

#include "../../math/cholesky.h"
#include "vector.h"

namespace twophase::TP_ISA {
namespace {

constexpr int N = kLanes<double>;
using V = DoubleVector;

// Rows and vectors of a block of the Gram matrix that fits the registers.
#if defined(__AVX512F__)
constexpr int kBlockRows = 8;
#else
constexpr int kBlockRows = 4;
#endif
constexpr int kBlockVectors = 2;

struct Matrix {
  int64_t n, ld;  // rows and columns [n, ld) are padding: zeros in the Gram matrix
  double* gram;   // [ld, ld], the upper triangle counts
  double* factor;
  double* panel;  // [kGramPanel, ld], columns of M scaled
  double* diagonal;
  double* column;
  double* scale;
};

// The largest magnitude of a row; NaN or infinity among its elements gives NaN.
template <class T>
double largest_magnitude(const T* x, int64_t m) {
  T largest = 0, not_finite = 0;
#pragma omp simd reduction(max : largest) reduction(+ : not_finite)
  for (int64_t c = 0; c < m; ++c) {
    const T size = absolute(x[c]);
    largest = size > largest ? size : largest;
    not_finite += x[c] - x[c];  // 0, or NaN
  }
  return static_cast<double>(largest) + static_cast<double>(not_finite);
}

// Columns [c, c + width) of the scaled M, one panel row each; the ones are column m.
template <class T>
void pack(const Matrix& a, const T* features, int64_t m, int64_t c, int64_t width) {
  const int64_t stored = m - c < width ? m - c : width;
  for (int64_t i = 0; i < a.n; ++i) {
    const T* x = features + i * m + c;
    for (int64_t v = 0; v < stored; ++v)
      a.panel[v * a.ld + i] = static_cast<double>(x[v]) * a.scale[i];
  }
  if (stored < width)
    for (int64_t i = 0; i < a.n; ++i) a.panel[stored * a.ld + i] = a.scale[i];
  for (int64_t v = 0; v < width; ++v)
    for (int64_t i = a.n; i < a.ld; ++i) a.panel[v * a.ld + i] = 0;
}

// gram += panel^T panel in rows [i, i + kBlockRows), columns [j, j + kVectors N)
template <int kVectors>
void add_block(const Matrix& a, int64_t width, int64_t i, int64_t j) {
  V sum[kBlockRows][kVectors] = {};
  for (int64_t c = 0; c < width; ++c) {
    const double* p = a.panel + c * a.ld;
    V right[kVectors];
    TP_UNROLL
    for (int v = 0; v < kVectors; ++v) right[v] = load_vector(p + j + v * N);
    TP_UNROLL
    for (int r = 0; r < kBlockRows; ++r) TP_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[r][v] = fused(broadcast(p[i + r]), right[v], sum[r][v]);
  }
  for (int r = 0; r < kBlockRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      double* g = a.gram + (i + r) * a.ld + j + v * N;
      store_vector(g, load_vector(g) + sum[r][v]);
    }
}

void add_panel(const Matrix& a, int64_t width) {
  for (int64_t i = 0; i < a.ld; i += kBlockRows)
    for (int64_t j = i / N * N; j < a.ld; j += kBlockVectors * N)
      with_constant<kBlockVectors>(
          j + kBlockVectors * N <= a.ld ? kBlockVectors : 1,
          [&](auto count) { add_block<decltype(count)::value>(a, width, i, j); });
}

void swap(double* x, double* y) {
  const double t = *x;
  *x = *y;
  *y = t;
}

// Exchanges rows and columns j and q > j of the rest, and the columns of the factor above it.
void exchange(const Matrix& a, int64_t j, int64_t q) {
  double* u = a.factor;
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
  double* u = a.factor;
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

// Cholesky of the symmetric matrix with a.diagonal as its diagonal and the upper triangle of
// a.factor as the rest, both overwritten. Returns the number of positive pivots before the first
// that is not; pivots may be null.
template <bool kPivoting>
int64_t cholesky(const Matrix& a, double* pivots) {
  for (int64_t j = 0; j < a.n; ++j) {
    if (kPivoting) {
      int64_t q = j;
      for (int64_t i = j + 1; i < a.n; ++i)
        if (a.diagonal[i] > a.diagonal[q]) q = i;
      if (q != j) exchange(a, j, q);
    }
    const double pivot = a.diagonal[j];
    if (!(pivot > 0)) return j;
    if (pivots) pivots[j] = pivot;
    factor_row(a, j, __builtin_sqrt(pivot));
  }
  return a.n;
}

void copy(double* to, const double* from, int64_t n) {
  __builtin_memcpy(to, from, n * sizeof(double));
}

template <class T>
void run(const T* features, int64_t n, int64_t m, bool append_ones, double* workspace,
         int64_t* rank, int64_t* info, double* pivots, int64_t* exponents) {
  Matrix a{n, gram_padded(n), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  a.gram = workspace;
  a.factor = a.gram + a.ld * a.ld;
  a.panel = a.factor + a.ld * a.ld;
  a.diagonal = a.panel + kGramPanel * a.ld;
  a.column = a.diagonal + a.ld;
  a.scale = a.column + a.ld;
  double* gram_diagonal = a.scale + a.ld;

  *exponents = 0;
  for (int64_t i = 0; i < n; ++i) {
    double largest = largest_magnitude(features + i * m, m);
    if (!is_finite(largest)) {
      *rank = 0, *info = -1;
      return;
    }
    if (append_ones && largest < 1) largest = 1;
    const int e = row_exponent(largest);
    *exponents += e;
    a.scale[i] = power_of_two(-e);
  }

  const int64_t p = m + (append_ones ? 1 : 0);
  __builtin_memset(a.gram, 0, a.ld * a.ld * sizeof(double));
  for (int64_t c = 0; c < p; c += kGramPanel) {
    const int64_t width = p - c < kGramPanel ? p - c : kGramPanel;
    pack(a, features, m, c, width);
    add_panel(a, width);
  }
  double trace = 0;
  for (int64_t i = 0; i < a.ld; ++i) trace += gram_diagonal[i] = a.gram[i * a.ld + i];

  copy(a.factor, a.gram, a.ld * a.ld);
  copy(a.diagonal, gram_diagonal, a.ld);
  const int64_t good = cholesky<false>(a, pivots);
  *info = good == n ? 0 : good + 1;

  const double s = certificate_shift(n, p, trace);
  copy(a.factor, a.gram, a.ld * a.ld);
  for (int64_t i = 0; i < a.ld; ++i) a.diagonal[i] = shifted_down(gram_diagonal[i], s);
  *rank = cholesky<true>(a, nullptr);
}

}  // namespace

void gram_logdet_small(Dtype dtype, const void* features, int64_t n, int64_t m, bool append_ones,
                       double* workspace, int64_t* rank, int64_t* info, double* pivots,
                       int64_t* exponents) {
  if (dtype == Dtype::kFloat64)
    run(static_cast<const double*>(features), n, m, append_ones, workspace, rank, info, pivots,
        exponents);
  else
    run(static_cast<const float*>(features), n, m, append_ones, workspace, rank, info, pivots,
        exponents);
}

}  // namespace twophase::TP_ISA
