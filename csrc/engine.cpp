#include "engine.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "topology.hpp"

namespace moe_comm {
namespace {
constexpr uint64_t kShardBytes = 128 << 10;  // where several NICs share the writes

// The devices that this rank takes if it names none, "a+b"; or why none.
Result<std::string> nearest_nics(const EngineOptions& options, bool efa) {
  const NicRequest request{efa, options.gpu, usable_cpus()};
  auto choice = choose_nics(HostTopology::read(), request);
  if (!choice.ok()) return choice.status();
  std::string names;
  for (const std::string& nic : choice.value().nics) names += (names.empty() ? "" : "+") + nic;
  return names;
}

// Where sysfs shows no NIC the library may still have one: it is asked, and if it has none, both
// reasons are told. `settings`: begins with a comma, or is empty.
template <typename Open>
Result<std::unique_ptr<Transport>> open_nearest(const EngineOptions& options, bool efa,
                                                const std::string& settings, const Open& open) {
  const auto nics = nearest_nics(options, efa);
  if (nics.ok()) return open(nics.value() + settings);
  if (nics.status().code() == Code::kInvalid) return nics.status();
  auto transport = open(settings.empty() ? settings : settings.substr(1));
  if (transport.ok()) return transport;
  return Status(transport.status().code(), transport.status().text() + "; " + nics.status().text());
}
}  // namespace

std::vector<std::byte> serialise(const RemoteRegion& region) {
  std::vector<uint64_t> words{region.base, region.num_bytes, region.key.value};
  words.insert(words.end(), region.extra.begin(), region.extra.end());
  std::vector<std::byte> bytes(words.size() * sizeof(uint64_t));
  std::memcpy(bytes.data(), words.data(), bytes.size());
  return bytes;
}

Result<RemoteRegion> parse_region(std::span<const std::byte> bytes) {
  if (bytes.size() < 24 || bytes.size() % 8 != 0) {
    return Status(Code::kInvalid,
                  "region descriptor: expected 24 bytes or more, a multiple of 8, got " +
                      std::to_string(bytes.size()));
  }
  std::vector<uint64_t> words(bytes.size() / 8);
  std::memcpy(words.data(), bytes.data(), bytes.size());
  RemoteRegion region{words[0], words[1], {words[2]}, {}};
  region.extra.assign(words.begin() + 3, words.end());
  return region;
}

Result<std::unique_ptr<Engine>> Engine::open(const EngineOptions& options) {
  Result<std::unique_ptr<Transport>> transport = Status(
      Code::kInvalid, "transport: expected \"shm\", \"fabric:<provider>\" or \"verbs\", got \"" +
                          options.transport + '"');
  if (options.transport == "shm") {
    transport = open_shm(options.secret);
  } else if (options.transport.starts_with("fabric:")) {
    std::string provider = options.transport.substr(7), interface = options.interface;
    if (const size_t at = provider.find(':'); at != std::string::npos) {
      if (interface.empty()) interface = provider.substr(at + 1);
      provider.resize(at);
    }
    const auto open = [&](const std::string& devices) {
      return open_fabric(options.secret, provider, devices);
    };
    transport = provider == "efa" && interface.empty() ? open_nearest(options, true, "", open)
                                                       : open(interface);
  } else if (options.transport == "verbs") {
    const auto open = [&](const std::string& text) { return open_verbs(options.secret, text); };
    const std::string& text = options.interface;
    bool has_device = false;  // or settings only: "gid=3,sl=1"
    for (size_t at = 0; at < text.size();) {
      const size_t end = std::min(text.find(',', at), text.size());
      has_device |= text.substr(at, end - at).find('=') == std::string::npos;
      at = end + 1;
    }
    transport = has_device ? open(text)
                           : open_nearest(options, false, text.empty() ? "" : "," + text, open);
  } else if (options.transport.starts_with("verbs:")) {  // the device, and then more settings
    const std::string device = options.transport.substr(6);
    transport = open_verbs(options.secret,
                           options.interface.empty() ? device : device + "," + options.interface);
  }
  if (!transport.ok()) return transport.status();
  auto engine = std::make_unique<Engine>();
  ProxyOptions proxy_options;
  proxy_options.shard_bytes = options.shard_bytes;
  if (options.shard_bytes == 0 && transport.value()->info().capabilities.num_nics > 1)
    proxy_options.shard_bytes = kShardBytes;
  if (options.chaos_seed) transport = make_chaos(std::move(transport.value()), options.chaos_seed);
  engine->proxy_ = std::make_unique<Proxy>(std::move(transport.value()), proxy_options);
  return engine;
}

Result<uint64_t> Engine::register_memory(std::span<std::byte> bytes, DmaBuf dmabuf) {
  auto region = proxy_->register_memory(bytes, dmabuf);
  if (!region.ok()) return region.status();
  std::lock_guard lock(mutex_);
  regions_[next_region_] = std::make_shared<const MemoryRegion>(std::move(region.value()));
  return next_region_++;
}

Status Engine::forget(uint64_t number) {
  std::shared_ptr<const MemoryRegion> region;
  {
    std::lock_guard lock(mutex_);
    auto found = regions_.find(number);
    if (found == regions_.end())
      return {Code::kInvalid, "region " + std::to_string(number) + " is not registered"};
    region = std::move(found->second);
    regions_.erase(found);
  }
  proxy_->run([&] { region.reset(); });  // transports are used by one thread
  return {};
}

Result<std::shared_ptr<const MemoryRegion>> Engine::region(uint64_t number) const {
  std::lock_guard lock(mutex_);
  auto found = regions_.find(number);
  if (found == regions_.end()) {
    return Status(Code::kInvalid, "region " + std::to_string(number) + " is not registered");
  }
  return found->second;
}

Status Engine::wait_ready(uint32_t peer, double seconds) {
  const auto start = Clock::now();
  while (true) {
    switch (proxy_->peer_state(peer)) {
      case PeerState::kReady:
        return {};
      case PeerState::kLost:
        return proxy_->peer_status(peer);
      case PeerState::kConnecting:
        break;
    }
    if (seconds_since(start) > seconds) {
      return {Code::kPeerTimeout, "connect: no answer after " + std::to_string(seconds) + " s"};
    }
    usleep(500);
  }
}

}  // namespace moe_comm
