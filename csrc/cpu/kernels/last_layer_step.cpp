// A slice is cut into chunks whose tiles stay in the L1 cache. The tiles of weight and gradient are
// packed and zero-padded: rows of an odd length would make two of three vector loads straddle a
// cache line.
#include "last_layer_step.h"

#include "sgd.h"
#include "vector.h"

namespace twophase::TP_ISA {
namespace {

constexpr int64_t kChunkBytes = 2048;  // of a row
template <class T>
constexpr int64_t kChunk = kChunkBytes / sizeof(T);
template <class T>
constexpr int64_t kChunkVectors = kChunkBytes / kVectorBytes;

// Outputs of a tile; samples and outputs of a block whose operands fit the registers: 32 vectors
// with AVX-512, 16 without.
#if defined(__AVX512F__)
constexpr int kTileOutputs = 10, kLogitOutputs = 10, kGradientOutputs = 5;
#else
constexpr int kTileOutputs = 10, kLogitOutputs = 5, kGradientOutputs = 2;
#endif
constexpr int kLogitRows = 2, kGradientRows = 4;
constexpr int64_t kRowGroup = 64;  // samples whose accumulators are kept while a slice is read

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Size of the blocks when n is divided evenly into blocks of at most `most`.
int64_t even_block(int64_t n, int64_t most) {
  const int64_t blocks = (n + most - 1) / most;
  return (n + blocks - 1) / blocks;
}

template <class T, int kOutputs>
struct Logits {
  using V = Vector<T>;
  static constexpr int N = kLanes<T>;
  V weight[kChunkVectors<T>][kOutputs];
  V sums[kRowGroup / kLogitRows][kLogitRows][kOutputs];

  void pack(const T* w, int64_t m, int64_t n) {
    for (int j = 0; j < kOutputs; ++j) {
      const T* row = w + j * m;
      int64_t v = 0;
      for (; (v + 1) * N <= n; ++v) weight[v][j] = load_vector(row + v * N);
      if (v * N < n) weight[v][j] = load_vector(row + v * N, n - v * N);
    }
  }

  // Two samples; `ahead` are the two that follow.
  void add(const T* x, const T* y, const T* x_ahead, const T* y_ahead, int64_t n,
           V (&total)[kLogitRows][kOutputs]) const {
    V a[kOutputs], b[kOutputs];
    for (int j = 0; j < kOutputs; ++j) a[j] = total[0][j], b[j] = total[1][j];
    const auto step = [&](int64_t v, V xv, V yv) __attribute__((always_inline)) {
      TP_UNROLL
      for (int j = 0; j < kOutputs; ++j) {
        a[j] = fused(xv, weight[v][j], a[j]);
        b[j] = fused(yv, weight[v][j], b[j]);
      }
    };
    int64_t v = 0;
    for (; (v + 1) * N <= n; ++v) {
      __builtin_prefetch(x_ahead + v * N);
      __builtin_prefetch(y_ahead + v * N);
      step(v, load_vector(x + v * N), load_vector(y + v * N));
    }
    if (v * N < n) step(v, load_vector(x + v * N, n - v * N), load_vector(y + v * N, n - v * N));
    for (int j = 0; j < kOutputs; ++j) total[0][j] = a[j], total[1][j] = b[j];
  }

  // partial[r, 0 .. kOutputs) for samples [0, rows_n), rows_n <= kRowGroup
  void run(const T* const* rows, int64_t rows_n, const T* w, int64_t k, int64_t m, int64_t begin,
           int64_t end, T* partial) {
    __builtin_memset(sums, 0, sizeof(sums));
    for (int64_t c = begin; c < end; c += kChunk<T>) {
      const int64_t n = smaller(kChunk<T>, end - c);
      pack(w + c, m, n);
      for (int64_t r = 0; r < rows_n; r += kLogitRows) {
        // The last of an odd number goes beside itself.
        const int64_t s = smaller(r + 1, rows_n - 1);
        const int64_t r_ahead = smaller(r + 2, rows_n - 1), s_ahead = smaller(r + 3, rows_n - 1);
        add(rows[r] + c, rows[s] + c, rows[r_ahead] + c, rows[s_ahead] + c, n,
            sums[r / kLogitRows]);
      }
    }
    for (int64_t r = 0; r < rows_n; ++r)
      for (int j = 0; j < kOutputs; ++j)
        partial[r * k + j] = sum_lanes<T>(sums[r / kLogitRows][r % kLogitRows][j]);
  }
};

template <class T>
void logits(const void* const* rows_, const void* weight_, int64_t b, int64_t k, int64_t m,
            int64_t begin, int64_t end, void* partial_) {
  const T* const* rows = reinterpret_cast<const T* const*>(rows_);
  const T* weight = static_cast<const T*>(weight_);
  T* partial = static_cast<T*>(partial_);
  const int64_t outputs = even_block(k, kLogitOutputs);
  for (int64_t r = 0; r < b; r += kRowGroup)
    for (int64_t j = 0; j < k; j += outputs)
      with_constant<kLogitOutputs>(smaller(outputs, k - j), [&](auto count) {
        Logits<T, decltype(count)::value> block;
        block.run(rows + r, smaller(kRowGroup, b - r), weight + j * m, k, m, begin, end,
                  partial + r * k + j);
      });
}

template <class T>
struct Gradient {
  using V = Vector<T>;
  static constexpr int N = kLanes<T>;
  V tile[kTileOutputs][kChunkVectors<T>];

