// Who may be written to by a fabric endpoint: the address vector, the admission of peers by the
// job's secret, and the watch over those that were admitted.
//
// connect() sends a hello with the secret until an answer comes or kConnectTimeout ends; who
// receives it checks the secret before it says anything, and answers accept or refuse. A connection
// is one direction: each side connects to those it writes to. No provider here reports the source
// of an immediate, so what keeps strangers out is that remote keys are random and told to members
// only (NOTE [remote keys]), and that every write with an immediate needs a key.
#pragma once

#include "../transport.hpp"

#if MOE_COMM_HAVE_FABRIC

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../wait.hpp"
#include "fabric_handles.hpp"
#include "peers.hpp"

namespace moe_comm {

// What libfabric holds until it completes: its address is the context of the request, so it never
// moves.
struct FabricOperation {
  fi_context2 context;
  enum Kind { kWrite, kReceive, kSend } kind;
};

// A peer's or our own endpoint; the bytes of an Address.
struct FabricName {
  static constexpr uint64_t kMagic = 0x6d6f6566'61000001;  // "moefa" 1
  uint64_t magic = kMagic;
  uint64_t host = 0;  // boot and PID namespace: where `pid` means something
  int64_t pid = 0;
  uint32_t num_bytes = 0;
  char provider[36] = {};
  char bytes[192] = {};  // as fi_getname gives it
};
static_assert(sizeof(FabricName) == 256);

struct FabricRemote {  // an address in the address vector
  fi_addr_t address = FI_ADDR_NOTAVAIL;
  uint32_t uses = 0;      // by peers, writes and messages
  bool accepted = false;  // writes to us: stays, removing it could close its connection
  std::string text;
};
using FabricRemotes = std::map<std::string, FabricRemote>;

struct FabricPeer : NetworkPeer {
  FabricRemotes::iterator remote;
  uint32_t in_flight = 0;   // writes
  bool hello_sent = false;  // libfabric has it, or tend() will try again
  bool stuck = false;       // nothing in flight and nothing can be posted
  Clock::time_point stuck_since;
};

struct FabricHello;

class FabricPeers : public PeerTable<FabricPeer> {
 public:
  static constexpr size_t kNumSends = 64;  // hellos and answers under way, at most

  using Remote = FabricRemote;
  using RemoteRef = FabricRemotes::iterator;
  using Peer = FabricPeer;

  struct Message : FabricOperation {
    FabricHello* body = nullptr;
    uint32_t peer = ~0u;  // whose hello this is; ~0: an answer, or a receive
    RemoteRef remote;
    Clock::time_point retry, deadline;
    Clock::duration pause{};
  };

  FabricPeers(Secret secret, std::shared_ptr<FabricDevice> device, std::string transport_name);
  ~FabricPeers();
  Status open();                   // the address vector, for the endpoint to be bound to
  Status start(fid_ep* endpoint);  // admits from here on
  fid_av* addresses() const { return av_.get(); }
  Address own_address() const;
  // Registered bytes that nothing is ever written to: where a write of nothing comes from.
  iovec empty_bytes() const;
  void* descriptor() const { return region_ ? fi_mr_desc(region_.get()) : nullptr; }

  Result<PeerId> connect(const Address& address);
  void close(Peer& peer);  // its writes are the caller's to end
  void release(RemoteRef remote);
  void tend(Clock::time_point now);  // what happens by time and not by completion

  void on_sent(Message& message);  // well or not
  void on_received(Message& message, size_t num_bytes);
  void on_receive_failed(Message& message) { unposted_.push_back(&message); }
  bool owns(const void* context) const;
  // The completion queue was seen empty: what lost peers wrote has been told, their loss may be.
  void on_queue_empty() { tell_losses(); }

 private:
  Result<RemoteRef> use_address(const FabricName& name);
  void send_hello(const FabricHello& hello, RemoteRef remote, uint32_t peer);
  void send(Message& message);
  void receive(Message& message);
  void on_hello(const FabricHello& hello);
  void on_answer(const FabricHello& hello);
  void retry_messages(Clock::time_point now);
  Status error(const std::string& call, ssize_t rc) const {
    return device_->library.error(call, rc);
  }

  const Secret secret_;
  std::shared_ptr<FabricDevice> device_;
  AvHandle av_;
  fid_ep* endpoint_ = nullptr;
  FabricName own_;
  std::vector<FabricHello> memory_;  // bodies of messages_, in the same order
  MrHandle region_;                  // null where the provider needs no local registration
  std::deque<Message> messages_;
  std::vector<Message*> free_;      // to send with
  std::vector<Message*> unsent_;    // tried again by tend()
  std::vector<Message*> unposted_;  // receives, likewise
  FabricRemotes remotes_;
  Clock::time_point next_tend_{};
};

}  // namespace moe_comm

#endif
