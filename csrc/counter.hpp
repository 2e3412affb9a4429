// Immediates to counters: the receiver's table of rows, each of which publishes completed epochs
// into two words. H5.
//
// The immediate only says which row, which epoch modulo 64, and how many writes the message has;
// everything wide stands here. Immediates of one message come in any order, and those of two epochs
// (one per bank) may be mixed.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "abi.hpp"
#include "status.hpp"
#include "wait.hpp"

namespace moe_comm {

// Where a row's completed epochs go. The words and the doorbell outlive the row (the owner closes
// the row first).
struct RowTarget {
  Counter* words[kNumBanks] = {nullptr,
                               nullptr};  // words[b] = newest complete epoch with epoch % 2 == b
  Doorbell* bell = nullptr;
  std::string what;  // "rows of rank 3", for errors
};

class RowTable {  // used by the proxy thread only
 public:
  Result<uint32_t> open(RowTarget target, uint64_t first_epoch) {
    uint32_t row = 0;
    if (rows_.size() >= kImmediateRows)
      return Status(Code::kTransport, "no immediate rows left: restart the engine");
    row = static_cast<uint32_t>(rows_.size());
    Row entry;
    entry.target = std::move(target);
    entry.open = true;
    for (uint64_t e = first_epoch; e < first_epoch + kNumBanks; ++e)
      entry.expected[e % kNumBanks] = e;
    rows_.push_back(std::move(entry));
    return row;
  }
  // A row is never handed out again, so a late immediate of an old connection cannot count for a
  // new one.
  void close(uint32_t row) { rows_[row].open = false; }

  // One immediate arrived. The error, if any, is a protocol error of the row's peer.
  Status count(Immediate immediate) {
    if (immediate.row() >= rows_.size() || !rows_[immediate.row()].open) {
      ++dropped_;
      return {};
    }
    Row& row = rows_[immediate.row()];
    const uint32_t bank = immediate.epoch() % kNumBanks;
    const uint64_t epoch = row.expected[bank];
    if ((epoch & 63u) != immediate.epoch()) {
      return {Code::kTransport, row.target.what + ": an immediate of epoch " +
                                    std::to_string(immediate.epoch()) + " (mod 64), expected " +
                                    std::to_string(epoch & 63u) + " (epoch " +
                                    std::to_string(epoch) + ")"};
    }
    if (++row.arrived[bank] < immediate.num_writes()) return {};
    row.arrived[bank] = 0;
    row.expected[bank] = epoch + kNumBanks;
    word_at(*row.target.words[bank]).store(epoch, std::memory_order_release);  // H5
    if (row.target.bell) ring(*row.target.bell);
    return {};
  }
  uint64_t dropped() const { return dropped_; }

 private:
  struct Row {
    RowTarget target;
    bool open = false;
    uint32_t arrived[kNumBanks] = {0, 0};
    uint64_t expected[kNumBanks] = {0, 0};
  };
  std::vector<Row> rows_;
  uint64_t dropped_ = 0;
};

}  // namespace moe_comm
