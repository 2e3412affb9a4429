#include "fabric_peers.hpp"

#if MOE_COMM_HAVE_FABRIC

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>

namespace moe_comm {
namespace {

using std::chrono::milliseconds;
constexpr auto kConnectTimeout = milliseconds(10'000);  // without an answer: refused
constexpr auto kHelloInterval = milliseconds(500);      // between hellos to a silent peer
constexpr auto kRetryInterval = milliseconds(1);        // after -FI_EAGAIN; doubles up to
constexpr auto kMaxRetryInterval = milliseconds(64);
constexpr auto kWatchInterval = milliseconds(200);  // between looks at the processes of this host
constexpr size_t kNumReceives = 64;                 // hellos
constexpr uint32_t kNoPeer = ~0u;
constexpr size_t kNumSends = FabricPeers::kNumSends;

}  // namespace

enum class HelloKind : uint32_t { kHello = 1, kAccept, kRefuse };

struct FabricHello {
  static constexpr uint64_t kMagic = 0x6d6f6568'65000001;  // "moehe" 1
  uint64_t magic = kMagic;
  Secret secret = 0;   // none in a refusal
  uint64_t nonce = 0;  // chosen by who connects, repeated in the answer
  HelloKind kind = HelloKind::kHello;
  uint32_t peer = 0;  // PeerId at the side that connects
  FabricName from;
};

FabricPeers::FabricPeers(Secret secret, std::shared_ptr<FabricDevice> device,
                         std::string transport_name)
    : PeerTable(std::move(transport_name)), secret_(secret), device_(std::move(device)) {}

FabricPeers::~FabricPeers() = default;

Status FabricPeers::open() {
  fi_av_attr attr{};
  attr.type = FI_AV_TABLE;
  fid_av* av = nullptr;
  if (const int rc = fi_av_open(device_->domain.get(), &attr, &av, nullptr); rc != 0)
    return error("fi_av_open", rc);
  av_.reset(av);
  memory_.resize(kNumReceives + kNumSends);
  if (!device_->wants(FI_MR_LOCAL)) return {};
  auto region = device_->register_bytes(memory_.data(), memory_.size() * sizeof(FabricHello),
                                        FI_SEND | FI_RECV | FI_WRITE);
  if (!region.ok()) return region.status();
  region_ = std::move(region.value());
  return {};
}

Status FabricPeers::start(fid_ep* endpoint) {
  endpoint_ = endpoint;
  size_t length = sizeof own_.bytes;
  if (const int rc = fi_getname(&endpoint->fid, own_.bytes, &length); rc != 0)
    return error("fi_getname", rc);
  own_.num_bytes = static_cast<uint32_t>(length);
  own_.host = host_id();
  own_.pid = getpid();
  device_->provider.copy(own_.provider, sizeof own_.provider - 1);

  unposted_.reserve(kNumReceives);
  for (size_t i = 0; i < memory_.size(); ++i) {
    Message& message = messages_.emplace_back();
    message.body = &memory_[i];
    message.kind = i < kNumReceives ? FabricOperation::kReceive : FabricOperation::kSend;
    if (i < kNumReceives) {
      receive(message);
    } else {
      free_.push_back(&message);
    }
  }
  return {};
}

Address FabricPeers::own_address() const {
  const auto* bytes = reinterpret_cast<const std::byte*>(&own_);
  return Address(bytes, bytes + sizeof own_);
}

iovec FabricPeers::empty_bytes() const { return {const_cast<FabricHello*>(memory_.data()), 0}; }

bool FabricPeers::owns(const void* context) const {
  return std::any_of(messages_.begin(), messages_.end(),
                     [context](const Message& m) { return &m == context; });
}

// --- addresses -----------------------------------------------------------------------------------

Result<FabricPeers::RemoteRef> FabricPeers::use_address(const FabricName& name) {
  auto [remote, is_new] = remotes_.try_emplace(std::string(name.bytes, name.num_bytes));
  if (is_new) {
    const int count = fi_av_insert(av_.get(), name.bytes, 1, &remote->second.address, 0, nullptr);
    if (count != 1) {
      remotes_.erase(remote);
      return error("fi_av_insert", count < 0 ? count : -FI_EINVAL);
    }
    char text[256] = "";
    size_t length = sizeof text;
    fi_av_straddr(av_.get(), name.bytes, text, &length);
    remote->second.text = text;
  }
  ++remote->second.uses;
  return remote;
}

void FabricPeers::release(RemoteRef remote) {
  if (--remote->second.uses > 0 || remote->second.accepted) return;
  fi_av_remove(av_.get(), &remote->second.address, 1, 0);
  remotes_.erase(remote);
}

// --- as the side that connects -------------------------------------------------------------------

Result<PeerId> FabricPeers::connect(const Address& address) {
  FabricName name;
  if (address.size() != sizeof name) {
    return Status(Code::kInvalid, name_ + ": address: expected " + std::to_string(sizeof name) +
                                      " bytes, got " + std::to_string(address.size()));
  }
  std::memcpy(&name, address.data(), sizeof name);
  name.provider[sizeof name.provider - 1] = '\0';
  const bool is_name = name.magic == FabricName::kMagic && name.num_bytes <= sizeof name.bytes;
  if (!is_name || device_->provider != name.provider) {
    return Status(Code::kInvalid, name_ + ": address: expected one of provider " +
                                      device_->provider + ", got " +
                                      (is_name ? name.provider : "other bytes"));
  }
  auto remote = use_address(name);
  if (!remote.ok()) return remote.status().with_prefix(name_ + ": ");

  Peer& peer = add(remote.value()->second.text + ", process " + std::to_string(name.pid));
  peer.remote = remote.value();
  const auto index = static_cast<uint32_t>(peers_.size() - 1);
  watch(index, name.host, name.pid);
  next_tend_ = {};
  tend(Clock::now());
  return PeerId{index};
}

void FabricPeers::close(Peer& peer) {
  std::erase_if(connecting_, [&](uint32_t index) { return &peers_[index] == &peer; });
  peer.state = Peer::kClosed;
  peer.watch.reset();
  release(peer.remote);
}

void FabricPeers::on_answer(const FabricHello& hello) {
  if (hello.peer >= peers_.size()) return;
  const Peer& peer = peers_[hello.peer];
  if (peer.state != Peer::kConnecting || peer.nonce != hello.nonce) return;  // late or repeated
  if (hello.kind == HelloKind::kRefuse) {
    refuse(hello.peer);
  } else if (hello.kind == HelloKind::kAccept && hello.secret == secret_) {
    settle(hello.peer, Completion::Kind::kPeerReady, {});
  }
}

// --- as the side that is connected to ------------------------------------------------------------

void FabricPeers::on_hello(const FabricHello& hello) {
  if (hello.from.magic != FabricName::kMagic || hello.from.num_bytes > sizeof hello.from.bytes)
    return;
  auto remote = use_address(hello.from);
  if (!remote.ok()) return;  // it asks again, until its deadline
  FabricHello answer;
  answer.nonce = hello.nonce;
  answer.peer = hello.peer;
  answer.kind = HelloKind::kRefuse;
  if (hello.secret == secret_) {
    answer.kind = HelloKind::kAccept;
    answer.secret = secret_;
    remote.value()->second.accepted = true;
  }
  send_hello(answer, remote.value(), kNoPeer);
  release(remote.value());
}

// --- messages ------------------------------------------------------------------------------------

void FabricPeers::send_hello(const FabricHello& hello, RemoteRef remote, uint32_t peer) {
  if (free_.empty()) return;  // hellos are repeated, and so are their answers
  Message& message = *free_.back();
  free_.pop_back();
  *message.body = hello;
  message.body->from = own_;
  message.remote = remote;
  message.peer = peer;
  message.deadline = Clock::now() + kConnectTimeout;
  message.pause = kRetryInterval;
  ++remote->second.uses;
  if (peer != kNoPeer) peers_[peer].hello_sent = true;
  send(message);
}

void FabricPeers::send(Message& message) {
  const ssize_t rc = fi_send(endpoint_, message.body, sizeof(FabricHello), descriptor(),
                             message.remote->second.address, &message.context);
  if (rc == -FI_EAGAIN) {
    message.retry = Clock::now() + message.pause;
    message.pause = std::min<Clock::duration>(2 * message.pause, kMaxRetryInterval);
    unsent_.push_back(&message);
  } else if (rc != 0) {
    on_sent(message);
  }
}

void FabricPeers::on_sent(Message& message) {
  if (message.peer != kNoPeer) {
    peers_[message.peer].hello_sent = false;
    peers_[message.peer].next_hello = Clock::now() + kHelloInterval;
  }
  release(message.remote);
  free_.push_back(&message);
}

void FabricPeers::receive(Message& message) {
  const ssize_t rc = fi_recv(endpoint_, message.body, sizeof(FabricHello), descriptor(),
                             FI_ADDR_UNSPEC, &message.context);
  if (rc != 0) unposted_.push_back(&message);
}

void FabricPeers::on_received(Message& message, size_t num_bytes) {
  const FabricHello hello = *message.body;
  receive(message);
  if (num_bytes != sizeof hello || hello.magic != FabricHello::kMagic)
    return;  // of another program
  if (hello.kind == HelloKind::kHello) {
    on_hello(hello);
  } else {
    on_answer(hello);
  }
}

void FabricPeers::retry_messages(Clock::time_point now) {
  std::vector<Message*> retry;
  retry.swap(unsent_);
  for (Message* message : retry) {
    const bool wanted =
        message->peer == kNoPeer || peers_[message->peer].state == Peer::kConnecting;
    if (!wanted || now > message->deadline) {
      on_sent(*message);
    } else if (now < message->retry) {
      unsent_.push_back(message);
    } else {
      send(*message);
    }
  }
  retry.clear();
  retry.swap(unposted_);
  for (Message* message : retry) receive(*message);
}

void FabricPeers::tend(Clock::time_point now) {
  if (now < next_tend_) return;
  if (!unsent_.empty() || !unposted_.empty()) retry_messages(now);
  const std::vector<uint32_t> connecting = connecting_;
  for (uint32_t index : connecting) {
    Peer& peer = peers_[index];
    if (now > peer.started + kConnectTimeout) {
      settle(index, Completion::Kind::kPeerRefused, {Code::kPeerTimeout, "no answer within 10 s"});
    } else if (!peer.hello_sent && now >= peer.next_hello) {
      FabricHello hello;
      hello.secret = secret_;
      hello.nonce = peer.nonce;
      hello.peer = index;
      send_hello(hello, peer.remote, index);
    }
  }
  look_at_processes();
  const bool busy = !connecting_.empty() || !unsent_.empty() || !unposted_.empty();
  next_tend_ = now + (busy ? kRetryInterval : kWatchInterval);
}

}  // namespace moe_comm

#endif
