// Two or three proxies over the shm backend, plain and with its order shaken (chaos): what a rank
// asks of its proxy, from many threads, until the end.
#include <dirent.h>

#include <atomic>
#include <thread>

#include "proxy_ranks.hpp"

using namespace moe_comm;
using namespace proxy_ranks;

namespace {

std::byte pattern(uint64_t seed, uint64_t i) {
  return static_cast<std::byte>((seed * 0x9e3779b97f4a7c15 + i * 0xbf58476d1ce4e5b9) >> 40);
}

// --- messages ------------------------------------------------------------------------------------

// Windows of one rank to another as the exchange uses them: two banks, a command for each message,
// an immediate of no bytes back when the bank was read, and nothing sent before its bank is free on
// both sides.
class Flow {
 public:
  static constexpr uint64_t kBank = 16 << 10;

  Flow(Rank& from, uint32_t peer, Rank& to, uint32_t peer_back, uint64_t number,
       uint64_t first_epoch)
      : from_(from),
        to_(to),
        send_at_(number * 2 * kBank),
        window_at_((number + 8) * 2 * kBank),
        seed_(number + 1),
        first_(first_epoch) {
    const uint32_t window =
        value_of(to.proxy.open_row({{&words_[0], &words_[1]}, &to_bell_, "window"}, first_));
    const uint32_t release = value_of(
        from.proxy.open_row({{&released_[0], &released_[1]}, &from_bell_, "release"}, first_));
    channel_ = value_of(from.proxy.open_channel(
        {peer, &from.region, to.remote, window, {&sent_[0], &sent_[1]}, &from_bell_}));
    back_ = value_of(to.proxy.open_channel(
        {peer_back, &to.region, from.remote, release, {nullptr, nullptr}, nullptr}));
  }

  static uint64_t num_bytes_of(uint64_t epoch) {
    return epoch % 9 * (kBank / 8) & ~15ull;
  }  // 0 to all of a bank

  void send(int num_epochs) {
    uint64_t pushed[kNumBanks] = {0, 0};
    for (uint64_t e = first_; e < first_ + num_epochs; ++e) {
      const uint64_t bank = e % kNumBanks, num_bytes = num_bytes_of(e),
                     at = send_at_ + bank * kBank;
      if (e >= first_ + kNumBanks) wait_for(from_bell_, released_[bank], e - kNumBanks, "release");
      wait_for(from_bell_, sent_[bank], pushed[bank]++, "sent");
      for (uint64_t i = 0; i < num_bytes; ++i) from_.at(at)[i] = pattern(seed_ + e, i);  // H1
      CHECK_OK(from_.proxy.push(
          {channel_, static_cast<uint32_t>(e & 0xffff), at, window_at_ + bank * kBank, num_bytes},
          kSoon));
    }
    for (uint64_t e = first_ + num_epochs - kNumBanks; e < first_ + num_epochs; ++e) {
      wait_for(from_bell_, sent_[e % kNumBanks], pushed[e % kNumBanks], "last sent");
      wait_for(from_bell_, released_[e % kNumBanks], e, "last release");
    }
  }

  void receive(int num_epochs) {
    for (uint64_t e = first_; e < first_ + num_epochs; ++e) {
      const uint64_t bank = e % kNumBanks, num_bytes = num_bytes_of(e);
      wait_for(to_bell_, words_[bank], e, "window");
      std::byte* window = to_.at(window_at_ + bank * kBank);
      for (uint64_t i = 0; i < num_bytes;
           ++i) {  // H4, H6: complete, and nobody writes before the release
        CHECK(window[i] == pattern(seed_ + e, i),
              "byte " + std::to_string(i) + " of epoch " + std::to_string(e));
      }
      for (uint64_t i = num_bytes; i < kBank; ++i)
        CHECK(window[i] == std::byte{0}, "written beyond the message");
      std::memset(window, 0, kBank);
      CHECK_OK(to_.proxy.push({back_, static_cast<uint32_t>(e & 0xffff), 0, 0, 0}, kSoon));  // H7
    }
  }

