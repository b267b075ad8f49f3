// last_layer_step_ in three kernels, deterministic (no float atomics):
//   partial   logits of a tile of rows and outputs over one slice of features
//   loss      slices added in a fixed order, loss of every row, d loss / d logits
//   update    gradient of a tile of outputs over kBlock features, in registers, then SGD
#pragma once

#include "../../math/loss.h"
#include "reduce.h"
#include "sgd.h"

namespace twophase {

constexpr int kStepRows = 64;  // rows of h in a tile
constexpr int kStepOutputsPerWarp = 3;
constexpr int kStepOutputs = 4 * kStepOutputsPerWarp;  // 12: the usual 10 classes in one tile
constexpr int64_t kStepSlice = 128;                    // least features of a slice
constexpr int64_t kStepBlocks = 4096;  // more slices than give so many blocks only cost memory

template <class T>
constexpr int kStepWidth = 256 / sizeof(T);  // features of a tile in shared memory

template <class T>
struct PartialShared {
  // + a pack: rows start in different banks, and stay 16-byte aligned
  alignas(16) T h[kStepRows][kStepWidth<T> + Pack<T>::kSize];
  alignas(16) T weight[kStepOutputs][kStepWidth<T> + Pack<T>::kSize];
};

struct StepShape {
  int64_t b, k, m;   // rows, outputs, features
  int64_t h_stride;  // of rows

  TP_MEMBER int64_t row_tiles() const { return ceil_div(b, kStepRows); }
  TP_MEMBER int64_t output_tiles() const { return ceil_div(k, kStepOutputs); }
  // Features of a slice: a function of the shape alone, so that sums have one order everywhere.
  TP_MEMBER int64_t slice() const {
    return kStepSlice *
           ceil_div(ceil_div(m, kStepSlice) * row_tiles() * output_tiles(), kStepBlocks);
  }
  TP_MEMBER int64_t slices() const { return m == 0 ? 0 : ceil_div(m, slice()); }
  TP_MEMBER int64_t partial_blocks() const { return slices() * row_tiles() * output_tiles(); }
  // One at least, for the bias.
  TP_MEMBER int64_t feature_tiles() const { return m == 0 ? 1 : ceil_div(m, kBlock); }
  TP_MEMBER int64_t update_blocks() const { return feature_tiles() * output_tiles(); }
};

// rows x width values from a matrix whose rows are `stride` apart, zeros outside [limit_row, limit]
template <int kLines, class T, class Ctx, int kPadded>
TP_BODY void load_tile(const Ctx& ctx, T (&tile)[kLines][kPadded], const T* matrix, int64_t stride,
                       int64_t lines, int64_t first, int64_t limit) {
  constexpr int kWidth = kStepWidth<T>;
  constexpr int kLinesAtOnce = kBlock / kWidth;
  const int f = ctx.thread() % kWidth;
  const bool inside = first + f < limit;
  TP_UNROLL
  for (int line = ctx.thread() / kWidth; line < kLines; line += kLinesAtOnce)
    tile[line][f] = inside && line < lines ? matrix[line * stride + first + f] : T(0);
}

// partial: [slices, b, k]
template <class T, class Ctx>
TP_BODY void partial_logits_body(const Ctx& ctx, PartialShared<T>& shared, const T* h,
                                 const T* weight, T* partial, const StepShape& shape) {
  constexpr int kRowsPerThread = kStepRows / kWarp;
  const int lane = ctx.thread() % kWarp, warp = ctx.thread() / kWarp;
  const int64_t slices = shape.slices(), width = shape.slice();
  for (int64_t id = ctx.block(); id < shape.partial_blocks(); id += ctx.blocks()) {
    const int64_t slice = id % slices, tile = id / slices;
    const int64_t row = tile % shape.row_tiles() * kStepRows;
    const int64_t output = tile / shape.row_tiles() * kStepOutputs;
    const int64_t end = smaller((slice + 1) * width, shape.m);
    T sum[kRowsPerThread][kStepOutputsPerWarp] = {};
    for (int64_t f = slice * width; f < end; f += kStepWidth<T>) {
      ctx.sync();  // the last tile has been read
      load_tile(ctx, shared.h, h + row * shape.h_stride, shape.h_stride, shape.b - row, f, end);
      load_tile(ctx, shared.weight, weight + output * shape.m, shape.m, shape.k - output, f, end);
      ctx.sync();
      TP_UNROLL
      for (int c = 0; c < kStepWidth<T> / Pack<T>::kSize; ++c) {
        Pack<T> x[kRowsPerThread], w[kStepOutputsPerWarp];
        TP_UNROLL
        for (int r = 0; r < kRowsPerThread; ++r) x[r] = packs(shared.h[lane + r * kWarp])[c];
        TP_UNROLL
        for (int o = 0; o < kStepOutputsPerWarp; ++o)
          w[o] = packs(shared.weight[warp * kStepOutputsPerWarp + o])[c];
        TP_UNROLL
        for (int e = 0; e < Pack<T>::kSize; ++e) TP_UNROLL
        for (int r = 0; r < kRowsPerThread; ++r) TP_UNROLL
        for (int o = 0; o < kStepOutputsPerWarp; ++o)
          sum[r][o] = fused(x[r].v[e], w[o].v[e], sum[r][o]);
      }
    }
    TP_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) TP_UNROLL
    for (int o = 0; o < kStepOutputsPerWarp; ++o) {
      const int64_t i = row + lane + r * kWarp, j = output + warp * kStepOutputsPerWarp + o;
      if (i < shape.b && j < shape.k) partial[(slice * shape.b + i) * shape.k + j] = sum[r][o];
    }
  }
}

