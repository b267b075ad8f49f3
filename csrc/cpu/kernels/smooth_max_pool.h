#pragma once

#include <cstdint>

#include "../../math/dtype.h"
#include "../../math/windows.h"
#include "../isa.h"

namespace twophase {

// How outputs are computed: in bands of `each` along dimension `dim`. The numbers that a band reads
// are first sorted by what their place leaves when divided by the stride, with -inf for padding.
// Those of one remainder are a grid, in which the numbers that neighbouring windows read at one
// place of theirs are neighbours: a window's place is an offset from the output's cell, and a band
// is a few loops over contiguous memory. Cells behind the end of a row make outputs that nobody
// reads.
struct PoolBands {
  int dim;
  int64_t each, count;         // outputs of a band, bands along dim
  int64_t shift[kWindowDims];  // cells from a window's first place to its last
  int64_t step[kWindowDims];   // cells from one output to the next
  int64_t remainders, cells;   // grids, cells of each
  int64_t taps;                // places of a window
  const int64_t* offset;       // [taps]: of a place, from the cell of the output
  int64_t chunk;               // outputs that are computed at once
  int64_t line;                // numbers of a row of a band's input, with padding

  int64_t units() const { return dim == 0 ? count : units_outside; }
  int64_t bands() const { return dim == 0 ? 1 : count; }
  int64_t units_outside;  // outputs along dimension 0
};

// Numbers of the type that is computed in.
TP_HD int64_t forward_scratch(const PoolBands& b) {
  return (b.remainders + 1) * b.cells + 2 * b.chunk + b.line;
}
TP_HD int64_t backward_scratch(const PoolBands& b) {
  return (2 * b.remainders + 1) * b.cells + (b.taps + 2) * b.chunk + b.line;
}

}  // namespace twophase

// x and out hold windows.in numbers of `dtype`, y and grad windows.out. Forward: the bands begin to
// end of units * bands, which are independent. Backward: the units begin to end, as the bands of
// one unit add to the same numbers.
TP_KERNEL(void, smooth_max_pool_forward,
          (const Windows& windows, const PoolBands& bands, Dtype dtype, const void* x, void* y,
           int64_t begin, int64_t end, void* scratch, double beta, double log_beta))
TP_KERNEL(void, smooth_max_pool_backward,
          (const Windows& windows, const PoolBands& bands, Dtype dtype, const void* grad,
           const void* x, void* out, int64_t begin, int64_t end, void* scratch, double beta,
           double log_beta))
