// The proxy: one host thread that drives the transports of a rank. ring -> post -> poll ->
// counters.
//
// Others reach it in three ways: command rings (its own for the CPU's exchange, attached ones for
// GPUs; no lock, H2), submit() (user writes), and run() (register, connect, ...). It spins, then
// yields, then sleeps on an event, so that four ranks on two cores do not starve each other. Each
// peer has its own pending list: one stalled peer never stops the others. In the steady state its
// loop allocates nothing.
//
// NOTE [turns] One pass of that loop is a *turn*, and whoever holds turn_mutex_ may take one: the
// transport is used by one thread at a time. A thread that waits for the proxy takes turns itself
// while it would spin anyway (help()), and the proxy's thread steps aside meanwhile: between
// threads, a hand-over costs more than a small write (2026-11-21, 2 cores, 8 B over tcp: 22 us with
// hand-overs, 6 us by the transport alone). The thread stays responsible for everything nobody
// waits for.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "abi.hpp"
#include "counter.hpp"
#include "mapped_ring.hpp"
#include "memory.hpp"
#include "ring.hpp"
#include "status.hpp"
#include "transport.hpp"
#include "wait.hpp"

namespace moe_comm {

struct ProxyOptions {
  uint64_t shard_bytes =
      0;  // split messages into writes of at least this many bytes; 0: only where they must be
  double heartbeat_s = 0.05;  // how often the heartbeat words are bumped
  double beat_write_s = 1.0;  // how often they are written to link peers
  double ring_spin_s =
      0.002;  // no sleep so soon after the last event while GPUs' rings are attached
};

// A user's write, possibly several work requests. Ends once: with ok, or with the first error.
class Operation {
 public:
  // keep: whatever must live until the last write ended (regions)
  Operation(uint32_t num_writes, std::shared_ptr<void> keep)
      : remaining_(num_writes), keep_(std::move(keep)) {}
  void finish_one(const Status& status);
  bool done() const;
  Status status() const;      // of a finished operation
  bool wait(double seconds);  // true: done

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  uint32_t remaining_;
  Status status_;
  std::shared_ptr<void> keep_;
};

// One direction to one window of one peer: what a Command's channel number stands for.
struct Channel {
  uint32_t peer = 0;
  const MemoryRegion* local = nullptr;
  RemoteRegion remote;
  uint32_t immediate_row = 0;  // of the peer's table
  Counter* sent[kNumBanks] = {
      nullptr, nullptr};  // messages of this bank whose local bytes may be reused, or null
  Doorbell* bell = nullptr;
  std::shared_ptr<const void> keep{};  // whatever `local` needs
};

// A heartbeat word and where it is written to.
struct Heartbeat {
  Counter* word = nullptr;    // [heartbeat word]
  uint64_t local_offset = 0;  // of the word in the channels' local region; 16 bytes are written
  uint64_t remote_offset = 0;
  std::vector<uint32_t> channels;  // one for each link peer
};

enum class PeerState : uint32_t { kConnecting, kReady, kLost };

struct ProxyStats {
  std::atomic<uint64_t> writes{0}, bytes{0}, immediates{0}, commands{0}, loops{0}, sleeps{0},
      helped{0};
};

class Proxy {
 public:
  Proxy(std::unique_ptr<Transport> transport, const ProxyOptions& options);
  ~Proxy();
  Proxy(const Proxy&) = delete;

