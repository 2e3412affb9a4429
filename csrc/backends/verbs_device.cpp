// Opening a port of an RDMA NIC through libibverbs: which device, which port, which GID. And
// `probe_verbs`.
#include "../transport.hpp"

#ifndef MOE_COMM_HAVE_VERBS
#define MOE_COMM_HAVE_VERBS __has_include(<infiniband/verbs.h>)
#endif

#if MOE_COMM_HAVE_VERBS

#include <arpa/inet.h>
#include <dlfcn.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <fstream>

#include "verbs_handles.hpp"

namespace moe_comm {
namespace {

constexpr size_t kMaxMessageBytes = size_t{1} << 30;
constexpr uint8_t kHopLimit = 64;

using DeviceList = std::unique_ptr<ibv_device*, void (*)(ibv_device**)>;

DeviceList list_devices(const VerbsLibrary& library, int* count) {
  *count = 0;
  return {library.get_device_list(count), library.free_device_list};
}

int query_port(const VerbsLibrary& library, ibv_context* context, uint8_t port,
               ibv_port_attr* attr) {
  *attr = {};  // the function fills the fields of its first version, which are all we read
  return library.query_port(context, port, reinterpret_cast<_compat_ibv_port_attr*>(attr));
}

// --- GIDs ----------------------------------------------------------------------------------------

// "RoCE v2", "IB/RoCE v1"; from sysfs because older libraries have no call for it.
std::string gid_type(const std::string& device, int port, int index) {
  std::ifstream file("/sys/class/infiniband/" + device + "/ports/" + std::to_string(port) +
                     "/gid_attrs/types/" + std::to_string(index));
  std::string text;
  std::getline(file, text);
  return text;
}

// Higher is better; 0: not to be used. What other hosts can reach comes first: RoCE v2 is UDP, so
// routable addresses before link-local ones; v1 stays in its Ethernet segment.
int gid_preference(const ibv_gid& gid, const std::string& type) {
  const auto* bytes = reinterpret_cast<const in6_addr*>(gid.raw);
  if (IN6_IS_ADDR_UNSPECIFIED(bytes)) return 0;
  if (type != "RoCE v2") return 1;
  if (IN6_IS_ADDR_V4MAPPED(bytes)) return 4;
  return IN6_IS_ADDR_LINKLOCAL(bytes) ? 2 : 3;
}

Status choose_gid(VerbsDevice& device, int table_length) {
  const VerbsLibrary& library = *device.library;
  int best = -1, best_preference = 0;
  if (device.settings.gid >= 0 || !device.is_ethernet) {
    best = std::max(device.settings.gid, 0);
    if (best >= table_length)
      return {Code::kInvalid, "interface: gid: expected an index below " +
                                  std::to_string(table_length) + ", got " + std::to_string(best)};
  } else {
    for (int i = 0; i < std::min(table_length, 256); ++i) {
      ibv_gid gid{};
      if (library.query_gid(device.context.get(), device.port, i, &gid) != 0) continue;
      const int preference = gid_preference(gid, gid_type(device.name, device.port, i));
      if (preference > best_preference) {
        best = i;
        best_preference = preference;
      }
    }
    if (best < 0) {
      return {Code::kTransport,
              "no GID: give its network interface an address (ip address add ...)"};
    }
  }
  if (const int rc = library.query_gid(device.context.get(), device.port, best, &device.place.gid);
      rc != 0)
    return Status::from_errno("ibv_query_gid(" + std::to_string(best) + ")", errno);
  device.gid_index = static_cast<uint8_t>(best);
  return {};
}

// --- ports ---------------------------------------------------------------------------------------

const char* port_state(ibv_port_state state) {
  switch (state) {
    case IBV_PORT_DOWN:
      return "down";
    case IBV_PORT_INIT:
      return "initialising (InfiniBand: is a subnet manager running?)";
    case IBV_PORT_ARMED:
      return "armed";
    case IBV_PORT_ACTIVE:
    case IBV_PORT_ACTIVE_DEFER:
      return "active";
    default:
      return "unknown";
  }
}

// The wanted port if it is active, or the first active one; 0, and why not.
uint8_t find_port(const VerbsLibrary& library, ibv_context* context, int num_ports, int wanted,
                  ibv_port_attr* attr, std::string* why) {
  for (int port = 1; port <= num_ports; ++port) {
    if (wanted != 0 && port != wanted) continue;
    if (query_port(library, context, static_cast<uint8_t>(port), attr) != 0) continue;
    if (attr->state == IBV_PORT_ACTIVE) return static_cast<uint8_t>(port);
    *why += "port " + std::to_string(port) + " is " + port_state(attr->state) + "; ";
  }
  if (why->empty()) *why = "no port " + std::to_string(wanted) + "; ";
  why->resize(why->size() - 2);
  return 0;
}

ContextHandle open_context(const VerbsLibrary& library, ibv_device* device) {
  return {library.open_device(device), {library.close_device}};
}

}  // namespace

// --- VerbsLibrary --------------------------------------------------------------------------------

Result<const VerbsLibrary*> VerbsLibrary::load() {
  void* handle = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (handle == nullptr) {
    return Status(Code::kTransport, std::string("dlopen: ") + dlerror() +
                                        "; install it (Debian, Ubuntu: apt-get install libibverbs1 "
                                        "ibverbs-providers)");
  }
  static VerbsLibrary library;  // a table of addresses, the same for everybody
  std::string missing;
  auto find = [&](const char* name, auto& function) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
    if (function == nullptr) missing = name;
  };
  VerbsLibrary found;
  find("ibv_reg_mr_iova2", found.reg_mr_iova2);
  find("ibv_reg_dmabuf_mr", found.reg_dmabuf_mr);
  missing.clear();
  find("ibv_get_device_list", found.get_device_list);
  find("ibv_free_device_list", found.free_device_list);
  find("ibv_get_device_name", found.get_device_name);
  find("ibv_open_device", found.open_device);
  find("ibv_close_device", found.close_device);
  find("ibv_query_device", found.query_device);
  find("ibv_query_port", found.query_port);
  find("ibv_query_gid", found.query_gid);
  find("ibv_alloc_pd", found.alloc_pd);
  find("ibv_dealloc_pd", found.dealloc_pd);
  find("ibv_reg_mr", found.reg_mr);
  find("ibv_dereg_mr", found.dereg_mr);
  find("ibv_create_comp_channel", found.create_comp_channel);
  find("ibv_destroy_comp_channel", found.destroy_comp_channel);
  find("ibv_create_cq", found.create_cq);
  find("ibv_destroy_cq", found.destroy_cq);
  find("ibv_get_cq_event", found.get_cq_event);
  find("ibv_ack_cq_events", found.ack_cq_events);
  find("ibv_create_srq", found.create_srq);
  find("ibv_destroy_srq", found.destroy_srq);
  find("ibv_create_qp", found.create_qp);
  find("ibv_modify_qp", found.modify_qp);
  find("ibv_destroy_qp", found.destroy_qp);
  find("ibv_create_ah", found.create_ah);
  find("ibv_destroy_ah", found.destroy_ah);
  find("ibv_wc_status_str", found.wc_status_text);
  if (!missing.empty()) return Status(Code::kTransport, "libibverbs.so.1 lacks " + missing);
  static const bool once = [&] {
    // Kernels before 5.12 give a page that is registered and written after a fork() to the child.
    decltype(&::ibv_fork_init) fork_init = nullptr;
    find("ibv_fork_init", fork_init);
    if (fork_init != nullptr) fork_init();
    library = found;
    return true;
  }();
  (void)once;
  return &library;
}

