// One suite for every backend, over the public Transport interface only.
//
//   transport_suite BACKEND CASE
//   transport_suite BACKEND            every case
//   transport_suite BACKEND --probe    opens it; exit status 3 and the reason if it is not there
//
// BACKEND: shm, fabric:tcp, fabric:shm, fabric:PROVIDER[@INTERFACE]. Each case runs in one to three
// forked processes, every wait is bounded. Exit status: 0 passed, 1 failed. Here: admission and
// writes; transport_faults.cpp has the rest.
#include "transport_node.hpp"

namespace suite {
namespace {

// --- cases: admission ----------------------------------------------------------------------------

void both_ways(Hub& hub) {
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, 8192);
  const auto remote = node.swap_regions(buffer);
  const int other = 1 - node.rank;
  buffer.fill(node.rank, 0, 4096);
  node.write(node.peers[other], {&buffer, 0, 4096, &remote[other], 4096}, 100 + node.rank);
  CHECK(node.wait(kShort, [&] { return node.immediates.size() == 1; }));
  CHECK(node.immediates[0] == 100u + other);
  CHECK(buffer.holds(other, 4096, 4096));
  node.expect_all_ok();
  node.barrier();
}

void wrong_secret(Hub& hub) {
  Node node(hub,
            hub.rank() == 2 ? kSecret + 1 : kSecret);  // ranks 0 and 1 are one job, 2 is another
  const auto addresses = node.all_gather(node.transport->info().address);
  std::vector<PeerId> peers;
  for (int i = 0; i < 3; ++i) peers.push_back(node.connect(addresses[i]));
  for (int i = 0; i < 3; ++i) {
    const bool friends = (i == 2) == (node.rank == 2);
    CHECK(node.wait(
        15, [&] { return node.ready.contains(peers[i]) || node.refused.contains(peers[i]); }));
    CHECK(node.ready.contains(peers[i]) == friends);
    if (friends) continue;
    Buffer buffer(*node.transport, 4096);
    const RemoteRegion remote = describe(buffer.region());
    CHECK(!node.try_write(peers[i], {&buffer, 0, 16, &remote, 0}, 1).ok(),
          "wrote to a peer that refused");
  }
  node.barrier();
}

void self_connect(Hub& hub) {
  Node node(hub);
  const PeerId self = node.connect(node.transport->info().address);
  node.expect_ready(self);
  Buffer buffer(*node.transport, 1 << 20);
  const RemoteRegion remote = describe(buffer.region());
  buffer.fill(5, 0, 300000);
  node.write(self, {&buffer, 0, 300000, &remote, 500000}, 9);
  node.write(self, {nullptr, 0, 0, &remote, 0}, 10);
  CHECK(node.wait(kShort, [&] { return node.immediates.size() == 2; }));
  CHECK(buffer.holds(5, 500000, 300000));
  node.expect_all_ok();
}

void connect_twice(Hub& hub) {
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, 4096);
  const auto remote = node.swap_regions(buffer);
  const int other = 1 - node.rank;
  const PeerId again = node.connect(node.addresses[other]);
  CHECK(again != node.peers[other], "two connects gave one peer");
  node.expect_ready(again);
  buffer.fill(node.rank, 0, 1024);
  node.write(node.peers[other], {&buffer, 0, 1024, &remote[other], 1024}, 1);
  node.write(again, {&buffer, 0, 1024, &remote[other], 2048}, 2);
  CHECK(node.wait(kShort, [&] { return node.immediates.size() == 2; }));
  CHECK(buffer.holds(other, 1024, 1024) && buffer.holds(other, 2048, 1024));
  node.expect_all_ok();
  node.barrier();
  node.transport->disconnect(again);
  node.write(node.peers[other], {&buffer, 0, 1024, &remote[other], 3072}, 3);
  CHECK(node.wait(kShort, [&] { return node.immediates.size() == 3; }),
        "the other peer of that address was touched");
  node.expect_all_ok();
  node.barrier();
}

void late_peer(Hub& hub) {
  Node node(hub);
  const auto addresses = node.all_gather(node.transport->info().address);
  if (node.rank == 1) sleep(2);  // neither connects nor polls
  const PeerId peer = node.connect(addresses[1 - node.rank]);
  node.expect_ready(peer);
  node.barrier();
}

