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
constexpr int kTileOutputs = 10, kLogitOutputs = 10, kGradientOutputs = 10;
#else
constexpr int kTileOutputs = 10, kLogitOutputs = 5, kGradientOutputs = 5;
#endif
constexpr int kLogitRows = 2, kGradientRows = 8;
constexpr int64_t kRowGroup = 64;  // samples whose accumulators are kept while a slice is read

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Size of the blocks when n is divided evenly into blocks of at most `most`.
int64_t even_block(int64_t n, int64_t most) {
  const int64_t blocks = (n + most - 1) / most;
  return (n + blocks - 1) / blocks;
}

// n features of a row, as they are computed with: in place, or widened into `packed`.
template <class T>
const T* widened(const T* row, T*, int64_t) {
  return row;
}
inline const float* widened(const BFloat16* row, float* packed, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) packed[i] = load(row[i]);
  return packed;
}
// Room for kRows widened rows of a chunk; none where rows are used in place.
template <class T, class H, int kRows>
struct Widened {
  T rows[kRows][kChunk<T>];
  T* operator[](int r) { return rows[r]; }
};
template <class T, int kRows>
struct Widened<T, T, kRows> {
  T* operator[](int) { return nullptr; }
};

// A vector that is used more than once: as a memory operand it would be loaded each time.
template <class V>
TP_HD V in_register(V v) {
#if defined(__AVX__)
  asm("" : "+x"(v));
#endif
  return v;
}

// Asks for the cache lines of n features, one instruction a line.
template <class H>
TP_HD void prefetch(const H* row, int64_t v, int64_t lanes) {
  if (v * lanes * static_cast<int64_t>(sizeof(H)) % 64 == 0) __builtin_prefetch(row + v * lanes);
}

template <class T, class H, int kOutputs>
struct Logits {
  using V = Vector<T>;
  static constexpr int N = kLanes<T>;
  static constexpr int kBlocks = (kOutputs + kLogitOutputs - 1) / kLogitOutputs;
  static constexpr int kBlock = (kOutputs + kBlocks - 1) / kBlocks;
  V weight[kChunkVectors<T>][kOutputs];
  V sums[kRowGroup / kLogitRows][kLogitRows][kOutputs];
  Widened<T, H, kLogitRows> wide;

  void pack(const T* w, int64_t m, int64_t n) {
    for (int j = 0; j < kOutputs; ++j) {
      const T* row = w + j * m;
      int64_t v = 0;
      for (; (v + 1) * N <= n; ++v) weight[v][j] = load_vector(row + v * N);
      if (v * N < n) weight[v][j] = load_vector(row + v * N, n - v * N);
    }
  }

  // Two samples and a block of outputs; `ahead` are the two samples that follow.
  template <int kFirst>
  void add(const T* x, const T* y, const H* x_ahead, const H* y_ahead, int64_t n,
           V (&total)[kLogitRows][kOutputs]) const {
    constexpr int kCount = kOutputs - kFirst < kBlock ? kOutputs - kFirst : kBlock;
    V a[kCount], b[kCount];
    for (int j = 0; j < kCount; ++j) a[j] = total[0][kFirst + j], b[j] = total[1][kFirst + j];
    const auto step = [&](int64_t v, V xv, V yv) __attribute__((always_inline)) {
      TP_UNROLL
      for (int j = 0; j < kCount; ++j) {
        const V w = in_register(weight[v][kFirst + j]);
        a[j] = fused(xv, w, a[j]);
        b[j] = fused(yv, w, b[j]);
      }
    };
    int64_t v = 0;
    for (; (v + 1) * N <= n; ++v) {
      if constexpr (kFirst == 0) {
        prefetch(x_ahead, v, N);
        prefetch(y_ahead, v, N);
      }
      step(v, load_vector(x + v * N), load_vector(y + v * N));
    }
    if (v * N < n) step(v, load_vector(x + v * N, n - v * N), load_vector(y + v * N, n - v * N));
    for (int j = 0; j < kCount; ++j) total[0][kFirst + j] = a[j], total[1][kFirst + j] = b[j];
    if constexpr (kFirst + kCount < kOutputs)
      add<kFirst + kCount>(x, y, x_ahead, y_ahead, n, total);
  }

