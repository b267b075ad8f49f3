// Pooling windows over memory in five dimensions, the last one contiguous: a dimension that is not
// pooled over (images, channels) has windows of one number. Output o of a dimension reads the
// numbers o * stride - padding + t * dilation, t < kernel, those that are there.
#pragma once

#include <cstdint>

#include "macros.h"

namespace twophase {

constexpr int kWindowDims = 5;

struct Windows {
  int64_t in[kWindowDims], out[kWindowDims];
  int64_t kernel[kWindowDims], stride[kWindowDims], padding[kWindowDims], dilation[kWindowDims];
};

TP_HD int64_t product(const int64_t (&x)[kWindowDims]) {
  int64_t result = 1;
  for (int d = 0; d < kWindowDims; ++d) result *= x[d];
  return result;
}

}  // namespace twophase
