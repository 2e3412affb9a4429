// The command ring: every command once, in its producer's order, whatever the order in which words
// land. H2.
#include <array>
#include <map>
#include <memory>
#include <set>
#include <thread>
#include <tuple>

#include "cases.hpp"
#include "ring.hpp"
#include "wait.hpp"

using namespace moe_comm;
using cases::Random;

namespace {

constexpr uint64_t kMaxOffset = 0xffffffffull << 4, kMaxBytes = 0x7fffffffull << 4;

bool same(const Transfer& a, const Transfer& b) {
  return a.channel == b.channel && a.epoch == b.epoch && a.local_offset == b.local_offset &&
         a.remote_offset == b.remote_offset && a.num_bytes == b.num_bytes;
}

uint64_t mix(uint64_t v) {  // splitmix64: any two commands differ in every field
  v += 0x9e3779b97f4a7c15;
  v = (v ^ v >> 30) * 0xbf58476d1ce4e5b9;
  v = (v ^ v >> 27) * 0x94d049bb133111eb;
  return v ^ v >> 31;
}

// The seq-th command of a producer: all fields but the channel follow from both, so a mixture of
// two shows.
Transfer command_of(uint32_t producer, uint32_t seq) {
  const uint64_t a = mix(uint64_t{producer} << 32 | seq), b = mix(a);
  return {producer, static_cast<uint32_t>(a & 0xffff), uint64_t{seq} << 4, b & kMaxOffset,
          (a >> 16 & 0x7fffffff) << 4};
}

// A ring whose counters start anywhere: each slot holds what the lap before `start` left in it.
struct Ring {
  Ring(uint32_t num_slots, uint64_t start) : num_slots(num_slots), slots(new Command[num_slots]()) {
    control.reserved_until = control.taken_until = start;
    const RingProducer laps = producer();
    for (uint64_t ticket = start; ticket != start + num_slots; ++ticket) {
      const uint64_t old =
          static_cast<uint64_t>(laps.lap_of(ticket) ^ 1) << 63 | (mix(ticket) >> 1);
      slots[ticket & (num_slots - 1)] = {old, old};
    }
  }
  RingProducer producer() { return {&control, slots.get(), num_slots}; }
  RingConsumer consumer() { return {&control, slots.get(), num_slots}; }

  RingControl control{};
  uint32_t num_slots;
  std::unique_ptr<Command[]> slots;
};

// Beginnings whose tickets pass a lap's end, the middle of a lap, 2^32 and 2^64.
std::vector<uint64_t> starts_of(uint32_t num_slots) {
  return {0, 1, num_slots, 3ull * num_slots - 1, (1ull << 32) - 3, 0 - 2ull * num_slots, ~0ull};
}

// --- pack and unpack -----------------------------------------------------------------------------

void pack_and_unpack() {
  const auto round_trip = [](const Transfer& t) {
    for (const uint32_t lap : {0u, 1u, 2u, ~0u}) {
      const Command command = pack_command(t, lap);
      CHECK(command.word0 >> 63 == (lap & 1) && command.word1 >> 63 == (lap & 1));
      CHECK(same(unpack_command(command), t));
    }
  };
  const Transfer most{kMaxChannels - 1, 0xffff, kMaxOffset, kMaxOffset, kMaxBytes};
  for (unsigned which = 0; which < 32;
       ++which) {  // every field at its least and at its most, independently
    round_trip({which & 1 ? most.channel : 0, which & 2 ? most.epoch : 0,
                which & 4 ? most.local_offset : 0, which & 8 ? most.remote_offset : 0,
                which & 16 ? most.num_bytes : 0});
  }
  Random random(1);
  for (int i = 0; i < 20000; ++i) {
    round_trip({static_cast<uint32_t>(random() % kMaxChannels),
                static_cast<uint32_t>(random() & 0xffff), random() & kMaxOffset,
                random() & kMaxOffset, random() & kMaxBytes});
  }
  for (int bit = 0; bit < 63; ++bit) {  // no two fields share a bit, and none is unused
    const Transfer a = unpack_command({1ull << bit, 0}), b = unpack_command({0, 1ull << bit});
    const Transfer none{};
    CHECK(!same(a, none) && !same(b, none));
  }
}

// --- every schedule ------------------------------------------------------------------------------

// Two producers (or so), each a little program: reserve; store one word; store the other; again.
// The consumer tries to take at any time. The model is a list of tickets with the words stored so
// far.
template <uint32_t kSlots, int kProducers, int kCommands>
class Schedules {
 public:
  explicit Schedules(uint64_t start) : start_(start) {}

