// Runs the threaded CPU code under ThreadSanitizer, without Python and without torch's library:
// torch's parallel_for is std::thread here, which the sanitizer sees into.
// Usage: run_cpu; one line for each part; exit code 1 where a check failed.
//
// EPOCH and GRADIENT are csrc/cpu/last_layer_{epoch,gradient}.cpp, or copies whose barriers ask
// `skipped` first.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#undef STABLE_TORCH_LIBRARY_IMPL
#define TP_JOINED(a, b) a##b
#define TP_NUMBERED(name, number) TP_JOINED(name, number)
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) \
  template <class Library>                         \
  [[maybe_unused]] void TP_NUMBERED(registration, __COUNTER__)(Library & m)

namespace {
std::atomic<int> threads_of_torch{1};
}

// As at::parallel_for: equal parts, the last one shorter.
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc f,
                                  void* context) {
  const int64_t n = end - begin;
  if (n <= 0) return AOTI_TORCH_SUCCESS;
  const int64_t most = std::max<int64_t>(1, (n + grain - 1) / std::max<int64_t>(1, grain));
  const int64_t threads = std::min<int64_t>(threads_of_torch, most);
  const int64_t part = (n + threads - 1) / threads;
  std::vector<std::thread> running;
  for (int64_t first = begin + part; first < end; first += part)
    running.emplace_back([=] { f(first, std::min(first + part, end), context); });
  f(begin, std::min(begin + part, end), context);
  for (std::thread& one : running) one.join();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_get_num_threads(uint32_t* threads) {
  *threads = static_cast<uint32_t>(threads_of_torch.load());
  return AOTI_TORCH_SUCCESS;
}

// Whether the barrier of this number, from the top of the first file, is left out.
[[maybe_unused]] static bool skipped(int barrier) {
  static const char* skip = std::getenv("TP_SKIP_BARRIER");
  return skip && *skip && std::atoi(skip) == barrier;
}

#include EPOCH
#include GRADIENT
#include "../../csrc/cpu/kernels/perturb.h"
#include "../../csrc/cpu/multi_tensor.h"
#include "check.h"

namespace twophase {

// Every number of threads gives the bits of one, and those are the plain loops' numbers.
template <class T>
void check_epoch(Checks& checks) {
  constexpr int64_t n = 23, k = 5, m = 1300, steps = 4;
  const auto weight0 = uniform_vector<T>(k * m), bias0 = uniform_vector<T>(k);
  const auto h = uniform_vector<T>(n * m);
  std::vector<int64_t> label(n), order(n), bounds{0, 7, 13, 20, n};
  for (int64_t i = 0; i < n; ++i) label[i] = i % k, order[i] = (7 * i) % n;
  const std::vector<double> lr(steps, 0.01);
  std::vector<T> one, gradient_one;
  for (const int threads : {1, 2, 4}) {
    threads_of_torch = threads;
    std::vector<T> weight = weight0, bias = bias0, weight_buffer(k * m), bias_buffer(k);
    std::vector<double> losses(steps);
    LastLayerEpoch e{};
    e.dtype = e.h_dtype = sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
    e.n = n, e.k = k, e.m = m, e.steps = steps, e.largest = 7;
    e.weight = weight.data(), e.bias = bias.data();
    e.weight_buffer = weight_buffer.data(), e.bias_buffer = bias_buffer.data();
    e.h = h.data(), e.h_stride = m, e.loss = Loss::kCrossEntropy, e.target = label.data();
    e.order = order.data(), e.bounds = bounds.data(), e.lr = lr.data();
    e.rule = {0, 0.9, 0, 0.01, false, false}, e.is_first_step = true, e.losses = losses.data();
    epoch<T>(e);
    std::vector<T> result = weight, by_weight(k * m), by_bias(k);
    result.insert(result.end(), bias.begin(), bias.end());
    for (double loss : losses) result.push_back(static_cast<T>(loss));
    double mean = 0;
    gradient_of<T>(weight0.data(), bias0.data(), h.data(), m, e.h_dtype, n, k, m,
                   Loss::kCrossEntropy, label.data(), &mean, by_weight.data(), by_bias.data());
    by_weight.push_back(static_cast<T>(mean));
    if (threads == 1) {
      one = result, gradient_one = by_weight;
      std::vector<double> expected(k * m), bound(k * m + 1, 1e-3);
      double loss = 0;
      for (int64_t i = 0; i < n; ++i) {
        double z[k], sum = 0;
        for (int64_t j = 0; j < k; ++j) {
          z[j] = bias0[j];
          for (int64_t c = 0; c < m; ++c)
            z[j] += static_cast<double>(weight0[j * m + c]) * static_cast<double>(h[i * m + c]);
        }
        const double top = *std::max_element(z, z + k);
        for (int64_t j = 0; j < k; ++j) sum += std::exp(z[j] - top);
        loss += (std::log(sum) + top - z[label[i]]) / n;
        for (int64_t j = 0; j < k; ++j) {
          const double delta = (std::exp(z[j] - top) / sum - (j == label[i])) / n;
          for (int64_t c = 0; c < m; ++c)
            expected[j * m + c] += delta * static_cast<double>(h[i * m + c]);
        }
      }
      expected.push_back(loss);
      checks.close(by_weight, expected, bound, "gradient and loss");
    }
    checks.same_bits(result, one, "epoch, by the number of threads");
    checks.same_bits(by_weight, gradient_one, "gradient, by the number of threads");
  }
}

// Many tensors in one parallel region.
inline void check_targets(Checks& checks) {
  struct Target {
    float* p;
    int64_t n;
  };
  std::vector<std::vector<float>> one;
  for (const int threads : {1, 2, 4}) {
    threads_of_torch = threads;
    std::vector<std::vector<float>> values;
    for (const int64_t n : {1, 63, 20000, 5, 40000}) values.emplace_back(n, 1.0f);
    std::vector<Target> targets;
    for (auto& v : values) targets.push_back({v.data(), std::ssize(v)});
    parallel_targets(targets, [&](size_t i, int64_t begin, int64_t end) {
      TP_DISPATCH(perturb)
      (Dtype::kFloat32, targets[i].p + begin, begin, end - begin, 17 + i, 0.5f);
    });
    if (threads == 1) one = values;
    for (size_t i = 0; i < values.size(); ++i)
      checks.same_bits(values[i], one[i], "perturb, by the number of threads");
  }
}

}  // namespace twophase

int main() {
  using namespace twophase;
  Checks epochs, targets;
  check_epoch<float>(epochs);
  check_epoch<double>(epochs);
  check_targets(targets);
  std::printf("last_layer_epoch: %d checks, %d failed\n", epochs.done, epochs.failed);
  std::printf("multi_tensor: %d checks, %d failed\n", targets.done, targets.failed);
  return epochs.failed + targets.failed > 0;
}
