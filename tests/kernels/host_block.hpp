// A CTA made of host threads: what kernels/*.cuh are run by where there is no GPU.
#pragma once

#include <atomic>
#include <barrier>
#include <bit>
#include <chrono>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#include "../../csrc/abi.hpp"

namespace host_block {

using moe_comm::Command;

struct HostAccess {  // to words that others write: what kernels' Device has for CUDA
  uint64_t fetch_add(uint64_t* word) {
    return std::atomic_ref(*word).fetch_add(1, std::memory_order_relaxed);
  }
  uint64_t load_acquire(const uint64_t* word) {
    return std::atomic_ref(*const_cast<uint64_t*>(word)).load(std::memory_order_acquire);
  }
  void store_release(uint64_t* word, uint64_t value) {
    std::atomic_ref(*word).store(value, std::memory_order_release);
  }
  uint64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
  void fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
};

struct Shared {  // of one block
  explicit Shared(uint64_t num_threads) : barrier(static_cast<std::ptrdiff_t>(num_threads)) {}
  std::barrier<> barrier;
  std::atomic<uint64_t> votes{0};
};

struct HostBlock : HostAccess {
  Shared& shared;
  uint64_t index_, num_blocks_, thread_, num_threads_;

  uint64_t index() const { return index_; }
  uint64_t num_blocks() const { return num_blocks_; }
  uint64_t thread() const { return thread_; }
  uint64_t num_threads() const { return num_threads_; }
  bool any(bool value) {
    if (value) shared.votes.fetch_add(1);
    shared.barrier.arrive_and_wait();
    const bool result = shared.votes.load() != 0;
    shared.barrier.arrive_and_wait();
    if (value) shared.votes.fetch_sub(1);
    shared.barrier.arrive_and_wait();
    return result;
  }
  uint64_t arrive(uint64_t* word) {
    return std::atomic_ref(*word).fetch_add(1, std::memory_order_acq_rel);
  }
  void add(uint64_t* word, uint64_t value) const {
    std::atomic_ref(*word).fetch_add(value, std::memory_order_relaxed);
  }
  void store_command(Command* slot, const Command& command) {
    store_release(&slot->word1, command.word1);
    store_release(&slot->word0, command.word0);
  }
  void pause() { std::this_thread::yield(); }
  template <class T>
  T multiply(T a, T b) const {
    return a * b;
  }
  template <class T>
  T add(T a, T b) const {
    return a + b;
  }
  template <class T>
  T fused(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
  float half_to_float(uint16_t bits) const { return std::bit_cast<_Float16>(bits); }
  uint16_t float_to_half(float value) const {
    return std::bit_cast<uint16_t>(static_cast<_Float16>(value));
  }
};

template <class Function>
inline void launch(uint64_t num_blocks, uint64_t num_threads, Function kernel) {
  std::vector<std::unique_ptr<Shared>> shared;
  std::vector<std::thread> threads;
  for (uint64_t b = 0; b < num_blocks; ++b) {
    shared.push_back(std::make_unique<Shared>(num_threads));
    for (uint64_t t = 0; t < num_threads; ++t) {
      threads.emplace_back([&kernel, &shared = *shared.back(), b, t, num_blocks, num_threads] {
        HostBlock block{{}, shared, b, num_blocks, t, num_threads};
        kernel(block);
      });
    }
  }
  for (auto& thread : threads) thread.join();
}

}  // namespace host_block
