#include "gram_logdet.h"

#include "../../math/cholesky.h"
#include "vector.h"

namespace twophase::TP_ISA {
namespace {

constexpr int N = kLanes<double>;
using V = DoubleVector;
constexpr int kGroup = 3;  // strips at a time: kGroup * N sums fill the registers
constexpr int64_t kBlockStrips = kGramBlock / N;

// Columns of strip s begin here, N numbers each.
TP_HD double* strip(double* triangle, int64_t s) { return triangle + N * N * (s * (s + 1) / 2); }

TP_HD int64_t strips_of(const GramMatrix& a) { return (a.n + N - 1) / N; }

// sum[s][c] += the products of row vectors left[s] and row c of the strip at right, `count` columns
template <int kStrips>
TP_HD void add_products(V (&sum)[kStrips][N], const double* const (&left)[kStrips],
                        const double* right, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    V rows[kStrips];
    TP_UNROLL
    for (int s = 0; s < kStrips; ++s) rows[s] = load_vector(left[s] + k * N);
    TP_UNROLL
    for (int c = 0; c < N; ++c) {
      const V other = broadcast(right[k * N + c]);
      TP_UNROLL
      for (int s = 0; s < kStrips; ++s) sum[s][c] = fused(rows[s], other, sum[s][c]);
    }
  }
}

// Calls f(first strip, Constant<number of strips>) for groups that cover strips [begin, end).
template <class F>
TP_HD void for_groups(int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end; i += kGroup)
    with_constant<kGroup>(end - i < kGroup ? end - i : kGroup, [&](auto strips) { f(i, strips); });
}

// ---- G

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

template <class T>
bool scale(const GramMatrix& a, const T* features, int64_t begin, int64_t end) {
  bool finite = true;
  for (int64_t i = begin; i < end; ++i) {
    double largest = largest_magnitude(features + i * a.m, a.m);
    finite = finite && is_finite(largest);
    if (a.append_ones && largest < 1) largest = 1;
    a.exponents[i] = row_exponent(largest);
    a.scale[i] = power_of_two(-a.exponents[i]);
  }
  return finite;
}

template <class T>
void pack(const GramMatrix& a, const T* features, int64_t column, int64_t width, int64_t begin,
          int64_t end) {
  const int64_t stored = a.m - column < width ? a.m - column : width;  // the ones are column m
  for (int64_t s = begin; s < end; ++s) {
    double* to = a.panel + s * N * kGramPanel;
    const T* rows[N];
    V factors;
    for (int r = 0; r < N; ++r) {
      const int64_t i = s * N + r;
      rows[r] = features + (i < a.n ? i : 0) * a.m + column;
      factors[r] = i < a.n ? a.scale[i] : 0;
    }
    for (int64_t k = 0; k < stored; ++k) {
      V x;  // filled lane by lane: a loop over k inside would scatter
      for (int r = 0; r < N; ++r) x[r] = static_cast<double>(rows[r][k]);
      store_vector(to + k * N, x * factors);
    }
    if (stored < width) store_vector(to + stored * N, factors);
  }
}

// Tiles (i.., j) of G
template <int kStrips>
TP_HD void add_tiles(const GramMatrix& a, int64_t width, bool first, int64_t i, int64_t j) {
  V sum[kStrips][N] = {};
  const double* left[kStrips];
  for (int s = 0; s < kStrips; ++s) left[s] = a.panel + (i + s) * N * kGramPanel;
  add_products<kStrips>(sum, left, a.panel + j * N * kGramPanel, width);
  for (int s = 0; s < kStrips; ++s) {
    double* g = strip(a.gram, i + s) + j * N * N;
    for (int c = 0; c < N; ++c)
      store_vector(g + c * N, first ? sum[s][c] : load_vector(g + c * N) + sum[s][c]);
  }
}

// ---- L

