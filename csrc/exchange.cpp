#include "exchange.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

namespace moe_comm {
namespace {
constexpr double kGoodbye = 0.5;      // seconds close() waits for its last words to leave
constexpr double kSlice = 0.05;       // seconds between looks at the peer waited for
constexpr double kClosedGrace = 1.0;  // seconds for the last writes of a rank that said goodbye
constexpr double kFailedGrace = 0.5;  // and of one that gave up: its peers are to know in time
constexpr uint64_t kBeatAt = 64;      // offset of the own heartbeat word; the doorbell lies at 0
constexpr uint64_t kBlameAt = sizeof(Counter);  // of the blame word, from a heartbeat word

uint32_t digest_of_counts(std::span<const std::byte> counts) {  // a multiple of 8 bytes
  if (counts.empty()) return 0;
  uint64_t digest = kDigestSeed, word = 0;
  for (size_t at = 0; at < counts.size(); at += sizeof word) {
    std::memcpy(&word, counts.data() + at, sizeof word);
    digest = mix_digest(digest, word);
  }
  return counts_digest(digest);
}

uint64_t digest_of(const Header& header) {
  uint64_t words[kHeaderWords];
  std::memcpy(words, &header, sizeof words);
  return header_digest(words);
}
}  // namespace

void seal(Header& header, std::span<const std::byte> counts) {
  header.counts = digest_of_counts(counts);
  header.check = digest_of(header);
}

bool is_sealed(const Header& header) { return header.check == digest_of(header); }

bool is_sealed(const Header& header, std::span<const std::byte> counts) {
  return is_sealed(header) && (header.counts == 0 || header.counts == digest_of_counts(counts));
}

// --- construction --------------------------------------------------------------------------------

Result<std::unique_ptr<Exchange>> Exchange::create(Engine& engine, GroupShape shape,
                                                   WindowOffsets offsets, uint64_t first_epoch,
                                                   WindowMemory windows) {
  std::unique_ptr<Exchange> self(
      new Exchange(engine, std::move(shape), offsets, first_epoch, windows));
  if (Status status = self->init(); !status.ok()) return status;
  return self;
}

Exchange::Exchange(Engine& engine, GroupShape shape, WindowOffsets offsets, uint64_t first_epoch,
                   WindowMemory windows)
    : engine_(engine),
      shape_(std::move(shape)),
      offsets_(offsets),
      my_node_(shape_.node_of[shape_.rank]),
      my_local_(shape_.local_of[shape_.rank]),
      num_lanes_(shape_.hops_node ? shape_.node_ranks + shape_.num_nodes : shape_.num_ranks),
      windows_(windows),
      peers_(shape_.num_ranks),
      links_(shape_.num_ranks),
      first_epoch_(first_epoch),
      next_epoch_(first_epoch) {
  for (uint32_t r = 0; r < shape_.num_ranks; ++r) {
    const uint32_t node_lane =
        is_local(r) ? shape_.local_of[r] : shape_.node_ranks + shape_.node_of[r];
    const auto lane = static_cast<int32_t>(shape_.hops_node ? node_lane : r);
    lane_of_rank_.push_back(shape_.absent[r] ? -1 : lane);
  }
}

Status Exchange::init() {
  auto segment = SharedSegment::create("moe_comm:windows", offsets_.segment);
  if (!segment.ok()) return segment.status();
  segment_ = std::move(segment.value());
  base_ = segment_.data();
  auto region = engine_.proxy().register_memory(segment_.bytes());
  if (!region.ok()) return region.status();
  region_ = std::move(region.value());
  if (windows_.linked) {
    auto registered = engine_.proxy().register_memory(windows_.bytes, windows_.dmabuf);
    if (!registered.ok()) return registered.status();
    window_region_ = std::move(registered.value());
  }
  // Every word starts as if the two epochs before the first had been released, and no epoch had
  // come.
  for (uint64_t e = first_epoch_; e < first_epoch_ + kNumBanks; ++e) {
    const uint64_t before = e - kNumBanks;
    for (uint32_t i = 0; i < shape_.num_ranks + shape_.num_nodes; ++i)
      commit_word(base_, e, i) = before;
    for (uint32_t r = 0; r < shape_.num_ranks; ++r) release_word(base_, e, r) = before;
  }
  forwarded_until_ = first_epoch_ - 1;
  peers_[shape_.rank].base = base_;
  peers_[shape_.rank].windows = windows_.bytes.empty() ? base_ : windows_.bytes.data();
  return {};
}

Result<Exchange::Rows> Exchange::open_rows(uint32_t rank) {
  const std::string who = "rank " + std::to_string(rank);
  const uint32_t index = shape_.hops_node ? shape_.num_ranks + shape_.node_of[rank] : rank;
  RowTarget window{{&commit_word(base_, 0, index), &commit_word(base_, 1, index)},
                   &bell(base_),
                   "rows of " + who};
  RowTarget release{{&release_word(base_, 0, rank), &release_word(base_, 1, rank)},
                    &bell(base_),
                    "releases of " + who};
  auto window_row = engine_.proxy().open_row(std::move(window), first_epoch_);
  if (!window_row.ok()) return window_row.status();
  auto release_row = engine_.proxy().open_row(std::move(release), first_epoch_);
  if (!release_row.ok()) return release_row.status();
  links_[rank].rows = {window_row.value(), release_row.value()};
  links_[rank].rows_open = true;
  return links_[rank].rows;
}

Status Exchange::map_peer(uint32_t rank, const SegmentName& name, std::byte* windows) {
  auto segment = SharedSegment::open(name);
  if (!segment.ok())
    return segment.status().with_prefix("windows of rank " + std::to_string(rank) + ": ");
  auto process = ProcessWatch::open(name.pid);
  if (!process.ok()) return process.status();
  peers_[rank].segment = std::move(segment.value());
  peers_[rank].base = peers_[rank].segment.data();
  peers_[rank].windows = windows != nullptr ? windows : peers_[rank].base;
  peers_[rank].process = std::move(process.value());
  return {};
}

Status Exchange::link_peer(uint32_t rank, uint32_t engine_peer, const RemoteRegion& region,
                           const RemoteRegion& window_region, Rows rows) {
  Link& link = links_[rank];
  link.engine_peer = engine_peer;
  if (shape_.hops_node) {
    // offsets_.links is laid out by node with the owner's own node left out; likewise the send
    // regions
    link.window_offset =
        offsets_.links + 2 * offsets_.stride * link_index(my_node_, shape_.node_of[rank]);
    link.send_offset =
        offsets_.sends + 2 * offsets_.stride * link_index(shape_.node_of[rank], my_node_);
  } else {
    link.window_offset = offsets_.far_slots + 2 * offsets_.stride * far_index(shape_.rank, rank);
    link.send_offset = offsets_.sends + 2 * offsets_.stride * far_index(rank, shape_.rank);
  }
  Channel window{engine_peer,
                 &of_windows(),
                 window_region,
                 rows.window,
                 {&sent_word(0, rank), &sent_word(1, rank)},
                 &bell(base_)};
  Channel release{engine_peer, &region_, region, rows.release, {nullptr, nullptr}, nullptr};
  auto window_channel = engine_.proxy().open_channel(std::move(window));
  if (!window_channel.ok()) return window_channel.status();
  auto release_channel = engine_.proxy().open_channel(std::move(release));
  if (!release_channel.ok()) return release_channel.status();
  link.window_channel = window_channel.value();
  link.release_channel = release_channel.value();
  link.present = linked_ = true;
  return {};
}

void Exchange::start() {
  Heartbeat heartbeat;
  heartbeat.word = &beat_word(base_);
  heartbeat.local_offset = kBeatAt;
  heartbeat.remote_offset = offsets_.beats + 16ull * shape_.rank;
  for (const Link& link : links_) {
    if (link.present) heartbeat.channels.push_back(link.release_channel);
  }
  heartbeat_ = engine_.proxy().add_heartbeat(std::move(heartbeat));
  started_ = true;
  if (shape_.hops_node && shape_.num_nodes > 1) forwarder_ = std::thread([this] { forwarder(); });
}

// NOTE [late writes] A peer that was given up may go on with a write it had begun. Its NIC or our
// kernel turns away what comes for memory that is no longer registered; libfabric over tcp looks
// once, when a message begins, and copies the rest of it to where the window was (seen: SIGSEGV
// after a recovery). So those addresses stay good unless all said goodbye, which drains.
Exchange::~Exchange() {
  (void)close(0);
  bool late = false;
  for (uint32_t r = 0; r < shape_.num_ranks; ++r)
    late |= links_[r].present && (beat_of(r) & 15u) != kClosed;
  for (const uint32_t wait : waits_) engine_.proxy().close_channel(wait);
  for (const Link& link : links_) {
    if (link.present) {
      engine_.proxy().close_channel(link.window_channel);
      engine_.proxy().close_channel(link.release_channel);
    }
    if (link.rows_open) {
      engine_.proxy().close_row(link.rows.window);
      engine_.proxy().close_row(link.rows.release);
    }
  }
  for (const Link& link : links_) {
    if (link.present) engine_.proxy().disconnect(link.engine_peer);
  }
  engine_.proxy().run([this] { region_ = window_region_ = MemoryRegion{}; });
  if (late) segment_.retire();
}

// What others still need of us has left before we say goodbye: rows to forward, sums to pass on,
// writes in flight.
Status Exchange::drain(double seconds) {
  const auto start = Clock::now();
  Backoff backoff;
  while (word_at(forwarded_until_).load(std::memory_order_acquire) + 1 < next_epoch_ &&
         !fault_.raised()) {
    if (seconds_since(start) > seconds) {
      return {Code::kPeerTimeout, "close: the forwarder still waits for rows of epoch " +
                                      std::to_string(forwarded_until_ + 1) + " after " +
                                      std::to_string(seconds) + " s"};
    }
    sleep_on(bell(base_), 0.01, [] { return false; });
  }
  for (uint32_t r = 0; r < shape_.num_ranks; ++r) {
    for (uint64_t bank = 0; links_[r].present && bank < kNumBanks; ++bank) {
      while (word_at(sent_word(bank, r)).load(std::memory_order_acquire) < links_[r].pushed[bank] &&
             engine_.proxy().peer_state(links_[r].engine_peer) == PeerState::kReady) {
        if (seconds_since(start) > seconds) {
          return {Code::kPeerTimeout, "close: rows to rank " + std::to_string(r) +
                                          " were still in flight after " + std::to_string(seconds) +
                                          " s"};
        }
        backoff.step();
      }
    }
    const std::array channels{links_[r].window_channel};  // what kernels pushed
    while (!waits_.empty() && links_[r].present && !engine_.proxy().all_sent(channels) &&
           engine_.proxy().peer_state(links_[r].engine_peer) == PeerState::kReady &&
           seconds_since(start) <= seconds) {
      backoff.step();
    }
  }
  return {};
}

Status Exchange::close(double seconds) {
  if (closing_.exchange(true)) return {};
  Status drained;
  if (started_ && !fault_.raised()) drained = drain(seconds);
  closed_.store(true);
  if (started_) {
    word_at(beat_word(base_))
        .fetch_or(fault_.raised() ? kFailed : kClosed, std::memory_order_release);
    // Peers hear it before they see the connection end.
    if (auto goodbye = engine_.proxy().beat_now()) engine_.proxy().wait(*goodbye, kGoodbye);
    for (const Peer& peer : peers_) {
      if (peer.base) ring(bell(peer.base));
    }
    engine_.proxy().remove_heartbeat(heartbeat_);
  }
  {
    std::lock_guard lock(work_mutex_);
    stop_ = true;
  }
  work_changed_.notify_all();
  if (base_) ring(bell(base_));  // there are no windows if init() failed
  if (forwarder_.joinable()) forwarder_.join();
  return drained;
}

void Exchange::fail(const Status& status) {
  fault_.raise(status);
  if (!started_) return;
  say_failed();
  engine_.proxy().beat_now();
}

void Exchange::say_failed() {
  auto* word = reinterpret_cast<Counter*>(base_ + kBeatAt + kBlameAt);
  word_at(*word).store(blamed_.load(), std::memory_order_relaxed);
  word_at(beat_word(base_)).fetch_or(kFailed, std::memory_order_release);
  for (const Peer& peer : peers_) {
    if (peer.base) ring(bell(peer.base));
  }
}

std::vector<bool> Exchange::absent() const {
  std::vector<bool> absent = shape_.absent;
  for (uint32_t r = 0; r < shape_.num_ranks; ++r) {
    if (word_at(mask_word(r)).load(std::memory_order_acquire) != 0) absent[r] = true;
  }
  return absent;
}

std::vector<bool> Exchange::lost() const {
  std::vector<bool> lost = absent();
  for (uint32_t r = 0; r < shape_.num_ranks; ++r) {
    if (r == shape_.rank || lost[r]) continue;
    const uint64_t beat = beat_of(r);
    lost[r] = (beat & 15u) == kClosed || (peers_[r].base && peers_[r].process.ended()) ||
              (links_[r].present &&
               engine_.proxy().peer_state(links_[r].engine_peer) == PeerState::kLost);
  }
  return lost;
}

// --- places --------------------------------------------------------------------------------------

std::byte* Exchange::slot(uint32_t reader, uint32_t index, uint64_t epoch) const {
  const auto window = [&](std::byte* first, uint64_t number) {
    return first + offsets_.stride * (2 * number + epoch % kNumBanks);
  };
  if (shape_.hops_node) return window(peers_[reader].windows + offsets_.slots, index);
  if (shape_.node_of[index] == shape_.node_of[reader])
    return window(peers_[reader].windows + offsets_.slots, shape_.local_of[index]);
  return window(far_windows() + offsets_.far_slots, far_index(index, reader));  // of this rank
}

// Among the ranks of other nodes than the reader's.
uint32_t Exchange::far_index(uint32_t rank, uint32_t reader) const {
  uint32_t index = 0;
  for (uint32_t r = 0; r < rank; ++r) index += shape_.node_of[r] == shape_.node_of[reader] ? 0 : 1;
  return index;
}

std::byte* Exchange::link_window(uint32_t node, uint64_t epoch) const {
  return far_windows() + offsets_.links +
         offsets_.stride * (2ull * link_index(node, my_node_) + epoch % kNumBanks);
}

std::byte* Exchange::send_region(const Link& link, uint64_t epoch) const {
  return far_windows() + link.send_offset + offsets_.stride * (epoch % kNumBanks);
}

uint32_t Exchange::rail_peer(uint32_t node) const {
  return shape_.rank_of[node * shape_.node_ranks + my_local_];
}

Counter& Exchange::commit_word(std::byte* base, uint64_t epoch, uint32_t index) const {
  const uint64_t per_bank = shape_.num_ranks + shape_.num_nodes;
  return reinterpret_cast<Counter*>(base + offsets_.commits)[epoch % kNumBanks * per_bank + index];
}

Counter& Exchange::release_word(std::byte* base, uint64_t epoch, uint32_t rank) const {
  return reinterpret_cast<Counter*>(base +
                                    offsets_.releases)[epoch % kNumBanks * shape_.num_ranks + rank];
}

Counter& Exchange::sent_word(uint64_t epoch, uint32_t rank) {
  return reinterpret_cast<Counter*>(base_ +
                                    offsets_.sents)[epoch % kNumBanks * shape_.num_ranks + rank];
}

Counter& Exchange::mask_word(uint32_t rank) const {
  return reinterpret_cast<Counter*>(base_ + offsets_.masks)[rank];
}

Counter& Exchange::masked_by(uint32_t rank) const {
  if (peers_[rank].base)
    return reinterpret_cast<Counter*>(peers_[rank].base + offsets_.masks)[shape_.rank];
  return reinterpret_cast<Counter*>(base_ + offsets_.told)[rank];
}

void Exchange::tell_masked(uint32_t rank) {
  if (!links_[rank].present) return;
  engine_.proxy().write_word(links_[rank].release_channel, offsets_.masks + 8ull * rank,
                             offsets_.told + 8ull * shape_.rank);
}

Counter& Exchange::beat_word(std::byte* base) const {
  return *reinterpret_cast<Counter*>(base + kBeatAt);
}

Doorbell& Exchange::bell(std::byte* base) const { return *reinterpret_cast<Doorbell*>(base); }

uint32_t Exchange::num_local_experts(const Call& call) const {
  return (call.num_experts + shape_.num_ranks - 1) / shape_.num_ranks;
}

// Counts behind the header: uint32 [L] in a slot, uint32 [G, 1 + L] in a link window; none without
// fresh routing.
size_t Exchange::counts_bytes(const Call& call, bool link) const {
  if (call.kind != kDispatch || call.cached) return 0;
  const size_t L = num_local_experts(call);
  const size_t words = link && shape_.hops_node ? shape_.node_ranks * (1 + L) : L;
  return (words * sizeof(uint32_t) + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}

// The rows of a table, sorted by source token, that belong to one round.
std::pair<uint32_t, uint32_t> Exchange::range_of_round(const Call& call, uint32_t round,
                                                       const int32_t* tokens, uint32_t num_tokens) {
  const int64_t first = static_cast<int64_t>(round) * call.capacity;
  auto index_of = [&](int64_t token) {
    return static_cast<uint32_t>(std::lower_bound(tokens, tokens + num_tokens, token) - tokens);
  };
  return {index_of(first), index_of(first + call.capacity)};
}

// --- waits ---------------------------------------------------------------------------------------

void Exchange::mask(uint32_t rank) {
  shape_.absent[rank] = true;
  lane_of_rank_[rank] = -1;
  word_at(mask_word(rank)).store(1, std::memory_order_release);
  engine_.proxy().run([&] { tell_masked(rank); });
}

// With hops="rank" pairs are independent of each other: one that fails need not end the others.
Status Exchange::mask_or(uint32_t rank, Status status) {
  const bool of_peer = status.code() == Code::kPeerLost || status.code() == Code::kPeerTimeout;
  if (!shape_.mask_lost || !of_peer || fault_.raised() || rank == shape_.rank) return status;
  mask(rank);
  blamed_.store(0);
  return {};
}

Status Exchange::wait(Counter& word, uint64_t target, const Waited& waited) {
  auto there = [&] {
    if (waited.meanwhile != nullptr) (*waited.meanwhile)();
    return word_at(word).load(std::memory_order_acquire) >= target;  // H6, H7
  };
  if (there() || (linked_ && engine_.proxy().help(kSlice, there))) return {};
  for (Backoff backoff(64, 64); !linked_ && !backoff.should_sleep(); backoff.step()) {
    if (there()) return {};
  }
  const auto start = Clock::now();
  Seen seen;
  seen.at = start;
  while (true) {
    sleep_on(bell(base_), kSlice, there);
    if (there()) return {};
    if (Status status = look_at_peer(waited, seen, start); !status.ok()) {
      if (there()) return {};  // it came while we looked
      return status;
    }
  }
}

// A peer's heartbeat word as it is here; 0 of one that is neither of my node nor linked.
uint64_t Exchange::beat_of(uint32_t rank) const {
  if (peers_[rank].base) {
    return word_at(beat_word(peers_[rank].base)).load(std::memory_order_acquire);
  }
  if (!links_[rank].present) return 0;
  return word_at(*reinterpret_cast<Counter*>(base_ + offsets_.beats + 16ull * rank))
      .load(std::memory_order_acquire);
}

// 1 + the rank that `rank` gave up on; 0: none that it knows of.
uint64_t Exchange::blamed_by(uint32_t rank) const {
  const std::byte* beat = nullptr;
  if (peers_[rank].base) {
    beat = peers_[rank].base + kBeatAt;
  } else if (links_[rank].present) {
    beat = base_ + offsets_.beats + 16ull * rank;
  } else {
    return 0;
  }
  auto& word = *const_cast<Counter*>(reinterpret_cast<const Counter*>(beat + kBlameAt));
  const uint64_t blamed = word_at(word).load(std::memory_order_relaxed);
  return blamed <= shape_.num_ranks ? blamed : 0;
}

// The first is kept: it is what the fault of this rank goes back to.
void Exchange::blame(uint32_t rank) {
  uint64_t none = 0;
  blamed_.compare_exchange_strong(none, uint64_t{rank} + 1);
}

std::string Exchange::name_of(uint32_t rank) const {
  return "rank " + std::to_string(rank) + " (node " + std::to_string(shape_.node_of[rank]) + ")";
}

Status Exchange::damaged(uint32_t writer) const {
  return {Code::kTransport, "the header in the window of " + name_of(writer) +
                                " is damaged: a digest is not that of its fields or counts"};
}

Status Exchange::look_at_peer(const Waited& waited, Seen& seen, Clock::time_point start) {
  const uint32_t rank = waited.rank;
  const double waited_s = seconds_since(start);
  if (closed_.load()) return {Code::kClosed, "the Buffer was closed by another thread"};
  if (fault_.raised()) return fault_.status();
  if (Status status = engine_.proxy().fault(); !status.ok()) return status;
  const Peer& peer = peers_[rank];
  const std::string who = name_of(rank);
  const bool linked = !peer.base && links_[rank].present;
  const uint64_t beat = beat_of(rank);
  if (beat != seen.beat) {
    seen.beat = beat;
    seen.at = Clock::now();
  }
  const bool cut =
      linked && engine_.proxy().peer_state(links_[rank].engine_peer) == PeerState::kLost;
  // A rank that left may still have sent what we wait for: give its last writes a moment to land.
  const uint64_t state = beat & 15u;
  const double grace_s = !linked || cut ? 0.0 : state & kFailed ? kFailedGrace : kClosedGrace;
  if (state != kAlive && rank != shape_.rank && seconds_since(seen.at) >= grace_s) {
    const uint64_t blamed = state & kFailed ? blamed_by(rank) : 0;
    blame(blamed ? static_cast<uint32_t>(blamed - 1) : rank);
    std::string why = " closed its Buffer";
    if (state & kFailed) why = " gave up after a fault of its own";
    if (blamed) why = " gave up on " + name_of(static_cast<uint32_t>(blamed - 1));
    return {Code::kPeerLost, describe(waited, waited_s) + ": " + who + why};
  }
  if (cut) {
    blame(rank);
    return {Code::kPeerLost,
            describe(waited, waited_s) + ": the connection to " + who +
                " ended: " + engine_.proxy().peer_status(links_[rank].engine_peer).text()};
  }
  if (peer.base && rank != shape_.rank && peer.process.ended()) {
    blame(rank);
    return {Code::kPeerLost, describe(waited, waited_s) + ": the process of " + who + " ended"};
  }
  if (rank != shape_.rank && word_at(masked_by(rank)).load(std::memory_order_acquire) != 0) {
    blame(rank);
    return {Code::kPeerLost, describe(waited, waited_s) + ": it goes on without this rank"};
  }
  const Timeouts& limits = waited.call->timeouts;
  if (seconds_since(seen.at) > limits.silent_s + waited.extra_s) {
    blame(rank);
    return {Code::kPeerLost, describe(waited, waited_s) + ": its heartbeat stopped"};
  }
  if (waited_s > limits.late_s + waited.extra_s) {
    blame(rank);
    return {Code::kPeerTimeout, describe(waited, waited_s)};
  }
  return {};
}

std::string Exchange::describe(const Waited& waited, double seconds) const {
  uint32_t complete = 0, others = 0;
  for (uint32_t r = 0; r < shape_.num_ranks; ++r) {
    if (r == shape_.rank || r == waited.rank) continue;
    ++others;
    complete +=
        word_at(commit_word(base_, waited.epoch, r)).load(std::memory_order_acquire) >= waited.epoch
            ? 1
            : 0;
  }
  char text[240];
  std::snprintf(text, sizeof text,
                "%s epoch %llu, rank %u waited %.1f s for rank %u (node %u): %s not seen; %u of %u "
                "other sources complete",
                waited.call->kind == kDispatch ? "dispatch" : "combine",
                static_cast<unsigned long long>(waited.epoch), shape_.rank, seconds, waited.rank,
                shape_.node_of[waited.rank], waited.what, complete, others);
  return text;
}

}  // namespace moe_comm
