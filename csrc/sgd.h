// Checks and memory layout of sgd_, for any backend that provides
//   sgd(like, targets, rule)
// over flat memory; `like` names the device. The update itself is math/sgd.h.
#pragma once

#include <algorithm>
#include <utility>

#include "math/sgd.h"
#include "multi_tensor.h"

namespace twophase {

struct SgdTarget {
  Dtype dtype;  // kFloat32 or kFloat64
  void* p;
  const void* g;
  void* b;  // the momentum buffer; null without momentum
  int64_t n;
  bool is_first_step;  // b holds nothing yet
};

// What nearly every step is given, looked at once: contiguous tensors of one device, each like its
// parameter, spans of bytes apart, none masked. Fills the targets; false where it is not so, which
// sgd_op then looks into. A small network's step is mostly such questions.
inline bool plain_targets(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                          const std::vector<Tensor>& buffers,
                          const std::vector<int64_t>& is_first_step,
                          std::vector<SgdTarget>& targets) {
  std::vector<std::pair<uintptr_t, uintptr_t>> spans;
  spans.reserve(3 * params.size());
  targets.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const auto sizes = params[i].sizes();
    const auto device = params[0].device();
    const ScalarType type = params[i].scalar_type();
    const bool wide = type == ScalarType::Double;
    if (!(wide || type == ScalarType::Float)) return false;
    const int64_t n = params[i].numel(), bytes = n * (wide ? 8 : 4);
    const auto plain = [&](const Tensor& t) {
      const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
      spans.emplace_back(begin, begin + bytes);
      return t.is_contiguous() && t.scalar_type() == type && t.sizes() == sizes &&
             t.device() == device;
    };
    if (!plain(params[i]) || !plain(grads[i]) || !(buffers.empty() || plain(buffers[i])))
      return false;
    if (n == 0) continue;
    targets.push_back({wide ? Dtype::kFloat64 : Dtype::kFloat32, params[i].mutable_data_ptr(),
                       grads[i].const_data_ptr(),
                       buffers.empty() ? nullptr : buffers[i].mutable_data_ptr(), n,
                       !is_first_step.empty() && is_first_step[i] != 0});
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i)
    if (spans[i].first < spans[i - 1].second) return false;
  return true;
}

template <class Backend>
void sgd_op(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> buffers,
            std::vector<int64_t> nu, std::vector<int64_t> is_first_step, double lr, double momentum,
            double dampening, double weight_decay, bool nesterov, bool maximize) {
  const bool with_buffers = momentum != 0;
  require_count(grads.size(), "grads", params.size());
  require_count(buffers.size(), "buffers", with_buffers ? params.size() : 0);
  if (!nu.empty()) require_count(nu.size(), "nu", params.size());
  if (!is_first_step.empty()) require_count(is_first_step.size(), "is_first_step", params.size());
  const SgdRule rule{lr, momentum, dampening, weight_decay, nesterov, maximize};
  std::vector<SgdTarget> targets;
  const bool masks = std::any_of(nu.begin(), nu.end(), [](int64_t mask) { return mask != 1; });
  if (!masks && plain_targets(params, grads, buffers, is_first_step, targets)) {
    if (!targets.empty()) Backend::sgd(params[0], targets, rule);
    return;
  }
  targets.clear();
  nu.resize(params.size(), 1);
  is_first_step.resize(params.size(), 0);
  for (size_t i = 0; i < params.size(); ++i) {
    const Name name("params", i);
    full_precision_dtype(params[i], name);
    require_same_device(params[i], name, params[0]);
    require_no_overlap(params[i], name);
    require(nu[i] == 0 || nu[i] == 1, Name("nu", i), ": expected 0 or 1, got ", nu[i]);
    const auto require_like_param = [&](const Tensor& t, const Name& t_name) {
      require_same_shape(t, t_name, params[i], name);
      require_same_device(t, t_name, params[0]);
      require(t.scalar_type() == params[i].scalar_type(), t_name, ": expected the dtype of ", name,
              ", got ", torch::headeronly::toString(t.scalar_type()));
    };
    require_like_param(grads[i], Name("grads", i));
    if (with_buffers) {
      require_like_param(buffers[i], Name("buffers", i));
      require_no_overlap(buffers[i], Name("buffers", i));
    }
  }
  std::vector<Argument> written, read;
  for (size_t i = 0; i < params.size(); ++i) {
    if (nu[i] == 0) continue;
    written.push_back({&params[i], Name("params", i)});
    if (with_buffers) written.push_back({&buffers[i], Name("buffers", i)});
    read.push_back({&grads[i], Name("grads", i)});
  }
  require_own_memory(written, read);
  std::vector<Tensor> gradients;                      // kept alive until the update is done
  std::vector<std::pair<Tensor, Tensor>> write_back;  // (tensor, its copy in another layout)
  for (size_t i = 0; i < params.size(); ++i) {
    Tensor p = params[i];
    if (nu[i] == 0 || p.numel() == 0) continue;
    if (!is_dense(p)) {
      p = torch::stable::contiguous(p);
      write_back.emplace_back(params[i], p);
    }
    gradients.push_back(in_layout_of(grads[i], p));
    void* b = nullptr;
    if (with_buffers) {
      Tensor buffer = in_layout_of(buffers[i], p);
      b = buffer.mutable_data_ptr();
      if (!same_layout(buffers[i], p)) write_back.emplace_back(buffers[i], buffer);
    }
    targets.push_back({dtype_of(p, "params"), p.mutable_data_ptr(),
                       gradients.back().const_data_ptr(), b, p.numel(), is_first_step[i] != 0});
  }
  if (targets.empty()) return;
  Backend::sgd(params[0], targets, rule);
  for (auto& [tensor, copy] : write_back) torch::stable::copy_(tensor, copy);
}

}  // namespace twophase
