#include "proxy.hpp"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

namespace moe_comm {
namespace {
constexpr int kCommandsPerTurn = 64;
constexpr double kIdleSleep = 0.1;     // seconds; bounds how long a heartbeat can be late
constexpr double kNapSleep = 0.001;    // where a transport has no wait fd
constexpr double kParkedNap = 0.0025;  // there, after kNapsUntilParked in which nothing came
constexpr uint32_t kNapsUntilParked = 500;
constexpr double kRingNap = 0.00005;          // while GPUs may push: they cannot wake it
constexpr double kAsideNap = 0.0001;          // while others take the turns
constexpr uint64_t kPostedAtOnce = 16 << 10;  // bytes that whoever pushes them posts itself
constexpr double kDrainTimeout = 5.0;         // seconds stop() waits for writes in flight
}  // namespace

// --- the thread ----------------------------------------------------------------------------------

Proxy::Proxy(std::unique_ptr<Transport> transport, const ProxyOptions& options)
    : transport_(std::move(transport)),
      options_(options),
      event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  in_flight_.resize(transport_->info().capabilities.queue_depth);
  for (uint32_t i = 0; i < in_flight_.size(); ++i) free_slots_.push_back(i);
  thread_ = std::thread([this] { body(); });
}

Proxy::~Proxy() { stop(); }

void Proxy::stop() {
  stop_.store(true, std::memory_order_release);
  wake();
  if (thread_.joinable()) thread_.join();
}

// H2: a command on its way to the NIC begins here.
Status Proxy::push(const Transfer& transfer, double seconds) {
  if (slot_lost_.load(std::memory_order_relaxed)) return fault_.status();
  if (stop_.load(std::memory_order_acquire)) return {Code::kClosed, "push: the engine is closed"};
  const uint64_t ticket = producer_.reserve();
  const auto start = Clock::now();
  for (Backoff backoff; producer_.full(ticket); backoff.step()) {
    wake();
    if (ended_.load(std::memory_order_relaxed)) {
      return {Code::kClosed, "push: the engine is closed"};
    }
    if (seconds_since(start) > seconds) {
      Status status(Code::kTransport,
                    "the command ring stayed full for " + std::to_string(seconds) + " s");
      fault_.raise(status);
      slot_lost_.store(true, std::memory_order_relaxed);  // the reserved one: nothing may follow it
      return status;
    }
  }
  producer_.publish(ticket, transfer);
  if (transfer.num_bytes > kPostedAtOnce || !try_turn()) wake();
  return {};
}

void Proxy::wake() {
  std::atomic_thread_fence(std::memory_order_seq_cst);  // pairs with the fence in has_work()
  if (!sleeping_.load(std::memory_order_relaxed)) return;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t ignored = ::write(event_.get(), &one, sizeof one);
}

void Proxy::body() noexcept {
  pthread_setname_np(pthread_self(), "moe_comm:proxy");
  Backoff backoff;
  Clock::time_point stopping{}, busy{};
  while (true) {
    const bool stop = stop_.load(std::memory_order_acquire);  // before the last look at what is due
    while (turn_wanted_.load(std::memory_order_relaxed) > 0) sched_yield();
    std::unique_lock lock(turn_mutex_);
    const bool progress = turn();
    if (stop) {
      if (stopping == Clock::time_point{}) stopping = Clock::now();
      const bool drained = free_slots_.size() == in_flight_.size() && with_pending_.empty();
      if ((drained && !progress) || seconds_since(stopping) > kDrainTimeout) break;
    }
    lock.unlock();
    const bool has_rings = num_rings_.load(std::memory_order_relaxed) > 0;
    if (progress) {
      backoff.reset();
      naps_ = 0;
      if (has_rings) busy = Clock::now();
    }
    if (!stop && (helping_.load(std::memory_order_relaxed) > 0 || helped_.exchange(false))) {
      step_aside();
    } else if (backoff.should_sleep() &&
               !(has_rings && seconds_since(busy) < options_.ring_spin_s)) {
      sleep();
    } else if (!progress) {
      backoff.step();
    }
  }
  std::lock_guard turn(turn_mutex_);
  std::lock_guard lock(functions_mutex_);
  ended_.store(true);
  for (auto& function : functions_) function();  // nobody is left waiting
  functions_.clear();
  const Status closed(Code::kClosed, "the engine is closed");
  for (const auto& ring : rings_) ring->fail(closed);
  rings_.clear();
  for (uint32_t peer = 0; peer < peers_.size(); ++peer) lose(peer, closed);
  for (Write& write : in_flight_) {
    if (write.operation) finish(write, closed);
  }
}

