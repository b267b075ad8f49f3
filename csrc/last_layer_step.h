// Checks of last_layer_step_, for any backend that provides
//   bad_label(labels, b, k): (row, label) of the first label outside [0, k), row -1 if there is
//   none step(like, arguments): one step of SGD; writes the mean loss before the step
// `like` and `labels` name the device.
#pragma once

#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "math/loss.h"
#include "overlap.h"

namespace twophase {

struct LastLayerStep {
  Dtype dtype;  // float32 or float64: of every array but the labels
  int64_t b, k, m;
  void* weight;         // [k, m]
  void* bias;           // [k] or null
  void* weight_buffer;  // [k, m]; null without momentum
  void* bias_buffer;    // [k]; null without momentum or bias
  const void* h;        // [b, m]
  int64_t h_stride;     // elements from one row of h to the next
  Loss loss;
  const void* target;  // cross-entropy: int64 [b]; squared error: [b, k]
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
  bool fresh;         // the buffers hold nothing yet
  void* loss_result;  // one element
};

// A parameter or buffer that a step overwrites: of the dtype and device of `like`, packed.
inline void require_updatable(const Tensor& t, const char* name,
                              std::initializer_list<int64_t> shape, const Tensor& like,
                              const char* like_name) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  std::ostringstream expected;
  int64_t i = 0;
  for (int64_t size : shape) {
    same = same && t.size(i) == size;
    expected << (i++ ? ", " : "") << size;
  }
  require(same, name, ": expected shape [", expected.str(), "], got ", shape_of(t));
  require(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of ", like_name, ", ",
          torch::headeronly::toString(like.scalar_type()), ", got ",
          torch::headeronly::toString(t.scalar_type()));
  require(t.device() == like.device(), name, ": expected the device of ", like_name);
  require(t.is_contiguous(), name, ": expected a contiguous tensor, it is updated in place");
}

inline void require_rate(double lr) {
  require(std::isfinite(lr) && lr >= 0, "lr: expected a finite number >= 0, got ", lr);
}

inline void require_rule(double momentum, double dampening, double weight_decay, bool nesterov) {
  require(std::isfinite(momentum) && momentum >= 0, "momentum: expected a finite number >= 0, got ",
          momentum);
  require(std::isfinite(weight_decay) && weight_decay >= 0,
          "weight_decay: expected a finite number >= 0, got ", weight_decay);
  require(std::isfinite(dampening), "dampening: expected a finite number, got ", dampening);
  require(!nesterov || (momentum > 0 && dampening == 0),
          "nesterov: expected momentum > 0 and dampening 0, got ", momentum, " and ", dampening);
}

inline void require_buffers(const std::optional<Tensor>& weight_buffer,
                            const std::optional<Tensor>& bias_buffer, bool has_bias, int64_t k,
                            int64_t m, const Tensor& like, const char* like_name) {
  require(weight_buffer.has_value(), "weight_buffer: expected a tensor where momentum is not 0");
  require_updatable(*weight_buffer, "weight_buffer", {k, m}, like, like_name);
  if (!has_bias) return;
  require(bias_buffer.has_value(), "bias_buffer: expected a tensor where momentum is not 0");
  require_updatable(*bias_buffer, "bias_buffer", {k}, like, like_name);
}

// What a step writes and what it reads lie apart.
inline void require_own_memory(const Tensor& weight, const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& weight_buffer,
                               const std::optional<Tensor>& bias_buffer, bool with_buffers,
                               const Tensor& h, const Tensor& target,
                               const Tensor* logits = nullptr) {
  std::vector<Argument> written{{&weight, "weight"}};
  if (bias) written.push_back({&*bias, "bias"});
  if (with_buffers) written.push_back({&*weight_buffer, "weight_buffer"});
  if (with_buffers && bias) written.push_back({&*bias_buffer, "bias_buffer"});
  std::vector<Argument> read{{&h, "h"}, {&target, "target"}};
  if (logits) read.push_back({logits, "logits"});
  require_own_memory(written, read);
}

