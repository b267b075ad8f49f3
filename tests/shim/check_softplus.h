// The softplus bodies against a loop over csrc/math/softplus.h (whose accuracy the CPU tests
// prove): every element once, aligned or not, in place or not, whatever the grid.
#pragma once

#include "../../csrc/cuda/bodies/softplus.h"
#include "check.h"
#include "host_context.h"

namespace twophase {

template <class T>
std::vector<T> softplus_input(int64_t n, double low, double high) {
  std::vector<T> out(static_cast<size_t>(n));
  for (T& x : out) store(&x, static_cast<Compute<T>>(uniform(low, high)));
  return out;
}

template <class T>
void check_softplus_dtype(Checks& checks) {
  const double beta = 100;
  const auto p = softplus_parameters<Compute<T>>(beta, std::log(beta));
  for (int64_t n : {1, 37, 1500})
    for (int64_t offset : {0, 1})
      for (int64_t blocks : {1, 3}) {
        // Vectors are 16-byte aligned: an offset of one element is not.
        const auto x = softplus_input<T>(n + offset, -0.3, 0.3);
        const auto g = softplus_input<T>(n + offset, -1, 1),
                   gg = softplus_input<T>(n + offset, -1, 1);
        std::vector<T> y(x), back(g), a(g), b(g), forward(x), expected(g), expected_a(g),
            expected_b(g);
        for (int64_t i = offset; i < n + offset; ++i) {
          store(&y[i], softplus(load(x[i]), p));
          store(&expected[i], load(g[i]) * softplus_derivative(load(y[i]), p));
          const Compute<T> s = softplus_derivative(load(y[i]), p);
          store(&expected_a[i], load(gg[i]) * s);
          store(&expected_b[i],
                load(gg[i]) * load(g[i]) * p.beta * softplus_complement(load(y[i]), p));
        }
        run_grid<NoShared>(blocks, 32, [&](const HostContext& ctx, NoShared& none) {
          T* in_place = forward.data() + offset;
          softplus_forward_body<T>(ctx, none, in_place, in_place, n, p);
          softplus_backward_body(ctx, none, g.data() + offset, y.data() + offset,
                                 back.data() + offset, n, p);
          softplus_double_backward_body(ctx, none, gg.data() + offset, g.data() + offset,
                                        y.data() + offset, a.data() + offset, b.data() + offset, n,
                                        p);
        });
        checks.same_bits(forward, y, "softplus in place");
        checks.same_bits(back, expected, "softplus_backward");
        checks.same_bits(a, expected_a, "softplus_double_backward, by grad");
        checks.same_bits(b, expected_b, "softplus_double_backward, by y");
      }
}

inline void check_softplus(Checks& checks) {
  check_softplus_dtype<Half>(checks);
  check_softplus_dtype<BFloat16>(checks);
  check_softplus_dtype<float>(checks);
  check_softplus_dtype<double>(checks);
}

}  // namespace twophase
