// What a proxy may be put through by its peers and its transport: stalls, losses, late news, full
// queues; and what must go on all the same.
#include <atomic>
#include <mutex>
#include <thread>

#include "proxy_ranks.hpp"

using namespace moe_comm;
using namespace proxy_ranks;

namespace {

// --- peers that stall, leave, or never come ------------------------------------------------------

// Runs `poll` of a bare transport: its owner decides when to live.
struct Bare {
  std::unique_ptr<Transport> transport = value_of(open_shm(kSecret));
  uint64_t immediates = 0;
  void poll() {
    Completion completions[64];
    const size_t n = transport->poll(completions, false);
    for (size_t i = 0; i < n; ++i)
      immediates += completions[i].kind == Completion::Kind::kImmediate;
  }
};

void a_stalled_peer_stops_nobody_else() {
  Rank a(0), b(0);
  Bare stalled, deaf;
  const uint32_t good = a.connect(b);
  const uint32_t slow = value_of(a.proxy.connect(stalled.transport->info().address));
  wait_until("the peer is not ready",
             [&] { return stalled.poll(), a.proxy.peer_state(slow) == PeerState::kReady; });
  const uint32_t never =
      value_of(a.proxy.connect(deaf.transport->info().address));  // whose owner never looks

  std::vector<Proxy::UserWrite> many(3000, {slow, &a.region, 0, 0, &b.remote, 0, true, 1});
  auto to_slow = a.proxy.submit(many, nullptr);
  auto to_never = a.proxy.submit({{never, &a.region, 0, 0, &b.remote, 0, true, 1}}, nullptr);
  Counter words[kNumBanks] = {0, 0};
  const uint32_t row = value_of(b.proxy.open_row({{&words[0], &words[1]}, nullptr, "rows"}, 2));
  const uint32_t channel =
      value_of(a.proxy.open_channel({good, &a.region, b.remote, row, {nullptr, nullptr}, nullptr}));
  for (uint32_t e = 2; e < 200;
       ++e) {  // four times the credits: what is not lost and not late comes in order
    CHECK_OK(a.proxy.push({channel, e, 0, 0, 1024}, kSoon));
    wait_until("the other peer waits",
               [&] { return word_at(words[e % 2]).load(std::memory_order_acquire) == e; });
    if (e % 8 == 0) expect_end(*write(a, good, b, 0, 0, 64, 2), Code::kOk);
  }
  CHECK(!to_slow->done() && !to_never->done());
  CHECK(a.proxy.peer_state(slow) == PeerState::kReady &&
        a.proxy.peer_state(never) == PeerState::kConnecting);
  wait_until("the stalled peer's writes are lost",
             [&] { return stalled.poll(), stalled.immediates == many.size(); });
  expect_end(*to_slow, Code::kOk);
  a.proxy.disconnect(never);
  expect_end(*to_never, Code::kClosed);
}

// Where nothing can wake a sleeping proxy it may nap, but not sleep. `attempt` gives the seconds of
// one try: load makes one or the other slow, a long sleep makes most of them slow.
void expect_no_long_sleep(const std::string& what, const std::function<double()>& attempt) {
  int soon = 0, tries = 0;
  for (; tries < 12 && soon < 5; ++tries) soon += attempt() < 0.03;
  CHECK(soon == 5,
        what + " within 30 ms only " + std::to_string(soon) + " times of " + std::to_string(tries));
}

void wait_for_sleep(const Rank& rank) {
  const uint64_t before = rank.proxy.stats().sleeps;
  wait_until("the proxy does not sleep", [&] { return rank.proxy.stats().sleeps > before; });
}

void a_full_queue_that_drains_is_seen_soon() {
  Rank a(0), b(0);
  Bare reader;
  const uint32_t peer = value_of(a.proxy.connect(reader.transport->info().address));
  wait_until("the peer is not ready",
             [&] { return reader.poll(), a.proxy.peer_state(peer) == PeerState::kReady; });
  expect_no_long_sleep("the next write is posted", [&] {
    auto done = a.proxy.submit(
        std::vector<Proxy::UserWrite>(1025, {peer, &a.region, 0, 0, &b.remote, 0, true, 1}),
        nullptr);
    wait_until("more was posted than fits", [&] { return a.proxy.stats().writes % 1025 == 1024; });
    wait_for_sleep(a);
    const auto start = Clock::now();
    const uint64_t target = reader.immediates + 1025;  // no event says that there is room again
    wait_until("the last write is lost",
               [&] { return reader.poll(), reader.immediates == target; });
    return seconds_since(start);
  });
}

void who_only_receives_is_not_late() {
  Rank a(1), b(2);  // no wait fd: chaos
  const uint32_t peer = a.connect(b);
  expect_no_long_sleep("a write to a rank at rest arrives", [&] {
    wait_for_sleep(b);
    const auto start = Clock::now();
    (void)write(a, peer, b, 0, 0, 64, 1);
    CHECK(b.proxy.take_immediates(1, 1, kSoon));
    return seconds_since(start);
  });
}

void a_lost_peer_gives_a_status() {
  for (const uint64_t seed : {0, 10, 11}) {
    Rank a(seed), b(0);
    auto doomed = std::make_unique<Bare>();
    const uint32_t good = a.connect(b);
    const uint32_t lost = value_of(a.proxy.connect(doomed->transport->info().address));
    wait_until("the peer is not ready",
               [&] { return doomed->poll(), a.proxy.peer_state(lost) == PeerState::kReady; });
    Counter sent[kNumBanks] = {0, 0};
    const uint32_t channel = value_of(
        a.proxy.open_channel({lost, &a.region, b.remote, 7, {&sent[0], &sent[1]}, nullptr}));
    std::vector<Proxy::UserWrite> many(seed ? 200 : 2000,
                                       {lost, &a.region, 0, 0, &b.remote, 0, true, 1});
    auto under_way = a.proxy.submit(many, nullptr);
    if (seed == 0) CHECK(!under_way->wait(0.05), "more went than fits");
    doomed.reset();
    if (seed == 0) expect_end(*under_way, Code::kPeerLost);
    CHECK(under_way->wait(kSoon), "a write to a lost peer never ends");
    wait_until("nobody notices", [&] { return a.proxy.peer_state(lost) == PeerState::kLost; });
    CHECK(a.proxy.peer_status(lost).code() == Code::kPeerLost &&
          !a.proxy.peer_status(lost).text().empty());
    expect_end(*write(a, lost, b, 0, 0, 16), Code::kPeerLost);
    CHECK_OK(a.proxy.push({channel, 2, 0, 0, 64},
                          kSoon));  // its local bytes may be reused, so a sender does not wait
    wait_until("a command to a lost peer never ends",
               [&] { return word_at(sent[0]).load(std::memory_order_acquire) == 1; });
    CHECK_OK(a.proxy.peer_status(good));
    expect_end(*write(a, good, b, 0, 0, 16, 3), Code::kOk);
    CHECK(b.proxy.take_immediates(3, 1, kSoon));
    CHECK(a.proxy.peer_status(99).code() == Code::kInvalid &&
          a.proxy.peer_state(99) == PeerState::kLost);
  }
}

void who_was_disconnected_can_come_back() {
  for (const uint64_t seed : {0, 12, 13}) {
    Rank a(seed), b(0);
    std::atomic<bool> enough{false};
    std::thread looker([&] {  // as a thread that waits for rows does, while another connects
      for (uint32_t peer = 0; !enough; peer = (peer + 1) % 8) {
        const bool ready = a.proxy.peer_state(peer) == PeerState::kReady;
        CHECK(!ready || a.proxy.peer_status(peer).code() != Code::kInvalid);
        sched_yield();
      }
    });
    uint32_t last = ~0u;
    for (uint32_t round = 0; round < 5; ++round) {
      const uint32_t peer = a.connect(b);
      CHECK(peer != last, "a peer's number was used again");
      expect_end(*write(a, peer, b, 0, 0, 64, round), Code::kOk);
      CHECK(b.proxy.take_immediates(round, 1, kSoon));
      if (round % 2) (void)write(a, peer, b, 0, 0, 64);
      a.proxy.disconnect(peer);
      CHECK(a.proxy.peer_state(peer) == PeerState::kLost &&
            a.proxy.peer_status(peer).code() == Code::kClosed);
      expect_end(*write(a, peer, b, 0, 0, 64), Code::kClosed);
      last = peer;
    }
    auto refused = value_of(open_shm(kSecret + 1));
    const uint32_t stranger = value_of(a.proxy.connect(refused->info().address));
    wait_until("a wrong secret is not refused", [&] {
      Completion completions[4];
      refused->poll(completions, false);
      return a.proxy.peer_state(stranger) == PeerState::kLost;
    });
    CHECK(a.proxy.peer_status(stranger).text().find("secret") != std::string::npos);
    CHECK(!a.proxy.connect(Address(3)).ok(), "an address of three bytes");
    enough = true;
    looker.join();
  }
}

// --- a transport on strings ----------------------------------------------------------------------

// Does nothing by itself: the test says what post_write answers and which completions come.
struct Strings {
  std::mutex mutex;
  Capabilities capabilities{
      .max_message_bytes = 1 << 20, .queue_depth = 8, .writes_local_memory_unregistered = true};
  Status answer;             // of post_write
  bool complete = true;      // writes at once...
  uint32_t held_peer = ~0u;  // ...but for those of this peer
  std::vector<WriteRequest> posted;
  std::vector<Completion> completions;  // to be polled
  uint32_t num_peers = 0;