  // tile[j, :n] += sum of delta[r, j] x[r] over kGradientRows samples
  template <int kOutputs>
  static void add(const T* const* x, const T* const* ahead, const T* const* delta, int64_t n,
                  V (*tile)[kChunkVectors<T>]) {
    V d[kGradientRows][kOutputs];
    for (int r = 0; r < kGradientRows; ++r)
      for (int j = 0; j < kOutputs; ++j) d[r][j] = broadcast(delta[r][j]);
    const auto step = [&](int64_t v, const V(&xv)[kGradientRows]) __attribute__((always_inline)) {
      TP_UNROLL
      for (int j = 0; j < kOutputs; ++j) {
        V g = tile[j][v];
        TP_UNROLL
        for (int r = 0; r < kGradientRows; ++r) g = fused(d[r][j], xv[r], g);
        tile[j][v] = g;
      }
    };
    V xv[kGradientRows];
    int64_t v = 0;
    for (; (v + 1) * N <= n; ++v) {
      TP_UNROLL
      for (int r = 0; r < kGradientRows; ++r) {
        __builtin_prefetch(ahead[r] + v * N);
        xv[r] = load_vector(x[r] + v * N);
      }
      step(v, xv);
    }
    if (v * N < n) {
      for (int r = 0; r < kGradientRows; ++r) xv[r] = load_vector(x[r] + v * N, n - v * N);
      step(v, xv);
    }
  }

  // The tile of outputs [first, first + outputs) and features [c, c + n), over all samples
  void run(const T* const* rows, const T* delta, int64_t b, int64_t k, int64_t first,
           int64_t outputs, int64_t c, int64_t n) {
    static constexpr T kZeros[kChunk<T>] = {};  // stand for the samples missing in the last block
    __builtin_memset(tile, 0, sizeof(tile));
    const int64_t block = even_block(outputs, kGradientOutputs);
    for (int64_t r = 0; r < b; r += kGradientRows) {
      const T *x[kGradientRows], *ahead[kGradientRows];
      for (int i = 0; i < kGradientRows; ++i) {
        x[i] = r + i < b ? rows[r + i] + c : kZeros;
        ahead[i] = r + kGradientRows + i < b ? rows[r + kGradientRows + i] + c : x[i];
      }
      for (int64_t j = 0; j < outputs; j += block)
        with_constant<kGradientOutputs>(smaller(block, outputs - j), [&](auto count) {
          const T* d[kGradientRows];
          for (int i = 0; i < kGradientRows; ++i)
            d[i] = r + i < b ? delta + (r + i) * k + first + j : kZeros;
          add<decltype(count)::value>(x, ahead, d, n, tile + j);
        });
    }
  }
};

struct Rule {
  bool fresh;
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
};

template <class T>
void update(Dtype dtype, const void* const* rows_, const void* delta_, int64_t b, int64_t k,
            int64_t m, int64_t begin, int64_t end, void* weight_, void* buffer_, const Rule& rule) {
  const T* const* rows = reinterpret_cast<const T* const*>(rows_);
  const T* delta = static_cast<const T*>(delta_);
  T* weight = static_cast<T*>(weight_);
  T* buffer = static_cast<T*>(buffer_);
  const int64_t outputs = even_block(k, kTileOutputs);
  Gradient<T> gradient;
  // Backwards: the first pass has left the end of the slice in the cache.
  const int64_t chunks = (end - begin + kChunk<T> - 1) / kChunk<T>;
  for (int64_t c = begin + (chunks - 1) * kChunk<T>; c >= begin; c -= kChunk<T>) {
    const int64_t n = smaller(kChunk<T>, end - c);
    for (int64_t first = 0; first < k; first += outputs) {
      const int64_t count = smaller(outputs, k - first);
      gradient.run(rows, delta, b, k, first, count, c, n);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t at = (first + j) * m + c;
        sgd(dtype, weight + at, gradient.tile[j], buffer ? buffer + at : nullptr, n, rule.fresh,
            rule.lr, rule.momentum, rule.dampening, rule.weight_decay, rule.nesterov, false);
      }
    }
  }
}

}  // namespace

void last_layer_logits(Dtype dtype, const void* const* rows, const void* weight, int64_t b,
                       int64_t k, int64_t m, int64_t begin, int64_t end, void* partial) {
  dtype == Dtype::kFloat64 ? logits<double>(rows, weight, b, k, m, begin, end, partial)
                           : logits<float>(rows, weight, b, k, m, begin, end, partial);
}

void last_layer_update(Dtype dtype, const void* const* rows, const void* delta, int64_t b,
                       int64_t k, int64_t m, int64_t begin, int64_t end, void* weight, void* buffer,
                       bool fresh, double lr, double momentum, double dampening,
                       double weight_decay, bool nesterov) {
  const Rule rule{fresh, lr, momentum, dampening, weight_decay, nesterov};
  dtype == Dtype::kFloat64
      ? update<double>(dtype, rows, delta, b, k, m, begin, end, weight, buffer, rule)
      : update<float>(dtype, rows, delta, b, k, m, begin, end, weight, buffer, rule);
}

}  // namespace twophase::TP_ISA
