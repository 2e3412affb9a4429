// transport_suite: sleeping and waking, peers that go, keys that are wrong, closing.
#include <fcntl.h>
#include <linux/udmabuf.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "transport_node.hpp"

namespace suite {
namespace {

// --- cases: waiting ------------------------------------------------------------------------------

// Arms and sleeps, as a proxy does, until `ready` or the deadline. Returns how often it went round.
int sleep_until(Node& node, double seconds, const std::function<bool()>& ready) {
  const int fd = node.transport->info().wait_fd;
  const auto start = ranks::Clock::now();
  int rounds = 0;
  while (!ready() && seconds_since(start) < seconds) {
    ++rounds;
    node.progress();
    if (ready() || node.poll_armed() > 0) continue;
    if (fd < 0) {
      usleep(1000);
      continue;
    }
    const int left_ms = static_cast<int>((seconds - seconds_since(start)) * 1000);
    pollfd wait{fd, POLLIN, 0};
    poll(&wait, 1, std::clamp(left_ms, 0, 5000));
  }
  return rounds;
}

void wake_up(Hub& hub) {
  constexpr int kRounds = 8;
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, 4096);
  const auto remote = node.swap_regions(buffer);
  double best = 1e9;
  for (size_t round = 0; round < kRounds; ++round) {
    node.barrier();
    double sent = 0;
    if (node.rank == 0) {
      usleep(200'000);
      sent = now_s();
      node.write(node.peers[1], {&buffer, 0, 16, &remote[1], 0}, 1);
      node.expect_all_ok();
    } else {
      const int rounds = sleep_until(node, 5, [&] { return node.immediates.size() == round + 1; });
      CHECK(node.immediates.size() == round + 1, "slept through a write");
      if (node.transport->info().wait_fd >= 0)
        CHECK(rounds < 100, "the fd is readable all the time");
    }
    const double seen = now_s();
    std::memcpy(&sent,
                node.all_gather(Bytes(reinterpret_cast<std::byte*>(&sent),
                                      reinterpret_cast<std::byte*>(&sent + 1)))[0]
                    .data(),
                sizeof sent);
    best = std::min(best, seen - sent);
  }
  if (node.rank == 1)
    CHECK(best < 0.1 * ranks::kSlowness, "woke after " + std::to_string(best) + " s");
  // An idle sleeper costs nearly nothing: in one second of several, as others may disturb it.
  node.barrier();
  double used = 1e9;
  for (int window = 0; window < 5 && used >= 0.1 * ranks::kSlowness; ++window) {
    const double before = cpu_seconds();
    sleep_until(node, 1, [] { return false; });
    used = std::min(used, cpu_seconds() - before);
  }
  CHECK(used < 0.1 * ranks::kSlowness,
        "idle, but used " + std::to_string(used) + " s of CPU in 1 s");
  node.barrier();
}

void sleeping_reader(Hub& hub) {  // more immediates of each kind than it has receives for
  constexpr uint32_t kCount = 3000;
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, 4096);
  const auto remote = node.swap_regions(buffer);
  const Node::Part nothing{nullptr, 0, 0, &remote[1], 0};
  if (node.rank == 1) usleep(2'000'000);
  uint32_t sent = 0;
  auto send_one = [&] {
    const bool is_user = sent % 2 != 0;
    const int64_t immediate = is_user ? Immediate::user(sent).bits : sent;
    const Status status = node.try_write(node.peers[1], nothing, immediate);
    CHECK(status.ok() || status.code() == Code::kAgain, status.text());
    sent += status.ok();
    return sent == 2 * kCount;
  };
  if (node.rank == 0) {
    CHECK(node.wait(60, send_one), std::to_string(sent) + " were taken");
    node.expect_all_ok(60);
  } else {
    CHECK(node.wait(60, [&] { return node.immediates.size() == 2 * kCount; }),
          std::to_string(node.immediates.size()) + " arrived");
    std::set<uint32_t> seen;
    for (uint32_t bits : node.immediates) seen.insert(bits & ~kUserImmediateBit);
    CHECK(seen.size() == 2 * kCount && *seen.rbegin() == 2 * kCount - 1, "some came twice");
  }
  node.barrier();
}

// --- cases: faults -------------------------------------------------------------------------------

void disconnect_one(Hub& hub) {
  Node node(hub);
  node.connect_all();
  constexpr size_t kBytes = 4 << 20;
  Buffer buffer(*node.transport, 3 * kBytes);
  const auto remote = node.swap_regions(buffer);
  if (node.rank == 0) {
    buffer.fill(1, 0, kBytes);
    for (int i = 0; i < 8; ++i) {  // rank 1 does not poll now
      for (int j : {1, 2}) {
        CHECK(node.wait(kShort, [&] {
          return node.try_write(node.peers[j], {&buffer, 0, kBytes, &remote[j], kBytes}, 5).ok();
        }));
      }
    }
    node.transport->disconnect(node.peers[1]);
    CHECK(!node.try_write(node.peers[1], {&buffer, 0, 16, &remote[1], 0}, 5).ok(),
          "wrote after disconnect");
    CHECK(node.wait(kShort, [&] { return node.all_done(); }),
          "disconnect left writes without an end");
    for (const auto& [id, status] : node.done) CHECK(id % 2 == 0 || status.ok(), status.text());
    for (int i = 0; i < 100; ++i) node.write(node.peers[2], {&buffer, 0, 4096, &remote[2], 0}, 6);
    CHECK(node.wait(kShort, [&] { return node.all_done(); }));
    for (uint64_t id = 16; id < node.next_id; ++id)
      CHECK(node.done.at(id).ok(), node.done.at(id).text());
    CHECK(!node.lost.contains(node.peers[2]));
  } else if (node.rank == 1) {
    usleep(1'000'000);
  } else {
    CHECK(node.wait(20, [&] { return node.immediates.size() == 108; }));
    CHECK(buffer.holds(1, kBytes, kBytes));
  }
  node.barrier();
  // The other direction was not touched, and a new connection works.
  if (node.rank == 1) {
    node.write(node.peers[0], {&buffer, 0, 64, &remote[0], 0}, 8);
    CHECK(node.wait(kShort, [&] { return node.all_done(); }));
  }
  if (node.rank == 0) {
    CHECK(
        node.wait(kShort, [&] { return !node.immediates.empty() && node.immediates.back() == 8; }));
    const PeerId again = node.connect(node.addresses[1]);
    node.expect_ready(again);
    const uint64_t id = node.write(again, {&buffer, 0, 64, &remote[1], 0}, 9);
    CHECK(node.wait(kShort, [&] { return node.done.contains(id); }));
    CHECK(node.done.at(id).ok(), node.done.at(id).text());
  }
  if (node.rank == 1) {
    CHECK(node.wait(kShort, [&] {
      return std::count(node.immediates.begin(), node.immediates.end(), 9u) == 1;
    }));
  }
  node.barrier();
}

void killed_peer(Hub& hub) {
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, 1 << 20);
  const auto remote = node.swap_regions(buffer);
  node.write(node.peers[1], {&buffer, 0, 4096, &remote[1], 0}, 1);
  node.expect_all_ok();
  node.barrier();
  if (node.rank == 1) kill(getpid(), SIGKILL);
  if (node.rank == 0) {
    std::string how;
    const auto start = ranks::Clock::now();
    while (how.empty() && seconds_since(start) < 10 * ranks::kSlowness) {
      const Status status = node.try_write(node.peers[1], {&buffer, 0, 4096, &remote[1], 0}, 1);
      if (!status.ok() && status.code() != Code::kAgain) how = status.text();
      node.spin(0.002);
      for (const auto& [id, end] : node.done) how = end.ok() ? how : end.text();
      if (node.lost.contains(node.peers[1])) how = node.lost.at(node.peers[1]).text();
    }
    CHECK(!how.empty(), "10 s after its death nobody noticed");
    CHECK(how.find("peer") != std::string::npos || how.find("process") != std::string::npos,
          "does not say who: " + how);
    CHECK(node.wait(kShort, [&] { return node.lost.contains(node.peers[1]); }),
          "never reported as lost");
    node.transport->disconnect(node.peers[1]);
    CHECK(node.wait(kShort, [&] { return node.all_done(); }), "writes to the dead never ended");
    for (int i = 0; i < 200; ++i) node.write(node.peers[2], {&buffer, 0, 4096, &remote[2], 0}, 2);
    CHECK(node.wait(kShort, [&] { return node.all_done(); }));
    for (uint64_t id = node.next_id - 200; id < node.next_id; ++id)
      CHECK(node.done.at(id).ok(), node.done.at(id).text());
    CHECK(!node.lost.contains(node.peers[2]), "another peer was touched");
  }
  if (node.rank == 2)
    CHECK(node.wait(
        25, [&] { return std::count(node.immediates.begin(), node.immediates.end(), 2u) == 200; }));
  node.barrier();
}