  void add(Completion::Kind kind, uint32_t peer, WorkId id = {}, Status status = {}) {
    Completion c;
    c.kind = kind, c.peer = PeerId{peer}, c.id = id, c.status = std::move(status);
    completions.push_back(std::move(c));
  }
  size_t num_posted() {
    std::lock_guard lock(mutex);
    return posted.size();
  }
};

class Puppet final : public Transport {
 public:
  explicit Puppet(Strings& strings) : strings_(strings) {
    info_.name = "puppet";
    info_.capabilities = strings.capabilities;
  }
  const Info& info() const override { return info_; }
  Result<MemoryRegion> register_memory(std::span<std::byte> bytes, DmaBuf) override {
    MemoryRegion region;
    region.bytes = bytes;
    return region;
  }
  Result<PeerId> connect(const Address&) override {
    std::lock_guard lock(strings_.mutex);
    return PeerId{strings_.num_peers++};
  }
  void disconnect(PeerId) noexcept override {}
  Status post_write(const WriteRequest& request) override {
    std::lock_guard lock(strings_.mutex);
    if (!strings_.answer.ok()) return strings_.answer;
    strings_.posted.push_back(request);
    if (strings_.complete && static_cast<uint32_t>(request.peer) != strings_.held_peer) {
      strings_.add(Completion::Kind::kWriteDone, static_cast<uint32_t>(request.peer), request.id);
    }
    return {};
  }
  size_t poll(std::span<Completion> out, bool) override {
    std::lock_guard lock(strings_.mutex);
    const size_t n = std::min(out.size(), strings_.completions.size());
    std::move(strings_.completions.begin(), strings_.completions.begin() + n, out.begin());
    strings_.completions.erase(strings_.completions.begin(), strings_.completions.begin() + n);
    return n;
  }

