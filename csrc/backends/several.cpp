// Several NICs as one transport: "verbs:mlx5_0+mlx5_1". Each write goes to one of them, in turn;
// large messages are cut by the proxy (shard_bytes), so that each NIC carries a part.
//
// NIC i talks to NIC i of the peer, so both sides name their NICs in the same order. A peer is
// ready when it is on all of them, and lost with the first. A region is registered with each: its
// descriptor carries the others' base and key in `extra`.
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>

#include "../transport.hpp"

namespace moe_comm {
namespace {

struct Registered {  // what a region's local_key points to
  std::vector<MemoryRegion> of_nic;
};

class SeveralNics final : public Transport {
 public:
  explicit SeveralNics(std::vector<std::unique_ptr<Transport>> nics) : nics_(std::move(nics)) {}

  Status start() {
    wake_.reset(epoll_create1(EPOLL_CLOEXEC));
    if (wake_.get() < 0) return Status::from_errno("epoll_create1");
    info_.wait_fd = wake_.get();
    info_.capabilities = nics_[0]->info().capabilities;
    info_.capabilities.queue_depth = info_.capabilities.num_nics = 0;
    for (const auto& nic : nics_) {
      const Info& one = nic->info();
      info_.name += (info_.name.empty() ? "" : "+") + one.name;
      const auto length = static_cast<uint32_t>(one.address.size());
      const auto* bytes = reinterpret_cast<const std::byte*>(&length);
      info_.address.insert(info_.address.end(), bytes, bytes + sizeof length);
      info_.address.insert(info_.address.end(), one.address.begin(), one.address.end());
      Capabilities& all = info_.capabilities;
      all.max_message_bytes = std::min(all.max_message_bytes, one.capabilities.max_message_bytes);
      all.queue_depth += one.capabilities.queue_depth;
      all.num_nics += one.capabilities.num_nics;
      all.writes_local_memory_unregistered &= one.capabilities.writes_local_memory_unregistered;
      epoll_event event{};
      event.events = EPOLLIN;
      const bool added =
          one.wait_fd >= 0 && epoll_ctl(wake_.get(), EPOLL_CTL_ADD, one.wait_fd, &event) == 0;
      if (!added) info_.wait_fd = -1;
    }
    return {};
  }

  const Info& info() const override { return info_; }

  Result<MemoryRegion> register_memory(std::span<std::byte> bytes, DmaBuf dmabuf) override {
    auto all = std::make_shared<Registered>();
    for (const auto& nic : nics_) {
      auto region = nic->register_memory(bytes, dmabuf);
      if (!region.ok()) return region.status();
      all->of_nic.push_back(std::move(region.value()));
    }
    MemoryRegion region = all->of_nic[0];
    for (size_t i = 1; i < nics_.size(); ++i) {
      region.extra.push_back(all->of_nic[i].remote_base);
      region.extra.push_back(all->of_nic[i].remote_key.value);
    }
    region.local_key = all.get();
    region.registration = std::move(all);
    return region;
  }

  Result<PeerId> connect(const Address& address) override {
    std::vector<Address> parts;
    for (size_t at = 0; at < address.size();) {
      uint32_t length = 0;
      if (address.size() - at < sizeof length) break;
      std::memcpy(&length, address.data() + at, sizeof length);
      at += sizeof length;
      if (address.size() - at < length) break;
      parts.emplace_back(address.begin() + static_cast<ptrdiff_t>(at),
                         address.begin() + static_cast<ptrdiff_t>(at + length));
      at += length;
    }
    if (parts.size() != nics_.size()) {
      return Status(Code::kInvalid, info_.name + ": address: expected one of " +
                                        std::to_string(nics_.size()) + " NICs, got " +
                                        std::to_string(parts.size()));
    }
    const auto index = static_cast<uint32_t>(peers_.size());
    Peer peer;
    for (size_t i = 0; i < nics_.size(); ++i) {
      auto id = nics_[i]->connect(parts[i]);
      if (!id.ok()) {
        for (size_t j = 0; j < i; ++j) nics_[j]->disconnect(peer.ids[j]);
        return id.status();
      }
      peer.ids.push_back(id.value());
      peers_of_[i].resize(static_cast<size_t>(id.value()) + 1, kNoPeer);
      peers_of_[i].back() = index;
    }
    peers_.push_back(std::move(peer));
    return PeerId{index};
  }

