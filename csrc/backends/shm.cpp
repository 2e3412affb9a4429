// The shm backend: ranks of one host write into each other's memory through the kernel's page
// cache. Always there.
//
// An endpoint is one memfd segment with a table of hellos (one slot for each peer that writes to
// us) and, for each slot, a single-producer ring of immediates. post_write copies the bytes itself
// (memcpy into a mapped segment, or process_vm_writev into memory that is no segment) and then
// pushes the immediate, so H4 is a release store. A bitmap tells the reader which rings to look at,
// a pipe (opened by peers through /proc/PID/fd) wakes it. A peer killed at any instruction leaves
// at most one claimed slot in our table and nothing else.
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <map>

#include "../transport.hpp"
#include "../wait.hpp"

namespace moe_comm {
namespace {

constexpr uint64_t kMagic = 0x6d6f65636f6d6d01;  // "moecomm" 1
constexpr uint32_t kMaxPeers = 1024;
constexpr uint32_t kRingSlots = 1024;
constexpr double kConnectTimeout = 10.0;    // seconds until an unanswered hello is a refusal
constexpr double kLivenessInterval = 0.05;  // seconds between looks at the peers' processes
constexpr size_t kVmChunk = 1u << 20;       // bytes per process_vm_writev: a post stays short

enum HelloState : uint32_t { kFree = 0, kClaimed, kAsking, kAccepted, kRefused, kGone };

struct EndpointName {
  SegmentName segment;
  int64_t pipe_fd = -1;
};

struct Hello {
  alignas(64) uint32_t state;
  EndpointName from;
  Secret secret;
};

struct ImmediateRing {  // producer: the peer of this slot; consumer: the owner of the segment
  alignas(64) uint64_t pushed;
  alignas(64) uint64_t taken;
  alignas(64) uint32_t entries[kRingSlots];
};

struct Endpoint {  // at offset 0 of the segment
  uint64_t magic;
  alignas(64) uint32_t sleeping;
  alignas(64) uint32_t closed;
  alignas(64) uint32_t new_hellos;  // count; the owner scans the table when it changed
  alignas(64) uint64_t ready[kMaxPeers / 64];
  Hello hellos[kMaxPeers];
  ImmediateRing rings[kMaxPeers];
};

// Completions until they are polled. Its memory is used again: polling allocates nothing.
class Queue {
 public:
  bool empty() const { return first_ == items_.size(); }
  size_t size() const { return items_.size() - first_; }
  void push_back(Completion item) { items_.push_back(std::move(item)); }
  Completion take() {
    Completion item = std::move(items_[first_++]);
    if (first_ > items_.size() / 2) {  // each item is moved once at most, on the average
      items_.erase(items_.begin(), items_.begin() + static_cast<ptrdiff_t>(first_));
      first_ = 0;
    }
    return item;
  }

 private:
  std::vector<Completion> items_;
  size_t first_ = 0;
};

template <typename T>
std::atomic_ref<T> at(T& value) {
  return std::atomic_ref<T>(value);
}

void write_byte(int fd) {
  const char byte = 0;
  [[maybe_unused]] const ssize_t ignored =
      ::write(fd, &byte, 1);  // full pipe: the reader will wake anyway
}

void wake(Endpoint& endpoint, int pipe_fd) {
  std::atomic_thread_fence(std::memory_order_seq_cst);  // pairs with the fence of arm()
  if (at(endpoint.sleeping).load(std::memory_order_relaxed)) write_byte(pipe_fd);
}

FileDescriptor open_pipe_of(const EndpointName& name) {
  const std::string path =
      "/proc/" + std::to_string(name.segment.pid) + "/fd/" + std::to_string(name.pipe_fd);
  return FileDescriptor(::open(path.c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC));
}

// How a region travels: MemoryRegion::extra = {segment?, pid, fd, inode, segment bytes}; key = a
// check over them.
uint64_t key_of(uint64_t base, uint64_t num_bytes, const std::vector<uint64_t>& extra) {
  uint64_t hash = 0xcbf29ce484222325;
  auto mix = [&hash](uint64_t v) { hash = (hash ^ v) * 0x100000001b3; };
  mix(base), mix(num_bytes);
  for (uint64_t v : extra) mix(v);
  return hash;
}

class ShmTransport final : public Transport {
 public:
  static Result<std::unique_ptr<Transport>> open(Secret secret) {
    auto self = std::unique_ptr<ShmTransport>(new ShmTransport);
    auto segment = SharedSegment::create("moe_comm:endpoint", sizeof(Endpoint));
    if (!segment.ok()) return segment.status();
    self->segment_ = std::move(segment.value());
    int fds[2];
    if (pipe2(fds, O_NONBLOCK | O_CLOEXEC) != 0) return Status::from_errno("pipe2");
    self->pipe_read_.reset(fds[0]);
    self->pipe_write_.reset(fds[1]);
    self->secret_ = secret;
    self->mine().magic = kMagic;
    const EndpointName name{self->segment_.name(), fds[1]};
    self->info_.name = "shm";
    self->info_.address.resize(sizeof name);
    std::memcpy(self->info_.address.data(), &name, sizeof name);
    self->info_.capabilities = {.max_message_bytes = 1u << 30,
                                .queue_depth = kRingSlots,
                                .writes_local_memory_unregistered = true};
    self->info_.wait_fd = fds[0];
    return std::unique_ptr<Transport>(std::move(self));
  }

