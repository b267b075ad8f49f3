// gram_logdet for small n, one block per matrix: the Gram matrix in float64, an unshifted Cholesky
// factorization for log det and a shifted, diagonally pivoted one for the certified rank.
//
// Both are right-looking eliminations of the Schur complement: neither needs the factor itself, so
// none is kept. Every entry sees the operations of textbook Cholesky (products subtracted one by
// one, division by the square root of the pivot), which is what the certificate's error bound asks.
#pragma once

#include <math.h>

#include "../../math/cholesky.h"
#include "reduce.h"

namespace twophase {

constexpr int kGramTile = 32;    // entries of the Gram matrix formed at a time, in each direction
constexpr int kGramDepth = 16;   // columns of the features in shared memory at a time
constexpr int kGramLimit = 256;  // the largest n

struct Candidate {
  double value;
  int64_t position;
};

struct GramShared {
  double a[kGramTile][kGramDepth + 1];  // + 1: rows start in different banks
  double b[kGramTile][kGramDepth + 1];
  double diagonal[kGramLimit];  // of the Gram matrix
  double column[kGramLimit];
  int exponents[kGramLimit];  // of the rows
  int order[kGramLimit];      // positions 0..j-1 hold the pivots taken
  double sums[kWarps];
  Candidate candidates[kWarps];
};

// A square in column-major order. The eliminations overwrite its lower triangle; the Gram matrix
// itself stays in the strict upper triangle and in shared.diagonal. The leading dimension is odd:
// rows start in different banks of shared memory too.
struct Square {
  double* data;
  int ld;
  TP_BODY double& at(int row, int column) const { return data[column * ld + row]; }
};
TP_HD int leading_dimension(int n) { return n | 1; }

// Exponents of the rows (a warp each); returns whether every feature is finite. features: [n, m]
template <class T, class Ctx>
TP_BODY bool scale_rows(const Ctx& ctx, GramShared& shared, const T* features, int n, int64_t m,
                        bool append_ones) {
  double bad = 0;
  for (int i = ctx.thread() / kWarp; i < n; i += kWarps) {
    double largest = append_ones ? 1.0 : 0.0;
    for (int64_t k = ctx.thread() % kWarp; k < m; k += kWarp) {
      const double x = absolute(static_cast<double>(features[i * m + k]));
      if (!is_finite(x)) bad = 1;
      largest = x > largest ? x : largest;
    }
    TP_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const double other = ctx.shuffle_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    if (ctx.thread() % kWarp == 0) shared.exponents[i] = row_exponent(largest);
  }
  return block_sum(ctx, shared.sums, bad) == 0;  // its barriers also publish the exponents
}

// The Gram matrix of the scaled [features, 1] in both triangles of s, its diagonal in shared.
template <class T, class Ctx>
TP_BODY void gram(const Ctx& ctx, GramShared& shared, const T* features, int n, int64_t m,
                  bool append_ones, const Square& s) {
  const int64_t width = m + (append_ones ? 1 : 0);
  const int tiles = static_cast<int>(ceil_div(n, kGramTile));
  // Each thread forms 2 x 4 entries.
  const int row = ctx.thread() / 8 * 2, column = ctx.thread() % 8 * 4;
  for (int tile_row = 0; tile_row < tiles; ++tile_row)
    for (int tile_column = 0; tile_column <= tile_row; ++tile_column) {
      double sum[2][4] = {};
      for (int64_t first = 0; first < width; first += kGramDepth) {
        ctx.sync();  // the last products have been read
        for (int e = ctx.thread(); e < 2 * kGramTile * kGramDepth; e += kBlock) {
          const int depth = e % kGramDepth, line = e / kGramDepth % kGramTile;
          const bool second = e >= kGramTile * kGramDepth;
          const int i = (second ? tile_column : tile_row) * kGramTile + line;
          const int64_t k = first + depth;
          double x = 0;
          if (i < n && k < width)
            x = (k < m ? static_cast<double>(features[i * m + k]) : 1.0) *
                power_of_two(-shared.exponents[i]);
          (second ? shared.b : shared.a)[line][depth] = x;
        }
        ctx.sync();
        for (int k = 0; k < kGramDepth; ++k) TP_UNROLL
        for (int i = 0; i < 2; ++i) TP_UNROLL
        for (int j = 0; j < 4; ++j)
          sum[i][j] = fused(shared.a[row + i][k], shared.b[column + j][k], sum[i][j]);
      }
      TP_UNROLL
      for (int i = 0; i < 2; ++i) TP_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int r = tile_row * kGramTile + row + i, c = tile_column * kGramTile + column + j;
        if (r < n && c < r) s.at(r, c) = s.at(c, r) = sum[i][j];
        if (r < n && c == r) shared.diagonal[r] = s.at(r, r) = sum[i][j];
      }
    }
}

