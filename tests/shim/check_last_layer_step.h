// The three bodies of last_layer_step_. Squared error on small integers is exact in every order of
// summation, so it is compared bit for bit; cross-entropy within a bound of its rounding errors.
#pragma once

#include "../../csrc/cuda/bodies/last_layer_step.h"
#include "check.h"
#include "host_context.h"

namespace twophase {

template <class T>
struct StepData {
  StepShape shape;
  std::vector<T> h, weight, bias, weight_buffer, bias_buffer, values;
  std::vector<int64_t> labels;
  T loss = 0;
};

template <class T>
void run_step(StepData<T>& d, const StepTarget<T>& target, double lr, double momentum,
              double weight_decay, bool nesterov, bool is_first_step) {
  const StepShape& s = d.shape;
  std::vector<T> partial(s.slices() * s.b * s.k), delta(s.b * s.k);
  std::vector<double> logits(s.b * s.k), row_loss(s.b);
  const StepState<T> state{d.weight.data(),
                           d.bias.empty() ? nullptr : d.bias.data(),
                           momentum ? d.weight_buffer.data() : nullptr,
                           momentum && !d.bias.empty() ? d.bias_buffer.data() : nullptr,
                           is_first_step,
                           sgd_scalars<T>({lr, momentum, 0, weight_decay, nesterov, false})};
  run_grid<PartialShared<T>>(smaller(3, s.partial_blocks()), kBlock,
                             [&](const HostContext& ctx, PartialShared<T>& shared) {
                               partial_logits_body(ctx, shared, d.h.data(), d.weight.data(),
                                                   partial.data(), s);
                             });
  run_grid<LossShared<kBlock>>(2, kBlock, [&](const HostContext& ctx, LossShared<kBlock>& shared) {
    loss_body(ctx, shared, partial.data(), state.bias, target, logits.data(), delta.data(),
              row_loss.data(), s, s.slices());
  });
  run_grid<UpdateShared<T>>(
      smaller(3, s.update_blocks()), kBlock, [&](const HostContext& ctx, UpdateShared<T>& shared) {
        update_body(ctx, shared, d.h.data(), delta.data(), row_loss.data(), &d.loss, state, s);
      });
}

struct StepTruth {
  std::vector<double> weight, bias, weight_buffer, bias_buffer, weight_bound, bias_bound;
  double loss = 0, loss_bound = 0;
};

// Forward, loss, gradient and SGD by definition in double precision; bounds for precision epsilon.
template <class T>
StepTruth step_truth(const StepData<T>& d, const StepTarget<T>& target, double lr, double momentum,
                     double weight_decay, bool nesterov, bool is_first_step) {
  const auto& [b, k, m, stride] = d.shape;
  const double epsilon = std::numeric_limits<T>::epsilon();
  StepTruth t{{d.weight.begin(), d.weight.end()},
              {d.bias.begin(), d.bias.end()},
              {d.weight_buffer.begin(), d.weight_buffer.end()},
              {d.bias_buffer.begin(), d.bias_buffer.end()},
              {},
              {}};
  std::vector<double> delta(b * k);
  double logit_size = 1;  // max_i sum_f |h_if w_jf|
  for (int64_t i = 0; i < b; ++i) {
    std::vector<double> z(k);
    for (int64_t j = 0; j < k; ++j) {
      double size = 0;
      for (int64_t f = 0; f < m; ++f) {
        const double product = static_cast<double>(d.h[i * stride + f]) * d.weight[j * m + f];
        z[j] += product;
        size += std::abs(product);
      }
      if (!d.bias.empty()) z[j] += d.bias[j];
      logit_size = std::fmax(logit_size, size);
    }
    if (target.labels) {
      double sum = 0;
      for (const double v : z) sum += std::exp(v);
      t.loss += (std::log(sum) - z[target.labels[i]]) / b;
      for (int64_t j = 0; j < k; ++j)
        delta[i * k + j] = (std::exp(z[j]) / sum - (j == target.labels[i])) / b;
    } else {
      for (int64_t j = 0; j < k; ++j) {
        const double error = z[j] - target.values[i * k + j];
        t.loss += error * error / b;
        delta[i * k + j] = 2 * error / b;
      }
    }
  }
  // Of one delta: the logits' error passes a derivative of at most 1 / b.
  const double delta_error = epsilon * (m + 8) * logit_size / b;
  t.loss_bound = 2 * epsilon * (m + 8) * logit_size;
  const auto update = [&](double& w, double& buffer, double gradient) {
    gradient += weight_decay * w;
    if (momentum != 0) {
      buffer = is_first_step ? gradient : momentum * buffer + gradient;
      gradient = nesterov ? gradient + momentum * buffer : buffer;
    }
    w -= lr * gradient;
  };
  double none = 0;
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t f = 0; f <= m; ++f) {  // f = m: the bias
      if (f == m && d.bias.empty()) continue;
      double gradient = 0, size = 0, column = 0;
      for (int64_t i = 0; i < b; ++i) {
        const double x = f == m ? 1.0 : static_cast<double>(d.h[i * stride + f]);
        gradient += delta[i * k + j] * x;
        size += std::abs(delta[i * k + j] * x);
        column += std::abs(x);
      }
      double& w = f == m ? t.bias[j] : t.weight[j * m + f];
      const bool buffered = momentum != 0;
      update(w,
             !buffered ? none
             : f == m  ? t.bias_buffer[j]
                       : t.weight_buffer[j * m + f],
             gradient);
      (f == m ? t.bias_bound : t.weight_bound)
          .push_back(2 * (column * delta_error + epsilon * (b + 8) * (size + 2)));
    }
  }
  return t;
}

