// A libfabric that is EFA in what it allows, over tcp on the loopback: what a program may not do on
// EFA ends it here, and what EFA may do (reorder, refuse for a while) it does, from a seed.
//
//   MOE_COMM_LIBFABRIC=libefa_rules.so   instead of libfabric.so.1; its only provider is "efa"
//   EFA_RULES_NICS=rdmap0s6,rdmap1s6     its devices (default: the first of these)
//   EFA_RULES_SEED=7                     of all random choices
//   EFA_RULES_REFUSE=4                   one post in so many is refused for a while; 0: none
//   EFA_RULES_COUNTS=FILE                a line of counts for each endpoint that is closed
//
// Facts, from the provider's sources and manual (fabric "efa-direct" of libfabric 2, the
// strictest):
// - FI_MSG and FI_RMA; no atomics, no ordering of any kind, immediates of 32 bits, no fence, no
//   inject of data (inline size 0), FI_CONTEXT2 and FI_MR_LOCAL required, one local and one remote
//   piece for each write, messages of at most one packet (8 KiB).
// - FI_MR_VIRT_ADDR, FI_MR_ALLOCATED, FI_MR_PROV_KEY: the provider chooses keys.
// - FI_DELIVERY_COMPLETE exists on fabric "efa" only, by an emulation that the peer must know.
// - FI_MORE: the device is not told (no doorbell) before a post without it, of any kind, to any
//   peer. Older versions have no wait objects.
// Stricter than EFA: keys have their two highest bits set, a write of nothing needs a real address
// and key (EFA's device looks at them, tcp does not always).
//
// Each object of libfabric is one of ours, in front of tcp's. A write is copied and held for a
// random number of fi_cq_read calls, then given to tcp in random order. Completions are handed out
// in random order; but -FI_EAGAIN from fi_cq_read means that the queue is empty.
#include <dlfcn.h>
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <rdma/fi_tagged.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kQueueSize = 128;
constexpr size_t kMaxWriteBytes = 8 << 20, kMaxSendBytes = 8 << 10;
constexpr size_t kAddressBytes = 32;
constexpr uint64_t kMrMode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
constexpr uint64_t kCaps = FI_MSG | FI_RMA | FI_SEND | FI_RECV | FI_READ | FI_WRITE |
                           FI_REMOTE_READ | FI_REMOTE_WRITE | FI_SOURCE | FI_LOCAL_COMM |
                           FI_REMOTE_COMM | FI_HMEM;
constexpr uint64_t kWriteFlags = FI_COMPLETION | FI_REMOTE_CQ_DATA | FI_MORE | FI_TRANSMIT_COMPLETE;
constexpr uint64_t kFirstAddress = 4096;
constexpr uint64_t kKeyBits = uint64_t{3} << 62;         // set in every key
constexpr auto kUnresponsive = std::chrono::seconds(3);  // tcp takes nothing: the peer is gone
constexpr char kMagic[8] = "efarule";

[[noreturn]] void broken(const std::string& rule) {
  std::fprintf(stderr, "efa_rules: broken: %s\n", rule.c_str());
  abort();
}
void expect(bool kept, const std::string& rule) {
  if (!kept) broken(rule);
}

template <size_t N>
struct Name {
  char text[N];
  constexpr Name(const char (&literal)[N]) { std::copy_n(literal, N, text); }  // NOLINT
};
template <Name kName, typename R, typename... A>
R refused(A...) {
  broken(std::string(kName.text) + ": EFA has no such thing, or nobody should need it");
}

struct Real {  // libfabric
  decltype(&::fi_getinfo) get_info;
  decltype(&::fi_freeinfo) free_info;
  decltype(&::fi_dupinfo) dup_info;
  decltype(&::fi_fabric) open_fabric;
  decltype(&::fi_strerror) error_text;
  decltype(&::fi_version) version;
  fi_info* info = nullptr;  // tcp on the loopback
};

Real& real() {
  static Real library = [] {
    Real found{};
    void* handle = dlopen("libfabric.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    expect(handle != nullptr, "dlopen of the real libfabric");
    auto find = [&](const char* name, auto& function) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
      expect(function != nullptr, name);
    };
    find("fi_getinfo", found.get_info);
    find("fi_freeinfo", found.free_info);
    find("fi_dupinfo", found.dup_info);
    find("fi_fabric", found.open_fabric);
    find("fi_strerror", found.error_text);
    find("fi_version", found.version);
    return found;
  }();
  return library;
}