  double count() {  // of all schedules; each step of each is checked
    Ring ring(kSlots, start_);
    State first;
    first.control = ring.control;
    std::copy_n(ring.slots.get(), kSlots, first.slots.begin());
    return explore(first);
  }
  size_t num_states() const { return seen_.size(); }

 private:
  struct Producer {
    int begun = 0;       // commands reserved
    unsigned words = 3;  // of the newest one: bit 0, word 0 was stored; bit 1, word 1
    uint64_t ticket = 0;
  };
  struct Listed {  // the model: one reserved ticket that was not taken
    int producer;
    int seq;
    unsigned words;
  };
  struct State {
    RingControl control{};
    std::array<Command, kSlots> slots{};
    std::array<Producer, kProducers> producers{};
    std::vector<Listed> list;
    int taken[kProducers] = {};

    std::vector<uint64_t> key() const {
      std::vector<uint64_t> k{control.reserved_until, control.taken_until};
      for (const Command& c : slots) k.insert(k.end(), {c.word0, c.word1});
      for (const Producer& p : producers) k.insert(k.end(), {uint64_t(p.begun), p.words, p.ticket});
      for (const Listed& l : list)
        k.insert(k.end(), {uint64_t(l.producer), uint64_t(l.seq), l.words});
      for (const int n : taken) k.push_back(static_cast<uint64_t>(n));
      return k;
    }
  };

  double explore(State state) {
    const auto key = state.key();
    if (const auto found = seen_.find(key); found != seen_.end()) return found->second;
    double schedules = 0;
    bool any = false;
    for (int p = 0; p < kProducers; ++p) {
      for (const unsigned word : {1u, 2u}) {
        State next = state;
        if (!step(next, p, word)) continue;
        any = true;
        schedules += explore(std::move(next));
      }
    }
    State next = state;
    if (try_take(next)) {
      any = true;
      schedules += explore(std::move(next));
    }
    if (!any) {
      for (const Producer& p : state.producers) CHECK(p.begun == kCommands, "a schedule got stuck");
      CHECK(state.list.empty(), "a schedule ended with a command left");
      schedules = 1;
    }
    return seen_[key] = schedules;
  }

  // One step of a producer; false if it has none to make (a reservation is one step, whichever
  // `word`).
  static bool step(State& state, int index, unsigned word) {
    Producer& p = state.producers[index];
    RingProducer ring(&state.control, state.slots.data(), kSlots);
    if (p.words == 3) {
      if (p.begun == kCommands || word != 1) return false;
      p.ticket = ring.reserve();
      p.words = 0;
      state.list.push_back({index, p.begun++, 0});
      return true;
    }
    // The oldest untaken tickets, as many as there are slots, may be written.
    const auto mine = std::find_if(state.list.begin(), state.list.end(), [&](const Listed& l) {
      return l.producer == index && l.words != 3;
    });
    CHECK(ring.full(p.ticket) == (mine - state.list.begin() >= kSlots), "full() is wrong");
    if (ring.full(p.ticket) || (p.words & word)) return false;
    const Command c = pack_command(command_of(index, mine->seq), ring.lap_of(p.ticket));
    Command& slot = state.slots[p.ticket % kSlots];
    (word == 1 ? slot.word0 : slot.word1) = word == 1 ? c.word0 : c.word1;  // publish(), cut in two
    p.words |= word;
    mine->words |= word;
    return true;
  }

