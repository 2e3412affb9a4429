#include "verbs_peers.hpp"

#if MOE_COMM_HAVE_VERBS

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>

namespace moe_comm {
namespace {

using std::chrono::milliseconds;
constexpr auto kConnectTimeout = milliseconds(10'000);  // without an answer: refused
constexpr auto kHelloInterval = milliseconds(250);      // between hellos to a silent peer
constexpr auto kBusyInterval = milliseconds(20);        // between looks at who is connecting
constexpr auto kWatchInterval = milliseconds(200);      // and at the processes of this host
constexpr auto kByeTimeout = milliseconds(20);          // for byes to leave before the end
constexpr uint32_t kNumReceives = 64;                   // datagrams
constexpr uint32_t kNumSends = 64;
constexpr size_t kGrhBytes = 40;  // in front of every datagram received
constexpr size_t kSlotBytes = 256;
constexpr uint32_t kInlineBytes = 64;    // asked for
constexpr uint32_t kPsnMask = 0xffffff;  // 24 bits, as queue pairs' numbers

}  // namespace

enum class HelloKind : uint32_t { kHello = 1, kAccept, kRefuse, kBye };

struct VerbsHello {
  static constexpr uint64_t kMagic = 0x6d6f6568'76000001;  // "moehv" 1
  uint64_t magic = kMagic;
  Secret secret = 0;   // none in a refusal
  uint64_t nonce = 0;  // chosen by who connects, repeated in the answer
  HelloKind kind = HelloKind::kHello;
  uint32_t peer = 0;  // PeerId at the side that connects
  uint32_t qp[kNumLanes] = {};
  uint32_t psn[kNumLanes] = {};
  VerbsName from;
};
static_assert(sizeof(VerbsHello) + kGrhBytes <= kSlotBytes);

namespace {

bool is_same(const VerbsName& a, const VerbsName& b) { return std::memcmp(&a, &b, sizeof a) == 0; }

}  // namespace

VerbsPeers::VerbsPeers(Secret secret, std::shared_ptr<VerbsDevice> device,
                       std::string transport_name)
    : PeerTable(std::move(transport_name)), secret_(secret), device_(std::move(device)) {}

VerbsPeers::~VerbsPeers() {
  if (datagrams_) say_bye();
}

Address VerbsPeers::own_address() const {
  const auto* bytes = reinterpret_cast<const std::byte*>(&own_);
  return Address(bytes, bytes + sizeof own_);
}

// --- datagrams -----------------------------------------------------------------------------------

Status VerbsPeers::open(const VerbsQueues& queues) {
  queues_ = &queues;
  own_.host = host_id();
  own_.pid = getpid();
  own_.qkey = static_cast<uint32_t>(random_word()) & 0x7fffffff;  // the top bit is the kernel's
  own_.place = device_->place;
  return open_datagrams();
}

Status VerbsPeers::open_datagrams() {
  const size_t num_bytes = (kNumReceives + kNumSends) * kSlotBytes;
  void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
                      0);  // shared: stays the same memory after a fork()
  if (memory == MAP_FAILED) return Status::from_errno("mmap");
  memory_ = Mapping(memory, num_bytes);
  auto region = device_->register_bytes(memory_.bytes(), false);
  if (!region.ok()) return region.status();
  region_ = std::move(region.value());