// --- VerbsSettings -------------------------------------------------------------------------------

Result<VerbsSettings> VerbsSettings::parse(const std::string& text) {
  VerbsSettings settings;
  struct Known {
    const char* name;
    int* value;
    int min, max;
  };
  const Known known[] = {
      {"port", &settings.port, 1, 255},
      {"gid", &settings.gid, 0, 255},
      {"mtu", &settings.mtu, 256, 4096},
      {"pkey", &settings.pkey, 0, 65535},
      {"sl", &settings.sl, 0, 15},
      {"traffic_class", &settings.traffic_class, 0, 255},
      {"timeout", &settings.timeout, 0, 31},
      {"retries", &settings.retries, 0, 7},
      {"rnr_timer", &settings.rnr_timer, 0, 31},
      {"relaxed", &settings.relaxed, 0, 1},
  };
  for (size_t start = 0; start < text.size();) {
    const size_t end = std::min(text.find(',', start), text.size());
    const std::string part = text.substr(start, end - start);
    start = end + 1;
    const size_t equals = part.find('=');
    if (equals == std::string::npos) {
      if (!settings.device.empty())
        return Status(Code::kInvalid, "interface: expected one device, got " + text);
      settings.device = part;
      continue;
    }
    const std::string key = part.substr(0, equals), value = part.substr(equals + 1);
    const Known* found = std::find_if(std::begin(known), std::end(known),
                                      [&](const Known& k) { return key == k.name; });
    if (found == std::end(known)) {
      std::string names;
      for (const Known& k : known) names += std::string(names.empty() ? "" : ", ") + k.name;
      return Status(Code::kInvalid,
                    "interface: expected a device or one of " + names + ", got " + part);
    }
    const char* last = value.data() + value.size();
    const auto [rest, error] = std::from_chars(value.data(), last, *found->value);
    if (error != std::errc() || rest != last || *found->value < found->min ||
        *found->value > found->max) {
      return Status(Code::kInvalid, "interface: " + key + ": expected " +
                                        std::to_string(found->min) + " to " +
                                        std::to_string(found->max) + ", got " + value);
    }
  }
  return settings;
}