void many_connects(Hub& hub) {  // more than a sleeping peer has room for, so some are asked again
  constexpr int kCount = 80;
  Node node(hub);
  const auto addresses = node.all_gather(node.transport->info().address);
  if (node.rank == 1) {
    usleep(500'000);
  } else {
    std::vector<PeerId> peers;
    for (int i = 0; i < kCount; ++i) peers.push_back(node.connect(addresses[1]));
    for (PeerId peer : peers) node.expect_ready(peer);
    for (PeerId peer : peers) node.transport->disconnect(peer);
  }
  node.barrier();
}

void nobody_there(Hub& hub) {
  Node node(hub);
  std::unique_ptr<Transport> closed;
  if (node.rank == 1) {  // an address of a live process that is no longer open
    auto opened = open_transport(kSecret);
    CHECK(opened.ok(), opened.status().text());
    closed = std::move(opened.value());
  }
  const auto addresses = node.all_gather((closed ? closed : node.transport)->info().address);
  closed.reset();
  node.barrier();
  if (node.rank == 0) {
    const PeerId peer = node.connect(addresses[1]);
    const PeerId dead = node.connect(addresses[2]);
    CHECK(node.wait(15, [&] { return node.refused.contains(peer) && node.refused.contains(dead); }),
          "not refused");
    CHECK(node.ready.empty());
  }
  if (node.rank == 2) return;  // its process is gone
  node.barrier();
}

// --- cases: writes -------------------------------------------------------------------------------

void sizes(Hub& hub) {
  Node node(hub);
  node.connect_all();
  constexpr size_t kSizes[] = {0, 1, 8, 63, 1000, 4096, 4096 + 1, 65536, 100'000, 1 << 20, 8 << 20};
  constexpr size_t kHalf = 9 << 20;
  Buffer buffer(*node.transport, 2 * kHalf);
  const auto remote = node.swap_regions(buffer);
  const int other = 1 - node.rank;
  // At the moment an immediate is seen the bytes must be there: H4. It may be seen in the barrier,
  // where the other rank may be a step ahead.
  node.on_immediate = [&](uint32_t value) {
    const uint32_t next = static_cast<uint32_t>(node.immediates.size()) - 1;
    CHECK(value == next, "an immediate that was not sent: " + std::to_string(value));
    CHECK(buffer.holds(value, kHalf, kSizes[value]),
          "bytes missing: " + std::to_string(kSizes[value]));
    CHECK(buffer.is_zero(kHalf + kSizes[value], 4096), "bytes after the end");
  };
  for (uint32_t next = 0; next < std::size(kSizes); ++next) {
    const size_t size = kSizes[next];
    if (node.rank == 0) {
      buffer.fill(next, 0, size);
      node.write(node.peers[other], {&buffer, 0, size, &remote[other], kHalf}, next);
    } else {
      CHECK(node.wait(kShort, [&] { return node.immediates.size() == next + 1; }),
            std::to_string(size) + " bytes");
      std::memset(buffer.data() + kHalf, 0, kHalf);
    }
    node.expect_all_ok();
    node.barrier();
  }
}

void plain_memory(Hub& hub) {  // registered memory that is no shared segment
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, 4 << 20, true);
  const auto remote = node.swap_regions(buffer);
  const int other = 1 - node.rank;
  buffer.fill(node.rank, 0, 2 << 20);
  node.write(node.peers[other], {&buffer, 0, 2 << 20, &remote[other], 2 << 20}, 1);
  CHECK(node.wait(kShort, [&] { return node.immediates.size() == 1; }));
  CHECK(buffer.holds(other, 2 << 20, 2 << 20));
  node.expect_all_ok();
  node.barrier();
}

void slices(Hub& hub) {
  Node node(hub);
  node.connect_all();
  constexpr size_t kSlices = 97, kStride = 4097, kLength = 3001;
  Buffer buffer(*node.transport, 2 * kSlices * kStride);
  const auto remote = node.swap_regions(buffer);
  const int other = 1 - node.rank;
  for (size_t i = 0; i < kSlices; ++i) buffer.fill(1000 * node.rank + i, i * kStride, kLength);
  for (size_t i = 0; i < kSlices; ++i) {  // slice i goes to place 31 i mod 97
    node.write(
        node.peers[other],
        {&buffer, i * kStride, kLength, &remote[other], (kSlices + i * 31 % kSlices) * kStride}, i);
  }
  CHECK(node.wait(kShort, [&] { return node.immediates.size() == kSlices; }));
  for (size_t i = 0; i < kSlices; ++i) {
    const size_t place = (kSlices + i * 31 % kSlices) * kStride;
    CHECK(buffer.holds(1000 * other + i, place, kLength) &&
          buffer.is_zero(place + kLength, kStride - kLength));
  }
  node.expect_all_ok();
  // Outside of either region: an error here, nothing on the wire.
  for (auto [from, to] : {std::pair<uint64_t, uint64_t>{buffer.size() - 8, 0},
                          {0, buffer.size() - 8},
                          {0, UINT64_MAX - 8}}) {
    const Status status =
        node.try_write(node.peers[other], {&buffer, from, 16, &remote[other], to}, 1);
    CHECK(!status.ok() && status.code() != Code::kAgain);
  }
  node.barrier();
}

void wide_offsets(Hub& hub) {
  Node node(hub);
  node.connect_all();
  constexpr uint64_t kFar = (4ull << 30) + (8 << 20) + 48;
  const size_t period = is_rdma() ? 96u << 20 : 0;  // 4 GiB is no multiple of it
  Buffer buffer(*node.transport, (4ull << 30) + (16 << 20), backend != "shm", period);  // sparse
  const auto remote = node.swap_regions(buffer);
  const int other = 1 - node.rank;
  buffer.fill(node.rank, kFar, 65536);
  node.write(node.peers[other], {&buffer, kFar, 65536, &remote[other], kFar + (1 << 20)}, 77);
  CHECK(node.wait(kShort, [&] { return node.immediates.size() == 1; }));
  CHECK(buffer.holds(other, kFar + (1 << 20), 65536));
  CHECK(buffer.is_zero((kFar + (1 << 20)) & 0xffffffffu, 65536), "the offset was cut to 32 bits");
  node.expect_all_ok();
  node.barrier();
}

void full_queue(Hub& hub) {
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, 1 << 20);
  const auto remote = node.swap_regions(buffer);
  if (node.rank == 0) {
    bool was_full = false;
    while (!was_full && node.next_id < 1'000'000) {  // nobody polls: the queue must fill
      const Status status = node.try_write(node.peers[1], {&buffer, 0, 64, &remote[1], 0}, 3);
      was_full = status.code() == Code::kAgain;
      CHECK(status.ok() || was_full, status.text());
    }
    CHECK(was_full, "a million writes and never full");
  } else {
    usleep(500'000);
  }
  node.barrier();
  for (int i = 0; i < 5000 && node.rank == 0; ++i)
    node.write(node.peers[1], {&buffer, 0, 64, &remote[1], 0}, 3);
  node.expect_all_ok();
  const Bytes sent(reinterpret_cast<std::byte*>(&node.next_id),
                   reinterpret_cast<std::byte*>(&node.next_id + 1));
  uint64_t expected = 0;
  std::memcpy(&expected, node.all_gather(sent)[0].data(), sizeof expected);
  if (node.rank == 1) CHECK(node.wait(kShort, [&] { return node.immediates.size() == expected; }));
  node.spin(0.1);
  CHECK(node.rank == 0 || node.immediates.size() == expected, "more immediates than writes");
  node.barrier();
}

void many_immediates(Hub& hub) {  // both ways at once, without bytes
  constexpr uint32_t kCount = 5000;
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, 4096);
  const auto remote = node.swap_regions(buffer);
  for (uint32_t i = 0; i < kCount; ++i)
    node.write(node.peers[1 - node.rank], {nullptr, 0, 0, &remote[1 - node.rank], 0}, i);
  CHECK(node.wait(30, [&] { return node.immediates.size() == kCount; }));
  std::sort(node.immediates.begin(), node.immediates.end());
  for (uint32_t i = 0; i < kCount; ++i)
    CHECK(node.immediates[i] == i, "an immediate was lost or doubled");
  node.expect_all_ok();
  node.barrier();
}

