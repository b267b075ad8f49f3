// Smooth maximum over pooling windows. Forward: a thread for each output. Backward: first the
// origin and the share of each output's window, then a thread for each input adds up what the
// windows that it is in give it, in one fixed order. The same sums, in the same order, as the CPU's
// kernel where that one does not cut an image into bands.
#pragma once

#include "../../math/smooth_max.h"
#include "../../math/windows.h"
#include "context.h"

namespace twophase {

struct Place {
  int64_t at[kWindowDims];
};

// Sizes, and the means to divide by them: a 64-bit division is a function call on a GPU.
struct Sizes {
  int64_t of[kWindowDims];
  double inverse[kWindowDims];
};

inline Sizes sizes_of(const int64_t (&sizes)[kWindowDims]) {
  Sizes result;
  for (int d = 0; d < kWindowDims; ++d)
    result.of[d] = sizes[d], result.inverse[d] = 1.0 / static_cast<double>(sizes[d]);
  return result;
}

// i < 2^52: the quotient in double is off by one at most.
TP_BODY Place place_of(int64_t i, const Sizes& sizes) {
  Place place;
  TP_UNROLL
  for (int d = kWindowDims - 1; d > 0; --d) {
    int64_t q = static_cast<int64_t>(static_cast<double>(i) * sizes.inverse[d]);
    int64_t r = i - q * sizes.of[d];
    if (r < 0) --q, r += sizes.of[d];
    if (r >= sizes.of[d]) ++q, r -= sizes.of[d];
    place.at[d] = r, i = q;
  }
  place.at[0] = i;
  return place;
}

// Calls f(index) for what there is along dimensions d and on, in the order of a window's places t.
// next(d, t): the index along dimension d, -1 where there is nothing. Dimension 0 has one place.
template <int d = 0, class Next, class F>
TP_BODY void each_place(const Windows& w, const int64_t (&sizes)[kWindowDims], const Next& next,
                        const F& f, int64_t index = 0) {
  if constexpr (d == kWindowDims) {
    f(index);
  } else {
    for (int64_t t = 0; t < w.kernel[d]; ++t) {
      const int64_t i = next(d, t);
      if (i >= 0) each_place<d + 1>(w, sizes, next, f, index * sizes[d] + i);
    }
  }
}

// The inputs of an output's window.
template <class F>
TP_BODY void each_input(const Windows& w, const Place& output, const F& f) {
  each_place(
      w, w.in,
      [&](int d, int64_t t) -> int64_t {
        const int64_t i = output.at[d] * w.stride[d] - w.padding[d] + t * w.dilation[d];
        return i < w.in[d] ? i : -1;
      },
      f);
}

// The outputs whose windows an input is in.
template <class F>
TP_BODY void each_output(const Windows& w, const Place& input, const F& f) {
  each_place(
      w, w.out,
      [&](int d, int64_t t) -> int64_t {
        const int64_t i = input.at[d] + w.padding[d] - t * w.dilation[d];
        if (d == 0) return input.at[0];
        if (i < 0) return -1;
        // below 2^32: sizes and paddings are below 2^31
        const uint32_t stride = static_cast<uint32_t>(w.stride[d]);
        const uint32_t o = static_cast<uint32_t>(i) / stride;
        return o * stride == static_cast<uint32_t>(i) && o < w.out[d] ? o : int64_t{-1};
      },
      f);
}

// The origin m and the sum s of a window.
template <class T, class C>
TP_BODY void smooth_max_sum(const Windows& w, const Place& output, const T* x,
                            const SoftplusParameters<C>& p, C* m, C* s) {
  C top = -C(__builtin_inf()), sum = 0;
  each_input(w, output, [&](int64_t i) { top = larger(load(x[i]), top); });
  top = smooth_max_origin(top);
  each_input(w, output, [&](int64_t i) { sum += smooth_max_weight(load(x[i]), top, p); });
  *m = top, *s = sum;
}

template <class T, class Ctx>
TP_BODY void smooth_max_pool_body(const Ctx& ctx, NoShared&, const Windows& w, const Sizes& sizes,
                                  const T* x, T* y, const SoftplusParameters<Compute<T>>& p) {
  using C = Compute<T>;
  const int64_t n = product(w.out), step = ctx.blocks() * ctx.threads();
  for (int64_t o = ctx.block() * ctx.threads() + ctx.thread(); o < n; o += step) {
    const Place output = place_of(o, sizes);
    C m, s;
    smooth_max_sum(w, output, x, p, &m, &s);
    C result = m + smooth_max_log(s, p);
    if (!(s >= 1))
      result = smooth_max_exception<C>(
          [&](const auto& f) { each_input(w, output, [&](int64_t i) { f(load(x[i])); }); });
    store(&y[o], result);
  }
}

// origin, share: [outputs]
template <class T, class Ctx>
TP_BODY void smooth_max_pool_shares_body(const Ctx& ctx, NoShared&, const Windows& w,
                                         const Sizes& sizes, const T* grad, const T* x,
                                         Compute<T>* origin, Compute<T>* share,
                                         const SoftplusParameters<Compute<T>>& p) {
  const int64_t n = product(w.out), step = ctx.blocks() * ctx.threads();
  for (int64_t o = ctx.block() * ctx.threads() + ctx.thread(); o < n; o += step) {
    Compute<T> s;
    smooth_max_sum(w, place_of(o, sizes), x, p, &origin[o], &s);
    share[o] = smooth_max_share(load(grad[o]), s);
  }
}

template <class T, class Ctx>
TP_BODY void smooth_max_pool_backward_body(const Ctx& ctx, NoShared&, const Windows& w,
                                           const Sizes& sizes, const T* x, const Compute<T>* origin,
                                           const Compute<T>* share, T* out,
                                           const SoftplusParameters<Compute<T>>& p) {
  const int64_t n = product(w.in), step = ctx.blocks() * ctx.threads();
  for (int64_t i = ctx.block() * ctx.threads() + ctx.thread(); i < n; i += step) {
    const Compute<T> own = load(x[i]);
    Compute<T> sum = 0;
    each_output(w, place_of(i, sizes),
                [&](int64_t o) { sum += share[o] * smooth_max_weight(own, origin[o], p); });
    store(&out[i], sum);
  }
}

}  // namespace twophase
