// An adversarial transport for tests: what a network that promises no order may do, it does, from a
// seed.
//
// Wraps another transport. Every write is held back for a random number of polls and the held ones
// are posted in random order; now and then the queue claims to be full; completions and immediates
// are handed out in random order.
#include <algorithm>
#include <deque>
#include <random>

#include "../engine.hpp"

namespace moe_comm {
namespace {

class ChaosTransport final : public Transport {
 public:
  ChaosTransport(std::unique_ptr<Transport> inner, uint64_t seed)
      : inner_(std::move(inner)), random_(seed) {
    info_ = inner_->info();
    info_.name += "+chaos";
    info_.wait_fd = -1;  // held writes need our poll
  }
  const Info& info() const override { return info_; }
  Result<MemoryRegion> register_memory(std::span<std::byte> bytes, DmaBuf dmabuf) override {
    return inner_->register_memory(bytes, dmabuf);
  }
  Result<PeerId> connect(const Address& address) override { return inner_->connect(address); }
  void disconnect(PeerId peer) noexcept override {
    for (auto& request : held_) {
      if (request.peer == peer) fail(request, {Code::kPeerLost, "disconnected"});
    }
    std::erase_if(held_, [&](const WriteRequest& r) { return r.peer == peer; });
    inner_->disconnect(peer);
  }
  Status post_write(const WriteRequest& request) override {
    if (chance(8) || held_.size() >= 256) return Status::again();
    held_.push_back(request);
    held_.back().following = 0;  // in another order
    return {};
  }
  size_t poll(std::span<Completion> out, bool arm) override {
    if (!chance(3)) release_some();
    Completion fresh[32];
    const size_t n = inner_->poll(fresh, arm && held_.empty());
    for (size_t i = 0; i < n; ++i) {
      auto& to = fresh[i].kind == Completion::Kind::kPeerLost ? lost_ : ready_;
      to.push_back(std::move(fresh[i]));
    }
    size_t given = 0;
    while (given < out.size() && !ready_.empty() && !chance(4)) {
      const size_t pick = random_() % ready_.size();
      out[given++] = std::move(ready_[pick]);
      ready_[pick] = std::move(ready_.back());
      ready_.pop_back();
    }
    while (given < out.size() && ready_.empty() && !lost_.empty()) {  // after what it wrote
      out[given++] = std::move(lost_.back());
      lost_.pop_back();
    }
    if (given == 0 && arm &&
        (!held_.empty() || !ready_.empty())) {  // nothing may be left waiting while asleep
      release_some();
    }
    return given;
  }

 private:
  bool chance(uint32_t one_in) { return random_() % one_in == 0; }
  void fail(const WriteRequest& request, Status status) {
    Completion c;
    c.kind = Completion::Kind::kWriteDone;
    c.peer = request.peer;
    c.id = request.id;
    c.status = std::move(status);
    ready_.push_back(std::move(c));
  }
  void release_some() {
    size_t number = held_.empty() ? 0 : 1 + random_() % held_.size();
    while (number-- > 0 && !held_.empty()) {
      const size_t pick = random_() % held_.size();
      const WriteRequest request = held_[pick];
      Status status = inner_->post_write(request);
      if (status.code() == Code::kAgain) return;
      held_[pick] = held_.back();
      held_.pop_back();
      if (!status.ok()) fail(request, status);
    }
  }

  std::unique_ptr<Transport> inner_;
  Info info_;
  std::mt19937_64 random_;
  std::vector<WriteRequest> held_;
  std::vector<Completion> ready_, lost_;
};

}  // namespace

std::unique_ptr<Transport> make_chaos(std::unique_ptr<Transport> inner, uint64_t seed) {
  return std::make_unique<ChaosTransport>(std::move(inner), seed);
}

}  // namespace moe_comm