  ~ShmTransport() override {
    at(mine().closed).store(1, std::memory_order_release);
    for (uint32_t i = 0; i < peers_.size(); ++i) leave(peers_[i]);
  }

  const Info& info() const override { return info_; }

  Result<MemoryRegion> register_memory(std::span<std::byte> bytes, DmaBuf dmabuf) override {
    if (dmabuf.given()) return Status(Code::kInvalid, "shm registers host memory only");
    MemoryRegion region;
    region.bytes = bytes;
    if (auto slice = find_segment(bytes); slice.ok()) {
      const SegmentName& n = slice.value().name;
      region.remote_base = slice.value().offset;
      region.extra = {1, static_cast<uint64_t>(n.pid), static_cast<uint64_t>(n.fd), n.inode,
                      n.num_bytes};
    } else {
      // Peers write here by process_vm_writev, which Yama allows between unrelated processes only
      // on our say-so.
      prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
      region.remote_base = reinterpret_cast<uint64_t>(bytes.data());
      region.extra = {0, static_cast<uint64_t>(getpid()), 0, 0, 0};
    }
    region.remote_key.value = key_of(region.remote_base, bytes.size(), region.extra);
    return region;
  }

  Result<PeerId> connect(const Address& address) override {
    EndpointName name;
    if (address.size() != sizeof name) return Status(Code::kInvalid, "shm address: wrong length");
    std::memcpy(&name, address.data(), sizeof name);
    const PeerId id{static_cast<uint32_t>(peers_.size())};
    peers_.emplace_back();
    Peer& peer = peers_.back();
    peer.started = Clock::now();
    if (Status status = say_hello(peer, name); !status.ok()) refuse(id, std::move(status));
    return id;
  }

  void disconnect(PeerId id) noexcept override {
    Peer& peer = peers_[static_cast<uint32_t>(id)];
    leave(peer);
    peer = Peer{};  // unmaps; the id stays taken
    peer.state = Peer::kDropped;
  }

  Status post_write(const WriteRequest& request) override {
    Peer& peer = peers_[static_cast<uint32_t>(request.peer)];
    if (peer.state == Peer::kEnded) return Status::again();  // poll() will say that it is lost
    if (peer.state != Peer::kReady)
      return {Code::kPeerLost, "write to a peer that is not connected"};
    Endpoint& endpoint = *reinterpret_cast<Endpoint*>(peer.endpoint.data());
    if (at(endpoint.closed).load(std::memory_order_acquire)) return Status::again();  // so here
    ImmediateRing& ring = endpoint.rings[peer.slot];
    const uint64_t pushed = at(ring.pushed).load(std::memory_order_relaxed);
    if (done_.size() >= kRingSlots ||
        pushed - at(ring.taken).load(std::memory_order_acquire) >= kRingSlots) {
      return Status::again();
    }
    if (Status status = copy(peer, request); !status.ok()) return status;
    if (request.has_immediate) {
      at(ring.entries[pushed % kRingSlots])
          .store(request.immediate.bits, std::memory_order_relaxed);
      at(ring.pushed).store(pushed + 1, std::memory_order_release);  // H4: after the bytes
      at(endpoint.ready[peer.slot / 64])
          .fetch_or(1ull << (peer.slot % 64), std::memory_order_release);
      wake(endpoint, peer.pipe.get());
    }
    Completion done;
    done.kind = Completion::Kind::kWriteDone;
    done.peer = request.peer;
    done.id = request.id;
    done_.push_back(std::move(done));
    return {};
  }

