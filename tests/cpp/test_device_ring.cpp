// GPUs made of host threads on real proxies over the shm backend, plain and with its order shaken:
// kernels/*.cuh push into rings that the proxy serves, arm waits, and go on behind them.
#include <atomic>
#include <optional>
#include <thread>

#include "../../kernels/receive.cuh"
#include "../kernels/host_block.hpp"
#include "proxy_ranks.hpp"

using namespace moe_comm;
using namespace proxy_ranks;
using host_block::HostBlock;

namespace {

uint64_t load(const Counter& word) {
  return std::atomic_ref(const_cast<Counter&>(word)).load(std::memory_order_acquire);
}

// One stream of a device: kernels one after the other, and waits between them.
class Gpu {
 public:
  explicit Gpu(Proxy& proxy, RingOptions options = {.num_slots = 64, .num_words = 8})
      : ring(value_of(MappedRing::create(options))), proxy_(&proxy) {
    tickets_[0] = tickets_[1] = options.first_ticket;
    CHECK_OK(proxy.attach(ring));
  }
  ~Gpu() { proxy_->detach(ring); }

  DeviceRing view() { return ring->view(&tickets_[0], &tickets_[1]); }
  WaitStatus push(const Transfer& transfer) {
    return on_one_thread([&](HostBlock& block) { return device::push(block, view(), transfer); });
  }
  WaitStatus arm(uint32_t wait, uint64_t epoch, uint32_t word_idx = 0, uint32_t timeout_ms = 0) {
    const Arm wanted{wait, word_idx, epoch, timeout_ms};
    return on_one_thread(
        [&](HostBlock& block) { return device::arm(block, view(), wanted, &word(word_idx)); });
  }
  // As a stream waits for word->ended; then the status, as the next kernel reads it.
  WaitStatus wait(uint32_t word_idx = 0) {
    const auto ended = [&] { return load(word(word_idx).ended) == 1; };
    for (int i = 0; i < 2000 && !ended(); ++i) sched_yield();  // so that `status` is read at once
    wait_until("an armed wait never ends", ended);
    return static_cast<WaitStatus>(load(word(word_idx).status));
  }
  ArmedWord& word(uint32_t word_idx) { return ring->words()[word_idx]; }

  std::shared_ptr<MappedRing> ring;

