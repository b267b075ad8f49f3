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

// The pieces, for whoever has a sample's logits. sum = sum_j exp(z_j - max), max = max_j z_j, which
// may pass over a NaN: it comes back in the sum.
TP_HD double cross_entropy(double z_label, double max, double sum) {
  return log(sum) - (z_label - max);
}
TP_HD double cross_entropy_delta(double exponential, double sum, bool is_label, double scale) {
  return (exponential / sum - (is_label ? 1.0 : 0.0)) * scale;
}
TP_HD double squared_error_delta(double z, double y, double scale) { return 2.0 * (z - y) * scale; }

}  // namespace twophase
