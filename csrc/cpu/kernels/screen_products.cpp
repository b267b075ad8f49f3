#include "screen_products.h"

#include "vector.h"

namespace twophase::TP_ISA {
namespace {

using V = FloatVector;
using Mask = int32_t __attribute__((vector_size(kVectorBytes)));

constexpr int kPanel = 32;  // kScreenPanel
constexpr int N = kLanes<float>;
// A tile's sums, two vectors and one number fill the registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kVectors = 2;
constexpr int kTileColumns = kVectors * N;
static_assert(kScreenRows % kTileRows == 0 && kPanel % kTileColumns == 0);
// Bytes of the next columns that are fetched with each step of a tile.
constexpr int64_t kAhead = kTileColumns * 4 * kTileRows / kScreenRows;
// Numbers of each column at a time: the first-level cache holds them.
constexpr int64_t kDepth = 256;

struct Task {
  int64_t depth;
  const float* threshold;
  float* largest;
  int64_t* where;
  int64_t first;
  ScreenFound found;
  void* sink;
};

// Row r of a tile, kept in p, holds a new maximum or a pair.
void look_at(const Task& t, const float* p, int64_t row, int64_t column) {
  for (int c = 0; c < kTileColumns; ++c) {
    if (p[c] > t.largest[row]) {
      t.largest[row] = p[c];
      t.where[row] = column + c;
    }
    if (!(p[c] <= t.threshold[column + c])) t.found(t.sink, t.first + row, column + c);
  }
}

TP_HD bool all_of(Mask m) {
  int32_t all = -1;
  for (int c = 0; c < N; ++c) all &= m[c];
  return all;
}

// sum += rows, packed in a [depth, kTileRows], times kTileColumns columns of a panel. ahead: what
// will be read next (a prefetch beyond the memory's end is harmless).
void add(const float* a, const float* panel, int64_t depth, const char* ahead, V (*sum)[kVectors]) {
  V own[kTileRows][kVectors];
  TP_UNROLL
  for (int r = 0; r < kTileRows; ++r) TP_UNROLL
  for (int v = 0; v < kVectors; ++v) own[r][v] = sum[r][v];
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(ahead + k * kAhead);
    V right[kVectors];
    TP_UNROLL
    for (int v = 0; v < kVectors; ++v) right[v] = load_vector(panel + k * kPanel + v * N);
    TP_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      const V left = broadcast(a[k * kTileRows + r]);
      TP_UNROLL
      for (int v = 0; v < kVectors; ++v) own[r][v] = fused(left, right[v], own[r][v]);
    }
  }
  TP_UNROLL
  for (int r = 0; r < kTileRows; ++r) TP_UNROLL
  for (int v = 0; v < kVectors; ++v) sum[r][v] = own[r][v];
}

// What the products of rows [row, row + count) hold, count <= kTileRows.
void inspect(const Task& t, V (*sum)[kVectors], int64_t row, int count, int64_t column) {
  V limit[kVectors];
  for (int v = 0; v < kVectors; ++v) limit[v] = load_vector(t.threshold + column + v * N);
  Mask quiet = Mask{} == Mask{}, calm[kTileRows];
  TP_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    const V best = broadcast(t.largest[row + r]);
    calm[r] = Mask{} == Mask{};
    TP_UNROLL
    for (int v = 0; v < kVectors; ++v) calm[r] &= (sum[r][v] <= limit[v]) & (sum[r][v] <= best);
    quiet &= calm[r];
  }
  if (all_of(quiet)) return;
  for (int r = 0; r < count; ++r) {
    if (all_of(calm[r])) continue;
    float p[kTileColumns];
    for (int v = 0; v < kVectors; ++v) store_vector(p + v * N, sum[r][v]);
    look_at(t, p, row + r, column);
  }
}

}  // namespace

void screen_products(const float* rows, int64_t count, int64_t depth, const float* panels,
                     int64_t panel_count, const float* threshold, int64_t first, float* scratch,
                     float* largest, int64_t* where, ScreenFound found, void* sink) {
  float best[kScreenRows];
  int64_t place[kScreenRows] = {};
  for (int64_t i = 0; i < kScreenRows; ++i) {
    best[i] = -__builtin_inff();
    for (int64_t k = 0; k < depth; ++k)
      scratch[(i / kTileRows * depth + k) * kTileRows + i % kTileRows] =
          i < count ? rows[i * depth + k] : 0;
  }
  const Task t{depth, threshold, best, place, first, found, sink};
  for (int64_t column = 0; column < panel_count * kPanel; column += kTileColumns) {
    const float* panel = panels + column / kPanel * depth * kPanel + column % kPanel;
    V sum[kScreenRows][kVectors] = {};
    const char* ahead = reinterpret_cast<const char*>(panel + depth * kPanel);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t steps = depth - k < kDepth ? depth - k : kDepth;
      for (int64_t row = 0; row < count; row += kTileRows, ahead += steps * kAhead)
        add(scratch + row * depth + k * kTileRows, panel + k * kPanel, steps, ahead, sum + row);
    }
    for (int64_t row = 0; row < count; row += kTileRows)
      inspect(t, sum + row, row,
              static_cast<int>(count - row < kTileRows ? count - row : kTileRows), column);
  }
  for (int64_t i = 0; i < count; ++i) largest[i] = best[i], where[i] = place[i];
}

}  // namespace twophase::TP_ISA