  const VerbsLibrary& library = *device_->library;
  ibv_qp_init_attr init{};
  init.qp_type = IBV_QPT_UD;
  init.send_cq = init.recv_cq = queues_->completions.get();
  init.sq_sig_all = 1;
  init.cap = {kNumSends, kNumReceives, 1, 1, 0};
  datagrams_ = {library.create_qp(device_->pd.get(), &init), {library.destroy_qp}};
  if (!datagrams_) return Status::from_errno("ibv_create_qp(UD)");
  own_.qp = datagrams_->qp_num;
  return begin_datagrams();
}

// Also after a failure, under the same number: a datagram that cannot be sent, as while a link is
// down, may end the queue pair.
Status VerbsPeers::begin_datagrams() {
  const VerbsLibrary& library = *device_->library;
  ++beginnings_;
  free_.clear();
  ibv_qp_attr attr{};
  attr.qp_state = IBV_QPS_RESET;
  int rc = library.modify_qp(datagrams_.get(), &attr, IBV_QP_STATE);
  if (rc != 0) return error("ibv_modify_qp(UD, RESET)", rc);
  attr.qp_state = IBV_QPS_INIT;
  attr.pkey_index = static_cast<uint16_t>(device_->settings.pkey);
  attr.port_num = device_->port;
  attr.qkey = own_.qkey;
  rc = library.modify_qp(datagrams_.get(), &attr,
                         IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY);
  if (rc != 0) return error("ibv_modify_qp(UD, INIT)", rc);
  for (uint32_t slot = 0; slot < kNumReceives; ++slot) receive(slot);
  attr.qp_state = IBV_QPS_RTR;
  if (rc = library.modify_qp(datagrams_.get(), &attr, IBV_QP_STATE); rc != 0)
    return error("ibv_modify_qp(UD, RTR)", rc);
  attr.qp_state = IBV_QPS_RTS;
  attr.sq_psn = static_cast<uint32_t>(random_word()) & kPsnMask;
  if (rc = library.modify_qp(datagrams_.get(), &attr, IBV_QP_STATE | IBV_QP_SQ_PSN); rc != 0)
    return error("ibv_modify_qp(UD, RTS)", rc);
  for (uint32_t slot = 0; slot < kNumSends; ++slot) free_.push_back(slot);
  return {};
}

void VerbsPeers::receive(uint32_t slot) {
  ibv_sge place{reinterpret_cast<uint64_t>(memory_.data()) + slot * kSlotBytes, kSlotBytes,
                region_->lkey};
  ibv_recv_wr request{};
  request.wr_id = pack_wr_id(VerbsWork::kDatagramIn, slot, beginnings_);
  request.sg_list = &place;
  request.num_sge = 1;
  ibv_recv_wr* bad = nullptr;
  if (const int rc = ibv_post_recv(datagrams_.get(), &request, &bad); rc != 0)
    std::fprintf(stderr, "moe_comm: %s\n", error(name_ + ": ibv_post_recv", rc).text().c_str());
}

// May fail silently: hellos are repeated, and so are their answers.
void VerbsPeers::send(const VerbsHello& hello, const VerbsName& to) {
  if (free_.empty()) return;
  const VerbsLibrary& library = *device_->library;
  const std::string key(reinterpret_cast<const char*>(&to.place), sizeof to.place);
  AhHandle& route = routes_[key];
  if (!route) {
    ibv_ah_attr attr = device_->route_to(to.place);
    route = {library.create_ah(device_->pd.get(), &attr), {library.destroy_ah}};
    if (!route) {  // no way there, now
      routes_.erase(key);
      return;
    }
  }
  const uint32_t slot = free_.back();
  std::byte* bytes = memory_.data() + (kNumReceives + slot) * kSlotBytes;
  std::memcpy(bytes, &hello, sizeof hello);
  ibv_sge place{reinterpret_cast<uint64_t>(bytes), sizeof hello, region_->lkey};
  ibv_send_wr request{};
  request.wr_id = pack_wr_id(VerbsWork::kDatagramOut, slot, beginnings_);
  request.sg_list = &place;
  request.num_sge = 1;
  request.opcode = IBV_WR_SEND;
  request.send_flags = IBV_SEND_SIGNALED;
  request.wr.ud.ah = route.get();
  request.wr.ud.remote_qpn = to.qp;
  request.wr.ud.remote_qkey = to.qkey;
  ibv_send_wr* bad = nullptr;
  if (ibv_post_send(datagrams_.get(), &request, &bad) == 0) free_.pop_back();
}

void VerbsPeers::on_datagram_sent(uint32_t slot, const ibv_wc& wc) {
  if (static_cast<uint32_t>(wc.wr_id) != beginnings_) return;
  free_.push_back(slot);
  if (wc.status != IBV_WC_SUCCESS) datagrams_failed_ = true;
}

void VerbsPeers::on_datagram(uint32_t slot, const ibv_wc& wc) {
  if (static_cast<uint32_t>(wc.wr_id) != beginnings_) return;
  if (wc.status != IBV_WC_SUCCESS) {
    datagrams_failed_ = true;
    return;
  }
  VerbsHello hello;
  std::memcpy(&hello, memory_.data() + slot * kSlotBytes + kGrhBytes, sizeof hello);
  receive(slot);
  const bool is_hello = wc.byte_len == kGrhBytes + sizeof hello &&
                        hello.magic == VerbsHello::kMagic && hello.from.magic == VerbsName::kMagic;
  if (!is_hello) return;  // of another program
  if (hello.kind == HelloKind::kHello) {
    on_hello(hello);
  } else if (hello.kind == HelloKind::kBye) {
    on_bye(hello);
  } else {
    on_answer(hello);
  }
}

// --- queue pairs ---------------------------------------------------------------------------------

Status VerbsPeers::make_lane(QueuePair& lane, uint32_t index, bool writes) {
  const VerbsLibrary& library = *device_->library;
  ibv_qp_init_attr init{};
  init.qp_type = IBV_QPT_RC;
  init.send_cq = init.recv_cq = queues_->completions.get();
  init.srq = queues_->receives[index].get();
  for (uint32_t inline_bytes : {kInlineBytes, 0u}) {
    init.cap = {writes ? kLaneDepth : 1, 0, 1, 0, writes ? inline_bytes : 0};
    lane.qp = {library.create_qp(device_->pd.get(), &init), {library.destroy_qp}};
    if (lane.qp) break;
  }
  if (!lane.qp) return Status::from_errno("ibv_create_qp(RC)");
  lane.max_inline = writes ? init.cap.max_inline_data : 0;
  lane.psn = static_cast<uint32_t>(random_word()) & kPsnMask;
  ibv_qp_attr attr{};
  attr.qp_state = IBV_QPS_INIT;
  attr.pkey_index = static_cast<uint16_t>(device_->settings.pkey);
  attr.port_num = device_->port;
  attr.qp_access_flags = writes ? 0 : IBV_ACCESS_REMOTE_WRITE;
  const int rc = library.modify_qp(
      lane.qp.get(), &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
  return rc == 0 ? Status() : error("ibv_modify_qp(RC, INIT)", rc);
}

Status VerbsPeers::make_lanes(Lanes& lanes, bool writes) {
  for (uint32_t i = 0; i < kNumLanes; ++i) {
    if (Status status = make_lane(lanes[i], i, writes); !status.ok()) return status;
  }
  return {};
}

Status VerbsPeers::begin_receiving(QueuePair& lane, const VerbsName& from, uint32_t qp,
                                   uint32_t psn) {
  ibv_qp_attr attr{};
  attr.qp_state = IBV_QPS_RTR;
  attr.path_mtu = static_cast<ibv_mtu>(std::min(from.place.mtu, device_->place.mtu));
  attr.dest_qp_num = qp;
  attr.rq_psn = psn;
  attr.max_dest_rd_atomic = 1;
  attr.min_rnr_timer = static_cast<uint8_t>(device_->settings.rnr_timer);
  attr.ah_attr = device_->route_to(from.place);
  const int rc = device_->library->modify_qp(lane.qp.get(), &attr,
                                             IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU |
                                                 IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                                 IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
  return rc == 0 ? Status() : error("ibv_modify_qp(RC, RTR)", rc);
}

Status VerbsPeers::begin_sending(QueuePair& lane) {
  ibv_qp_attr attr{};
  attr.qp_state = IBV_QPS_RTS;
  attr.sq_psn = lane.psn;
  attr.timeout = static_cast<uint8_t>(device_->settings.timeout);
  attr.retry_cnt = static_cast<uint8_t>(device_->settings.retries);
  attr.rnr_retry = 7;  // for ever: a peer that does not look yet is not lost
  attr.max_rd_atomic = 1;
  const int rc =
      device_->library->modify_qp(lane.qp.get(), &attr,
                                  IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
                                      IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
  return rc == 0 ? Status() : error("ibv_modify_qp(RC, RTS)", rc);
}

// --- as the side that connects -------------------------------------------------------------------

Result<PeerId> VerbsPeers::connect(const Address& address) {
  VerbsName name;
  if (address.size() != sizeof name) {
    return Status(Code::kInvalid, name_ + ": address: expected " + std::to_string(sizeof name) +
                                      " bytes, got " + std::to_string(address.size()));
  }
  std::memcpy(&name, address.data(), sizeof name);
  if (name.magic != VerbsName::kMagic)
    return Status(Code::kInvalid, name_ + ": address: expected one of verbs, got other bytes");

  Lanes lanes;
  if (Status status = make_lanes(lanes, true); !status.ok())
    return status.with_prefix(name_ + ": ");
  Peer& peer = add(
      (device_->is_ethernet ? gid_text(name.place.gid) : "LID " + std::to_string(name.place.lid)) +
      ", queue pair " + std::to_string(name.qp) + ", process " + std::to_string(name.pid));
  peer.name = name;
  peer.lanes = std::move(lanes);
  const auto index = static_cast<uint32_t>(peers_.size() - 1);
  watch(index, name.host, name.pid);
  next_tend_ = {};
  tend(peer.started);
  return PeerId{index};
}

void VerbsPeers::send_bye(uint32_t index) {
  VerbsHello bye = make_hello(index);
  bye.kind = HelloKind::kBye;
  send(bye, peers_[index].name);
}

void VerbsPeers::close(uint32_t index) {
  Peer& peer = peers_[index];
  if (peer.state != Peer::kLost) send_bye(index);
  std::erase(connecting_, index);
  peer.state = Peer::kClosed;
  peer.watch.reset();
  peer.lanes = {};
}

VerbsHello VerbsPeers::make_hello(uint32_t index) const {
  const Peer& peer = peers_[index];
  VerbsHello hello;
  hello.secret = secret_;
  hello.nonce = peer.nonce;
  hello.peer = index;
  hello.from = own_;
  for (uint32_t i = 0; i < kNumLanes; ++i) {
    hello.qp[i] = peer.lanes[i].qp ? peer.lanes[i].qp->qp_num : 0;
    hello.psn[i] = peer.lanes[i].psn;
  }
  return hello;
}

void VerbsPeers::on_answer(const VerbsHello& hello) {
  if (hello.peer >= peers_.size()) return;
  Peer& peer = peers_[hello.peer];
  if (peer.state != Peer::kConnecting || peer.nonce != hello.nonce) return;  // late or repeated
  if (hello.kind == HelloKind::kRefuse) {
    refuse(hello.peer);
    return;
  }
  if (hello.kind != HelloKind::kAccept || hello.secret != secret_) return;
  for (uint32_t i = 0; i < kNumLanes; ++i) {
    Status status = begin_receiving(peer.lanes[i], hello.from, hello.qp[i], hello.psn[i]);
    if (status.ok()) status = begin_sending(peer.lanes[i]);
    if (!status.ok()) {
      settle(hello.peer, Completion::Kind::kPeerRefused, status);
      return;
    }
  }
  settle(hello.peer, Completion::Kind::kPeerReady, {});
}

// --- as the side that is connected to ------------------------------------------------------------

void VerbsPeers::on_hello(const VerbsHello& hello) {
  VerbsHello answer;
  answer.nonce = hello.nonce;
  answer.peer = hello.peer;
  answer.from = own_;
  answer.kind = HelloKind::kRefuse;
  if (hello.secret == secret_) {
    if (Status status = admit(hello, &answer); !status.ok()) {  // it asks again, until its deadline
      std::fprintf(stderr, "moe_comm: %s\n",
                   status.with_prefix(name_ + ": a peer connects: ").text().c_str());
      return;
    }
    answer.kind = HelloKind::kAccept;
    answer.secret = secret_;
  }
  send(answer, hello.from);
}

Status VerbsPeers::admit(const VerbsHello& hello, VerbsHello* answer) {
  auto same = [&](const auto& guest) {
    return guest->nonce == hello.nonce && is_same(guest->name, hello.from);
  };
  auto found = std::find_if(guests_.begin(), guests_.end(), same);
  if (found == guests_.end()) {
    auto guest = std::make_unique<Guest>();
    guest->name = hello.from;
    guest->nonce = hello.nonce;
    guest->peer = hello.peer;
    auto [process, has_ended] = watch_process(hello.from.host, hello.from.pid);
    guest->watch = std::move(process);
    if (has_ended) return {Code::kPeerLost, "its process has ended"};
    if (Status status = make_lanes(guest->lanes, false); !status.ok()) return status;
    for (uint32_t i = 0; i < kNumLanes; ++i) {  // enough to be written to: it never sends
      Status status = begin_receiving(guest->lanes[i], hello.from, hello.qp[i], hello.psn[i]);
      if (!status.ok()) return status;
    }
    guests_.push_back(std::move(guest));
    found = guests_.end() - 1;
  }
  for (uint32_t i = 0; i < kNumLanes; ++i) {
    answer->qp[i] = (*found)->lanes[i].qp->qp_num;
    answer->psn[i] = (*found)->lanes[i].psn;
  }
  return {};
}

// --- leaving -------------------------------------------------------------------------------------

// From one that wrote to us: its queue pairs here are of no more use. From one that we write to: it
// has closed. The nonce is known to the two sides of a connection only.
void VerbsPeers::on_bye(const VerbsHello& hello) {
  if (hello.secret != secret_) return;
  dismiss([&](const Guest& guest) {
    return guest.nonce == hello.nonce && is_same(guest.name, hello.from);
  });
  if (hello.peer >= peers_.size()) return;
  const Peer& peer = peers_[hello.peer];
  if (peer.nonce != hello.nonce || !is_same(peer.name, hello.from)) return;
  settle(hello.peer,
         peer.state == Peer::kReady ? Completion::Kind::kPeerLost : Completion::Kind::kPeerRefused,
         {Code::kPeerLost, "it closed its transport"});
}

void VerbsPeers::dismiss(const std::function<bool(const Guest&)>& is_leaving) {
  const auto rest = std::partition(guests_.begin(), guests_.end(),
                                   [&](const auto& guest) { return !is_leaving(*guest); });
  std::move(rest, guests_.end(), std::back_inserter(leaving_));
  guests_.erase(rest, guests_.end());
}

void VerbsPeers::on_queue_empty() {
  tell_losses();
  leaving_.clear();
}

void VerbsPeers::say_bye() {
  for (uint32_t i = 0; i < peers_.size(); ++i) {
    if (peers_[i].state == Peer::kConnecting || peers_[i].state == Peer::kReady) close(i);
  }
  for (const auto& guest : guests_) {
    VerbsHello bye;
    bye.kind = HelloKind::kBye;
    bye.secret = secret_;
    bye.nonce = guest->nonce;
    bye.peer = guest->peer;
    bye.from = own_;
    send(bye, guest->name);
  }
  const auto start = Clock::now();
  while (free_.size() < kNumSends && Clock::now() < start + kByeTimeout) {
    ibv_wc wc{};
    if (ibv_poll_cq(queues_->completions.get(), 1, &wc) < 1) {
      sched_yield();
    } else if (static_cast<VerbsWork>(wc.wr_id >> 62) == VerbsWork::kDatagramOut) {
      free_.push_back(0);
    }
  }
}

void VerbsPeers::tend(Clock::time_point now) {
  if (now < next_tend_) return;
  if (datagrams_failed_) {
    datagrams_failed_ = false;
    if (Status status = begin_datagrams(); !status.ok()) lose_all(status);
  }
  const std::vector<uint32_t> connecting = connecting_;
  for (uint32_t index : connecting) {
    Peer& peer = peers_[index];
    if (now > peer.started + kConnectTimeout) {
      settle(index, Completion::Kind::kPeerRefused, {Code::kPeerTimeout, "no answer within 10 s"});
    } else if (now >= peer.next_hello) {
      peer.next_hello = now + kHelloInterval;
      send(make_hello(index), peer.name);
    }
  }
  look_at_processes();
  dismiss([](const Guest& guest) { return guest.watch && guest.watch->ended(); });
  next_tend_ = now + (connecting_.empty() ? kWatchInterval : kBusyInterval);
}

}  // namespace moe_comm

#endif
