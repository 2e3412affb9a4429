// The sending half of a dispatch in one kernel: pack, stores into the windows of the own node, and
// one command for each link. What kernels/pack.py does lane by lane, every token read twice at
// most: once for the links, which come first so that the NIC starts early, and once for the node.
//
// Written over a `Block` (a CTA: `Cta` below for CUDA, threads of the host in tests), like ring.cuh
// over its accesses. Any number of blocks will do, so the caller decides how many SMs this takes.
// Nobody in here waits for bytes; a full ring is waited for, bounded, by the last block's threads.
#pragma once

#include "ring.cuh"

namespace moe_comm::dispatch {

struct alignas(16) Words {
  uint32_t word[4];
};

// One lane by network: what its commands say, but for the number of rows. All zeros: left out; the
// two channels of one that is not differ.
struct Link {
  uint64_t channel, release_channel;
  uint64_t local_offset, remote_offset;  // of the message: header, counts, rows
};

// Everything is 8 bytes wide. Strides and offsets in bytes; row parts as in moe_comm/layout.py.
struct Arguments {
  const uint8_t* x;  // [T, payload_bytes], rows 16-byte aligned
  int64_t x_stride;
  uint64_t payload_bytes;  // a multiple of 16
  const uint8_t* scales;   // [T, num_scales] items of `scale_item` bytes, or null
  int64_t scale_token_stride, scale_stride;
  uint64_t scale_item, num_scales;
  const int64_t* topk_idx;    // [T, K], dense; null: cached, rows carry neither token nor ids
  const float* topk_weights;  // [T, K], dense, or null
  uint64_t topk;
  const int32_t* lane_rows;  // [T, D]
  const int32_t* starts;     // [D] rows before this round; the next round's follow
  uint64_t num_lanes;        // D
  uint64_t first_token, last_token;
  uint64_t scales_at, token_at, ids_at, weights_at, row_bytes;
  uint8_t* const* windows;               // [D] of each lane: header, counts, rows
  uint64_t head_bytes, link_head_bytes;  // what lies in front of the rows: of the node, of links
  const uint32_t* lanes;                 // links first, then the ranks of the node
  uint64_t num_links, num_local;
  const Link* links;        // [num_links]
  Counter* const* commits;  // [num_local] words of the peers: set to `epoch` (H1)
  const uint64_t* epoch;    // in device memory: of this replay
  uint64_t* arrived;        // [2] zero before and after
  uint64_t* status;         // WaitStatus of the first push that failed; kWaitOk before
  DeviceRing ring;
  const uint64_t* waited;  // status of the armed wait before it, or null: no bank is free behind
                           // one that failed
  const int32_t* error;    // of the route: not 0: nothing but headers travels; or null
};

#ifdef __CUDACC__
struct Cta : device::Device {
  __device__ uint64_t index() const { return blockIdx.x; }
  __device__ uint64_t num_blocks() const { return gridDim.x; }
  __device__ uint64_t thread() const { return threadIdx.x; }
  __device__ uint64_t num_threads() const { return blockDim.x; }
  __device__ bool any(bool value) { return __syncthreads_or(value) != 0; }  // a barrier, too
  __device__ uint64_t arrive(uint64_t* word) {
    uint64_t before;
    asm volatile("atom.add.acq_rel.gpu.u64 %0, [%1], 1;" : "=l"(before) : "l"(word) : "memory");
    return before;
  }
  __device__ void add(uint64_t* word, uint64_t value) const {  // in any order
    atomicAdd(reinterpret_cast<unsigned long long*>(word), static_cast<unsigned long long>(value));
  }
};
#endif

// Source token, ids, weights and scales of one row, shared out to the block's threads.
template <class Block>
MOE_COMM_DEVICE inline void write_tail(const Block& block, const Arguments& a, uint64_t token,
                                       uint8_t* row) {
  if (a.scales != nullptr) {
    const uint8_t* from = a.scales + static_cast<int64_t>(token) * a.scale_token_stride;
    for (uint64_t i = block.thread(); i < a.num_scales * a.scale_item; i += block.num_threads()) {
      const uint64_t item = i / a.scale_item, byte = i - item * a.scale_item;
      row[a.scales_at + i] = from[static_cast<int64_t>(item) * a.scale_stride + byte];
    }
  }
  if (a.topk_idx == nullptr) return;
  if (block.thread() == 0) {
    *reinterpret_cast<int32_t*>(row + a.token_at) = static_cast<int32_t>(token);
  }
  for (uint64_t k = block.thread(); k < a.topk; k += block.num_threads()) {
    reinterpret_cast<int32_t*>(row + a.ids_at)[k] =
        static_cast<int32_t>(a.topk_idx[token * a.topk + k]);
    if (a.topk_weights != nullptr) {
      reinterpret_cast<float*>(row + a.weights_at)[k] = a.topk_weights[token * a.topk + k];
    }
  }
}

// One token to those of `lanes` in which it has a row: read once, in 16-byte accesses.
template <class Block>
MOE_COMM_DEVICE inline void pack_token(const Block& block, const Arguments& a, uint64_t token,
                                       const uint32_t* lanes, uint64_t num_lanes,
                                       uint64_t head_bytes) {
  const uint8_t* from = a.x + static_cast<int64_t>(token) * a.x_stride;
  const int32_t* rows = a.lane_rows + token * a.num_lanes;
  const auto row_in = [&](uint32_t lane) -> uint8_t* {  // null: it has none there
    uint8_t* window = rows[lane] < 0 ? nullptr : a.windows[lane];
    if (window == nullptr) return nullptr;
    return window + head_bytes + static_cast<uint64_t>(rows[lane] - a.starts[lane]) * a.row_bytes;
  };
  for (uint64_t i = block.thread() * 16; i < a.payload_bytes; i += block.num_threads() * 16) {
    const Words words = *reinterpret_cast<const Words*>(from + i);
    for (uint64_t l = 0; l < num_lanes; ++l) {
      if (uint8_t* row = row_in(lanes[l])) *reinterpret_cast<Words*>(row + i) = words;
    }
  }
  for (uint64_t l = 0; l < num_lanes; ++l) {
    if (uint8_t* row = row_in(lanes[l])) write_tail(block, a, token, row);
  }
}

// Whether the armed wait before this kernel ended well.
template <class Block>
MOE_COMM_DEVICE inline bool came(Block& block, const uint64_t* waited) {
  return waited == nullptr || block.load_acquire(waited) == kWaitOk;  // H6
}

// True in every thread of the block that came here last: then everything all blocks stored happens
// before what its threads do next.
template <class Block>
MOE_COMM_DEVICE inline bool is_last(Block& block, uint64_t* arrived) {
  block.any(false);
  const bool last =
      block.any(block.thread() == 0 && block.arrive(arrived) == block.num_blocks() - 1);
  if (last && block.thread() == 0) *arrived = 0;  // for the next launch; nobody else reads it now
  return last;
}

MOE_COMM_DEVICE inline bool is_left_out(const Link& link) {
  return link.channel == link.release_channel;
}

template <class Block>
MOE_COMM_DEVICE inline void push_link(Block& block, const DeviceRing& ring, const Link& link,
                                      uint64_t epoch, uint64_t num_bytes, uint64_t* status) {
  if (is_left_out(link)) return;
  const Transfer transfer{static_cast<uint32_t>(link.channel), static_cast<uint32_t>(epoch),
                          link.local_offset, link.remote_offset, num_bytes};
  const WaitStatus pushed = device::push(block, ring, transfer);
  if (pushed != kWaitOk) block.store_release(status, pushed);
}

// H7: all reads of this epoch's banks are done. Ranks of the node are told by a word, others by an
// immediate. By all threads of one block.
template <class Block>
MOE_COMM_DEVICE inline void release(Block& block, Counter* const* words, uint64_t num_words,
                                    const Link* links, uint64_t num_links, uint64_t epoch,
                                    const DeviceRing& ring, uint64_t* status) {
  for (uint64_t w = block.thread(); w < num_words; w += block.num_threads()) {
    if (words[w] != nullptr) block.store_release(words[w], epoch);
  }
  for (uint64_t l = block.thread(); l < num_links; l += block.num_threads()) {
    if (is_left_out(links[l])) continue;
    const Transfer transfer{static_cast<uint32_t>(links[l].release_channel),
                            static_cast<uint32_t>(epoch), 0, 0, 0};
    const WaitStatus pushed = device::push(block, ring, transfer);
    if (pushed != kWaitOk) block.store_release(status, pushed);
  }
}

MOE_COMM_DEVICE inline bool refused(const Arguments& a) {
  return a.error != nullptr && *a.error != 0;
}

// This block's share of the tokens; `is_last` of all.
template <class Block>
MOE_COMM_DEVICE inline bool pack_tokens(Block& block, const Arguments& a, const uint32_t* lanes,
                                        uint64_t num_lanes, uint64_t head_bytes,
                                        uint64_t* arrived) {
  for (uint64_t token = a.first_token + block.index(); token < a.last_token && !refused(a);
       token += block.num_blocks()) {
    pack_token(block, a, token, lanes, num_lanes, head_bytes);
  }
  return is_last(block, arrived);
}

template <class Block>
MOE_COMM_DEVICE inline void send(Block& block, const Arguments& a) {
  if (!came(block, a.waited)) return;
  if (pack_tokens(block, a, a.lanes, a.num_links, a.link_head_bytes, a.arrived)) {
    for (uint64_t l = block.thread(); l < a.num_links; l += block.num_threads()) {
      const uint32_t lane = a.lanes[l];
      const int32_t rows = refused(a) ? 0 : a.starts[a.num_lanes + lane] - a.starts[lane];
      push_link(block, a.ring, a.links[l], *a.epoch,
                a.link_head_bytes + static_cast<uint64_t>(rows) * a.row_bytes, a.status);
    }
  }
  if (pack_tokens(block, a, a.lanes + a.num_links, a.num_local, a.head_bytes, a.arrived + 1)) {
    for (uint64_t l = block.thread(); l < a.num_local; l += block.num_threads()) {
      if (a.commits[l] != nullptr) block.store_release(a.commits[l], *a.epoch);  // H1
    }
  }
}

#ifndef __CUDACC_RTC__
static_assert(sizeof(Arguments) == 34 * 8 + sizeof(DeviceRing) && sizeof(Link) == 32);
#endif

}  // namespace moe_comm::dispatch
