// last_layer_epoch_ in one persistent kernel, deterministic for a given number of blocks: a block
// owns a slice of features, and keeps its part of weight and momentum in shared memory from the
// first step to the last. A step:
//   the batch's rows of the slice, fetched into shared memory: h is read once
//   partial logits of the slice            -- grid barrier
//   loss, a row per block in turn          -- grid barrier
//   gradient of the slice from the same rows, SGD
// What the blocks exchange is [blocks, b, k] partial logits and [b, k] derivatives.
#pragma once

#include "last_layer_step.h"

namespace twophase {

constexpr int kEpochOutputs = 12;  // sums that a thread keeps at once
constexpr int kEpochRows = 64;     // rows of a step at most: two a lane
constexpr int kEpochPack = 4;      // features of one access

template <class H>
struct alignas(kEpochPack * sizeof(H)) FeaturePack {
  H v[kEpochPack];
};

// A step's arguments and the slices' sizes; everything lies on the device.
template <class T, class H>
struct EpochArguments {
  int64_t m, k, steps, rows;  // rows: of the largest step
  int64_t width;              // features of a slice, a multiple of kEpochPack
  T* weight;
  T* bias;           // or null
  T* weight_buffer;  // or null
  T* bias_buffer;
  const H* h;
  int64_t h_stride;
  StepTarget<T> target;  // index: order
  const int64_t* bounds;
  const double* lr;
  bool is_first_step;
  SgdScalars<T> scalars;  // but for the rate
  T* partial;             // [blocks, rows, k]
  double* logits;         // [rows, k]
  T* delta;               // [rows, k]
  double* row_loss;       // [rows]
  double* losses;         // [steps]

  // Of a row in shared memory: an odd number of packs, so that lanes that read the same features
  // of different rows do not meet in a bank.
  TP_MEMBER int64_t pitch() const { return (width / kEpochPack | 1) * kEpochPack; }
  // Outputs rounded up: the last group's sums read zeros.
  TP_MEMBER int64_t outputs() const { return ceil_div(k, kEpochOutputs) * kEpochOutputs; }
  TP_MEMBER int64_t shared_bytes(int warps) const {
    return static_cast<int64_t>(sizeof(T)) *
               ((weight_buffer ? 2 : 1) * outputs() * width + rows * outputs() + warps * rows * k) +
           static_cast<int64_t>(sizeof(H)) * rows * pitch() + 64;
  }
};

template <class T, class H>
struct EpochShared {
  T* weight;  // [outputs, width]
  T* buffer;  // the same, or unused
  T* delta;   // [rows, outputs]
  T* parts;   // [warps, rows, k]
  H* tile;    // [rows, pitch]