  size_t poll(std::span<Completion> out, bool arm) override {
    Endpoint& endpoint = mine();
    if (arm) {
      at(endpoint.sleeping).store(1, std::memory_order_relaxed);
      std::atomic_thread_fence(std::memory_order_seq_cst);
      armed_ = true;
    } else if (armed_) {
      at(endpoint.sleeping).store(0, std::memory_order_relaxed);
      char sink[64];
      while (::read(pipe_read_.get(), sink, sizeof sink) == static_cast<ssize_t>(sizeof sink)) {
      }
      armed_ = false;
    }
    size_t n = take_done(out);
    answer_hellos();
    if (seconds_since(last_liveness_) > kLivenessInterval) watch_processes();
    n += take_immediates(out.subspan(n));
    if (n < out.size()) report_lost();
    if (pending_hellos_ > 0) watch_hellos();
    return n + take_done(out.subspan(n));  // what was just seen: the caller may be about to sleep
  }

 private:
  struct Peer {
    enum State { kConnecting, kReady, kEnded, kDropped } state = kConnecting;
    SharedSegment endpoint;
    FileDescriptor pipe;
    ProcessWatch process;
    uint32_t slot = 0;
    bool has_slot = false;
    Clock::time_point started;
    std::map<uint64_t, SharedSegment> segments;  // by inode: what we write into
  };

  Endpoint& mine() { return *reinterpret_cast<Endpoint*>(segment_.data()); }

  Status say_hello(Peer& peer, const EndpointName& name) {
    auto segment = SharedSegment::open(name.segment);
    if (!segment.ok()) return segment.status();
    if (segment.value().bytes().size() < sizeof(Endpoint))
      return {Code::kTransport, "not an endpoint"};
    peer.endpoint = std::move(segment.value());
    auto watch = ProcessWatch::open(name.segment.pid);
    if (!watch.ok()) return watch.status();
    peer.process = std::move(watch.value());
    peer.pipe = open_pipe_of(name);
    if (peer.pipe.get() < 0) return Status::from_errno("open of the peer's wake-up pipe");
    Endpoint& endpoint = *reinterpret_cast<Endpoint*>(peer.endpoint.data());
    if (endpoint.magic != kMagic)
      return {Code::kTransport, "the peer speaks another version of moe_comm"};
    for (uint32_t i = 0; i < kMaxPeers; ++i) {
      uint32_t expected = kFree;
      if (!at(endpoint.hellos[i].state).compare_exchange_strong(expected, kClaimed)) continue;
      endpoint.hellos[i].from = {segment_.name(), pipe_write_.get()};
      endpoint.hellos[i].secret = secret_;
      peer.slot = i;
      peer.has_slot = true;
      at(endpoint.hellos[i].state).store(kAsking, std::memory_order_release);
      at(endpoint.new_hellos).fetch_add(1, std::memory_order_release);
      wake(endpoint, peer.pipe.get());
      ++pending_hellos_;
      return {};
    }
    return {Code::kTransport,
            "the peer has no free slot: " + std::to_string(kMaxPeers) + " writers already"};
  }

  void refuse(PeerId id, Status status) {
    peers_[static_cast<uint32_t>(id)].state = Peer::kDropped;
    Completion c;
    c.kind = Completion::Kind::kPeerRefused;
    c.peer = id;
    c.status = std::move(status);
    done_.push_back(std::move(c));
  }

  void leave(Peer& peer) {
    if (!peer.has_slot) return;
    if (peer.state == Peer::kConnecting) --pending_hellos_;
    Endpoint& endpoint = *reinterpret_cast<Endpoint*>(peer.endpoint.data());
    at(endpoint.hellos[peer.slot].state).store(kGone, std::memory_order_release);
    at(endpoint.new_hellos).fetch_add(1, std::memory_order_release);
    peer.has_slot = false;
  }

  size_t take_done(std::span<Completion> out) {
    size_t n = 0;
    while (n < out.size() && !done_.empty()) {
      out[n++] = done_.take();
    }
    return n;
  }

