// One process of a case of transport_suite: its transport, its memory, and what it has seen so far.
#pragma once

#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "check.hpp"
#include "ranks.hpp"
#include "transport.hpp"

namespace suite {

using namespace moe_comm;  // NOLINT: a part of one program
using ranks::Bytes;
using ranks::Hub;
using ranks::seconds_since;

constexpr Secret kSecret = 0x5ec7e75ec7e7;
constexpr double kShort = 10.0;  // seconds: anything that should happen

inline std::string backend;  // from the command line

inline bool is_fabric() { return backend.starts_with("fabric:"); }
inline bool is_fabric_shm() { return backend == "fabric:shm"; }
inline bool is_verbs() { return backend.starts_with("verbs"); }
inline bool is_rdma() { return is_verbs() || backend.starts_with("fabric:verbs"); }

inline Result<std::unique_ptr<Transport>> open_transport(Secret secret) {
  if (backend == "shm") return open_shm(secret);
  if (is_verbs())
    return open_verbs(secret, backend.substr(std::min(backend.size(), strlen("verbs:"))));
  std::string provider = backend.substr(strlen("fabric:")), interface;
  if (const size_t at = provider.find('@'); at != std::string::npos) {
    interface = provider.substr(at + 1);
    provider.resize(at);
  }
  if (provider == "tcp") {
    provider = "tcp;ofi_rxm";
    if (interface.empty()) interface = "lo";
  }
  return open_fabric(secret, provider, interface);
}

// --- memory --------------------------------------------------------------------------------------

// Bytes peers may write: a shared segment for shm (or, if plain, ordinary memory), ordinary memory
// else. period: the same so many bytes over and over, because RDMA locks all it registers in
// memory.
class Buffer {
 public:
  Buffer(Transport& transport, size_t num_bytes, bool plain = backend != "shm", size_t period = 0) {
    if (plain) {
      void* data = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      CHECK(data != MAP_FAILED);
      mapping_ = Mapping(data, num_bytes);
      bytes_ = mapping_.bytes();
      if (period > 0) repeat(period);
    } else {
      auto segment = SharedSegment::create("transport_suite", num_bytes);
      CHECK(segment.ok(), segment.status().text());
      segment_ = std::make_unique<SharedSegment>(std::move(segment.value()));
      bytes_ = segment_->bytes().first(num_bytes);
    }
    auto region = transport.register_memory(bytes_);
    CHECK(region.ok(), region.status().text());
    region_ = std::move(region.value());
  }
  Buffer(Mapping mapping, MemoryRegion region)
      : mapping_(std::move(mapping)), bytes_(mapping_.bytes()), region_(std::move(region)) {}
  std::byte* data() const { return bytes_.data(); }
  size_t size() const { return bytes_.size(); }
  const MemoryRegion& region() const { return region_; }
  void withdraw() { region_ = MemoryRegion{}; }

  // A pattern that depends on the seed and on the place.
  static std::byte pattern(uint64_t seed, uint64_t i) {
    return static_cast<std::byte>((seed * 0x9e3779b97f4a7c15 + i * 0x2545f4914f6cdd1d) >> 56 | 1);
  }
  void fill(uint64_t seed, size_t offset, size_t length) {
    for (size_t i = 0; i < length; ++i) data()[offset + i] = pattern(seed, i);
  }
  bool holds(uint64_t seed, size_t offset, size_t length) const {
    for (size_t i = 0; i < length; ++i) {
      if (data()[offset + i] != pattern(seed, i)) return false;
    }
    return true;
  }
  bool is_zero(size_t offset, size_t length) const {
    return std::all_of(data() + offset, data() + offset + length,
                       [](std::byte b) { return b == std::byte{0}; });
  }

 private:
  void repeat(size_t period) {
    const FileDescriptor file(memfd_create("transport_suite", MFD_CLOEXEC));
    CHECK(file.get() >= 0 && ftruncate(file.get(), static_cast<off_t>(period)) == 0);
    for (size_t offset = 0; offset < size(); offset += period) {
      void* place = mmap(data() + offset, std::min(period, size() - offset), PROT_READ | PROT_WRITE,
                         MAP_SHARED | MAP_FIXED, file.get(), 0);
      CHECK(place == data() + offset);
    }
  }

  Mapping mapping_;
  std::unique_ptr<SharedSegment> segment_;
  std::span<std::byte> bytes_;
  MemoryRegion region_;
};

inline Bytes pack(const RemoteRegion& region) {
  std::vector<uint64_t> words{region.base, region.num_bytes, region.key.value};
  words.insert(words.end(), region.extra.begin(), region.extra.end());
  const auto* bytes = reinterpret_cast<const std::byte*>(words.data());
  return Bytes(bytes, bytes + words.size() * sizeof(uint64_t));
}

inline RemoteRegion unpack(const Bytes& bytes) {
  std::vector<uint64_t> words(bytes.size() / sizeof(uint64_t));
  if (words.size() < 3) return {};
  std::memcpy(words.data(), bytes.data(), bytes.size());
  return {words[0], words[1], {words[2]}, {words.begin() + 3, words.end()}};
}

// --- one process of a case -----------------------------------------------------------------------

class Node {
 public:
  explicit Node(Hub& hub, Secret secret = kSecret)
      : hub_(hub), rank(hub.rank()), num_ranks(hub.num_ranks()) {
    auto opened = open_transport(secret);
    CHECK(opened.ok(), opened.status().text());
    transport = std::move(opened.value());
    CHECK(!transport->info().address.empty());
    CHECK(transport->info().capabilities.queue_depth >= 64);
    CHECK(transport->info().capabilities.max_message_bytes >= 8u << 20);
  }

