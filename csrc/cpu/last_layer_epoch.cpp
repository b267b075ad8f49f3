#include "../last_layer_epoch.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "last_layer_passes.h"
#include "team.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace twophase {
namespace {

// Tells the system that these bytes of a file will be read.
void will_need([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);
#endif
}

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

int team_size(int64_t most) {
  return static_cast<int>(std::clamp<int64_t>(most, 1, torch::stable::get_num_threads()));
}

// Part `thread` of `threads` of [0, n).
struct Share {
  int64_t begin, end;
  Share(int64_t n, int thread, int threads)
      : begin(n * thread / threads), end(n * (thread + 1) / threads) {}
};

// Numbers of a thread's scratch of k: threads must not write to one cache line.
int64_t apart(int64_t k) { return (k + 15) / 16 * 16 + 16; }

template <class T>
void epoch(const LastLayerEpoch& e) {
  Passes<T> passes(e.largest, e.k, e.m, e.h_dtype);
  const int64_t row_bytes = e.m * size_of(e.h_dtype), stride = e.h_stride * size_of(e.h_dtype);
  const int threads = team_size(passes.slices.count);
  std::vector<const void*> pointers(threads * e.largest);
  std::vector<double> scratch(threads * apart(e.k));
  std::vector<T> gradient(e.k);
  const auto row = [&](int64_t i) { return static_cast<const char*>(e.h) + e.order[i] * stride; };
  // Two barriers a step. Thread 0 alone updates the bias, before it joins the next step's first.
  Team::run(threads, [&](int thread, Team& team) {
    const Share slices(passes.slices.count, thread, team.size());
    const void** rows = pointers.data() + thread * e.largest;
    for (int64_t s = 0; s < e.steps; ++s) {
      const int64_t first = e.bounds[s], b = e.bounds[s + 1] - first;
      for (int64_t r = 0; r < b; ++r) rows[r] = row(first + r);
      if (e.mapped && thread == 0 && s + 1 < e.steps)
        for (int64_t i = e.bounds[s + 1]; i < e.bounds[s + 2]; ++i) will_need(row(i), row_bytes);
      passes.logits(rows, b, e.weight, slices.begin, slices.end);
      team.barrier();
      const Share mine(b, thread, team.size());
      passes.losses(mine.begin, mine.end, b, e.bias, e.loss, e.target, e.order + first,
                    mean_scale(b), scratch.data() + thread * apart(e.k));
      team.barrier();
      const Rule rule{e.fresh && s == 0, e.lr[s],        e.momentum,
                      e.dampening,       e.weight_decay, e.nesterov};
      passes.update(rows, b, e.weight, e.weight_buffer, rule, slices.begin, slices.end);
      if (thread > 0) continue;
      e.losses[s] = passes.mean_loss(b);
      if (e.bias) passes.update_bias(b, e.bias, e.bias_buffer, rule, gradient.data());
    }
  });
}

struct Cpu {
  static std::pair<int64_t, int64_t> bad_label(const Tensor& labels, int64_t b, int64_t k) {
    return first_bad_label(static_cast<const int64_t*>(labels.const_data_ptr()), b, k);
  }
  static void epoch(const Tensor&, const LastLayerEpoch& e) {
    e.dtype == Dtype::kFloat64 ? twophase::epoch<double>(e) : twophase::epoch<float>(e);
  }
};

constexpr int64_t kBlock = 64;  // rows whose second pass finds them in the cache

template <class T>
void gradient_of(const void* weight, const void* bias, const void* h, int64_t h_stride,
                 Dtype h_dtype, int64_t n, int64_t k, int64_t m, Loss loss, const void* target,
                 double* mean, void* by_weight, void* by_bias) {
  const int64_t blocks = (n + kBlock - 1) / kBlock, stride = h_stride * size_of(h_dtype);
  Passes<T> passes(std::min(n, kBlock), k, m, h_dtype);
  const int threads = team_size(passes.slices.count);
  std::vector<const void*> pointers(threads * kBlock);
  std::vector<double> scratch(threads * apart(k)), losses(blocks), bias_sums(k);
  const double scale = mean_scale(n);
  Team::run(threads, [&](int thread, Team& team) {
    const Share slices(passes.slices.count, thread, team.size());
    const void** rows = pointers.data() + thread * kBlock;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = i * kBlock, b = std::min(kBlock, n - first);
      for (int64_t r = 0; r < b; ++r) rows[r] = static_cast<const char*>(h) + (first + r) * stride;
      passes.logits(rows, b, weight, slices.begin, slices.end);
      team.barrier();
      const Share mine(b, thread, team.size());
      const char* own = static_cast<const char*>(target) +
                        first * (loss == Loss::kCrossEntropy ? 8 : k * sizeof(T));
      passes.losses(mine.begin, mine.end, b, bias, loss, own, nullptr, scale,
                    scratch.data() + thread * apart(k));
      team.barrier();
      passes.add_gradient(rows, b, by_weight, slices.begin, slices.end);
      if (thread > 0) continue;
      losses[i] = passes.loss_sum(b);
      for (int64_t j = 0; j < k; ++j) bias_sums[j] += passes.bias_sum(b, j);
    }
  });
  *mean = mean_loss(pairwise_sum(losses.data(), blocks), n);
  for (int64_t j = 0; j < k; ++j) static_cast<T*>(by_bias)[j] = static_cast<T>(bias_sums[j]);
}

std::tuple<Tensor, Tensor, Tensor> last_layer_gradient_op(Tensor weight, std::optional<Tensor> bias,
                                                          Tensor h, Tensor target, int64_t loss) {
  Dtype dtype, h_dtype;
  require_features(h, weight, &dtype, &h_dtype);
  const int64_t n = h.size(0), k = weight.size(0), m = weight.size(1);
  require(n > 0, "h: expected at least one sample, got ", shape_of(h));
  if (bias) require_updatable(*bias, "bias", {k}, weight, "weight");
  const Tensor packed_target = checked_target<Cpu>(target, loss, n, k, weight, "weight");
  const Tensor packed_weight = torch::stable::contiguous(weight);
  const Tensor h_rows = with_packed_rows(h);
  Tensor mean = torch::stable::new_empty(weight, {}, ScalarType::Double);
  Tensor by_weight = torch::stable::new_zeros(weight, {k, m});
  Tensor by_bias = torch::stable::new_empty(weight, {k});
  const auto run = dtype == Dtype::kFloat64 ? gradient_of<double> : gradient_of<float>;
  run(packed_weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
      h_rows.const_data_ptr(), h_rows.stride(0), h_dtype, n, k, m, static_cast<Loss>(loss),
      packed_target.const_data_ptr(), static_cast<double*>(mean.mutable_data_ptr()),
      by_weight.mutable_data_ptr(), by_bias.mutable_data_ptr());
  return {mean, by_weight, by_bias};
}

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("last_layer_epoch_", TORCH_BOX(&twophase::last_layer_epoch_op<twophase::Cpu>));
  m.impl("last_layer_gradient", TORCH_BOX(&twophase::last_layer_gradient_op));
}
