// The ring's functions as kernels of their own: for programs that are not fused, and to measure.
#include "ring.cuh"

using namespace moe_comm;

// Block b pushes transfers[b]; status[b] says how it went. Launched with one thread for each block.
extern "C" __global__ void __launch_bounds__(32)
    moe_comm_push(DeviceRing ring, const Transfer* transfers, uint32_t* status) {
  ring::Device memory;
  if (threadIdx.x == 0) status[blockIdx.x] = ring::push(memory, ring, transfers[blockIdx.x]);
}

extern "C" __global__ void __launch_bounds__(32)
    moe_comm_arm(DeviceRing ring, uint32_t channel, uint32_t epoch, Counter* word,
                 uint32_t word_idx, uint32_t* status) {
  ring::Device memory;
  if (threadIdx.x == 0) *status = ring::arm(memory, ring, channel, epoch, word, word_idx);
}

// One small CTA that waits, bounded. Not the default: it holds its SM's slot while bytes travel.
extern "C" __global__ void __launch_bounds__(32)
    moe_comm_wait(const Counter* counter, uint64_t target, const uint64_t* abort_word,
                  uint64_t timeout_ns, uint32_t* status) {
  ring::Device memory;
  if (threadIdx.x == 0) {
    *status = ring::wait_counter(memory, counter, target, abort_word, timeout_ns);
  }
}
