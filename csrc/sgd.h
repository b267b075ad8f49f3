// Checks and memory layout of sgd_, for any backend that provides
//   sgd(like, targets, rule)
// over flat memory; `like` names the device. The update itself is math/sgd.h.
#pragma once

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

template <class Backend>
void sgd_op(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> buffers,
            std::vector<int64_t> nu, std::vector<int64_t> is_first_step, double lr, double momentum,
            double dampening, double weight_decay, bool nesterov, bool maximize) {
  const bool with_buffers = momentum != 0;
  require_count(grads.size(), "grads", params.size());
  require_count(buffers.size(), "buffers", with_buffers ? params.size() : 0);
  require_count(nu.size(), "nu", params.size());
  require_count(is_first_step.size(), "is_first_step", params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const std::string name = item("params", i);
    full_precision_dtype(params[i], name);
    require_same_device(params[i], name, params[0]);
    require_no_overlap(params[i], name);
    require(nu[i] == 0 || nu[i] == 1, item("nu", i), ": expected 0 or 1, got ", nu[i]);
    const auto require_like_param = [&](const Tensor& t, const std::string& t_name) {
      require_same_shape(t, t_name.c_str(), params[i], name.c_str());
      require_same_device(t, t_name, params[0]);
      require(t.scalar_type() == params[i].scalar_type(), t_name, ": expected the dtype of ", name,
              ", got ", torch::headeronly::toString(t.scalar_type()));
    };
    require_like_param(grads[i], item("grads", i));
    if (with_buffers) {
      require_like_param(buffers[i], item("buffers", i));
      require_no_overlap(buffers[i], item("buffers", i));
    }
  }
  std::vector<Argument> written, read;
  for (size_t i = 0; i < params.size(); ++i) {
    if (nu[i] == 0) continue;
    written.push_back({&params[i], item("params", i)});
    if (with_buffers) written.push_back({&buffers[i], item("buffers", i)});
    read.push_back({&grads[i], item("grads", i)});
  }
  require_own_memory(written, read);
  std::vector<SgdTarget> targets;
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
  Backend::sgd(params[0], targets,
               SgdRule{lr, momentum, dampening, weight_decay, nesterov, maximize});
  for (auto& [tensor, copy] : write_back) torch::stable::copy_(tensor, copy);
}

}  // namespace twophase
