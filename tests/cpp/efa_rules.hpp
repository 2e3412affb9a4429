// The objects of efa_rules.cpp: in front of each of libfabric's one of ours. Here is what happens
// between them: regions, addresses, and writes on their way.
#pragma once

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

namespace efa_rules {

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

[[noreturn]] inline void broken(const std::string& rule) {
  std::fprintf(stderr, "efa_rules: broken: %s\n", rule.c_str());
  abort();
}
inline void expect(bool kept, const std::string& rule) {
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

inline Real& real() {
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

// Whether NIC and libfabric reach a GPU's memory.
inline bool takes_device_memory() { return getenv("EFA_RULES_HMEM") != nullptr; }

inline std::mt19937_64& dice() {
  static std::mt19937_64 generator = [] {
    const char* seed = getenv("EFA_RULES_SEED");
    return std::mt19937_64((seed ? strtoull(seed, nullptr, 10) : 7) +
                           static_cast<uint64_t>(getpid()));
  }();
  return generator;
}
// Does the queue say "again" this time?
inline bool refuses() {
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
  bool device_memory = false;
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

inline int close_region(fid* handle) {
  auto* region = reinterpret_cast<Region*>(handle);
  {
    std::lock_guard lock(region->domain->mutex);
    region->domain->regions.erase(region);
  }
  const int rc = fi_close(&region->inner->fid);
  delete region;
  return rc;
}

// Memory that tests/kernels/pretended_driver.cpp made: a GPU's.
inline bool is_of_device(uint64_t address) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    unsigned long long first = 0, end = 0;
    if (std::sscanf(line.c_str(), "%llx-%llx", &first, &end) == 2 && first <= address &&
        address < end)
      return line.find("moe_comm:pretended") != std::string::npos;
  }
  return false;
}

inline int register_any(Domain* domain, const void* data, size_t num_bytes, uint64_t access,
                        fid_mr** out, void* context) {
  expect(num_bytes > 0, "a region of 0 bytes");
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

inline int register_bytes(fid* handle, const void* data, size_t num_bytes, uint64_t access,
                          uint64_t offset, uint64_t, uint64_t flags, fid_mr** out, void* context) {
  expect(offset == 0 && flags == 0, "fi_mr_reg: offset and flags are 0");
  expect(!is_of_device(reinterpret_cast<uint64_t>(data)), "fi_mr_reg of a GPU's memory");
  return register_any(reinterpret_cast<Domain*>(handle), data, num_bytes, access, out, context);
}

// Of a GPU's memory, where that was asked for.
inline int register_attr(fid* handle, const fi_mr_attr* attr, uint64_t flags, fid_mr** out) {
  auto* domain = reinterpret_cast<Domain*>(handle);
  expect(domain->device_memory,
         "fi_mr_regattr without FI_HMEM and FI_MR_HMEM in the domain's info");
  expect(attr->iov_count == 1 && attr->offset == 0 && flags == 0, "fi_mr_regattr: one range");
  expect(attr->iface == FI_HMEM_CUDA && attr->device.cuda == 0, "fi_mr_regattr of CUDA device 0");
  const iovec& bytes = *attr->mr_iov;
  expect(is_of_device(reinterpret_cast<uint64_t>(bytes.iov_base)), "fi_mr_regattr of the host's");
  return register_any(domain, bytes.iov_base, bytes.iov_len, attr->access, out, attr->context);
}

// --- addresses -----------------------------------------------------------------------------------

struct Addresses {
  fid_av outer{};
  fid_av* inner = nullptr;
  std::map<fi_addr_t, fi_addr_t> inner_of;
  std::map<fi_addr_t, uint32_t> uses;  // by writes and messages under way
  fi_addr_t next = 1'000'003;          // no index, and never one that was removed
};

inline int insert_addresses(fid_av* handle, const void* names, size_t count, fi_addr_t* out,
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

inline int remove_addresses(fid_av* handle, fi_addr_t* addresses, size_t count, uint64_t flags) {
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

inline const char* address_text(fid_av* handle, const void* name, char* out, size_t* length) {
  auto* av = reinterpret_cast<Addresses*>(handle);
  return fi_av_straddr(av->inner, static_cast<const char*>(name) + sizeof kMagic, out, length);
}

inline int close_addresses(fid* handle) {
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

inline Request* Endpoint::begin(const void* context, fi_addr_t address) {
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

inline void* Endpoint::end(Request* request) {
  void* context = request->context;
  contexts.erase(context);
  if (request->address != FI_ADDR_UNSPEC) {
    --addresses->uses[request->address];
    --under_way;
  }
  delete request;
  return context;
}

inline void Endpoint::fail(Request* request, int error) {
  Event event;
  event.error = event.provider_error = error;
  event.entry.flags = FI_RMA | FI_WRITE;
  event.entry.op_context = end(request);
  queue->events.push_back(event);
}

inline void Endpoint::post() {
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

inline void Queue::take() {
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

}  // namespace efa_rules