std::mt19937_64& dice() {
  static std::mt19937_64 generator = [] {
    const char* seed = getenv("EFA_RULES_SEED");
    return std::mt19937_64((seed ? strtoull(seed, nullptr, 10) : 7) +
                           static_cast<uint64_t>(getpid()));
  }();
  return generator;
}
// Does the queue say "again" this time?
bool refuses() {
  const char* text = getenv("EFA_RULES_REFUSE");
  const uint64_t one_in = text ? strtoull(text, nullptr, 10) : 4;
  return one_in > 0 && dice()() % one_in == 0;
}

// --- regions -------------------------------------------------------------------------------------

struct Domain;

struct Region {
  fid_mr outer{};
  fid_mr* inner = nullptr;
  Domain* domain = nullptr;
  uint64_t base = 0, num_bytes = 0, access = 0;
};

struct Domain {
  fid_domain outer{};
  fid_domain* inner = nullptr;
  std::mutex mutex;  // regions are released on any thread
  std::set<const Region*> regions;

  // Is this memory registered, and is `descriptor` its region's?
  bool covers(const void* descriptor, const void* data, size_t num_bytes, uint64_t access) {
    std::lock_guard lock(mutex);
    const auto* region = static_cast<const Region*>(descriptor);
    if (!regions.contains(region)) return false;
    const auto address = reinterpret_cast<uint64_t>(data);
    return (region->access & access) != 0 && address >= region->base &&
           num_bytes <= region->num_bytes &&
           address - region->base <= region->num_bytes - num_bytes;
  }
};

int close_region(fid* handle) {
  auto* region = reinterpret_cast<Region*>(handle);
  {
    std::lock_guard lock(region->domain->mutex);
    region->domain->regions.erase(region);
  }
  const int rc = fi_close(&region->inner->fid);
  delete region;
  return rc;
}

int register_bytes(fid* handle, const void* data, size_t num_bytes, uint64_t access,
                   uint64_t offset, uint64_t, uint64_t flags, fid_mr** out, void* context) {
  auto* domain = reinterpret_cast<Domain*>(handle);
  expect(offset == 0 && flags == 0, "fi_mr_reg: offset and flags are 0");
  expect(num_bytes > 0, "fi_mr_reg of 0 bytes");
  auto region = std::make_unique<Region>();
  const auto base = reinterpret_cast<uint64_t>(data);
  uint64_t key = 0;
  int rc = -FI_ENOKEY;
  while (rc == -FI_ENOKEY) {
    key = dice()() & ~kKeyBits;
    // tcp names bytes by their place in the region, EFA by their address: so all below belong to
    // tcp's region too. What it finds out is the key and the end.
    rc = fi_mr_reg(domain->inner, reinterpret_cast<void*>(kFirstAddress),
                   base + num_bytes - kFirstAddress, access, 0, key, 0, &region->inner, context);
  }
  if (rc != 0) return rc;
  static fi_ops ops{
      sizeof ops, close_region, refused<"fi_mr_bind">, refused<"fi_mr control">, nullptr,
      nullptr,    nullptr};
  region->outer.fid = {FI_CLASS_MR, context, &ops};
  region->outer.key = key | kKeyBits;
  region->outer.mem_desc = region.get();
  region->domain = domain;
  region->base = base;
  region->num_bytes = num_bytes;
  region->access = access;
  std::lock_guard lock(domain->mutex);
  domain->regions.insert(region.get());
  *out = &region.release()->outer;
  return 0;
}

// --- addresses -----------------------------------------------------------------------------------

struct Addresses {
  fid_av outer{};
  fid_av* inner = nullptr;
  std::map<fi_addr_t, fi_addr_t> inner_of;
  std::map<fi_addr_t, uint32_t> uses;  // by writes and messages under way
  fi_addr_t next = 1'000'003;          // no index, and never one that was removed
};

int insert_addresses(fid_av* handle, const void* names, size_t count, fi_addr_t* out,
                     uint64_t flags, void* context) {
  auto* av = reinterpret_cast<Addresses*>(handle);
  expect(count == 1 && flags == 0, "fi_av_insert of one address, flags 0");
  const auto* name = static_cast<const char*>(names);
  if (std::memcmp(name, kMagic, sizeof kMagic) != 0) return -FI_EADDRNOTAVAIL;
  fi_addr_t inner = 0;
  const int rc = fi_av_insert(av->inner, name + sizeof kMagic, 1, &inner, 0, context);
  if (rc != 1) return rc;
  av->inner_of[*out = av->next++] = inner;
  return 1;
}

