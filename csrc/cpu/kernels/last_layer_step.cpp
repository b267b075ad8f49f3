// A slice is cut into chunks whose tiles stay in the L1 cache. The tiles of weight and gradient are
// packed and zero-padded: rows of an odd length would make two of three vector loads straddle a
// cache line.
#include "last_layer_step.h"

#include "last_layer_panels.h"
#include "sgd.h"

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

// Features of a chunk where a slice of n is cut evenly, in whole strips: a short last chunk would
// cost nearly as much as a long one.
template <class T>
int64_t even_chunk(int64_t n) {
  const int64_t strips =
      (even_block(n > 0 ? n : 1, kChunk<T>) + kStripLanes<T> - 1) / kStripLanes<T>;
  return strips * kStripLanes<T>;
}

// Asks for the cache lines of a strip, one instruction a line. kLevel: of the cache.
template <class T, int kLevel, class P>
TP_HD void prefetch(const P* row, int64_t i) {
  constexpr int64_t kBytes = kStripLanes<T> * sizeof(P);
  if (kBytes < 64 && i * static_cast<int64_t>(sizeof(P)) % 64 != 0) return;
  for (int64_t at = 0; at < kBytes; at += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row + i) + at, 0, 4 - kLevel);
}
// Row r of the chunk at c; past the last row, the first ones of the chunk at `next`.
template <class H>
const H* row_ahead(const H* const* rows, int64_t b, int64_t r, int64_t c, int64_t next) {
  return r < b ? rows[r] + c : rows[smaller(r - b, b - 1)] + next;
}
// Arrays that are read soon. Who computes meanwhile asks for them in equal parts: at once, they
// would wait for each other.
template <class P>
struct Soon {
  const P* const* arrays;
  int64_t n;
  Soon part(int64_t i, int64_t parts) const {
    const int64_t begin = n * i / parts;
    return {arrays + begin, n * (i + 1) / parts - begin};
  }
};

template <class T, class H, int kOutputs>
struct Logits {
  using V = Vector<T>;
  static constexpr int64_t N = kLanes<T>, S = kStripLanes<T>;
  static constexpr int kBlocks = (kOutputs + kLogitOutputs - 1) / kLogitOutputs;
  static constexpr int kBlock = (kOutputs + kBlocks - 1) / kBlocks;
  V weight[kChunkVectors<T>][kOutputs];
  V sums[kRowGroup / kLogitRows][kLogitRows][kOutputs];

  void pack(const T* w, int64_t m, int64_t n) {
    for (int j = 0; j < kOutputs; ++j)
      for (int64_t i = 0; i < n; i += S) {
        V x[kStrip];
        const auto load = [&](const T* strip) {
          for (int s = 0; s < kStrip; ++s) x[s] = load_strip(strip, s);
        };
        const T* p = w + j * m + i;
        i + S <= n ? load(p) : load(Padded<T, T>(p, n - i).features);
        if constexpr (kSplit<H>) split(x, Lanes<T>{});
        for (int s = 0; s < kStrip; ++s) weight[i / N + s][j] = x[s];
      }
  }

