// What the operators of the last layer share: its arguments and their checks, for any backend that
// provides
//   bad_label(labels, b, k): (row, label) of the first label outside [0, k), row -1 if there is
//   none
#pragma once

#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "math/loss.h"
#include "math/sgd.h"
#include "overlap.h"

namespace twophase {

struct LastLayer {
  Dtype dtype;  // float32 or float64: of every array but the rows of h, the labels and the losses
  int64_t k, m;
  void* weight;         // [k, m]
  void* bias;           // [k] or null
  void* weight_buffer;  // [k, m]; null without momentum
  void* bias_buffer;    // [k]; null without momentum or bias
  Loss loss;
  const void* target;  // of b samples: cross-entropy: int64 [b]; squared error: [b, k]
  SgdRule rule;
  bool is_first_step;  // the buffers hold nothing yet
};

// The tensors behind it, as an operator gets them.
struct LastLayerTensors {
  Tensor weight;
  std::optional<Tensor> bias, weight_buffer, bias_buffer;
  Tensor h, target;
  const Tensor* like;  // h or weight: the others have its dtype and device
  const char* like_name;
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

inline void require_rule(const SgdRule& rule) {
  require_rate(rule.lr);
  require(std::isfinite(rule.momentum) && rule.momentum >= 0,
          "momentum: expected a finite number >= 0, got ", rule.momentum);
  require(std::isfinite(rule.weight_decay) && rule.weight_decay >= 0,
          "weight_decay: expected a finite number >= 0, got ", rule.weight_decay);
  require(std::isfinite(rule.dampening), "dampening: expected a finite number, got ",
          rule.dampening);
  require(!rule.nesterov || (rule.momentum > 0 && rule.dampening == 0),
          "nesterov: expected momentum > 0 and dampening 0, got ", rule.momentum, " and ",
          rule.dampening);
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

// Checks what a step of b samples overwrites and is told, and that it lies apart from what the step
// reads (`logits` too, where given); fills `layer` but for dtype, k and m, which are known. Returns
// the packed target, which the caller keeps alive.
template <class Backend>
Tensor checked_layer(LastLayer& layer, LastLayerTensors& t, int64_t b, int64_t loss,
                     const SgdRule& rule, bool is_first_step, const Tensor* logits = nullptr) {
  const int64_t k = layer.k, m = layer.m;
  const bool with_buffers = rule.momentum != 0;
  std::vector<Argument> written, read{{&t.h, "h"}, {&t.target, "target"}};
  if (logits) read.push_back({logits, "logits"});
  const auto overwritten = [&](Tensor& tensor, const char* name,
                               std::initializer_list<int64_t> shape) {
    require_updatable(tensor, name, shape, *t.like, t.like_name);
    written.push_back({&tensor, name});
    return tensor.mutable_data_ptr();
  };
  layer.weight = overwritten(t.weight, "weight", {k, m});
  if (t.bias) layer.bias = overwritten(*t.bias, "bias", {k});
  require_rule(rule);
  if (with_buffers) {
    require(t.weight_buffer.has_value(),
            "weight_buffer: expected a tensor where momentum is not 0");
    layer.weight_buffer = overwritten(*t.weight_buffer, "weight_buffer", {k, m});
  }
  if (with_buffers && t.bias) {
    require(t.bias_buffer.has_value(), "bias_buffer: expected a tensor where momentum is not 0");
    layer.bias_buffer = overwritten(*t.bias_buffer, "bias_buffer", {k});
  }
  Tensor packed = checked_target<Backend>(t.target, loss, b, k, *t.like, t.like_name);
  require_own_memory(written, read);
  layer.loss = static_cast<Loss>(loss);
  layer.target = packed.const_data_ptr();
  layer.rule = rule;
  layer.is_first_step = is_first_step;
  return packed;
}

// h [n, m] beside a weight [k, m]: float32 or float64 as the weight, or bfloat16 beside float32.
inline void require_features(const Tensor& h, const Tensor& weight, Dtype* dtype, Dtype* h_dtype) {
  require(weight.dim() == 2, "weight: expected 2 dimensions, got ", weight.dim());
  require(weight.size(0) > 0, "weight: expected at least one output, got ", shape_of(weight));
  *dtype = dtype_of(weight, "weight");
  require(*dtype == Dtype::kFloat32 || *dtype == Dtype::kFloat64,
          "weight: expected float32 or float64, got ",
          torch::headeronly::toString(weight.scalar_type()));
  require(h.dim() == 2, "h: expected 2 dimensions, got ", h.dim());
  require(h.size(1) == weight.size(1), "h: expected ", weight.size(1), " features, got ",
          shape_of(h));
  *h_dtype = dtype_of(h, "h");
  require(*h_dtype == *dtype || (*h_dtype == Dtype::kBFloat16 && *dtype == Dtype::kFloat32),
          "h: expected the dtype of weight, or bfloat16 beside float32, got ",
          torch::headeronly::toString(h.scalar_type()));
  require(h.device() == weight.device(), "h: expected the device of weight");
}

// Rows may lie anywhere, their elements side by side.
inline Tensor with_packed_rows(const Tensor& h) {
  const bool rows = (h.size(1) <= 1 || h.stride(1) == 1) && h.stride(0) >= 0;
  return rows ? h : torch::stable::contiguous(h);
}

}  // namespace twophase
