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
#include "efa_rules.hpp"

using namespace efa_rules;  // NOLINT: a library of one file

namespace {

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

int open_domain(fid_fabric* handle, fi_info* info, fid_domain** out, void* context) {
  auto* fabric = reinterpret_cast<Fabric*>(handle);
  auto domain = std::make_unique<Domain>();
  domain->device_memory =
      (info->caps & FI_HMEM) != 0 && (info->domain_attr->mr_mode & FI_MR_HMEM) != 0;
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
  static fi_ops_mr mr_ops{sizeof mr_ops, register_bytes, refused<"fi_mr_regv">, register_attr};
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

constexpr char kNoDeviceMemory[] = "a GPU's memory";  // may be asked for

// Why EFA has nothing for these hints; empty: it has.
std::string missing(const fi_info* hints) {
  if (!hints || !hints->fabric_attr || !hints->fabric_attr->prov_name ||
      std::strcmp(hints->fabric_attr->prov_name, "efa") != 0)
    return "another provider";
  const fi_domain_attr& domain = *hints->domain_attr;
  if (hints->caps & ~kCaps) return "a capability";
  if ((hints->caps & FI_HMEM) && !takes_device_memory()) return kNoDeviceMemory;
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

fi_info* describe(const std::string& nic, const fi_info* hints) {
  fi_info* info = real().dup_info(real().info);
  info->caps = FI_MSG | FI_RMA | FI_SEND | FI_RECV | FI_READ | FI_WRITE | FI_REMOTE_READ |
               FI_REMOTE_WRITE | FI_SOURCE | FI_LOCAL_COMM | FI_REMOTE_COMM;
  info->caps |= hints->caps & FI_HMEM;
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
  info->domain_attr->mr_mode =
      static_cast<int>(kMrMode) | (hints->domain_attr->mr_mode & FI_MR_HMEM);
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
    if (what != "another provider" && what != kNoDeviceMemory)
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
    *tail = describe(names.substr(at, end - at), hints);
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
