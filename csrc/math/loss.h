// The losses of the last layer in double precision, and their derivatives by the logits.
// cross-entropy of one sample: log(sum_j exp(z_j)) - z_label
// squared error of one sample: sum_j (z_j - y_j)^2
// The operators return the mean over the samples: mean_loss of the losses' sum. Its derivatives are
// those of each sample's loss times `scale`, which is mean_scale.
#pragma once

#include <math.h>

#include <cstdint>

#include "macros.h"

namespace twophase {

enum class Loss : int { kCrossEntropy, kSquaredError };

// Divided, not multiplied by the reciprocal: one rounding, and the one place for every operator and
// device.
TP_HD double mean_loss(double sum, int64_t samples) { return sum / static_cast<double>(samples); }
TP_HD double mean_scale(int64_t samples) { return 1.0 / static_cast<double>(samples); }

// max_j z_j. A NaN may be passed over: it comes back in the sum of exponentials.
TP_HD double largest(const double* z, int64_t k) {
  double max = z[0];
  for (int64_t j = 1; j < k; ++j) max = z[j] > max ? z[j] : max;
  return max;
}

// The pieces, for code that shares a sample's logits among threads. sum = sum_j exp(z_j - max).
TP_HD double cross_entropy(double z_label, double max, double sum) {
  return log(sum) - (z_label - max);
}
TP_HD double cross_entropy_delta(double exponential, double sum, bool is_label, double scale) {
  return (exponential / sum - (is_label ? 1.0 : 0.0)) * scale;
}
TP_HD double squared_error_delta(double z, double y, double scale) { return 2.0 * (z - y) * scale; }

// One sample at once: returns its loss and overwrites the logits by `scale` times the derivative.
TP_HD double cross_entropy_row(double* z, int64_t k, int64_t label, double scale) {
  const double max = largest(z, k), z_label = z[label];
  double sum = 0;
  for (int64_t j = 0; j < k; ++j) sum += z[j] = exp(z[j] - max);
  for (int64_t j = 0; j < k; ++j) z[j] = cross_entropy_delta(z[j], sum, j == label, scale);
  return cross_entropy(z_label, max, sum);
}
template <class T>
TP_HD double squared_error_row(double* z, int64_t k, const T* y, double scale) {
  double sum = 0;
  for (int64_t j = 0; j < k; ++j) {
    const double error = z[j] - static_cast<double>(y[j]);
    sum += error * error;
    z[j] = squared_error_delta(z[j], static_cast<double>(y[j]), scale);
  }
  return sum;
}

}  // namespace twophase
