// A mini-batch step of the last layer in three passes, for callers that share them among threads:
//   logits   of slices of features, into partial sums
//   losses   of rows: slices added in order, loss and its derivative by the logits
//   update   of slices of features, from the rows and the derivatives
// The features are cut into slices by m alone and their partial logits are added in order, so that
// the result has the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

#include "../last_layer.h"
#include "kernels/last_layer_loss.h"
#include "kernels/last_layer_step.h"
#include "kernels/sgd.h"

namespace twophase {

struct Slices {
  static constexpr int64_t kMost = 32, kShortest = 256, kMultiple = 16;
  int64_t m, length, count;

  explicit Slices(int64_t m_) : m(m_) {
    const int64_t even = (m + kMost - 1) / kMost;
    length = std::max(kShortest, (even + kMultiple - 1) / kMultiple * kMultiple);
    count = (m + length - 1) / length;
  }
  int64_t begin(int64_t slice) const { return slice * length; }
  int64_t end(int64_t slice) const { return std::min((slice + 1) * length, m); }
};

// A sum in order would be less accurate than torch's in float64.
inline double pairwise_sum(const double* x, int64_t n) {
  if (n <= 1) return n == 0 ? 0.0 : x[0];
  return pairwise_sum(x, n / 2) + pairwise_sum(x + n / 2, n - n / 2);
}

// Of the losses of b samples.
inline double mean_loss_of(const double* losses, int64_t b) {
  return mean_loss(pairwise_sum(losses, b), b);
}

// What every backend on the CPU has.
struct CpuLabels {
  static std::pair<int64_t, int64_t> bad_label(const Tensor& labels, int64_t b, int64_t k) {
    const auto* label = static_cast<const int64_t*>(labels.const_data_ptr());
    for (int64_t r = 0; r < b; ++r)
      if (label[r] < 0 || label[r] >= k) return {r, label[r]};
    return {-1, 0};
  }
};

template <class T>
class Passes {
 public:
  Slices slices;

  // For steps of at most b rows. h_dtype: of the rows; that of T or bfloat16.
  Passes(int64_t b, int64_t k, int64_t m, Dtype h_dtype)
      : slices(m),
        k_(k),
        m_(m),
        h_dtype_(h_dtype),
        partial_(new T[slices.count * b * k]),
        delta_(new T[b * k]),
        bias_gradient_(new T[k]),
        bias_sums_(new double[k]),
        loss_(new double[b]) {}

  void logits(const void* const* rows, int64_t b, const void* weight, int64_t begin, int64_t end) {
    if (begin < end) TP_DISPATCH(last_layer_logits)
    (kDtype, h_dtype_, rows, weight, b, k_, m_, slices.begin(begin), slices.end(end - 1),
     slices.length, partial_.get() + begin * b * k_);
  }

  // Row r of the b has the target of sample r, or of sample index[r]. scale: mean_scale. z: k
  // numbers of scratch.
  void losses(int64_t begin, int64_t end, int64_t b, const void* bias, Loss loss,
              const void* target, const int64_t* index, double scale, double* z) {
    for (int64_t r = begin; r < end; ++r) {
      TP_DISPATCH(last_layer_sum)(kDtype, partial_.get() + r * k_, slices.count, b * k_, k_, z);
      loss_[r] = TP_DISPATCH(last_layer_loss)(kDtype, loss, z, bias, k_, target,
                                              index ? index[r] : r, scale, delta_.get() + r * k_);
    }
  }

  double loss_sum(int64_t b) const { return pairwise_sum(loss_.get(), b); }
  double mean_loss(int64_t b) const { return mean_loss_of(loss_.get(), b); }

  void update(const void* const* rows, int64_t b, void* weight, void* buffer, bool is_first_step,
              const SgdRule& rule, int64_t begin, int64_t end) {
    if (begin < end) TP_DISPATCH(last_layer_update)
    (kDtype, h_dtype_, rows, delta_.get(), b, k_, m_, slices.begin(begin), slices.end(end - 1),
     slices.length, weight, buffer, is_first_step, rule);
  }

  void update_bias(int64_t b, void* bias, void* buffer, bool is_first_step, const SgdRule& rule) {
    const double* sums = bias_sums(b);
    for (int64_t j = 0; j < k_; ++j) bias_gradient_[j] = static_cast<T>(sums[j]);
    TP_DISPATCH(sgd)
    (kDtype, bias, bias_gradient_.get(), buffer, k_, is_first_step, rule);
  }

  // gradient [k, m] += of these rows, on the slices.
  void add_gradient(const void* const* rows, int64_t b, void* gradient, int64_t begin,
                    int64_t end) {
    if (begin < end) TP_DISPATCH(last_layer_add_gradient)
    (kDtype, h_dtype_, rows, delta_.get(), b, k_, m_, slices.begin(begin), slices.end(end - 1),
     slices.length, gradient);
  }

  // The gradient by the bias, [k]; valid until it is asked for again.
  const double* bias_sums(int64_t b) {
    TP_DISPATCH(last_layer_sum)(kDtype, delta_.get(), b, k_, k_, bias_sums_.get());
    return bias_sums_.get();
  }

 private:
  static constexpr Dtype kDtype = sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
  int64_t k_, m_;
  Dtype h_dtype_;
  std::unique_ptr<T[]> partial_;  // [slices, b, k]
  std::unique_ptr<T[]> delta_;    // [b, k]
  std::unique_ptr<T[]> bias_gradient_;
  std::unique_ptr<double[]> bias_sums_, loss_;
};

}  // namespace twophase