  // memory: shared_bytes, aligned to 16 bytes
  TP_MEMBER EpochShared(void* memory, const EpochArguments<T, H>& a, int warps) {
    weight = static_cast<T*>(memory);
    buffer = weight + (a.weight_buffer ? a.outputs() * a.width : 0);
    delta = buffer + a.outputs() * a.width;
    parts = delta + a.rows * a.outputs();
    const uintptr_t end = reinterpret_cast<uintptr_t>(parts + warps * a.rows * a.k);
    tile = reinterpret_cast<H*>((end + 31) / 32 * 32);
  }
};

// The rows of step s, features [begin, begin + width) of them, zeros beyond m.
template <class T, class H, class Ctx>
TP_BODY void fetch_tile(const Ctx& ctx, const EpochShared<T, H>& shared,
                        const EpochArguments<T, H>& a, int64_t s, int64_t begin) {
  const int64_t first = a.bounds[s], b = a.bounds[s + 1] - first;
  const int64_t inside = begin < a.m ? smaller(a.width, a.m - begin) : 0;
  for (int64_t e = ctx.thread(); e < b * a.width; e += ctx.threads()) {
    const int64_t r = e / a.width, f = e % a.width;
    H* to = shared.tile + r * a.pitch() + f;
    if (f < inside)
      ctx.copy_async(to, a.h + a.target.index[first + r] * a.h_stride + begin + f);
    else
      *to = H{};
  }
}

// Asks for the next step's rows: they come from memory while this step computes.
template <class T, class H, class Ctx>
TP_BODY void prefetch_tile(const Ctx& ctx, const EpochArguments<T, H>& a, int64_t s,
                           int64_t begin) {
  constexpr int64_t kLine = 128 / sizeof(H);
  const int64_t first = a.bounds[s], b = a.bounds[s + 1] - first;
  const int64_t inside = begin < a.m ? smaller(a.width, a.m - begin) : 0;
  const int64_t lines = ceil_div(inside, kLine);
  for (int64_t e = ctx.thread(); e < b * lines; e += ctx.threads())
    ctx.prefetch(a.h + a.target.index[first + e / lines] * a.h_stride + begin + e % lines * kLine);
}

// parts[warp]: sums over the warp's packs of features, two rows a lane.
template <class T, class H, class Ctx>
TP_BODY void slice_logits(const Ctx& ctx, const EpochShared<T, H>& shared,
                          const EpochArguments<T, H>& a, int64_t b) {
  const int lane = ctx.thread() % kWarp, warp = ctx.thread() / kWarp;
  const int warps = ctx.threads() / kWarp;
  using Row = FeaturePack<H>;
  using Weights = FeaturePack<T>;
  const H* x = shared.tile + smaller(lane, b - 1) * a.pitch();
  const H* y = shared.tile + smaller(lane + kWarp, b - 1) * a.pitch();
  for (int64_t output = 0; output < a.k; output += kEpochOutputs) {
    T sum[2][kEpochOutputs] = {};
    for (int64_t f = warp * kEpochPack; f < a.width; f += warps * kEpochPack) {
      const Row xs = *reinterpret_cast<const Row*>(x + f);
      const Row ys = *reinterpret_cast<const Row*>(y + f);
      TP_UNROLL
      for (int o = 0; o < kEpochOutputs; ++o) {
        const Weights w =
            *reinterpret_cast<const Weights*>(shared.weight + (output + o) * a.width + f);
        TP_UNROLL
        for (int e = 0; e < kEpochPack; ++e) {
          sum[0][o] = fused(static_cast<T>(load(xs.v[e])), w.v[e], sum[0][o]);
          sum[1][o] = fused(static_cast<T>(load(ys.v[e])), w.v[e], sum[1][o]);
        }
      }
    }
    TP_UNROLL
    for (int i = 0; i < 2; ++i) TP_UNROLL
    for (int o = 0; o < kEpochOutputs; ++o)
      if (lane + i * kWarp < b && output + o < a.k)
        shared.parts[(warp * a.rows + lane + i * kWarp) * a.k + output + o] = sum[i][o];
  }
}

// Gradient of the thread's features, and their update in shared memory.
template <class T, class H, class Ctx>
TP_BODY void slice_update(const Ctx& ctx, const EpochShared<T, H>& shared,
                          const EpochArguments<T, H>& a, int64_t b, bool is_first_step,
                          const SgdScalars<T>& scalars) {
  for (int64_t f = ctx.thread(); f < a.width; f += ctx.threads())
    for (int64_t output = 0; output < a.k; output += kEpochOutputs) {
      T gradient[kEpochOutputs] = {};
      for (int64_t r = 0; r < b; ++r) {
        const T x = static_cast<T>(load(shared.tile[r * a.pitch() + f]));
        const T* delta = shared.delta + r * a.outputs() + output;
        TP_UNROLL
        for (int o = 0; o < kEpochOutputs; ++o) gradient[o] = fused(delta[o], x, gradient[o]);
      }
      TP_UNROLL
      for (int o = 0; o < kEpochOutputs; ++o)
        if (output + o < a.k) {
          const int64_t at = (output + o) * a.width + f;
          sgd_element(shared.weight + at, gradient[o],
                      a.weight_buffer ? shared.buffer + at : nullptr, is_first_step, scalars);
        }
    }
}

// The slice of weight or momentum between global (`outside`, null: zeros) and shared memory. Each
// thread has the features that slice_update gives it.
template <bool kLoad, class T, class H, class Ctx>
TP_BODY void move_slice(const Ctx& ctx, T* inside, T* outside, const EpochArguments<T, H>& a,
                        int64_t begin) {
  for (int64_t f = ctx.thread(); f < a.width; f += ctx.threads())
    for (int64_t o = 0; o < (kLoad ? a.outputs() : a.k); ++o) {
      const bool there = begin + f < a.m && o < a.k;
      if (kLoad)
        inside[o * a.width + f] = there ? outside[o * a.m + begin + f] : T(0);
      else if (there)
        outside[o * a.m + begin + f] = inside[o * a.width + f];
    }
}

// ctx besides: grid_sync(), copy_async, copy_wait(), prefetch.
template <int kThreads, class T, class H, class Ctx>
TP_BODY void epoch_body(const Ctx& ctx, const EpochShared<T, H>& shared,
                        LossShared<kThreads>& loss_shared, const EpochArguments<T, H>& a) {
  constexpr int kCount = kThreads / kWarp;
  const int64_t begin = ctx.block() * a.width;
  move_slice<true>(ctx, shared.weight, a.weight, a, begin);
  if (a.weight_buffer) move_slice<true>(ctx, shared.buffer, a.weight_buffer, a, begin);
  fetch_tile(ctx, shared, a, 0, begin);
  for (int64_t s = 0; s < a.steps; ++s) {
    const int64_t first = a.bounds[s], b = a.bounds[s + 1] - first;
    ctx.copy_wait();
    ctx.sync();
    if (s + 1 < a.steps) prefetch_tile(ctx, a, s + 1, begin);
    slice_logits(ctx, shared, a, b);
    ctx.sync();
    for (int64_t e = ctx.thread(); e < b * a.k; e += kThreads) {
      T sum = shared.parts[e];
      for (int w = 1; w < kCount; ++w) sum += shared.parts[w * a.rows * a.k + e];
      a.partial[ctx.block() * b * a.k + e] = sum;
    }
    ctx.grid_sync();
    const StepTarget<T> target{a.target.labels, a.target.values, a.target.index + first};
    loss_body<kThreads>(ctx, loss_shared, a.partial, a.bias, target, a.logits, a.delta, a.row_loss,
                        StepShape{b, a.k, a.m, 0}, ctx.blocks());
    ctx.grid_sync();
    for (int64_t e = ctx.thread(); e < b * a.outputs(); e += kThreads) {
      const int64_t r = e / a.outputs(), o = e % a.outputs();
      shared.delta[e] = o < a.k ? a.delta[r * a.k + o] : T(0);
    }
    ctx.sync();
    SgdScalars<T> scalars = a.scalars;
    scalars.step = static_cast<T>(-a.lr[s]);
    const bool is_first_step = a.is_first_step && s == 0;
    slice_update(ctx, shared, a, b, is_first_step, scalars);
    if (ctx.block() == 0) {
      const double mean = mean_of_rows(ctx, loss_shared.sums, a.row_loss, b);
      if (ctx.thread() == 0) a.losses[s] = mean;
      for (int64_t o = ctx.thread(); a.bias && o < a.k; o += kThreads) {
        T gradient = 0;
        for (int64_t r = 0; r < b; ++r) gradient += shared.delta[r * a.outputs() + o];
        sgd_element(a.bias + o, gradient, a.bias_buffer ? a.bias_buffer + o : nullptr,
                    is_first_step, scalars);
      }
    }
    ctx.sync();  // tile and derivatives have been read
    if (s + 1 < a.steps) fetch_tile(ctx, shared, a, s + 1, begin);
  }
  move_slice<false>(ctx, shared.weight, a.weight, a, begin);
  if (a.weight_buffer) move_slice<false>(ctx, shared.buffer, a.weight_buffer, a, begin);
}

}  // namespace twophase
