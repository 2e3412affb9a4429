// What Python holds: one engine for each rank, with its proxy, its registered regions and its
// connected peers.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "proxy.hpp"
#include "transport.hpp"

namespace moe_comm {

struct EngineOptions {
  // "shm", "fabric:<provider>", "verbs"; with devices "fabric:efa:rdmap0s6+rdmap1s6",
  // "verbs:mlx5_0"
  std::string transport = "shm";
  std::string interface;  // device, interface or source address (verbs: and settings); empty: for
                          // fabric:efa and verbs the nearest NICs, else the backend's choice
  Secret secret = 0;
  uint64_t shard_bytes = 0;
  uint64_t chaos_seed = 0;  // 0: off; else the transport delays and reorders (tests)
  std::string gpu;          // for the nearest NICs: as in NicRequest (topology.hpp)
};

// A region's descriptor: what a peer must know to write there. Bytes, so that it can travel by any
// means.
std::vector<std::byte> serialise(const RemoteRegion& region);
Result<RemoteRegion> parse_region(std::span<const std::byte> bytes);

class Engine {
 public:
  static Result<std::unique_ptr<Engine>> open(const EngineOptions& options);
  Proxy& proxy() { return *proxy_; }
  const std::string& transport_name() const { return proxy_->info().name; }

  // Regions by number, for Python. They stay registered until forgotten or until the engine is
  // gone.
  Result<uint64_t> register_memory(std::span<std::byte> bytes, DmaBuf dmabuf = {});
  Status forget(uint64_t region);
  Result<std::shared_ptr<const MemoryRegion>> region(uint64_t number) const;

  // Waits until the peer is ready or refused.
  Status wait_ready(uint32_t peer, double seconds);

 private:
  std::unique_ptr<Proxy> proxy_;
  mutable std::mutex mutex_;
  std::map<uint64_t, std::shared_ptr<const MemoryRegion>> regions_;
  uint64_t next_region_ = 1;
};

std::unique_ptr<Transport> make_chaos(std::unique_ptr<Transport> inner, uint64_t seed);

}  // namespace moe_comm
