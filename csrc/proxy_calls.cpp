// What other threads ask of the proxy, carried out in its turns: NOTE [turns].
#include <unistd.h>

#include <algorithm>

#include "proxy.hpp"

namespace moe_comm {
namespace {
constexpr uint64_t kAtOnce = 16 << 10;  // bytes that whoever wants them written posts itself
}  // namespace

// --- Operation -----------------------------------------------------------------------------------

void Operation::finish_one(const Status& status) {
  std::lock_guard lock(mutex_);
  if (!status.ok() && status_.ok()) status_ = status;
  if (--remaining_ == 0) changed_.notify_all();
}

bool Operation::done() const {
  std::lock_guard lock(mutex_);
  return remaining_ == 0;
}

Status Operation::status() const {
  std::lock_guard lock(mutex_);
  return status_;
}

bool Operation::wait(double seconds) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                           [this] { return remaining_ == 0; });
}

// --- from any thread -----------------------------------------------------------------------------

bool Proxy::hand_over(std::function<void()> function) {
  {
    std::lock_guard lock(functions_mutex_);
    if (ended_.load()) return false;
    functions_.push_back(std::move(function));
    has_functions_.store(true, std::memory_order_release);
  }
  wake();
  return true;
}

void Proxy::run(const std::function<void()>& function) {
  turn_wanted_.fetch_add(1, std::memory_order_relaxed);
  {
    std::lock_guard turn(turn_mutex_);
    turn_wanted_.fetch_sub(1, std::memory_order_relaxed);
    if (ended_.load()) return;  // nothing is left to act on
    function();
  }
  wake();  // it may have begun something
}

bool Proxy::wait(Operation& operation, double seconds) {
  const auto start = Clock::now();
  return help(seconds, [&] { return operation.done(); }) ||
         operation.wait(std::max(0.0, seconds - seconds_since(start)));
}

Result<MemoryRegion> Proxy::register_memory(std::span<std::byte> bytes, DmaBuf dmabuf) {
  Result<MemoryRegion> result = Status(Code::kClosed, "register_memory: the engine is closed");
  run([&] { result = transport_->register_memory(bytes, dmabuf); });
  return result;
}

Result<uint32_t> Proxy::connect(const Address& address) {
  Result<uint32_t> result = Status(Code::kClosed, "connect: the engine is closed");
  run([&] {
    auto id = transport_->connect(address);
    if (!id.ok()) {
      result = id.status();
      return;
    }
    std::lock_guard lock(peers_mutex_);
    const auto peer = static_cast<uint32_t>(peers_.size());
    peers_.emplace_back().id = id.value();
    peer_of_id_[static_cast<uint32_t>(id.value())] = peer;
    result = peer;
  });
  return result;
}

void Proxy::disconnect(uint32_t peer) {
  run([&] {
    if (peer >= peers_.size()) return;
    transport_->disconnect(peers_[peer].id);
    lose(peer, {Code::kClosed, "disconnected by this rank"});
  });
}

PeerState Proxy::peer_state(uint32_t peer) const {
  std::lock_guard lock(peers_mutex_);
  if (peer >= peers_.size()) return PeerState::kLost;
  return peers_[peer].state.load(std::memory_order_acquire);
}

Status Proxy::peer_status(uint32_t peer) const {
  std::lock_guard lock(peers_mutex_);
  if (peer >= peers_.size()) return {Code::kInvalid, "no such peer"};
  return peers_[peer].lost.raised() ? peers_[peer].lost.status() : Status();
}

Result<uint32_t> Proxy::open_channel(Channel channel) {
  Result<uint32_t> result = Status(Code::kClosed, "open_channel: the engine is closed");
  run([&] {
    if (channels_.size() >= kMaxChannels) {
      result = Status(Code::kTransport, "no channels left: restart the engine");
      return;
    }
    channels_.emplace_back().channel = std::move(channel);
    channels_.back().open = true;
    result = static_cast<uint32_t>(channels_.size() - 1);
  });
  return result;
}

void Proxy::close_channel(uint32_t channel) {
  run([&] {
    if (channel >= channels_.size()) return;
    channels_[channel].open = false;
    channels_[channel].wait.reset();  // what is armed with it ends
    for (Peer& peer : peers_) {
      std::erase_if(peer.pending, [&](const Write& w) { return w.channel == channel; });
    }
  });
}

bool Proxy::all_sent(std::span<const uint32_t> channels) {
  bool sent = true;
  run([&] {
    for (const uint32_t c : channels) {
      for (const uint32_t unsent : channels_[c].unsent) sent &= !channels_[c].open || unsent == 0;
    }
  });
  return sent;
}

