// Who may write to whom over RC queue pairs: the handshake that admits peers by the job's secret,
// and the watch over those that were admitted.
//
// A connection is one direction: who connects makes two queue pairs (one for protocol immediates,
// one for the user's), who is connected to makes the two they end in. Datagrams of an unreliable
// queue pair on the same NIC carry the handshake, so no IP address and no open port is needed:
//   hello (secret, queue pairs)  ->     repeated until answered or kConnectTimeout ends
//                                <-  accept (queue pairs), or refuse; again for each repeated hello
//   bye                          <->    by who disconnects or closes; if lost, writes find out
#pragma once

#include "../transport.hpp"

#ifndef MOE_COMM_HAVE_VERBS
#define MOE_COMM_HAVE_VERBS __has_include(<infiniband/verbs.h>)
#endif

#if MOE_COMM_HAVE_VERBS

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../wait.hpp"
#include "peers.hpp"
#include "verbs_handles.hpp"

namespace moe_comm {

// The two queue pairs of a connection; each has its own receives, so that neither kind of immediate
// can use up those of the other.
enum VerbsLane : uint32_t { kProtocolLane = 0, kUserLane = 1 };
constexpr uint32_t kNumLanes = 2;
constexpr uint32_t kLaneDepth = 256;  // writes under way on one

// What the queues of one transport are made of.
struct VerbsQueues {
  ChannelHandle channel;
  VerbsCqHandle completions;                  // of everything
  std::array<SrqHandle, kNumLanes> receives;  // of immediates
};

// NOTE [wr_id] kind 2 bits | whose 30 bits | sequence 32 bits
enum class VerbsWork : uint64_t { kWrite = 0, kImmediate = 1, kDatagramIn = 2, kDatagramOut = 3 };
inline uint64_t pack_wr_id(VerbsWork kind, uint32_t whose, uint32_t sequence) {
  return static_cast<uint64_t>(kind) << 62 | static_cast<uint64_t>(whose) << 32 | sequence;
}

// A transport; the bytes of an Address.
struct VerbsName {
  static constexpr uint64_t kMagic = 0x6d6f6576'62000001;  // "moevb" 1
  uint64_t magic = kMagic;
  uint64_t host = 0;  // boot and PID namespace: where `pid` means something
  int64_t pid = 0;
  uint32_t qp = 0;    // of datagrams
  uint32_t qkey = 0;  // random: who was not told it cannot even send a hello
  VerbsPlace place;
};
static_assert(sizeof(VerbsName) == 56);

struct VerbsQueuePair {
  QpHandle qp;
  uint32_t psn = 0;
  uint32_t max_inline = 0;  // bytes
};
using VerbsLanes = std::array<VerbsQueuePair, kNumLanes>;

struct VerbsPeer : NetworkPeer {
  VerbsName name;
  VerbsLanes lanes;
};

struct VerbsHello;

class VerbsPeers : public PeerTable<VerbsPeer> {
 public:
  using QueuePair = VerbsQueuePair;
  using Lanes = VerbsLanes;
  using Peer = VerbsPeer;

  VerbsPeers(Secret secret, std::shared_ptr<VerbsDevice> device, std::string transport_name);
  ~VerbsPeers();  // says bye
  Status open(const VerbsQueues& queues);
  Address own_address() const;

  Result<PeerId> connect(const Address& address);
  void close(uint32_t index);        // its queue pairs are gone; its writes are the caller's to end
  void tend(Clock::time_point now);  // what happens by time and not by completion
  void on_datagram_sent(uint32_t slot, const ibv_wc& wc);
  void on_datagram(uint32_t slot, const ibv_wc& wc);

  // The completion queue was seen empty: what lost peers wrote has been told, their loss may be.
  void on_queue_empty();

 private:
  struct Guest {  // one that writes to us
    VerbsName name;
    uint64_t nonce = 0;  // it and the name say which connection
    uint32_t peer = 0;   // its PeerId for us
    Lanes lanes;
    std::unique_ptr<ProcessWatch> watch;
  };

  Status make_lane(QueuePair& lane, uint32_t index, bool writes);
  Status make_lanes(Lanes& lanes, bool writes);
  Status begin_receiving(QueuePair& lane, const VerbsName& from, uint32_t qp, uint32_t psn);
  Status begin_sending(QueuePair& lane);
  Status open_datagrams();
  Status begin_datagrams();
  void receive(uint32_t slot);
  void send(const VerbsHello& hello, const VerbsName& to);
  VerbsHello make_hello(uint32_t index) const;
  void on_hello(const VerbsHello& hello);
  void on_answer(const VerbsHello& hello);
  void on_bye(const VerbsHello& hello);
  void dismiss(const std::function<bool(const Guest&)>& is_leaving);
  Status admit(const VerbsHello& hello, VerbsHello* answer);
  void send_bye(uint32_t index);
  void on_lost(uint32_t index) override { send_bye(index); }  // if it lives, it has queue pairs
  void say_bye();
  Status error(const std::string& call, int rc) const { return Status::from_errno(call, rc); }

  const Secret secret_;
  std::shared_ptr<VerbsDevice> device_;
  const VerbsQueues* queues_ = nullptr;
  VerbsName own_;
  Mapping memory_;  // of datagrams: those received, then those to send
  VerbsMrHandle region_;
  std::map<std::string, AhHandle> routes_;  // by place
  QpHandle datagrams_;
  uint32_t beginnings_ = 0;        // of it; in wr_id: completions of an earlier one are nobody's
  bool datagrams_failed_ = false;  // to be begun again by tend()
  std::vector<uint32_t> free_;     // slots to send with
  std::vector<std::unique_ptr<Guest>> guests_;
  // Last words may still be in the completion queue, which forgets those of a queue pair that is
  // destroyed: these wait for on_queue_empty().
  std::vector<std::unique_ptr<Guest>> leaving_;
  Clock::time_point next_tend_{};
};

}  // namespace moe_comm

#endif
