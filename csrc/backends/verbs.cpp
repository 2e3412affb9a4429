// The verbs backend: any RDMA NIC that has reliable connected queue pairs (ConnectX and other
// InfiniBand, any RoCE NIC, Soft-RoCE), through libibverbs.
//
// Data are RDMA_WRITE and RDMA_WRITE_WITH_IMM and nothing else; the only messages are those that
// admit peers (verbs_peers.hpp). What a NIC is asked for when it is opened is in verbs_device.cpp.
//
// post -> chain of its lane -> (next poll, or the chain is full) one ibv_post_send, the last of the
// chain signalled -> its completion ends all of the chain -> kWriteDone for each.
//
// Invariants:
// - A lane's writes end in the order of their posting (RC), so a completion, good or bad, says that
//   all before it ended well. Nothing above relies on that order.
// - The first error of a lane ends it: the NIC has put the queue pair into its error state. All its
//   writes end with an error, the peer is lost, and both queue pairs are destroyed at once, after
//   which the NIC reads none of the local bytes. Completions of a destroyed queue pair that are
//   still in the completion queue are known by their lane number, which is never used again.
// - The completion queue holds all that may be under way: it cannot overflow.
// - A sender that finds no receive posted is held back by its NIC, for ever if need be
//   (rnr_retry 7): a slow reader is not a lost peer.
// - poll() allocates nothing unless something failed or a peer comes or goes. Timers (hellos, the
//   watch over peers' processes) run inside poll(): call it at least every 0.1 s, asleep or not.
#include "../transport.hpp"

#ifndef MOE_COMM_HAVE_VERBS
#define MOE_COMM_HAVE_VERBS __has_include(<infiniband/verbs.h>)
#endif

#if MOE_COMM_HAVE_VERBS

#include <arpa/inet.h>
#include <fcntl.h>

#include <algorithm>
#include <deque>

#include "../wait.hpp"
#include "verbs_handles.hpp"
#include "verbs_peers.hpp"

namespace moe_comm {
namespace {

constexpr uint32_t kQueueDepth = 1024;      // writes under way, of all peers together
constexpr uint32_t kImmediateDepth = 2048;  // receives posted, for each lane
constexpr uint32_t kRepost = 64;            // receives are posted again in batches of this many
constexpr uint32_t kChain = 8;              // work requests for each doorbell at most
constexpr int kBatch = 32;                  // completions read at once
constexpr uint32_t kPollsPerTend = 64;      // looks at the clock

using Peer = VerbsPeers::Peer;

// Errors that speak of one write and not of the peer; its queue pair is dead all the same.
bool is_local_mistake(ibv_wc_status status) {
  return status == IBV_WC_LOC_LEN_ERR || status == IBV_WC_LOC_PROT_ERR ||
         status == IBV_WC_LOC_QP_OP_ERR || status == IBV_WC_LOC_ACCESS_ERR ||
         status == IBV_WC_REM_INV_REQ_ERR || status == IBV_WC_REM_ACCESS_ERR;
}

class VerbsTransport final : public Transport {
 public:
  VerbsTransport(Secret secret, std::shared_ptr<VerbsDevice> device)
      : device_(std::move(device)), peers_(secret, device_, "verbs:" + device_->name) {
    info_.name = "verbs:" + device_->name;
  }
  Status start();

  const Info& info() const override { return info_; }
  Result<MemoryRegion> register_memory(std::span<std::byte> bytes, DmaBuf dmabuf) override;
  Result<PeerId> connect(const Address& address) override;
  void disconnect(PeerId id) noexcept override;
  Status post_write(const WriteRequest& request) override;
  size_t poll(std::span<Completion> out, bool arm) override;

 private:
  struct Registration {  // the device outlives its regions
    std::shared_ptr<VerbsDevice> device;
    VerbsMrHandle region;
  };
  struct Posted {
    WorkId id;
    uint64_t num_bytes = 0;
  };
  struct Requests {  // prepared when the lane is made; a write fills in what differs
    ibv_send_wr work[kChain] = {};
    ibv_sge from[kChain] = {};
    std::vector<Posted> posted = std::vector<Posted>(kLaneDepth);  // by sequence, modulo its length
  };
  // One queue pair that we write on. Its number: 2 * peer + VerbsLane.
  // reported <= ended <= given <= taken
  struct Lane {
    ibv_qp* qp = nullptr;  // null: not to be used (any more)
    uint32_t max_inline = 0;
    uint32_t taken = 0;     // writes, ever: by post_write()
    uint32_t given = 0;     // to the NIC; the others are chained
    uint32_t ended = 0;     // well
    uint32_t reported = 0;  // by poll()
    bool queued = false;    // in unreported_
    std::unique_ptr<Requests> requests;
  };

