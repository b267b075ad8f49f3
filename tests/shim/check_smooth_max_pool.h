// The smooth maximum's bodies against a loop over windows in float64: every window once, whatever
// the grid, in 1 to 4 dimensions with padding, dilation, gaps and overlaps.
#pragma once

#include "../../csrc/cuda/bodies/smooth_max_pool.h"
#include "check.h"
#include "host_context.h"

namespace twophase {

inline const std::vector<Windows>& pool_cases() {
  static const std::vector<Windows> cases = {
      // 3 x 3, stride 2, padding 1
      {{3, 1, 1, 7, 6},
       {3, 1, 1, 4, 3},
       {1, 1, 1, 3, 3},
       {1, 1, 1, 2, 2},
       {0, 0, 0, 1, 1},
       {1, 1, 1, 1, 1}},
      // channels last, dilated
      {{2, 1, 9, 8, 5},
       {2, 1, 3, 6, 5},
       {1, 1, 3, 2, 1},
       {1, 1, 2, 1, 1},
       {0, 0, 0, 0, 0},
       {1, 1, 2, 2, 1}},
      // three dimensions, the last windows reach past the end, a stride that leaves gaps
      {{2, 1, 5, 6, 10},
       {2, 1, 3, 3, 4},
       {1, 1, 2, 2, 2},
       {1, 1, 2, 2, 3},
       {0, 0, 1, 0, 0},
       {1, 1, 1, 1, 1}},
      {{1, 1, 1, 1, 40},
       {1, 1, 1, 1, 38},
       {1, 1, 1, 1, 3},
       {1, 1, 1, 1, 1},
       {0, 0, 0, 0, 0},
       {1, 1, 1, 1, 1}},
  };
  return cases;
}

template <class T>
void check_pool_dtype(Checks& checks, double unit, double subnormal = 0) {
  const double beta = 7;
  const auto p = smooth_max_parameters<Compute<T>>(beta, std::log(beta));
  for (const Windows& w : pool_cases())
    for (int64_t blocks : {1, 3}) {
      const int64_t in = product(w.in), out = product(w.out);
      std::vector<T> x(in), g(out), y(out), back(in);
      for (T& v : x) store(&v, static_cast<Compute<T>>(uniform(-1, 1)));
      for (T& v : g) store(&v, static_cast<Compute<T>>(uniform(-1, 1)));
      std::vector<Compute<T>> origin(out), share(out);
      run_grid<NoShared>(blocks, 32, [&](const HostContext& ctx, NoShared& none) {
        smooth_max_pool_body(ctx, none, w, sizes_of(w.out), x.data(), y.data(), p);
        smooth_max_pool_shares_body(ctx, none, w, sizes_of(w.out), g.data(), x.data(),
                                    origin.data(), share.data(), p);
      });
      run_grid<NoShared>(blocks, 32, [&](const HostContext& ctx, NoShared& none) {
        smooth_max_pool_backward_body(ctx, none, w, sizes_of(w.in), x.data(), origin.data(),
                                      share.data(), back.data(), p);
      });

      // Every input of every output, found without the bodies' own walk.
      std::vector<double> expected(out), by_x(in), got(out), got_by_x(in), bound(out),
          bound_x(in, subnormal);
      for (int64_t o = 0; o < out; ++o) {
        std::vector<int64_t> window;
        for (int64_t i = 0; i < in; ++i) {
          bool inside = true;
          for (int64_t d = kWindowDims - 1, a = o, b = i; d >= 0;
               a /= w.out[d], b /= w.in[d], --d) {
            const int64_t apart = b % w.in[d] - (a % w.out[d] * w.stride[d] - w.padding[d]);
            inside = inside && apart >= 0 && apart % w.dilation[d] == 0 &&
                     apart / w.dilation[d] < w.kernel[d];
          }
          if (inside) window.push_back(i);
        }
        double s = 0;
        for (int64_t i : window) s += std::exp(beta * static_cast<double>(load(x[i])));
        expected[o] = std::log(s) / beta;
        for (int64_t i : window) {
          const double part = std::exp(beta * static_cast<double>(load(x[i]))) / s;
          by_x[i] += static_cast<double>(load(g[o])) * part;
          bound_x[i] += 40 * unit * part;
        }
        got[o] = static_cast<double>(load(y[o]));
        bound[o] = 8 * unit;
      }
      for (int64_t i = 0; i < in; ++i) got_by_x[i] = static_cast<double>(load(back[i]));
      checks.close(got, expected, bound, "smooth_max_pool");
      checks.close(got_by_x, by_x, bound_x, "smooth_max_pool_backward");
    }
}

// NaN, infinities, and a window of nothing but -inf, whose gradient is 0 where nothing comes in.
inline void check_pool_exceptions(Checks& checks) {
  const Windows w{{1, 1, 1, 1, 12}, {1, 1, 1, 1, 6}, {1, 1, 1, 1, 2}, {1, 1, 1, 1, 2}, {},
                  {1, 1, 1, 1, 1}};
  const double inf = std::numeric_limits<double>::infinity(), nan = std::nan("");
  const std::vector<double> x{nan, inf, inf, 1, -inf, -inf, -inf, 2, 3, nan, inf, -inf};
  std::vector<double> y(6), back(12), origin(6), share(6), g(6, 1.0);
  g[2] = 0;
  const auto p = smooth_max_parameters<double>(2.0, std::log(2.0));
  run_grid<NoShared>(1, 32, [&](const HostContext& ctx, NoShared& none) {
    smooth_max_pool_body(ctx, none, w, sizes_of(w.out), x.data(), y.data(), p);
    smooth_max_pool_shares_body(ctx, none, w, sizes_of(w.out), g.data(), x.data(), origin.data(),
                                share.data(), p);
  });
  run_grid<NoShared>(1, 32, [&](const HostContext& ctx, NoShared& none) {
    smooth_max_pool_backward_body(ctx, none, w, sizes_of(w.in), x.data(), origin.data(),
                                  share.data(), back.data(), p);
  });
  checks.that(std::isnan(y[0]) && y[1] == inf && y[2] == -inf && y[3] == 2 && std::isnan(y[4]) &&
                  y[5] == inf,
              "smooth_max_pool of infinities and NaN");
  checks.that(back[4] == 0 && back[5] == 0 && back[6] == 0 && back[7] == 1 && std::isnan(back[9]),
              "smooth_max_pool_backward of infinities and NaN");
}

inline void check_smooth_max_pool(Checks& checks) {
  check_pool_dtype<Half>(checks, 0x1p-11, 0x1p-25);
  check_pool_dtype<BFloat16>(checks, 0x1p-8);
  check_pool_dtype<float>(checks, 0x1p-24);
  check_pool_dtype<double>(checks, 0x1p-53);
  check_pool_exceptions(checks);
}

}  // namespace twophase