  // Two samples and a block of outputs; what follows: two samples, and weights of the next chunk.
  template <int kFirst>
  void add(const H* x, const H* y, const H* x_ahead, const H* y_ahead, const T* w_ahead, int64_t n,
           V (&total)[kLogitRows][kOutputs]) const {
    constexpr int kCount = kOutputs - kFirst < kBlock ? kOutputs - kFirst : kBlock;
    V a[kCount], b[kCount];
    for (int j = 0; j < kCount; ++j) a[j] = total[0][kFirst + j], b[j] = total[1][kFirst + j];
    const auto step = [&](const H* x_strip, const H* y_strip,
                          int64_t v) __attribute__((always_inline)) {
      TP_UNROLL
      for (int s = 0; s < kStrip; ++s) {
        const V xv = in_register(load_strip(x_strip, s)), yv = in_register(load_strip(y_strip, s));
        TP_UNROLL
        for (int j = 0; j < kCount; ++j) {
          const V w = in_register(weight[v + s][kFirst + j]);
          a[j] = fused(xv, w, a[j]);
          b[j] = fused(yv, w, b[j]);
        }
      }
    };
    int64_t v = 0;
    for (; (v + kStrip) * N <= n; v += kStrip) {
      if constexpr (kFirst == 0) {
        prefetch<T, 1>(x_ahead, v * N);
        prefetch<T, 1>(y_ahead, v * N);
      }
      if constexpr (kFirst + kCount == kOutputs) prefetch<T, 2>(w_ahead, v * N);
      step(x + v * N, y + v * N, v);
    }
    if (v * N < n) {
      const Padded<T, H> x_rest(x + v * N, n - v * N), y_rest(y + v * N, n - v * N);
      step(x_rest.features, y_rest.features, v);
    }
    for (int j = 0; j < kCount; ++j) total[0][kFirst + j] = a[j], total[1][kFirst + j] = b[j];
    if constexpr (kFirst + kCount < kOutputs)
      add<kFirst + kCount>(x, y, x_ahead, y_ahead, w_ahead, n, total);
  }

  // partial[r, 0 .. kOutputs) for samples [0, rows_n), rows_n <= kRowGroup
  void run(const H* const* rows, int64_t rows_n, const T* w, int64_t k, int64_t m, int64_t begin,
           int64_t end, T* partial) {
    __builtin_memset(sums, 0, (rows_n + 1) / 2 * sizeof(sums[0]));
    const int64_t chunk = even_chunk<T>(end - begin);
    for (int64_t c = begin; c < end; c += chunk) {
      const int64_t n = smaller(chunk, end - c);
      pack(w + c, m, n);
      const int64_t next = c + chunk < end ? c + chunk : c;
      const auto ahead = [&](int64_t r) { return row_ahead(rows, rows_n, r, c, next); };
      for (int64_t r = 0; r < rows_n; r += kLogitRows) {
        // The last of an odd number goes beside itself.
        const int64_t s = smaller(r + 1, rows_n - 1), j = smaller(r / kLogitRows, kOutputs - 1);
        add<0>(rows[r] + c, rows[s] + c, ahead(r + kLogitRows), ahead(r + kLogitRows + 1),
               w + j * m + next, n, sums[r / kLogitRows]);
      }
    }
    for (int64_t r = 0; r < rows_n; ++r)
      for (int j = 0; j < kOutputs; ++j)
        partial[r * k + j] = sum_lanes<T>(sums[r / kLogitRows][r % kLogitRows][j]);
  }
};

template <class T, class H>
void logits(const void* const* rows_, const void* weight_, int64_t b, int64_t k, int64_t m,
            int64_t begin, int64_t end, int64_t length, void* partial_) {
  const H* const* rows = reinterpret_cast<const H* const*>(rows_);
  const T* weight = static_cast<const T*>(weight_);
  T* partial = static_cast<T*>(partial_);
  const int64_t outputs = even_block(k, kTileOutputs);
  for (; begin < end; begin += length, partial += b * k) {
    const int64_t stop = smaller(begin + length, end);
    if (k >= kManyOutputs) {
      PanelLogits<T, H> panels;
      panels.weight = weight, panels.k = k, panels.m = m;
      for (int64_t r = 0; r < b; r += kPanelSamples) {
        panels.samples = smaller(kPanelSamples, b - r);
        panels.run(rows + r, begin, stop, partial + r * k);
      }
      continue;
    }
    for (int64_t r = 0; r < b; r += kRowGroup)
      for (int64_t j = 0; j < k; j += outputs)
        with_constant<kTileOutputs>(smaller(outputs, k - j), [&](auto count) {
          Logits<T, H, decltype(count)::value> block;
          block.run(rows + r, smaller(kRowGroup, b - r), weight + j * m, k, m, begin, stop,
                    partial + r * k + j);
        });
  }
}