Result<uint32_t> Proxy::open_row(RowTarget target, uint64_t first_epoch) {
  Result<uint32_t> result = Status(Code::kClosed, "open_row: the engine is closed");
  run([&] { result = rows_.open(std::move(target), first_epoch); });
  return result;
}

void Proxy::close_row(uint32_t row) {
  run([&] { rows_.close(row); });
}

uint64_t Proxy::add_heartbeat(Heartbeat heartbeat) {
  uint64_t id = 0;
  run([&] {
    id = next_heartbeat_++;
    heartbeats_.push_back({id, std::move(heartbeat)});
  });
  return id;
}

void Proxy::remove_heartbeat(uint64_t id) {
  run([&] { std::erase_if(heartbeats_, [&](const Beat& b) { return b.id == id; }); });
}

std::shared_ptr<Operation> Proxy::beat_now() {
  std::shared_ptr<Operation> operation;
  run([&] {
    uint32_t num_writes = 0;
    for (const Beat& beat : heartbeats_) num_writes += beat.heartbeat.channels.size();
    if (num_writes == 0) return;
    operation = std::make_shared<Operation>(num_writes, nullptr);
    write_beats(operation);
    post_pending();
  });
  return operation;
}

std::shared_ptr<Operation> Proxy::submit(std::vector<UserWrite> writes,
                                         std::shared_ptr<void> keep) {
  auto parts = std::make_shared<std::vector<Write>>();
  const uint64_t limit = std::max<uint64_t>(transport_->info().capabilities.max_message_bytes, 1);
  uint64_t num_bytes = 0;
  for (const UserWrite& w : writes) {
    num_bytes += w.num_bytes;
    if (w.has_immediate && w.num_bytes > limit) {  // cut, it could be overtaken by its immediate
      auto refused = std::make_shared<Operation>(1, std::move(keep));
      refused->finish_one({Code::kInvalid, "write: expected at most " + std::to_string(limit) +
                                               " bytes with an immediate, got " +
                                               std::to_string(w.num_bytes)});
      return refused;
    }
    uint64_t offset = 0;
    do {
      Write part;
      part.peer = w.peer;
      part.local = w.local;
      part.remote = w.remote;
      part.num_bytes = std::min(limit, w.num_bytes - offset);
      part.local_offset = w.local_offset + offset;
      part.remote_offset = w.remote_offset + offset;
      offset += part.num_bytes;
      part.has_immediate = w.has_immediate;
      part.immediate = Immediate::user(w.immediate);
      parts->push_back(std::move(part));
    } while (offset < w.num_bytes);
  }
  auto operation =
      std::make_shared<Operation>(static_cast<uint32_t>(parts->size()), std::move(keep));
  const auto refuse = [parts, operation] {
    for (size_t i = 0; i < parts->size(); ++i)
      operation->finish_one({Code::kClosed, "write: the engine is closed"});
  };
  const auto begin = [this, parts, operation, refuse] {
    if (ended_.load()) return refuse();
    for (Write& part : *parts) {
      part.operation = operation;
      enqueue(std::move(part));
    }
    post_pending();
  };
  // A write after stop() is refused, or it would wait for more and more. The caller never waits for
  // the proxy: little is posted here, if it is nobody's turn, and much by whoever has the next one.
  if (stop_.load(std::memory_order_acquire)) {
    refuse();
  } else if (std::unique_lock lock(turn_mutex_, std::defer_lock);
             num_bytes <= kAtOnce && lock.try_lock()) {
    begin();
    const bool armed = std::exchange(armed_, false);
    lock.unlock();
    if (armed) wake();
  } else if (!hand_over(begin)) {
    refuse();
  }
  return operation;
}

bool Proxy::take_immediates(uint32_t value, uint64_t count, double seconds) {
  const auto start = Clock::now();
  help(seconds, [&] { return count_immediates(value) >= count; });
  std::unique_lock lock(user_mutex_);
  const auto left = std::chrono::duration<double>(std::max(0.0, seconds - seconds_since(start)));
  const bool there =
      user_changed_.wait_for(lock, left, [&] { return user_counts_[value] >= count; });
  if (there) user_counts_[value] -= count;
  return there;
}

uint64_t Proxy::count_immediates(uint32_t value) const {
  std::lock_guard lock(user_mutex_);
  auto found = user_counts_.find(value);
  return found == user_counts_.end() ? 0 : found->second;
}

uint64_t Proxy::wait_immediates(uint64_t seen, double seconds) {
  std::unique_lock lock(user_mutex_);
  user_changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                         [&] { return user_total_ > seen; });
  return user_total_;
}

uint64_t Proxy::dropped_immediates() {
  uint64_t dropped = 0;
  run([&] { dropped = rows_.dropped(); });
  return dropped;
}

}  // namespace moe_comm