 private:
  Strings& strings_;
  Info info_;
};

struct Show {  // a proxy over a puppet, with two peers that are ready
  explicit Show(Capabilities capabilities = Strings().capabilities) {
    strings.capabilities = capabilities;
    proxy = std::make_unique<Proxy>(std::make_unique<Puppet>(strings), ProxyOptions{});
    for (uint32_t peer : {0, 1}) {
      CHECK(value_of(proxy->connect({})) == peer);
      std::lock_guard lock(strings.mutex);
      strings.add(Completion::Kind::kPeerReady, peer);
    }
    for (uint32_t peer : {0, 1}) {
      wait_until("not ready", [&] { return proxy->peer_state(peer) == PeerState::kReady; });
    }
    region.bytes = memory;
    remote = {0, memory.size(), {}, {}};
  }
  std::shared_ptr<Operation> write(uint32_t peer, uint64_t num_bytes, size_t times = 1,
                                   bool immediate = false) {
    return proxy->submit(std::vector<Proxy::UserWrite>(
                             times, {peer, &region, 0, num_bytes, &remote, 0, immediate, 1}),
                         nullptr);
  }
  void hold(uint32_t peer) {
    std::lock_guard lock(strings.mutex);
    strings.held_peer = peer;
  }
  Strings strings;
  std::vector<std::byte> memory = std::vector<std::byte>(1 << 16);
  MemoryRegion region;
  RemoteRegion remote;
  std::unique_ptr<Proxy> proxy;  // last: ends first
};

// A peer that takes writes but completes none must not use up the queue that the others need.
void writes_in_flight_leave_room_for_other_peers() {
  Show show;
  show.hold(0);
  auto slow = show.write(0, 16, 50);
  wait_until("nothing is posted", [&] { return show.strings.num_posted() > 0; });
  expect_end(*show.write(1, 16), Code::kOk);
  CHECK(!slow->done());
  std::lock_guard lock(show.strings.mutex);
  show.strings.held_peer = ~0u;
  for (const WriteRequest& r : show.strings.posted) {
    if (r.peer == PeerId{0}) show.strings.add(Completion::Kind::kWriteDone, 0, r.id);
  }
}

// Cut into several writes, its bytes could be overtaken by its immediate; without one it may be
// cut.
void a_write_too_long_for_its_immediate_is_refused() {
  Show show(
      {.max_message_bytes = 4096, .queue_depth = 64, .writes_local_memory_unregistered = true});
  expect_end(*show.write(0, 5 * 4096, 1, true), Code::kInvalid);
  CHECK(show.strings.num_posted() == 0);
  expect_end(*show.write(0, 5 * 4096, 1, false), Code::kOk);
  CHECK(show.strings.num_posted() == 5);
}

void a_lost_peer_stays_lost() {
  Show show;
  const uint32_t peer = value_of(show.proxy->connect({}));
  show.proxy->disconnect(peer);
  {
    std::lock_guard lock(show.strings.mutex);
    show.strings.add(Completion::Kind::kPeerReady, peer);  // was under way
  }
  expect_end(*show.write(0, 16), Code::kOk);
  CHECK(show.proxy->peer_state(peer) == PeerState::kLost, "a disconnected peer is ready");
  expect_end(*show.write(peer, 16), Code::kClosed);
}

// A command the transport calls invalid is a bug of this rank's kernels: it must not vanish.
void an_invalid_command_is_a_fault() {
  Show show;
  const uint32_t channel = value_of(
      show.proxy->open_channel({0, &show.region, show.remote, 0, {nullptr, nullptr}, nullptr}));
  show.strings.mutex.lock();
  show.strings.answer = {Code::kInvalid, "write outside its region"};
  show.strings.mutex.unlock();
  CHECK_OK(show.proxy->push({channel, 2, 0, 0, 16}, kSoon));
  wait_until("the command vanished", [&] { return !show.proxy->fault().ok(); });
}

void whatever_is_left_ends_with_the_proxy() {
  Show show;
  const uint32_t late = value_of(show.proxy->connect({}));
  show.hold(0);
  auto in_flight = show.write(0, 16), waiting = show.write(late, 16);
  wait_until("nothing is posted", [&] { return show.strings.num_posted() > 0; });
  show.proxy->stop();
  expect_end(*in_flight, Code::kClosed);
  expect_end(*waiting, Code::kClosed);
  expect_end(*show.write(1, 16), Code::kClosed);
  CHECK(show.proxy->push({0, 2, 0, 0, 0}, 0.1).code() == Code::kClosed);
}

void a_ring_that_stays_full_is_a_fault() {
  Show show;
  std::atomic<bool> blocked{false}, enough{false};
  std::thread blocker([&] {
    show.proxy->run([&] {
      for (blocked = true; !enough;) nap(0.001);
    });
  });
  wait_until("the proxy is not blocked", [&] { return blocked.load(); });
  Status status;
  for (int i = 0; i < 5000 && status.ok(); ++i) status = show.proxy->push({99, 2, 0, 0, 0}, 0.05);
  CHECK(status.code() == Code::kTransport && show.proxy->fault().code() == Code::kTransport);
  CHECK(show.proxy->stats().commands < 4096 + 100);
  enough = true;
  blocker.join();
  wait_until("the ring is not read", [&] { return show.proxy->stats().commands >= 4096; });
  CHECK(!show.proxy->push({99, 2, 0, 0, 0}, 0.05).ok(),
        "pushed behind a lost slot: nobody will ever take it");
}

// What a peer that was given up still writes finds memory, which nobody has.
void a_retired_segment_leaves_its_addresses() {
  constexpr size_t kBytes = 1 << 20;
  std::byte* address = nullptr;
  SegmentName name;
  {
    auto segment = value_of(SharedSegment::create("test", kBytes));
    address = segment.data();
    name = segment.name();
    address[kBytes - 1] = std::byte{7};
    CHECK(SharedSegment::open(name).ok());
    segment.retire();
    CHECK(!SharedSegment::open(name).ok(), "its memory is gone");
    CHECK(!find_segment({address, 1}).ok());
  }
  CHECK(address[kBytes - 1] == std::byte{0});
  std::memset(address, 1, kBytes);  // or this ends the process
}

}  // namespace

int main(int argc, char** argv) {
  return cases::run(
      argc, argv,
      {{"a_stalled_peer_stops_nobody_else", a_stalled_peer_stops_nobody_else},
       {"a_full_queue_that_drains_is_seen_soon", a_full_queue_that_drains_is_seen_soon},
       {"who_only_receives_is_not_late", who_only_receives_is_not_late},
       {"a_lost_peer_gives_a_status", a_lost_peer_gives_a_status},
       {"who_was_disconnected_can_come_back", who_was_disconnected_can_come_back},
       {"writes_in_flight_leave_room_for_other_peers", writes_in_flight_leave_room_for_other_peers},
       {"a_write_too_long_for_its_immediate_is_refused",
        a_write_too_long_for_its_immediate_is_refused},
       {"a_lost_peer_stays_lost", a_lost_peer_stays_lost},
       {"an_invalid_command_is_a_fault", an_invalid_command_is_a_fault},
       {"whatever_is_left_ends_with_the_proxy", whatever_is_left_ends_with_the_proxy},
       {"a_ring_that_stays_full_is_a_fault", a_ring_that_stays_full_is_a_fault},
       {"a_retired_segment_leaves_its_addresses", a_retired_segment_leaves_its_addresses}});
}