  void progress(bool arm = false) { absorb(transport ? transport->poll(batch_, arm) : 0); }

  size_t poll_armed() {
    const size_t n = transport->poll(batch_, true);
    absorb(n);
    return n;
  }

  bool wait(double seconds, const std::function<bool()>& ready) {
    return wait_exactly(seconds * ranks::kSlowness, ready);
  }
  bool wait_exactly(double seconds, const std::function<bool()>& ready) {
    const auto start = ranks::Clock::now();
    while (!ready()) {
      if (seconds_since(start) > seconds) return false;
      const size_t n = transport->poll(batch_, false);
      absorb(n);
      if (n == 0) sched_yield();
    }
    return true;
  }
  void spin(double seconds) {
    wait_exactly(seconds, [] { return false; });
  }

  std::vector<Bytes> all_gather(const Bytes& mine = {std::byte{1}}) {
    return hub_.all_gather(mine, [this] {
      progress();
      sched_yield();
    });
  }
  void barrier() { all_gather(); }

  PeerId connect(const Address& address) {
    auto peer = transport->connect(address);
    CHECK(peer.ok(), peer.status().text());
    return peer.value();
  }
  void expect_ready(PeerId peer, double seconds = kShort) {
    CHECK(wait(seconds, [&] { return ready.contains(peer) || refused.contains(peer); }),
          "neither ready nor refused");
    CHECK(ready.contains(peer), refused.contains(peer) ? refused.at(peer).text() : "");
  }
  // One peer for each rank (oneself too), all ready.
  void connect_all() {
    addresses = all_gather(transport->info().address);
    for (int i = 0; i < num_ranks; ++i) peers.push_back(connect(addresses[i]));
    for (PeerId peer : peers) expect_ready(peer);
    barrier();
  }
  std::vector<RemoteRegion> swap_regions(const Buffer& buffer) {
    std::vector<RemoteRegion> all;
    for (const Bytes& bytes : all_gather(pack(describe(buffer.region()))))
      all.push_back(unpack(bytes));
    return all;
  }

  struct Part {
    const Buffer* from = nullptr;
    uint64_t from_offset = 0, num_bytes = 0;
    const RemoteRegion* to = nullptr;
    uint64_t to_offset = 0;
  };
  Status try_write(PeerId peer, const Part& part, int64_t immediate) {
    WriteRequest request;
    request.peer = peer;
    request.local = part.from ? &part.from->region() : nullptr;
    request.local_offset = part.from_offset;
    request.num_bytes = part.num_bytes;
    request.remote = part.to;
    request.remote_offset = part.to_offset;
    request.has_immediate = immediate >= 0;
    request.immediate = Immediate{static_cast<uint32_t>(immediate)};
    request.id = WorkId{next_id};
    request.following = following;
    Status status = transport->post_write(request);
    if (status.ok()) ++next_id;
    return status;
  }
  // Posts, waiting while the queue is full. Returns the id.
  uint64_t write(PeerId peer, const Part& part, int64_t immediate = -1) {
    const auto start = ranks::Clock::now();
    for (;;) {
      Status status = try_write(peer, part, immediate);
      if (status.ok()) return next_id - 1;
      CHECK(status.code() == Code::kAgain, status.text());
      CHECK(seconds_since(start) < 30 * ranks::kSlowness, "the queue stayed full");
      progress();
    }
  }
  bool all_done() const { return done.size() == next_id; }
  void expect_all_ok(double seconds = 30) {
    CHECK(wait(seconds, [&] { return all_done(); }),
          std::to_string(next_id - done.size()) + " writes never ended");
    for (const auto& [id, status] : done) CHECK(status.ok(), status.text());
  }

  std::unique_ptr<Transport> transport;
  std::vector<Address> addresses;
  std::vector<PeerId> peers;
  std::map<uint64_t, Status> done;   // by write
  std::vector<uint32_t> immediates;  // in order of arrival
  std::set<PeerId> ready;
  std::map<PeerId, Status> refused, lost;
  std::function<void(uint32_t)> on_immediate;
  uint64_t next_id = 0;
  uint32_t following = 0;  // what the next writes say of those after them

 private:
  void absorb(size_t n) {
    for (size_t i = 0; i < n; ++i) {
      Completion& c = batch_[i];
      switch (c.kind) {
        case Completion::Kind::kWriteDone:
          CHECK(c.id.value < next_id && !done.contains(c.id.value), "a write ended twice");
          done.emplace(c.id.value, c.status);
          break;
        case Completion::Kind::kImmediate:
          immediates.push_back(c.immediate.bits);
          if (on_immediate) on_immediate(c.immediate.bits);
          break;
        case Completion::Kind::kPeerReady:
          CHECK(ready.insert(c.peer).second, "ready twice");
          break;
        case Completion::Kind::kPeerRefused:
          CHECK(!c.status.ok() && refused.emplace(c.peer, c.status).second, "refused twice");
          break;
        case Completion::Kind::kPeerLost:
          CHECK(!c.status.ok() && lost.emplace(c.peer, c.status).second, "lost twice");
          break;
      }
    }
  }

  Hub& hub_;
  std::vector<Completion> batch_ = std::vector<Completion>(64);

 public:
  const int rank, num_ranks;
};

inline double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

inline double now_s() {  // the same clock in all processes
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

struct Case {
  const char* name;
  int num_ranks;
  void (*body)(Hub&);
  unsigned may_die = 0;  // bit: rank
};
std::span<const Case> fault_cases();  // transport_faults.cpp

}  // namespace suite