// --- VerbsDevice ---------------------------------------------------------------------------------

Result<std::shared_ptr<VerbsDevice>> VerbsDevice::open(const VerbsSettings& settings) {
  const auto library = VerbsLibrary::load();
  if (!library.ok()) return library.status();
  auto device = std::make_shared<VerbsDevice>();
  device->library = library.value();
  device->settings = settings;
  int count = 0;
  const DeviceList devices = list_devices(*device->library, &count);
  std::string names, why;
  ibv_port_attr port{};
  for (int i = 0; i < count && !device->context; ++i) {
    const std::string name = device->library->get_device_name(devices.get()[i]);
    names += (names.empty() ? "" : ", ") + name;
    if (!settings.device.empty() && name != settings.device) continue;
    ContextHandle context = open_context(*device->library, devices.get()[i]);
    if (!context) {
      why += name + ": " + Status::from_errno("ibv_open_device").text() + "; ";
      continue;
    }
    device->library->query_device(context.get(), &device->limits);
    if (device->limits.max_srq == 0) {  // EFA's driver knows no RC
      why += name + " has no shared receive queues (EFA: use fabric:efa); ";
      continue;
    }
    std::string reason;
    device->port = find_port(*device->library, context.get(), device->limits.phys_port_cnt,
                             settings.port, &port, &reason);
    if (device->port == 0) {
      why += name + ": " + reason + "; ";
      continue;
    }
    device->name = name;
    device->context = std::move(context);
  }
  if (!device->context) {
    if (why.empty() && names.empty())
      return Status(Code::kTransport, "libibverbs finds no RDMA device");
    if (why.empty())
      return Status(Code::kInvalid,
                    "interface: expected one of " + names + ", got " + settings.device);
    return Status(Code::kTransport, why.substr(0, why.size() - 2));
  }
  device->is_ethernet = port.link_layer == IBV_LINK_LAYER_ETHERNET;
  device->place.lid = port.lid;
  device->place.mtu = static_cast<uint8_t>(port.active_mtu);
  while (settings.mtu != 0 && device->place.mtu > IBV_MTU_256 &&
         128 << device->place.mtu > settings.mtu)
    --device->place.mtu;
  device->max_message_bytes = std::min<size_t>(port.max_msg_sz, kMaxMessageBytes);
  if (Status status = choose_gid(*device, port.gid_tbl_len); !status.ok())
    return status.with_prefix("verbs:" + device->name + ": ");
  device->pd = {device->library->alloc_pd(device->context.get()), {device->library->dealloc_pd}};
  if (!device->pd) return Status::from_errno("ibv_alloc_pd(" + device->name + ")");
  return device;
}

// Relaxed ordering lets the NIC's writes pass each other on PCIe. H4 still holds: completions are
// not relaxed, and a completion comes after all bytes of its own message.
Result<VerbsMrHandle> VerbsDevice::register_bytes(std::span<std::byte> bytes, bool remote,
                                                  DmaBuf dmabuf) const {
  const auto address = reinterpret_cast<uint64_t>(bytes.data());
  const char* call = dmabuf.given() ? "ibv_reg_dmabuf_mr" : "ibv_reg_mr";
  unsigned access = IBV_ACCESS_LOCAL_WRITE | (remote ? IBV_ACCESS_REMOTE_WRITE : 0);
  ibv_mr* region = nullptr;
  errno = EOPNOTSUPP;  // of a library that has no such call
  if (settings.relaxed && (library->reg_mr_iova2 != nullptr || dmabuf.given()))
    access |= IBV_ACCESS_RELAXED_ORDERING;  // dropped where it is unknown
  if (dmabuf.given()) {
    if (library->reg_dmabuf_mr != nullptr)
      region = library->reg_dmabuf_mr(pd.get(), dmabuf.offset, bytes.size(), address, dmabuf.fd,
                                      static_cast<int>(access));
  } else if (library->reg_mr_iova2 != nullptr) {
    region = library->reg_mr_iova2(pd.get(), bytes.data(), bytes.size(), address, access);
  } else {
    region = (library->reg_mr)(pd.get(), bytes.data(), bytes.size(), static_cast<int>(access));
  }
  if (region != nullptr) return VerbsMrHandle(region, {library->dereg_mr});
  const int error = errno;
  std::string text =
      Status::from_errno(std::string(call) + " of " + std::to_string(bytes.size()) + " bytes",
                         error)
          .text();
  if (error == ENOMEM) text += ": see `ulimit -l`; the bytes are locked in memory";
  if (dmabuf.given() && error == EOPNOTSUPP)
    text += ": this NIC, its driver or libibverbs takes no memory of a GPU; host memory goes";
  return Status(Code::kTransport, text);
}

