// The proxy's part of rings that GPUs push to: commands, and waits that kernels armed.
//
// One turn takes at most kCommandsPerTurn commands of each ring and looks, for each armed wait, at
// the first source that has not come; it never waits. Rings are attached and detached between
// turns. What is wrong with a command is its own ring's fault, never the proxy's.
#include <algorithm>
#include <cstdio>

#include "proxy.hpp"

namespace moe_comm {
namespace {
constexpr int kCommandsPerTurn = 64;
constexpr double kLookOver = 0.01;     // seconds between looks at what moves slowly
constexpr uint64_t kNotTimed = ~0ull;  // yet
constexpr double kLastWords = 1.0;     // for the writes of a rank that closed or gave up

bool reached(uint64_t word, uint64_t epoch) {  // both modulo 2^48
  return static_cast<int64_t>((word - epoch) << 16) >= 0;
}

bool outside(uint64_t at, uint64_t num_bytes, uint64_t size) {
  return at > size || num_bytes > size - at;
}
}  // namespace

// --- from any thread -----------------------------------------------------------------------------

Status Proxy::attach(const std::shared_ptr<MappedRing>& ring) {
  Status result(Code::kClosed, "attach: the engine is closed");
  run([&] {
    rings_.push_back(ring);
    ring->moved_ = Clock::now();
    num_rings_.store(static_cast<uint32_t>(rings_.size()), std::memory_order_relaxed);
    result = {};
  });
  return result;
}

void Proxy::detach(const std::shared_ptr<MappedRing>& ring) {
  run([&] {
    if (std::erase(rings_, ring) == 0) return;
    num_rings_.store(static_cast<uint32_t>(rings_.size()), std::memory_order_relaxed);
    // What was pushed before is carried out.
    for (uint32_t taken = 0; taken < ring->options_.num_slots; taken += kCommandsPerTurn) {
      if (!take_commands(*ring, Clock::now())) break;
    }
    ring->fail({Code::kClosed, "the ring was closed"});
  });
}

Result<uint32_t> Proxy::open_wait(Wait wait) {
  Result<uint32_t> result = Status(Code::kClosed, "open_wait: the engine is closed");
  run([&] {
    if (channels_.size() >= kMaxChannels) {
      result = Status(Code::kTransport, "no channels left: restart the engine");
      return;
    }
    for (const uint32_t channel : wait.channels) {
      if (channel < channels_.size() && !channels_[channel].is_wait) continue;
      result = Status(Code::kInvalid,
                      "open_wait: expected channels of transfers, got " + std::to_string(channel));
      return;
    }
    ChannelState& state = channels_.emplace_back();
    state.is_wait = true;
    state.wait = std::make_unique<Wait>(std::move(wait));
    result = static_cast<uint32_t>(channels_.size() - 1);
  });
  return result;
}

// --- in a turn -----------------------------------------------------------------------------------

bool Proxy::serve_rings() {
  bool progress = false;
  const auto now = Clock::now();
  for (const auto& ring : rings_) {
    progress |= take_commands(*ring, now);
    if (!ring->armed_.empty()) progress |= look_at_waits(*ring, now);
    if (now - ring->looked_ >= std::chrono::duration<double>(kLookOver)) look_over(*ring, now);
  }
  return progress;
}

bool Proxy::take_commands(MappedRing& ring, Clock::time_point now) {
  for (int n = 0; n < kCommandsPerTurn; ++n) {
    const auto command = ring.consumer_.take_command();  // H2
    if (!command) {
      if (ring.torn_at_ != ring.consumer_.next() && ring.consumer_.torn()) {
        ring.torn_at_ = ring.consumer_.next();
        ring.stats_.torn.fetch_add(1, std::memory_order_relaxed);
      }
      return n > 0;
    }
    ring.stats_.commands.fetch_add(1, std::memory_order_relaxed);
    if (ring.fault_.raised()) continue;  // it ended; room is still made
    if (Status status = begin(ring, *command, now); !status.ok()) ring.fail(std::move(status));
  }
  return true;
}

Status Proxy::begin(MappedRing& ring, const Command& command, Clock::time_point now) {
  const Transfer transfer = unpack_command(command);
  const auto wrong = [&](const std::string& text) {
    return Status(Code::kInvalid, "command " + std::to_string(ring.consumer_.next() - 1) +
                                      " of a device ring: " + text);
  };
  if (transfer.channel >= channels_.size())
    return wrong("no channel " + std::to_string(transfer.channel));
  const ChannelState& state = channels_[transfer.channel];
  if (state.is_wait) {
    const Arm arm = unpack_arm(command);
    if (arm.word_idx >= ring.options_.num_words || ring.is_armed_[arm.word_idx]) {
      return wrong("expected one of " + std::to_string(ring.options_.num_words) +
                   " words that is not armed, got " + std::to_string(arm.word_idx));
    }
    const double seconds = arm.timeout_ms ? arm.timeout_ms * 1e-3 : ring.options_.timeout_s;
    const auto limit =
        std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    if (state.wait && state.wait->timed) {
      for (const WaitSource& source : state.wait->sources) {
        if (source.time_idx < ring.options_.num_times) ring.times_[source.time_idx] = kNotTimed;
      }
    }
    ring.is_armed_[arm.word_idx] = 1;
    ring.armed_.push_back({arm, 0, now, now + limit, ~0ull, now, now, 0});
    ring.stats_.armed.fetch_add(1, std::memory_order_relaxed);
    return {};
  }
  if (!state.open) return {};  // closed meanwhile
  const uint64_t local_bytes = state.channel.local ? state.channel.local->bytes.size() : 0;
  if (outside(transfer.local_offset, transfer.num_bytes, local_bytes) ||
      outside(transfer.remote_offset, transfer.num_bytes, state.channel.remote.num_bytes)) {
    return wrong(std::to_string(transfer.num_bytes) + " bytes at offset " +
                 std::to_string(transfer.local_offset) + " of " + std::to_string(local_bytes) +
                 " to offset " + std::to_string(transfer.remote_offset) + " of " +
                 std::to_string(state.channel.remote.num_bytes) + ": outside the region");
  }
  begin_transfer(transfer);
  return {};
}

bool Proxy::look_at_waits(MappedRing& ring, Clock::time_point now) {
  bool progress = false;
  Status failure;
  const Wait* failed = nullptr;
  for (size_t i = 0; i < ring.armed_.size();) {
    MappedRing::Armed& armed = ring.armed_[i];
    Status why;
    const std::optional<WaitStatus> status = look_at(ring, armed, now, why);
    if (!status) {
      ++i;
      continue;
    }
    const uint32_t word_idx = armed.arm.word_idx;
    if (!why.ok() && failure.ok()) {
      failure = std::move(why);
      ring.blamed_ = armed.blamed;
      failed = channels_[armed.arm.channel].wait.get();
    }
    ring.armed_[i] = ring.armed_.back();
    ring.armed_.pop_back();
    ring.is_armed_[word_idx] = 0;
    // The text first: who sees the word may ask for it.
    if (!failure.ok()) ring.fault_.raise(failure);
    ring.end(word_idx, *status);  // H5
    progress = true;
  }
  if (failure.ok()) return progress;
  if (failed != nullptr && failed->failed) {
    failed->failed(failure, ring.blamed_);
    write_beats();
  }
  ring.fail(std::move(failure));
  return progress;
}

// How it ended, if it did; `why`: of one that failed. Who fails it is masked where that is asked
// for, and the others are looked at.
std::optional<WaitStatus> Proxy::look_at(MappedRing& ring, MappedRing::Armed& armed,
                                         Clock::time_point now, Status& why) {
  while (true) {
    const std::optional<WaitStatus> status = look_at_next(ring, armed, now, why);
    if (!status || why.ok()) return status;
    const ChannelState& state = channels_[armed.arm.channel];
    if (!state.wait || state.wait->masks == nullptr || armed.missing == ~0u) return status;
    word_at(state.wait->masks[armed.missing]).store(1, std::memory_order_release);
    if (state.wait->masked) state.wait->masked(armed.missing);
    armed.blamed = 0;
    why = {};
  }
}

std::optional<WaitStatus> Proxy::look_at_next(MappedRing& ring, MappedRing::Armed& armed,
                                              Clock::time_point now, Status& why) {
  const ChannelState& state = channels_[armed.arm.channel];
  if (!state.wait) {
    why = {Code::kClosed, "an armed wait was closed"};
    return kWaitAborted;
  }
  const Wait& wait = *state.wait;
  const uint32_t bank = armed.arm.epoch % kNumBanks;
  const auto masked = [&](uint32_t rank) {
    return wait.masks != nullptr && rank != ~0u &&
           word_at(wait.masks[rank]).load(std::memory_order_acquire) != 0;
  };
  const auto complete = [&](const WaitSource& source) {
    return masked(source.rank) ||
           reached(word_at(*source.words[bank]).load(std::memory_order_acquire), armed.arm.epoch);
  };
  const auto reader_of = [&](uint32_t channel) {  // who reads what is written there
    const auto is_peer = [&](const WaitSource& source) {
      return source.peer == channels_[channel].channel.peer;
    };
    const auto found = std::find_if(wait.sources.begin(), wait.sources.end(), is_peer);
    return found == wait.sources.end() ? ~0u : found->rank;
  };
  for (size_t i = 0; wait.timed && i < wait.sources.size(); ++i) {
    const WaitSource& source = wait.sources[i];
    if (source.time_idx >= ring.options_.num_times) continue;
    uint64_t& ns = ring.times_[source.time_idx];
    if (ns == kNotTimed && complete(source))
      ns = static_cast<uint64_t>(std::chrono::nanoseconds(now - armed.start).count());
  }
  while (armed.next < wait.sources.size() && complete(wait.sources[armed.next])) {
    ++armed.next;
    armed.beat = ~0ull;
  }
  std::string missing;
  Clock::duration extra{};
  if (armed.next == wait.sources.size()) {
    const auto busy = [&](uint32_t c) {
      return channels_[c].open && channels_[c].unsent[bank] > 0 && !masked(reader_of(c));
    };
    const auto found = std::find_if(wait.channels.begin(), wait.channels.end(), busy);
    if (found == wait.channels.end()) return kWaitOk;
    if (now < armed.deadline) return std::nullopt;
    armed.blamed = 0;
    armed.missing = reader_of(*found);
    missing = "its own writes on channel " + std::to_string(*found);
  } else {
    const WaitSource& source = wait.sources[armed.next];
    armed.blamed = source.rank + 1u;  // ~0: nobody
    armed.missing = source.rank;
    extra =
        std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(source.extra_s));
    const std::string lost = why_lost(source, armed, ring.options_, now);
    if (!lost.empty()) {
      if (complete(source)) return std::nullopt;  // it came while we looked
      why = {Code::kPeerLost, describe(wait, armed, now, source.who) + ": " + lost};
      return kWaitLost;
    }
    if (now < armed.deadline + extra) return std::nullopt;
    missing = source.who;
  }
  why = {Code::kPeerTimeout, describe(wait, armed, now, missing)};
  return kWaitTimeout;
}

