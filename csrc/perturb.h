// Checks and memory layout of perturb_, for any backend that provides
//   perturb(like, targets)
// over contiguous memory; `like` names the device. The noise itself is math/normal.h.
#pragma once

#include <cmath>
#include <utility>

#include "multi_tensor.h"

namespace twophase {

// p[i] = add_noise(p[i], lane i mod 4 of normal_block(key, i / 4), sigma), 0 <= i < n; n >= 1
struct NoiseTarget {
  Dtype dtype;  // kFloat32 or kFloat64
  void* p;
  int64_t n;
  uint64_t key;
  float sigma;
};

template <class Backend>
void perturb_op(std::vector<Tensor> tensors, std::vector<int64_t> keys, std::vector<double> stds) {
  require_count(keys.size(), "keys", tensors.size());
  require_count(stds.size(), "stds", tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Name name("tensors", i);
    full_precision_dtype(tensors[i], name);
    require_same_device(tensors[i], name, tensors[0]);
    require_no_overlap(tensors[i], name);
    const float sigma = static_cast<float>(stds[i]);
    require(std::isfinite(sigma) && sigma > 0, Name("stds", i),
            ": expected a finite number > 0 in float32, got ", stds[i]);
  }
  std::vector<Argument> written;
  for (size_t i = 0; i < tensors.size(); ++i) written.push_back({&tensors[i], Name("tensors", i)});
  require_own_memory(written);
  std::vector<NoiseTarget> targets;
  std::vector<std::pair<Tensor, Tensor>> write_back;  // (tensor, its contiguous copy)
  for (size_t i = 0; i < tensors.size(); ++i) {
    Tensor t = tensors[i];
    if (t.numel() == 0) continue;
    if (!t.is_contiguous()) {
      write_back.emplace_back(t, torch::stable::contiguous(t));
      t = write_back.back().second;
    }
    targets.push_back({dtype_of(t, "tensors"), t.mutable_data_ptr(), t.numel(),
                       static_cast<uint64_t>(keys[i]), static_cast<float>(stds[i])});
  }
  if (targets.empty()) return;
  Backend::perturb(tensors[0], targets);
  for (auto& [tensor, copy] : write_back) torch::stable::copy_(tensor, copy);
}

}  // namespace twophase
