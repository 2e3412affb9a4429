// Kernels that ask the proxy for answers, to measure how long they take: bench/gpu_figures.py.
#include "ring.cuh"

using namespace moe_comm;

// One CTA that arms a wait for nothing and sees its word, again and again. clocks[i]: the i-th round
// trip, by the SM's clock; span[0..1]: nanoseconds and clocks of all of them together, by which the
// caller finds out how long a clock is.
extern "C" __global__ void __launch_bounds__(32)
    moe_comm_round_trip(DeviceRing ring, uint32_t wait, ArmedWord* word, uint64_t count,
                        uint64_t* clocks, uint64_t* span, uint32_t* status) {
  device::Device memory;
  if (threadIdx.x != 0) return;
  const uint64_t ns = memory.now_ns();
  const long long all = clock64();
  for (uint64_t i = 0; i < count; ++i) {
    const long long start = clock64();
    uint32_t failed = device::arm(memory, ring, Arm{wait, 0, i, 0}, word);
    if (failed == kWaitOk) {
      failed = device::wait_counter(memory, &word->ended, 1, ring.abort_word, ring.timeout_ns);
    }
    clocks[i] = static_cast<uint64_t>(clock64() - start);
    if (failed != kWaitOk) {
      *status = failed;
      return;
    }
  }
  span[0] = memory.now_ns() - ns;
  span[1] = static_cast<uint64_t>(clock64() - all);
  *status = kWaitOk;
}

// Every block pushes `count` commands for one channel.
extern "C" __global__ void __launch_bounds__(32)
    moe_comm_push_many(DeviceRing ring, uint32_t channel, uint64_t count, uint32_t* status) {
  device::Device memory;
  if (threadIdx.x != 0) return;
  for (uint64_t i = 0; i < count; ++i) {
    const WaitStatus failed = device::push(memory, ring, Transfer{channel, 1, 0, 0, 256});
    if (failed != kWaitOk) {
      *status = failed;
      return;
    }
  }
}

// Arms, and says when it began to; a stream wait and moe_comm_stamp come next.
extern "C" __global__ void __launch_bounds__(32)
    moe_comm_arm_at(DeviceRing ring, uint32_t wait, uint32_t word_idx, ArmedWord* word,
                    uint64_t* ns, uint32_t* status) {
  device::Device memory;
  if (threadIdx.x != 0) return;
  *ns = memory.now_ns();
  const WaitStatus failed = device::arm(memory, ring, Arm{wait, word_idx, 1, 0}, word);
  if (failed != kWaitOk) *status = failed;
}

extern "C" __global__ void __launch_bounds__(32)
    moe_comm_stamp(const ArmedWord* word, uint64_t* ns, uint32_t* status) {
  device::Device memory;
  if (threadIdx.x != 0) return;
  *ns = memory.now_ns();
  const auto waited = static_cast<uint32_t>(memory.load_acquire(&word->status));  // H6
  if (waited != kWaitOk) *status = waited;
}
