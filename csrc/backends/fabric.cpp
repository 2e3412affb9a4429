// The fabric backend: any network that libfabric speaks ("tcp;ofi_rxm", "shm", "efa",
// "verbs;ofi_rxm"), one code path.
//
// Data are fi_writemsg with FI_REMOTE_CQ_DATA and nothing else; the only messages are those that
// admit peers (fabric_peers.hpp). What is asked of a provider is in fabric_device.cpp.
//
// Invariants:
// - A Write belongs to libfabric from a successful post until its completion is read; its
//   fi_context2 never moves.
// - disconnect() reports a peer's writes as failed at once. Their slots stay with libfabric
//   ("orphaned") until it lets go of them, which may be never (tcp to a stopped process), so the
//   pool grows by as many.
// - poll() allocates nothing unless something failed or a peer comes or goes. Timers (hellos,
//   refusals, the watch over peers' processes) run inside poll(): call it at least every 0.1 s,
//   asleep or not.
// - A completed write's bytes may be reused. That the peer has them is certain where a completion
//   is an acknowledgement: on RDMA NICs, and over tcp from kAcknowledgedBytes on.
//
// Learned from libfabric 1.17 (Debian 12), each by an experiment:
// - ofi_rxm reconnects by itself: after a peer's death posts return -FI_EAGAIN for ever. Hence the
//   watch over processes of this host, and kStuckTimeout for those of others.
// - tcp completes a write when the socket took it. A target that finds a wrong key drops the
//   connection, the bytes in the socket are gone and the writer's completion was good. So large
//   writes over tcp ask for FI_DELIVERY_COMPLETE: an acknowledgement, and so an error. Small ones
//   do not: a bare ping-pong of 8 B took 14 us instead of 5.4, 64 KiB writes lost 10 % of their
//   bandwidth; at 1 MiB no difference could be measured (2 cores, loopback).
// - A wait fd costs tcp 0.9 us of 6.4 us one way (the provider then uses epoll), FI_THREAD_SAFE
//   nothing.
// - shm with FI_DELIVERY_COMPLETE loses the completions of zero-length writes and hangs on a wrong
//   key: not used there. Without it a wrong key drops the write silently; nothing is corrupted.
//   Its completion queue has no wait fd. A process killed inside it leaves locks taken: of 31
//   ranks whose peer died so in the middle of 8 MiB writes, 3 completed nothing afterwards. Ranks
//   of one host are better served by shm.cpp.
// - Withdrawing a region does not stop a tcp write whose first bytes are already being copied.
//   Close the transport before memory goes back to an allocator that others use.
// - ofi_rxm must not be closed while a write arrives: NOTE [closing over tcp].
// - libfabric's sockets are inherited by fork(): a child that does not exec keeps its parent's
//   connections alive after the parent's death.
// - /dev/shm/PID:0:0 of a killed process stays; the next open of the shm provider removes it
//   (fabric_device.cpp).
#include "../transport.hpp"

#ifndef MOE_COMM_HAVE_FABRIC
#error "define MOE_COMM_HAVE_FABRIC as 1 (there are headers of libfabric, 1.17 or newer) or 0"
#endif

#if MOE_COMM_HAVE_FABRIC

#include <algorithm>
#include <chrono>
#include <deque>

#include "../wait.hpp"
#include "fabric_handles.hpp"
#include "fabric_peers.hpp"