template <int kThreads>
struct LossShared {
  double parts[kThreads];
  double sums[kThreads / kWarp];
};

// What the loss compares the logits with: labels for cross-entropy, values [., k] otherwise. Row r
// has those of sample r, or of sample index[r].
template <class T>
struct StepTarget {
  const int64_t* labels;
  const T* values;
  const int64_t* index;
};

// One block per row: logits [b, k] (scratch), delta [b, k] = d mean loss / d logits, row_loss [b].
// A label out of range makes its row's loss and delta NaN.
template <int kThreads, class T, class Ctx>
TP_BODY void loss_body(const Ctx& ctx, LossShared<kThreads>& shared, const T* partial,
                       const T* bias, const StepTarget<T>& target, double* logits, T* delta,
                       double* row_loss, const StepShape& shape, int64_t slices) {
  const int64_t k = shape.k;
  // Few outputs: several threads share one, each with every groups-th slice.
  const int lanes = static_cast<int>(smaller(k, kThreads)), groups = kThreads / lanes;
  const int group = ctx.thread() / lanes;
  const double scale = mean_scale(shape.b);
  for (int64_t row = ctx.block(); row < shape.b; row += ctx.blocks()) {
    const int64_t sample = target.index ? target.index[row] : row;
    double* z = logits + row * k;
    T* d = delta + row * k;
    for (int64_t first = 0; first < k; first += lanes) {
      const int64_t output = first + ctx.thread() % lanes;
      double sum = 0;
      if (group < groups && output < k)
        for (int64_t slice = group; slice < slices; slice += groups)
          sum += static_cast<double>(partial[(slice * shape.b + row) * k + output]);
      shared.parts[ctx.thread()] = sum;
      ctx.sync();
      if (group == 0 && output < k) {
        for (int g = 1; g < groups; ++g) sum += shared.parts[g * lanes + ctx.thread()];
        z[output] = sum + (bias ? static_cast<double>(bias[output]) : 0.0);
      }
      ctx.sync();
    }
    double max = z[0], sum = 0;
    if (target.labels) {
      for (int64_t o = ctx.thread(); o < k; o += kThreads) max = z[o] > max ? z[o] : max;
      // A NaN may be passed over: it comes back in the sum.
      max = block_reduce(ctx, shared.sums, max, [](double a, double b) { return a > b ? a : b; });
    }
    for (int64_t o = ctx.thread(); o < k; o += kThreads) {
      const double error =
          target.labels ? 0.0 : z[o] - static_cast<double>(target.values[sample * k + o]);
      sum += target.labels ? exp(z[o] - max) : error * error;
    }
    sum = block_sum(ctx, shared.sums, sum);
    const int64_t label = target.labels ? target.labels[sample] : 0;
    const double valid = label >= 0 && label < k ? 1.0 : __builtin_nan("");
    for (int64_t o = ctx.thread(); o < k; o += kThreads)
      d[o] = static_cast<T>(
          valid * (target.labels
                       ? cross_entropy_delta(exp(z[o] - max), sum, o == label, scale)
                       : squared_error_delta(
                             z[o], static_cast<double>(target.values[sample * k + o]), scale)));
    if (ctx.thread() == 0)
      row_loss[row] = target.labels
                          ? valid * cross_entropy(z[label >= 0 && label < k ? label : 0], max, sum)
                          : sum;
  }
}