 private:
  static void wait_for(Doorbell& bell, Counter& word, uint64_t value, const char* what) {
    const auto there = [&] { return word_at(word).load(std::memory_order_acquire) == value; };
    for (const auto start = Clock::now(); !there(); sleep_on(bell, 1.0, there)) {
      CHECK(seconds_since(start) < kSoon, std::string(what) + " " + std::to_string(value) +
                                              " does not come, but " +
                                              std::to_string(word_at(word).load()));
    }
  }

  Rank& from_;
  Rank& to_;
  uint64_t send_at_, window_at_, seed_, first_;
  uint32_t channel_ = 0, back_ = 0;
  Counter words_[kNumBanks] = {0, 0}, released_[kNumBanks] = {0, 0}, sent_[kNumBanks] = {0, 0};
  Doorbell from_bell_{0, 0}, to_bell_{0, 0};
};

// Everybody sends to everybody, each direction by two threads.
void exchange(std::vector<std::unique_ptr<Rank>>& ranks, int num_epochs, uint64_t first_epoch) {
  const size_t R = ranks.size();
  std::vector<std::vector<uint32_t>> peer(R, std::vector<uint32_t>(R));
  for (size_t i = 0; i < R; ++i) {
    for (size_t j = 0; j < R; ++j) peer[i][j] = i == j ? 0 : ranks[i]->connect(*ranks[j]);
  }
  std::vector<std::unique_ptr<Flow>> flows;
  for (size_t i = 0; i < R; ++i) {
    for (size_t j = 0; j < R; ++j) {
      if (i == j) continue;
      flows.push_back(std::make_unique<Flow>(*ranks[i], peer[i][j], *ranks[j], peer[j][i],
                                             flows.size(), first_epoch));
    }
  }
  std::vector<std::thread> threads;
  for (auto& flow : flows) {
    threads.emplace_back([&] { flow->send(num_epochs); });
    threads.emplace_back([&] { flow->receive(num_epochs); });
  }
  for (std::thread& thread : threads) thread.join();
  for (auto& rank : ranks) {
    CHECK_OK(rank->proxy.fault());
    CHECK(rank->proxy.dropped_immediates() == 0);
    CHECK(rank->proxy.stats().commands == 2 * (R - 1) * num_epochs);
    rank->proxy.stop();  // before the words of the flows go
  }
}

std::vector<std::unique_ptr<Rank>> make_ranks(size_t num_ranks, uint64_t seed,
                                              uint64_t shard_bytes) {
  std::vector<std::unique_ptr<Rank>> ranks;
  for (size_t i = 0; i < num_ranks; ++i) {
    ranks.push_back(std::make_unique<Rank>(seed ? seed + 100 * i : 0,
                                           ProxyOptions{.shard_bytes = shard_bytes}));
  }
  return ranks;
}

void messages_arrive_whole() {
  for (const uint64_t seed : {0, 1, 2, 3}) {
    for (const uint64_t shard_bytes : {0, 16, 4096}) {
      auto ranks = make_ranks(2, seed, shard_bytes);
      exchange(ranks, seed ? 20 : 40, seed % 2 ? (1ull << 32) - 2 : 62);
      uint64_t writes = 0;
      for (uint64_t e = seed % 2 ? (1ull << 32) - 2 : 62, i = 0; i < (seed ? 20 : 40); ++i, ++e) {
        const uint64_t blocks =
            Flow::num_bytes_of(e) / 16;  // as many writes as shards, at most 64 and never none
        writes +=
            1 + (shard_bytes == 0 ? 1
                 : shard_bytes == 16
                     ? (blocks <= 64 ? std::max<uint64_t>(blocks, 1)
                                     : (blocks + (blocks + 63) / 64 - 1) / ((blocks + 63) / 64))
                     : std::max<uint64_t>((blocks + 255) / 256, 1));
      }
      for (auto& rank : ranks)
        CHECK(rank->proxy.stats().writes == writes && rank->proxy.stats().immediates == writes);
    }
  }
}

void three_ranks_at_once() {
  for (const uint64_t seed : {0, 4, 5}) {
    auto ranks = make_ranks(3, seed, 1024);
    exchange(ranks, 15, 2);
  }
}

void one_to_64_writes() {
  Rank a(0, {.shard_bytes = 16}), b(0);
  const uint32_t peer = a.connect(b);
  Counter words[kNumBanks] = {0, 0};
  const uint32_t row = value_of(b.proxy.open_row({{&words[0], &words[1]}, nullptr, "rows"}, 2));
  const uint32_t channel =
      value_of(a.proxy.open_channel({peer, &a.region, b.remote, row, {nullptr, nullptr}, nullptr}));
  for (uint64_t i = 0; i < 2048; ++i) *a.at(i) = pattern(1, i);
  uint64_t before = 0;
  for (uint32_t n = 1; n <= 130; ++n) {
    CHECK_OK(a.proxy.push({channel, n + 1, 0, 4096, n * 16}, kSoon));
    const auto there = [&] {
      return word_at(words[(n + 1) % 2]).load(std::memory_order_acquire) == n + 1;
    };
    wait_until("a message of " + std::to_string(n) + " shards does not come", there);
    CHECK(std::memcmp(a.at(0), b.at(4096), n * 16) == 0);
    const uint64_t writes = b.proxy.stats().immediates - before, shard = (n + 63) / 64;
    CHECK(writes == (n + shard - 1) / shard && writes <= 64,
          std::to_string(n) + " shards, writes: " + std::to_string(writes));
    before += writes;
  }
  CHECK_OK(b.proxy.fault());
}

// --- user writes ---------------------------------------------------------------------------------

void user_writes_and_immediates() {
  for (const uint64_t seed : {0, 6, 7, 8}) {
    Rank a(seed), b(seed ? seed + 1 : 0);
    const uint32_t peer = a.connect(b);
    constexpr uint32_t kThreads = 3, kWrites = 60, kBytes = 1000;
    std::vector<std::thread> threads;
    for (uint32_t t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (uint32_t i = 0; i < kWrites; ++i) {
          const uint64_t at = (t * kWrites + i) * uint64_t{1024};
          for (uint64_t k = 0; k < kBytes; ++k) a.at(at)[k] = pattern(at, k);
          auto done = write(a, peer, b, at, at, kBytes, t);
          if (i % 8 == 0) expect_end(*done, Code::kOk);
        }
      });
    }
    for (uint32_t t = 0; t < kThreads; ++t)
      CHECK(b.proxy.take_immediates(t, kWrites, kSoon), "immediates are missing");
    for (std::thread& thread : threads) thread.join();
    for (uint64_t at = 0; at < kThreads * kWrites * uint64_t{1024}; at += 1024) {
      for (uint64_t k = 0; k < kBytes; ++k) CHECK(b.at(at)[k] == pattern(at, k));
      CHECK(*b.at(at + kBytes) == std::byte{0});
    }
    CHECK(b.proxy.count_immediates(0) == 0 && b.proxy.count_immediates(99) == 0);
    CHECK(b.proxy.wait_immediates(0, 0.0) == kThreads * kWrites);