void announced(Hub& hub) {  // writes that say how many follow, and keep it or not
  constexpr uint32_t kGroups = 40, kWrites = 50;
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, 4096);
  const auto remote = node.swap_regions(buffer);
  const int other = 1 - node.rank;
  uint32_t sent = 0;
  for (uint32_t group = 0; group < kGroups; ++group) {
    for (uint32_t i = 0; i < kWrites; ++i) {
      const bool kept = group % 2 == 0;
      node.following = kept ? kWrites - 1 - i : 3;
      const int to = i % 3 == 0 ? node.rank : other;
      node.write(node.peers[to], {&buffer, 0, 16 * (i % 2), &remote[to], 64}, sent++);
    }
    if (group % 8 < 2) node.expect_all_ok();  // nothing comes after them
  }
  const PeerId again = node.connect(node.addresses[other]);
  node.expect_ready(again);
  node.following = 1;  // announces one, and is given up instead
  node.write(node.peers[other], {&buffer, 0, 16, &remote[other], 64}, sent++);
  node.write(again, {&buffer, 0, 16, &remote[other], 64});
  node.transport->disconnect(again);
  CHECK(node.wait(kShort, [&] { return node.all_done(); }), "a write never ended");
  for (uint64_t id = 0; id + 1 < node.next_id; ++id)
    CHECK(node.done.at(id).ok(), node.done.at(id).text());
  CHECK(node.wait(kShort, [&] { return node.immediates.size() == kGroups * kWrites + 1; }),
        std::to_string(node.immediates.size()) + " arrived");
  node.barrier();
}