template <class T, class H>
struct Gradient {
  using V = Vector<T>;
  static constexpr int64_t N = kLanes<T>, S = kStripLanes<T>;
  V tile[kTileOutputs][kChunkVectors<T>];

  // tile[j, :n] += sum of delta[r, j] x[r] over `count` samples, delta's rows k apart
  template <int kOutputs>
  static void add(const H* const* x, const T* delta, int64_t k, int64_t count, int64_t n,
                  Soon<H> rows, Soon<T> others, V (*tile)[kChunkVectors<T>]) {
    const auto strip = [&](int64_t v, const auto& load) __attribute__((always_inline)) {
      for (int64_t i = 0; i < rows.n; ++i) prefetch<T, 1>(rows.arrays[i], v * N);
      for (int64_t i = 0; i < others.n; ++i) prefetch<T, 2>(others.arrays[i], v * N);
      V g[kOutputs][kStrip];
      for (int j = 0; j < kOutputs; ++j)
        for (int s = 0; s < kStrip; ++s) g[j][s] = tile[j][v + s];
      for (int64_t r = 0; r < count; ++r) {
        V xv[kStrip];
        load(r, xv);
        TP_UNROLL
        for (int j = 0; j < kOutputs; ++j) {
          const V d = in_register(broadcast(delta[r * k + j]));
          TP_UNROLL
          for (int s = 0; s < kStrip; ++s) g[j][s] = fused(d, xv[s], g[j][s]);
        }
      }
      for (int j = 0; j < kOutputs; ++j)
        for (int s = 0; s < kStrip; ++s) tile[j][v + s] = g[j][s];
    };
    int64_t v = 0;
    for (; (v + kStrip) * N <= n; v += kStrip)
      strip(v, [&](int64_t r, V(&xv)[kStrip]) __attribute__((always_inline)) {
        TP_UNROLL
        for (int s = 0; s < kStrip; ++s) xv[s] = load_strip(x[r] + v * N, s);
      });
    if (v * N < n)
      strip(v, [&](int64_t r, V(&xv)[kStrip]) __attribute__((always_inline)) {
        const Padded<T, H> rest(x[r] + v * N, n - v * N);
        for (int s = 0; s < kStrip; ++s) xv[s] = load_strip(rest.features, s);
      });
  }

  // The tile of outputs [first, first + outputs) and features [c, c + n), over all samples. `next`:
  // where the chunk begins that follows; `soon` has this one's n of what the tile is for.
  void run(const H* const* rows, const T* delta, int64_t b, int64_t k, int64_t first,
           int64_t outputs, int64_t c, int64_t n, int64_t next, Soon<T> soon) {
    const int64_t vectors = (n + S - 1) / S * kStrip;
    for (int64_t j = 0; j < outputs; ++j) __builtin_memset(tile[j], 0, vectors * sizeof(V));
    const int64_t block = even_block(outputs, kGradientOutputs);
    const int64_t blocks = (outputs + block - 1) / block;
    const int64_t groups = (b + kGradientRows - 1) / kGradientRows;
    for (int64_t r = 0; r < b; r += kGradientRows) {
      const int64_t count = smaller(kGradientRows, b - r);
      const H *x[kGradientRows], *ahead[kGradientRows];
      for (int64_t q = 0; q < count; ++q) {
        x[q] = rows[r + q] + c;
        ahead[q] = row_ahead(rows, b, r + kGradientRows + q, c, next);
      }
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t j = i * block, call = r / kGradientRows * blocks + i;
        with_constant<kGradientOutputs>(smaller(block, outputs - j), [&](auto size) {
          add<decltype(size)::value>(x, delta + r * k + first + j, k, count, n,
                                     Soon<H>{ahead, count}.part(i, blocks),
                                     soon.part(call, groups * blocks), tile + j);
        });
      }
    }
    if constexpr (kSplit<H>)
      for (int64_t j = 0; j < outputs; ++j)
        for (int64_t v = 0; v < vectors; v += kStrip)
          merge(reinterpret_cast<V(&)[kStrip]>(tile[j][v]), Lanes<T>{});
  }
};

