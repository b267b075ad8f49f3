#include "triangular_inverse.h"

#include "vector.h"

namespace twophase::TP_ISA {
namespace {

constexpr int kColumns = 16;  // kInverseColumns
constexpr int N = kLanes<double>;
constexpr int kVectors = kColumns / N;
static_assert(kColumns % N == 0);

}  // namespace

void triangular_inverse(int64_t n, const int64_t* starts, const int64_t* columns,
                        const double* values, int64_t first, int64_t count, double* scratch,
                        uint8_t* on, double* squares) {
  DoubleVector total[kVectors] = {};
  for (int64_t i = first; i < n; ++i) {
    DoubleVector x[kVectors] = {};
    bool reached = false;
    const int64_t last = starts[i + 1] - 1;
    for (int64_t e = starts[i]; e < last; ++e) {
      const int64_t k = columns[e];
      if (!on[k]) continue;  // also every k < first
      reached = true;
      const double* other = scratch + k * kColumns;
      for (int v = 0; v < kVectors; ++v) x[v] = x[v] - values[e] * load_vector(other + v * N);
    }
    if (i < first + count) {
      x[(i - first) / N][(i - first) % N] += 1;
      reached = true;
    }
    if (!reached) continue;
    on[i] = 1;
    for (int v = 0; v < kVectors; ++v) {
      x[v] = x[v] / values[last];
      total[v] = total[v] + x[v] * x[v];
      store_vector(scratch + i * kColumns + v * N, x[v]);
    }
  }
  for (int64_t c = 0; c < count; ++c) squares[first + c] = total[c / N][c % N];
  for (int64_t i = first; i < n; ++i) on[i] = 0;
}

}  // namespace twophase::TP_ISA