bool Proxy::turn() {
  bool progress = take_commands();
  if (!rings_.empty()) [[unlikely]]
    progress |= serve_rings();
  progress |= run_functions();
  progress |= post_pending();
  progress |= poll_transport(false);
  beat();
  stats_.loops.fetch_add(1, std::memory_order_relaxed);
  return progress;
}

bool Proxy::try_turn() {
  std::unique_lock lock(turn_mutex_, std::try_to_lock);
  if (!lock || stop_.load(std::memory_order_acquire)) return false;
  const bool progress = turn();
  stats_.helped.fetch_add(progress, std::memory_order_relaxed);
  const bool armed = std::exchange(armed_, false);  // no more: the transport was polled
  lock.unlock();
  if (armed) wake();
  return progress;
}

bool Proxy::take_commands() {
  for (int n = 0; n < kCommandsPerTurn; ++n) {
    auto transfer = consumer_.take();  // H2
    if (!transfer) return n > 0;
    stats_.commands.fetch_add(1, std::memory_order_relaxed);
    begin_transfer(*transfer);
  }
  return true;
}

bool Proxy::run_functions() {
  if (!has_functions_.load(std::memory_order_acquire)) return false;
  std::vector<std::function<void()>> functions;
  {
    std::lock_guard lock(functions_mutex_);
    functions.swap(functions_);
    has_functions_.store(false, std::memory_order_relaxed);
  }
  for (auto& function : functions) function();
  return !functions.empty();
}

uint64_t Proxy::shard_bytes(uint64_t num_bytes) const {
  uint64_t limit =
      std::max<uint64_t>(transport_->info().capabilities.max_message_bytes, kRowAlignment);
  if (options_.shard_bytes) limit = std::min(limit, options_.shard_bytes);
  const uint64_t least = (num_bytes + kMaxWritesPerMessage - 1) / kMaxWritesPerMessage;
  return std::max<uint64_t>(limit, (least + kRowAlignment - 1) / kRowAlignment * kRowAlignment);
}

// One message: one write, or several; each carries the immediate, and the receiver counts them
// (H3).
void Proxy::begin_transfer(const Transfer& transfer) {
  if (transfer.channel >= channels_.size() || !channels_[transfer.channel].open)
    return;  // closed meanwhile
  ChannelState& state = channels_[transfer.channel];
  const uint32_t bank = transfer.epoch % kNumBanks;
  const uint64_t shard = shard_bytes(transfer.num_bytes);
  const auto num_writes =
      static_cast<uint32_t>(std::max<uint64_t>(1, (transfer.num_bytes + shard - 1) / shard));
  state.unsent[bank] += num_writes;
  for (uint32_t i = 0; i < num_writes; ++i) {
    Write write;
    write.peer = state.channel.peer;
    write.channel = transfer.channel;
    write.bank = bank;
    write.local = state.channel.local;
    write.remote = &state.channel.remote;
    write.local_offset = transfer.local_offset + i * shard;
    write.remote_offset = transfer.remote_offset + i * shard;
    write.num_bytes = std::min(shard, transfer.num_bytes - i * shard);
    write.has_immediate = true;
    write.immediate = Immediate::protocol(state.channel.immediate_row, transfer.epoch, num_writes);
    enqueue(std::move(write));
  }
}

void Proxy::enqueue(Write write) {
  if (write.peer >= peers_.size()) {
    finish(write,
           {Code::kInvalid, "write to peer " + std::to_string(write.peer) + ": no such peer"});
    return;
  }
  Peer& peer = peers_[write.peer];
  if (peer.state.load(std::memory_order_relaxed) == PeerState::kLost) {
    finish(write, peer.lost.status());
    return;
  }
  const uint32_t index = write.peer;
  peer.pending.push_back(std::move(write));
  if (!peer.queued) {
    peer.queued = true;
    with_pending_.push_back(index);
  }
}

// What post_pending() would post now, unless the transport refuses some of it.
uint32_t Proxy::count_postable() const {
  size_t count = 0, free = free_slots_.size();
  for (const uint32_t index : with_pending_) {
    const Peer& peer = peers_[index];
    if (peer.state.load(std::memory_order_relaxed) != PeerState::kReady || free <= peer.in_flight)
      continue;
    const size_t room = (free - peer.in_flight + 1) / 2;  // each post takes a slot and adds one
    const size_t posts = std::min(peer.pending.size(), room);
    count += posts;
    free -= posts;
  }
  return static_cast<uint32_t>(count);
}

