// The host's end of a ring for bench/gpu_figures.py: a thread that takes commands as the proxy does
// (csrc/ring.hpp) and answers each by a word in pinned memory. A library for ctypes; all memory is
// the caller's.
#include <atomic>
#include <thread>

#include "../csrc/ring.hpp"

using namespace moe_comm;

namespace {
std::thread worker;
std::atomic<bool> stopping{false};
}  // namespace

extern "C" {

// `control` and `slots` zeroed; `word` holds how many commands were taken.
void start(RingControl* control, Command* slots, uint32_t num_slots, uint64_t* word) {
  stopping = false;
  worker = std::thread([=] {
    RingConsumer ring(control, slots, num_slots);
    uint64_t taken = 0;
    while (!stopping.load(std::memory_order_relaxed)) {
      if (ring.take()) std::atomic_ref(*word).store(++taken, std::memory_order_release);  // H5
    }
  });
}

void stop() {
  stopping = true;
  worker.join();
}
}