// Empty: there is no reason to give it up. The connection of a link peer ends after the immediates
// of all it wrote; its heartbeat travels by itself.
std::string Proxy::why_lost(const WaitSource& source, MappedRing::Armed& armed,
                            const RingOptions& options, Clock::time_point now) const {
  const bool linked = source.peer < peers_.size();
  const bool cut =
      linked && peers_[source.peer].state.load(std::memory_order_relaxed) == PeerState::kLost;
  double silent_s = 0;
  if (source.beat) {
    const uint64_t beat = word_at(*source.beat).load(std::memory_order_acquire);
    if (beat != armed.beat) {
      armed.beat = beat;
      armed.beat_at = now;
    }
    silent_s = std::chrono::duration<double>(now - armed.beat_at).count();
    if (const uint64_t state = beat & 15u; state != kAlive) {
      if (linked && !cut && silent_s < kLastWords) return {};
      if (!(state & kFailed)) return "it closed its Buffer";
      const uint64_t blamed = word_at(source.beat[1]).load(std::memory_order_relaxed);
      if (blamed) armed.blamed = blamed;
      return blamed ? "it gave up on rank " + std::to_string(blamed - 1)
                    : "it gave up after a fault of its own";
    }
  }
  if (source.without_us && word_at(*source.without_us).load(std::memory_order_acquire) != 0)
    return "it goes on without this rank";
  if (cut) return "the connection ended: " + peers_[source.peer].lost.status().text();
  if (source.process && now - armed.watched_at >= std::chrono::duration<double>(kLookOver)) {
    armed.watched_at = now;
    if (source.process->ended()) return "its process ended";
  }
  return silent_s > options.silent_s + source.extra_s ? "its heartbeat stopped" : "";
}