namespace moe_comm {
namespace {

using std::chrono::milliseconds;
constexpr auto kStuckTimeout = milliseconds(30'000);  // nothing can be posted: lost
constexpr auto kClosingTimeout = milliseconds(200);
constexpr size_t kAcknowledgedBytes = 256 << 10;  // tcp: writes of at least this many bytes
constexpr size_t kMaxQueueDepth = 1024;
constexpr uint32_t kChain = 32;  // writes for one doorbell, at most
constexpr size_t kMaxMessageBytes = size_t{1} << 30;
constexpr size_t kBatch = 32;           // completions read at once
constexpr uint32_t kPollsPerTend = 64;  // looks at the clock
constexpr int kArmAttempts = 64;        // fi_trywait until the queue is empty
constexpr int kQuietPolls = 3;          // in a row: nothing arrives any more

// Errors that speak of one write, not of the peer.
bool is_local_mistake(int error) {
  return error == FI_EINVAL || error == FI_EACCES || error == FI_EPERM ||
         error == FI_EKEYREJECTED || error == FI_EMSGSIZE || error == FI_EFAULT;
}

using Peer = FabricPeers::Peer;

class FabricTransport final : public Transport {
 public:
  explicit FabricTransport(Secret secret, std::shared_ptr<FabricDevice> device)
      : device_(std::move(device)),
        peers_(secret, device_, "fabric:" + device_->provider + "@" + device_->source) {
    info_.name = "fabric:" + device_->provider + "@" + device_->source;
  }
  ~FabricTransport() override;
  Status start();

  const Info& info() const override { return info_; }
  Result<MemoryRegion> register_memory(std::span<std::byte> bytes, DmaBuf dmabuf) override;
  Result<PeerId> connect(const Address& address) override { return peers_.connect(address); }
  void disconnect(PeerId id) noexcept override;
  Status post_write(const WriteRequest& request) override;
  size_t poll(std::span<Completion> out, bool arm) override;

 private:
  struct Registration {  // the device outlives its regions
    std::shared_ptr<FabricDevice> device;
    MrHandle region;
  };
  struct Write : FabricOperation {
    uint32_t peer = 0;
    bool in_use = false;
    bool orphaned = false;  // already reported
    WorkId id;
    fi_rma_iov to{};
    FabricPeers::RemoteRef remote;
  };

  Status error(const std::string& call, ssize_t rc) const {
    return device_->library.error(call, rc);
  }
  Status open_endpoint();
  void add_write();
  ssize_t give(Write& write, const iovec& from, void* descriptor, uint64_t flags, uint32_t data);
  void ring();
  Status on_refused_post(uint32_t index, ssize_t rc);
  size_t take_events(std::span<Completion> out, size_t n);
  size_t read_queue(std::span<Completion> out, size_t n);
  bool on_entry(const fi_cq_data_entry& entry, Completion& out);
  bool on_error(Completion& out);
  bool finish(Write& write, Status status, Completion& out);
  bool owns(const void* context) const;

  Info info_;
  std::shared_ptr<FabricDevice> device_;
  FabricPeers peers_;
  std::deque<Write> writes_;
  std::vector<Write*> free_writes_;
  const Write* unrung_ = nullptr;  // the last that was given with FI_MORE: NOTE [doorbells]
  uint32_t num_unrung_ = 0;
  bool chains_ = false;  // whether FI_MORE is of use here
  CqHandle queue_;
  EndpointHandle endpoint_;  // closed before what it was given
  size_t acknowledge_from_ = SIZE_MAX;
  size_t events_taken_ = 0;  // of peers_.events
  uint32_t polls_ = 0;
};

// --- opening and closing -------------------------------------------------------------------------

Status FabricTransport::start() {
  if (Status status = peers_.open(); !status.ok()) return status;
  if (Status status = open_endpoint(); !status.ok()) return status;
  if (Status status = peers_.start(endpoint_.get()); !status.ok()) return status;
  const fi_info& info = *device_->info;
  info_.address = peers_.own_address();
  info_.capabilities.max_message_bytes = std::min(info.ep_attr->max_msg_size, kMaxMessageBytes);
  const size_t depth = info.tx_attr->size;  // EFA's also holds hellos: NOTE [doorbells]
  info_.capabilities.queue_depth = std::min(
      depth >= 2 * FabricPeers::kNumSends ? depth - FabricPeers::kNumSends : depth, kMaxQueueDepth);
  info_.capabilities.writes_local_memory_unregistered = !device_->wants(FI_MR_LOCAL);
  chains_ = device_->provider.starts_with("efa");
  if (device_->provider.starts_with("tcp")) acknowledge_from_ = kAcknowledgedBytes;
  for (size_t i = 0; i < info_.capabilities.queue_depth; ++i) add_write();
  peers_.events.reserve(2 * kMaxQueueDepth);
  return {};
}

Status FabricTransport::open_endpoint() {
  fid_domain* domain = device_->domain.get();
  fi_cq_attr attr{};
  attr.size = device_->info->tx_attr->size + device_->info->rx_attr->size;
  attr.format = FI_CQ_FORMAT_DATA;
  attr.wait_obj = FI_WAIT_FD;
  fid_cq* queue = nullptr;
  int rc = fi_cq_open(domain, &attr, &queue, nullptr);
  if (rc == 0) {
    if (fi_control(&queue->fid, FI_GETWAIT, &info_.wait_fd) != 0) info_.wait_fd = -1;
  } else {  // shm: the proxy naps instead
    attr.wait_obj = FI_WAIT_NONE;
    rc = fi_cq_open(domain, &attr, &queue, nullptr);
  }
  if (rc != 0) return error("fi_cq_open", rc);
  queue_.reset(queue);

  fid_ep* endpoint = nullptr;
  rc = fi_endpoint(domain, device_->info.get(), &endpoint, nullptr);
  if (rc != 0) return error("fi_endpoint", rc);
  endpoint_.reset(endpoint);
  if (rc = fi_ep_bind(endpoint, &peers_.addresses()->fid, 0); rc != 0)
    return error("fi_ep_bind(av)", rc);
  if (rc = fi_ep_bind(endpoint, &queue->fid, FI_TRANSMIT | FI_RECV); rc != 0)
    return error("fi_ep_bind(cq)", rc);
  if (rc = fi_enable(endpoint); rc != 0) return error("fi_enable", rc);
  return {};
}

FabricTransport::~FabricTransport() {
  if (info_.address.empty() || info_.wait_fd < 0) return;  // not enabled: not to be polled
  shut_down_sockets(info_.wait_fd);                        // NOTE [closing over tcp]
  std::vector<Completion> dropped(kBatch);
  const auto start = Clock::now();
  for (int quiet = 0; quiet < kQuietPolls && Clock::now() < start + kClosingTimeout;) {
    quiet = read_queue(dropped, 0) > 0 ? 0 : quiet + 1;
  }
}

void FabricTransport::add_write() {
  Write& write = writes_.emplace_back();
  write.kind = FabricOperation::kWrite;
  free_writes_.push_back(&write);
}

Result<MemoryRegion> FabricTransport::register_memory(std::span<std::byte> bytes, DmaBuf dmabuf) {
  if (dmabuf.given() && !device_->takes_device_memory()) {
    return Status(Code::kInvalid,
                  info_.name + " registers host memory only: use host-staged windows for a GPU");
  }
  if (bytes.empty()) return Status(Code::kInvalid, info_.name + ": cannot register 0 bytes");
  auto handle =
      device_->register_bytes(bytes.data(), bytes.size(), FI_WRITE | FI_REMOTE_WRITE, dmabuf);
  if (!handle.ok()) return handle.status().with_prefix(info_.name + ": ");
  MemoryRegion region;
  region.bytes = bytes;
  region.local_key = fi_mr_desc(handle.value().get());
  region.remote_key.value = fi_mr_key(handle.value().get());
  region.of_device = dmabuf.given();
  region.remote_base =
      device_->wants(FI_MR_VIRT_ADDR) ? reinterpret_cast<uint64_t>(bytes.data()) : 0;
  region.registration = std::make_shared<Registration>(device_, std::move(handle.value()));
  return region;
}

// --- writes --------------------------------------------------------------------------------------

Status FabricTransport::post_write(const WriteRequest& request) {
  const auto index = static_cast<uint32_t>(request.peer);
  if (index >= peers_.size())
    return {Code::kInvalid, info_.name + ": no peer " + std::to_string(index)};
  Peer& peer = peers_[index];
  if (Status status = check_write(info_, peer, request); !status.ok()) [[unlikely]]
    return status;
  if (free_writes_.empty()) return Status::again();

  Write& write = *free_writes_.back();
  write.peer = index;
  write.remote = peer.remote;
  write.to = {request.remote->base + request.remote_offset, request.num_bytes,
              request.remote->key.value};
  iovec from =
      peers_.empty_bytes();  // a write of nothing comes from somewhere too: EFA asks for it
  void* descriptor = peers_.descriptor();
  if (request.num_bytes > 0) {
    from = {request.local->bytes.data() + request.local_offset, request.num_bytes};
    descriptor = request.local->local_key;
  }
  const bool more = chains_ && request.following > 0 && num_unrung_ + 1 < kChain;
  const uint64_t flags = (request.has_immediate ? FI_REMOTE_CQ_DATA : 0) | (more ? FI_MORE : 0) |
                         (request.num_bytes >= acknowledge_from_ ? FI_DELIVERY_COMPLETE : 0);
  const ssize_t rc = give(write, from, descriptor, flags, request.immediate.bits);  // H3
  if (rc != 0) return on_refused_post(index, rc);
  write.orphaned = false;
  write.id = request.id;
  peer.stuck = false;
  return {};
}

// The last of the free writes to libfabric. 0, or why it stays free.
ssize_t FabricTransport::give(Write& write, const iovec& from, void* descriptor, uint64_t flags,
                              uint32_t data) {
  fi_msg_rma message{};
  message.msg_iov = &from;
  message.desc = &descriptor;
  message.iov_count = 1;
  message.addr = write.remote->second.address;
  message.rma_iov = &write.to;
  message.rma_iov_count = 1;
  message.context = &write.context;
  message.data = data;
  const ssize_t rc = fi_writemsg(endpoint_.get(), &message, flags | FI_COMPLETION);
  if (rc != 0) return rc;
  free_writes_.pop_back();
  write.in_use = true;
  ++write.remote->second.uses;
  ++peers_[write.peer].in_flight;
  unrung_ = flags & FI_MORE ? &write : nullptr;
  num_unrung_ = flags & FI_MORE ? num_unrung_ + 1 : 0;
  return 0;
}

// NOTE [doorbells] After FI_MORE a NIC is not told of a write before a post without it, to any
// peer. The last of those that come together is posted without; where it did not come, or was
// refused, a write of nothing to the last peer takes its place. EFA drops a whole chain, writes
// that were taken already, if its queue overflows within: so there are never more writes and hellos
// under way than the queue holds, and -FI_EAGAIN comes for other reasons only. Only where peers
// share a queue: ofi_rxm has a connection for each, and a post to one need tell nothing of others.
void FabricTransport::ring() {
  if (free_writes_.empty()) add_write();
  Write& bell = *free_writes_.back();
  bell.peer = unrung_->peer;
  bell.remote = unrung_->remote;  // of a peer that may be closed by now
  bell.to = {unrung_->to.addr, 0, unrung_->to.key};
  bell.orphaned = true;  // not to be reported
  if (give(bell, peers_.empty_bytes(), peers_.descriptor(), 0, 0) != 0) bell.orphaned = false;
}

Status FabricTransport::on_refused_post(uint32_t index, ssize_t rc) {
  Peer& peer = peers_[index];
  if (rc != -FI_EAGAIN) return error(info_.name + ": fi_writemsg to " + peer.text, rc);
  if (peer.in_flight > 0) {
    peer.stuck = false;
  } else if (!peer.stuck) {
    peer.stuck = true;
    peer.stuck_since = Clock::now();
  } else if (Clock::now() > peer.stuck_since + kStuckTimeout) {
    const Status lost(Code::kPeerLost,
                      "nothing could be posted for 30 s: it closed its endpoint or does not run");
    peers_.settle(index, Completion::Kind::kPeerLost, lost);
    return lost.with_prefix(info_.name + ": " + peer.text + ": ");
  }
  return Status::again();
}

void FabricTransport::disconnect(PeerId id) noexcept {
  const auto index = static_cast<uint32_t>(id);
  if (index >= peers_.size() || peers_[index].state == Peer::kClosed) return;
  Peer& peer = peers_[index];
  const size_t num_writes = writes_.size();
  for (size_t i = 0; i < num_writes; ++i) {
    Write& write = writes_[i];
    if (!write.in_use || write.orphaned || write.peer != index) continue;
    write.orphaned = true;
    Completion& event = peers_.events.emplace_back();
    event.kind = Completion::Kind::kWriteDone;
    event.peer = id;
    event.id = write.id;
    event.status = {Code::kPeerLost, info_.name + ": " + peer.text +
                                         " was disconnected with a write of " +
                                         std::to_string(write.to.len) + " bytes under way"};
    add_write();  // in its place
  }
  peers_.close(peer);
}

// --- completions ---------------------------------------------------------------------------------

size_t FabricTransport::poll(std::span<Completion> out, bool arm) {
  if (unrung_ != nullptr) ring();
  size_t n = take_events(out, 0);
  for (int attempt = 0; attempt < kArmAttempts; ++attempt) {
    n = read_queue(out, n);
    if (arm || ++polls_ % kPollsPerTend == 0) {
      peers_.tend(Clock::now());
      n = take_events(out, n);
    }
    if (n > 0 || !arm || info_.wait_fd < 0) return n;
    fid* waited[] = {&queue_->fid};
    if (fi_trywait(device_->fabric.get(), waited, 1) == FI_SUCCESS)
      return 0;  // the fd tells from here on
  }
  return n;
}

size_t FabricTransport::take_events(std::span<Completion> out, size_t n) {
  std::vector<Completion>& events = peers_.events;
  while (n < out.size() && events_taken_ < events.size())
    out[n++] = std::move(events[events_taken_++]);
  if (events_taken_ == events.size()) {
    events.clear();
    events_taken_ = 0;
  }
  return n;
}

size_t FabricTransport::read_queue(std::span<Completion> out, size_t n) {
  fi_cq_data_entry entries[kBatch];
  while (n < out.size()) {
    const size_t room = std::min(kBatch, out.size() - n);
    const ssize_t count = fi_cq_read(queue_.get(), entries, room);
    if (count == -FI_EAGAIN || count == 0) {
      peers_.on_queue_empty();
      break;
    }
    if (count == -FI_EAVAIL) {
      if (on_error(out[n])) ++n;
      continue;
    }
    if (count < 0) {
      peers_.lose_all(error("fi_cq_read", count));
      break;
    }
    for (ssize_t i = 0; i < count; ++i) {
      if (on_entry(entries[i], out[n])) ++n;
    }
    if (static_cast<size_t>(count) < room) break;  // to see that it is empty costs a system call
  }
  return n;
}

// True if `out` was filled.
bool FabricTransport::on_entry(const fi_cq_data_entry& entry, Completion& out) {
  if (entry.flags & FI_REMOTE_CQ_DATA) {  // H4
    out = Completion{};
    out.kind = Completion::Kind::kImmediate;
    out.immediate.bits = static_cast<uint32_t>(entry.data);
    return true;
  }
  auto* operation = static_cast<FabricOperation*>(entry.op_context);
  if (operation->kind == FabricOperation::kWrite)
    return finish(static_cast<Write&>(*operation), {}, out);
  auto& message = static_cast<FabricPeers::Message&>(*operation);
  if (message.kind == FabricOperation::kSend) {
    peers_.on_sent(message);
  } else {
    peers_.on_received(message, entry.len);
  }
  return false;
}

bool FabricTransport::finish(Write& write, Status status, Completion& out) {
  --peers_[write.peer].in_flight;
  write.in_use = false;
  if (unrung_ == &write) {  // libfabric rang by itself
    unrung_ = nullptr;
    num_unrung_ = 0;
  }
  const bool report = !write.orphaned;
  if (report) {
    out = Completion{};
    out.kind = Completion::Kind::kWriteDone;
    out.peer = PeerId{write.peer};
    out.id = write.id;
    out.status = std::move(status);
  }
  free_writes_.push_back(&write);
  peers_.release(write.remote);
  return report;
}

bool FabricTransport::owns(const void* context) const {
  return peers_.owns(context) ||
         std::any_of(writes_.begin(), writes_.end(),
                     [context](const Write& write) { return &write == context; });
}

bool FabricTransport::on_error(Completion& out) {
  fi_cq_err_entry entry{};
  if (fi_cq_readerr(queue_.get(), &entry, 0) < 1) return false;
  char buffer[128] = "";
  const char* detail =
      fi_cq_strerror(queue_.get(), entry.prov_errno, entry.err_data, buffer, sizeof buffer);
  const std::string cause = detail && *detail ? std::string("; provider: ") + detail : "";
  if (!owns(entry.op_context)) {  // of the receiving side: a peer's write that was turned away
    const std::string text =
        error(info_.name + ": an incoming request failed", entry.err).text() + cause;
    std::fprintf(stderr, "moe_comm: %s\n", text.c_str());
    return false;
  }
  auto* operation = static_cast<FabricOperation*>(entry.op_context);
  if (operation->kind == FabricOperation::kSend)
    peers_.on_sent(static_cast<FabricPeers::Message&>(*operation));
  if (operation->kind == FabricOperation::kReceive) {
    peers_.on_receive_failed(static_cast<FabricPeers::Message&>(*operation));
  }
  if (operation->kind != FabricOperation::kWrite) return false;

  auto& write = static_cast<Write&>(*operation);
  const Peer& peer = peers_[write.peer];
  Status status = error("write of " + std::to_string(write.to.len) + " bytes", entry.err);
  status = Status(status.code(), status.text() + cause);
  if (!is_local_mistake(entry.err) && peer.state == Peer::kReady) {
    peers_.settle(write.peer, Completion::Kind::kPeerLost, Status(Code::kPeerLost, status.text()));
  }
  return finish(write, status.with_prefix(info_.name + ": " + peer.text + ": "), out);
}

}  // namespace

Result<std::unique_ptr<Transport>> open_fabric(Secret secret, const std::string& provider,
                                               const std::string& interface) {
  const KeepSignals keep;
  std::vector<std::unique_ptr<Transport>> nics;
  for (size_t start = 0; start <= interface.size();) {
    const size_t end = std::min(interface.find('+', start), interface.size());
    auto device = FabricDevice::open(provider, interface.substr(start, end - start));
    start = end + 1;
    if (!device.ok()) return device.status();
    auto transport = std::make_unique<FabricTransport>(secret, std::move(device.value()));
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
    "moe_comm was built without libfabric's headers (1.17 or newer): install them (Debian, Ubuntu: "
    "apt-get install "
    "libfabric-dev) and build moe_comm again";
}  // namespace

Result<std::unique_ptr<Transport>> open_fabric(Secret, const std::string& provider,
                                               const std::string&) {
  return Status(Code::kTransport, "fabric:" + provider + ": " + kMissing);
}

std::vector<TransportReport> probe_fabric() {
  TransportReport report;
  report.name = "fabric";
  report.reason = kMissing;
  return {report};
}

}  // namespace moe_comm

#endif