// y = tiles (i.., j) of `from` less the products of columns [begin, end) of L
template <int kStrips>
TP_HD void reduced(const GramMatrix& a, double* from, int64_t i, int64_t j, int64_t begin,
                   int64_t end, V (&y)[kStrips][N]) {
  V sum[kStrips][N] = {};
  const double* left[kStrips];
  for (int s = 0; s < kStrips; ++s) left[s] = strip(a.factor, i + s) + begin * N;
  add_products<kStrips>(sum, left, strip(a.factor, j) + begin * N, end - begin);
  for (int s = 0; s < kStrips; ++s) {
    const double* x = strip(from, i + s) + j * N * N;
    for (int c = 0; c < N; ++c) y[s][c] = load_vector(x + c * N) - sum[s][c];
  }
}

template <int kStrips>
TP_HD void store_tiles(const GramMatrix& a, int64_t i, int64_t j, const V (&y)[kStrips][N]) {
  for (int s = 0; s < kStrips; ++s) {
    double* x = strip(a.factor, i + s) + j * N * N;
    for (int c = 0; c < N; ++c) store_vector(x + c * N, y[s][c]);
  }
}

// Takes the products of all blocks before strip `first` off tiles (i.., [first, last)). Returns
// where they then are.
template <int kStrips>
TP_HD double* take_off_blocks(const GramMatrix& a, int64_t i, int64_t first, int64_t last) {
  double* from = a.gram;
  for (int64_t block = 0; block < first; block += kBlockStrips) {
    for (int64_t j = first; j < last; ++j) {
      V y[kStrips][N];
      reduced<kStrips>(a, from, i, j, block * N, (block + kBlockStrips) * N, y);
      store_tiles<kStrips>(a, i, j, y);
    }
    from = a.factor;
  }
  return from;
}

// Tiles (i.., [first, last)) of L, below the diagonal; tiles before `first` are there.
template <int kStrips>
TP_HD void substitute(const GramMatrix& a, double* from, int64_t i, int64_t first, int64_t last) {
  for (int64_t j = first; j < last; ++j) {
    V y[kStrips][N];
    reduced<kStrips>(a, from, i, j, first * N, j * N, y);
    const double* l = strip(a.factor, j) + j * N * N;  // l[k * N + c]: row c, column k
    TP_UNROLL
    for (int k = 0; k < N; ++k) {
      const V pivot = broadcast(l[k * N + k]);
      TP_UNROLL
      for (int s = 0; s < kStrips; ++s) y[s][k] /= pivot;
      TP_UNROLL
      for (int c = k + 1; c < N; ++c) {
        const V other = broadcast(-l[k * N + c]);
        TP_UNROLL
        for (int s = 0; s < kStrips; ++s) y[s][c] = fused(y[s][k], other, y[s][c]);
      }
    }
    store_tiles<kStrips>(a, i, j, y);
  }
}

// Tile (i, i) of L. Returns the first row whose pivot is not positive, or -1.
int64_t factor_tile(const GramMatrix& a, double* from, int64_t i, int64_t first, double* pivots) {
  V y[1][N];
  reduced<1>(a, from, i, i, first * N, i * N, y);
  const int64_t count = a.n - i * N < N ? a.n - i * N : N;
  double* l = strip(a.factor, i) + i * N * N;
  for (int k = 0; k < count; ++k) {
    store_vector(l + k * N, y[0][k]);
    const double pivot = l[k * N + k];
    if (!(pivot > 0)) return i * N + k;
    pivots[i * N + k] = pivot;
    y[0][k] /= broadcast(__builtin_sqrt(pivot));
    store_vector(l + k * N, y[0][k]);
    for (int c = k + 1; c < N; ++c) y[0][c] = fused(y[0][k], broadcast(-l[k * N + c]), y[0][c]);
  }
  return -1;
}

struct Part {
  int64_t begin, end;
};

