#include "../last_layer_step.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels/last_layer_step.h"
#include "kernels/sgd.h"
#include "parallel.h"

namespace twophase {
namespace {

// The features are cut into slices by m alone; their partial logits are added in order. So the
// result has the same bits for any number of threads.
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

// In float64 a sum in order would be less accurate than torch's.
double pairwise_sum(const double* x, int64_t n) {
  if (n == 1) return x[0];
  return pairwise_sum(x, n / 2) + pairwise_sum(x + n / 2, n - n / 2);
}

template <class T>
class Step {
 public:
  explicit Step(const LastLayerStep& arguments)
      : s_(arguments),
        slices_(s_.m),
        rows_(s_.b),
        partial_(new T[slices_.count * s_.b * s_.k]),
        delta_(new T[s_.b * s_.k]) {
    for (int64_t r = 0; r < s_.b; ++r) rows_[r] = static_cast<const T*>(s_.h) + r * s_.h_stride;
  }

  void run() {
    torch::stable::parallel_for(0, slices_.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) TP_DISPATCH(last_layer_logits)
      (s_.dtype, rows_.data(), s_.weight, s_.b, s_.k, s_.m, slices_.begin(i), slices_.end(i),
       partial_.get() + i * s_.b * s_.k);
    });
    losses();
    torch::stable::parallel_for(0, slices_.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) TP_DISPATCH(last_layer_update)
      (s_.dtype, rows_.data(), delta_.get(), s_.b, s_.k, s_.m, slices_.begin(i), slices_.end(i),
       s_.weight, s_.weight_buffer, s_.fresh, s_.lr, s_.momentum, s_.dampening, s_.weight_decay,
       s_.nesterov);
    });
    if (s_.bias) update_bias();
  }

 private:
  // Mean loss, and delta = its derivative by the logits.
  void losses() {
    std::vector<double> loss(s_.b);
    const int64_t grain = std::max<int64_t>(1, 4096 / s_.k);
    torch::stable::parallel_for(0, s_.b, grain, [&](int64_t begin, int64_t end) {
      std::vector<double> z(s_.k);
      for (int64_t r = begin; r < end; ++r) loss[r] = row_loss(r, z.data());
    });
    *static_cast<T*>(s_.loss_result) =
        static_cast<T>(pairwise_sum(loss.data(), s_.b) / static_cast<double>(s_.b));
  }

  double row_loss(int64_t r, double* z) {
    for (int64_t j = 0; j < s_.k; ++j)
      z[j] = s_.bias ? static_cast<double>(static_cast<const T*>(s_.bias)[j]) : 0.0;
    for (int64_t i = 0; i < slices_.count; ++i) {
      const T* partial = partial_.get() + (i * s_.b + r) * s_.k;
      for (int64_t j = 0; j < s_.k; ++j) z[j] += static_cast<double>(partial[j]);
    }
    const double scale = 1.0 / static_cast<double>(s_.b);
    const double loss =
        s_.loss == Loss::kCrossEntropy
            ? cross_entropy_row(z, s_.k, static_cast<const int64_t*>(s_.target)[r], scale)
            : squared_error_row(z, s_.k, static_cast<const T*>(s_.target) + r * s_.k, scale);
    for (int64_t j = 0; j < s_.k; ++j) delta_[r * s_.k + j] = static_cast<T>(z[j]);
    return loss;
  }

  void update_bias() {
    std::vector<T> gradient(s_.k);
    for (int64_t j = 0; j < s_.k; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < s_.b; ++r) sum += static_cast<double>(delta_[r * s_.k + j]);
      gradient[j] = static_cast<T>(sum);
    }
    TP_DISPATCH(sgd)
    (s_.dtype, s_.bias, gradient.data(), s_.bias_buffer, s_.k, s_.fresh, s_.lr, s_.momentum,
     s_.dampening, s_.weight_decay, s_.nesterov, false);
  }

  const LastLayerStep& s_;
  Slices slices_;
  std::vector<const void*> rows_;
  std::unique_ptr<T[]> partial_;  // [slices, b, k]
  std::unique_ptr<T[]> delta_;    // [b, k]
};

struct Cpu {
  static std::pair<int64_t, int64_t> bad_label(const Tensor& labels, int64_t b, int64_t k) {
    const int64_t* label = static_cast<const int64_t*>(labels.const_data_ptr());
    for (int64_t r = 0; r < b; ++r)
      if (label[r] < 0 || label[r] >= k) return {r, label[r]};
    return {-1, 0};
  }
  static void step(const Tensor&, const LastLayerStep& s) {
    if (s.dtype == Dtype::kFloat64)
      Step<double>(s).run();
    else
      Step<float>(s).run();
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("last_layer_step_", TORCH_BOX(&twophase::last_layer_step_op<twophase::Cpu>));
}
