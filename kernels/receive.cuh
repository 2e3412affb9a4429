// The receiving half of a dispatch: forward (rows of a link window, on to ranks of the own node)
// and unpack (rows of a window, to their places). What kernels/forward.py and kernels/unpack.py do:
// each row is read once, in plain 16-byte loads (H6), and written to all its places.
//
// Started behind their armed waits: nobody in here waits. Behind one that failed they do nothing.
// The last block tells the reader that the rows are there (H1), or the writer that its bank is free
// (H7: all reads are done).
#pragma once

#include "dispatch.cuh"

namespace moe_comm::receive {

using dispatch::Words;

// Everything is 8 bytes wide. Strides and offsets in bytes.
struct Forward {
  const uint8_t* rows;       // of the link window; whole rows are passed on
  const uint32_t* num_rows;  // in device memory or in the window's header
  uint64_t row_bytes;        // a multiple of 16
  const int32_t* table;      // [n, G] the row's number for each local rank, or -1
  uint64_t node_ranks;       // G
  const int32_t* starts;     // [G] numbers at which the windows begin
  uint8_t* const* windows;   // [G]
  Counter* const* words;     // [num_words] set to `epoch` at the end
  uint64_t num_words, epoch;
  uint64_t* arrived;       // [1] zero before and after
  const uint64_t* waited;  // status of the armed wait before it, or null
};

struct Unpack {
  const uint8_t* rows;
  const uint32_t* num_rows;
  uint64_t row_bytes, payload_bytes;  // multiples of 16
  const int32_t* positions;           // [n, J] places, or -1
  uint64_t num_positions;             // J
  uint8_t* out_x;                     // [P, payload_bytes], dense
  uint8_t* out_scales;                // [P, scale_bytes], dense, or null
  uint64_t scales_at, scale_bytes;
  Counter* const* words;  // [num_words] set to `epoch` at the end: the bank is free
  uint64_t num_words, epoch;
  uint64_t* arrived;
  const uint64_t* waited;
};

template <class Block>
MOE_COMM_DEVICE inline void tell(Block& block, Counter* const* words, uint64_t num_words,
                                 uint64_t epoch, uint64_t* arrived) {
  if (!dispatch::is_last(block, arrived)) return;
  for (uint64_t w = block.thread(); w < num_words; w += block.num_threads()) {
    block.store_release(words[w], epoch);
  }
}

template <class Block>
MOE_COMM_DEVICE inline void forward(Block& block, const Forward& a) {
  if (!dispatch::came(block, a.waited)) return;
  for (uint64_t row = block.index(); row < *a.num_rows; row += block.num_blocks()) {
    const int32_t* to = a.table + row * a.node_ranks;
    for (uint64_t at = block.thread() * 16; at < a.row_bytes; at += block.num_threads() * 16) {
      const Words words = *reinterpret_cast<const Words*>(a.rows + row * a.row_bytes + at);
      for (uint64_t g = 0; g < a.node_ranks; ++g) {
        if (to[g] < 0) continue;
        const uint64_t place = static_cast<uint64_t>(to[g] - a.starts[g]) * a.row_bytes;
        *reinterpret_cast<Words*>(a.windows[g] + place + at) = words;
      }
    }
  }
  tell(block, a.words, a.num_words, a.epoch, a.arrived);
}

template <class Block>
MOE_COMM_DEVICE inline void unpack(Block& block, const Unpack& a) {
  if (!dispatch::came(block, a.waited)) return;
  for (uint64_t row = block.index(); row < *a.num_rows; row += block.num_blocks()) {
    const int32_t* places = a.positions + row * a.num_positions;
    const uint8_t* from = a.rows + row * a.row_bytes;
    for (uint64_t at = block.thread() * 16; at < a.payload_bytes; at += block.num_threads() * 16) {
      const Words words = *reinterpret_cast<const Words*>(from + at);
      for (uint64_t j = 0; j < a.num_positions; ++j) {
        if (places[j] < 0) continue;
        const uint64_t place = static_cast<uint64_t>(places[j]) * a.payload_bytes;
        *reinterpret_cast<Words*>(a.out_x + place + at) = words;
      }
    }
    if (a.out_scales == nullptr) continue;
    for (uint64_t i = block.thread(); i < a.scale_bytes; i += block.num_threads()) {
      for (uint64_t j = 0; j < a.num_positions; ++j) {
        if (places[j] < 0) continue;
        a.out_scales[static_cast<uint64_t>(places[j]) * a.scale_bytes + i] = from[a.scales_at + i];
      }
    }
  }
  tell(block, a.words, a.num_words, a.epoch, a.arrived);
}

#ifndef __CUDACC_RTC__
static_assert(sizeof(Forward) == 12 * 8 && sizeof(Unpack) == 15 * 8);
#endif

}  // namespace moe_comm::receive