int remove_addresses(fid_av* handle, fi_addr_t* addresses, size_t count, uint64_t flags) {
  auto* av = reinterpret_cast<Addresses*>(handle);
  expect(count == 1 && flags == 0, "fi_av_remove of one address, flags 0");
  expect(av->uses[addresses[0]] == 0, "fi_av_remove with requests to that address under way");
  auto found = av->inner_of.find(addresses[0]);
  expect(found != av->inner_of.end(), "fi_av_remove of an address that was not inserted");
  fi_addr_t inner = found->second;
  av->inner_of.erase(found);
  // Two of ours may be one of tcp's.
  for (const auto& [ours, same] : av->inner_of) {
    if (same == inner) return 0;
  }
  return fi_av_remove(av->inner, &inner, 1, 0);
}

const char* address_text(fid_av* handle, const void* name, char* out, size_t* length) {
  auto* av = reinterpret_cast<Addresses*>(handle);
  return fi_av_straddr(av->inner, static_cast<const char*>(name) + sizeof kMagic, out, length);
}

int close_addresses(fid* handle) {
  auto* av = reinterpret_cast<Addresses*>(handle);
  const int rc = fi_close(&av->inner->fid);
  delete av;
  return rc;
}

// --- completion queues ---------------------------------------------------------------------------

struct Endpoint;

struct Request {  // a write, send or receive of the program
  Endpoint* endpoint = nullptr;
  void* context = nullptr;
  fi_addr_t address = FI_ADDR_UNSPEC;  // ours; FI_ADDR_UNSPEC: a receive
  iovec from{};
  fi_rma_iov to{};
  const void* descriptor = nullptr;
  uint64_t data = 0, flags = 0;
  uint32_t wait = 0;  // fi_cq_read calls
  Clock::time_point refused_since{};
};

struct Event {
  fi_cq_data_entry entry{};
  int error = 0, provider_error = 0;
};

struct Queue {
  fid_cq outer{};
  fid_cq* inner = nullptr;
  int wait_fd = -1;  // whose epoll set leads to tcp's sockets
  Endpoint* endpoint = nullptr;
  std::vector<Event> events;  // handed out in any order
  Event failed{};             // for fi_cq_readerr
  bool has_failed = false;

  void take();  // what tcp has
};

struct Endpoint {
  fid_ep outer{};
  fid_ep* inner = nullptr;
  Domain* domain = nullptr;
  Addresses* addresses = nullptr;
  Queue* queue = nullptr;
  std::vector<Request*> chain;  // posted with FI_MORE: waits for the doorbell
  std::vector<Request*> held;   // on their way
  std::set<const void*> contexts;
  size_t under_way = 0;  // writes and sends
  struct {
    uint64_t writes = 0, doorbells = 0, refused = 0, immediates = 0;
  } counts;

  void ring() {
    ++counts.doorbells;
    held.insert(held.end(), chain.begin(), chain.end());
    chain.clear();
  }
  Request* begin(const void* context, fi_addr_t address);
  void* end(Request* request);  // its context, which is the program's again
  void post();                  // some of the held ones to tcp
  void fail(Request* request, int error);
};

Request* Endpoint::begin(const void* context, fi_addr_t address) {
  expect(context != nullptr, "FI_CONTEXT2: a request without context");
  expect(contexts.insert(context).second, "FI_CONTEXT2: a context that is in use");
  auto* request = new Request;
  request->endpoint = this;
  request->context = const_cast<void*>(context);
  request->address = address;
  if (address != FI_ADDR_UNSPEC) {
    ++addresses->uses[address];
    ++under_way;
  }
  std::memset(request->context, 0xa5, sizeof(fi_context2));  // it is the provider's now
  return request;
}

void* Endpoint::end(Request* request) {
  void* context = request->context;
  contexts.erase(context);
  if (request->address != FI_ADDR_UNSPEC) {
    --addresses->uses[request->address];
    --under_way;
  }
  delete request;
  return context;
}

void Endpoint::fail(Request* request, int error) {
  Event event;
  event.error = event.provider_error = error;
  event.entry.flags = FI_RMA | FI_WRITE;
  event.entry.op_context = end(request);
  queue->events.push_back(event);
}

void Endpoint::post() {
  std::shuffle(held.begin(), held.end(), dice());
  std::vector<Request*> kept;
  for (Request* request : held) {
    if (request->wait > 0 && request->wait-- > 0) {
      kept.push_back(request);
      continue;
    }
    if (!domain->covers(request->descriptor, request->from.iov_base, request->from.iov_len,
                        FI_WRITE)) {
      fail(request, FI_EFAULT);  // withdrawn meanwhile
      continue;
    }
    fi_msg_rma message{};
    void* none = nullptr;
    message.msg_iov = &request->from;
    message.desc = &none;
    message.iov_count = 1;
    message.addr = addresses->inner_of.at(request->address);
    message.rma_iov = &request->to;
    message.rma_iov_count = 1;
    message.context = request;
    message.data = request->data;
    // A NIC's completion is the peer's acknowledgement, so tcp is asked for one.
    const uint64_t flags =
        FI_COMPLETION | FI_DELIVERY_COMPLETE | (request->flags & FI_REMOTE_CQ_DATA);
    const ssize_t rc = fi_writemsg(inner, &message, flags);
    if (rc == 0) continue;
    if (request->refused_since == Clock::time_point{}) request->refused_since = Clock::now();
    if (rc != -FI_EAGAIN || Clock::now() > request->refused_since + kUnresponsive) {
      fail(request, rc == -FI_EAGAIN ? FI_EIO : static_cast<int>(-rc));
    } else {
      kept.push_back(request);
    }
  }
  held = std::move(kept);
}