  // partial[r, 0 .. kOutputs) for samples [0, rows_n), rows_n <= kRowGroup
  void run(const H* const* rows, int64_t rows_n, const T* w, int64_t k, int64_t m, int64_t begin,
           int64_t end, T* partial) {
    __builtin_memset(sums, 0, (rows_n + 1) / 2 * sizeof(sums[0]));
    for (int64_t c = begin; c < end; c += kChunk<T>) {
      const int64_t n = smaller(kChunk<T>, end - c);
      pack(w + c, m, n);
      for (int64_t r = 0; r < rows_n; r += kLogitRows) {
        // The last of an odd number goes beside itself.
        const int64_t s = smaller(r + 1, rows_n - 1);
        const int64_t r_ahead = smaller(r + 2, rows_n - 1), s_ahead = smaller(r + 3, rows_n - 1);
        add<0>(widened(rows[r] + c, wide[0], n), widened(rows[s] + c, wide[1], n),
               rows[r_ahead] + c, rows[s_ahead] + c, n, sums[r / kLogitRows]);
      }
    }
    for (int64_t r = 0; r < rows_n; ++r)
      for (int j = 0; j < kOutputs; ++j)
        partial[r * k + j] = sum_lanes<T>(sums[r / kLogitRows][r % kLogitRows][j]);
  }
};

template <class T, class H>
void logits(const void* const* rows_, const void* weight_, int64_t b, int64_t k, int64_t m,
            int64_t begin, int64_t end, void* partial_) {
  const H* const* rows = reinterpret_cast<const H* const*>(rows_);
  const T* weight = static_cast<const T*>(weight_);
  T* partial = static_cast<T*>(partial_);
  const int64_t outputs = even_block(k, kTileOutputs);
  for (int64_t r = 0; r < b; r += kRowGroup)
    for (int64_t j = 0; j < k; j += outputs)
      with_constant<kTileOutputs>(smaller(outputs, k - j), [&](auto count) {
        Logits<T, H, decltype(count)::value> block;
        block.run(rows + r, smaller(kRowGroup, b - r), weight + j * m, k, m, begin, end,
                  partial + r * k + j);
      });
}

template <class T, class H>
struct Gradient {
  using V = Vector<T>;
  static constexpr int N = kLanes<T>;
  static constexpr int kStrip = 2;  // vectors of a row whose gradient is kept in registers
  V tile[kTileOutputs][kChunkVectors<T>];
  Widened<T, H, kGradientRows> wide;

  // tile[j, :n] += sum of delta[r, j] x[r] over `count` samples, delta's rows k apart. `ahead`,
  // where not null, are the samples that follow.
  template <int kOutputs>
  static void add(const T* const* x, const H* const* ahead, const T* delta, int64_t k,
                  int64_t count, int64_t n, V (*tile)[kChunkVectors<T>]) {
    int64_t v = 0;
    for (; (v + kStrip) * N <= n; v += kStrip) {
      V g[kOutputs][kStrip];
      for (int j = 0; j < kOutputs; ++j)
        for (int s = 0; s < kStrip; ++s) g[j][s] = tile[j][v + s];
      for (int64_t r = 0; r < count; ++r) {
        V xv[kStrip];
        TP_UNROLL
        for (int s = 0; s < kStrip; ++s) {
          if (ahead) prefetch(ahead[r], v + s, N);
          xv[s] = load_vector(x[r] + (v + s) * N);
        }
        TP_UNROLL
        for (int j = 0; j < kOutputs; ++j) {
          const V d = in_register(broadcast(delta[r * k + j]));
          TP_UNROLL
          for (int s = 0; s < kStrip; ++s) g[j][s] = fused(d, xv[s], g[j][s]);
        }
      }
      for (int j = 0; j < kOutputs; ++j)
        for (int s = 0; s < kStrip; ++s) tile[j][v + s] = g[j][s];
    }
    for (; v * N < n; ++v) {
      const int64_t rest = smaller(N, n - v * N);
      for (int64_t r = 0; r < count; ++r) {
        const V xv = rest == N ? load_vector(x[r] + v * N) : load_vector(x[r] + v * N, rest);
        for (int j = 0; j < kOutputs; ++j)
          tile[j][v] = fused(broadcast(delta[r * k + j]), xv, tile[j][v]);
      }
    }
  }

