// The receiving half of a dispatch: forward (rows of a link window, on to ranks of the own node)
// and unpack (rows of a window, to their places). What kernels/forward.py and kernels/unpack.py do:
// each row is read once, in plain 16-byte loads (H6), and written to all its places.
//
// Started behind their armed waits: nobody in here waits. Behind one that failed they do nothing.
// The last block tells the reader that the rows are there (H1), or the writers that their banks are
// free (H7: all reads are done).
#pragma once

#include "dispatch.cuh"

namespace moe_comm::receive {

using dispatch::Words;

// Who is told, by the last block, that all blocks are done. Everything is 8 bytes wide.
struct Release {
  Counter* const* words;  // [num_words] of ranks of the node: set to `epoch`
  uint64_t num_words;
  const dispatch::Link* links;  // [num_links] others: by an immediate
  uint64_t num_links;
  const uint64_t* epoch;
  uint64_t* arrived;  // [1] zero before and after
  uint64_t* status;   // WaitStatus of the first push that failed
  DeviceRing ring;
  const uint64_t* waited;  // status of the armed wait before it, or null
};

// Strides and offsets in bytes.
struct Forward {
  const uint8_t* const* sources;  // [num_links] windows; whole rows are passed on
  uint64_t num_links, head_bytes;
  const uint32_t* num_rows;  // [num_links]
  uint64_t row_bytes;        // a multiple of 16
  const int32_t* table;  // [num_links, table_rows, G] the row's number for each local rank, or -1
  uint64_t table_rows;
  uint64_t node_ranks;      // G
  const int32_t* starts;    // [num_links, G] numbers at which the windows begin; null: 0
  uint8_t* const* windows;  // [num_links, G]
  uint64_t to_head_bytes;   // what lies in front of the rows there
  Release release;          // here: the windows are filled
};

struct Unpack {
  const uint8_t* const* windows;  // [num_sources]
  uint64_t num_sources, head_bytes;
  const uint32_t* num_rows;           // [num_sources]
  const uint32_t* starts;             // [num_sources] rows of lower sources
  uint64_t row_bytes, payload_bytes;  // multiples of 16
  const int32_t* positions;           // [n, J] places, or -1; null: the rows' order
  uint64_t num_positions;             // J
  uint8_t* out_x;                     // [P, payload_bytes], dense
  uint8_t* out_scales;                // [P, scale_bytes], dense, or null
  uint64_t scales_at, scale_bytes;
  Release release;  // the banks are free: all reads are done
};

template <class Block>
MOE_COMM_DEVICE inline void tell(Block& block, const Release& a) {
  if (!dispatch::is_last(block, a.arrived)) return;
  dispatch::release(block, a.words, a.num_words, a.links, a.num_links, *a.epoch, a.ring, a.status);
}

template <class Block>
MOE_COMM_DEVICE inline void forward(Block& block, const Forward& a) {
  if (!dispatch::came(block, a.release.waited)) return;
  for (uint64_t l = 0; l < a.num_links; ++l) {
    const uint8_t* rows = a.sources[l] + a.head_bytes;
    uint8_t* const* windows = a.windows + l * a.node_ranks;
    const int32_t* starts = a.starts == nullptr ? nullptr : a.starts + l * a.node_ranks;
    for (uint64_t row = block.index(); row < a.num_rows[l]; row += block.num_blocks()) {
      const int32_t* to = a.table + (l * a.table_rows + row) * a.node_ranks;
      for (uint64_t at = block.thread() * 16; at < a.row_bytes; at += block.num_threads() * 16) {
        const Words words = *reinterpret_cast<const Words*>(rows + row * a.row_bytes + at);
        for (uint64_t g = 0; g < a.node_ranks; ++g) {
          if (to[g] < 0) continue;
          const auto number = static_cast<uint64_t>(to[g] - (starts == nullptr ? 0 : starts[g]));
          const uint64_t place = a.to_head_bytes + number * a.row_bytes;
          *reinterpret_cast<Words*>(windows[g] + place + at) = words;
        }
      }
    }
  }
  tell(block, a.release);
}

template <class Block>
MOE_COMM_DEVICE inline void unpack_row(const Block& block, const Unpack& a, const uint8_t* from,
                                       uint64_t row) {
  const uint64_t num_places = a.positions == nullptr ? 1 : a.num_positions;
  const auto place = [&](uint64_t j) {
    return a.positions == nullptr ? static_cast<int64_t>(row) : a.positions[row * num_places + j];
  };
  for (uint64_t at = block.thread() * 16; at < a.payload_bytes; at += block.num_threads() * 16) {
    const Words words = *reinterpret_cast<const Words*>(from + at);
    for (uint64_t j = 0; j < num_places; ++j) {
      const int64_t to = place(j);
      if (to < 0) continue;
      *reinterpret_cast<Words*>(a.out_x + static_cast<uint64_t>(to) * a.payload_bytes + at) = words;
    }
  }
  if (a.out_scales == nullptr) return;
  for (uint64_t i = block.thread(); i < a.scale_bytes; i += block.num_threads()) {
    for (uint64_t j = 0; j < num_places; ++j) {
      const int64_t to = place(j);
      if (to < 0) continue;
      a.out_scales[static_cast<uint64_t>(to) * a.scale_bytes + i] = from[a.scales_at + i];
    }
  }
}

template <class Block>
MOE_COMM_DEVICE inline void unpack(Block& block, const Unpack& a) {
  if (!dispatch::came(block, a.release.waited)) return;
  for (uint64_t s = 0; s < a.num_sources; ++s) {
    const uint8_t* rows = a.windows[s] + a.head_bytes;
    for (uint64_t i = block.index(); i < a.num_rows[s]; i += block.num_blocks()) {
      unpack_row(block, a, rows + i * a.row_bytes, a.starts[s] + i);
    }
  }
  tell(block, a.release);
}

#ifndef __CUDACC_RTC__
static_assert(sizeof(Release) == 8 * 8 + sizeof(DeviceRing));
static_assert(sizeof(Forward) == 11 * 8 + sizeof(Release) &&
              sizeof(Unpack) == 13 * 8 + sizeof(Release));
#endif

}  // namespace moe_comm::receive