// The mean loss of b rows, for one block; every thread gets it.
template <class Ctx, int kCount>
TP_BODY double mean_of_rows(const Ctx& ctx, double (&slots)[kCount], const double* row_loss,
                            int64_t b) {
  double sum = 0;
  for (int64_t row = ctx.thread(); row < b; row += ctx.threads()) sum += row_loss[row];
  return mean_loss(block_sum(ctx, slots, sum), b);
}

template <class T>
struct UpdateShared {
  alignas(16) T delta[kStepRows][kStepOutputs];
  double sums[kWarps];
};

template <class T>
struct StepState {
  T* weight;  // [k, m]
  T* bias;    // [k], or null
  T* weight_buffer;
  T* bias_buffer;
  bool is_first_step;
  SgdScalars<T> scalars;
};

// Gradient, SGD, and (first block) the loss; delta: [b, k]
template <class T, class Loss, class Ctx>
TP_BODY void update_body(const Ctx& ctx, UpdateShared<T>& shared, const T* h, const T* delta,
                         const double* row_loss, Loss* loss, const StepState<T>& state,
                         const StepShape& shape) {
  constexpr int kRowsInFlight = 8;
  if (ctx.block() == 0) {
    const double mean = mean_of_rows(ctx, shared.sums, row_loss, shape.b);
    if (ctx.thread() == 0) *loss = static_cast<Loss>(mean);
  }
  const int64_t feature_tiles = shape.feature_tiles();
  for (int64_t id = ctx.block(); id < shape.update_blocks(); id += ctx.blocks()) {
    const int64_t f = id % feature_tiles * kBlock + ctx.thread();
    const int64_t output = id / feature_tiles * kStepOutputs;
    const bool has_bias = state.bias && id % feature_tiles == 0;
    T gradient[kStepOutputs] = {};
    T bias_gradient = 0;
    for (int64_t row = 0; row < shape.b; row += kStepRows) {
      const int rows = static_cast<int>(smaller(kStepRows, shape.b - row));
      ctx.sync();  // the last tile has been read
      for (int e = ctx.thread(); e < kStepRows * kStepOutputs; e += kBlock) {
        const int r = e / kStepOutputs, o = e % kStepOutputs;
        shared.delta[r][o] =
            r < rows && output + o < shape.k ? delta[(row + r) * shape.k + output + o] : T(0);
      }
      ctx.sync();
      if (f < shape.m)
        for (int r = 0; r < rows; r += kRowsInFlight) {
          T x[kRowsInFlight];
          TP_UNROLL
          for (int u = 0; u < kRowsInFlight; ++u)
            x[u] = r + u < rows ? h[(row + r + u) * shape.h_stride + f] : T(0);
          TP_UNROLL
          for (int u = 0; u < kRowsInFlight; ++u) TP_UNROLL
          for (int o = 0; o < kStepOutputs; ++o)
            gradient[o] = fused(shared.delta[r + u][o], x[u], gradient[o]);
        }
      if (has_bias && ctx.thread() < kStepOutputs)
        for (int r = 0; r < rows; ++r) bias_gradient += shared.delta[r][ctx.thread()];
    }
    if (f < shape.m) TP_UNROLL
    for (int o = 0; o < kStepOutputs; ++o)
      if (output + o < shape.k) {
        const int64_t at = (output + o) * shape.m + f;
        sgd_element(state.weight + at, gradient[o],
                    state.weight_buffer ? state.weight_buffer + at : nullptr, state.is_first_step,
                    state.scalars);
      }
    const int64_t at = output + ctx.thread();
    if (has_bias && ctx.thread() < kStepOutputs && at < shape.k)
      sgd_element(state.bias + at, bias_gradient,
                  state.bias_buffer ? state.bias_buffer + at : nullptr, state.is_first_step,
                  state.scalars);
  }
}

}  // namespace twophase
