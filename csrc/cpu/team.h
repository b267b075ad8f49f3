// Threads that stay together for many short rounds, where opening and closing a parallel region for
// each round would take as long as the round. They are torch's own: new ones may be put beside a
// busy one for milliseconds before the system moves them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace twophase {

class Team {
 public:
  // Calls f(member, team) in `threads` threads at once, or in as many as torch gives, one within
  // another parallel region; f must not throw. team.size() is their number, team.barrier() waits
  // for all.
  template <class F>
  static void run(int threads, const F& f) {
    Team team;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      // Every thread has one part, and all parts but the last are as long as the first.
      if (begin == 0) team.part_.store(end, std::memory_order_release);
      while (team.part_.load(std::memory_order_acquire) == 0) pause();
      const int64_t part = team.part_.load(std::memory_order_relaxed);
      team.size_.store(static_cast<int>((threads + part - 1) / part), std::memory_order_relaxed);
      f(static_cast<int>(begin / part), team);
    });
  }

  int size() const { return size_.load(std::memory_order_relaxed); }

  // What was written before it is seen after it. A thread that waits long sleeps: the others may be
  // on its own processor, and one that is woken is put on an idle one. (Yielding does not part
  // them.)
  void barrier() {
    if (size() == 1) return;
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      round_.notify_all();
      return;
    }
    for (int spins = 0; spins < kSpins; ++spins) {
      if (round_.load(std::memory_order_acquire) != round) return;
      pause();
    }
    round_.wait(round, std::memory_order_acquire);
  }

 private:
  static constexpr int kSpins = 2000;

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
  }

  std::atomic<int64_t> part_{0};
  std::atomic<int> size_{0}, waiting_{0};
  std::atomic<unsigned> round_{0};
};

inline int team_size(int64_t most) {
  return static_cast<int>(std::clamp<int64_t>(most, 1, torch::stable::get_num_threads()));
}

// Part `thread` of `threads` of [0, n).
struct Share {
  int64_t begin, end;
  Share(int64_t n, int thread, int threads)
      : begin(n * thread / threads), end(n * (thread + 1) / threads) {}
};

// Numbers of a thread's scratch of k: threads must not write to one cache line.
inline int64_t apart(int64_t k) { return (k + 15) / 16 * 16 + 16; }

}  // namespace twophase
