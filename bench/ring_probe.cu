// One CTA that pushes a command and waits for the host's word, again and again:
// bench/gpu_figures.py.
#include "ring.cuh"

using namespace moe_comm;

// ns[i]: the i-th round trip, by the SM's clock; ns_per_clock is found out by the caller from
// span[0..1]: nanoseconds and clocks of all of them together.
extern "C" __global__ void __launch_bounds__(32)
    moe_comm_round_trip(DeviceRing ring, const Counter* word, uint64_t count, uint64_t* clocks,
                        uint64_t* span, uint32_t* status) {
  device::Device memory;
  if (threadIdx.x != 0) return;
  const uint64_t ns = memory.now_ns();
  const long long all = clock64();
  for (uint64_t i = 0; i < count; ++i) {
    const long long start = clock64();
    uint32_t failed = device::push(memory, ring, Transfer{1, 1, 0, 0, 256});
    if (failed == kWaitOk) {
      failed = device::wait_counter(memory, word, i + 1, ring.abort_word, ring.timeout_ns);
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

// Every block pushes `count` commands.
extern "C" __global__ void __launch_bounds__(32)
    moe_comm_push_many(DeviceRing ring, uint64_t count, uint32_t* status) {
  device::Device memory;
  if (threadIdx.x != 0) return;
  for (uint64_t i = 0; i < count; ++i) {
    const WaitStatus failed = device::push(memory, ring, Transfer{1, 1, 0, 0, 256});
    if (failed != kWaitOk) {
      *status = failed;
      return;
    }
  }
}
