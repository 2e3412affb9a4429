// Ranks as proxies of one process over the shm backend, plain or with its order shaken (chaos).
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "cases.hpp"
#include "engine.hpp"
#include "proxy.hpp"

namespace proxy_ranks {

using namespace moe_comm;

constexpr Secret kSecret = 0x5ec7e7;
constexpr double kSoon = 20.0;  // seconds: for what should happen; only a failure waits that long

inline void nap(double seconds) {
  const timespec pause{0, static_cast<long>(seconds * 1e9)};
  nanosleep(&pause, nullptr);
}

inline void wait_until(const std::string& what, const std::function<bool()>& there) {
  for (const auto start = Clock::now(); !there(); nap(0.0005))
    CHECK(seconds_since(start) < kSoon, what);
}

template <typename T>
T value_of(Result<T> result) {
  CHECK(result.ok(), result.status().text());
  return std::move(result.value());
}

inline std::unique_ptr<Transport> open_transport(uint64_t seed) {
  auto transport = value_of(open_shm(kSecret));
  return seed ? make_chaos(std::move(transport), seed) : std::move(transport);
}

struct Rank {
  explicit Rank(uint64_t seed, ProxyOptions options = {}, size_t num_bytes = 1 << 20)
      : memory(value_of(SharedSegment::create("test", num_bytes))),
        proxy(open_transport(seed), options) {
    region = value_of(proxy.register_memory(memory.bytes()));
    remote = describe(region);
  }
  uint32_t connect(const Address& address) {
    const uint32_t peer = value_of(proxy.connect(address));
    wait_until("a peer is not ready", [&] { return proxy.peer_state(peer) == PeerState::kReady; });
    return peer;
  }
  uint32_t connect(Rank& other) { return connect(other.proxy.info().address); }
  std::byte* at(uint64_t offset) { return memory.data() + offset; }

  SharedSegment memory;
  MemoryRegion region;  // outlives the proxy, whose channels point to it
  RemoteRegion remote;
  Proxy proxy;
};

inline std::shared_ptr<Operation> write(Rank& from, uint32_t peer, Rank& to, uint64_t from_at,
                                        uint64_t to_at, uint64_t num_bytes,
                                        int64_t immediate = -1) {
  auto remote = std::make_shared<RemoteRegion>(to.remote);  // `to` may go first
  return from.proxy.submit({{peer, &from.region, from_at, num_bytes, remote.get(), to_at,
                             immediate >= 0, static_cast<uint32_t>(immediate)}},
                           remote);
}

inline void expect_end(Operation& operation, Code code) {
  CHECK(operation.wait(kSoon), "a write never ends");
  const Status status = operation.status();
  CHECK(operation.done() && status.code() == code,
        "it ended with: " + (status.ok() ? "ok" : status.text()));
}

}  // namespace proxy_ranks