std::string Proxy::describe(const Wait& wait, const MappedRing::Armed& armed, Clock::time_point now,
                            const std::string& missing) const {
  const bool of_source = armed.next < wait.sources.size();  // else for its own writes
  size_t complete = 0;
  for (const WaitSource& source : wait.sources) {
    const Counter word =
        word_at(*source.words[armed.arm.epoch % kNumBanks]).load(std::memory_order_acquire);
    complete += reached(word, armed.arm.epoch);
  }
  std::string lacks = of_source ? wait.sources[armed.next].lacks : "";
  if (of_source && lacks.empty()) lacks = wait.lacks;
  lacks = lacks.empty() ? "not complete" : lacks + " not seen";
  char text[80];
  std::snprintf(text, sizeof text, " waited %.1f s for ",
                std::chrono::duration<double>(now - armed.start).count());
  return wait.what + " epoch " + std::to_string(armed.arm.epoch) + ", " + wait.who + text +
         missing + ": " + lacks + "; " + std::to_string(complete) + " of " +
         std::to_string(wait.sources.size() - of_source) + (of_source ? " other" : "") +
         " sources complete";
}

// What need not be seen at once: a fault of the proxy, a ring that is stuck, late arms of one that
// failed.
void Proxy::look_over(MappedRing& ring, Clock::time_point now) {
  ring.looked_ = now;
  if (ring.fault_.raised()) return ring.end_all();
  if (fault_.raised()) return ring.fail(fault_.status());
  if (ring.seen_next_ != ring.consumer_.next() || !ring.consumer_.overtaken()) {
    ring.seen_next_ = ring.consumer_.next();
    ring.moved_ = now;
    return;
  }
  const double seconds = std::chrono::duration<double>(now - ring.moved_).count();
  if (seconds <= ring.options_.timeout_s) return;
  char text[120];
  std::snprintf(text, sizeof text,
                "command %llu of a device ring is missing since %.1f s, and later ones are there: "
                "its kernel died or gave up",
                static_cast<unsigned long long>(ring.consumer_.next()), seconds);
  ring.fail({Code::kTransport, text});
}

bool Proxy::rings_wait() const {
  return std::any_of(rings_.begin(), rings_.end(),
                     [](const auto& ring) { return !ring->armed_.empty(); });
}

bool Proxy::rings_have_commands() const {
  return std::any_of(rings_.begin(), rings_.end(),
                     [](const auto& ring) { return !ring->consumer_.empty(); });
}

}  // namespace moe_comm
