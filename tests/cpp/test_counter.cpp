// Immediates to counters: any order, two epochs mixed, and what must not count. H5. And the
// doorbell behind the words.
#include <algorithm>
#include <array>
#include <deque>
#include <thread>

#include "cases.hpp"
#include "counter.hpp"

using namespace moe_comm;
using cases::Random;

namespace {

struct Words {
  Counter words[kNumBanks] = {0, 0};
  RowTarget target(const std::string& what) { return {{&words[0], &words[1]}, nullptr, what}; }
};

uint32_t open(RowTable& table, RowTarget target, uint64_t first_epoch) {
  auto row = table.open(std::move(target), first_epoch);
  CHECK(row.ok(), row.status().text());
  return row.value();
}

constexpr uint64_t kFirstEpochs[] = {
    2, 3, 62, 63, (1ull << 32) - 2, (1ull << 32) - 1, 1ull << 40, 0 - 64ull};

// --- what counts ---------------------------------------------------------------------------------

// What a row's peer may have under way: in each bank the messages one after the other, the banks in
// any order.
class Sender {
 public:
  Sender(uint64_t first_epoch, int num_epochs, Random& random) {
    for (uint64_t e = first_epoch; e != first_epoch + num_epochs; ++e) {
      const uint32_t most = random() % 4 == 0 ? kMaxWritesPerMessage : 4;
      messages_[e % kNumBanks].push_back({e, static_cast<uint32_t>(1 + random() % most), 0});
    }
  }
  bool ended() const { return messages_[0].empty() && messages_[1].empty(); }

  // Counts one immediate and says what the words must be then.
  void count_one(RowTable& table, uint32_t row, Words& words, Random& random) {
    const size_t bank = messages_[0].empty() ? 1 : messages_[1].empty() ? 0 : random() % 2;
    Message& m = messages_[bank].front();
    CHECK_OK(table.count(Immediate::protocol(row, m.epoch, m.num_writes)));
    if (++m.arrived == m.num_writes) {
      expected_[bank] = m.epoch;
      messages_[bank].pop_front();
    }
    CHECK(words.words[0] == expected_[0] && words.words[1] == expected_[1]);
  }

