// Checks shared by the operators that update a list of tensors.
#pragma once

#include <vector>

#include "overlap.h"

namespace twophase {

inline void require_count(size_t got, const char* name, size_t expected) {
  require(got == expected, name, ": expected ", expected, " entries, one a tensor, got ", got);
}

// float32 or float64: an update that is small beside a 16-bit weight would round away.
inline Dtype full_precision_dtype(const Tensor& t, const Name& name) {
  const Dtype dtype = dtype_of(t, name);
  require(dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64, name,
          ": expected float32 or float64 (keep master weights in float32), got ",
          torch::headeronly::toString(t.scalar_type()));
  return dtype;
}

inline void require_same_device(const Tensor& t, const Name& name, const Tensor& first) {
  require(t.device() == first.device(), name, ": expected the device of the first tensor");
}

}  // namespace twophase