void last_words(Hub& hub) {  // what a peer wrote before it died is told before its death
  constexpr int kWords = 200;
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, 1 << 20);
  const auto remote = node.swap_regions(buffer);
  node.barrier();
  if (node.rank == 1) {
    for (int i = 0; i < kWords; ++i) node.write(node.peers[0], {&buffer, 0, 16, &remote[0], 0}, 1);
    node.expect_all_ok();
    kill(getpid(), SIGKILL);
  }
  sleep(1);             // and does not look
  node.progress(true);  // armed: now it also looks who has died
  CHECK(node.wait(kShort, [&] { return !node.immediates.empty(); }));
  const bool lost = node.wait(kShort, [&] { return node.lost.contains(node.peers[1]); });
  CHECK(lost || is_fabric(), "its death went unnoticed");  // which notices when it is written to
  const size_t told = node.immediates.size();
  CHECK(told == kWords, "lost after " + std::to_string(told) + " of them");
}

void killed_writer(Hub& hub) {  // dies in the middle of large writes, while it is written to
  constexpr size_t kBytes = 8 << 20;
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, 2 * kBytes);
  const auto remote = node.swap_regions(buffer);
  const int other = 1 - std::min(node.rank, 1);
  if (node.rank < 2) {
    for (int i = 0; i < 8; ++i)
      node.write(node.peers[other], {&buffer, 0, kBytes, &remote[other], kBytes}, 1);
    if (node.rank == 1) {
      node.wait(kShort, [&] { return node.immediates.size() >= 2; });
      kill(getpid(), SIGKILL);
    }
    CHECK(node.wait(kShort, [&] { return node.lost.contains(node.peers[1]); }),
          "its death went unnoticed");
    node.transport->disconnect(node.peers[1]);
    CHECK(node.wait(kShort, [&] { return node.all_done(); }));
    if (!is_fabric_shm()) {  // there, the dead may have locked our own queue for ever
      node.write(node.peers[2], {&buffer, 0, kBytes, &remote[2], 0}, 2);
      CHECK(node.wait(kShort, [&] { return node.all_done(); }));
      CHECK(node.done.at(8).ok(), node.done.at(8).text());
    }
  } else if (!is_fabric_shm()) {
    CHECK(node.wait(30, [&] { return node.immediates.size() == 1; }));
  }
  node.barrier();
}

