// Threads that stay together for many short rounds. torch's parallel_for opens and closes a region
// for each round and promises no number of threads, so that a barrier within it could hang.
#pragma once

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace twophase {

class Team {
 public:
  // Calls f(thread, team) in `threads` threads, this one included, or in as many as the system
  // gives; f must not throw. team.size() is their number, team.barrier() waits for all.
  template <class F>
  static void run(int threads, const F& f) {
    Team team;
    std::vector<std::thread> others;
    try {
      for (int i = 1; i < threads; ++i)
        others.emplace_back([&team, &f, i] {
          while (team.size_.load(std::memory_order_acquire) == 0) pause();
          f(i, team);
        });
    } catch (const std::system_error&) {  // no more threads: fewer do
    }
    team.size_.store(static_cast<int>(others.size()) + 1, std::memory_order_release);
    f(0, team);
    for (std::thread& other : others) other.join();
  }

  int size() const { return size_.load(std::memory_order_relaxed); }

  // What was written before it is seen after it. A thread that waits long lets others run: there
  // may be fewer processors than threads.
  void barrier() {
    if (size() == 1) return;
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
      spins < kSpins ? pause() : std::this_thread::yield();
  }

 private:
  static constexpr int kSpins = 4000;

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
  }

  std::atomic<int> size_{0}, waiting_{0};
  std::atomic<unsigned> round_{0};
};

}  // namespace twophase
