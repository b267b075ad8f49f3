// One parallel region over the elements of many arrays of very different sizes.
#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace twophase {

// Calls f(k, begin, end) on pieces that cover [0, n_k) of every array k. Every thread gets about
// the same number of elements; pieces start at multiples of 64 elements.
template <class Targets, class F>
void parallel_targets(const Targets& targets, const F& f) {
  constexpr int64_t kPiece = 64, kGrain = 256;  // 16384 elements: a few microseconds a thread
  std::vector<int64_t> start{0};                // of each array, in pieces
  for (const auto& t : targets) start.push_back(start.back() + (t.n + kPiece - 1) / kPiece);
  torch::stable::parallel_for(0, start.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t k = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (; begin < end; ++k) {
      const int64_t stop = std::min(end, start[k + 1]);
      f(k, (begin - start[k]) * kPiece, std::min((stop - start[k]) * kPiece, targets[k].n));
      begin = stop;
    }
  });
}

}  // namespace twophase
