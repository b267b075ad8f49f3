// Cholesky of a Gram matrix, any number of rows, by pieces that several threads can share. Matrices
// lie in strips of N rows, N the lanes of a register: element (i, j) of G and of its factor L, and
// column k of row i of the scaled M, are in lane i % N of one vector. A tile is N x N; of a
// symmetric matrix only the tiles on and below the diagonal are kept, strip after strip.
//
// Order of the operations, on which gram_terms and cholesky_terms count:
//   G: columns of M in panels of kGramPanel. The products of a panel are added up apart, then
//      added to G.
//   L: columns in blocks of kGramBlock. From a tile the products of every earlier block are
//      subtracted, each block's added up apart, then those of the earlier tiles of its own block,
//      then, in substitution, those of the earlier columns of its own tile, one by one; then it is
//      divided by the diagonal, or its root is taken.
#pragma once

#include <cstdint>

#include "../../math/dtype.h"
#include "../isa.h"

namespace twophase {

constexpr int64_t kGramPanel = 128;
constexpr int64_t kGramBlock = 64;
constexpr int64_t kGramLanes = 8;  // most lanes of any instruction set: rows are padded to them

constexpr int64_t gram_padded(int64_t n) { return (n + kGramLanes - 1) / kGramLanes * kGramLanes; }
// Doubles of a symmetric matrix or a factor in strips
constexpr int64_t gram_triangle(int64_t n) {
  return gram_padded(n) * (gram_padded(n) + kGramLanes) / 2;
}

struct GramMatrix {
  Dtype dtype;           // kFloat32 or kFloat64
  const void* features;  // [n, m]
  int64_t n, m;
  bool append_ones;
  double* panel;   // kGramPanel * gram_padded(n)
  double* gram;    // gram_triangle(n)
  double* factor;  // gram_triangle(n)
  double* scale;   // [gram_padded(n)], 2^-e of every row
  int* exponents;  // [n]
};

}  // namespace twophase

// Rows [begin, end): exponents and scale. Whether all their features are finite.
TP_KERNEL(bool, gram_scale, (const GramMatrix& a, int64_t begin, int64_t end))
// Strips of the panel of columns [column, column + width) of [features, 1], scaled; width at most
// kGramPanel. A share of the strips, part of parts.
TP_KERNEL(void, gram_pack,
          (const GramMatrix& a, int64_t column, int64_t width, int64_t part, int64_t parts))
// Adds the products of the panel to G (`first`: puts them there), a share of the strips.
TP_KERNEL(void, gram_add,
          (const GramMatrix& a, int64_t width, bool first, int64_t part, int64_t parts))
// The diagonal of G, read or written; [n].
TP_KERNEL(void, gram_get_diagonal, (const GramMatrix& a, double* diagonal))
TP_KERNEL(void, gram_set_diagonal, (const GramMatrix& a, const double* diagonal))
// Rows [column, column + kGramBlock) of the factor, for those before it known. Writes their
// pivots l_jj^2; returns the first row whose pivot is not positive, or -1.
TP_KERNEL(int64_t, gram_factor_block, (const GramMatrix& a, int64_t column, double* pivots))
// The same columns of all rows below them, a share of the strips.
TP_KERNEL(void, gram_factor_below,
          (const GramMatrix& a, int64_t column, int64_t part, int64_t parts))
// G's upper triangle, row by row [n, gram_padded(n)].
TP_KERNEL(void, gram_unpack, (const GramMatrix& a, double* rows))
