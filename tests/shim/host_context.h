// Runs CUDA kernel bodies (csrc/cuda/bodies) on the CPU: one std::thread per CUDA thread,
// std::barrier for the block's and the warps' barriers, and a few blocks at a time, so that
// ThreadSanitizer sees races inside a block and between blocks. Shared memory starts as NaN bytes,
// as on a GPU it starts as anything.
//
// Compiled with -DTP_BREAK_SYNC, the barrier at the line that the environment variable TP_SKIP_SYNC
// names ("gram_logdet.h:57") is left out: the tests show that ThreadSanitizer reports each one.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cuda/bodies/context.h"

namespace twophase {

inline bool skipped([[maybe_unused]] const std::source_location& where) {
#ifdef TP_BREAK_SYNC
  static const std::string skip = [] {
    const char* name = std::getenv("TP_SKIP_SYNC");
    return std::string(name ? name : "");
  }();
  if (skip.empty()) return false;
  const std::string full = std::string(where.file_name()) + ":" + std::to_string(where.line());
  return full.ends_with("/" + skip);
#else
  return false;
#endif
}

// What the threads of one running block have in common.
struct Team {
  explicit Team(int threads) : block(threads), slots(2 * threads) {
    for (int first = 0; first < threads; first += kWarp)
      warps.push_back(
          std::make_unique<std::barrier<>>(static_cast<int>(smaller(kWarp, threads - first))));
  }
  struct Slot {
    unsigned char bytes[16];
  };
  std::barrier<> block;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<Slot> slots;
};

class HostContext {
 public:
  HostContext(int thread, int threads, int64_t block, int64_t blocks, Team* team,
              std::barrier<>* grid = nullptr)
      : thread_(thread),
        threads_(threads),
        block_(block),
        blocks_(blocks),
        team_(team),
        grid_(grid) {}
  int thread() const { return thread_; }
  int threads() const { return threads_; }
  int64_t block() const { return block_; }
  int64_t blocks() const { return blocks_; }
  void sync(const std::source_location& where = std::source_location::current()) const {
    if (!skipped(where)) team_->block.arrive_and_wait();
  }
  void grid_sync(const std::source_location& where = std::source_location::current()) const {
    if (!skipped(where)) grid_->arrive_and_wait();
  }
  template <class T>
  void copy_async(T* to, const T* from) const {  // as late as it may be
    pending_.push_back([to, from] { *to = *from; });
  }
  void copy_wait() const {
    for (const auto& copy : pending_) copy();
    pending_.clear();
  }
  template <class T>
  void prefetch(const T* p) const {
    static_cast<void>(p);
  }
  template <class T>
  T shuffle_xor(T x, int mask) const {
    static_assert(sizeof(T) <= sizeof(Team::Slot));
    // Two sets of slots in turn: the next shuffle does not overwrite what a slower lane still
    // reads.
    Team::Slot* slots = team_->slots.data() + turn_ * threads_;
    turn_ = 1 - turn_;
    std::memcpy(slots[thread_].bytes, &x, sizeof(T));
    team_->warps[thread_ / kWarp]->arrive_and_wait();
    std::memcpy(&x, slots[thread_ ^ mask].bytes, sizeof(T));
    return x;
  }

 private:
  int thread_, threads_;
  int64_t block_, blocks_;
  Team* team_;
  std::barrier<>* grid_;
  mutable int turn_ = 0;
  mutable std::vector<std::function<void()>> pending_;
};

// body(ctx, shared) for every thread of every block; two blocks run at the same time.
template <class Shared, class Body>
void run_grid(int64_t blocks, int threads, const Body& body) {
  const int teams = blocks < 2 ? 1 : 2;
  std::vector<std::thread> running;
  std::vector<std::unique_ptr<Team>> team(teams);
  std::vector<std::unique_ptr<Shared>> shared(teams);
  for (int t = 0; t < teams; ++t) {
    team[t] = std::make_unique<Team>(threads);
    shared[t] = std::make_unique<Shared>();
    for (int thread = 0; thread < threads; ++thread)
      running.emplace_back([&, t, thread] {
        for (int64_t block = t; block < blocks; block += teams) {
          if (thread == 0) std::memset(static_cast<void*>(shared[t].get()), 0xff, sizeof(Shared));
          team[t]->block.arrive_and_wait();
          body(HostContext(thread, threads, block, blocks, team[t].get()), *shared[t]);
          team[t]->block.arrive_and_wait();
        }
      });
  }
  for (std::thread& one : running) one.join();
}

// body(ctx, memory) for every thread of every block, all at the same time; memory: `bytes` of
// shared memory for each block.
template <class Body>
void run_cooperative(int64_t blocks, int threads, int64_t bytes, const Body& body) {
  std::vector<std::thread> running;
  std::vector<std::unique_ptr<Team>> team;
  std::vector<std::vector<double>> memory;  // aligned to 8 bytes at least
  std::barrier<> grid(static_cast<int>(blocks) * threads);
  for (int64_t block = 0; block < blocks; ++block) {
    team.push_back(std::make_unique<Team>(threads));
    memory.emplace_back(static_cast<size_t>(bytes / 8 + 8), std::nan(""));
  }
  for (int64_t block = 0; block < blocks; ++block)
    for (int thread = 0; thread < threads; ++thread)
      running.emplace_back([&, block, thread] {
        void* start = memory[block].data();
        size_t room = memory[block].size() * 8;
        std::align(32, static_cast<size_t>(bytes), start, room);
        body(HostContext(thread, threads, block, blocks, team[block].get(), &grid), start);
      });
  for (std::thread& one : running) one.join();
}

}  // namespace twophase