  // As the owner of the table: admit who knows the secret, free the slots of who left.
  void answer_hellos() {
    Endpoint& endpoint = mine();
    const uint32_t seen = at(endpoint.new_hellos).load(std::memory_order_acquire);
    if (seen == seen_hellos_) return;
    seen_hellos_ = seen;
    for (uint32_t i = 0; i < kMaxPeers; ++i) {
      Hello& hello = endpoint.hellos[i];
      const uint32_t state = at(hello.state).load(std::memory_order_acquire);
      if (state == kAsking) {
        const bool admitted = hello.secret == secret_;
        endpoint.rings[i].pushed = endpoint.rings[i].taken = 0;
        at(hello.state).store(admitted ? kAccepted : kRefused, std::memory_order_release);
        num_slots_ = std::max(num_slots_, i + 1);
        if (FileDescriptor pipe = open_pipe_of(hello.from); pipe.get() >= 0) write_byte(pipe.get());
      } else if (state == kGone && at(endpoint.rings[i].pushed).load(std::memory_order_acquire) ==
                                       endpoint.rings[i].taken) {
        at(hello.state).store(kFree, std::memory_order_release);
      }
    }
  }

  size_t take_immediates(std::span<Completion> out) {
    Endpoint& endpoint = mine();
    size_t n = 0;
    for (uint32_t w = 0; w < (num_slots_ + 63) / 64 && n < out.size(); ++w) {
      if (at(endpoint.ready[w]).load(std::memory_order_relaxed) == 0) continue;
      uint64_t bits = at(endpoint.ready[w]).exchange(0, std::memory_order_acquire);
      for (; bits != 0; bits &= bits - 1) {
        const uint32_t slot = w * 64 + static_cast<uint32_t>(__builtin_ctzll(bits));
        ImmediateRing& ring = endpoint.rings[slot];
        const uint32_t state = at(endpoint.hellos[slot].state).load(std::memory_order_acquire);
        uint64_t taken = ring.taken;
        const uint64_t pushed = at(ring.pushed).load(std::memory_order_acquire);
        for (; taken < pushed && n < out.size(); ++taken) {
          if (state != kAccepted && state != kGone) continue;  // not admitted: nothing counts
          Completion& c = out[n++];
          c = Completion{};
          c.kind = Completion::Kind::kImmediate;
          c.immediate.bits = at(ring.entries[taken % kRingSlots]).load(std::memory_order_relaxed);
        }
        at(ring.taken).store(taken, std::memory_order_release);
        if (taken < pushed)
          at(endpoint.ready[w]).fetch_or(1ull << (slot % 64), std::memory_order_relaxed);
        if (state == kGone) seen_hellos_ = ~at(endpoint.new_hellos).load(std::memory_order_relaxed);
      }
    }
    return n;
  }

  void watch_hellos() {
    for (uint32_t i = 0; i < peers_.size(); ++i) {
      Peer& peer = peers_[i];
      if (peer.state != Peer::kConnecting || !peer.has_slot) continue;
      Endpoint& endpoint = *reinterpret_cast<Endpoint*>(peer.endpoint.data());
      const uint32_t state = at(endpoint.hellos[peer.slot].state).load(std::memory_order_acquire);
      if (state == kAccepted) {
        --pending_hellos_;
        peer.state = Peer::kReady;
        Completion c;
        c.kind = Completion::Kind::kPeerReady;
        c.peer = PeerId{i};
        done_.push_back(std::move(c));
      } else if (state == kRefused) {
        leave(peer);
        refuse(PeerId{i},
               {Code::kMismatch, "the peer refused: it does not share this group's secret"});
      } else if (seconds_since(peer.started) > kConnectTimeout || peer.process.ended()) {
        leave(peer);
        refuse(PeerId{i},
               {Code::kTransport, peer.process.ended() ? "the peer's process ended"
                                                       : "no answer from the peer for 10 s"});
      }
    }
  }

  void watch_processes() {
    last_liveness_ = Clock::now();
    for (uint32_t i = 0; i < peers_.size(); ++i) {
      Peer& peer = peers_[i];
      if (peer.state != Peer::kReady) continue;
      const bool closed = at(reinterpret_cast<Endpoint*>(peer.endpoint.data())->closed)
                              .load(std::memory_order_acquire) != 0;
      if (!closed && !peer.process.ended()) continue;
      peer.state = Peer::kEnded;
      Completion& c = lost_.emplace_back();
      c.kind = Completion::Kind::kPeerLost;
      c.peer = PeerId{i};
      c.status = {Code::kPeerLost,
                  closed ? "the peer closed its endpoint"
                         : "process " + std::to_string(peer.endpoint.name().pid) + " ended"};
    }
  }