  Status make_queues();
  Status post_receives(uint32_t lane, uint32_t count);
  void give(uint32_t lane);  // its chain to the NIC
  void give_all();
  size_t report(std::span<Completion> out, size_t n);
  size_t take_events(std::span<Completion> out, size_t n);
  size_t read_queue(std::span<Completion> out, size_t n, bool* empty);
  bool on_completion(const ibv_wc& wc, Completion& out);
  void on_write_end(uint32_t lane, const ibv_wc& wc);
  void on_write_error(uint32_t lane, const ibv_wc& wc);
  void end_lane(uint32_t lane, const Status& first, const Status& rest);
  void end_peer(uint32_t peer, const Status& rest);
  void take_wake_ups();

  Info info_;
  std::shared_ptr<VerbsDevice> device_;
  VerbsQueues queues_;
  VerbsPeers peers_;  // queue pairs are destroyed before their queues
  std::deque<Lane> lanes_;
  std::vector<uint32_t> chained_;     // lanes whose chain is not empty
  std::vector<uint32_t> unreported_;  // lanes with writes that ended, for the next poll
  uint32_t in_flight_ = 0;
  uint32_t consumed_[kNumLanes] = {};  // receives to be posted again
  ibv_recv_wr receives_[kRepost] = {};
  size_t events_taken_ = 0;  // of peers_.events
  uint32_t polls_ = 0;
};

// --- opening -------------------------------------------------------------------------------------

Status VerbsTransport::start() {
  if (Status status = make_queues(); !status.ok()) return status;
  if (Status status = peers_.open(queues_); !status.ok()) return status;
  info_.address = peers_.own_address();
  info_.capabilities.max_message_bytes = device_->max_message_bytes;
  info_.capabilities.queue_depth = kQueueDepth;
  info_.wait_fd = queues_.channel->fd;
  peers_.events.reserve(2 * kQueueDepth);
  return {};
}

Status VerbsTransport::make_queues() {
  const VerbsLibrary& library = *device_->library;
  queues_.channel = {library.create_comp_channel(device_->context.get()),
                     {library.destroy_comp_channel}};
  if (!queues_.channel) return Status::from_errno("ibv_create_comp_channel");
  const int fd = queues_.channel->fd;
  if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) != 0) return Status::from_errno("fcntl");
  // Twice what may be under way: some of destroyed queue pairs may still be there.
  const uint32_t wanted = 2 * (kQueueDepth + kNumLanes * kImmediateDepth + 128);
  const int depth =
      static_cast<int>(std::min<uint32_t>(wanted, static_cast<uint32_t>(device_->limits.max_cqe)));
  queues_.completions = {
      library.create_cq(device_->context.get(), depth, nullptr, queues_.channel.get(), 0),
      {library.destroy_cq}};
  if (!queues_.completions) return Status::from_errno("ibv_create_cq");
  for (uint32_t lane = 0; lane < kNumLanes; ++lane) {
    ibv_srq_init_attr attr{};
    attr.attr.max_wr = kImmediateDepth;
    attr.attr.max_sge = 1;
    queues_.receives[lane] = {library.create_srq(device_->pd.get(), &attr), {library.destroy_srq}};
    if (!queues_.receives[lane]) return Status::from_errno("ibv_create_srq");
    for (uint32_t i = 0; i < kImmediateDepth; i += kRepost) {
      if (Status status = post_receives(lane, kRepost); !status.ok()) return status;
    }
  }
  return {};
}

// Receives of no bytes: what an immediate consumes.
Status VerbsTransport::post_receives(uint32_t lane, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) {
    receives_[i].wr_id = pack_wr_id(VerbsWork::kImmediate, lane, 0);
    receives_[i].next = i + 1 < count ? &receives_[i + 1] : nullptr;
  }
  ibv_recv_wr* bad = nullptr;
  const int rc = ibv_post_srq_recv(queues_.receives[lane].get(), receives_, &bad);
  return rc == 0 ? Status() : Status::from_errno("ibv_post_srq_recv", rc);
}

