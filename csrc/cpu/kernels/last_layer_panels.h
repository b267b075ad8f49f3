// The two products of a step for many outputs. Both multiply rows of numbers, read one by one, by a
// panel: two vectors of each of its lines, all of it in the L1 cache.
//   logits:    weights   by  a panel of features, samples side by side
//   gradient:  deltas    by  a panel of samples, features side by side
// Nothing is added across lanes; the cost of packing samples into panels is shared by the outputs.
#pragma once

#include "last_layer_lanes.h"

namespace twophase::TP_ISA {
namespace {

constexpr int64_t kManyOutputs = 32;  // from here on panels are packed
#if defined(__AVX512F__)
constexpr int kPanelOutputs = 8;  // accumulators: twice as many vectors
#else
constexpr int kPanelOutputs = 4;
#endif
constexpr int kPanelVectors = 2;
template <class T>
constexpr int64_t kPanelLanes = kPanelVectors * kLanes<T>;
// Packed at once. Logits: features that are added up in a chain, of some samples. Gradient: as many
// numbers as stay in the L2 cache, for the more features the fewer pages of weights a tile touches.
constexpr int64_t kChain = 256, kPanelSamples = 64;
template <class T>
constexpr int64_t kPacked = 256 * 1024 / sizeof(T);

// Vector s of a strip of features in their order.
template <class T, class H>
TP_HD void load_features(const H* p, Vector<T> (&x)[kStrip]) {
  for (int s = 0; s < kStrip; ++s) x[s] = load_strip(p, s);
  if constexpr (kSplit<H>) merge(x, Lanes<T>{});
}
template <class T, class H>
TP_HD void load_features(const H* p, int64_t n, Vector<T> (&x)[kStrip]) {
  n >= kStripLanes<T> ? load_features<T>(p, x) : load_features<T>(Padded<T, H>(p, n).features, x);
}

// kRows vectors as rows of a matrix: its columns one after the other.
template <int kRows, int kStage, class V, int... i>
TP_HD void transpose(V (&x)[kRows], std::integer_sequence<int, i...> lanes) {
  if constexpr (kStage < kRows) {
    constexpr int n = sizeof...(i);
    V y[kRows];
    TP_UNROLL
    for (int r = 0; r < kRows / 2; ++r) {
      y[2 * r] = __builtin_shufflevector(x[r], x[r + kRows / 2], (i / 2 + i % 2 * n)...);
      y[2 * r + 1] =
          __builtin_shufflevector(x[r], x[r + kRows / 2], (n / 2 + i / 2 + i % 2 * n)...);
    }
    TP_UNROLL
    for (int r = 0; r < kRows; ++r) x[r] = y[r];
    transpose<kRows, 2 * kStage>(x, lanes);
  }
}

// sums[j] += the sum over the panel's lines i of a[j][i * stride] panel[i]
template <class T>
TP_HD void multiply(const T* const (&a)[kPanelOutputs], int64_t stride, const T* panel, int64_t n,
                    Vector<T> (&sums)[kPanelOutputs][kPanelVectors]) {
  using V = Vector<T>;
  for (int64_t i = 0; i < n; ++i) {
    V line[kPanelVectors];
    TP_UNROLL
    for (int s = 0; s < kPanelVectors; ++s)
      line[s] = in_register(load_vector(panel + i * kPanelLanes<T> + s * kLanes<T>));
    TP_UNROLL
    for (int j = 0; j < kPanelOutputs; ++j) {
      const V x = in_register(broadcast(a[j][i * stride]));
      TP_UNROLL
      for (int s = 0; s < kPanelVectors; ++s) sums[j][s] = fused(x, line[s], sums[j][s]);
    }
  }
}

// partial[r, j] of one slice, for up to kPanelSamples samples.
template <class T, class H>
struct PanelLogits {
  using V = Vector<T>;
  static constexpr int64_t L = kPanelLanes<T>, N = kLanes<T>, kLine = 64 / sizeof(T);
  alignas(64) T panels[kPanelSamples / L][kChain * L];
  const T* weight;
  int64_t samples, k, m;

  // Features [c, c + n), n <= kChain, of the samples; absent ones are zeros.
  void pack(const H* const* rows, int64_t c, int64_t n) {
    static_assert(kPanelSamples % L == 0 && L % N == 0 && kStripLanes<T> == L);
    for (int64_t p = 0; p * L < samples; ++p)
      for (int64_t s = 0; s < L; s += N)
        for (int64_t i = 0; i < n; i += kStripLanes<T>) {
          V x[kStrip][N];
          for (int64_t r = 0; r < N; ++r) {
            V strip[kStrip]{};
            const int64_t sample = p * L + s + r;
            if (sample < samples) load_features<T>(rows[sample] + c + i, n - i, strip);
            for (int v = 0; v < kStrip; ++v) x[v][r] = strip[v];
          }
          for (int v = 0; v < kStrip; ++v) {
            transpose<N, 1>(x[v], Lanes<T>{});
            const int64_t first = i + v * N;
            for (int64_t f = 0; f < smaller(N, n - first); ++f)
              store_vector(panels[p] + (first + f) * L + s, x[v][f]);
          }
        }
  }