// Calls f(j, c, n, gradient) for features [c, c + n) of each output j, pieces of the slices in some
// order. f changes `to` and, where not null, `beside`: [k, m].
template <class T, class H, class F>
void tiles(const void* const* rows_, const void* delta_, int64_t b, int64_t k, int64_t m,
           int64_t begin, int64_t end, int64_t length, const void* to, const void* beside,
           const F& f) {
  const H* const* rows = reinterpret_cast<const H* const*>(rows_);
  const T* delta = static_cast<const T*>(delta_);
  if (k >= kManyOutputs && b <= PanelGradient<T, H>::kMostSamples) {
    PanelGradient<T, H> panels;
    panels.run(rows, delta, b, k, m, begin, end, static_cast<const T*>(to),
               static_cast<const T*>(beside), f);
    return;
  }
  Gradient<T, H> gradient;
  const int64_t outputs = even_block(k, kTileOutputs);
  // Backwards: the first pass has left the end of the slices in the cache.
  for (int64_t slice = begin + (end - begin - 1) / length * length; slice >= begin;
       slice -= length) {
    const int64_t stop = smaller(slice + length, end), chunk = even_chunk<T>(stop - slice);
    const int64_t chunks = (stop - slice + chunk - 1) / chunk;
    for (int64_t c = slice + (chunks - 1) * chunk; c >= slice; c -= chunk) {
      const int64_t n = smaller(chunk, stop - c), next = c > slice ? c - chunk : c;
      for (int64_t first = 0; first < k; first += outputs) {
        const int64_t count = smaller(outputs, k - first);
        const T* soon[2 * kTileOutputs];
        int64_t arrays = 0;
        for (const void* array : {to, beside})
          for (int64_t j = first; array && j < first + count; ++j)
            soon[arrays++] = static_cast<const T*>(array) + j * m + c;
        gradient.run(rows, delta, b, k, first, count, c, n, next, Soon<T>{soon, arrays});
        for (int64_t j = 0; j < count; ++j)
          f(first + j, c, n, reinterpret_cast<const T*>(gradient.tile[j]));
      }
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
                       int64_t b, int64_t k, int64_t m, int64_t begin, int64_t end, int64_t length,
                       void* partial) {
  with_types(dtype, h_dtype, [&](auto t, auto h) {
    logits<decltype(t), decltype(h)>(rows, weight, b, k, m, begin, end, length, partial);
  });
}

void last_layer_update(Dtype dtype, Dtype h_dtype, const void* const* rows, const void* delta,
                       int64_t b, int64_t k, int64_t m, int64_t begin, int64_t end, int64_t length,
                       void* weight, void* buffer, bool is_first_step, const SgdRule& rule) {
  with_types(dtype, h_dtype, [&](auto t, auto h) {
    using T = decltype(t);
    tiles<T, decltype(h)>(rows, delta, b, k, m, begin, end, length, weight, buffer,
                          [&](int64_t j, int64_t c, int64_t n, const T* gradient) {
                            sgd(dtype, static_cast<T*>(weight) + j * m + c, gradient,
                                buffer ? static_cast<T*>(buffer) + j * m + c : nullptr, n,
                                is_first_step, rule);
                          });
  });
}

void last_layer_add_gradient(Dtype dtype, Dtype h_dtype, const void* const* rows, const void* delta,
                             int64_t b, int64_t k, int64_t m, int64_t begin, int64_t end,
                             int64_t length, void* sums) {
  with_types(dtype, h_dtype, [&](auto t, auto h) {
    using T = decltype(t);
    tiles<T, decltype(h)>(rows, delta, b, k, m, begin, end, length, sums, nullptr,
                          [&](int64_t j, int64_t c, int64_t n, const T* gradient) {
                            T* sum = static_cast<T*>(sums) + j * m + c;
                            for (int64_t i = 0; i < n; ++i) sum[i] += gradient[i];
                          });
  });
}

}  // namespace twophase::TP_ISA