  // The tile of outputs [first, first + outputs) and features [c, c + n), over all samples
  void run(const H* const* rows, const T* delta, int64_t b, int64_t k, int64_t first,
           int64_t outputs, int64_t c, int64_t n) {
    for (int64_t j = 0; j < outputs; ++j) __builtin_memset(tile[j], 0, (n + N - 1) / N * sizeof(V));
    const int64_t block = even_block(outputs, kGradientOutputs);
    for (int64_t r = 0; r < b; r += kGradientRows) {
      const int64_t count = smaller(kGradientRows, b - r);
      const T* x[kGradientRows];
      const H* ahead[kGradientRows];
      for (int64_t i = 0; i < count; ++i) {
        x[i] = widened(rows[r + i] + c, wide[i], n);
        ahead[i] = rows[smaller(r + kGradientRows + i, b - 1)] + c;
      }
      for (int64_t j = 0; j < outputs; j += block)
        with_constant<kGradientOutputs>(smaller(block, outputs - j), [&](auto size) {
          add<decltype(size)::value>(x, j == 0 ? ahead : nullptr, delta + r * k + first + j, k,
                                     count, n, tile + j);
        });
    }
  }
};

// Calls f(first, count, c, n) for each tile of outputs [first, first + count) and features [c, c +
// n) of the slice, its gradient in `gradient`.
template <class T, class H, class F>
void tiles(const void* const* rows_, const void* delta_, int64_t b, int64_t k, int64_t begin,
           int64_t end, Gradient<T, H>& gradient, const F& f) {
  const H* const* rows = reinterpret_cast<const H* const*>(rows_);
  const T* delta = static_cast<const T*>(delta_);
  const int64_t outputs = even_block(k, kTileOutputs);
  // Backwards: the first pass has left the end of the slice in the cache.
  const int64_t chunks = (end - begin + kChunk<T> - 1) / kChunk<T>;
  for (int64_t c = begin + (chunks - 1) * kChunk<T>; c >= begin; c -= kChunk<T>) {
    const int64_t n = smaller(kChunk<T>, end - c);
    for (int64_t first = 0; first < k; first += outputs) {
      const int64_t count = smaller(outputs, k - first);
      gradient.run(rows, delta, b, k, first, count, c, n);
      f(first, count, c, n);
    }
  }
}

// Calls f(T{}, H{}) for the element types.
template <class F>
void with_types(Dtype dtype, Dtype h_dtype, const F& f) {
  if (dtype == Dtype::kFloat64)
    f(double{}, double{});
  else if (h_dtype == Dtype::kBFloat16)
    f(float{}, BFloat16{});
  else
    f(float{}, float{});
}

}  // namespace

void last_layer_logits(Dtype dtype, Dtype h_dtype, const void* const* rows, const void* weight,
                       int64_t b, int64_t k, int64_t m, int64_t begin, int64_t end, void* partial) {
  with_types(dtype, h_dtype, [&](auto t, auto h) {
    logits<decltype(t), decltype(h)>(rows, weight, b, k, m, begin, end, partial);
  });
}

void last_layer_update(Dtype dtype, Dtype h_dtype, const void* const* rows, const void* delta,
                       int64_t b, int64_t k, int64_t m, int64_t begin, int64_t end, void* weight,
                       void* buffer, bool fresh, double lr, double momentum, double dampening,
                       double weight_decay, bool nesterov) {
  with_types(dtype, h_dtype, [&](auto t, auto h) {
    using T = decltype(t);
    Gradient<T, decltype(h)> gradient;
    tiles(rows, delta, b, k, begin, end, gradient,
          [&](int64_t first, int64_t count, int64_t c, int64_t n) {
            for (int64_t j = 0; j < count; ++j) {
              const int64_t at = (first + j) * m + c;
              sgd(dtype, static_cast<T*>(weight) + at, gradient.tile[j],
                  buffer ? static_cast<T*>(buffer) + at : nullptr, n, fresh, lr, momentum,
                  dampening, weight_decay, nesterov, false);
            }
          });
  });
}

void last_layer_add_gradient(Dtype dtype, Dtype h_dtype, const void* const* rows, const void* delta,
                             int64_t b, int64_t k, int64_t m, int64_t begin, int64_t end,
                             void* sums) {
  with_types(dtype, h_dtype, [&](auto t, auto h) {
    using T = decltype(t);
    Gradient<T, decltype(h)> gradient;
    tiles(rows, delta, b, k, begin, end, gradient,
          [&](int64_t first, int64_t count, int64_t c, int64_t n) {
            for (int64_t j = 0; j < count; ++j) {
              T* sum = static_cast<T*>(sums) + (first + j) * m + c;
              const T* part = reinterpret_cast<const T*>(gradient.tile[j]);
              for (int64_t i = 0; i < n; ++i) sum[i] += part[i];
            }
          });
  });
}

}  // namespace twophase::TP_ISA
