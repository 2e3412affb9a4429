// What the backends over a network have alike: peers that answer or do not, writes that fit or do
// not, and processes of this host that end.
#pragma once

#include <deque>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../transport.hpp"
#include "../wait.hpp"

namespace moe_comm {

uint64_t random_word();
uint64_t host_id();  // boot and PID namespace: where a pid means something

// Watches a process; null for those of other hosts, for this one, and for one that has ended.
struct Watched {
  std::unique_ptr<ProcessWatch> watch;
  bool has_ended = false;
};
Watched watch_process(uint64_t host, int64_t pid);

struct NetworkPeer {  // one that we write to
  enum State { kConnecting, kReady, kLost, kClosed } state = kConnecting;
  uint64_t nonce = 0;  // of the connection, chosen by us
  Clock::time_point started, next_hello;
  std::unique_ptr<ProcessWatch> watch;  // of peers on this host
  std::string text;                     // "peer 3 (10.0.0.7, queue pair 17, process 99)"
};

Status check_write(const Info& info, const NetworkPeer& peer, const WriteRequest& request);

// Peers by PeerId, and what became of them. `Peer` is a NetworkPeer.
template <class Peer>
class PeerTable {
 public:
  explicit PeerTable(std::string transport_name) : name_(std::move(transport_name)) {}
  virtual ~PeerTable() = default;
  size_t size() const { return peers_.size(); }
  Peer& operator[](uint32_t index) { return peers_[index]; }

  // Says so by an event, unless the peer was settled so before. `status`: without the peer's name.
  void settle(uint32_t index, Completion::Kind kind, const Status& status) {
    Peer& peer = peers_[index];
    if (peer.state == Peer::kLost || peer.state == Peer::kClosed) return;
    std::erase(connecting_, index);
    peer.state = kind == Completion::Kind::kPeerReady ? Peer::kReady : Peer::kLost;
    if (peer.state == Peer::kLost) {
      peer.watch.reset();
      on_lost(index);
    }
    auto& list = kind == Completion::Kind::kPeerLost ? losses_ : events;
    Completion& event = list.emplace_back();
    event.kind = kind;
    event.peer = PeerId{index};
    if (!status.ok()) event.status = status.with_prefix(name_ + ": " + peer.text + ": ");
  }

  void lose(uint32_t index, const Status& status) {
    const bool was_ready = peers_[index].state == Peer::kReady;
    settle(index, was_ready ? Completion::Kind::kPeerLost : Completion::Kind::kPeerRefused, status);
  }

  void lose_all(const Status& status) {
    for (uint32_t i = 0; i < peers_.size(); ++i) lose(i, status);
  }

  std::vector<Completion> events;  // for the next poll

 protected:
  // Begins with a hello; `name`: who it is besides its number.
  Peer& add(const std::string& name) {
    const auto index = static_cast<uint32_t>(peers_.size());
    Peer& peer = peers_.emplace_back();
    peer.nonce = random_word();
    peer.started = peer.next_hello = Clock::now();
    peer.text = "peer " + std::to_string(index) + " (" + name + ")";
    connecting_.push_back(index);
    return peer;
  }

  void watch(uint32_t index, uint64_t host, int64_t pid) {
    auto [process, has_ended] = watch_process(host, pid);
    peers_[index].watch = std::move(process);
    if (has_ended) lose(index, {Code::kPeerLost, "its process has ended"});
  }

  void look_at_processes() {
    for (uint32_t i = 0; i < peers_.size(); ++i) {
      if (peers_[i].watch && peers_[i].watch->ended())
        lose(i, {Code::kPeerLost, "its process has ended"});
    }
  }

  // The completion queue was seen empty: what lost peers wrote has been told, their loss may be.
  void tell_losses() {
    if (losses_.empty()) return;
    std::move(losses_.begin(), losses_.end(), std::back_inserter(events));
    losses_.clear();
  }

  void refuse(uint32_t index) {
    settle(index, Completion::Kind::kPeerRefused,
           {Code::kMismatch, "refused: it belongs to another job (its secret is another)"});
  }

  virtual void on_lost(uint32_t) {}

  const std::string name_;  // of the transport, for texts
  std::deque<Peer> peers_;  // by PeerId
  std::vector<uint32_t> connecting_;
  std::vector<Completion> losses_;  // last words may still be in the queue: for tell_losses()
};

}  // namespace moe_comm