    expect_end(*write(a, peer, b, 0, 0, 0, 0x7fffffff), Code::kOk);  // no bytes, the largest value
    CHECK(b.proxy.wait_immediates(kThreads * kWrites, kSoon) == kThreads * kWrites + 1);
    CHECK(b.proxy.count_immediates(0x7fffffff) == 1);
    CHECK(!b.proxy.take_immediates(0x7fffffff, 2, 0.01) &&
          b.proxy.take_immediates(0x7fffffff, 1, 0.0));

    std::vector<std::byte> plain(3 << 20);  // not a segment: written through the kernel
    const MemoryRegion region = value_of(b.proxy.register_memory(plain));
    const RemoteRegion remote = describe(region);
    expect_end(
        *a.proxy.submit({{peer, &a.region, 0, kBytes, &remote, (2 << 20) - 500, true, 5}}, nullptr),
        Code::kOk);
    CHECK(b.proxy.take_immediates(5, 1, kSoon));
    CHECK(std::memcmp(plain.data() + (2 << 20) - 500, a.at(0), kBytes) == 0);
  }
}

void wrong_writes_end_alone() {
  for (const uint64_t seed : {0, 9}) {
    Rank a(seed), b(0);
    const uint32_t peer = a.connect(b);
    expect_end(*write(a, peer, b, 0, (1 << 20) - 15, 16), Code::kInvalid);
    expect_end(*write(a, peer, b, (1 << 20) - 15, 0, 16), Code::kInvalid);
    expect_end(*write(a, peer, b, 0, 0 - 16ull, 32), Code::kInvalid);  // offset + bytes passes 2^64
    expect_end(*write(a, peer, b, 0 - 16ull, 0, 32), Code::kInvalid);
    expect_end(*write(a, peer + 1, b, 0, 0, 16), Code::kInvalid);
    RemoteRegion forged = b.remote;
    forged.key.value ^= 1;
    expect_end(*a.proxy.submit({{peer, &a.region, 0, 16, &forged, 0, false, 0}}, nullptr),
               Code::kTransport);
    expect_end(*a.proxy.submit({}, nullptr), Code::kOk);
    auto both = a.proxy.submit(
        {{peer, &a.region, 0, 16, &forged, 0, false, 0},  // the first error, after the last write
         {peer, &a.region, 0, 16, &b.remote, 0, true, 1}},
        nullptr);
    expect_end(*both, Code::kTransport);
    CHECK(b.proxy.take_immediates(1, 1, kSoon));
    CHECK(a.proxy.peer_state(peer) == PeerState::kReady,
          "a user's wrong write must not cost the peer");
    expect_end(*write(a, peer, b, 0, 0, 16, 2), Code::kOk);
    CHECK_OK(a.proxy.fault());
  }
}