void Queue::take() {
  fi_cq_data_entry entries[16];
  for (;;) {
    const ssize_t count = fi_cq_read(inner, entries, std::size(entries));
    if (count == -FI_EAVAIL) {
      fi_cq_err_entry error{};
      if (fi_cq_readerr(inner, &error, 0) < 1) return;
      if (error.op_context == nullptr) continue;  // of the receiving side
      Event event;
      event.entry.flags = error.flags;
      event.entry.op_context = endpoint->end(static_cast<Request*>(error.op_context));
      event.error = error.err;
      event.provider_error = error.prov_errno;
      events.push_back(event);
      continue;
    }
    if (count <= 0) return;
    for (ssize_t i = 0; i < count; ++i) {
      Event event;
      event.entry = entries[i];
      if (entries[i].flags & FI_REMOTE_CQ_DATA) {
        ++endpoint->counts.immediates;
        event.entry.op_context = nullptr;
        event.entry.data &= 0xffffffff;
      } else {
        event.entry.op_context = endpoint->end(static_cast<Request*>(entries[i].op_context));
      }
      events.push_back(event);
    }
  }
}

ssize_t read_queue(fid_cq* handle, void* out, size_t count) {
  auto* queue = reinterpret_cast<Queue*>(handle);
  if (queue->endpoint == nullptr) return -FI_EAGAIN;
  if (queue->has_failed) return -FI_EAVAIL;
  queue->endpoint->post();
  queue->take();
  if (queue->events.empty()) return -FI_EAGAIN;
  std::shuffle(queue->events.begin(), queue->events.end(), dice());
  const size_t most = 1 + dice()() % std::min(count, queue->events.size());
  size_t given = 0;
  while (given < most && queue->events.back().error == 0) {
    static_cast<fi_cq_data_entry*>(out)[given++] = queue->events.back().entry;
    queue->events.pop_back();
  }
  if (given > 0) return static_cast<ssize_t>(given);
  queue->failed = queue->events.back();
  queue->has_failed = true;
  queue->events.pop_back();
  return -FI_EAVAIL;
}

ssize_t read_error(fid_cq* handle, fi_cq_err_entry* out, uint64_t) {
  auto* queue = reinterpret_cast<Queue*>(handle);
  if (!queue->has_failed) return -FI_EAGAIN;
  queue->has_failed = false;
  *out = fi_cq_err_entry{};
  out->op_context = queue->failed.entry.op_context;
  out->flags = queue->failed.entry.flags;
  out->err = queue->failed.error;
  out->prov_errno = queue->failed.provider_error;
  return 1;
}

const char* error_text(fid_cq*, int error, const void*, char*, size_t) {
  return real().error_text(error);
}

int close_queue(fid* handle) {
  auto* queue = reinterpret_cast<Queue*>(handle);
  expect(queue->endpoint == nullptr, "fi_close of a queue before its endpoint");
  const int rc = fi_close(&queue->inner->fid);
  delete queue;
  return rc;
}

// --- endpoints -----------------------------------------------------------------------------------

ssize_t post_write(fid_ep* handle, const fi_msg_rma* message, uint64_t flags) {
  auto* endpoint = reinterpret_cast<Endpoint*>(handle);
  expect((flags & ~kWriteFlags) == 0, "fi_writemsg: a flag that EFA has not");
  expect(message->iov_count == 1 && message->rma_iov_count == 1, "one local and one remote piece");
  const iovec& from = message->msg_iov[0];
  const fi_rma_iov& to = message->rma_iov[0];
  expect(from.iov_len == to.len, "both pieces are of one length");
  expect(from.iov_len <= kMaxWriteBytes, "a write longer than max_msg_size");
  expect(message->data >> 32 == 0, "an immediate of more than 32 bits");
  expect((to.key & kKeyBits) == kKeyBits, "a remote key that nobody gave out, even for 0 bytes");
  expect(to.addr >= kFirstAddress, "a remote address that nobody gave out, even for 0 bytes");
  expect(message->desc &&
             endpoint->domain->covers(message->desc[0], from.iov_base, from.iov_len, FI_WRITE),
         "FI_MR_LOCAL: local memory that is not registered, or without its descriptor");
  expect(endpoint->addresses->inner_of.contains(message->addr),
         "an address that is not in the address vector");
  if (endpoint->under_way >= kQueueSize || refuses()) {
    ++endpoint->counts.refused;
    return -FI_EAGAIN;
  }
  Request* request = endpoint->begin(message->context, message->addr);
  request->from = from;
  request->descriptor = message->desc[0];
  request->to = to;
  request->to.key &= ~kKeyBits;
  request->to.addr -= kFirstAddress;
  request->data = message->data;
  request->flags = flags;
  request->wait = dice()() % 6;
  ++endpoint->counts.writes;
  endpoint->chain.push_back(request);
  if (!(flags & FI_MORE)) endpoint->ring();
  return 0;
}

