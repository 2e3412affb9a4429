// kernels/*.cuh run by host threads, a std::barrier for each block: a
// library for ctypes. Compiled without contraction: a product is rounded before it is added.
#include "../../csrc/ring.hpp"
#include "../../kernels/combine.cuh"
#include "../../kernels/dispatch.cuh"
#include "../../kernels/headers.cuh"
#include "../../kernels/receive.cuh"
#include "../../kernels/relay.cuh"
#include "host_block.hpp"

using namespace moe_comm;
using namespace host_block;

extern "C" {

void dispatch_send(const dispatch::Arguments* arguments, uint64_t num_blocks,
                   uint64_t num_threads) {
  launch(num_blocks, num_threads,
         [arguments](HostBlock& block) { dispatch::send(block, *arguments); });
}

void forward(const receive::Forward* a, uint64_t num_blocks, uint64_t num_threads) {
  launch(num_blocks, num_threads, [a](HostBlock& block) { receive::forward(block, *a); });
}

void unpack(const receive::Unpack* a, uint64_t num_blocks, uint64_t num_threads) {
  launch(num_blocks, num_threads, [a](HostBlock& block) { receive::unpack(block, *a); });
}

void begin(const headers::Begin* a) {
  launch(1, 3, [a](HostBlock& block) { headers::begin(block, *a); });
}

void leave_out(const headers::LeaveOut* a) {
  launch(1, 3, [a](HostBlock& block) { headers::leave_out(block, *a); });
}

void write_headers(const headers::Write* a, uint64_t num_blocks, uint64_t num_threads) {
  launch(num_blocks, num_threads, [a](HostBlock& block) { headers::write(block, *a); });
}

void check_headers(const headers::Check* a) {
  launch(1, 3, [a](HostBlock& block) { headers::check(block, *a); });
}

void collect(const headers::Collect* a, uint64_t num_blocks, uint64_t num_threads) {
  launch(num_blocks, num_threads, [a](HostBlock& block) { headers::collect(block, *a); });
}

void pass_on(const relay::Arguments* a, uint64_t num_blocks, uint64_t num_threads) {
  launch(num_blocks, num_threads, [a](HostBlock& block) { relay::pass_on(block, *a); });
}

// dtype as in moe_comm/layout.py.
void combine_send(const combine::Arguments* a, uint64_t dtype, uint64_t num_blocks,
                  uint64_t num_threads) {
  launch(num_blocks, num_threads, [a, dtype](HostBlock& block) {
    if (dtype == 1) combine::send<combine::BFloat16>(block, *a);
    if (dtype == 2) combine::send<combine::Float16>(block, *a);
    if (dtype == 3) combine::send<combine::Itself<float>>(block, *a);
    if (dtype == 4) combine::send<combine::Itself<double>>(block, *a);
  });
}

// The next command of the ring, unpacked to five numbers; false: there is none.
bool take(const DeviceRing* ring, uint64_t* out) {
  RingControl control{0, *ring->taken};
  RingConsumer consumer(&control, ring->slots, static_cast<uint32_t>(ring->num_slots));
  const auto transfer = consumer.take();
  if (!transfer) return false;
  *const_cast<uint64_t*>(ring->taken) = control.taken_until;
  const uint64_t fields[] = {transfer->channel, transfer->epoch, transfer->local_offset,
                             transfer->remote_offset, transfer->num_bytes};
  for (int i = 0; i < 5; ++i) out[i] = fields[i];
  return true;
}

// As kernels/ring.cu; a block each, of one thread.
void push(const DeviceRing* ring, const Transfer* transfers, uint32_t* status,
          uint64_t num_blocks) {
  launch(num_blocks, 1, [=](HostBlock& block) {
    status[block.index()] = device::push(block, *ring, transfers[block.index()]);
  });
}

void arm(const DeviceRing* ring, uint32_t channel, uint32_t word_idx, uint64_t epoch,
         const uint64_t* base, uint32_t timeout_ms, ArmedWord* word, uint32_t* status) {
  if (base != nullptr) epoch += *base;
  launch(1, 1, [=](HostBlock& block) {
    *status = device::arm(block, *ring, Arm{channel, word_idx, epoch, timeout_ms}, word);
  });
}

// What a stream does at cuStreamWaitValue64(word->ended, 1, GEQ), but that does not end: false
// after `seconds`.
bool stream_wait(ArmedWord* word, double seconds) {
  const auto start = std::chrono::steady_clock::now();
  while (std::atomic_ref(word->ended).load(std::memory_order_acquire) == 0) {
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds)
      return false;
    std::this_thread::yield();
  }
  return true;
}
}
