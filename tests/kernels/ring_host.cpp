// kernels/ring.cuh run by host threads, and, one access at a time, in every order there is.
//
//   ring_host threads        many producers on one ring that is always full, against csrc/ring.hpp
//   ring_host interleavings  every order of the accesses of two producers and the consumer
//   ring_host waits          time limit, abort word, counters that pass 2^64
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/ring.hpp"
#include "../../kernels/ring.cuh"
#include "../cpp/check.hpp"
#include "host_block.hpp"

using namespace moe_comm;

namespace {

Transfer command_of(uint32_t producer, uint32_t seq) {  // every field follows from both
  const uint64_t a = (uint64_t{producer} << 20 | seq) * 0x9e3779b97f4a7c15ull;
  return {producer, seq & 0xffffu, uint64_t{seq} << 4, (a & 0xffffffffull) << 4,
          (a >> 33 & 0x7fffffff) << 4};
}

bool same(const Transfer& a, const Transfer& b) {
  return a.channel == b.channel && a.epoch == b.epoch && a.local_offset == b.local_offset &&
         a.remote_offset == b.remote_offset && a.num_bytes == b.num_bytes;
}

// A ring whose tickets begin anywhere: each slot holds what the lap before left in it.
struct Memory {
  Memory(uint32_t num_slots, uint64_t start) : slots(num_slots), reserved(start), seen(start) {
    control.taken_until = start;
    for (uint64_t ticket = start; ticket != start + num_slots; ++ticket) {
      const uint32_t lap = static_cast<uint32_t>(ticket / num_slots + 1) & 1u;
      slots[ticket & (num_slots - 1)] = pack_command(command_of(99, 7), lap ^ 1u);
    }
  }
  DeviceRing ring(uint64_t timeout_ns) {
    return {slots.data(), &reserved, &seen, &control.taken_until, &abort, slots.size(), timeout_ns};
  }
  std::vector<Command> slots;
  uint64_t reserved, seen, abort = 0;
  RingControl control{};
};

// Tickets whose laps and whose numbers end in the middle of a run.
std::vector<uint64_t> starts_of(uint32_t num_slots) {
  return {0, num_slots - 1u, num_slots, (1ull << 32) - 1, 0 - 2ull * num_slots, ~0ull};
}

// --- by host threads -----------------------------------------------------------------------------

void nap() { std::this_thread::sleep_for(std::chrono::microseconds(20)); }  // there may be one core

struct Host : host_block::HostAccess {
  void store_command(Command* slot, const Command& command) {
    uint64_t* words[] = {&slot->word0, &slot->word1};
    const uint64_t values[] = {command.word0, command.word1};
    const int first = turn++ & 1;  // torn, in either order
    for (const int i : {first, 1 - first}) {
      store_release(words[i], values[i]);
      if ((turn & 6) == 0) std::this_thread::yield();
    }
  }
  void pause() { nap(); }
  unsigned turn = 0;
};

void threads() {
  constexpr uint32_t kProducers = 4;
  for (const uint32_t num_slots : {1u, 4u, 64u}) {
    // one slot: every command waits for the scheduler
    const uint32_t num_commands = num_slots == 1 ? 100 : 1000;
    for (const uint64_t start : starts_of(num_slots)) {
      Memory memory(num_slots, start);
      const DeviceRing ring = memory.ring(20'000'000'000);
      std::vector<uint64_t> payload(kProducers *
                                    num_commands);  // plain stores, ordered by the push
      std::vector<std::thread> producers;
      for (uint32_t p = 0; p < kProducers; ++p) {
        producers.emplace_back([&, p] {
          Host host;
          for (uint32_t seq = 0; seq < num_commands; ++seq) {
            payload[p * num_commands + seq] = seq + 1;
            CHECK(device::push(host, ring, command_of(p, seq)) == kWaitOk);
          }
        });
      }
      RingConsumer consumer(&memory.control, memory.slots.data(), num_slots);
      std::vector<uint32_t> next(kProducers, 0);
      for (uint32_t taken = 0; taken < kProducers * num_commands;) {
        const auto transfer = consumer.take();
        if (!transfer) {
          nap();
          continue;
        }
        const uint32_t p = transfer->channel;
        CHECK(p < kProducers && same(*transfer, command_of(p, next[p])),
              "slots: " + std::to_string(num_slots));
        CHECK(payload[p * num_commands + next[p]] == next[p] + 1, "H2: the row behind the command");
        ++next[p];
        ++taken;
      }
      for (auto& thread : producers) thread.join();
      CHECK(consumer.empty());
    }
  }
}

// --- in every order ------------------------------------------------------------------------------

// NOTE [replay] An agent is a function of what its accesses returned. `Replay` feeds it the results
// it has seen so far and, at the first access behind them, throws that access; the search carries
// it out, and so steps the real code one access at a time. A state is the memory and each agent's
// results; one that was seen before is not searched again. A turn of a waiting loop that changes
// nothing is forgotten, so waits are finite; a state in which nobody can go on must be the end.
struct Access {
  enum Kind { kFetchAdd, kLoad, kStore, kCommand } kind;
  uint64_t* word = nullptr;
  uint64_t value = 0, value1 = 0;
};

struct Replay {
  const std::vector<uint64_t>& results;
  size_t at = 0;
  std::vector<size_t> turns{};  // where each turn of a waiting loop ended

  uint64_t next(const Access& access) {
    if (at == results.size()) throw access;
    return results[at++];
  }
  uint64_t fetch_add(uint64_t* word) { return next({Access::kFetchAdd, word}); }
  uint64_t load_acquire(const uint64_t* word) {
    return next({Access::kLoad, const_cast<uint64_t*>(word)});
  }
  void store_release(uint64_t* word, uint64_t value) { next({Access::kStore, word, value}); }
  void store_command(Command* slot, const Command& command) {
    // the first result says which half was stored; the second one is stored next
    const uint64_t first = next({Access::kCommand, &slot->word0, command.word0, command.word1});
    if (first == 0) {
      store_release(&slot->word1, command.word1);
    } else {
      store_release(&slot->word0, command.word0);
    }
  }
  uint64_t now_ns() { return 0; }  // nobody gives up here
  void pause() { turns.push_back(at); }
};

struct Search {
  uint32_t num_slots, commands;
  uint64_t start;
  bool abortable;
  Memory memory{num_slots, start};
  DeviceRing ring = memory.ring(1);
  std::set<std::string> seen{};
  size_t ends = 0, given_up = 0;

  struct State {
    std::vector<Command> slots;
    uint64_t reserved, seen, taken, abort;
    uint32_t pushed[2] = {0, 0};       // commands of each producer
    std::vector<uint64_t> results[2];  // of the push it is in
    uint64_t consumed = 0;             // of the consumer: commands, and the words of this one
    std::vector<uint64_t> words{};
    uint32_t got[2] = {0, 0};
  };

  std::string key(const State& s) const {
    std::string k;
    const auto put = [&](uint64_t v) { k.append(reinterpret_cast<const char*>(&v), 8); };
    for (const Command& c : s.slots) put(c.word0), put(c.word1);
    put(s.reserved), put(s.seen), put(s.taken), put(s.abort), put(s.consumed);
    for (const auto* list : {&s.results[0], &s.results[1], &s.words}) {
      put(list->size());
      for (const uint64_t v : *list) put(v);
    }
    for (const uint32_t p : {0, 1}) put(uint64_t{s.pushed[p]} << 32 | s.got[p]);
    return k;
  }
  void load(const State& s) {
    std::copy(s.slots.begin(), s.slots.end(), memory.slots.begin());
    memory.reserved = s.reserved, memory.seen = s.seen;
    memory.control.taken_until = s.taken, memory.abort = s.abort;
  }
  void save(State& s) const {
    s.slots = memory.slots;
    s.reserved = memory.reserved, s.seen = memory.seen;
    s.taken = memory.control.taken_until, s.abort = memory.abort;
  }

  // The next access of a producer, or false: its push (or it) has ended.
  bool next_access(const State& s, uint32_t p, Access& access, std::vector<size_t>& turns,
                   WaitStatus& status) {
    Replay replay{s.results[p]};
    if (s.pushed[p] == commands) return false;
    try {
      status = device::push(replay, ring, command_of(p, s.pushed[p]));
    } catch (const Access& wanted) {
      access = wanted;
      turns = replay.turns;
      return true;
    }
    return false;
  }

  void step_producer(const State& s, uint32_t p, const Access& access, std::vector<State>& out) {
    for (const uint64_t half : {0, 1}) {
      load(s);
      uint64_t result = 0;
      switch (access.kind) {
        case Access::kFetchAdd:
          result = (*access.word)++;
          break;
        case Access::kLoad:
          result = *access.word;
          break;
        case Access::kStore:
          *access.word = access.value;
          break;
        case Access::kCommand:
          result = half;
          *(access.word + half) = half ? access.value1 : access.value;
          break;
      }
      State next = s;
      save(next);
      next.results[p].push_back(result);
      settle(next, p);
      out.push_back(std::move(next));
      if (access.kind != Access::kCommand) break;
    }
  }
  // Forgets what cannot matter any more: an idle turn of a waiting loop, and a push that succeeded.
  void settle(State& s, uint32_t p) {
    Access access;
    std::vector<size_t> turns;
    WaitStatus status = kWaitOk;
    if (next_access(s, p, access, turns, status)) {
      if (turns.size() < 2) return;
      const size_t last = turns[turns.size() - 1], previous = turns[turns.size() - 2];
      s.results[p].erase(s.results[p].begin() + previous, s.results[p].begin() + last);
    } else if (status == kWaitOk) {
      ++s.pushed[p];
      s.results[p].clear();
    }
  }

  // As RingConsumer::take does it: word 0, word 1, both again, and the word `taken`.
  bool step_consumer(const State& s, std::vector<State>& out) {
    if (s.consumed == 2ull * commands) return false;
    const uint64_t ticket = start + s.consumed;
    const uint64_t lap = (ticket / num_slots + 1) & 1;
    const Command& slot = s.slots[ticket & (num_slots - 1)];
    State next = s;
    const size_t n = s.words.size();
    if (n == 0 || n == 1) {
      const uint64_t word = n == 0 ? slot.word0 : slot.word1;
      if (word >> 63 == lap) {
        next.words.push_back(0);  // only the lap is looked at
      } else {
        next.words.clear();
      }
    } else if (n == 2 || n == 3) {
      next.words.push_back(n == 2 ? slot.word0 : slot.word1);
    } else {
      const Transfer t = unpack_command({s.words[2], s.words[3]});
      CHECK(t.channel < 2 && same(t, command_of(t.channel, t.epoch)),
            "a mixture of commands was taken");
      CHECK(t.epoch == next.got[t.channel]++, "a producer's commands are taken in its order");
      next.words.clear();
      next.taken = ticket + 1;
      ++next.consumed;
    }
    out.push_back(std::move(next));
    return true;
  }

  void run() {
    State first;
    save(first);
    std::deque<State> todo{first};
    seen.insert(key(first));
    while (!todo.empty()) {
      const State s = std::move(todo.back());
      todo.pop_back();
      std::vector<State> next;
      bool all_ended = true;
      bool gave_up = false;
      for (const uint32_t p : {0u, 1u}) {
        Access access;
        std::vector<size_t> turns;
        WaitStatus status = kWaitOk;
        if (next_access(s, p, access, turns, status)) {
          all_ended = false;
          step_producer(s, p, access, next);
        }
        gave_up |= status != kWaitOk;
      }
      if (abortable && s.abort == 0) {
        next.push_back(s);
        next.back().abort = 1;
      }
      step_consumer(s, next);
      bool moved = false;
      const std::string here = key(s);
      for (State& state : next) {
        std::string k = key(state);
        moved |= k != here;
        if (seen.insert(std::move(k)).second) todo.push_back(std::move(state));
      }
      CHECK(seen.size() < 30'000'000, "too many states");
      if (all_ended && gave_up) {
        ++given_up;
        continue;
      }
      if (all_ended && s.consumed == 2ull * commands) {
        ++ends;
        continue;
      }
      CHECK(moved, "nobody can go on: " + std::to_string(s.consumed) + " taken");
    }
  }
};

void interleavings() {
  struct Case {
    uint32_t num_slots, commands;
    uint64_t start;
    bool abortable;
  };
  for (const Case& c :
       {Case{1, 1, 0, false}, Case{1, 2, 0, false}, Case{2, 2, 0, false}, Case{2, 2, ~0ull, false},
        Case{2, 2, 1, false}, Case{4, 2, 3, false}, Case{2, 3, 2, false}, Case{1, 2, 0, true}}) {
    Search search{c.num_slots, c.commands, c.start, c.abortable};
    search.run();
    CHECK(search.ends > 0, "no run came to its end");
    CHECK(!c.abortable || search.given_up > 0, "the abort word ended nobody's wait");
    std::printf("%u slots, 2 producers of %u commands from ticket %llu%s: %zu states, %zu ends\n",
                c.num_slots, c.commands, static_cast<unsigned long long>(c.start),
                c.abortable ? ", abort at any time" : "", search.seen.size(), search.ends);
  }
}

// --- waits ---------------------------------------------------------------------------------------

void waits() {
  Host host;
  Counter word = 5;
  uint64_t abort = 0;
  const uint64_t start = host.now_ns();
  CHECK(device::wait_counter(host, &word, 5, &abort, 0) == kWaitOk);
  CHECK(device::wait_counter(host, &word, 6, &abort, 20'000'000) == kWaitTimeout);
  CHECK(host.now_ns() - start >= 20'000'000 && host.now_ns() - start < 5'000'000'000);
  word = ~0ull;
  CHECK(device::wait_counter(host, &word, 1, &abort, 1'000'000) == kWaitTimeout, "2^64 is ahead");
  word = 2;
  CHECK(device::wait_counter(host, &word, ~0ull, &abort, 0) == kWaitOk, "2^64 was passed");
  std::thread setter([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    host.store_release(&word, 9);
  });
  CHECK(device::wait_counter(host, &word, 9, &abort, 10'000'000'000) == kWaitOk);
  setter.join();
  abort = 1;
  CHECK(device::wait_counter(host, &word, 10, &abort, 10'000'000'000) == kWaitAborted);
  CHECK(device::wait_counter(host, &word, 9, &abort, 0) == kWaitOk, "what is there is there");

  // a full ring: bounded by the time limit and by the abort word
  Memory memory(2, 0);
  for (uint32_t i = 0; i < 2; ++i) {
    CHECK(device::push(host, memory.ring(1'000'000), command_of(0, i)) == kWaitOk);
  }
  CHECK(device::push(host, memory.ring(1'000'000), command_of(0, 2)) == kWaitTimeout);
  memory.abort = 1;
  CHECK(device::push(host, memory.ring(10'000'000'000), command_of(0, 3)) == kWaitAborted);

  // arm: the word is cleared, and the command names channel, epoch and word
  Memory fresh(4, 3);
  const Arm wanted{12, 6, 0xfedc'ba98'7654, 1500};
  ArmedWord armed{77, 9};
  CHECK(device::arm(host, fresh.ring(0), wanted, &armed) == kWaitOk && armed.ended == 0);
  RingConsumer consumer(&fresh.control, fresh.slots.data(), 4);
  const Arm taken = unpack_arm(consumer.take_command().value());
  CHECK(taken.channel == 12 && taken.word_idx == 6 && taken.timeout_ms == 1500);
  CHECK(taken.epoch == 0xfedc'ba98'7654);

  // one that nobody will take ends at once, with what it is to end with
  armed = {0, 9};
  CHECK(device::arm(host, memory.ring(1'000'000), wanted, &armed) == kWaitAborted);
  CHECK(armed.ended == 1 && armed.status == kWaitAborted, "the ring is full, and aborted");
  memory.abort = 0, armed = {0, 9};
  CHECK(device::arm(host, memory.ring(1'000'000), wanted, &armed) == kWaitTimeout);
  CHECK(armed.ended == 1 && armed.status == kWaitTimeout, "the ring is full");
  fresh.abort = 1, armed = {0, 9};
  CHECK(device::arm(host, fresh.ring(0), wanted, &armed) == kWaitAborted);
  CHECK(armed.ended == 1 && armed.status == kWaitAborted, "there is room, but the ring ended");
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, void (*)()> cases{
      {"threads", threads}, {"interleavings", interleavings}, {"waits", waits}};
  CHECK(argc == 2 && cases.count(argv[1]), "expected one of threads, interleavings, waits");
  cases.at(argv[1])();
}