  // to[r, q] (+)= of outputs [j, j + kPanelOutputs), those below k, and the samples of panel p,
  // over n features, w being the weights' first ones.
  void block(const T* w, int64_t j, int64_t p, int64_t n, bool adds, T* to) const {
    const T* a[kPanelOutputs];
    for (int q = 0; q < kPanelOutputs; ++q) a[q] = w + smaller(j + q, k - 1) * m;
    V total[kPanelOutputs][kPanelVectors]{};
    multiply<T>(a, 1, panels[p], n, total);
    alignas(64) T columns[L][kPanelOutputs];
    for (int s = 0; s < kPanelVectors; ++s) {
      V x[kPanelOutputs];
      for (int q = 0; q < kPanelOutputs; ++q) x[q] = total[q][s];
      if constexpr (N >= kPanelOutputs) {
        transpose<kPanelOutputs, 1>(x, Lanes<T>{});
        __builtin_memcpy(columns[s * N], x, sizeof(x));
      } else {
        for (int64_t r = 0; r < N; ++r)
          for (int q = 0; q < kPanelOutputs; ++q) columns[s * N + r][q] = x[q][r];
      }
    }
    const int64_t outputs = smaller(kPanelOutputs, k - j);
    for (int64_t r = 0; r < smaller(L, samples - p * L); ++r, to += k)
      for (int64_t q = 0; q < outputs; ++q) to[q] = adds ? to[q] + columns[r][q] : columns[r][q];
  }

  void run(const H* const* rows, int64_t begin, int64_t end, T* partial) {
    for (int64_t c = begin; c < end; c += kChain) {
      const int64_t n = smaller(kChain, end - c);
      pack(rows, c, n);
      for (int64_t j = 0; j < k; j += kPanelOutputs) {
        // The weights that follow come into the cache meanwhile.
        for (int64_t q = j + kPanelOutputs; q < smaller(j + 2 * kPanelOutputs, k); ++q)
          for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(weight + q * m + c + i, 0, 2);
        for (int64_t p = 0; p * L < samples; ++p)
          block(weight + c, j, p, n, c > begin, partial + p * L * k + j);
      }
    }
  }
};

// The gradient, tile by tile, for as many samples as one panel can hold. Samples are added in their
// order, as without panels: the bits are the same.
template <class T, class H>
struct PanelGradient {
  using V = Vector<T>;
  static constexpr int64_t L = kPanelLanes<T>, kMostSamples = 512, kMostFeatures = 1024;
  static_assert(kMostSamples * L <= kPacked<T>);
  alignas(64) T panels[kPacked<T>];  // [features / L, b, L]
  alignas(64) T tile[kPanelOutputs][kMostFeatures];
  T deltas[kMostSamples][kPanelOutputs];

  void pack(const H* const* rows, int64_t b, int64_t c, int64_t n) {
    for (int64_t r = 0; r < b; ++r)
      for (int64_t i = 0; i < n; i += L) {
        V x[kStrip];
        load_features<T>(rows[r] + c + i, n - i, x);
        for (int s = 0; s < kStrip; ++s) store_vector(panels + i * b + r * L + s * kLanes<T>, x[s]);
      }
  }

  // Calls f as `tiles` does.
  template <class F>
  void run(const H* const* rows, const T* delta, int64_t b, int64_t k, int64_t m, int64_t begin,
           int64_t end, const T* to, const T* beside, const F& f) {
    const int64_t chunk = smaller(kMostFeatures, kPacked<T> / b / L * L);
    for (int64_t c = begin; c < end; c += chunk) {
      const int64_t n = smaller(chunk, end - c);
      pack(rows, b, c, n);
      for (int64_t first = 0; first < k; first += kPanelOutputs) {
        const int64_t count = smaller(kPanelOutputs, k - first);
        for (int64_t r = 0; r < b; ++r)
          for (int64_t q = 0; q < kPanelOutputs; ++q)
            deltas[r][q] = q < count ? delta[r * k + first + q] : T(0);
        const T* d[kPanelOutputs];
        for (int q = 0; q < kPanelOutputs; ++q) d[q] = &deltas[0][q];
        for (int64_t i = 0; i < n; i += L) {
          // What the next tile is for comes into the cache meanwhile.
          for (int64_t j = first + count; j < smaller(first + count + kPanelOutputs, k); ++j)
            for (int64_t at = i; at < smaller(i + L, n); at += 64 / static_cast<int>(sizeof(T))) {
              __builtin_prefetch(to + j * m + c + at, 1, 2);
              if (beside) __builtin_prefetch(beside + j * m + c + at, 1, 2);
            }
          V sums[kPanelOutputs][kPanelVectors]{};
          multiply<T>(d, kPanelOutputs, panels + i * b, b, sums);
          for (int q = 0; q < kPanelOutputs; ++q)
            for (int s = 0; s < kPanelVectors; ++s)
              store_vector(&tile[q][i + s * kLanes<T>], sums[q][s]);
        }
        for (int64_t q = 0; q < count; ++q) f(first + q, c, n, tile[q]);
      }
    }
  }
};

}  // namespace
}  // namespace twophase::TP_ISA