ssize_t post_send(fid_ep* handle, const void* data, size_t num_bytes, void* descriptor,
                  fi_addr_t address, void* context) {
  auto* endpoint = reinterpret_cast<Endpoint*>(handle);
  expect(num_bytes <= kMaxSendBytes, "a message longer than one packet");
  expect(endpoint->domain->covers(descriptor, data, num_bytes, FI_SEND),
         "FI_MR_LOCAL: a message that is not registered, or without its descriptor");
  expect(endpoint->addresses->inner_of.contains(address),
         "an address that is not in the address vector");
  if (endpoint->under_way >= kQueueSize || refuses()) {
    ++endpoint->counts.refused;
    return -FI_EAGAIN;
  }
  Request* request = endpoint->begin(context, address);
  const ssize_t rc = fi_send(endpoint->inner, data, num_bytes, nullptr,
                             endpoint->addresses->inner_of.at(address), request);
  if (rc != 0) {
    endpoint->end(request);
  } else {
    endpoint->ring();
  }
  return rc;
}

ssize_t post_receive(fid_ep* handle, void* data, size_t num_bytes, void* descriptor,
                     fi_addr_t address, void* context) {
  auto* endpoint = reinterpret_cast<Endpoint*>(handle);
  expect(address == FI_ADDR_UNSPEC, "FI_DIRECTED_RECV is not there");
  expect(endpoint->domain->covers(descriptor, data, num_bytes, FI_RECV),
         "FI_MR_LOCAL: a receive that is not registered, or without its descriptor");
  if (refuses()) return -FI_EAGAIN;
  Request* request = endpoint->begin(context, FI_ADDR_UNSPEC);
  const ssize_t rc = fi_recv(endpoint->inner, data, num_bytes, nullptr, FI_ADDR_UNSPEC, request);
  if (rc != 0) endpoint->end(request);
  return rc;
}

int get_name(fid* handle, void* out, size_t* length) {
  auto* endpoint = reinterpret_cast<Endpoint*>(handle);
  expect(*length >= kAddressBytes, "fi_getname into 32 bytes or more");
  std::memset(out, 0, kAddressBytes);
  std::memcpy(out, kMagic, sizeof kMagic);
  size_t inner_length = kAddressBytes - sizeof kMagic;
  *length = kAddressBytes;
  return fi_getname(&endpoint->inner->fid, static_cast<char*>(out) + sizeof kMagic, &inner_length);
}

int bind_endpoint(fid* handle, fid* other, uint64_t flags) {
  auto* endpoint = reinterpret_cast<Endpoint*>(handle);
  if (other->fclass == FI_CLASS_AV) {
    endpoint->addresses = reinterpret_cast<Addresses*>(other);
    return fi_ep_bind(endpoint->inner, &endpoint->addresses->inner->fid, flags);
  }
  expect(other->fclass == FI_CLASS_CQ && flags == (FI_TRANSMIT | FI_RECV),
         "one queue, without selective completion");
  endpoint->queue = reinterpret_cast<Queue*>(other);
  endpoint->queue->endpoint = endpoint;
  return fi_ep_bind(endpoint->inner, &endpoint->queue->inner->fid, flags);
}

int control_endpoint(fid* handle, int command, void* argument) {
  expect(command == FI_ENABLE, "fi_control of an endpoint: FI_ENABLE only");
  return fi_control(&reinterpret_cast<Endpoint*>(handle)->inner->fid, command, argument);
}

// tcp must not be closed while a write arrives, so its connections are broken first.
void shut_down_sockets(int wait_fd) {
  std::ifstream lines("/proc/self/fdinfo/" + std::to_string(wait_fd));
  for (std::string word; lines >> word;) {
    int fd = -1;
    if (word != "tfd:" || !(lines >> fd) || fd == wait_fd) continue;
    int kind = 0;
    socklen_t length = sizeof kind;
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &kind, &length) != 0) {
      shut_down_sockets(fd);
    } else if (kind == AF_INET) {
      shutdown(fd, SHUT_RDWR);
    }
  }
}