ibv_ah_attr VerbsDevice::route_to(const VerbsPlace& to) const {
  ibv_ah_attr route{};
  route.dlid = to.lid;
  route.sl = static_cast<uint8_t>(settings.sl);
  route.port_num = port;
  const bool same_subnet = to.gid.global.subnet_prefix == place.gid.global.subnet_prefix;
  route.is_global = is_ethernet || to.lid == 0 || !same_subnet;
  if (route.is_global) {
    route.grh.dgid = to.gid;
    route.grh.sgid_index = gid_index;
    route.grh.hop_limit = kHopLimit;
    route.grh.traffic_class = static_cast<uint8_t>(settings.traffic_class);
  }
  return route;
}

std::string VerbsDevice::wc_error(const ibv_wc& wc) const {
  static constexpr const char* kNames[] = {"IBV_WC_SUCCESS",           "IBV_WC_LOC_LEN_ERR",
                                           "IBV_WC_LOC_QP_OP_ERR",     "IBV_WC_LOC_EEC_OP_ERR",
                                           "IBV_WC_LOC_PROT_ERR",      "IBV_WC_WR_FLUSH_ERR",
                                           "IBV_WC_MW_BIND_ERR",       "IBV_WC_BAD_RESP_ERR",
                                           "IBV_WC_LOC_ACCESS_ERR",    "IBV_WC_REM_INV_REQ_ERR",
                                           "IBV_WC_REM_ACCESS_ERR",    "IBV_WC_REM_OP_ERR",
                                           "IBV_WC_RETRY_EXC_ERR",     "IBV_WC_RNR_RETRY_EXC_ERR",
                                           "IBV_WC_LOC_RDD_VIOL_ERR",  "IBV_WC_REM_INV_RD_REQ_ERR",
                                           "IBV_WC_REM_ABORT_ERR",     "IBV_WC_INV_EECN_ERR",
                                           "IBV_WC_INV_EEC_STATE_ERR", "IBV_WC_FATAL_ERR",
                                           "IBV_WC_RESP_TIMEOUT_ERR",  "IBV_WC_GENERAL_ERR"};
  static_assert(std::size(kNames) == IBV_WC_GENERAL_ERR + 1);
  const auto number = static_cast<size_t>(wc.status);
  std::string text = number < std::size(kNames) ? kNames[number] : std::to_string(number);
  text += std::string(" (") + library->wc_status_text(wc.status);
  char vendor[32] = "";
  if (wc.vendor_err != 0) std::snprintf(vendor, sizeof vendor, "; vendor 0x%x", wc.vendor_err);
  return text + vendor + ")";
}

std::string gid_text(const ibv_gid& gid) {
  char text[INET6_ADDRSTRLEN] = "";
  if (IN6_IS_ADDR_V4MAPPED(reinterpret_cast<const in6_addr*>(gid.raw)))
    inet_ntop(AF_INET, gid.raw + 12, text, sizeof text);
  else
    inet_ntop(AF_INET6, gid.raw, text, sizeof text);
  return text;
}

// --- for `moe-comm doctor` -----------------------------------------------------------------------

TransportReport probe_verbs() {
  TransportReport report;
  report.name = "verbs";
  const auto library = VerbsLibrary::load();
  if (!library.ok()) {
    report.reason = library.status().text();
    return report;
  }
  int count = 0;
  const DeviceList devices = list_devices(*library.value(), &count);
  if (count == 0)
    report.reason = "libibverbs finds no RDMA device (no NIC, no driver, or no /dev/infiniband)";
  for (int i = 0; i < count; ++i) {
    VerbsSettings settings;
    settings.device = library.value()->get_device_name(devices.get()[i]);
    auto opened = VerbsDevice::open(settings);
    if (!opened.ok()) {
      report.reason += (report.reason.empty() ? "" : "; ") + opened.status().text();
      continue;
    }
    const VerbsDevice& device = *opened.value();
    report.available = true;
    const std::string address =
        device.is_ethernet
            ? "RoCE, GID " + std::to_string(device.gid_index) + " = " + gid_text(device.place.gid)
            : "InfiniBand, LID " + std::to_string(device.place.lid);
    report.detail += (report.detail.empty() ? "" : "; ") + device.name + " port " +
                     std::to_string(device.port) + ": " + address + ", MTU " +
                     std::to_string(128 << device.place.mtu);
  }
  return report;
}

}  // namespace moe_comm

#endif
