// Argument checks and tensor helpers shared by the CPU and CUDA entry points.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "math/dtype.h"

namespace twophase {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// std::invalid_argument becomes ValueError in Python.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) refuse(parts...);
}

// Parts of a message that become text where there is one: an operator has hundreds of checks.
// The name of an argument, or of one tensor of a list:
struct Name {
  const char* text;
  int64_t index;
  Name(const char* argument, int64_t i = -1) : text(argument), index(i) {}
};
inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.text;
  return name.index < 0 ? out : out << '[' << name.index << ']';
}
// A shape:
struct ShapeOf {
  const Tensor& t;
};
inline std::ostream& operator<<(std::ostream& out, const ShapeOf& shape) {
  out << '[';
  for (int64_t i = 0; i < shape.t.dim(); ++i) out << (i ? ", " : "") << shape.t.size(i);
  return out << ']';
}
inline ShapeOf shape_of(const Tensor& t) { return {t}; }

inline Dtype dtype_of(const Tensor& t, const Name& name) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      refuse(name, ": expected a floating-point tensor, got ",
             torch::headeronly::toString(t.scalar_type()));
  }
}

inline void require_same_shape(const Tensor& a, const Name& a_name, const Tensor& b,
                               const Name& b_name) {
  require(a.sizes() == b.sizes(), a_name, ": expected the shape of ", b_name, " ", shape_of(b),
          ", got ", shape_of(a));
}

// Element k of a's memory is element k of b's: strides agree wherever they matter.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), strides = a.strides(), others = b.strides();
  if (sizes != b.sizes()) return false;
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] > 1 && strides[i] != others[i]) return false;
  return true;
}

// The elements fill their memory without gaps, in any order of dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Every element has its own memory, so that an update can be written back.
inline void require_no_overlap(const Tensor& t, const Name& name) {
  if (t.is_contiguous() || t.numel() == 0) return;
  for (int64_t d = 0; d < t.dim(); ++d)
    require(t.size(d) < 2 || t.stride(d) != 0, name,
            ": expected a tensor whose elements do not share memory, got stride 0 in dimension ",
            d);
}

// t itself where its memory is laid out as `like`'s, otherwise a copy that is.
inline Tensor in_layout_of(const Tensor& t, const Tensor& like) {
  if (same_layout(t, like) && t.scalar_type() == like.scalar_type()) return t;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace twophase