 private:
  struct Message {
    uint64_t epoch;
    uint32_t num_writes, arrived;
  };
  std::deque<Message> messages_[kNumBanks];
  uint64_t expected_[kNumBanks] = {0, 0};
};

void any_order_and_two_epochs_mixed() {
  Random random(1);
  for (int round = 0; round < 20; ++round) {
    RowTable table;
    std::deque<Words> words;
    std::vector<Sender> senders;
    std::vector<uint32_t> rows;
    for (const uint64_t first_epoch : kFirstEpochs) {  // a row each, and all of them mixed
      words.emplace_back();
      senders.emplace_back(first_epoch, 140, random);  // the 6 bits of the epoch wrap twice
      rows.push_back(open(table, words.back().target("rows of rank 3"), first_epoch));
    }
    for (std::vector<size_t> left;;) {
      left.clear();
      for (size_t i = 0; i < senders.size(); ++i) {
        if (!senders[i].ended()) left.push_back(i);
      }
      if (left.empty()) break;
      const size_t pick = left[random() % left.size()];
      senders[pick].count_one(table, rows[pick], words[pick], random);
    }
    CHECK(table.dropped() == 0);
  }
}

void every_number_of_writes() {
  for (const uint64_t first_epoch : kFirstEpochs) {
    RowTable table;
    Words words;
    const uint32_t row = open(table, words.target("rows"), first_epoch);
    uint64_t epoch = first_epoch;
    for (uint32_t n = 1; n <= kMaxWritesPerMessage; ++n, ++epoch) {
      const Immediate immediate = Immediate::protocol(row, epoch, n);
      CHECK(!immediate.is_user() && immediate.row() == row && immediate.num_writes() == n);
      for (uint32_t i = 0; i < n; ++i) {
        CHECK(words.words[epoch % 2] != epoch, "published before the last write");
        CHECK_OK(table.count(immediate));
      }
      CHECK(words.words[epoch % 2] == epoch);
    }
  }
}

// Every interleaving of two messages of 1 to 4 writes.
void every_interleaving_of_two_messages() {
  for (uint32_t a = 1; a <= 4; ++a) {
    for (uint32_t b = 1; b <= 4; ++b) {
      for (uint32_t order = 0; order < 1u << (a + b); ++order) {
        if (static_cast<uint32_t>(__builtin_popcount(order)) != b) continue;
        RowTable table;
        Words words;
        const uint32_t row = open(table, words.target("rows"), 62);
        uint32_t seen[2] = {0, 0};
        for (uint32_t i = 0; i < a + b; ++i) {
          const uint32_t second = order >> i & 1;
          ++seen[second];
          CHECK_OK(table.count(Immediate::protocol(row, 62 + second, second ? b : a)));
          CHECK(words.words[0] == (seen[0] == a ? 62 : 0) &&
                words.words[1] == (seen[1] == b ? 63 : 0));
        }
      }
    }
  }
}

// --- what must not -------------------------------------------------------------------------------

void expect_error(const Status& status, uint64_t got_mod_64, uint64_t expected) {
  CHECK(!status.ok(), "this immediate should be an error");
  CHECK(status.code() == Code::kTransport);
  for (const std::string& part :
       {std::string("rows of rank 3"), "epoch " + std::to_string(got_mod_64) + " (mod 64)",
        "expected " + std::to_string(expected % 64), "epoch " + std::to_string(expected) + ")"}) {
    CHECK(status.text().find(part) != std::string::npos,
          "'" + part + "' is not in: " + status.text());
  }
}

void unknown_epochs_and_duplicates_are_errors() {
  for (const uint64_t first : kFirstEpochs) {
    RowTable table;
    Words words;
    const uint32_t row = open(table, words.target("rows of rank 3"), first);
    for (const uint64_t wrong : {first + 2, first + 3, first - 2, first + 62, first + 32}) {
      expect_error(table.count(Immediate::protocol(row, wrong, 1)), wrong % 64,
                   wrong % 2 == first % 2 ? first : first + 1);
    }
    CHECK(words.words[0] == 0 && words.words[1] == 0, "an error counts for nothing");
    for (int i = 0; i < 3; ++i) CHECK_OK(table.count(Immediate::protocol(row, first, 3)));
    expect_error(table.count(Immediate::protocol(row, first, 3)), first % 64,
                 first + 2);  // the fourth of three
    CHECK(words.words[first % 2] == first && words.words[(first + 1) % 2] == 0);
    CHECK_OK(table.count(Immediate::protocol(row, first + 2, 1)));  // and the row still works
    CHECK_OK(table.count(Immediate::protocol(row, first + 1, 1)));
    CHECK(words.words[first % 2] == first + 2 && words.words[(first + 1) % 2] == first + 1);
    CHECK(table.dropped() == 0);
  }
}

void closed_and_unknown_rows_are_dropped_and_counted() {
  RowTable table;
  Words old_words, new_words;
  const uint32_t old_row = open(table, old_words.target("old"), 2);
  CHECK_OK(table.count(Immediate::protocol(old_row, 2, 2)));
  table.close(old_row);
  const uint32_t new_row = open(table, new_words.target("new"), 2);
  CHECK(new_row != old_row, "a row was handed out twice");
  CHECK_OK(table.count(Immediate::protocol(old_row, 2, 2)));  // late
  CHECK_OK(table.count(Immediate::protocol(old_row, 4, 1)));
  CHECK_OK(table.count(Immediate::protocol(old_row, 7, 1)));  // not even its epoch is looked at
  CHECK(table.dropped() == 3);
  for (const uint32_t unknown : {new_row + 1, kImmediateRows - 1})
    CHECK_OK(table.count(Immediate::protocol(unknown, 2, 1)));
  CHECK(table.dropped() == 5);
  CHECK(old_words.words[0] == 0 && old_words.words[1] == 0 && new_words.words[0] == 0 &&
        new_words.words[1] == 0);
  CHECK_OK(table.count(Immediate::protocol(new_row, 2, 1)));
  CHECK(new_words.words[0] == 2 && table.dropped() == 5);
}

void rows_end_with_an_error() {
  RowTable table;
  Words words;
  for (uint32_t i = 0; i < kImmediateRows; ++i) CHECK(open(table, words.target(""), 2) == i);
  CHECK(!table.open(words.target(""), 2).ok());
  CHECK_OK(table.count(
      Immediate::protocol(kImmediateRows - 1, 2, 1)));  // the last one fits into the immediate
  CHECK(words.words[0] == 2 && table.dropped() == 0);
  table.close(0);
  CHECK(!table.open(words.target(""), 2).ok(), "a closed row came back");
}

// --- words and doorbell --------------------------------------------------------------------------

// Two threads, each waiting for the other's row: a lost wake-up is a round of ten seconds.
void the_doorbell_wakes_whoever_waits() {
  constexpr uint64_t kRounds = 20000;
  struct Side {
    Words words;
    Doorbell bell{0, 0};
    RowTable table;  // used by the other side's thread, which plays my proxy
    uint32_t row = 0;
    uint64_t rows[2] = {0, 0};  // plain bytes, published by the counter (H5, H6)
  };
  std::array<Side, 2> sides;
  for (Side& side : sides) {
    RowTarget target = side.words.target("rows");
    target.bell = &side.bell;
    side.row = open(side.table, target, 2);
  }
  const auto play = [&](int me) {
    Side& mine = sides[me];
    Side& other = sides[1 - me];
    for (uint64_t e = 2; e < 2 + kRounds; ++e) {
      if (me == 0) {
        other.rows[e % 2] = e * 3;
        CHECK_OK(other.table.count(Immediate::protocol(other.row, e, 1)));
      }
      const auto there = [&] {
        return word_at(mine.words.words[e % 2]).load(std::memory_order_acquire) == e;
      };
      const auto start = Clock::now();
      for (int spins = static_cast<int>(e % 7); spins > 0 && !there(); --spins) pause_cpu();
      while (!there()) {
        sleep_on(mine.bell, 10.0, there);
        CHECK(seconds_since(start) < 8.0, "a wake-up was lost");
      }
      CHECK(mine.rows[e % 2] == e * 3);
      if (me == 1) {
        other.rows[e % 2] = e * 3;
        CHECK_OK(other.table.count(Immediate::protocol(other.row, e, 1)));
      }
    }
  };
  std::thread second([&] { play(1); });
  play(0);
  second.join();
  CHECK(sides[0].bell.rings + sides[1].bell.rings > 0, "nobody ever slept: this shows nothing");
  for (Side& side : sides) CHECK(side.bell.sleepers == 0);
}

void nobody_sleeps_nobody_is_rung() {
  RowTable table;
  Words words;
  Doorbell bell{0, 0};
  RowTarget target = words.target("rows");
  target.bell = &bell;
  const uint32_t row = open(table, target, 2);
  CHECK_OK(table.count(Immediate::protocol(row, 2, 1)));
  CHECK(bell.rings == 0, "a system call for nobody");
  bell.sleepers = 1;
  CHECK_OK(table.count(Immediate::protocol(row, 3, 2)));
  CHECK(bell.rings == 0, "nothing to say yet");
  CHECK_OK(table.count(Immediate::protocol(row, 3, 2)));
  CHECK(bell.rings == 1);
  const auto start = Clock::now();
  sleep_on(bell, 10.0, [] { return true; });
  CHECK(seconds_since(start) < 5.0, "slept although ready");
  sleep_on(bell, 0.05, [] { return false; });
  CHECK(seconds_since(start) >= 0.05 && bell.sleepers == 1);
}

void wait_change_ends() {
  Counter word = 5;
  const auto start = Clock::now();
  CHECK(wait_change(word, 4, 10.0) == 5);
  CHECK(wait_change(word, 5, 0.05) == 5 && seconds_since(start) >= 0.05);
  std::thread writer([&] {
    const timespec pause{0, 5'000'000};
    nanosleep(&pause, nullptr);
    word_at(word).store(6, std::memory_order_release);
  });
  CHECK(wait_change(word, 5, 30.0) == 6);
  CHECK(seconds_since(start) < 20.0);
  writer.join();
}

}  // namespace

int main(int argc, char** argv) {
  return cases::run(
      argc, argv,
      {{"any_order_and_two_epochs_mixed", any_order_and_two_epochs_mixed},
       {"every_number_of_writes", every_number_of_writes},
       {"every_interleaving_of_two_messages", every_interleaving_of_two_messages},
       {"unknown_epochs_and_duplicates_are_errors", unknown_epochs_and_duplicates_are_errors},
       {"closed_and_unknown_rows_are_dropped_and_counted",
        closed_and_unknown_rows_are_dropped_and_counted},
       {"rows_end_with_an_error", rows_end_with_an_error},
       {"the_doorbell_wakes_whoever_waits", the_doorbell_wakes_whoever_waits},
       {"nobody_sleeps_nobody_is_rung", nobody_sleeps_nobody_is_rung},
       {"wait_change_ends", wait_change_ends}});
}
