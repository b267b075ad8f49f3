// gram_logdet's body on matrices of known rank, log det against long double.
#pragma once

#include <utility>

#include "../../csrc/cuda/bodies/gram_logdet.h"
#include "check.h"
#include "host_context.h"

namespace twophase {

struct GramAnswer {
  std::vector<int64_t> rank, info;
  std::vector<double> logabsdet, rcond, error;
};

template <class T>
GramAnswer run_gram(const std::vector<T>& features, int64_t batch, int n, int64_t m, bool ones) {
  GramAnswer a{std::vector<int64_t>(batch, -7), std::vector<int64_t>(batch, -7),
               std::vector<double>(batch, -7), std::vector<double>(batch, -7),
               std::vector<double>(batch, -7)};
  constexpr int64_t kBlocks = 2;
  const int64_t size = static_cast<int64_t>(n) * leading_dimension(n);
  std::vector<double> scratch(kBlocks * size, std::nan(""));
  run_grid<GramShared>(kBlocks, kBlock, [&](const HostContext& ctx, GramShared& shared) {
    gram_logdet_body(ctx, shared, features.data(), batch, n, m, ones,
                     scratch.data() + ctx.block() * size,
                     GramResult{a.rank.data(), a.logabsdet.data(), a.info.data(), a.rcond.data(),
                                a.error.data()});
  });
  return a;
}

// log det of the Gram matrix, -inf where it is not positive definite.
template <class T>
long double log_det(const T* features, int n, int64_t m, bool ones) {
  std::vector<std::vector<long double>> g(n, std::vector<long double>(n));
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      g[i][j] = ones;
      for (int64_t k = 0; k < m; ++k)
        g[i][j] += static_cast<long double>(features[i * m + k]) * features[j * m + k];
    }
  long double sum = 0;
  for (int k = 0; k < n; ++k) {
    if (!(g[k][k] > 0)) return -std::numeric_limits<long double>::infinity();
    sum += std::log(g[k][k]);
    for (int i = k + 1; i < n; ++i)
      for (int j = k + 1; j < n; ++j) g[i][j] -= g[i][k] * g[k][j] / g[k][k];
  }
  return sum;
}

template <class T>
void check_gram_dtype(Checks& checks) {
  const double epsilon = std::numeric_limits<double>::epsilon();
  // One tile and more than one, the latter in one element type (it costs the most barriers).
  for (const auto& [n, m] : {std::pair{1, 1}, {5, 9}, {sizeof(T) == 4 ? 34 : 9, 40}})
    for (const bool ones : {false, true}) {
      if (n > kGramTile && !ones) continue;
      const int64_t batch = 3, size = static_cast<int64_t>(n) * m;
      std::vector<T> x = uniform_vector<T>(batch * size);
      for (int64_t k = 0; k < m; ++k) {
        if (n > 1) x[size + 2 * m + k] = x[size + k];                          // a duplicate row
        x[2 * size + k] *= static_cast<T>(sizeof(T) == 8 ? 0x1p200 : 0x1p60);  // a huge row
      }
      const GramAnswer a = run_gram(x, batch, n, m, ones);
      const int64_t width = m + ones;
      for (const int64_t item : {0, 2}) {
        checks.that(a.rank[item] == n && a.info[item] == 0, "gram_logdet: full rank", n);
        const long double expected = log_det(x.data() + item * size, n, m, ones);
        // Each pivot loses about cond (n + p) epsilon; these matrices have cond below 1e4.
        checks.that(std::abs(a.logabsdet[item] - expected) <=
                        1e4 * epsilon * static_cast<double>(n * (n + width)),
                    "gram_logdet: log det", n);
        checks.that(std::abs(a.logabsdet[item] - expected) <=
                        static_cast<double>(a.error[item]) + 8 * epsilon * std::abs(expected),
                    "gram_logdet: error of log det", n);
        // all rows are of one size, but for the huge one
        const int spread = item == 2 ? (sizeof(T) == 8 ? 202 : 62) : 3;
        checks.that(a.rcond[item] <= 1 && a.rcond[item] >= std::ldexp(1e-10, -spread),
                    "gram_logdet: rcond", n);
      }
      if (n > 1)
        checks.that(a.rank[1] == n - 1 && a.rcond[1] > 0 && a.error[1] == INFINITY,
                    "gram_logdet: duplicate row", a.rank[1]);
    }
  // rank 2 of 6 by construction (integers), a NaN, an infinity, zeros
  constexpr int kN = 6, kM = 4;
  std::vector<T> x(4 * kN * kM);
  for (int i = 0; i < kN; ++i)
    for (int k = 0; k < kM; ++k) x[i * kM + k] = static_cast<T>((i + 1) * k + i % 2 * (k + 2));
  x[kN * kM + 5] = std::numeric_limits<T>::quiet_NaN();
  x[2 * kN * kM + 7] = std::numeric_limits<T>::infinity();
  const GramAnswer a = run_gram(x, 4, kN, kM, false);
  checks.that(a.rank[0] == 2, "gram_logdet: rank 2 by construction", a.rank[0]);
  for (const int item : {1, 2})
    checks.that(a.info[item] == -1 && a.rank[item] == 0 && std::isnan(a.logabsdet[item]) &&
                    a.rcond[item] == 0 && a.error[item] == INFINITY,
                "gram_logdet: not finite", item);
  checks.that(a.info[3] == 1 && a.rank[3] == 0 && a.logabsdet[3] == -INFINITY && a.rcond[3] == 0 &&
                  a.error[3] == INFINITY,
              "gram_logdet: zeros");
  const GramAnswer only_ones = run_gram(std::vector<T>(), 1, 3, 0, true);
  checks.that(only_ones.rank[0] == 1, "gram_logdet: no features but the ones");
}

inline void check_gram_logdet(Checks& checks) {
  check_gram_dtype<float>(checks);
  check_gram_dtype<double>(checks);
}

}  // namespace twophase