int close_endpoint(fid* handle) {
  auto* endpoint = reinterpret_cast<Endpoint*>(handle);
  if (Queue* queue = endpoint->queue) {
    shut_down_sockets(queue->wait_fd);
    for (int i = 0; i < 20; ++i) {
      queue->take();
      usleep(200);
    }
    queue->endpoint = nullptr;
  }
  if (const char* file = getenv("EFA_RULES_COUNTS")) {
    std::ofstream(file, std::ios::app)
        << "pid " << getpid() << " writes " << endpoint->counts.writes << " doorbells "
        << endpoint->counts.doorbells << " refused " << endpoint->counts.refused << " immediates "
        << endpoint->counts.immediates << "\n";
  }
  const int rc = fi_close(&endpoint->inner->fid);
  delete endpoint;
  return rc;
}

// --- domains and fabrics -------------------------------------------------------------------------

int open_addresses(fid_domain* handle, fi_av_attr* attr, fid_av** out, void* context) {
  auto* domain = reinterpret_cast<Domain*>(handle);
  expect(attr->type == FI_AV_TABLE && attr->flags == 0, "FI_AV_TABLE without FI_EVENT");
  auto av = std::make_unique<Addresses>();
  if (const int rc = fi_av_open(domain->inner, attr, &av->inner, context); rc != 0) return rc;
  static fi_ops ops{
      sizeof ops, close_addresses, refused<"fi_av_bind">, refused<"fi_av control">, nullptr,
      nullptr,    nullptr};
  static fi_ops_av av_ops{sizeof av_ops,
                          insert_addresses,
                          refused<"fi_av_insertsvc">,
                          refused<"fi_av_insertsym">,
                          remove_addresses,
                          refused<"fi_av_lookup">,
                          address_text,
                          refused<"fi_av_set">};
  av->outer.fid = {FI_CLASS_AV, context, &ops};
  av->outer.ops = &av_ops;
  *out = &av.release()->outer;
  return 0;
}

int open_queue(fid_domain* handle, fi_cq_attr* attr, fid_cq** out, void* context) {
  auto* domain = reinterpret_cast<Domain*>(handle);
  expect(attr->format == FI_CQ_FORMAT_DATA, "FI_CQ_FORMAT_DATA");
  if (attr->wait_obj != FI_WAIT_NONE) return -FI_ENOSYS;
  auto queue = std::make_unique<Queue>();
  fi_cq_attr inner = *attr;
  inner.size = 2048;
  inner.wait_obj = FI_WAIT_FD;
  if (const int rc = fi_cq_open(domain->inner, &inner, &queue->inner, context); rc != 0) return rc;
  fi_control(&queue->inner->fid, FI_GETWAIT, &queue->wait_fd);
  static fi_ops ops{
      sizeof ops, close_queue, refused<"fi_cq bind">, refused<"fi_cq control">, nullptr,
      nullptr,    nullptr};
  static fi_ops_cq cq_ops{sizeof cq_ops,
                          read_queue,
                          refused<"fi_cq_readfrom">,
                          read_error,
                          refused<"fi_cq_sread">,
                          refused<"fi_cq_sreadfrom">,
                          refused<"fi_cq_signal">,
                          error_text};
  queue->outer.fid = {FI_CLASS_CQ, context, &ops};
  queue->outer.ops = &cq_ops;
  *out = &queue.release()->outer;
  return 0;
}

int open_endpoint(fid_domain* handle, fi_info*, fid_ep** out, void* context) {
  auto* domain = reinterpret_cast<Domain*>(handle);
  auto endpoint = std::make_unique<Endpoint>();
  endpoint->domain = domain;
  const int rc = fi_endpoint(domain->inner, real().info, &endpoint->inner, context);
  if (rc != 0) return rc;
  static fi_ops ops{sizeof ops, close_endpoint, bind_endpoint, control_endpoint,
                    nullptr,    nullptr,        nullptr};
  static fi_ops_ep ep_ops{sizeof ep_ops,
                          refused<"fi_cancel">,
                          refused<"fi_getopt">,
                          refused<"fi_setopt">,
                          refused<"fi_tx_context">,
                          refused<"fi_rx_context">,
                          refused<"fi_rx_size_left">,
                          refused<"fi_tx_size_left">};
  static fi_ops_cm cm_ops{};
  cm_ops.size = sizeof cm_ops;
  cm_ops.getname = get_name;
  cm_ops.shutdown = refused<"fi_shutdown">;
  static fi_ops_msg msg_ops{sizeof msg_ops,
                            post_receive,
                            refused<"fi_recvv">,
                            refused<"fi_recvmsg">,
                            post_send,
                            refused<"fi_sendv">,
                            refused<"fi_sendmsg">,
                            refused<"fi_inject">,
                            refused<"fi_senddata">,
                            refused<"fi_injectdata">};
  static fi_ops_rma rma_ops{sizeof rma_ops,
                            refused<"fi_read">,
                            refused<"fi_readv">,
                            refused<"fi_readmsg">,
                            refused<"fi_write">,
                            refused<"fi_writev">,
                            post_write,
                            refused<"fi_inject_write">,
                            refused<"fi_writedata">,
                            refused<"fi_inject_writedata">};
  endpoint->outer.fid = {FI_CLASS_EP, context, &ops};
  endpoint->outer.ops = &ep_ops;
  endpoint->outer.cm = &cm_ops;
  endpoint->outer.msg = &msg_ops;
  endpoint->outer.rma = &rma_ops;
  *out = &endpoint.release()->outer;
  return 0;
}

