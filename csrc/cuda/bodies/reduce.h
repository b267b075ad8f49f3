// Reductions over a block, in one fixed order: the same bits on every run.
#pragma once

#include "context.h"

namespace twophase {

constexpr int kWarps = kBlock / kWarp;

// slots: one for each warp of the block. combine(a, b) must give the same for (b, a): shuffles pair
// lanes from both sides. Every thread gets the result. `slots` may be reused at once.
template <class Ctx, class T, class Combine, int kCount>
TP_BODY T block_reduce(const Ctx& ctx, T (&slots)[kCount], T x, const Combine& combine) {
  TP_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = combine(x, ctx.shuffle_xor(x, mask));
  if (ctx.thread() % kWarp == 0) slots[ctx.thread() / kWarp] = x;
  ctx.sync();
  T total = slots[0];
  TP_UNROLL
  for (int w = 1; w < kCount; ++w) total = combine(total, slots[w]);
  ctx.sync();
  return total;
}

template <class Ctx, class T, int kCount>
TP_BODY T block_sum(const Ctx& ctx, T (&slots)[kCount], T x) {
  return block_reduce(ctx, slots, x, [](T a, T b) { return a + b; });
}

}  // namespace twophase