void bad_key(Hub& hub) {
  constexpr size_t kBytes = 512 << 10;
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, 1 << 20);
  auto remote = node.swap_regions(buffer);
  node.barrier();
  if (node.rank == 0) {
    buffer.fill(3, 0, kBytes);
    remote[1].key.value ^= 0x5a5a5a;
    const Status status = node.try_write(node.peers[1], {&buffer, 0, kBytes, &remote[1], 0}, 13);
    if (status.ok()) {
      CHECK(node.wait(10, [&] { return node.all_done() || is_fabric_shm(); }), "no end");
      // libfabric's shm provider drops the bytes and says that all is well.
      if (!is_fabric_shm())
        CHECK(!node.done.at(0).ok(), "a write with a wrong key was completed as good");
    }
  } else {
    node.spin(1);
  }
  node.barrier();
  CHECK(node.rank == 0 || buffer.is_zero(0, 1 << 20), "a wrong key wrote");
  CHECK(node.immediates.empty());
  node.barrier();
}

void withdrawn_region(Hub& hub) {  // a released registration: its key no longer opens anything
  if (backend == "shm") return;    // there the segment itself is the right to write
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, 1 << 20);
  const auto remote = node.swap_regions(buffer);
  if (node.rank == 1) buffer.withdraw();
  node.barrier();
  if (node.rank == 0) {
    buffer.fill(3, 0, 1 << 20);
    for (size_t size : {16, 4096, 1 << 20}) {
      const Status ignored = node.try_write(node.peers[1], {&buffer, 0, size, &remote[1], 0}, 13);
      node.spin(0.3);
    }
  } else {
    node.spin(1);
    CHECK(buffer.is_zero(0, 1 << 20), "a withdrawn key wrote");
    CHECK(node.immediates.empty());
  }
  node.barrier();
}

