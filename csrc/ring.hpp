// The command ring: many producers (GPU CTAs, CPU threads), one consumer (the proxy). H2.
//
// A producer reserves a slot by one fetch_add, waits (bounded by the caller) until the consumer has
// taken the command a lap ago, and stores two words that both carry the lap bit. The consumer takes
// a command when both words show the lap it expects; a half-seen command is simply not there yet.
// ring.cuh is the device's producer of the same protocol.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "abi.hpp"

namespace moe_comm {

// In memory both sides can reach; zeroed at start. `taken` is written by the consumer only.
struct RingControl {
  alignas(64) uint64_t reserved_until;
  alignas(64) uint64_t taken_until;
};

class RingProducer {
 public:
  RingProducer(RingControl* control, Command* slots, uint32_t num_slots)
      : control_(control), slots_(slots), mask_(num_slots - 1) {}

  // The ticket of a slot; full() until the consumer made room.
  uint64_t reserve() {
    return std::atomic_ref(control_->reserved_until).fetch_add(1, std::memory_order_relaxed);
  }
  bool full(uint64_t ticket) const {
    return ticket - std::atomic_ref(control_->taken_until).load(std::memory_order_acquire) > mask_;
  }
  void publish(uint64_t ticket, const Transfer& transfer) {
    const Command command = pack_command(transfer, lap_of(ticket));
    Command& slot = slots_[ticket & mask_];
    std::atomic_ref(slot.word0)
        .store(command.word0, std::memory_order_release);  // H2: either order will do
    std::atomic_ref(slot.word1).store(command.word1, std::memory_order_release);
  }
  uint32_t lap_of(uint64_t ticket) const {
    return (ticket / (mask_ + 1) + 1) & 1;
  }  // first lap writes 1 over 0

 private:
  RingControl* control_;
  Command* slots_;
  uint64_t mask_;
};

class RingConsumer {
 public:
  RingConsumer(RingControl* control, Command* slots, uint32_t num_slots)
      : control_(control), slots_(slots), mask_(num_slots - 1), next_(control->taken_until) {}

  bool empty() const { return !both_words_there(slots_[next_ & mask_]); }
  std::optional<Transfer> take() {
    const auto command = take_command();
    if (!command) return std::nullopt;
    return unpack_command(*command);
  }
  std::optional<Command> take_command() {
    Command& slot = slots_[next_ & mask_];
    if (!both_words_there(slot)) return std::nullopt;
    const Command command{std::atomic_ref(slot.word0).load(std::memory_order_relaxed),
                          std::atomic_ref(slot.word1).load(std::memory_order_relaxed)};
    ++next_;
    std::atomic_ref(control_->taken_until).store(next_, std::memory_order_release);
    return command;
  }
  uint64_t next() const { return next_; }  // the ticket that is taken next
  // Only one word of the next command is there.
  bool torn() const { return there(next_).first != there(next_).second; }
  // A command behind the next one is there.
  bool overtaken() const {
    for (uint64_t ticket = next_ + 1; ticket - next_ <= mask_; ++ticket) {
      if (const auto [word0, word1] = there(ticket); word0 && word1) return true;
    }
    return false;
  }

 private:
  std::pair<bool, bool> there(uint64_t ticket) const {
    Command& slot = slots_[ticket & mask_];
    const uint64_t lap = (ticket / (mask_ + 1) + 1) & 1;
    return {std::atomic_ref(slot.word0).load(std::memory_order_acquire) >> 63 == lap,
            std::atomic_ref(slot.word1).load(std::memory_order_acquire) >> 63 == lap};
  }
  bool both_words_there(
      Command& slot) const {  // H2: acquire, then the rows behind the command can be read
    const uint64_t lap = (next_ / (mask_ + 1) + 1) & 1;
    return (std::atomic_ref(slot.word0).load(std::memory_order_acquire) >> 63) == lap &&
           (std::atomic_ref(slot.word1).load(std::memory_order_acquire) >> 63) == lap;
  }

  RingControl* control_;
  Command* slots_;
  uint64_t mask_;
  uint64_t next_;
};

// A ring in this process's own memory.
class HostRing {
 public:
  explicit HostRing(uint32_t num_slots)  // a power of two
      : slots_(new Command[num_slots]()), num_slots_(num_slots) {}
  RingProducer producer() { return {&control_, slots_.get(), num_slots_}; }
  RingConsumer consumer() { return {&control_, slots_.get(), num_slots_}; }

 private:
  RingControl control_{};
  std::unique_ptr<Command[]> slots_;
  uint32_t num_slots_;
};

}  // namespace moe_comm