// --- heartbeats ----------------------------------------------------------------------------------

void heartbeats_advance() {
  for (const uint64_t seed : {0, 16}) {
    Rank a(seed, {.heartbeat_s = 0.005, .beat_write_s = 0.01}), b(0);
    const uint32_t peer = a.connect(b);
    Counter& mine = *reinterpret_cast<Counter*>(a.at(64));
    Counter& theirs = *reinterpret_cast<Counter*>(b.at(128));
    word_at(mine).store(kFailed);
    const uint32_t channel =
        value_of(a.proxy.open_channel({peer, &a.region, b.remote, 0, {nullptr, nullptr}, nullptr}));
    const uint64_t id = a.proxy.add_heartbeat({&mine, 64, 128, {channel}});
    const auto beats = [](Counter& word) {
      return word_at(word).load(std::memory_order_acquire) / 16;
    };
    wait_until("the heart does not beat", [&] { return beats(mine) > 10; });
    uint64_t seen = 0;
    for (int i = 0; i < 5; ++i) {
      wait_until("the peer does not hear it", [&] { return beats(theirs) > seen; });
      seen = beats(theirs);
      CHECK(seen <= beats(mine) &&
            word_at(theirs).load() % 16 == kFailed);  // the state travels with it
    }
    a.proxy.remove_heartbeat(id);
    const uint64_t last = beats(mine);
    nap(0.05);
    CHECK(beats(mine) == last, "it still beats");
    a.proxy.beat_now();
    CHECK_OK(a.proxy.fault());
  }
}

// --- the end -------------------------------------------------------------------------------------

void stop_during_traffic() {
  for (const uint64_t seed : {0, 0, 14, 15}) {
    auto a = std::make_unique<Rank>(seed), b = std::make_unique<Rank>(0);
    const uint32_t peer = a->connect(*b);
    const uint32_t row = value_of(b->proxy.open_row({{nullptr, nullptr}, nullptr, "closed"}, 2));
    b->proxy.close_row(row);  // commands go, and count for nothing
    const uint32_t channel = value_of(
        a->proxy.open_channel({peer, &a->region, b->remote, row, {nullptr, nullptr}, nullptr}));
    std::atomic<int> running{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&, t] {
        ++running;
        for (uint32_t i = 0;; ++i) {
          if (t == 0) {
            const Status status = a->proxy.push({channel, i & 0xffff, 0, 0, 256}, kSoon);
            if (status.code() == Code::kClosed) return;
            CHECK_OK(status);
            continue;
          }
          auto operation = write(*a, peer, *b, 0, 0, 256, t);
          CHECK(operation->wait(kSoon), "a write never ends");
          if (operation->status().code() == Code::kClosed) return;
          CHECK_OK(operation->status());
        }
      });
    }
    wait_until("the traffic does not begin",
               [&] { return running == 3 && a->proxy.stats().writes > 50; });
    const auto start = Clock::now();
    a->proxy.stop();
    CHECK(seconds_since(start) < 10, "stop() is bounded");
    for (std::thread& thread : threads) thread.join();
    CHECK_OK(a->proxy.fault());
    CHECK(a->proxy.connect(b->proxy.info().address).status().code() == Code::kClosed);
    CHECK(a->proxy.register_memory(a->memory.bytes()).status().code() == Code::kClosed);
    CHECK(a->proxy.open_channel({}).status().code() == Code::kClosed);
    CHECK(a->proxy.open_row({}, 2).status().code() == Code::kClosed);
    a->proxy.disconnect(peer);
    a->proxy.stop();
  }
}

