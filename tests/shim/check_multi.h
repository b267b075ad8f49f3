// The bodies of perturb_ and sgd_: several tensors of uneven sizes, one of them misaligned, one
// longer than a chunk.
#pragma once

#include "../../csrc/cuda/bodies/perturb.h"
#include "../../csrc/cuda/bodies/sgd.h"
#include "check.h"
#include "host_context.h"

namespace twophase {

constexpr int64_t kSizes[] = {1, 3, kChunk + 5, 64, 2 * kChunk};
constexpr int64_t kMisaligned = 3;  // the index of the tensor that starts one element late

// The noise of element i by the definition, in double precision.
inline double noise(uint64_t key, int64_t i) {
  uint64_t c[4] = {static_cast<uint32_t>(i / 4), static_cast<uint64_t>(i / 4) >> 32, 0, 0};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const uint64_t next[4] = {(b >> 32) ^ c[1] ^ k0, b & 0xffffffffu, (a >> 32) ^ c[3] ^ k1,
                              a & 0xffffffffu};
    std::memcpy(c, next, sizeof(c));
  }
  const int pair = i % 4 / 2 * 2;
  // u as float32 rounds it: the accuracy of u itself is not the question here.
  const double u1 = (static_cast<float>(c[pair]) + 0.5f) * 0x1p-32f;
  const double u2 = (static_cast<float>(c[pair + 1]) + 0.5f) * 0x1p-32f;
  const double angle = 2 * 3.14159265358979323846 * u2;
  return std::sqrt(-2 * std::log(u1)) * (i % 2 ? std::sin(angle) : std::cos(angle));
}

template <class T>
void check_perturb_dtype(Checks& checks) {
  TensorTable<NoisyTensor<T>> table;
  std::vector<std::vector<T>> values, exact;
  std::vector<std::vector<double>> expected, bound;
  for (int64_t t = 0; t < std::ssize(kSizes); ++t)
    values.push_back(uniform_vector<T>(kSizes[t] + (t == kMisaligned)));
  exact = values;
  for (int64_t t = 0; t < std::ssize(kSizes); ++t) {
    const int64_t offset = t == kMisaligned;
    const uint64_t key = generator()();
    const float sigma = 0.25f * static_cast<float>(t + 1);
    table.add({values[t].data() + offset, key, kSizes[t], 0, sigma});
    expected.emplace_back(values[t].begin(), values[t].end());
    bound.emplace_back(values[t].size(), 0.0);
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      const double z = noise(key, i);
      expected[t][i + offset] += z * sigma;
      // 5.3 * 2^-24 |z|: what csrc/math/normal.h states; and one rounding each of product and sum
      bound[t][i + offset] = 5.3 * 0x1p-24 * std::abs(z) * sigma +
                             0x1p-24 * (std::abs(z * sigma) + std::abs(expected[t][i + offset]));
      const NormalBlock block = normal_block(key, static_cast<uint64_t>(i / 4));
      const float lanes[4] = {block.z0, block.z1, block.z2, block.z3};
      exact[t][i + offset] = add_noise(exact[t][i + offset], lanes[i % 4], sigma);
    }
  }
  run_grid<NoShared>(
      3, 64, [&](const HostContext& ctx, NoShared& none) { perturb_body(ctx, none, table); });
  for (size_t t = 0; t < values.size(); ++t) {
    checks.same_bits(values[t], exact[t], "perturb_, element by element");
    checks.close(values[t], expected[t], bound[t], "perturb_, by the definition");
  }
}

inline void check_perturb(Checks& checks) {
  check_perturb_dtype<float>(checks);
  check_perturb_dtype<double>(checks);
}

template <class T>
void check_sgd_case(Checks& checks, bool momentum, bool nesterov, bool weight_decay) {
  const T lr = T(0.1), mu = momentum ? T(0.9) : T(0), damp = momentum && !nesterov ? T(0.3) : T(0),
          wd = weight_decay ? T(0.01) : T(0);
  TensorTable<SgdTensor<T>> table;
  std::vector<std::vector<T>> p, g, b;
  for (int64_t t = 0; t < std::ssize(kSizes); ++t) {
    const int64_t n = kSizes[t] + (t == kMisaligned);
    p.push_back(uniform_vector<T>(n));
    g.push_back(uniform_vector<T>(n));
    b.push_back(uniform_vector<T>(n));
  }
  std::vector<std::vector<T>> expected_p = p, expected_b = b;
  for (int64_t t = 0; t < std::ssize(kSizes); ++t) {
    const int64_t offset = t == kMisaligned;
    const bool is_first_step = t % 2;
    table.add({p[t].data() + offset, g[t].data() + offset,
               momentum ? b[t].data() + offset : nullptr, kSizes[t], 0, is_first_step});
    for (size_t i = offset; i < p[t].size(); ++i) {
      T gradient = g[t][i], step;
      if (weight_decay) gradient = std::fma(wd, p[t][i], gradient);
      step = gradient;
      if (momentum) {
        T& buffer = expected_b[t][i];
        buffer = is_first_step ? gradient
                               : std::fma(static_cast<T>(1.0 - static_cast<double>(damp)), gradient,
                                          static_cast<T>(buffer * mu));
        step = nesterov ? std::fma(mu, buffer, gradient) : buffer;
      }
      expected_p[t][i] = std::fma(-lr, step, p[t][i]);
    }
  }
  const auto scalars = sgd_scalars<T>({lr, mu, damp, wd, nesterov, false});
  run_grid<NoShared>(
      2, 64, [&](const HostContext& ctx, NoShared& none) { sgd_body(ctx, none, table, scalars); });
  for (size_t t = 0; t < p.size(); ++t) {
    checks.same_bits(p[t], expected_p[t], "sgd_, parameters");
    checks.same_bits(b[t], expected_b[t], "sgd_, buffers");
  }
}

inline void check_sgd(Checks& checks) {
  for (const bool weight_decay : {false, true})
    for (const auto& [momentum, nesterov] :
         {std::pair{false, false}, {true, false}, {true, true}}) {
      check_sgd_case<float>(checks, momentum, nesterov, weight_decay);
      check_sgd_case<double>(checks, momentum, nesterov, weight_decay);
    }
}

}  // namespace twophase