int close_domain(fid* handle) {
  auto* domain = reinterpret_cast<Domain*>(handle);
  expect(domain->regions.empty(), "fi_close of a domain before its regions");
  const int rc = fi_close(&domain->inner->fid);
  delete domain;
  return rc;
}

struct Fabric {
  fid_fabric outer{};
  fid_fabric* inner = nullptr;
};

int open_domain(fid_fabric* handle, fi_info*, fid_domain** out, void* context) {
  auto* fabric = reinterpret_cast<Fabric*>(handle);
  auto domain = std::make_unique<Domain>();
  const int rc = fi_domain(fabric->inner, real().info, &domain->inner, context);
  if (rc != 0) return rc;
  static fi_ops ops{
      sizeof ops, close_domain, refused<"fi_domain_bind">, refused<"fi_domain control">, nullptr,
      nullptr,    nullptr};
  static fi_ops_domain domain_ops{};
  domain_ops.size = sizeof domain_ops;
  domain_ops.av_open = open_addresses;
  domain_ops.cq_open = open_queue;
  domain_ops.endpoint = open_endpoint;
  domain_ops.cntr_open = refused<"fi_cntr_open">;
  domain_ops.query_atomic = refused<"fi_query_atomic">;
  static fi_ops_mr mr_ops{sizeof mr_ops, register_bytes, refused<"fi_mr_regv">,
                          refused<"fi_mr_regattr">};
  domain->outer.fid = {FI_CLASS_DOMAIN, context, &ops};
  domain->outer.ops = &domain_ops;
  domain->outer.mr = &mr_ops;
  *out = &domain.release()->outer;
  return 0;
}

int close_fabric(fid* handle) {
  auto* fabric = reinterpret_cast<Fabric*>(handle);
  const int rc = fi_close(&fabric->inner->fid);
  delete fabric;
  return rc;
}

// --- fi_getinfo ----------------------------------------------------------------------------------

// Why EFA has nothing for these hints; empty: it has.
std::string missing(const fi_info* hints) {
  if (!hints || !hints->fabric_attr || !hints->fabric_attr->prov_name ||
      std::strcmp(hints->fabric_attr->prov_name, "efa") != 0)
    return "another provider";
  const fi_domain_attr& domain = *hints->domain_attr;
  if (hints->caps & ~kCaps) return "a capability";
  if (!(hints->mode & FI_CONTEXT2)) return "mode without FI_CONTEXT2";
  if ((static_cast<uint64_t>(domain.mr_mode) & kMrMode) != kMrMode) return "an mr_mode";
  if (hints->ep_attr->type != FI_EP_RDM) return "an endpoint that is not FI_EP_RDM";
  if (hints->tx_attr->msg_order | hints->rx_attr->msg_order) return "an order of messages";
  if (hints->tx_attr->comp_order | hints->rx_attr->comp_order) return "an order of completions";
  if (hints->tx_attr->inject_size > 0) return "inject";
  if (hints->tx_attr->op_flags & ~kWriteFlags) return "a flag of requests";
  if (domain.cq_data_size > sizeof(uint32_t)) return "immediates of more than 32 bits";
  if (hints->ep_attr->max_msg_size > kMaxWriteBytes) return "longer writes";
  return "";
}