// Strips of a lower triangle with about as many tiles in every part: begins go as square roots.
Part part_of_triangle(int64_t strips, int64_t part, int64_t parts) {
  const auto at = [&](int64_t k) {
    return static_cast<int64_t>(__builtin_sqrt(static_cast<double>(k) / parts) * strips + 0.5);
  };
  return {at(part), at(part + 1)};
}

Part part_of(int64_t begin, int64_t end, int64_t part, int64_t parts) {
  const int64_t n = end - begin;
  return {begin + n * part / parts, begin + n * (part + 1) / parts};
}

}  // namespace

bool gram_scale(const GramMatrix& a, int64_t begin, int64_t end) {
  if (a.dtype == Dtype::kFloat64)
    return scale(a, static_cast<const double*>(a.features), begin, end);
  return scale(a, static_cast<const float*>(a.features), begin, end);
}

void gram_pack(const GramMatrix& a, int64_t column, int64_t width, int64_t part, int64_t parts) {
  const Part p = part_of(0, strips_of(a), part, parts);
  if (a.dtype == Dtype::kFloat64)
    pack(a, static_cast<const double*>(a.features), column, width, p.begin, p.end);
  else
    pack(a, static_cast<const float*>(a.features), column, width, p.begin, p.end);
}

void gram_add(const GramMatrix& a, int64_t width, bool first, int64_t part, int64_t parts) {
  constexpr int64_t kTogether = 16;  // strips of the panel that stay in the cache
  const Part p = part_of_triangle(strips_of(a), part, parts);
  for (int64_t j0 = 0; j0 < p.end; j0 += kTogether)
    for_groups(p.begin < j0 ? j0 : p.begin, p.end, [&](int64_t i, auto strips) {
      constexpr int kStrips = decltype(strips)::value;
      for (int64_t j = j0; j < j0 + kTogether && j < i + kStrips; ++j) {
        if (j <= i)
          add_tiles<kStrips>(a, width, first, i, j);
        else
          for (int64_t s = j; s < i + kStrips; ++s) add_tiles<1>(a, width, first, s, j);
      }
    });
}

void gram_get_diagonal(const GramMatrix& a, double* diagonal) {
  for (int64_t i = 0; i < a.n; ++i) diagonal[i] = strip(a.gram, i / N)[i * N + i % N];
}

void gram_set_diagonal(const GramMatrix& a, const double* diagonal) {
  for (int64_t i = 0; i < a.n; ++i) strip(a.gram, i / N)[i * N + i % N] = diagonal[i];
}

int64_t gram_factor_block(const GramMatrix& a, int64_t column, double* pivots) {
  const int64_t first = column / N, strips = strips_of(a);
  const int64_t last = first + kBlockStrips < strips ? first + kBlockStrips : strips;
  for (int64_t i = first; i < last; ++i) {
    double* from = take_off_blocks<1>(a, i, first, i + 1);
    substitute<1>(a, from, i, first, i);
    const int64_t failed = factor_tile(a, from, i, first, pivots);
    if (failed >= 0) return failed;
  }
  return -1;
}

void gram_factor_below(const GramMatrix& a, int64_t column, int64_t part, int64_t parts) {
  const int64_t first = column / N, last = first + kBlockStrips;
  if (last >= strips_of(a)) return;
  const Part p = part_of(last, strips_of(a), part, parts);
  for_groups(p.begin, p.end, [&](int64_t i, auto strips) {
    constexpr int kStrips = decltype(strips)::value;
    double* from = take_off_blocks<kStrips>(a, i, first, last);
    substitute<kStrips>(a, from, i, first, last);
  });
}

void gram_unpack(const GramMatrix& a, double* rows) {
  const int64_t ld = gram_padded(a.n);
  for (int64_t i = 0; i < a.n; ++i)
    for (int64_t j = 0; j <= i; ++j) rows[j * ld + i] = strip(a.gram, i / N)[j * N + i % N];
  for (int64_t j = 0; j < a.n; ++j)
    for (int64_t i = a.n; i < ld; ++i) rows[j * ld + i] = 0;
}

}  // namespace twophase::TP_ISA
