// Device half of csrc/abi.hpp: push one Command (H2), arm a wait, wait for a counter (H6).
//
// The protocol is written once, as templates over the few memory accesses it is made of: `Device`
// below for CUDA, and in the tests the same functions run by host threads and, one access at a
// time, in every order there is.
//
// - A push is one thread's. Rows that other threads of its CTA stored come before it if a barrier
//   (__syncthreads) lies between: release is cumulative.
// - Many CTAs push at once: a ticket by one fetch_add in device memory is a slot and a lap.
// - A full ring is waited for, bounded by the ring's time limit and by the abort word. A ticket
//   that was given up is never published, so the ring ends there: the caller must report a fault.
// - No kernel that fills the device waits for bytes: wait_counter is for one small CTA.
#pragma once

#include "../csrc/abi.hpp"

#ifdef __CUDACC__
#define MOE_COMM_DEVICE __device__
#else
#define MOE_COMM_DEVICE
#endif

namespace moe_comm::device {

template <class Memory>
MOE_COMM_DEVICE inline WaitStatus wait_until(Memory& memory, const uint64_t* word, uint64_t target,
                                             const uint64_t* abort_word, uint64_t timeout_ns) {
  if (static_cast<int64_t>(memory.load_acquire(word) - target) >= 0) return kWaitOk;
  const uint64_t start = memory.now_ns();
  do {
    if (memory.load_acquire(abort_word) != 0) return kWaitAborted;
    if (memory.now_ns() - start > timeout_ns) return kWaitTimeout;
    memory.pause();
  } while (static_cast<int64_t>(memory.load_acquire(word) - target) < 0);
  return kWaitOk;
}

// Until the counter reaches `target`; counters pass 2^64 without a gap.
template <class Memory>
MOE_COMM_DEVICE inline WaitStatus wait_counter(Memory& memory, const Counter* counter,
                                               uint64_t target, const uint64_t* abort_word,
                                               uint64_t timeout_ns) {
  return wait_until(memory, counter, target, abort_word, timeout_ns);
}

// `wanted`: a Transfer or an Arm.
template <class Memory, class Wanted>
MOE_COMM_DEVICE inline WaitStatus push(Memory& memory, const DeviceRing& ring,
                                       const Wanted& wanted) {
  const uint64_t ticket = memory.fetch_add(ring.reserved);
  // A slot is free when the command one lap ago was taken. What was seen may be old: then ask.
  if (ticket - memory.load_acquire(ring.taken_seen) >= ring.num_slots) {
    const uint64_t room = ticket - ring.num_slots + 1;
    const WaitStatus status =
        wait_until(memory, ring.taken, room, ring.abort_word, ring.timeout_ns);
    if (status != kWaitOk) return status;
    memory.store_release(ring.taken_seen, room);  // over a newer one: costs a look, no more
  }
  const uint32_t lap = static_cast<uint32_t>(ticket / ring.num_slots + 1) & 1u;
  memory.store_command(ring.slots + (ticket & (ring.num_slots - 1)),
                       pack_command(wanted, lap));  // H2
  return kWaitOk;
}

// Ends an armed wait from here: nobody else will.
template <class Memory>
MOE_COMM_DEVICE inline WaitStatus end(Memory& memory, ArmedWord* word, WaitStatus status) {
  memory.store_release(&word->status, status);
  memory.store_release(&word->ended, 1);  // H5
  return status;
}

// Clears `word`, the ring's `arm.word_idx`-th, and asks the proxy to end it when all sources of the
// epoch are complete, at the deadline, or on abort. What comes next on the stream waits for
// word->ended and then reads word->status. A word that is armed is not armed again.
template <class Memory>
MOE_COMM_DEVICE inline WaitStatus arm(Memory& memory, const DeviceRing& ring, const Arm& arm,
                                      ArmedWord* word) {
  memory.store_release(&word->ended, 0);
  const WaitStatus pushed = push(memory, ring, arm);
  if (pushed != kWaitOk) return end(memory, word, pushed);
  // A ring that ended takes no command: either this sees it, or who ended it sees the word cleared.
  memory.fence();
  if (memory.load_acquire(ring.abort_word) != 0) return end(memory, word, kWaitAborted);
  return kWaitOk;
}

#ifdef __CUDACC__
struct Device {
  __device__ uint64_t fetch_add(uint64_t* word) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(word), 1ull);
  }
  __device__ uint64_t load_acquire(const uint64_t* word) {
    uint64_t value;
    asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
  }
  __device__ void store_release(uint64_t* word, uint64_t value) {
    asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
  }
  // One 16-byte access; two 8-byte ones in either order would do.
  __device__ void store_command(Command* slot, const Command& command) {
    asm volatile("fence.acq_rel.sys;\n\tst.relaxed.sys.v2.u64 [%0], {%1, %2};" ::"l"(slot),
                 "l"(command.word0), "l"(command.word1)
                 : "memory");
  }
  __device__ void fence() { asm volatile("fence.sc.sys;" ::: "memory"); }
  __device__ uint64_t now_ns() {
    uint64_t ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
  }
  __device__ void pause() { __nanosleep(100); }
};
#endif

}  // namespace moe_comm::device