  // Once no immediate is left to take: what those peers wrote before they ended has been told.
  void report_lost() {
    for (Completion& c : lost_) {
      Peer& peer = peers_[static_cast<uint32_t>(c.peer)];
      if (peer.state != Peer::kEnded) continue;  // disconnected meanwhile
      peer.state = Peer::kDropped;
      done_.push_back(std::move(c));
    }
    lost_.clear();
  }

  Status copy(Peer& peer, const WriteRequest& request) {
    if (request.num_bytes == 0) return {};
    const RemoteRegion& remote = *request.remote;
    const auto outside = [&](uint64_t offset,
                             uint64_t size) {  // without a sum that could pass 2^64
      return request.num_bytes > size || offset > size - request.num_bytes;
    };
    if (outside(request.remote_offset, remote.num_bytes) ||
        outside(request.local_offset, request.local->bytes.size())) {
      return {Code::kInvalid, "write outside its region: offset " +
                                  std::to_string(request.remote_offset) + " + " +
                                  std::to_string(request.num_bytes) + " bytes of " +
                                  std::to_string(remote.num_bytes)};
    }
    if (remote.extra.size() != 5 ||
        remote.key.value != key_of(remote.base, remote.num_bytes, remote.extra)) {
      return {Code::kTransport, "remote key does not fit its region"};
    }
    const std::byte* from = request.local->bytes.data() + request.local_offset;
    if (remote.extra[0] == 0)
      return copy_by_kernel(remote, request.remote_offset, from, request.num_bytes);
    auto found = peer.segments.find(remote.extra[3]);
    if (found == peer.segments.end()) {
      auto segment = SharedSegment::open({static_cast<int64_t>(remote.extra[1]),
                                          static_cast<int64_t>(remote.extra[2]), remote.extra[3],
                                          remote.extra[4]});
      if (!segment.ok()) return segment.status();
      found = peer.segments.emplace(remote.extra[3], std::move(segment.value())).first;
    }
    std::memcpy(found->second.data() + remote.base + request.remote_offset, from,
                request.num_bytes);
    return {};
  }

  static Status copy_by_kernel(const RemoteRegion& remote, uint64_t offset, const std::byte* from,
                               uint64_t num_bytes) {
    for (uint64_t done = 0; done < num_bytes;) {
      const size_t length = std::min<uint64_t>(kVmChunk, num_bytes - done);
      iovec local{const_cast<std::byte*>(from + done), length};
      iovec there{reinterpret_cast<void*>(remote.base + offset + done), length};
      const ssize_t n =
          process_vm_writev(static_cast<pid_t>(remote.extra[1]), &local, 1, &there, 1, 0);
      if (n <= 0) {
        Status status = Status::from_errno("process_vm_writev");
        if (errno != EPERM) return status;
        return status.with_prefix(
            "this machine forbids writing another process's private memory (ptrace rules); "
            "register memory made by TransferEngine.empty() instead: ");
      }
      done += static_cast<uint64_t>(n);
    }
    return {};
  }

  Info info_;
  Secret secret_ = 0;
  SharedSegment segment_;
  FileDescriptor pipe_read_, pipe_write_;
  std::deque<Peer> peers_;
  Queue done_;
  std::vector<Completion> lost_;  // peers that ended, not yet reported
  uint32_t seen_hellos_ = 0, num_slots_ = 0, pending_hellos_ = 0;
  bool armed_ = false;
  Clock::time_point last_liveness_ = Clock::now();
};

}  // namespace

Result<std::unique_ptr<Transport>> open_shm(Secret secret) { return ShmTransport::open(secret); }

TransportReport probe_shm() {
  TransportReport report{.name = "shm", .available = false, .detail = "", .reason = ""};
  auto segment = SharedSegment::create("moe_comm:probe", 4096);
  if (!segment.ok()) {
    report.reason = segment.status().text() + ": needs Linux with memfd_create";
  } else if (auto again = SharedSegment::open(segment.value().name()); !again.ok()) {
    report.reason = again.status().text() + ": needs /proc mounted";
  } else {
    report.available = true;
    report.detail = "memfd segments, no size limit but memory";
  }
  return report;
}

}  // namespace moe_comm
