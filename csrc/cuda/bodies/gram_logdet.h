// gram_logdet for small n, one block per matrix: the Gram matrix in float64, an unshifted Cholesky
// factorization for log det and a shifted, diagonally pivoted one for the certified rank.
//
// Both are right-looking eliminations of the Schur complement: neither needs the factor itself, so
// none is kept. Every entry sees the operations of textbook Cholesky (products subtracted one by
// one, division by the square root of the pivot), which is what the certificate's error bound asks.
#pragma once

#include "../../math/dtype.h"
#include "reduce.h"

namespace twophase {

constexpr int kGramTile = 32;   // entries of the Gram matrix formed at a time, in each direction
constexpr int kGramDepth = 16;  // columns of the features in shared memory at a time
constexpr int kGramLimit = 256;

struct Candidate {
  double value;
  int position;
  int padding;
};

struct GramShared {
  double a[kGramTile][kGramDepth + 1];  // + 1: rows start in different banks
  double b[kGramTile][kGramDepth + 1];
  double diagonal[kGramLimit];
  double column[kGramLimit];
  int order[kGramLimit];  // positions 0..j-1 hold the pivots taken
  double sums[kWarps];
  Candidate candidates[kWarps];
};

// The Gram matrix lives in the strict upper triangle of a column-major square and in
// shared.diagonal; the elimination overwrites the lower triangle.
struct Square {
  double* data;
  int64_t n;
  TP_BODY double& at(int row, int column) const { return data[column * n + row]; }
};

// Fills the lower triangle of s (diagonal included) with [features, 1] [features, 1]^T; returns
// whether every feature is finite. features: [n, m]
template <class T, class Ctx>
TP_BODY bool gram(const Ctx& ctx, GramShared& shared, const T* features, int n, int64_t m,
                  bool append_ones, const Square& s) {
  const int64_t width = m + (append_ones ? 1 : 0);
  const int tiles = static_cast<int>(ceil_div(n, kGramTile));
  // Each thread forms 2 x 4 entries.
  const int row = ctx.thread() / 8 * 2, column = ctx.thread() % 8 * 4;
  double bad = 0;
  for (int block_row = 0; block_row < tiles; ++block_row)
    for (int block_column = 0; block_column <= block_row; ++block_column) {
      double sum[2][4] = {};
      for (int64_t first = 0; first < width; first += kGramDepth) {
        ctx.sync();  // the last products have been read
        for (int e = ctx.thread(); e < 2 * kGramTile * kGramDepth; e += kBlock) {
          const int depth = e % kGramDepth, line = e / kGramDepth;
          const bool second = line >= kGramTile;
          const int i = (second ? block_column : block_row) * kGramTile + line % kGramTile;
          const int64_t k = first + depth;
          double x = k == m && append_ones ? 1.0 : 0.0;
          if (i >= n) x = 0;
          if (i < n && k < m) {
            x = load(features[i * m + k]);
            if (!(absolute(x) < __builtin_inf())) bad = 1;
          }
          (second ? shared.b : shared.a)[line % kGramTile][depth] = x;
        }
        ctx.sync();
        TP_UNROLL
        for (int k = 0; k < kGramDepth; ++k)
          TP_UNROLL
        for (int i = 0; i < 2; ++i)
          TP_UNROLL
        for (int j = 0; j < 4; ++j)
          sum[i][j] = fused(shared.a[row + i][k], shared.b[column + j][k], sum[i][j]);
      }
      TP_UNROLL
      for (int i = 0; i < 2; ++i)
        TP_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int r = block_row * kGramTile + row + i, c = block_column * kGramTile + column + j;
        if (r < n && c <= r) s.at(r, c) = sum[i][j];
      }
    }
  return block_sum(ctx, shared.sums, bad) == 0;  // its barrier also publishes the entries
}

struct Elimination {
  int pivots;          // completed before the first pivot that is not positive
  double log_product;  // of those pivots
};

// Cholesky of the lower triangle of s, which it overwrites.
template <bool kPivoting, class Ctx>
TP_BODY Elimination eliminate(const Ctx& ctx, GramShared& shared, int n, const Square& s) {
  for (int i = ctx.thread(); i < n; i += kBlock) shared.order[i] = i;
  ctx.sync();
  double log_product = 0;
  for (int j = 0; j < n; ++j) {
    if (kPivoting) {
      Candidate best{-1.0, j, 0};
      for (int i = j + ctx.thread(); i < n; i += kBlock) {
        const double value = s.at(shared.order[i], shared.order[i]);
        if (value > best.value) best = {value, i, 0};
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

}  // namespace twophase