 private:
  template <class Function>
  WaitStatus on_one_thread(Function kernel) {
    host_block::Shared shared(1);
    HostBlock block{{}, shared, 0, 1, 0, 1};
    return kernel(block);
  }
  Proxy* proxy_;
  uint64_t tickets_[2];
};

// Windows of `to` for rows of `from`, and what carries its releases back.
struct Way {
  Way(Rank& from, Rank& to, uint64_t first_epoch)
      : words{first_epoch - 2 + first_epoch % 2, first_epoch - 1 - first_epoch % 2} {
    peer = from.connect(to);
    const uint32_t row =
        value_of(to.proxy.open_row({{&words[0], &words[1]}, nullptr, "rows"}, first_epoch));
    channel = value_of(
        from.proxy.open_channel({peer, &from.region, to.remote, row, {nullptr, nullptr}, nullptr}));
  }
  Counter words[kNumBanks];
  uint32_t peer, channel;
  WaitSource source(std::string who, uint32_t peer_there = ~0u) {
    return {{&words[0], &words[1]}, peer_there, std::move(who)};
  }
};

Transfer message(uint32_t channel, uint64_t epoch, uint64_t from, uint64_t to, uint64_t num_bytes) {
  return {channel, static_cast<uint32_t>(epoch & 0xffff), from, to, num_bytes};
}

// --- commands ------------------------------------------------------------------------------------

// Two rings of a rank, two producers on each, and the rank's own ring: each with a window, whose
// words say that a message came whole before the next one of its bank is sent.
void many_producers_beside_the_own_ring() {
  for (const uint64_t seed : {0, 21}) {
    Rank a(seed), b(seed ? seed + 1 : 0);
    constexpr uint32_t kFlows = 5, kMessages = 120, kBytes = 512;
    const uint64_t first = (1ull << 32) - 60;
    std::vector<std::unique_ptr<Way>> ways;
    for (uint32_t f = 0; f < kFlows; ++f) ways.push_back(std::make_unique<Way>(a, b, first));
    Gpu gpus[] = {Gpu(a.proxy, {.num_slots = 2, .num_words = 1}),  // nearly always full
                  Gpu(a.proxy, {.num_slots = 64, .num_words = 1, .first_ticket = 0 - 128ull})};
    std::vector<std::thread> threads;
    for (uint32_t f = 0; f < kFlows; ++f) {
      threads.emplace_back([&, f] {
        for (uint64_t e = first; e < first + kMessages; ++e) {
          const uint64_t at = (2 * f + e % 2) * kBytes;
          std::memset(a.at(at), static_cast<int>(f * 50 + e % 50), kBytes);  // H1
          const Transfer wanted = message(ways[f]->channel, e, at, at, kBytes);
          if (f == 0) {
            CHECK_OK(a.proxy.push(wanted, kSoon));
          } else {
            CHECK(gpus[f % 2].push(wanted) == kWaitOk);
          }
          wait_until("a message does not come", [&] { return load(ways[f]->words[e % 2]) == e; });
          for (uint32_t i = 0; i < kBytes; ++i)
            CHECK(*b.at(at + i) == static_cast<std::byte>(f * 50 + e % 50));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (Gpu& gpu : gpus) {
      CHECK(gpu.ring->stats().commands == 2 * kMessages);
      CHECK_OK(gpu.ring->fault());
    }
    CHECK(a.proxy.stats().commands == kMessages);
    CHECK_OK(a.proxy.fault());
    CHECK_OK(b.proxy.fault());
  }
}

// A kernel dies in the middle of a command. Nobody else waits for it, and what was armed behind it
// ends.
void half_a_command_costs_its_own_ring_only() {
  Rank a(0), b(0);
  Way way(a, b, 2);
  Gpu dead(a.proxy, {.num_slots = 8, .num_words = 2, .timeout_s = 0.3}), gpu(a.proxy);
  const uint32_t wait = value_of(a.proxy.open_wait({"dispatch", "rank 0", {}, {}}));
  const DeviceRing view = dead.view();
  const uint64_t ticket = (*view.reserved)++;
  std::atomic_ref(view.slots[ticket].word1).store(1ull << 63, std::memory_order_release);
  const auto start = Clock::now();
  CHECK(dead.arm(wait, 2) == kWaitOk, "there is room");
  for (uint64_t e = 2; e < 40; ++e) {
    CHECK(gpu.push(message(way.channel, e, 0, 0, 64)) == kWaitOk);
    wait_until("another ring waits", [&] { return load(way.words[e % 2]) == e; });
  }
  CHECK(dead.ring->stats().torn == 1 && dead.ring->stats().commands == 0);
  CHECK(dead.wait() == kWaitAborted && seconds_since(start) >= 0.3);
  CHECK(dead.ring->fault().text().find("command 0 of a device ring is missing since 0.3") !=
            std::string::npos,
        dead.ring->fault().text());
  CHECK(gpu.ring->stats().torn == 0 || gpu.ring->stats().commands == 38);
  CHECK_OK(gpu.ring->fault());
  CHECK_OK(a.proxy.fault());
}

// Producers of a ring that nobody takes from wait, bounded by the time limit and the abort word.
void a_full_ring_is_waited_for_bounded() {
  Rank a(0);
  Gpu gpu(a.proxy, {.num_slots = 4, .num_words = 1, .timeout_s = 0.2});
  const uint32_t wait = value_of(a.proxy.open_wait({"dispatch", "rank 0", {}, {}}));
  const DeviceRing view = gpu.view();
  (void)(*view.reserved)++;  // never published: the ring ends here
  std::atomic<int> aborted{0}, late{0};
  const auto start = Clock::now();
  std::vector<std::thread> producers;
  for (int p = 0; p < 6; ++p) {
    producers.emplace_back([&] {
      const WaitStatus status = gpu.push({0, 0, 0, 0, 0});
      aborted += status == kWaitAborted;
      late += status == kWaitTimeout;
    });
  }
  for (std::thread& producer : producers) producer.join();
  CHECK(aborted + late == 3, "three fit; the others gave up");
  CHECK(seconds_since(start) < 5.0);
  wait_until("the ring does not end", [&] { return !gpu.ring->fault().ok(); });
  CHECK(gpu.arm(wait, 2) != kWaitOk && gpu.wait() != kWaitOk, "ended by the kernel itself");
  CHECK_OK(a.proxy.fault());
}

void a_wrong_command_is_its_rings_fault() {
  Rank a(0), b(0);
  Way way(a, b, 2);
  const uint32_t wait = value_of(a.proxy.open_wait({"dispatch", "rank 0", {way.source("b")}, {}}));
  CHECK(a.proxy.open_wait({"", "", {}, {wait}}).status().code() == Code::kInvalid);
  const auto expect = [&](const char* text, const std::function<void(Gpu&)>& act) {
    Gpu gpu(a.proxy);
    CHECK(gpu.arm(wait, 2, 7) == kWaitOk);
    act(gpu);
    CHECK(gpu.wait(7) == kWaitAborted);
    CHECK(gpu.ring->fault().text().find(text) != std::string::npos, gpu.ring->fault().text());
    CHECK(gpu.ring->fault().code() == Code::kInvalid);
    // Late kernels end, too, whether they see the abort word or not.
    (void)gpu.arm(wait, 2, 3);
    CHECK(gpu.wait(3) == kWaitAborted);
  };
  expect("no channel 77", [](Gpu& gpu) { (void)gpu.push({77, 0, 0, 0, 0}); });
  expect("outside the region",
         [&](Gpu& gpu) { (void)gpu.push({way.channel, 2, (1 << 20) - 16, 0, 32}); });
  expect("outside the region",
         [&](Gpu& gpu) { (void)gpu.push({way.channel, 2, 0, 1ull << 35, 32}); });
  expect("that is not armed, got 7", [&](Gpu& gpu) { (void)gpu.arm(wait, 2, 7); });
  CHECK_OK(a.proxy.fault());
  CHECK(MappedRing::create({.num_slots = 3}).status().code() == Code::kInvalid);
  CHECK(MappedRing::create({.num_words = 0}).status().code() == Code::kInvalid);
  CHECK(MappedRing::create({.timeout_s = 0}).status().code() == Code::kInvalid);
  CHECK(MappedRing::create({.first_ticket = 4096}).status().code() == Code::kInvalid);
}

// --- armed waits ---------------------------------------------------------------------------------

void a_wait_ends_when_all_sources_came() {
  for (const uint64_t seed : {0, 23}) {
    for (const uint64_t first :
         {uint64_t{2}, uint64_t{62}, (uint64_t{1} << 16) - 3, (uint64_t{1} << 32) - 3,
          (uint64_t{1} << 48) - 3, 0 - uint64_t{3}}) {
      Rank a(seed), b(seed ? 24 : 0), c(seed ? 25 : 0);
      Way from_b(b, a, first), from_c(c, a, first);
      Counter local[kNumBanks] = {from_b.words[0], from_b.words[1]};  // a rank of the node
      Gpu gpu(a.proxy), gpu_b(b.proxy), gpu_c(c.proxy);
      const uint32_t wait = value_of(a.proxy.open_wait({"dispatch",
                                                        "rank 0",
                                                        {from_b.source("rank 1"),
                                                         {{&local[0], &local[1]}, ~0u, "rank 3"},
                                                         from_c.source("rank 2")},
                                                        {}}));
      for (uint64_t e = first; e != first + 7; ++e) {
        const uint32_t word_idx = e % 3;
        if (e % 2) CHECK(gpu.arm(wait, e, word_idx) == kWaitOk);
        CHECK(gpu_b.push(message(from_b.channel, e, 0, 0, 128)) == kWaitOk);
        CHECK(gpu_c.push(message(from_c.channel, e, 0, 128, 0)) == kWaitOk);
        if (e % 2 == 0) CHECK(gpu.arm(wait, e, word_idx) == kWaitOk);
        nap(0.002);
        CHECK(load(gpu.word(word_idx).ended) == 0, "one source is missing");
        word_at(local[e % 2]).store(e, std::memory_order_release);
        CHECK(gpu.wait(word_idx) == kWaitOk);
        CHECK(load(from_b.words[e % 2]) == e && load(from_c.words[e % 2]) == e);
      }
      CHECK(gpu.ring->stats().armed == 7 && gpu.ring->stats().ended == 7);
      CHECK(gpu.ring->stats().failed == 0);
    }
  }
}

// Credits: the readers' releases, and the end of the own writes of that bank.
void a_wait_for_own_writes() {
  Rank a(0), b(0);
  auto late = value_of(open_shm(kSecret));  // nobody polls it: not ready, so nothing is written
  const uint32_t peer = value_of(a.proxy.connect(late->info().address));
  const uint32_t channel =
      value_of(a.proxy.open_channel({peer, &a.region, b.remote, 0, {nullptr, nullptr}, nullptr}));
  const uint32_t wait = value_of(a.proxy.open_wait({"credits", "rank 0", {}, {channel}}));
  Gpu gpu(a.proxy);
  CHECK(gpu.arm(wait, 2) == kWaitOk && gpu.wait() == kWaitOk, "nothing was pushed");
  CHECK(gpu.push(message(channel, 4, 0, 0, 4096)) == kWaitOk);
  CHECK(gpu.arm(wait, 4, 0) == kWaitOk && gpu.arm(wait, 5, 1) == kWaitOk);
  CHECK(gpu.wait(1) == kWaitOk, "the other bank");
  nap(0.01);
  CHECK(load(gpu.word(0).ended) == 0, "its own write has not ended");
  a.proxy.disconnect(peer);
  CHECK(gpu.wait(0) == kWaitOk, "it ended, with an error");
}

void a_source_that_never_comes_is_a_timeout() {
  Rank a(0), b(0), c(0);
  Way from_b(b, a, 2), from_c(c, a, 2);
  const uint32_t wait = value_of(a.proxy.open_wait(
      {"dispatch", "rank 0", {from_b.source("rank 1"), from_c.source("rank 2")}, {}}));
  Gpu gpu(a.proxy), other(a.proxy), gpu_b(b.proxy);
  CHECK(gpu_b.push(message(from_b.channel, 2, 0, 0, 64)) == kWaitOk);
  const auto start = Clock::now();
  CHECK(gpu.arm(wait, 2, 5) == kWaitOk);  // the ring's own limit: not yet
  CHECK(gpu.arm(wait, 2, 1, 200) == kWaitOk);
  CHECK(other.arm(wait, 2, 0, 10'000) == kWaitOk);
  CHECK(gpu.wait(1) == kWaitTimeout);
  CHECK(seconds_since(start) >= 0.2 && seconds_since(start) < 2.0);
  const Status fault = gpu.ring->fault();  // there before the word
  CHECK(fault.code() == Code::kPeerTimeout &&
            fault.text() ==
                "dispatch epoch 2, rank 0 waited 0.2 s for rank 2: not complete; 1 of "
                "1 other sources complete",
        fault.text());
  CHECK(gpu.wait(5) == kWaitAborted, "the abort word ends what else is waited for");
  CHECK(load(other.word(0).ended) == 0, "of this ring only");
  const auto again = Clock::now();
  CHECK(gpu.arm(wait, 4, 1) == kWaitAborted && gpu.wait(1) == kWaitAborted);
  CHECK(gpu.push({0, 0, 0, 0, 0}) == kWaitOk, "room is made; nothing comes of it");
  CHECK(seconds_since(again) < 1.0);
  Gpu gpu_c(c.proxy);
  CHECK(gpu_c.push(message(from_c.channel, 2, 0, 0, 64)) == kWaitOk);
  CHECK(other.wait(0) == kWaitOk, "late for one ring, in time for the other");
  CHECK_OK(a.proxy.fault());
}

void a_lost_source_ends_the_wait_at_once() {
  for (const uint64_t seed : {0, 27}) {
    Rank a(seed);
    auto b = std::make_unique<Rank>(seed ? 28 : 0);
    auto way = std::make_unique<Way>(*b, a, 2);
    const uint32_t back = a.connect(*b);
    const uint32_t wait =
        value_of(a.proxy.open_wait({"dispatch", "rank 0", {way->source("rank 1", back)}, {}}));
    Gpu gpu(a.proxy);
    {
      Gpu gpu_b(b->proxy);
      CHECK(gpu_b.push(message(way->channel, 2, 0, 0, 64)) == kWaitOk);
      CHECK(gpu.arm(wait, 2) == kWaitOk && gpu.wait() == kWaitOk);
      CHECK(gpu.arm(wait, 3) == kWaitOk);
    }
    const auto start = Clock::now();
    b.reset();
    a.proxy.disconnect(back);
    CHECK(gpu.wait() == kWaitLost && seconds_since(start) < 10.0);
    CHECK(gpu.ring->fault().code() == Code::kPeerLost, gpu.ring->fault().text());
    CHECK(gpu.ring->fault().text().find("dispatch epoch 3, rank 0 waited 0.") == 0);
  }
}

// A rank that says goodbye or gives up, and one whose heart stops, are not waited for until the
// deadline; who committed first is not lost.
void a_source_whose_heart_stopped_is_lost() {
  Rank a(0);
  const struct {
    uint64_t beat, blame;
    bool linked;
    double least_s;
    const char* text;
  } table[] = {{160 + kClosed, 0, false, 0.0, ": it closed its Buffer"},
               {160 + kFailed, 0, false, 0.0, ": it gave up after a fault of its own"},
               {160 + kFailed, 8, false, 0.0, ": it gave up on rank 7"},
               {160 + kClosed, 0, true, 1.0, ": it closed its Buffer"},
               {160, 0, false, 1.5, ": its heartbeat stopped"}};
  for (const auto& one : table) {
    Rank b(0);
    Counter words[kNumBanks] = {2, 3}, others[kNumBanks] = {2, 3}, alive = 16;
    Counter beat[] = {one.beat, one.blame};
    const uint32_t peer = one.linked ? a.connect(b) : ~0u;
    const uint32_t wait =
        value_of(a.proxy.open_wait({"combine",
                                    "rank 0",
                                    {{{&others[0], &others[1]}, ~0u, "rank 2", &alive},
                                     {{&words[0], &words[1]}, peer, "rank 1", beat, nullptr, 1}},
                                    {}}));
    Gpu gpu(a.proxy, {.num_slots = 8, .num_words = 2, .silent_s = 1.5});
    CHECK(gpu.arm(wait, 3) == kWaitOk && gpu.wait() == kWaitOk, "both came before");
    CHECK(gpu.arm(wait, 4) == kWaitOk);
    for (int i = 0; i < 10; ++i, nap(0.04)) word_at(alive).fetch_add(16);
    CHECK(load(gpu.word(0).ended) == 0, "rank 2 is late, but lives");
    const auto start = Clock::now();
    word_at(others[0]).store(4, std::memory_order_release);
    CHECK(gpu.wait() == kWaitLost, "rank 1 is never waited for to the deadline");
    const double seconds = seconds_since(start);
    const std::string text = gpu.ring->fault().text();
    CHECK(seconds >= one.least_s && seconds < one.least_s + 5.0,
          std::to_string(seconds) + " s: " + text);
    CHECK(gpu.ring->fault().code() == Code::kPeerLost && text.find(one.text) != text.npos, text);
    CHECK(text.find(" for rank 1: not complete; 1 of 1 other") != text.npos, text);
    CHECK(gpu.ring->blamed() == (one.blame ? one.blame : 2), "1 + whom the fault goes back to");
    a.proxy.close_channel(wait);
  }
}

// --- the end -------------------------------------------------------------------------------------

void detach_while_armed() {
  Rank a(0), b(0);
  Way way(b, a, 2);
  const uint32_t wait = value_of(a.proxy.open_wait({"dispatch", "rank 0", {way.source("b")}, {}}));
  for (int round = 0; round < 30; ++round) {
    Gpu gpu(a.proxy, {.num_slots = 8, .num_words = 4});
    std::atomic<bool> running{false};
    std::thread stream([&] {  // arms until it is told that the ring ended
      for (uint32_t i = 0;; ++i) {
        const WaitStatus armed = gpu.arm(wait, 2 + i, i % 4);
        running = true;
        CHECK(gpu.wait(i % 4) == kWaitAborted, "nothing ever comes");
        if (armed != kWaitOk) return;
      }
    });
    wait_until("the stream does not begin", [&] { return running.load(); });
    if (round % 3 == 0) nap(0.003);
    a.proxy.detach(gpu.ring);
    stream.join();
    CHECK(gpu.ring->fault().code() == Code::kClosed);
  }
  Gpu gpu(a.proxy);
  CHECK(gpu.arm(wait, 2) == kWaitOk);
  a.proxy.close_channel(wait);
  CHECK(gpu.wait() == kWaitAborted, "its wait was closed");
  CHECK_OK(a.proxy.fault());
}

void stop_while_armed() {
  for (int round = 0; round < 10; ++round) {
    auto a = std::make_unique<Rank>(0, ProxyOptions{}, 4096);
    Counter words[kNumBanks] = {0, 0};
    const uint32_t wait = value_of(
        a->proxy.open_wait({"dispatch", "rank 0", {{{&words[0], &words[1]}, ~0u, "b"}}, {}}));
    Gpu gpu(a->proxy);
    CHECK(gpu.arm(wait, 2) == kWaitOk);
    if (round % 2) nap(0.005);
    a->proxy.stop();
    CHECK(gpu.wait() == kWaitAborted && gpu.ring->fault().code() == Code::kClosed);
    CHECK(gpu.arm(wait, 2, 1) == kWaitAborted && gpu.wait(1) == kWaitAborted);
    CHECK(a->proxy.attach(gpu.ring).code() == Code::kClosed);
  }
}

// --- an exchange ---------------------------------------------------------------------------------

// Every rank sends rows to every other one, each by one stream: wait for credits, pack, push, arm,
// wait, unpack, release. No host thread of a rank takes part but its proxy.
class Member {
 public:
  static constexpr uint64_t kRowBytes = 48, kPayload = 32, kTokens = 9, kBank = 1 << 12;

  Member(uint64_t seed, uint32_t rank, uint32_t num_ranks, uint64_t first_epoch)
      : node(seed),
        rank_(rank),
        R_(num_ranks),
        first_(first_epoch),
        came_(2 * R_),
        released_(2 * R_) {
    for (uint64_t i = 0; i < R_; ++i) {
      for (uint64_t e = first_; e != first_ + 2; ++e)
        came_[2 * i + e % 2] = released_[2 * i + e % 2] = e - 2;
    }
  }
  void open(std::vector<std::unique_ptr<Member>>& all) {  // rows first, then channels
    for (uint32_t r = 0; r < R_; ++r) {
      rows_.push_back(open_row(&came_[2 * r]));
      rows_.push_back(open_row(&released_[2 * r]));
      peers_.push_back(r == rank_ ? ~0u : node.connect(all[r]->node));
    }
  }
  void link(std::vector<std::unique_ptr<Member>>& all) {
    Wait rows{"dispatch", "rank " + std::to_string(rank_), {}, {}};
    Wait credits{"credits", rows.who, {}, {}};
    for (uint32_t r = 0; r < R_; ++r) {
      channels_.push_back(0), releases_.push_back(0);
      if (r == rank_) continue;
      const auto open = [&](uint32_t row) {
        return value_of(node.proxy.open_channel(
            {peers_[r], &node.region, all[r]->node.remote, row, {nullptr, nullptr}, nullptr}));
      };
      channels_[r] = open(all[r]->rows_[2 * rank_]);
      releases_[r] = open(all[r]->rows_[2 * rank_ + 1]);
      const std::string who = "rank " + std::to_string(r);
      rows.sources.push_back({{&came_[2 * r], &came_[2 * r + 1]}, peers_[r], who});
      credits.sources.push_back({{&released_[2 * r], &released_[2 * r + 1]}, peers_[r], who});
      credits.channels.push_back(channels_[r]);
    }
    rows_wait_ = value_of(node.proxy.open_wait(std::move(rows)));
    credits_wait_ = value_of(node.proxy.open_wait(std::move(credits)));
    gpu.emplace(node.proxy, RingOptions{.num_slots = 4, .num_words = 2, .timeout_s = 30});
  }

  static uint8_t value(uint32_t from, uint64_t epoch, uint64_t token, uint64_t i) {
    return static_cast<uint8_t>((from * 31 + epoch * 7 + token * 5 + i) * 0x9d >> 1);
  }
  static bool goes(uint32_t from, uint32_t to, uint64_t epoch, uint64_t token) {
    return (from + 2 * to + epoch + token) % 3 != 0;
  }

  void stream(uint64_t num_epochs) {
    for (uint64_t e = first_; e != first_ + num_epochs; ++e) {
      CHECK(gpu->arm(credits_wait_, e - 2, 0) == kWaitOk && gpu->wait(0) == kWaitOk,
            gpu->ring->fault().text());
      send(e);
      CHECK(gpu->arm(rows_wait_, e, 1) == kWaitOk && gpu->wait(1) == kWaitOk,
            gpu->ring->fault().text());
      for (uint32_t r = 0; r < R_; ++r) {
        if (r != rank_) unpack(r, e);
      }
    }
  }

  Rank node;
  std::optional<Gpu> gpu;

 private:
  uint32_t open_row(Counter* words) {
    return value_of(node.proxy.open_row({{words, words + 1}, nullptr, "row"}, first_));
  }
  uint64_t window(uint32_t from, uint64_t epoch) const { return (2 * from + epoch % 2) * kBank; }
  uint64_t region(uint32_t to, uint64_t epoch) const { return (2 * (R_ + to) + epoch % 2) * kBank; }

  void send(uint64_t e) {
    std::vector<uint8_t> x(kTokens * kPayload);
    for (uint64_t i = 0; i < x.size(); ++i) x[i] = value(rank_, e, i / kPayload, i % kPayload);
    std::vector<int32_t> lane_rows(kTokens * R_, -1), starts(2 * R_, 0);
    std::vector<uint8_t*> windows(R_);
    std::vector<uint32_t> lanes;
    std::vector<dispatch::Link> links;
    for (uint32_t r = 0; r < R_; ++r) {
      for (uint64_t t = 0; t < kTokens; ++t) {
        if (r != rank_ && goes(rank_, r, e, t)) lane_rows[t * R_ + r] = starts[R_ + r]++;
      }
      windows[r] = reinterpret_cast<uint8_t*>(node.at(region(r, e)));
      if (r == rank_) continue;
      lanes.push_back(r);
      links.push_back({channels_[r], releases_[r], region(r, e), window(rank_, e)});
    }
    uint64_t arrived[2] = {0, 0}, status = 0;
    dispatch::Arguments a{};
    a.x = x.data(), a.x_stride = kPayload, a.payload_bytes = kPayload;
    a.lane_rows = lane_rows.data(), a.starts = starts.data(), a.num_lanes = R_;
    a.last_token = kTokens, a.row_bytes = kRowBytes;
    a.windows = windows.data(), a.lanes = lanes.data(), a.num_links = links.size();
    a.links = links.data(), a.epoch = &e, a.arrived = arrived, a.status = &status;
    a.ring = gpu->view(), a.waited = &gpu->word(0).status;
    host_block::launch(2, 2, [&](HostBlock& block) { dispatch::send(block, a); });
    CHECK(status == kWaitOk);
  }

  void unpack(uint32_t from, uint64_t e) {
    std::vector<int32_t> positions(kTokens, -1);
    uint32_t num_rows = 0;
    for (uint64_t t = 0; t < kTokens; ++t) {
      if (goes(from, rank_, e, t)) positions[num_rows++] = static_cast<int32_t>(t);
    }
    std::vector<uint8_t> out(kTokens * kPayload);
    uint64_t arrived = 0, status = 0;
    uint32_t start = 0;
    const uint8_t* rows = reinterpret_cast<uint8_t*>(node.at(window(from, e)));
    const dispatch::Link link{channels_[from], releases_[from], 0, 0};
    receive::Unpack a{};
    a.windows = &rows, a.num_sources = 1, a.num_rows = &num_rows, a.starts = &start;
    a.row_bytes = kRowBytes, a.payload_bytes = kPayload;
    a.positions = positions.data(), a.num_positions = 1, a.out_x = out.data();
    receive::Release& release = a.release;  // H7
    release.links = &link, release.num_links = 1, release.epoch = &e, release.arrived = &arrived;
    release.status = &status, release.ring = gpu->view(), release.waited = &gpu->word(1).status;
    host_block::launch(2, 2, [&](HostBlock& block) { receive::unpack(block, a); });
    for (uint64_t i = 0; i < out.size(); ++i) {
      const bool there = goes(from, rank_, e, i / kPayload);
      CHECK(out[i] == (there ? value(from, e, i / kPayload, i % kPayload) : 0),
            "rank " + std::to_string(rank_) + " of rank " + std::to_string(from) + ", epoch " +
                std::to_string(e));
    }
    CHECK(status == kWaitOk);
  }

  uint32_t rank_, R_;
  uint64_t first_;
  std::vector<Counter> came_, released_;  // [R, 2]
  std::vector<uint32_t> rows_, peers_, channels_, releases_;
  uint32_t rows_wait_ = 0, credits_wait_ = 0;
};

void an_exchange_by_device_code_alone() {
  for (const uint64_t seed : {0, 31, 32}) {
    for (const uint64_t first : {uint64_t{60}, (uint64_t{1} << 48) - 6, 0 - uint64_t{6}}) {
      const uint32_t R = seed ? 3 : 2;
      std::vector<std::unique_ptr<Member>> all;
      for (uint32_t r = 0; r < R; ++r)
        all.push_back(std::make_unique<Member>(seed ? seed + 100 * r : 0, r, R, first));
      for (auto& member : all) member->open(all);
      for (auto& member : all) member->link(all);
      std::vector<std::thread> streams;
      for (auto& member : all) streams.emplace_back([&] { member->stream(12); });
      for (std::thread& stream : streams) stream.join();
      for (auto& member : all) {
        CHECK_OK(member->node.proxy.fault());
        CHECK_OK(member->gpu->ring->fault());
        const auto& taken = member->gpu->ring->stats().commands;
        wait_until("releases are not taken", [&] { return taken >= 12 * (2 * (R - 1) + 2); });
        CHECK(taken == 12 * (2 * (R - 1) + 2));
        CHECK(member->node.proxy.stats().commands == 0, "nobody used the rank's own ring");
      }
      for (auto& member : all) member->gpu.reset();
      for (auto& member : all) member->node.proxy.stop();
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return cases::run(
      argc, argv,
      {{"many_producers_beside_the_own_ring", many_producers_beside_the_own_ring},
       {"half_a_command_costs_its_own_ring_only", half_a_command_costs_its_own_ring_only},
       {"a_full_ring_is_waited_for_bounded", a_full_ring_is_waited_for_bounded},
       {"a_wrong_command_is_its_rings_fault", a_wrong_command_is_its_rings_fault},
       {"a_wait_ends_when_all_sources_came", a_wait_ends_when_all_sources_came},
       {"a_wait_for_own_writes", a_wait_for_own_writes},
       {"a_source_that_never_comes_is_a_timeout", a_source_that_never_comes_is_a_timeout},
       {"a_lost_source_ends_the_wait_at_once", a_lost_source_ends_the_wait_at_once},
       {"a_source_whose_heart_stopped_is_lost", a_source_whose_heart_stopped_is_lost},
       {"detach_while_armed", detach_while_armed},
       {"stop_while_armed", stop_while_armed},
       {"an_exchange_by_device_code_alone", an_exchange_by_device_code_alone}});
}