struct Elimination {
  int pivots;          // completed before the first pivot that is not positive
  double log_product;  // of those pivots
};

// Cholesky of the lower triangle of s, which it overwrites. Begins with a barrier: what the threads
// wrote before is seen. Does not end with one.
template <bool kPivoting, class Ctx>
TP_BODY Elimination eliminate(const Ctx& ctx, GramShared& shared, int n, const Square& s) {
  for (int i = ctx.thread(); i < n; i += kBlock) shared.order[i] = i;
  ctx.sync();
  double log_product = 0;
  for (int j = 0; j < n; ++j) {
    if (kPivoting) {
      Candidate best{-1.0, j};
      for (int i = j + ctx.thread(); i < n; i += kBlock) {
        const double value = s.at(shared.order[i], shared.order[i]);
        if (value > best.value) best = {value, i};
      }
      best = block_reduce(ctx, shared.candidates, best, [](Candidate a, Candidate b) {
        return a.value > b.value || (a.value == b.value && a.position < b.position) ? a : b;
      });
      if (ctx.thread() == 0) {
        const int pivot = shared.order[best.position];
        shared.order[best.position] = shared.order[j];
        shared.order[j] = pivot;
      }
      ctx.sync();
    }
    const int pivot = shared.order[j];
    const double value = s.at(pivot, pivot);
    if (!(value > 0)) return {j, log_product};
    log_product += log(value);
    const double root = sqrt(value);
    for (int i = j + 1 + ctx.thread(); i < n; i += kBlock) {
      const int r = shared.order[i];
      shared.column[r] = (r > pivot ? s.at(r, pivot) : s.at(pivot, r)) / root;
    }
    ctx.sync();
    for (int k = j + 1 + ctx.thread() / kWarp; k < n; k += kWarps) {
      const int c = shared.order[k];
      for (int i = k + ctx.thread() % kWarp; i < n; i += kWarp) {
        const int r = shared.order[i];
        double& entry = r > c ? s.at(r, c) : s.at(c, r);
        entry = fused(-shared.column[r], shared.column[c], entry);
      }
    }
    ctx.sync();
  }
  return {n, log_product};
}

struct GramResult {
  int64_t* rank;
  double* logabsdet;
  int64_t* info;
  double* rcond;
  double* logabsdet_error;
};

// One matrix a block at a time; features: [batch, n, m], square: this block's n * ld doubles.
template <class T, class Ctx>
TP_BODY void gram_logdet_body(const Ctx& ctx, GramShared& shared, const T* features, int64_t batch,
                              int n, int64_t m, bool append_ones, double* square,
                              const GramResult& result) {
  constexpr double kLn2 = 0.69314718055994530942;
  const Square s{square, leading_dimension(n)};
  for (int64_t item = ctx.block(); item < batch; item += ctx.blocks()) {
    const T* matrix = features + item * n * m;
    if (!scale_rows(ctx, shared, matrix, n, m, append_ones)) {
      if (ctx.thread() == 0) {
        result.rank[item] = 0;
        result.logabsdet[item] = __builtin_nan("");
        result.info[item] = -1;
        result.rcond[item] = 0;
        result.logabsdet_error[item] = __builtin_inf();
      }
      continue;
    }
    gram(ctx, shared, matrix, n, m, append_ones, s);
    const Elimination plain = eliminate<false>(ctx, shared, n, s);
    ctx.sync();  // the last pivot has been read
    double trace = 0;
    int64_t exponents = 0;
    int low = 1000, high = -1000;
    for (int i = 0; i < n; ++i) {
      const int e = shared.exponents[i];
      trace += shared.diagonal[i];
      exponents += e;
      low = e < low ? e : low;
      high = e > high ? e : high;
    }
    const int64_t columns = m + (append_ones ? 1 : 0);
    const double shift = certificate_shift(columns, n + 2, trace);
    for (int c = ctx.thread() / kWarp; c < n; c += kWarps)
      for (int r = c + ctx.thread() % kWarp; r < n; r += kWarp)
        s.at(r, c) = r == c ? shifted_down(shared.diagonal[r], shift) : s.at(c, r);
    const Elimination shifted = eliminate<true>(ctx, shared, n, s);
    if (ctx.thread() == 0) {
      const bool complete = plain.pivots == n;
      result.rank[item] = shifted.pivots;
      result.logabsdet[item] = complete
                                   ? plain.log_product + 2 * kLn2 * static_cast<double>(exponents)
                                   : -__builtin_inf();
      result.info[item] = complete ? 0 : plain.pivots + 1;
      result.rcond[item] = shifted.pivots > 0 ? certificate_rcond(columns, n + 2, high - low) : 0.0;
      result.logabsdet_error[item] = complete && shifted.pivots == n
                                         ? plain.log_product - shifted.log_product
                                         : __builtin_inf();
    }
  }
}

}  // namespace twophase
