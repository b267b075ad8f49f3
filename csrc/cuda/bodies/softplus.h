// Softplus kernel bodies: elementwise, grid-stride, two 16-byte packs in flight per thread where
// every pointer is aligned. Outputs may be inputs: each element is read before it is written, by
// the same thread.
#pragma once

#include "../../math/softplus.h"
#include "context.h"

namespace twophase {

constexpr int kSoftplusPacks = 2;  // loads in flight before the first use

// on_packs(i, n) handles packs i, i + threads, ... below n; on_element(i) what no pack covers.
template <class T, class Ctx, class F, class G>
TP_BODY void for_each_element(const Ctx& ctx, int64_t n, bool aligned, const F& on_packs,
                              const G& on_element) {
  constexpr int64_t kSize = Pack<T>::kSize;
  const int64_t n_packs = aligned ? n / kSize : 0;
  const int64_t step = ctx.blocks() * ctx.threads() * kSoftplusPacks;
  for (int64_t i = ctx.block() * ctx.threads() * kSoftplusPacks + ctx.thread(); i < n_packs;
       i += step)
    on_packs(i, n_packs);
  for (int64_t i = n_packs * kSize + ctx.block() * ctx.threads() + ctx.thread(); i < n;
       i += ctx.blocks() * ctx.threads())
    on_element(i);
}

template <class T, class Ctx>
TP_BODY void softplus_forward_body(const Ctx& ctx, NoShared&, const T* x, T* y, int64_t n,
                                   const SoftplusParameters<Compute<T>>& p) {
  for_each_element<T>(
      ctx, n, aligned16(x, y),
      [&](int64_t i, int64_t n_packs) {
        Pack<T> in[kSoftplusPacks];
        TP_UNROLL
        for (int u = 0; u < kSoftplusPacks; ++u)
          if (i + u * ctx.threads() < n_packs) in[u] = packs(x)[i + u * ctx.threads()];
        TP_UNROLL
        for (int u = 0; u < kSoftplusPacks; ++u) {
          if (i + u * ctx.threads() >= n_packs) break;
          Pack<T> out;
          TP_UNROLL
          for (int e = 0; e < Pack<T>::kSize; ++e) store(&out.v[e], softplus(load(in[u].v[e]), p));
          packs(y)[i + u * ctx.threads()] = out;
        }
      },
      [&](int64_t i) { store(&y[i], softplus(load(x[i]), p)); });
}

template <class T, class Ctx>
TP_BODY void softplus_backward_body(const Ctx& ctx, NoShared&, const T* grad, const T* y, T* out,
                                    int64_t n, const SoftplusParameters<Compute<T>>& p) {
  for_each_element<T>(
      ctx, n, aligned16(grad, y, out),
      [&](int64_t i, int64_t n_packs) {
        Pack<T> g[kSoftplusPacks], v[kSoftplusPacks];
        TP_UNROLL
        for (int u = 0; u < kSoftplusPacks; ++u)
          if (i + u * ctx.threads() < n_packs) {
            g[u] = packs(grad)[i + u * ctx.threads()];
            v[u] = packs(y)[i + u * ctx.threads()];
          }
        TP_UNROLL
        for (int u = 0; u < kSoftplusPacks; ++u) {
          if (i + u * ctx.threads() >= n_packs) break;
          Pack<T> result;
          TP_UNROLL
          for (int e = 0; e < Pack<T>::kSize; ++e)
            store(&result.v[e], load(g[u].v[e]) * softplus_derivative(load(v[u].v[e]), p));
          packs(out)[i + u * ctx.threads()] = result;
        }
      },
      [&](int64_t i) { store(&out[i], load(grad[i]) * softplus_derivative(load(y[i]), p)); });
}

// out_grad = gg * s, out_y = gg * g * beta * (1 - s)
template <class T>
TP_HD void softplus_second(T gg_, T g_, T y_, T* out_grad, T* out_y,
                           const SoftplusParameters<Compute<T>>& p) {
  const Compute<T> gg = load(gg_), y = load(y_);
  store(out_grad, gg * softplus_derivative(y, p));
  store(out_y, gg * load(g_) * p.beta * softplus_complement(y, p));
}

template <class T, class Ctx>
TP_BODY void softplus_double_backward_body(const Ctx& ctx, NoShared&, const T* grad_grad,
                                           const T* grad, const T* y, T* out_grad, T* out_y,
                                           int64_t n, const SoftplusParameters<Compute<T>>& p) {
  for_each_element<T>(
      ctx, n, aligned16(grad_grad, grad, y, out_grad, out_y),
      [&](int64_t i, int64_t n_packs) {
        // Three streams are enough loads in flight: the packs go one after the other.
        for (int u = 0; u < kSoftplusPacks; ++u) {
          const int64_t k = i + u * ctx.threads();
          if (k >= n_packs) break;
          const Pack<T> gg = packs(grad_grad)[k], g = packs(grad)[k], v = packs(y)[k];
          Pack<T> a, b;
          TP_UNROLL
          for (int e = 0; e < Pack<T>::kSize; ++e)
            softplus_second(gg.v[e], g.v[e], v.v[e], &a.v[e], &b.v[e], p);
          packs(out_grad)[k] = a;
          packs(out_y)[k] = b;
        }
      },
      [&](int64_t i) { softplus_second(grad_grad[i], grad[i], y[i], &out_grad[i], &out_y[i], p); });
}

}  // namespace twophase