  // --- from any thread -----------------------------------------------------
  const Info& info() const { return transport_->info(); }
  // Pushes one command; waits while the ring is full, at most `seconds`.
  Status push(const Transfer& transfer, double seconds);
  void run(const std::function<void()>& function);  // in a turn of its own; nothing once it ended
  // Takes turns until `ready()`, or until a waiter should sleep; true: ready. At most `seconds`.
  template <typename Ready>
  bool help(double seconds, Ready&& ready);
  Result<MemoryRegion> register_memory(std::span<std::byte> bytes, DmaBuf dmabuf = {});
  Result<uint32_t> connect(const Address& address);
  void disconnect(uint32_t peer);
  PeerState peer_state(uint32_t peer) const;
  Status peer_status(uint32_t peer) const;
  Result<uint32_t> open_channel(Channel channel);
  void close_channel(uint32_t channel);
  Result<uint32_t> open_row(RowTarget target, uint64_t first_epoch);
  void close_row(uint32_t row);
  // --- rings of GPUs: proxy_rings.cpp
  Status attach(const std::shared_ptr<MappedRing>& ring);
  void detach(const std::shared_ptr<MappedRing>& ring);  // ends what is armed; its memory stays
  // The channel number that an Arm names; the words of its sources outlive it.
  Result<uint32_t> open_wait(Wait wait);
  // ---
  // In a turn: the 8 bytes at `local_offset` of a channel's local region, once, whatever comes of
  // it.
  void write_word(uint32_t channel, uint64_t local_offset, uint64_t remote_offset);
  uint64_t add_heartbeat(Heartbeat heartbeat);
  void remove_heartbeat(uint64_t id);
  // Writes every heartbeat to its targets at once: a state changed. Null if there is none.
  std::shared_ptr<Operation> beat_now();
  struct UserWrite {
    uint32_t peer;
    const MemoryRegion* local;
    uint64_t local_offset, num_bytes;
    const RemoteRegion* remote;
    uint64_t remote_offset;
    bool has_immediate;
    uint32_t immediate;
  };
  // One operation for all of them; `keep` owns their regions.
  std::shared_ptr<Operation> submit(std::vector<UserWrite> writes, std::shared_ptr<void> keep);
  bool wait(Operation& operation, double seconds);  // true: done
  // Waits until `value` was counted `count` times since the last take, then takes them off.
  bool take_immediates(uint32_t value, uint64_t count, double seconds);
  uint64_t count_immediates(uint32_t value) const;
  // Waits until more than `seen` user immediates arrived since the proxy began, of any value;
  // returns how many did.
  uint64_t wait_immediates(uint64_t seen, double seconds);
  bool all_sent(std::span<const uint32_t> channels);  // whose commands were taken
  Status fault() const { return fault_.raised() ? fault_.status() : Status(); }
  const ProxyStats& stats() const { return stats_; }
  uint64_t dropped_immediates();
  void stop();  // drains what is in flight, bounded, then ends the thread

 private:
  struct Write {  // one work request, waiting or in flight
    uint32_t peer = 0;
    uint32_t channel = kNoChannel;
    uint32_t bank = 0;
    const MemoryRegion* local = nullptr;
    uint64_t local_offset = 0, num_bytes = 0, remote_offset = 0;
    const RemoteRegion* remote = nullptr;
    bool has_immediate = false;
    Immediate immediate{};
    std::shared_ptr<Operation> operation;
  };
  struct Peer {
    PeerId id{};
    std::atomic<PeerState> state{PeerState::kConnecting};
    Fault lost;
    std::deque<Write> pending;
    bool queued = false;     // in with_pending_
    uint32_t in_flight = 0;  // writes
  };
  struct ChannelState {
    Channel channel;
    bool open = false;
    uint32_t unsent[kNumBanks] = {0, 0};     // writes not yet completed
    uint64_t completed[kNumBanks] = {0, 0};  // messages
    bool is_wait = false;                    // what the number stands for; then never open
    std::unique_ptr<Wait> wait{};            // until it is closed
  };
  static constexpr uint32_t kNoChannel = ~0u;
  static constexpr uint32_t kRingSlots = 4096;