Result<MemoryRegion> VerbsTransport::register_memory(std::span<std::byte> bytes, DmaBuf dmabuf) {
  if (bytes.empty()) return Status(Code::kInvalid, info_.name + ": cannot register 0 bytes");
  auto handle = device_->register_bytes(bytes, true, dmabuf);
  if (!handle.ok()) return handle.status().with_prefix(info_.name + ": ");
  MemoryRegion region;
  region.bytes = bytes;
  region.local_key = handle.value().get();
  region.remote_key.value = handle.value()->rkey;
  region.remote_base = reinterpret_cast<uint64_t>(bytes.data());
  region.of_device = dmabuf.given();
  region.registration = std::make_shared<Registration>(device_, std::move(handle.value()));
  return region;
}

Result<PeerId> VerbsTransport::connect(const Address& address) {
  auto id = peers_.connect(address);
  if (!id.ok()) return id;
  const auto index = static_cast<uint32_t>(id.value());
  for (uint32_t i = 0; i < kNumLanes; ++i) {
    const VerbsPeers::QueuePair& pair = peers_[index].lanes[i];
    Lane& lane = lanes_.emplace_back();
    lane.qp = pair.qp.get();
    lane.max_inline = pair.max_inline;
    lane.requests = std::make_unique<Requests>();
    for (uint32_t j = 0; j < kChain; ++j) {
      ibv_send_wr& work = lane.requests->work[j];
      work.sg_list = &lane.requests->from[j];
      work.next = j + 1 < kChain ? &lane.requests->work[j + 1] : nullptr;
    }
  }
  return id;
}

// --- writes --------------------------------------------------------------------------------------

Status VerbsTransport::post_write(const WriteRequest& request) {
  const auto index = static_cast<uint32_t>(request.peer);
  if (index >= peers_.size())
    return {Code::kInvalid, info_.name + ": no peer " + std::to_string(index)};
  if (Status status = check_write(info_, peers_[index], request); !status.ok()) [[unlikely]]
    return status;
  const bool is_users = request.has_immediate && request.immediate.is_user();
  const uint32_t number = kNumLanes * index + (is_users ? kUserLane : kProtocolLane);
  Lane& lane = lanes_[number];
  if (in_flight_ == kQueueDepth || lane.taken - lane.reported == kLaneDepth) {
    give(number);
    return Status::again();
  }

  const uint32_t link = lane.taken - lane.given;
  ibv_send_wr& work = lane.requests->work[link];  // H3
  work.wr_id = pack_wr_id(VerbsWork::kWrite, number, lane.taken);
  work.num_sge = request.num_bytes > 0;
  if (request.num_bytes > 0) {
    ibv_sge& from = lane.requests->from[link];
    from.addr = reinterpret_cast<uint64_t>(request.local->bytes.data()) + request.local_offset;
    from.length = static_cast<uint32_t>(request.num_bytes);
    from.lkey = static_cast<const ibv_mr*>(request.local->local_key)->lkey;
  }
  work.opcode = request.has_immediate ? IBV_WR_RDMA_WRITE_WITH_IMM : IBV_WR_RDMA_WRITE;
  work.imm_data = htonl(request.immediate.bits);
  const bool is_inline =
      request.num_bytes > 0 && request.num_bytes <= lane.max_inline && !request.local->of_device;
  work.send_flags = is_inline ? IBV_SEND_INLINE : 0;
  work.wr.rdma.remote_addr = request.remote->base + request.remote_offset;
  work.wr.rdma.rkey = static_cast<uint32_t>(request.remote->key.value);
  lane.requests->posted[lane.taken % kLaneDepth] = {request.id, request.num_bytes};
  ++lane.taken;
  ++in_flight_;
  if (link == 0) chained_.push_back(number);
  if (link + 1 == kChain) give(number);
  return {};
}

void VerbsTransport::give(uint32_t number) {
  Lane& lane = lanes_[number];
  const uint32_t count = lane.taken - lane.given;
  if (count == 0) return;
  std::erase(chained_, number);
  ibv_send_wr& last = lane.requests->work[count - 1];
  ibv_send_wr* const next = last.next;
  last.next = nullptr;
  last.send_flags |= IBV_SEND_SIGNALED;
  ibv_send_wr* bad = nullptr;
  const int rc = ibv_post_send(lane.qp, lane.requests->work, &bad);
  last.next = next;
  lane.given = lane.taken;
  if (rc == 0) return;
  const uint32_t peer = number / kNumLanes;
  const Status status = Status::from_errno("ibv_post_send", rc);
  peers_.settle(peer, Completion::Kind::kPeerLost, {Code::kPeerLost, status.text()});
  end_peer(peer, status.with_prefix(info_.name + ": " + peers_[peer].text + ": "));
}

void VerbsTransport::give_all() {
  while (!chained_.empty()) give(chained_.back());
}

