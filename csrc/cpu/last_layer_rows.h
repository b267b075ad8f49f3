// last_layer_logits and last_layer_update_ are a step of the last layer in two calls, for a caller
// that holds some of the features (columns of h and of the weight) and adds the logits of all of
// them up in between.
#pragma once

#include <vector>

#include "../last_layer.h"

namespace twophase {

// The rows of h that a step takes, and its sizes.
struct Rows {
  Dtype dtype, h_dtype;
  int64_t b, k, m;
  Tensor h;  // keeps the rows alive
  std::vector<const void*> pointers;

  Rows(const Tensor& h_, const Tensor& index, const Tensor& weight)
      : h((require_features(h_, weight, &dtype, &h_dtype), with_packed_rows(h_))) {
    require(index.scalar_type() == ScalarType::Long && index.is_cpu() && index.dim() == 1 &&
                index.is_contiguous() && index.size(0) > 0,
            "index: expected contiguous int64 indices [b] on the CPU, at least one");
    b = index.size(0), k = weight.size(0), m = weight.size(1);
    const auto* i = static_cast<const int64_t*>(index.const_data_ptr());
    const int64_t bytes = h.stride(0) * size_of(h_dtype);
    for (int64_t r = 0; r < b; ++r) {
      require(i[r] >= 0 && i[r] < h.size(0), "index: expected indices from 0 to ", h.size(0) - 1,
              ", got ", i[r], " at ", r);
      pointers.push_back(static_cast<const char*>(h.const_data_ptr()) + i[r] * bytes);
    }
  }
};

}  // namespace twophase