  void body() noexcept;
  bool turn();
  bool try_turn();                                 // true: something happened
  bool hand_over(std::function<void()> function);  // for the next turn; false: has ended
  void step_aside();
  bool take_commands();
  bool serve_rings();
  bool take_commands(MappedRing& ring, Clock::time_point now);
  Status begin(MappedRing& ring, const Command& command, Clock::time_point now);
  bool look_at_waits(MappedRing& ring, Clock::time_point now);
  std::optional<WaitStatus> look_at(MappedRing& ring, MappedRing::Armed& armed,
                                    Clock::time_point now, Status& why);
  std::optional<WaitStatus> look_at_next(MappedRing& ring, MappedRing::Armed& armed,
                                         Clock::time_point now, Status& why);
  std::string why_lost(const WaitSource& source, MappedRing::Armed& armed,
                       const RingOptions& options, Clock::time_point now) const;
  std::string describe(const Wait& wait, const MappedRing::Armed& armed, Clock::time_point now,
                       const std::string& missing) const;
  void look_over(MappedRing& ring, Clock::time_point now);
  bool rings_have_commands() const;
  bool rings_wait() const;
  bool run_functions();
  bool post_pending();
  uint32_t count_postable() const;
  bool poll_transport(bool arm);
  void beat();
  void sleep();
  bool has_work(const std::unique_lock<std::mutex>& turn);
  void awake();
  void wake();
  void enqueue(Write write);
  uint64_t shard_bytes(uint64_t num_bytes) const;
  void begin_transfer(const Transfer& transfer);
  void finish(Write& write, const Status& status);
  void lose(uint32_t peer, Status status);
  void write_beats(const std::shared_ptr<Operation>& operation = nullptr);

  std::mutex turn_mutex_;  // NOTE [turns]
  std::atomic<uint32_t> turn_wanted_{
      0};                               // threads that wait for it; the proxy's lets them go first
  std::atomic<uint32_t> helping_{0};    // threads in help()
  std::atomic<bool> helped_{false};     // with success, a moment ago
  std::atomic<uint32_t> num_rings_{0};  // of rings_, for the proxy's thread between turns
  bool armed_ = false;                  // the proxy's thread sleeps until the transport wakes it

  // From here to the heartbeats, all but options_ and producer_ belongs to the turn's holder.
  std::unique_ptr<Transport> transport_;
  ProxyOptions options_;
  HostRing ring_{kRingSlots};
  RingProducer producer_{ring_.producer()};
  RingConsumer consumer_{ring_.consumer()};
  std::vector<std::shared_ptr<MappedRing>> rings_;
  RowTable rows_;
  mutable std::mutex peers_mutex_;  // growing peers_ against readers on other threads
  std::deque<Peer> peers_;          // stable addresses
  std::deque<ChannelState> channels_;
  std::vector<Write> in_flight_;
  std::vector<uint32_t> free_slots_;
  std::vector<uint32_t> with_pending_;  // peers
  std::array<Completion, 64> completions_;
  std::unordered_map<uint32_t, uint32_t> peer_of_id_;
  struct Beat {
    uint64_t id;
    Heartbeat heartbeat;
  };
  std::vector<Beat> heartbeats_;
  uint64_t next_heartbeat_ = 0;
  Clock::time_point last_beat_{}, last_beat_write_{};

  mutable std::mutex functions_mutex_;
  std::vector<std::function<void()>> functions_;
  std::atomic<bool> has_functions_{false};

  mutable std::mutex user_mutex_;
  std::condition_variable user_changed_;
  std::unordered_map<uint32_t, uint64_t> user_counts_;
  uint64_t user_total_ = 0;  // ever

  Fault fault_;
  ProxyStats stats_;
  FileDescriptor event_;
  std::atomic<bool> sleeping_{false};
  uint32_t naps_ = 0;  // since something last happened
  std::atomic<bool> slot_lost_{false};
  std::atomic<bool> stop_{false};
  std::atomic<bool> ended_{false};
  std::thread thread_;
};

template <typename Ready>
bool Proxy::help(double seconds, Ready&& ready) {
  helping_.fetch_add(1, std::memory_order_relaxed);
  const auto start = Clock::now();
  bool done = ready();
  for (Backoff backoff(64, 128); !done && !backoff.should_sleep(); done = ready()) {
    if (!try_turn())
      backoff.step();
    else if (seconds_since(start) < seconds)
      backoff.reset();
    else
      break;
  }
  helped_.store(done, std::memory_order_relaxed);
  const bool last = helping_.fetch_sub(1, std::memory_order_relaxed) == 1;
  if (!done && last) wake();  // nobody looks any more
  return done;
}

}  // namespace moe_comm