// A dmabuf is taken, and written from and to; or refused, and nothing else is lost. Without a GPU
// its pages are those of a memfd: /dev/udmabuf exports them. Where there is none, what is given is
// no dmabuf at all.
void device_memory(Hub& hub) {
  constexpr size_t kBytes = 1 << 20;
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, kBytes);
  const auto remote = node.swap_regions(buffer);
  const FileDescriptor memory(memfd_create("device_memory", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  CHECK(memory.get() >= 0 && ftruncate(memory.get(), kBytes) == 0);
  CHECK(fcntl(memory.get(), F_ADD_SEALS, F_SEAL_SHRINK) == 0);
  Mapping mapping(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0),
                  kBytes);
  const FileDescriptor exporter(open("/dev/udmabuf", O_RDWR | O_CLOEXEC));
  udmabuf_create pages{};
  pages.memfd = static_cast<uint32_t>(memory.get());
  pages.flags = UDMABUF_FLAGS_CLOEXEC;
  pages.size = kBytes;
  const FileDescriptor exported(exporter.get() < 0 ? -1
                                                   : ioctl(exporter.get(), UDMABUF_CREATE, &pages));
  const bool is_dmabuf = exported.get() >= 0;
  auto region = node.transport->register_memory(
      mapping.bytes(), DmaBuf{is_dmabuf ? exported.get() : memory.get(), 0});
  std::printf("  dmabuf: %s, %s\n", is_dmabuf ? "of udmabuf" : "none here",
              region.ok() ? "taken" : region.status().text().c_str());
  const bool taken = region.ok();
  if (taken) {
    CHECK(is_dmabuf, "took what is no dmabuf");
    Buffer device(std::move(mapping), std::move(region.value()));
    const auto there = node.swap_regions(device);
    const int other = 1 - node.rank;
    device.fill(static_cast<uint64_t>(node.rank), 0, kBytes / 2);  // one half each
    for (const size_t size : {size_t{16}, kBytes / 2}) {           // 16: a host's goes inline
      node.write(node.peers[other], {&device, 0, size, &there[other], kBytes / 2}, 1);
      node.expect_all_ok();
    }
    CHECK(node.wait(20, [&] { return node.immediates.size() == 2; }));
    node.barrier();
    CHECK(device.holds(static_cast<uint64_t>(other), kBytes / 2, kBytes / 2), "other bytes");
    node.barrier();
    return;
  }
  const std::string& text = region.status().text();
  const bool by_verbs = backend.rfind("verbs", 0) == 0;
  CHECK(text.find(by_verbs ? "ibv_reg_dmabuf_mr" : "host memory only") != std::string::npos, text);
  if (node.rank == 0) {
    buffer.fill(3, 0, kBytes);
    node.write(node.peers[1], {&buffer, 0, kBytes, &remote[1], 0}, 1);
    node.expect_all_ok();
  } else {
    CHECK(node.wait(20, [&] { return node.immediates.size() == 1; }));
    CHECK(buffer.holds(3, 0, kBytes), "other bytes");
  }
  node.barrier();
}