bool Proxy::post_pending() {
  bool progress = false;
  if (with_pending_.empty()) return progress;
  uint32_t left = count_postable();
  for (size_t i = 0; i < with_pending_.size();) {
    const uint32_t index = with_pending_[i];
    Peer& peer = peers_[index];
    while (peer.state.load(std::memory_order_relaxed) == PeerState::kReady &&
           !peer.pending.empty() &&
           free_slots_.size() > peer.in_flight) {  // so that some are left for any other peer
      Write& write = peer.pending.front();
      const uint32_t slot = free_slots_.back();
      WriteRequest request;
      request.peer = peer.id;
      request.local = write.local;
      request.local_offset = write.local_offset;
      request.num_bytes = write.num_bytes;
      request.remote = write.remote;
      request.remote_offset = write.remote_offset;
      request.has_immediate = write.has_immediate;
      request.immediate = write.immediate;
      request.id = {slot};
      request.following = left > 0 ? --left : 0;
      Status status = transport_->post_write(request);
      if (status.code() == Code::kAgain) break;
      Write posted = std::move(write);
      peer.pending.pop_front();
      progress = true;
      if (status.ok()) {
        stats_.writes.fetch_add(1, std::memory_order_relaxed);
        stats_.bytes.fetch_add(posted.num_bytes, std::memory_order_relaxed);
        free_slots_.pop_back();
        ++peer.in_flight;
        in_flight_[slot] = std::move(posted);
      } else {
        const bool of_peer = status.code() != Code::kInvalid && !posted.operation;
        finish(posted, status);
        if (!of_peer && !posted.operation) fault_.raise(status);  // a command that makes no sense
        if (of_peer || status.code() == Code::kPeerLost) lose(index, status);
      }
    }
    if (peer.pending.empty()) {
      peer.queued = false;
      with_pending_[i] = with_pending_.back();
      with_pending_.pop_back();
    } else {
      ++i;
    }
  }
  return progress;
}

bool Proxy::poll_transport(bool arm) {
  const size_t n = transport_->poll(completions_, arm);
  for (size_t i = 0; i < n; ++i) {
    Completion& c = completions_[i];
    switch (c.kind) {
      case Completion::Kind::kWriteDone: {
        const auto slot = static_cast<uint32_t>(c.id.value);
        Write write = std::move(in_flight_[slot]);
        in_flight_[slot] = Write{};
        free_slots_.push_back(slot);
        --peers_[write.peer].in_flight;
        finish(write, c.status);
        if (!c.status.ok() && !write.operation) lose(write.peer, c.status);
        break;
      }
      case Completion::Kind::kImmediate:
        stats_.immediates.fetch_add(1, std::memory_order_relaxed);
        if (c.immediate.is_user()) {
          std::lock_guard lock(user_mutex_);
          ++user_counts_[c.immediate.user_value()];
          ++user_total_;
          user_changed_.notify_all();
        } else if (Status status = rows_.count(c.immediate); !status.ok()) {  // H5
          fault_.raise(status);
        }
        break;
      case Completion::Kind::kPeerReady: {  // of a peer that was disconnected meanwhile: too late
        PeerState connecting = PeerState::kConnecting;
        peers_[peer_of_id_[static_cast<uint32_t>(c.peer)]].state.compare_exchange_strong(
            connecting, PeerState::kReady, std::memory_order_release, std::memory_order_relaxed);
        break;
      }
      case Completion::Kind::kPeerRefused:
      case Completion::Kind::kPeerLost:
        lose(peer_of_id_[static_cast<uint32_t>(c.peer)], c.status);
        break;
    }
  }
  return n > 0;
}

void Proxy::finish(Write& write, const Status& status) {
  if (write.operation) {
    write.operation->finish_one(status);
    return;
  }
  if (write.channel == kNoChannel) return;  // a heartbeat
  ChannelState& state = channels_[write.channel];
  if (--state.unsent[write.bank] > 0 || !state.open) return;
  ++state.completed[write.bank];
  if (Counter* word = state.channel.sent[write.bank]) {
    word_at(*word).store(state.completed[write.bank], std::memory_order_release);
    if (state.channel.bell) ring(*state.channel.bell);
  }
}

