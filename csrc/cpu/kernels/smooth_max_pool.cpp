#include "smooth_max_pool.h"

#include "../../math/smooth_max.h"

namespace twophase::TP_ISA {
namespace {

constexpr int kLast = kWindowDims - 1;

TP_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TP_HD int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
TP_HD void fill(T* out, int64_t n, T value) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = value;
}

// One band: its first output and its outputs in each dimension.
struct Band {
  const Windows& w;
  const PoolBands& bands;
  int64_t first[kWindowDims], count[kWindowDims];

  Band(const Windows& w_, const PoolBands& bands_, int64_t unit, int64_t band)
      : w(w_), bands(bands_) {
    for (int d = 0; d < kWindowDims; ++d) first[d] = 0, count[d] = w.out[d];
    if (bands.dim != 0) first[0] = unit, count[0] = 1;
    const int64_t begin = (bands.dim == 0 ? unit : band) * bands.each;
    first[bands.dim] = begin;
    count[bands.dim] = least(bands.each, w.out[bands.dim] - begin);
  }

  // Calls f(where, remainder, cell) for each row of input that the band reads: its place among the
  // rows of x, -1 in the padding; the number of its remainders in the outer dimensions; its cell.
  template <int d = 0, class F>
  void each_input_row(const F& f, int64_t where = 0, int64_t remainder = 0,
                      int64_t cell = 0) const {
    if constexpr (d == kLast) {
      f(where, remainder, cell);
    } else {
      for (int64_t q = 0; q < count[d] + bands.shift[d]; ++q)
        for (int64_t r = 0; r < w.stride[d]; ++r) {
          const int64_t i = (first[d] + q) * w.stride[d] + r - w.padding[d];
          const bool there = where >= 0 && i >= 0 && i < w.in[d];
          each_input_row<d + 1>(f, there ? where * w.in[d] + i : -1, remainder * w.stride[d] + r,
                                cell + q * bands.step[d]);
        }
    }
  }

  // Calls f(first output of the row, its cell).
  template <int d = 0, class F>
  void each_output_row(const F& f, int64_t where = 0, int64_t cell = 0) const {
    if constexpr (d == kLast) {
      f(where * w.out[kLast] + first[kLast], cell);
    } else {
      for (int64_t o = 0; o < count[d]; ++o)
        each_output_row<d + 1>(f, where * w.out[d] + first[d] + o, cell + o * bands.step[d]);
    }
  }

  // Cells from the first output to the last.
  int64_t length() const {
    int64_t last = 0;
    for (int d = 0; d < kWindowDims; ++d) last += (count[d] - 1) * bands.step[d];
    return last + 1;
  }