void close_in_traffic(Hub& hub) {  // closing with writes under way harms nobody else
  Node node(hub);
  node.connect_all();
  Buffer buffer(*node.transport, 16 << 20);
  const auto remote = node.swap_regions(buffer);
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 3; ++j) {
      const Node::Part part{&buffer, 0, 8 << 20, &remote[j], 8 << 20};
      if (j == 0 && node.rank != 0) {  // may be gone already
        const Status ignored = node.try_write(node.peers[0], part, 10 * node.rank + i);
      } else if (j != node.rank) {
        node.write(node.peers[j], part, 10 * node.rank + i);
      }
    }
  }
  if (node.rank == 0) node.transport.reset();
  if (node.rank != 0) {
    const int other = 3 - node.rank;
    auto from_other = [&] {
      return std::count_if(node.immediates.begin(), node.immediates.end(),
                           [&](uint32_t v) { return v / 10 == static_cast<uint32_t>(other); });
    };
    CHECK(node.wait(20, [&] { return from_other() >= 4; }));
    node.write(node.peers[other], {&buffer, 0, 64, &remote[other], 0}, 10 * node.rank + 5);
    CHECK(node.wait(20, [&] { return from_other() == 5; }));
    CHECK(!node.lost.contains(node.peers[other]));
  }
  node.barrier();
}

void open_and_close(Hub& hub) {  // again and again in one process; signal handlers stay ours
  struct sigaction before{}, after{};
  signal(SIGINT, [](int) {});
  sigaction(SIGINT, nullptr, &before);
  for (int i = 0; i < 5; ++i) {
    Node node(hub), second(hub);
    CHECK(node.transport->info().address != second.transport->info().address);
    Buffer buffer(*second.transport, 4096);  // outlives its transport
    const PeerId peer = node.connect(second.transport->info().address);
    const auto start = ranks::Clock::now();
    while (!node.ready.contains(peer) && seconds_since(start) < kShort) {
      node.progress();
      second.progress();
    }
    CHECK(node.ready.contains(peer));
    second.transport.reset();
  }
  sigaction(SIGINT, nullptr, &after);
  CHECK(before.sa_handler == after.sa_handler, "SIGINT's handler was replaced");
}

void nothing_left(Hub& hub) {  // in /dev/shm, after a kill and the next open
  const pid_t victim = fork();
  if (victim == 0) {
    auto opened = open_transport(kSecret);
    CHECK(opened.ok(), opened.status().text());
    kill(getpid(), SIGKILL);
  }
  int status = 0;
  CHECK(waitpid(victim, &status, 0) == victim && WIFSIGNALED(status));
  const std::string left = "/dev/shm/" + std::to_string(victim) + ":0:0";
  struct stat info{};
  if (is_fabric_shm())
    CHECK(stat(left.c_str(), &info) == 0, "libfabric no longer leaves files: simplify");
  Node node(hub);
  CHECK(stat(left.c_str(), &info) != 0, "still there: " + left);
  Node second(hub);  // does not take the first one's file for a stale one
  const std::string own = "/dev/shm/" + std::to_string(getpid()) + ":0:0";
  if (is_fabric_shm()) CHECK(stat(own.c_str(), &info) == 0, "removed a live endpoint's file");
}

constexpr Case kCases[] = {
    {"wake_up", 2, wake_up},
    {"sleeping_reader", 2, sleeping_reader},
    {"disconnect_one", 3, disconnect_one},
    {"killed_peer", 3, killed_peer, 1u << 1},
    {"last_words", 2, last_words, 1u << 1},
    {"killed_writer", 3, killed_writer, 1u << 1},
    {"bad_key", 2, bad_key},
    {"withdrawn_region", 2, withdrawn_region},
    {"device_memory", 2, device_memory},
    {"close_in_traffic", 3, close_in_traffic},
    {"open_and_close", 1, open_and_close},
    {"nothing_left", 1, nothing_left},
};

}  // namespace

std::span<const Case> fault_cases() { return kCases; }

}  // namespace suite
