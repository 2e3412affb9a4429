// Waiting on few cores: spin, then yield, then sleep. And the doorbell that ends a sleep.
//
// A peer's always-spinning progress thread turns 20 us into 13.8 ms on two cores; so every loop
// here gives way early.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "abi.hpp"

namespace moe_comm {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline std::atomic_ref<Counter> word_at(Counter& word) { return std::atomic_ref<Counter>(word); }

// Counts how long nothing happened. `should_sleep()` after some spinning and yielding.
class Backoff {
 public:
  explicit Backoff(int spins = 64, int yields = 32) : spins_(spins), yields_(yields) {}
  void reset() { idle_ = 0; }
  bool should_sleep() const { return idle_ >= spins_ + yields_; }
  void step() {
    if (idle_ < spins_) {
      pause_cpu();
    } else {
      sched_yield();
    }
    if (idle_ < spins_ + yields_) ++idle_;
  }

 private:
  int spins_, yields_;
  int idle_ = 0;
};

// The word once it differs from `old`, or as it is after `seconds`. For words whose writer rings no
// doorbell (a GPU): spins, yields, then naps, each nap twice as long as the one before.
inline Counter wait_change(Counter& word, Counter old, double seconds) {
  constexpr long kShortestNap = 20'000, kLongestNap = 1'000'000;  // nanoseconds
  const auto start = Clock::now();
  long nap = kShortestNap;
  for (Backoff backoff;; backoff.step()) {
    const Counter now = word_at(word).load(std::memory_order_acquire);
    if (now != old || seconds_since(start) >= seconds) return now;
    if (!backoff.should_sleep()) continue;
    const timespec pause{0, nap};
    nanosleep(&pause, nullptr);
    nap = std::min(2 * nap, kLongestNap);
  }
}

// A futex in shared memory. Ringing costs one fence and one load while nobody sleeps. `sleepers` is
// changed only by the process that owns the doorbell, so a peer killed in the middle leaves it
// right.
struct Doorbell {
  uint32_t rings;
  uint32_t sleepers;
};

inline void ring(Doorbell& bell) {
  std::atomic_thread_fence(
      std::memory_order_seq_cst);  // pairs with the fence in sleep_on: store; fence; load
  if (std::atomic_ref(bell.sleepers).load(std::memory_order_relaxed) == 0) return;
  std::atomic_ref(bell.rings).fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, &bell.rings, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

// Sleeps until rung or `seconds` passed, unless `ready()` already holds.
template <typename Ready>
void sleep_on(Doorbell& bell, double seconds, Ready&& ready) {
  std::atomic_ref(bell.sleepers).fetch_add(1, std::memory_order_relaxed);
  const uint32_t seen = std::atomic_ref(bell.rings).load(std::memory_order_acquire);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (!ready()) {
    timespec limit{
        static_cast<time_t>(seconds),
        static_cast<long>((seconds - static_cast<double>(static_cast<time_t>(seconds))) * 1e9)};
    syscall(SYS_futex, &bell.rings, FUTEX_WAIT, seen, &limit, nullptr, 0);
  }
  std::atomic_ref(bell.sleepers).fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace moe_comm