void Proxy::lose(uint32_t index, Status status) {
  Peer& peer = peers_[index];
  peer.lost.raise(status.ok() ? Status(Code::kPeerLost, "connection lost") : std::move(status));
  peer.state.store(PeerState::kLost, std::memory_order_release);
  std::deque<Write> pending;
  pending.swap(peer.pending);
  const Status why = peer.lost.status();
  for (Write& write : pending) finish(write, why);
}

// --- heartbeats and sleep ------------------------------------------------------------------------

void Proxy::beat() {
  if (heartbeats_.empty() || seconds_since(last_beat_) < options_.heartbeat_s) return;
  last_beat_ = Clock::now();
  for (Beat& beat : heartbeats_)
    word_at(*beat.heartbeat.word).fetch_add(16, std::memory_order_release);
  if (seconds_since(last_beat_write_) >= options_.beat_write_s) write_beats();
}

void Proxy::write_beats(const std::shared_ptr<Operation>& operation) {
  last_beat_write_ = Clock::now();
  for (Beat& beat : heartbeats_) {
    for (const uint32_t channel : beat.heartbeat.channels) {
      const Channel& to = channels_[channel].channel;
      const Peer& peer = peers_[to.peer];
      const bool ready = peer.state.load(std::memory_order_relaxed) == PeerState::kReady;
      if (!ready || peer.pending.size() > 8) {  // a stalled peer needs no more of these
        if (operation) operation->finish_one({});
        continue;
      }
      Write write;
      write.operation = operation;
      write.peer = to.peer;
      write.local = to.local;
      write.local_offset = beat.heartbeat.local_offset;
      write.num_bytes = 16;
      write.remote = &to.remote;
      write.remote_offset = beat.heartbeat.remote_offset;
      enqueue(std::move(write));
    }
  }
}

void Proxy::write_word(uint32_t channel, uint64_t local_offset, uint64_t remote_offset) {
  const Channel& to = channels_[channel].channel;
  Write write;
  write.peer = to.peer;
  write.local = to.local;
  write.local_offset = local_offset;
  write.num_bytes = 8;
  write.remote = &to.remote;
  write.remote_offset = remote_offset;
  enqueue(std::move(write));
}

// Others take the turns, or did a moment ago: a short nap, from which only work wakes.
void Proxy::step_aside() {
  if (!has_work(std::unique_lock(turn_mutex_))) {
    pollfd event{event_.get(), POLLIN, 0};
    const timespec limit{0, static_cast<long>(kAsideNap * 1e9)};
    ppoll(&event, 1, &limit, nullptr);
  }
  awake();
}

void Proxy::sleep() {
  std::unique_lock lock(turn_mutex_);
  if (!has_work(lock) && !poll_transport(true)) {
    armed_ = true;
    const int wait_fd = transport_->info().wait_fd;
    pollfd fds[2] = {{event_.get(), POLLIN, 0}, {wait_fd, POLLIN, 0}};
    // Nobody tells us when a full queue has room again; nor, without a wait fd, what arrives.
    const bool nap = !with_pending_.empty() ||
                     (wait_fd < 0 && (!peers_.empty() || stats_.immediates.load() > 0));
    double seconds = std::min(kIdleSleep, options_.heartbeat_s * 2);
    if (!rings_.empty()) {
      seconds = naps_++ < kNapsUntilParked || rings_wait() ? kRingNap : kNapSleep;
    } else if (nap) {
      seconds = naps_++ < kNapsUntilParked ? kNapSleep : kParkedNap;
    }
    const timespec limit{0, static_cast<long>(seconds * 1e9)};
    stats_.sleeps.fetch_add(1, std::memory_order_relaxed);
    lock.unlock();
    ppoll(fds, wait_fd >= 0 ? 2 : 1, &limit, nullptr);
    lock.lock();
    armed_ = false;
  }
  lock.unlock();
  awake();
}

// The last look before a sleep; whoever brings work from now on wakes.
bool Proxy::has_work(const std::unique_lock<std::mutex>& turn) {
  (void)turn;
  sleeping_.store(true, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);  // pairs with the fence in wake()
  return !consumer_.empty() || rings_have_commands() ||
         has_functions_.load(std::memory_order_acquire) || stop_.load(std::memory_order_acquire);
}

void Proxy::awake() {
  sleeping_.store(false, std::memory_order_relaxed);
  uint64_t drained;
  [[maybe_unused]] const ssize_t ignored = ::read(event_.get(), &drained, sizeof drained);
}

}  // namespace moe_comm