  void disconnect(PeerId id) noexcept override {
    const auto index = static_cast<uint32_t>(id);
    if (index >= peers_.size()) return;
    peers_[index].settled = true;
    for (size_t i = 0; i < nics_.size(); ++i) nics_[i]->disconnect(peers_[index].ids[i]);
  }

  Status post_write(const WriteRequest& request) override {
    const auto index = static_cast<uint32_t>(request.peer);
    if (index >= peers_.size())
      return {Code::kInvalid, info_.name + ": no peer " + std::to_string(index)};
    if (peers_[index].settled) return {Code::kPeerLost, info_.name + ": the peer is gone"};
    if (peers_[index].num_ready < nics_.size())
      return {Code::kInvalid, info_.name + ": the peer is not ready yet"};
    if (request.remote == nullptr || request.remote->extra.size() != 2 * (nics_.size() - 1))
      return {Code::kInvalid, info_.name + ": a write needs a remote region of as many NICs"};
    for (size_t attempt = 0; attempt < nics_.size(); ++attempt) {
      const size_t i = next_++ % nics_.size();
      WriteRequest one = request;
      one.peer = peers_[index].ids[i];
      one.following = request.following / static_cast<uint32_t>(nics_.size());
      RemoteRegion remote{request.remote->base, request.remote->num_bytes, request.remote->key, {}};
      if (i > 0) {
        remote.base = request.remote->extra[2 * i - 2];
        remote.key.value = request.remote->extra[2 * i - 1];
      }
      one.remote = &remote;
      if (request.local != nullptr)
        one.local = &static_cast<const Registered*>(request.local->local_key)->of_nic[i];
      Status status = nics_[i]->post_write(one);
      if (status.code() != Code::kAgain) return status;
    }
    return Status::again();
  }

  size_t poll(std::span<Completion> out, bool arm) override {
    size_t n = 0;
    for (size_t step = 0; step < nics_.size(); ++step) {
      const size_t i = (first_ + step) % nics_.size();
      const size_t count = nics_[i]->poll(out.subspan(n), arm);
      size_t kept = n;  // of those, the ones that are news above
      for (size_t j = n; j < n + count; ++j) {
        if (is_news(i, out[j])) std::swap(out[kept++], out[j]);
      }
      n = kept;
    }
    ++first_;  // a full `out` must not starve the others
    if (n == 0 && !losses_.empty() && !out.empty()) {
      out[n++] = std::move(losses_.back());
      losses_.pop_back();
    }
    return n;
  }

 private:
  static constexpr uint32_t kNoPeer = ~0u;
  struct Peer {
    std::vector<PeerId> ids;  // on each NIC
    size_t num_ready = 0;
    bool settled = false;  // refused, lost, or given up
  };

  // Translates a NIC's completion into ours.
  bool is_news(size_t nic, Completion& event) {
    if (event.kind == Completion::Kind::kImmediate) return true;
    const uint32_t index = peers_of_[nic][static_cast<size_t>(event.peer)];
    event.peer = PeerId{index};
    if (event.kind == Completion::Kind::kWriteDone) return true;
    Peer& peer = peers_[index];
    if (event.kind == Completion::Kind::kPeerReady)
      return ++peer.num_ready == nics_.size() && !peer.settled;
    if (peer.settled) return false;
    peer.settled = true;
    if (peer.num_ready < nics_.size()) {
      event.kind = Completion::Kind::kPeerRefused;  // it never was ready
      return true;
    }
    losses_.push_back(std::move(event));
    return false;
  }

  Info info_;
  std::vector<std::unique_ptr<Transport>> nics_;
  FileDescriptor wake_;
  std::deque<Peer> peers_;
  std::vector<std::vector<uint32_t>> peers_of_ =
      std::vector<std::vector<uint32_t>>(nics_.size());  // by NIC and its PeerId
  std::vector<Completion> losses_;  // told when no NIC has anything: last words come first
  size_t next_ = 0, first_ = 0;
};

}  // namespace

Result<std::unique_ptr<Transport>> join_nics(std::vector<std::unique_ptr<Transport>> nics) {
  auto joined = std::make_unique<SeveralNics>(std::move(nics));
  if (Status status = joined->start(); !status.ok()) return status;
  return std::unique_ptr<Transport>(std::move(joined));
}

}  // namespace moe_comm
