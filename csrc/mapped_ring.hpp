// A command ring in host memory that a GPU can map: the engine's end of abi.hpp's DeviceRing.
//
//   kernel ─command(H2)→ slots → proxy ─→ writes; or, of an armed wait, later ─(H5)→ a word
//
// The memory is one block of whole pages (cudaHostRegister takes it as it is) and holds the word
// `taken`, the abort word, the words of armed waits, times, and the slots. The two words of a ring
// that only producers use lie in their memory: reserved and taken_seen, both `first_ticket` at
// first.
//
// What ends a ring, ends it for good: its first fault is kept with its text, the abort word ends
// what its kernels wait for, and whatever is or will be armed ends with kWaitAborted. So a kernel
// that died, and left its command half-written, costs its own ring and nobody else's.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "abi.hpp"
#include "memory.hpp"
#include "ring.hpp"
#include "status.hpp"
#include "wait.hpp"

namespace moe_comm {

struct RingOptions {
  uint32_t num_slots = 4096;  // a power of two
  uint32_t num_words = 64;    // armed waits at a time, at most
  uint32_t num_times = 0;     // of waits that are timed
  double timeout_s = 300;     // of a wait for room, and of armed waits that say nothing else
  double silent_s = 30;       // a source whose heartbeat stopped is given up after that
  uint64_t first_ticket = 0;  // a multiple of 2 * num_slots
};

// What an armed wait waits for: what a channel number stands for in an Arm.
struct WaitSource {
  // As RowTarget has them: the newest complete epoch of each bank. Written by this proxy (rows of a
  // link) or by a rank of the node (its commit words).
  Counter* words[kNumBanks] = {nullptr, nullptr};
  uint32_t peer = ~0u;            // of the engine: lost, it will not come; ~0: none
  std::string who;                // "rank 7 (node 1)"
  Counter* beat{};                // [heartbeat word] of its rank, its blame behind; null: none
  const ProcessWatch* process{};  // of a rank of this host; null: not known
  uint32_t rank = ~0u;            // to be blamed; ~0: nobody
  uint32_t time_idx = ~0u;        // of MappedRing::times, where its wait is timed
  double extra_s = 0;             // it is waited for so much longer
  Counter* without_us = nullptr;  // not 0: that rank masked this one
  std::string lacks{};            // as Wait::lacks, of this one
};
struct Wait {
  std::string what;  // "dispatch"
  std::string who;   // waits: "rank 3"
  std::vector<WaitSource> sources;
  std::vector<uint32_t> channels;  // whose writes of the epoch's bank must have ended, too
  std::string lacks{};             // "header": what is not seen of a source
  bool timed = false;              // how long after it was armed its sources came
  // [ranks], or null: one that cannot be waited for is masked here, and the wait goes on without
  // it. Not 0: masked, by any wait or by the host.
  Counter* masks = nullptr;
  std::function<void(uint32_t)> masked{};  // told, in a turn, whom this wait masked
  // Told, in a turn, why one failed, and MappedRing::blamed.
  std::function<void(const Status&, uint64_t)> failed{};
};

struct RingStats {
  // torn: commands of which one word was seen before the other
  std::atomic<uint64_t> commands{0}, torn{0}, armed{0}, ended{0}, failed{0};
};

class MappedRing {
 public:
  static Result<std::shared_ptr<MappedRing>> create(const RingOptions& options);

  const RingOptions& options() const { return options_; }
  std::span<std::byte> memory() const { return memory_.bytes(); }
  ArmedWord* words() const { return words_; }
  // [num_times] nanoseconds, of the newest timed wait of each source; written before it is ended.
  uint64_t* times() const { return times_; }
  DeviceRing view(uint64_t* reserved, uint64_t* taken_seen) const;
  Status fault() const { return fault_.raised() ? fault_.status() : Status(); }
  uint64_t blamed() const { return blamed_.load(); }  // 1 + the rank that ended it; 0: nobody
  const RingStats& stats() const { return stats_; }

 private:
  friend class Proxy;  // what follows belongs to the holder of its turn

  struct Armed {
    Arm arm;
    size_t next = 0;  // sources before it are complete
    Clock::time_point start, deadline;
    uint64_t beat = ~0ull;  // of that source, as last seen
    Clock::time_point beat_at{}, watched_at{};
    uint64_t blamed = 0;     // as MappedRing::blamed
    uint32_t missing = ~0u;  // the rank that did not come, whoever is to blame; ~0: none
  };

  MappedRing(const RingOptions& options, Mapping memory);
  void end(uint32_t word_idx, WaitStatus status);
  void fail(Status status);  // the first one counts
  void end_all();            // of a ring that failed: every word

  RingOptions options_;
  Mapping memory_;
  RingControl* control_;
  Counter* abort_word_;
  ArmedWord* words_;
  uint64_t* times_;
  Command* slots_;
  RingConsumer consumer_;
  std::vector<Armed> armed_;    // capacity: num_words
  std::vector<char> is_armed_;  // [num_words]
  uint64_t torn_at_ = ~0ull;    // the ticket last seen torn
  Clock::time_point looked_{};  // over the whole ring
  uint64_t seen_next_ = ~0ull;  // then
  Clock::time_point moved_{};   // when `next` was last another
  Fault fault_;
  std::atomic<uint64_t> blamed_{0};
  RingStats stats_;
};

}  // namespace moe_comm