template <class T>
StepData<T> step_data(int64_t b, int64_t k, int64_t m, int64_t padding, bool bias) {
  StepData<T> d{{b, k, m, m + padding}, {}, {}, {}, {}, {}, {}, {}};
  const auto integers = [](int64_t n) {
    std::vector<T> out(n);
    for (T& x : out) x = static_cast<T>(generator()() % 5) - 2;
    return out;
  };
  d.h = integers(b * (m + padding));
  d.weight = integers(k * m);
  d.weight_buffer = integers(k * m);
  d.values = integers(b * k);
  if (bias) {
    d.bias = integers(k);
    d.bias_buffer = integers(k);
  }
  for (int64_t i = 0; i < b; ++i) d.labels.push_back(static_cast<int64_t>(generator()() % k));
  return d;
}

template <class T>
void check_squared_error(Checks& checks, int64_t b, int64_t k, int64_t m, int64_t padding,
                         bool bias, double momentum, bool nesterov, bool is_first_step) {
  StepData<T> d = step_data<T>(b, k, m, padding, bias);
  const StepTarget<T> target{nullptr, d.values.data(), nullptr};
  const StepTruth truth = step_truth(d, target, 0.5, momentum, 0.25, nesterov, is_first_step);
  run_step(d, target, 0.5, momentum, 0.25, nesterov, is_first_step);
  const auto exactly = [&](const std::vector<T>& got, const std::vector<double>& expected,
                           const char* what) {
    checks.close(got, expected, std::vector<double>(got.size(), 0.0), what);
  };
  exactly(d.weight, truth.weight, "squared error: weight");
  exactly(d.bias, truth.bias, "squared error: bias");
  exactly(d.weight_buffer, truth.weight_buffer, "squared error: weight buffer");
  exactly(d.bias_buffer, truth.bias_buffer, "squared error: bias buffer");
  checks.that(d.loss == truth.loss, "squared error: loss", k);
}

template <class T>
void check_cross_entropy(Checks& checks, int64_t b, int64_t k, int64_t m, int64_t padding,
                         bool bias, double momentum, bool nesterov, bool is_first_step) {
  StepData<T> d = step_data<T>(b, k, m, padding, bias);
  for (T& w : d.weight) w = static_cast<T>(uniform(-0.1, 0.1));
  const StepTarget<T> target{d.labels.data(), nullptr, nullptr};
  const StepTruth truth = step_truth(d, target, 0.5, momentum, 0, nesterov, is_first_step);
  run_step(d, target, 0.5, momentum, 0, nesterov, is_first_step);
  checks.close(d.weight, truth.weight, truth.weight_bound, "cross-entropy: weight");
  checks.close(d.bias, truth.bias, truth.bias_bound, "cross-entropy: bias");
  checks.that(std::abs(d.loss - truth.loss) <= truth.loss_bound, "cross-entropy: loss", k);
}

inline void check_last_layer_step(Checks& checks) {
  // Several slices; several tiles of outputs; of rows; more outputs than threads; no features.
  check_squared_error<float>(checks, 4, 3, 300, 0, true, 0.5, false, true);
  check_squared_error<double>(checks, 4, 13, 131, 3, true, 0.5, true, false);
  check_squared_error<float>(checks, 128, 2, 20, 0, true, 0, false, false);
  check_squared_error<float>(checks, 2, 130, 33, 0, false, 0.5, false, false);
  check_squared_error<double>(checks, 2, 2, 0, 1, true, 0.5, false, false);
  check_cross_entropy<float>(checks, 3, 13, 140, 3, true, 0.5, true, false);
  check_cross_entropy<double>(checks, 5, 10, 70, 0, true, 0.9, false, true);
  check_cross_entropy<float>(checks, 2, 130, 33, 0, false, 0, false, false);
  check_cross_entropy<double>(checks, 1, 1, 1, 5, true, 0.5, false, false);

  StepData<float> d = step_data<float>(2, 3, 4, 0, true);
  d.labels[1] = 3;
  run_step(d, {d.labels.data(), nullptr, nullptr}, 0.5, 0, 0, false, false);
  checks.that(std::isnan(d.loss) && std::isnan(d.bias[0]), "cross-entropy: a label out of range");
}

}  // namespace twophase