// The targets of b samples, packed: labels in range, or values of the dtype of `like`.
template <class Backend>
Tensor checked_target(const Tensor& target, int64_t loss, int64_t b, int64_t k, const Tensor& like,
                      const char* like_name) {
  require(loss == 0 || loss == 1, "loss: expected 0 (cross-entropy) or 1 (squared error), got ",
          loss);
  require(target.device() == like.device(), "target: expected the device of ", like_name);
  if (static_cast<Loss>(loss) == Loss::kCrossEntropy) {
    require(target.scalar_type() == ScalarType::Long, "target: expected int64 labels, got ",
            torch::headeronly::toString(target.scalar_type()));
    require(target.dim() == 1 && target.size(0) == b, "target: expected shape [", b, "], got ",
            shape_of(target));
  } else {
    require(target.scalar_type() == like.scalar_type(), "target: expected the dtype of ", like_name,
            ", ", torch::headeronly::toString(like.scalar_type()), ", got ",
            torch::headeronly::toString(target.scalar_type()));
    require(target.dim() == 2 && target.size(0) == b && target.size(1) == k,
            "target: expected shape [", b, ", ", k, "], got ", shape_of(target));
  }
  const Tensor packed = torch::stable::contiguous(target);
  if (static_cast<Loss>(loss) == Loss::kCrossEntropy) {
    const std::pair<int64_t, int64_t> bad = Backend::bad_label(packed, b, k);
    require(bad.first < 0, "target: expected labels from 0 to ", k - 1, ", got ", bad.second,
            " in row ", bad.first);
  }
  return packed;
}

// Rows may lie anywhere, their elements side by side.
inline Tensor with_packed_rows(const Tensor& h) {
  const bool rows = (h.size(1) <= 1 || h.stride(1) == 1) && h.stride(0) >= 0;
  return rows ? h : torch::stable::contiguous(h);
}

template <class Backend>
Tensor last_layer_step_op(Tensor weight, std::optional<Tensor> bias,
                          std::optional<Tensor> weight_buffer, std::optional<Tensor> bias_buffer,
                          Tensor h, Tensor target, int64_t loss, double lr, double momentum,
                          double dampening, double weight_decay, bool nesterov, bool fresh) {
  LastLayerStep s{};
  require(h.dim() == 2, "h: expected 2 dimensions, got ", h.dim());
  s.dtype = dtype_of(h, "h");
  require(s.dtype == Dtype::kFloat32 || s.dtype == Dtype::kFloat64,
          "h: expected float32 or float64, got ", torch::headeronly::toString(h.scalar_type()));
  require(weight.dim() == 2, "weight: expected 2 dimensions, got ", weight.dim());
  s.b = h.size(0), s.m = h.size(1), s.k = weight.size(0);
  require(s.b > 0, "h: expected at least one sample, got ", shape_of(h));
  require(s.k > 0, "weight: expected at least one output, got ", shape_of(weight));
  require_updatable(weight, "weight", {s.k, s.m}, h, "h");
  if (bias) require_updatable(*bias, "bias", {s.k}, h, "h");
  require_rate(lr);
  require_rule(momentum, dampening, weight_decay, nesterov);
  if (momentum != 0)
    require_buffers(weight_buffer, bias_buffer, bias.has_value(), s.k, s.m, h, "h");
  const Tensor packed_target = checked_target<Backend>(target, loss, s.b, s.k, h, "h");
  require_own_memory(weight, bias, weight_buffer, bias_buffer, momentum != 0, h, target);

  const Tensor h_rows = with_packed_rows(h);
  Tensor result = torch::stable::new_empty(h, {});
  s.weight = weight.mutable_data_ptr();
  s.bias = bias ? bias->mutable_data_ptr() : nullptr;
  s.weight_buffer = momentum != 0 ? weight_buffer->mutable_data_ptr() : nullptr;
  s.bias_buffer = momentum != 0 && bias ? bias_buffer->mutable_data_ptr() : nullptr;
  s.h = h_rows.const_data_ptr();
  s.h_stride = h_rows.stride(0);
  s.loss = static_cast<Loss>(loss);
  s.target = packed_target.const_data_ptr();
  s.lr = lr, s.momentum = momentum, s.dampening = dampening, s.weight_decay = weight_decay;
  s.nesterov = nesterov, s.fresh = fresh;
  s.loss_result = result.mutable_data_ptr();
  Backend::step(h, s);
  return result;
}

}  // namespace twophase