// --- the end of writes ---------------------------------------------------------------------------

// Tells of writes that ended well, as far as `out` has room.
size_t VerbsTransport::report(std::span<Completion> out, size_t n) {
  while (!unreported_.empty()) {
    const uint32_t number = unreported_.back();
    Lane& lane = lanes_[number];
    for (; lane.reported != lane.ended; ++lane.reported, ++n, --in_flight_) {
      if (n == out.size()) return n;
      out[n] = Completion{};
      out[n].kind = Completion::Kind::kWriteDone;
      out[n].peer = PeerId{number / kNumLanes};
      out[n].id = lane.requests->posted[lane.reported % kLaneDepth].id;
    }
    lane.queued = false;
    unreported_.pop_back();
  }
  return n;
}

// Tells of all its writes by events, and forgets the queue pair.
void VerbsTransport::end_lane(uint32_t number, const Status& first, const Status& rest) {
  Lane& lane = lanes_[number];
  if (lane.qp == nullptr) return;
  lane.qp = nullptr;
  std::erase(chained_, number);
  std::erase(unreported_, number);
  lane.queued = false;
  for (const Status* status = &first; lane.reported != lane.taken; ++lane.reported, --in_flight_) {
    Completion& event = peers_.events.emplace_back();
    event.kind = Completion::Kind::kWriteDone;
    event.peer = PeerId{number / kNumLanes};
    event.id = lane.requests->posted[lane.reported % kLaneDepth].id;
    if (static_cast<int32_t>(lane.reported - lane.ended) < 0) continue;  // this one ended well
    event.status = *status;
    status = &rest;
  }
  lane.requests.reset();
}

void VerbsTransport::end_peer(uint32_t peer, const Status& rest) {
  for (uint32_t i = 0; i < kNumLanes; ++i) {
    end_lane(kNumLanes * peer + i, rest, rest);
    peers_[peer].lanes[i].qp.reset();
  }
}

void VerbsTransport::on_write_end(uint32_t number, const ibv_wc& wc) {
  Lane& lane = lanes_[number];
  if (lane.qp == nullptr) return;  // ended before
  const auto sequence = static_cast<uint32_t>(wc.wr_id);
  if (wc.status != IBV_WC_SUCCESS) {
    lane.ended = sequence;  // those before it in its chain ended well
    on_write_error(number, wc);
    return;
  }
  lane.ended = sequence + 1;
  if (!lane.queued) unreported_.push_back(number);
  lane.queued = true;
}

void VerbsTransport::on_write_error(uint32_t number, const ibv_wc& wc) {
  const Lane& lane = lanes_[number];
  const uint32_t peer = number / kNumLanes;
  const uint64_t num_bytes = lane.requests->posted[lane.ended % kLaneDepth].num_bytes;
  const std::string who = info_.name + ": " + peers_[peer].text + ": ";
  const std::string what = "write of " + std::to_string(num_bytes) + " bytes" +
                           (number % kNumLanes == kUserLane ? " with an immediate" : "") + ": " +
                           device_->wc_error(wc);
  const Code code = is_local_mistake(wc.status) ? Code::kTransport : Code::kPeerLost;
  peers_.settle(peer, Completion::Kind::kPeerLost, {Code::kPeerLost, what});
  const Status rest(Code::kPeerLost, who + "the connection ended with an earlier " + what);
  end_lane(number, {code, who + what}, rest);
  end_peer(peer, rest);
}

void VerbsTransport::disconnect(PeerId id) noexcept {
  const auto index = static_cast<uint32_t>(id);
  if (index >= peers_.size() || peers_[index].state == Peer::kClosed) return;
  end_peer(index, {Code::kPeerLost, info_.name + ": " + peers_[index].text +
                                        " was disconnected with this write under way"});
  peers_.close(index);
}

// --- completions ---------------------------------------------------------------------------------

size_t VerbsTransport::poll(std::span<Completion> out, bool arm) {
  give_all();
  size_t n = take_events(out, 0);
  n = report(out, n);
  bool empty = false;
  n = read_queue(out, n, &empty);
  if (arm || ++polls_ % kPollsPerTend == 0) peers_.tend(Clock::now());
  if (empty) n = take_events(out, n);
  if (n > 0 || !arm) return n;

  take_wake_ups();
  if (const int rc = ibv_req_notify_cq(queues_.completions.get(), 0); rc != 0) {
    peers_.lose_all(Status::from_errno("ibv_req_notify_cq", rc));
  }
  n = read_queue(out, n, &empty);  // what came before it was armed wakes nobody
  return take_events(out, n);
}

