// The ring's functions as kernels of their own: for programs that are not fused, and to measure.
#include "ring.cuh"

using namespace moe_comm;

// Block b pushes transfers[b]; status[b] says how it went. Launched with one thread for each block.
extern "C" __global__ void __launch_bounds__(32)
    moe_comm_push(DeviceRing ring, const Transfer* transfers, uint32_t* status) {
  device::Device memory;
  if (threadIdx.x == 0) status[blockIdx.x] = device::push(memory, ring, transfers[blockIdx.x]);
}

// For `epoch`, counted from *base if there is one. In the order of a stream: then a stream wait for
// word->ended (cuStreamWaitValue64), then kernels that read word->status first.
extern "C" __global__ void __launch_bounds__(32)
    moe_comm_arm(DeviceRing ring, uint32_t channel, uint32_t word_idx, uint64_t epoch,
                 const uint64_t* base, uint32_t timeout_ms, ArmedWord* word, uint32_t* status) {
  device::Device memory;
  if (threadIdx.x == 0) {
    if (base != nullptr) epoch += *base;
    *status = device::arm(memory, ring, Arm{channel, word_idx, epoch, timeout_ms}, word);
  }
}

// One small CTA that waits, bounded. Not the default: it holds its SM's slot while bytes travel.
extern "C" __global__ void __launch_bounds__(32)
    moe_comm_wait(const Counter* counter, uint64_t target, const uint64_t* abort_word,
                  uint64_t timeout_ns, uint32_t* status) {
  device::Device memory;
  if (threadIdx.x == 0) {
    *status = device::wait_counter(memory, counter, target, abort_word, timeout_ns);
  }
}
