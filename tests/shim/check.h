// Counting checks for the standalone executables.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace twophase {

struct Checks {
  int done = 0, failed = 0;

  void that(bool ok, const char* what, long long detail = 0) {
    ++done;
    if (ok) return;
    ++failed;
    std::printf("FAILED: %s (%lld)\n", what, detail);
  }
  template <class T>
  void same_bits(const std::vector<T>& got, const std::vector<T>& expected, const char* what) {
    const bool same =
        got.size() == expected.size() &&
        (got.empty() || std::memcmp(got.data(), expected.data(), got.size() * sizeof(T)) == 0);
    long long first = 0;
    while (!same && first < static_cast<long long>(got.size()) &&
           std::memcmp(&got[first], &expected[first], sizeof(T)) == 0)
      ++first;
    that(same, what, first);
  }
  // |got - expected| <= bound, elementwise; false for NaN.
  template <class T>
  void close(const std::vector<T>& got, const std::vector<double>& expected,
             const std::vector<double>& bound, const char* what) {
    bool ok = got.size() == expected.size();
    long long first = 0;
    for (size_t i = 0; ok && i < got.size(); ++i)
      if (!(std::abs(static_cast<double>(got[i]) - expected[i]) <= bound[i])) {
        ok = false;
        first = static_cast<long long>(i);
      }
    that(ok, what, first);
  }
};

inline std::mt19937_64& generator() {
  static std::mt19937_64 engine(20210202);
  return engine;
}
inline double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator());
}
template <class T>
std::vector<T> uniform_vector(int64_t n, double low = -1, double high = 1) {
  std::vector<T> out(static_cast<size_t>(n));
  for (T& x : out) x = static_cast<T>(uniform(low, high));
  return out;
}

}  // namespace twophase
