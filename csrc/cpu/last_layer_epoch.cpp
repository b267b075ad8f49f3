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

template <class T>
void epoch(const LastLayerEpoch& e) {
  Passes<T> passes(e.largest, e.k, e.m, e.h_dtype);
  const int64_t row_bytes = e.m * size_of(e.h_dtype), stride = e.h_stride * size_of(e.h_dtype);
  const int threads = team_size(passes.slices.count);
  std::vector<const void*> pointers(threads * e.largest);
  std::vector<double> scratch(threads * apart(e.k));
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
      const SgdRule rule = e.rule_of(s);
      const bool first_step = e.is_first_step && s == 0;
      passes.update(rows, b, e.weight, e.weight_buffer, first_step, rule, slices.begin, slices.end);
      if (thread > 0) continue;
      e.losses[s] = passes.mean_loss(b);
      if (e.bias) passes.update_bias(b, e.bias, e.bias_buffer, first_step, rule);
    }
  });
}

struct Cpu : CpuLabels {
  static void epoch(const Tensor&, const LastLayerEpoch& e) {
    e.dtype == Dtype::kFloat64 ? twophase::epoch<double>(e) : twophase::epoch<float>(e);
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("last_layer_epoch_", TORCH_BOX(&twophase::last_layer_epoch_op<twophase::Cpu>));
}