void VerbsTransport::take_wake_ups() {
  ibv_cq* queue = nullptr;
  void* context = nullptr;
  while (device_->library->get_cq_event(queues_.channel.get(), &queue, &context) == 0)
    device_->library->ack_cq_events(queue, 1);
}

size_t VerbsTransport::take_events(std::span<Completion> out, size_t n) {
  std::vector<Completion>& events = peers_.events;
  while (n < out.size() && events_taken_ < events.size()) {
    Completion& event = out[n++] = std::move(events[events_taken_++]);
    const bool is_end =
        event.kind == Completion::Kind::kPeerLost || event.kind == Completion::Kind::kPeerRefused;
    if (is_end) end_peer(static_cast<uint32_t>(event.peer), event.status);  // adds events
  }
  if (events_taken_ == events.size()) {
    events.clear();
    events_taken_ = 0;
  }
  return n;
}

// *empty: nothing is left in it.
size_t VerbsTransport::read_queue(std::span<Completion> out, size_t n, bool* empty) {
  ibv_wc entries[kBatch];
  *empty = false;
  while (n < out.size()) {
    const int room = static_cast<int>(std::min<size_t>(kBatch, out.size() - n));
    const int count = ibv_poll_cq(queues_.completions.get(), room, entries);
    if (count < 0) {
      peers_.lose_all(Status::from_errno("ibv_poll_cq", -count));
      break;
    }
    for (int i = 0; i < count; ++i) n += on_completion(entries[i], out[n]);
    n = report(out, n);
    if (count == room) continue;
    *empty = true;
    peers_.on_queue_empty();
    break;
  }
  for (uint32_t lane = 0; lane < kNumLanes; ++lane) {
    for (; consumed_[lane] >= kRepost; consumed_[lane] -= kRepost) {
      if (Status status = post_receives(lane, kRepost); !status.ok()) peers_.lose_all(status);
    }
  }
  return n;
}

// True if `out` was filled.
bool VerbsTransport::on_completion(const ibv_wc& wc, Completion& out) {
  const uint32_t whose = static_cast<uint32_t>(wc.wr_id >> 32) & 0x3fffffff;
  switch (static_cast<VerbsWork>(wc.wr_id >> 62)) {
    case VerbsWork::kWrite:
      on_write_end(whose, wc);
      return false;
    case VerbsWork::kImmediate:
      ++consumed_[whose];
      if (wc.status != IBV_WC_SUCCESS) return false;  // of a queue pair that is no more
      out = Completion{};
      out.kind = Completion::Kind::kImmediate;  // H4
      out.immediate.bits = ntohl(wc.imm_data);
      return true;
    case VerbsWork::kDatagramIn:
      peers_.on_datagram(whose, wc);
      return false;
    case VerbsWork::kDatagramOut:
      peers_.on_datagram_sent(whose, wc);
      return false;
  }
  return false;
}

}  // namespace

Result<std::unique_ptr<Transport>> open_verbs(Secret secret, const std::string& interface) {
  auto settings = VerbsSettings::parse(interface);
  if (!settings.ok()) return settings.status().with_prefix("verbs: ");
  const std::string devices = settings.value().device;
  std::vector<std::unique_ptr<Transport>> nics;
  for (size_t start = 0; start <= devices.size();) {
    const size_t end = std::min(devices.find('+', start), devices.size());
    settings.value().device = devices.substr(start, end - start);
    start = end + 1;
    auto device = VerbsDevice::open(settings.value());
    if (!device.ok()) return device.status().with_prefix("verbs: ");
    auto transport = std::make_unique<VerbsTransport>(secret, std::move(device.value()));
    if (Status status = transport->start(); !status.ok())
      return status.with_prefix(transport->info().name + ": ");
    nics.push_back(std::move(transport));
  }
  if (nics.size() > 1) return join_nics(std::move(nics));
  return std::move(nics[0]);
}

}  // namespace moe_comm

#else  // no headers when this was built

namespace moe_comm {
namespace {
constexpr const char* kMissing =
    "moe_comm was built without libibverbs' headers: install them (Debian, Ubuntu: apt-get install "
    "libibverbs-dev) and build moe_comm again";
}  // namespace

Result<std::unique_ptr<Transport>> open_verbs(Secret, const std::string&) {
  return Status(Code::kTransport, std::string("verbs: ") + kMissing);
}

TransportReport probe_verbs() {
  TransportReport report;
  report.name = "verbs";
  report.reason = kMissing;
  return report;
}

}  // namespace moe_comm

#endif