// Threads that wait take the proxy's turns, one at a time; each gets its own, and right, bytes.
void helpers() {
  constexpr uint32_t kThreads = 3, kRounds = 200;
  for (const uint64_t seed : {0, 16}) {
    Rank a(seed), b(0);
    const uint32_t to_b = a.connect(b), to_a = b.connect(a);
    std::vector<std::thread> threads;
    const auto ends = [&](Rank& mine, uint32_t peer, Rank& other, uint32_t value, bool first) {
      for (uint32_t round = 0; round < kRounds; ++round) {
        const uint64_t out = 128 * value, in = 128 * value + 64;
        for (int step = 0; step < 2; ++step) {
          if ((step == 0) == first) {
            std::memcpy(mine.at(out), &round, sizeof round);
            auto operation = write(mine, peer, other, out, in, 64, value);
            if (round % 7 == 0) nap(0.0003);
            CHECK(mine.proxy.wait(*operation, kSoon), "a write never ends");
            CHECK_OK(operation->status());
          } else {
            CHECK(mine.proxy.take_immediates(value, 1, kSoon), "an immediate never comes");
            uint32_t found = 0;
            std::memcpy(&found, mine.at(in), sizeof found);
            CHECK(found == round);
          }
        }
      }
    };
    for (uint32_t value = 0; value < kThreads; ++value) {
      threads.emplace_back([&, value] { ends(a, to_b, b, value, true); });
      threads.emplace_back([&, value] { ends(b, to_a, a, value, false); });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(a.proxy.stats().helped > 0 && b.proxy.stats().helped > 0, "nobody helped");
  }
}

// What was submitted before stop() is carried out, however late the proxy sees it.
void stop_right_after_a_write() {
  Rank b(0);
  for (int round = 0; round < 150; ++round) {
    Rank a(0, {}, 4096);
    const uint32_t peer = a.connect(b);
    if (round % 3 == 0) nap(0.002);  // its proxy is asleep, or else awake
    auto operation = write(a, peer, b, 0, 0, 64, 5);
    a.proxy.stop();
    expect_end(*operation, Code::kOk);
    CHECK(b.proxy.take_immediates(5, 1, kSoon));
    auto late = write(a, peer, b, 0, 0, 64, 5);
    expect_end(*late, Code::kClosed);
  }
}

int open_files() {
  int count = 0;
  DIR* directory = opendir("/proc/self/fd");
  while (readdir(directory)) ++count;
  closedir(directory);
  return count;
}

void twenty_rounds() {
  const int before = open_files();
  for (uint64_t round = 0; round < 20; ++round) {
    Rank a(round % 3 ? round : 0, {}, 4096), b(0, {}, 4096);
    const uint32_t to_b = a.connect(b), to_a = b.connect(a);
    auto there = write(a, to_b, b, 0, 0, 4096, 1), back = write(b, to_a, a, 0, 0, 16, 1);
    if (round % 2) expect_end(*there, Code::kOk);  // or leave it to stop(), which drains
    if (round % 4 == 0) CHECK(a.proxy.take_immediates(1, 1, kSoon));
  }
  CHECK(open_files() == before, "file descriptors leak");
}

}  // namespace

int main(int argc, char** argv) {
  return cases::run(argc, argv,
                    {{"messages_arrive_whole", messages_arrive_whole},
                     {"three_ranks_at_once", three_ranks_at_once},
                     {"one_to_64_writes", one_to_64_writes},
                     {"user_writes_and_immediates", user_writes_and_immediates},
                     {"wrong_writes_end_alone", wrong_writes_end_alone},
                     {"heartbeats_advance", heartbeats_advance},
                     {"stop_during_traffic", stop_during_traffic},
                     {"helpers", helpers},
                     {"stop_right_after_a_write", stop_right_after_a_write},
                     {"twenty_rounds", twenty_rounds}});
}