void everybody(Hub& hub) {  // three ranks, all pairs and oneself, mixed sizes; no order is assumed
  constexpr int kCount = 150;
  constexpr size_t kPlace = 300'000;
  auto size_of = [](int from, int i) {
    return static_cast<size_t>((from * 7919 + i * 104729) % 5 == 0 ? 250'000 + i : i * 37);
  };
  Node node(hub);
  node.connect_all();
  const size_t half = 3 * kCount * kPlace;
  Buffer target(*node.transport, half), source(*node.transport, kPlace * kCount);
  const auto remote = node.swap_regions(target);
  std::set<uint32_t> seen;
  node.on_immediate = [&](uint32_t value) {
    const int from = static_cast<int>(value) / kCount, i = static_cast<int>(value) % kCount;
    CHECK(from < 3 && seen.insert(value).second, "unknown or doubled immediate");
    CHECK(target.holds(value, value * kPlace, size_of(from, i)), "an immediate before its bytes");
  };
  for (int i = 0; i < kCount; ++i)
    source.fill(node.rank * kCount + i, i * kPlace, size_of(node.rank, i));
  for (int i = 0; i < kCount; ++i) {
    const uint32_t value = node.rank * kCount + i;
    for (int j = 0; j < 3; ++j) {
      node.write(node.peers[j],
                 {&source, i * kPlace, size_of(node.rank, i), &remote[j], value * kPlace}, value);
    }
  }
  CHECK(node.wait(60, [&] { return seen.size() == 3 * kCount; }),
        std::to_string(seen.size()) + " arrived");
  node.expect_all_ok();
  node.barrier();
}

constexpr Case kCases[] = {
    {"both_ways", 2, both_ways},
    {"wrong_secret", 3, wrong_secret},
    {"self_connect", 1, self_connect},
    {"connect_twice", 2, connect_twice},
    {"late_peer", 2, late_peer},
    {"many_connects", 2, many_connects},
    {"nobody_there", 3, nobody_there},
    {"sizes", 2, sizes},
    {"plain_memory", 2, plain_memory},
    {"slices", 2, slices},
    {"wide_offsets", 2, wide_offsets},
    {"full_queue", 2, full_queue},
    {"many_immediates", 2, many_immediates},
    {"announced", 2, announced},
    {"everybody", 3, everybody},
};

}  // namespace
}  // namespace suite

using namespace suite;  // NOLINT

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s BACKEND [CASE | --probe]\n", argv[0]);
    return 2;
  }
  backend = argv[1];
  const std::string wanted = argc > 2 ? argv[2] : "";
  if (wanted == "--probe") {
    auto opened = open_transport(kSecret);
    if (!opened.ok()) std::printf("%s\n", opened.status().text().c_str());
    return opened.ok() ? 0 : 3;
  }
  bool ok = true, found = false;
  std::vector<Case> cases(std::begin(kCases), std::end(kCases));
  cases.insert(cases.end(), fault_cases().begin(), fault_cases().end());
  for (const Case& c : cases) {
    if (!wanted.empty() && wanted != c.name) continue;
    found = true;
    const auto start = ranks::Clock::now();
    const bool passed = ranks::run(c.num_ranks, 90, c.body, c.may_die);
    std::printf("%-18s %s %6.2f s\n", c.name, passed ? "ok    " : "FAILED", seconds_since(start));
    std::fflush(stdout);
    ok &= passed;
  }
  return ok && found ? 0 : 1;
}