int find_tcp() {
  if (real().info != nullptr) return 0;
  fi_info* hints = real().dup_info(nullptr);
  hints->caps = FI_MSG | FI_RMA;
  hints->ep_attr->type = FI_EP_RDM;
  hints->domain_attr->threading = FI_THREAD_SAFE;
  hints->fabric_attr->prov_name = strdup("tcp;ofi_rxm");
  fi_info* found = nullptr;
  const int rc = real().get_info(FI_VERSION(1, 17), nullptr, nullptr, 0, hints, &found);
  real().free_info(hints);
  if (rc != 0) return rc;
  for (fi_info* info = found; info != nullptr; info = info->next) {
    const bool is_loopback = std::strcmp(info->domain_attr->name, "lo") == 0;
    if (is_loopback && info->addr_format == FI_SOCKADDR_IN && real().info == nullptr)
      real().info = real().dup_info(info);
  }
  real().free_info(found);
  return real().info != nullptr ? 0 : -FI_ENODATA;
}

void replace(char*& text, const std::string& with) {
  free(text);
  text = strdup(with.c_str());
}

fi_info* describe(const std::string& nic) {
  fi_info* info = real().dup_info(real().info);
  info->caps = FI_MSG | FI_RMA | FI_SEND | FI_RECV | FI_READ | FI_WRITE | FI_REMOTE_READ |
               FI_REMOTE_WRITE | FI_SOURCE | FI_LOCAL_COMM | FI_REMOTE_COMM;
  info->mode = info->tx_attr->mode = info->rx_attr->mode = FI_CONTEXT2;
  info->addr_format = FI_ADDR_EFA;
  free(info->src_addr);
  info->src_addr = calloc(1, info->src_addrlen = kAddressBytes);
  info->tx_attr->msg_order = info->rx_attr->msg_order = 0;
  info->tx_attr->comp_order = info->rx_attr->comp_order = 0;
  info->tx_attr->inject_size = 0;
  info->tx_attr->size = info->rx_attr->size = kQueueSize;
  info->tx_attr->iov_limit = info->rx_attr->iov_limit = info->tx_attr->rma_iov_limit = 1;
  info->ep_attr->max_msg_size = kMaxWriteBytes;
  info->ep_attr->max_order_raw_size = info->ep_attr->max_order_waw_size = 0;
  info->domain_attr->mr_mode = static_cast<int>(kMrMode);
  info->domain_attr->mr_key_size = sizeof(uint64_t);
  info->domain_attr->cq_data_size = sizeof(uint32_t);
  replace(info->domain_attr->name, nic + "-rdm");
  replace(info->fabric_attr->name, "efa-direct");
  replace(info->fabric_attr->prov_name, "efa");
  return info;
}

}  // namespace

// --- what libfabric.so.1 exports -----------------------------------------------------------------

extern "C" {
int fi_getinfo(uint32_t, const char*, const char*, uint64_t, const fi_info* hints, fi_info** out) {
  if (const std::string what = missing(hints); !what.empty()) {
    if (what != "another provider")
      std::fprintf(stderr, "efa_rules: fi_getinfo asks for what EFA has not: %s\n", what.c_str());
    return -FI_ENODATA;
  }
  if (const int rc = find_tcp(); rc != 0) return rc;
  const char* named = getenv("EFA_RULES_NICS");
  std::string names = named ? named : "rdmap0s6";
  fi_info** tail = out;
  *out = nullptr;
  for (size_t at = 0; at < names.size();) {
    const size_t end = std::min(names.find(',', at), names.size());
    *tail = describe(names.substr(at, end - at));
    tail = &(*tail)->next;
    at = end + 1;
  }
  return *out ? 0 : -FI_ENODATA;
}

void fi_freeinfo(fi_info* info) { real().free_info(info); }
fi_info* fi_dupinfo(const fi_info* info) { return real().dup_info(info); }
const char* fi_strerror(int error) { return real().error_text(error); }
uint32_t fi_version() { return real().version(); }

int fi_fabric(fi_fabric_attr* attr, fid_fabric** out, void* context) {
  expect(std::strcmp(attr->prov_name, "efa") == 0, "fi_fabric of provider efa");
  auto fabric = std::make_unique<Fabric>();
  const int rc = real().open_fabric(real().info->fabric_attr, &fabric->inner, context);
  if (rc != 0) return rc;
  static fi_ops ops{
      sizeof ops, close_fabric, refused<"fi_fabric bind">, refused<"fi_fabric control">, nullptr,
      nullptr,    nullptr};
  static fi_ops_fabric fabric_ops{};
  fabric_ops.size = sizeof fabric_ops;
  fabric_ops.domain = open_domain;
  fabric_ops.eq_open = refused<"fi_eq_open">;
  fabric_ops.wait_open = refused<"fi_wait_open">;
  fabric_ops.trywait = refused<"fi_trywait">;
  fabric->outer.fid = {FI_CLASS_FABRIC, context, &ops};
  fabric->outer.ops = &fabric_ops;
  fabric->outer.api_version = real().version();
  *out = &fabric.release()->outer;
  return 0;
}
}  // extern "C"