  // Always may try; true if it took a command, which it must exactly when the list's first is
  // complete.
  static bool try_take(State& state) {
    RingConsumer ring(&state.control, state.slots.data(), kSlots);
    const bool there = !state.list.empty() && state.list.front().words == 3;
    CHECK(ring.empty() == !there, "empty() is wrong");
    const auto taken = ring.take();
    CHECK(taken.has_value() == there, there ? "a command is not taken" : "half a command is taken");
    if (!there) return false;
    const Listed expected = state.list.front();
    state.list.erase(state.list.begin());
    CHECK(same(*taken, command_of(expected.producer, expected.seq)), "another command is taken");
    CHECK(expected.seq == state.taken[expected.producer]++, "a producer's order is broken");
    return true;
  }

  uint64_t start_;
  std::map<std::vector<uint64_t>, double>
      seen_;  // schedules from each state on; a schedule's past is in the state
};

template <uint32_t kSlots, int kProducers, int kCommands>
void explore_all() {
  for (const uint64_t start : starts_of(kSlots)) {
    Schedules<kSlots, kProducers, kCommands> schedules(start);
    const double count = schedules.count();
    CHECK(count > 1000, "the exploration did not explore");
    if (start == 0) {
      std::printf("  %d producers x %d commands, %u slots: %.0f schedules, %zu states\n",
                  kProducers, kCommands, kSlots, count, schedules.num_states());
    }
  }
}

void every_schedule() {
  explore_all<2, 2, 2>();
  explore_all<1, 2, 2>();
  explore_all<2, 2, 3>();  // laps 1, 0 and 1 again
  explore_all<4, 2, 3>();
}

// --- torn words ----------------------------------------------------------------------------------

void half_a_command_is_not_there() {
  for (const uint32_t num_slots : {1u, 2u, 4u}) {
    for (const uint64_t start : starts_of(num_slots)) {
      Ring ring(num_slots, start);
      RingProducer producer = ring.producer();
      RingConsumer consumer = ring.consumer();
      for (uint32_t i = 0; i < 6 * num_slots; ++i) {
        const uint64_t ticket = producer.reserve();
        CHECK(!producer.full(ticket) && consumer.empty() && !consumer.take());
        const Command c = pack_command(command_of(7, i), producer.lap_of(ticket));
        Command& slot = ring.slots[ticket & (num_slots - 1)];
        (i / 3 % 2 ? slot.word0 : slot.word1) = i / 3 % 2 ? c.word0 : c.word1;
        CHECK(consumer.empty() && !consumer.take(), "taken after one word");
        slot = c;
        CHECK(!consumer.empty());
        const auto taken = consumer.take();
        CHECK(taken && same(*taken, command_of(7, i)));
      }
    }
  }
}

// --- threads -------------------------------------------------------------------------------------

// publish() as a GPU may do it: either word first, and something else in between.
void publish_torn(Ring& ring, uint64_t ticket, const Transfer& transfer, Random& random) {
  const Command c = pack_command(transfer, ring.producer().lap_of(ticket));
  Command& slot = ring.slots[ticket & (ring.num_slots - 1)];
  const bool second_first = random() % 2;
  std::atomic_ref(second_first ? slot.word1 : slot.word0)
      .store(second_first ? c.word1 : c.word0, std::memory_order_release);
  for (uint64_t pause = random() % 4; pause > 0; --pause) sched_yield();
  std::atomic_ref(second_first ? slot.word0 : slot.word1)
      .store(second_first ? c.word0 : c.word1, std::memory_order_release);
}

// Everything that was pushed arrives once and in its producer's order, with the rows behind it (H1:
// plain stores).
void pass_commands(uint32_t num_slots, uint64_t start, int num_producers, uint32_t num_commands,
                   bool torn) {
  Ring ring(num_slots, start);
  std::vector<std::vector<uint64_t>> rows(num_producers, std::vector<uint64_t>(num_commands));
  std::atomic<bool> go{false};
  std::vector<std::thread> threads;
  for (int p = 0; p < num_producers; ++p) {
    threads.emplace_back([&, p] {
      RingProducer producer = ring.producer();
      Random random(p + start);
      while (!go.load(std::memory_order_relaxed)) sched_yield();
      for (uint32_t i = 0; i < num_commands; ++i) {
        rows[p][i] = mix(i + 1000 * p);
        const uint64_t ticket = producer.reserve();
        for (Backoff backoff; producer.full(ticket);) backoff.step();
        const Transfer transfer = command_of(p, i);
        if (torn)
          publish_torn(ring, ticket, transfer, random);
        else
          producer.publish(ticket, transfer);
      }
    });
  }
  go = true;
  std::vector<uint32_t> next(num_producers, 0);
  RingConsumer consumer = ring.consumer();
  Backoff backoff;
  for (uint64_t left = uint64_t{num_commands} * num_producers; left > 0;) {
    const auto taken = consumer.take();
    if (!taken) {
      backoff.step();
      continue;
    }
    backoff.reset();
    --left;
    CHECK(taken->channel < next.size(), "a command nobody pushed");
    const uint32_t seq = next[taken->channel]++;
    CHECK(seq < num_commands && same(*taken, command_of(taken->channel, seq)),
          "expected command " + std::to_string(seq) + " of " + std::to_string(taken->channel));
    CHECK(rows[taken->channel][seq] == mix(seq + 1000 * taken->channel),
          "the rows behind it are not there");
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(consumer.empty() && !consumer.take(), "one too many");
  CHECK(ring.control.reserved_until == ring.control.taken_until);
}

void many_producers() {
  for (const uint32_t num_slots : {1u, 2u, 8u, 64u}) {
    for (const uint64_t start : starts_of(num_slots))
      pass_commands(num_slots, start, 4, 300, false);
  }
  pass_commands(4, 0 - 10'000ull, 3, 8000, false);  // thousands of laps and past 2^64
}

void many_torn_producers() {
  for (const uint32_t num_slots : {2u, 8u}) {
    for (const uint64_t start : starts_of(num_slots)) pass_commands(num_slots, start, 3, 300, true);
  }
}

void a_full_ring_waits() {
  for (const uint64_t start : starts_of(4)) {
    Ring ring(4, start);
    RingProducer producer = ring.producer();
    RingConsumer consumer = ring.consumer();
    for (uint32_t i = 0; i < 4; ++i) {
      const uint64_t ticket = producer.reserve();
      CHECK(!producer.full(ticket));
      producer.publish(ticket, command_of(0, i));
    }
    const uint64_t fifth = producer.reserve(), sixth = producer.reserve();
    CHECK(producer.full(fifth) && producer.full(sixth));
    std::atomic<bool> published{false};
    std::thread waiter([&] {
      RingProducer mine = ring.producer();
      while (mine.full(sixth)) sched_yield();
      mine.publish(sixth, command_of(0, 5));  // before the fifth
      published = true;
    });
    const timespec pause{0, 2'000'000};
    nanosleep(&pause, nullptr);
    CHECK(!published, "the ring was full");
    for (uint32_t i = 0; i < 2; ++i) CHECK(same(*consumer.take(), command_of(0, i)));
    waiter.join();
    CHECK(!producer.full(fifth));
    for (uint32_t i = 2; i < 4; ++i) CHECK(same(*consumer.take(), command_of(0, i)));
    CHECK(!consumer.take(), "the sixth overtook the fifth");
    producer.publish(fifth, command_of(0, 4));
    for (uint32_t i = 4; i < 6; ++i) CHECK(same(*consumer.take(), command_of(0, i)));
    CHECK(consumer.empty());
  }
}

}  // namespace

int main(int argc, char** argv) {
  return cases::run(argc, argv,
                    {{"pack_and_unpack", pack_and_unpack},
                     {"every_schedule", every_schedule},
                     {"half_a_command_is_not_there", half_a_command_is_not_there},
                     {"a_full_ring_waits", a_full_ring_waits},
                     {"many_producers", many_producers},
                     {"many_torn_producers", many_torn_producers}});
}
