#pragma once

#include <cstdint>

#include "../isa.h"

namespace twophase {

constexpr int64_t kScreenRows = 84;  // of one call: a multiple of every tile's height

// Called for a pair of csrc/screen_products.h.
using ScreenFound = void (*)(void* sink, int64_t row, int64_t column);

}  // namespace twophase

// csrc/screen_products.h for `count` <= kScreenRows rows [count, depth] against panel_count > 0
// panels; row i is called first + i. scratch [kScreenRows * depth].
TP_KERNEL(void, screen_products,
          (const float* rows, int64_t count, int64_t depth, const float* panels,
           int64_t panel_count, const float* threshold, int64_t first, float* scratch,
           float* largest, int64_t* where, ScreenFound found, void* sink))
