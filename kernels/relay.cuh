// What a forwarder says, in a kernel: headers that came by links, on to the ranks of the node (a
// dispatch); this rank's header, to the rail peers whose tokens it adds results for (a combine).
//
// Behind headers.cuh's check, which has a verdict on each window that was read. Where all that an
// output is made of is good, it gets rows, and counts; else the first header that is not, as it is;
// with this rank's call beside it where they disagree in a combine; or, of one that nobody wrote, a
// header that says so. So every reader behind this rank learns what was wrong from whom
// (csrc/forward.cpp).
//
// In front of the kernel that writes the rows and tells the readers. Written over a `Block`.
#pragma once

#include "headers.cuh"

namespace moe_comm::relay {

using dispatch::Words;
using headers::Verdict;

// Everything is 8 bytes wide.
struct Arguments {
  const uint64_t* epoch;
  const uint64_t* waited;  // status of the armed wait before it
  const uint64_t* rounds;  // the most that a source takes, whatever is wrong with it, or null:
                           // readers hear of it even if they hear of no other source
  const uint8_t* const* sources;  // windows that were read
  const uint32_t* verdicts;       // [sources]
  const Header* damaged;          // [sources] instead of a damaged one, but for the epoch
  uint64_t outs_per_source;       // a dispatch: G; else 1
  uint64_t sources_per_out;       // a combine: G, or 0 where this rank refuses; else 1
  const Header* own;              // a combine: this rank's header; null: theirs is passed on
  const uint64_t* identity;       // for `own`, or null
  uint64_t tokens;                // likewise: T here
  uint64_t num_counts;      // of each output; behind its number of rows in the source's window
  uint64_t counts_bytes;    // in front of the rows there
  const uint32_t* rows;     // [num_outs]; null: the counts say it
  Header* staged;           // [num_outs] device memory
  uint8_t* const* windows;  // [num_outs]
  uint64_t num_outs;
  combine::Group* groups;  // [num_outs] where the sums of a combine go, or null
  uint64_t row_bytes;
  uint64_t table_rows;  // from the first sum of one group to that of the next
};

template <class Block>
MOE_COMM_DEVICE inline void pass_on(Block& block, const Arguments& a) {
  if (!dispatch::came(block, a.waited)) return;
  for (uint64_t o = block.index(); o < a.num_outs; o += block.num_blocks()) {
    const uint64_t first = o / a.outs_per_source * a.sources_per_out;
    uint64_t s = first;
    while (s < first + a.sources_per_out && a.verdicts[s] == headers::kGood) ++s;
    const bool good = s == first + a.sources_per_out;
    const Header* like = a.own;
    if (!good) {
      const auto* theirs = reinterpret_cast<const Header*>(a.sources[s]);
      like = a.verdicts[s] == headers::kDamaged ? a.damaged + s : theirs;
    } else if (like == nullptr) {
      like = reinterpret_cast<const Header*>(a.sources[first]);
    }
    const uint32_t* counts = nullptr;  // rows, then copies for each expert
    if (good && a.num_counts != 0) {
      counts = reinterpret_cast<const uint32_t*>(a.sources[first] + kHeaderBytes) +
               o % a.outs_per_source * (1 + a.num_counts);
    }
    Header& header = a.staged[o];
    auto* staged = reinterpret_cast<Words*>(&header);
    for (uint64_t i = block.thread(); i < kHeaderBytes / 16; i += block.num_threads())
      staged[i] = reinterpret_cast<const Words*>(like)[i];
    auto* there = reinterpret_cast<uint32_t*>(a.windows[o] + kHeaderBytes);
    for (uint64_t i = block.thread(); counts != nullptr && i < a.counts_bytes / 4;
         i += block.num_threads()) {
      there[i] = i < a.num_counts ? counts[1 + i] : 0;
    }
    block.any(false);
    if (block.thread() == 0) {
      header.rows = !good ? 0 : a.rows != nullptr ? a.rows[o] : counts[0];
      header.total_rows = counts != nullptr ? counts[0] : 0;
      if (a.rounds != nullptr && *a.rounds > header.rounds)
        header.rounds = static_cast<uint32_t>(*a.rounds);
      header.counts = counts == nullptr
                          ? 0
                          : headers::digest_of_counts(counts + 1, a.num_counts, a.counts_bytes);
      if (like == a.own) {
        header.epoch = *a.epoch;
        header.tokens = static_cast<uint32_t>(a.tokens);
        if (a.identity != nullptr) header.agreed.identity = *a.identity;
      } else if (!good && a.verdicts[s] == headers::kDamaged) {
        header.epoch = *a.epoch;
      } else if (!good && a.own != nullptr && header.status == kHeaderOk) {
        Disagreed mine{a.own->origin, a.own->kind, a.own->agreed};
        if (a.identity != nullptr) mine.agreed.identity = *a.identity;
        header.status = kHeaderDisagrees;
        for (uint64_t i = 0; i < kHeaderTextBytes; ++i) {
          header.text[i] = i < sizeof mine ? reinterpret_cast<const char*>(&mine)[i] : 0;
        }
      }
      if (a.groups != nullptr) {
        a.groups[o] = {a.windows[o] + kHeaderBytes, static_cast<int64_t>(a.row_bytes),
                       o * a.table_rows, header.rows};
      }
    }
    block.any(false);  // also: its fields are written before its words are read
    if (block.thread() == 0)
      header.check = header_digest(reinterpret_cast<const uint64_t*>(staged));
    block.any(false);
    for (uint64_t i = block.thread(); i < kHeaderBytes / 16; i += block.num_threads())
      reinterpret_cast<Words*>(a.windows[o])[i] = staged[i];
  }
}

#ifndef __CUDACC_RTC__
static_assert(sizeof(Arguments) == 20 * 8);
#endif

}  // namespace moe_comm::relay