  // Of a row of the input: place begin + i is in x for low <= i < high, i < width.
  int64_t width() const { return (count[kLast] + bands.shift[kLast]) * w.stride[kLast]; }
  int64_t begin() const { return first[kLast] * w.stride[kLast] - w.padding[kLast]; }
  int64_t low() const { return least(most(-begin(), 0), width()); }
  int64_t high() const { return most(low(), least(w.in[kLast] - begin(), width())); }
};

template <class C>
TP_HD void part(const C* line, int64_t stride, int64_t n, C* to, int64_t cells) {
  if (stride == 2) {
    C* other = to + cells;
#pragma omp simd
    for (int64_t q = 0; q < n; ++q) to[q] = line[2 * q], other[q] = line[2 * q + 1];
    return;
  }
  for (int64_t r = 0; r < stride; ++r)
    for (int64_t q = 0; q < n; ++q) to[r * cells + q] = line[q * stride + r];
}

template <class C>
TP_HD void join(const C* from, int64_t cells, int64_t stride, int64_t n, C* line) {
  if (stride == 2) {
    const C* other = from + cells;
#pragma omp simd
    for (int64_t q = 0; q < n; ++q) line[2 * q] = from[q], line[2 * q + 1] = other[q];
    return;
  }
  for (int64_t r = 0; r < stride; ++r)
    for (int64_t q = 0; q < n; ++q) line[q * stride + r] = from[r * cells + q];
}

// grids [remainders, cells] from x
template <class T>
void sort_out(const Band& band, const T* x, Compute<T>* grids, Compute<T>* line) {
  using C = Compute<T>;
  const int64_t stride = band.w.stride[kLast], cells = band.bands.cells;
  const int64_t n = band.count[kLast] + band.bands.shift[kLast];
  const int64_t width = band.width(), low = band.low(), high = band.high();
  constexpr C kNone = -C(__builtin_inf());
  band.each_input_row([&](int64_t where, int64_t remainder, int64_t cell) {
    C* to = grids + remainder * stride * cells + cell;
    if (where < 0) {
      for (int64_t r = 0; r < stride; ++r) fill(to + r * cells, n, kNone);
      return;
    }
    C* row = stride == 1 ? to : line;
    const T* from = x + where * band.w.in[kLast] + band.begin();
    fill(row, low, kNone);
#pragma omp simd
    for (int64_t i = low; i < high; ++i) row[i] = load(from[i]);
    fill(row + high, width - high, kNone);
    if (stride > 1) part(line, stride, n, to, cells);
  });
}

// Adds the gradients of the grids to out.
template <class T>
void put_back(const Band& band, const Compute<T>* grids, T* out, Compute<T>* line) {
  const int64_t stride = band.w.stride[kLast], cells = band.bands.cells;
  const int64_t n = band.count[kLast] + band.bands.shift[kLast];
  const int64_t low = band.low(), high = band.high();
  band.each_input_row([&](int64_t where, int64_t remainder, int64_t cell) {
    if (where < 0) return;
    const Compute<T>* row = grids + remainder * stride * cells + cell;
    if (stride > 1) {
      join(row, cells, stride, n, line);
      row = line;
    }
    T* to = out + where * band.w.in[kLast] + band.begin();
#pragma omp simd
    for (int64_t i = low; i < high; ++i) store(&to[i], load(to[i]) + row[i]);
  });
}

// The origin of each of n windows.
template <class C>
TP_HD void origins(const C* grids, const PoolBands& b, int64_t n, C* m) {
  fill(m, n, -C(__builtin_inf()));
  for (int64_t t = 0; t < b.taps; ++t) {
    const C* v = grids + b.offset[t];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) m[i] = larger(v[i], m[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) m[i] = smooth_max_origin(m[i]);
}

template <class T>
void forward(const Windows& w, const PoolBands& b, const void* x_, void* y_, int64_t begin,
             int64_t end, void* scratch, double beta, double log_beta) {
  using C = Compute<T>;
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  const auto p = smooth_max_parameters<C>(beta, log_beta);
  C* grids = static_cast<C*>(scratch);
  C* result = grids + b.remainders * b.cells;
  C *m = result + b.cells, *s = m + b.chunk, *line = s + b.chunk;
  for (int64_t k = begin; k < end; ++k) {
    const Band band(w, b, k / b.bands(), k % b.bands());
    sort_out(band, x, grids, line);
    const int64_t length = band.length();
    for (int64_t at = 0; at < length; at += b.chunk) {
      const int64_t n = least(b.chunk, length - at);
      origins(grids + at, b, n, m);
      fill(s, n, C(0));
      for (int64_t t = 0; t < b.taps; ++t) {
        const C* v = grids + at + b.offset[t];
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) s[i] += smooth_max_weight(v[i], m[i], p);
      }
      int exceptions = 0;
#pragma omp simd reduction(| : exceptions)
      for (int64_t i = 0; i < n; ++i) {
        result[at + i] = m[i] + smooth_max_log(s[i], p);
        exceptions |= !(s[i] >= 1);
      }
      for (int64_t i = 0; exceptions && i < n; ++i) {
        if (s[i] >= 1) continue;
        result[at + i] = smooth_max_exception<C>([&](const auto& f) {
          for (int64_t t = 0; t < b.taps; ++t) f(grids[at + i + b.offset[t]]);
        });
      }
    }
    band.each_output_row([&](int64_t where, int64_t cell) {
#pragma omp simd
      for (int64_t i = 0; i < band.count[kLast]; ++i) store(&y[where + i], result[cell + i]);
    });
  }
}

template <class T>
void backward(const Windows& w, const PoolBands& b, const void* grad_, const void* x_, void* out_,
              int64_t begin, int64_t end, void* scratch, double beta, double log_beta) {
  using C = Compute<T>;
  const T* grad = static_cast<const T*>(grad_);
  const T* x = static_cast<const T*>(x_);
  T* out = static_cast<T*>(out_);
  const auto p = smooth_max_parameters<C>(beta, log_beta);
  C* grids = static_cast<C*>(scratch);
  C* by_grids = grids + b.remainders * b.cells;
  C* share = by_grids + b.remainders * b.cells;  // the gradients, then those over s
  C *m = share + b.cells, *s = m + b.chunk, *line = s + b.chunk, *weights = line + b.line;
  const int64_t inside = product(w.in) / w.in[0];
  const int64_t places = b.dim == 0 ? b.each : 1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * places;
    T* own = out + first * inside;
    for (int64_t i = 0; i < least(places, w.in[0] - first) * inside; ++i) own[i] = T{};
    for (int64_t k = 0; k < b.bands(); ++k) {
      const Band band(w, b, unit, k);
      sort_out(band, x, grids, line);
      fill(by_grids, b.remainders * b.cells, C(0));
      const int64_t length = band.length();
      fill(share, length, C(0));
      band.each_output_row([&](int64_t where, int64_t cell) {
#pragma omp simd
        for (int64_t i = 0; i < band.count[kLast]; ++i) share[cell + i] = load(grad[where + i]);
      });
      for (int64_t at = 0; at < length; at += b.chunk) {
        const int64_t n = least(b.chunk, length - at);
        origins(grids + at, b, n, m);
        fill(s, n, C(0));
        for (int64_t t = 0; t < b.taps; ++t) {
          const C* v = grids + at + b.offset[t];
          C* weight = weights + t * b.chunk;
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) {
            weight[i] = smooth_max_weight(v[i], m[i], p);
            s[i] += weight[i];
          }
        }
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) share[at + i] = smooth_max_share(share[at + i], s[i]);
        for (int64_t t = 0; t < b.taps; ++t) {
          C* to = by_grids + at + b.offset[t];
          const C *weight = weights + t * b.chunk, *own_share = share + at;
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) to[i] += own_share[i] * weight[i];
        }
      }
      put_back(band, by_grids, out, line);
    }
  }
}

}  // namespace

void smooth_max_pool_forward(const Windows& windows, const PoolBands& bands, Dtype dtype,
                             const void* x, void* y, int64_t begin, int64_t end, void* scratch,
                             double beta, double log_beta) {
  TP_BY_DTYPE(forward, windows, bands, x, y, begin, end, scratch, beta, log_beta)
}
void smooth_max_pool_backward(const Windows& windows, const PoolBands& bands, Dtype dtype,
                              const void* grad, const void* x, void* out, int64_t begin,
                              int64_t end, void* scratch, double beta, double log_beta) {
  TP_BY_DTYPE(backward, windows, bands, grad, x, out, begin, end, scratch, beta, log_beta)
}

}  // namespace twophase::TP_ISA
