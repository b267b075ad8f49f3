// The persistent kernel of last_layer_epoch_, all of its blocks at once, against the definition in
// double precision.
#pragma once

#include <algorithm>
#include <cmath>

#include "../../csrc/cuda/bodies/last_layer_epoch.h"
#include "check.h"
#include "host_context.h"

namespace twophase {

constexpr int kShimThreads = 64;

struct EpochCase {
  int64_t n, k, m, blocks;
  std::vector<int64_t> bounds;
  bool labels, bias, momentum, nesterov;
};

inline float narrowed(float x, float) { return x; }
inline double narrowed(double x, double) { return x; }
inline BFloat16 narrowed(float x, BFloat16) {
  BFloat16 out{};
  store(&out, x);
  return out;
}

// One sample's loss; its logits z become `scale` times their derivatives.
inline double cross_entropy_row(std::vector<double>& z, int64_t label, double scale) {
  const double max = *std::max_element(z.begin(), z.end()), z_label = z[label];
  double sum = 0;
  for (double& x : z) sum += x = std::exp(x - max);
  for (size_t j = 0; j < z.size(); ++j)
    z[j] = (z[j] / sum - (static_cast<int64_t>(j) == label)) * scale;
  return std::log(sum) - (z_label - max);
}
template <class T>
double squared_error_row(std::vector<double>& z, const T* y, double scale) {
  double sum = 0;
  for (size_t j = 0; j < z.size(); ++j) {
    const double error = z[j] - static_cast<double>(y[j]);
    sum += error * error;
    z[j] = 2.0 * error * scale;
  }
  return sum;
}

template <class T, class H>
void check_epoch(Checks& checks, const EpochCase& c) {
  const int64_t stride = c.m + 3, steps = static_cast<int64_t>(c.bounds.size()) - 1;
  std::vector<H> h(c.n * stride);
  for (H& x : h) x = narrowed(static_cast<T>(uniform(0, 1)), H{});
  std::vector<T> weight = uniform_vector<T>(c.k * c.m), bias = uniform_vector<T>(c.k);
  std::vector<T> weight_buffer(c.k * c.m), bias_buffer(c.k);
  const std::vector<T> values = uniform_vector<T>(c.n * c.k);
  std::vector<int64_t> labels(c.n), order(c.bounds.back());
  for (int64_t& label : labels) label = static_cast<int64_t>(generator()() % c.k);
  for (int64_t& i : order) i = static_cast<int64_t>(generator()() % c.n);
  std::vector<double> rates(steps);
  for (int64_t s = 0; s < steps; ++s) rates[s] = 0.02 / static_cast<double>(s + 1);
  const double momentum = c.momentum ? 0.9 : 0.0, decay = 0.01;

  std::vector<double> w(weight.begin(), weight.end()), v(bias.begin(), bias.end());
  std::vector<double> wb(w.size()), vb(v.size()), losses(steps);
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t b = c.bounds[s + 1] - c.bounds[s];
    std::vector<double> gw(w.size()), gv(v.size()), z(c.k);
    for (int64_t r = 0; r < b; ++r) {
      const int64_t i = order[c.bounds[s] + r];
      const auto x = [&](int64_t f) { return static_cast<double>(load(h[i * stride + f])); };
      for (int64_t j = 0; j < c.k; ++j) {
        z[j] = c.bias ? v[j] : 0.0;
        for (int64_t f = 0; f < c.m; ++f) z[j] += x(f) * w[j * c.m + f];
      }
      losses[s] += c.labels ? cross_entropy_row(z, labels[i], 1.0 / b) / b
                            : squared_error_row(z, &values[i * c.k], 1.0 / b) / b;
      for (int64_t j = 0; j < c.k; ++j) {
        gv[j] += z[j];
        for (int64_t f = 0; f < c.m; ++f) gw[j * c.m + f] += z[j] * x(f);
      }
    }
    const auto update = [&](double& p, double g, double& buffer) {
      g += decay * p;
      buffer = s == 0 ? g : momentum * buffer + g;
      p -= rates[s] * (!c.momentum ? g : c.nesterov ? g + momentum * buffer : buffer);
    };
    for (size_t i = 0; i < w.size(); ++i) update(w[i], gw[i], wb[i]);
    for (size_t i = 0; c.bias && i < v.size(); ++i) update(v[i], gv[i], vb[i]);
  }

  EpochArguments<T, H> a{};
  a.m = c.m, a.k = c.k, a.steps = steps;
  for (int64_t s = 0; s < steps; ++s) a.rows = std::max(a.rows, c.bounds[s + 1] - c.bounds[s]);
  a.width = ceil_div(ceil_div(c.m, c.blocks), kEpochPack) * kEpochPack;
  a.weight = weight.data(), a.bias = c.bias ? bias.data() : nullptr;
  a.weight_buffer = c.momentum ? weight_buffer.data() : nullptr;
  a.bias_buffer = c.momentum ? bias_buffer.data() : nullptr;
  a.h = h.data(), a.h_stride = stride;
  a.target = {c.labels ? labels.data() : nullptr, c.labels ? nullptr : values.data(), order.data()};
  a.bounds = c.bounds.data(), a.lr = rates.data();
  a.is_first_step = true;
  a.scalars = sgd_scalars<T>({0, momentum, 0, decay, c.nesterov, false});
  std::vector<T> partial(c.blocks * a.rows * c.k), delta(a.rows * c.k);
  std::vector<double> logits(a.rows * c.k), row_loss(a.rows), measured(steps);
  a.partial = partial.data(), a.logits = logits.data(), a.delta = delta.data();
  a.row_loss = row_loss.data(), a.losses = measured.data();
  std::vector<LossShared<kShimThreads>> loss_shared(c.blocks);
  run_cooperative(c.blocks, kShimThreads, a.shared_bytes(kShimThreads / kWarp),
                  [&](const HostContext& ctx, void* memory) {
                    const EpochShared<T, H> shared(memory, a, kShimThreads / kWarp);
                    epoch_body<kShimThreads>(ctx, shared, loss_shared[ctx.block()], a);
                  });
  // Features in [0, 1], weights of order 1: a logit errs by m epsilon m / 2 at most, and what a
  // step adds is less than what the rates allow.
  const double epsilon = std::numeric_limits<T>::epsilon();
  const double bound = 4 * epsilon * static_cast<double>(c.m * c.m + 64);
  const auto within = [&](const std::vector<T>& got, const std::vector<double>& expected,
                          const char* what) {
    checks.close(got, expected, std::vector<double>(got.size(), bound), what);
  };
  within(weight, w, "last_layer_epoch_: weight");
  if (c.momentum) within(weight_buffer, wb, "last_layer_epoch_: momentum");
  if (c.bias) within(bias, v, "last_layer_epoch_: bias");
  checks.close(measured, losses, std::vector<double>(steps, bound), "last_layer_epoch_: losses");
}

inline void check_last_layer_epoch(Checks& checks) {
  check_epoch<float, float>(checks, {9, 3, 37, 3, {0, 5, 7, 12}, true, true, true, false});
  check_epoch<float, BFloat16>(checks, {9, 13, 30, 2, {0, 4, 8}, true, true, true, true});
  check_epoch<double, double>(checks, {40, 2, 21, 3, {0, 36, 37}, false, false, false, false});
  check_epoch<float, float>(checks, {3, 5, 4, 2, {0, 1}, false, true, false, false});
}

}  // namespace twophase
