// Opening a NIC through libfabric: which provider, which source address, what is asked of it. And
// `probe_fabric`.
#include "../transport.hpp"

#if MOE_COMM_HAVE_FABRIC

#include <arpa/inet.h>
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>

#include "fabric_handles.hpp"

namespace moe_comm {
namespace {

constexpr uint32_t kApiVersion = FI_VERSION(1, 17);
constexpr int kKeyAttempts = 8;  // random keys that collide with one in use

// --- choosing a source ---------------------------------------------------------------------------

bool is(const char* text, const std::string& wanted) { return text != nullptr && wanted == text; }

std::string ip_of(const fi_info* info) {
  char text[INET6_ADDRSTRLEN] = "";
  if (info->src_addr == nullptr) return text;
  if (info->addr_format == FI_SOCKADDR_IN) {
    inet_ntop(AF_INET, &static_cast<const sockaddr_in*>(info->src_addr)->sin_addr, text,
              sizeof text);
  } else if (info->addr_format == FI_SOCKADDR_IN6) {
    inet_ntop(AF_INET6, &static_cast<const sockaddr_in6*>(info->src_addr)->sin6_addr, text,
              sizeof text);
  }
  return text;
}

std::string domain_of(const fi_info* info) {
  return info->domain_attr->name ? info->domain_attr->name : "";
}

// "lo", "127.0.0.1", "mlx5_0", "rdmap16s27" (whose domain libfabric calls "rdmap16s27-rdm").
bool is_named(const fi_info* info, const std::string& name) {
  const std::string domain = domain_of(info);
  const bool is_nic = info->nic && info->nic->device_attr && is(info->nic->device_attr->name, name);
  return is_nic || domain == name || domain.starts_with(name + "-") || ip_of(info) == name;
}

// With no interface asked for: what other hosts can reach, IPv4 first; else the loopback.
int preference(const fi_info* info) {
  if (info->src_addr == nullptr) return 2;
  if (info->addr_format == FI_SOCKADDR_IN) {
    const uint32_t address =
        ntohl(static_cast<const sockaddr_in*>(info->src_addr)->sin_addr.s_addr);
    return address >> 24 == 127 ? 1 : 3;
  }
  if (info->addr_format == FI_SOCKADDR_IN6) {
    const in6_addr& address = static_cast<const sockaddr_in6*>(info->src_addr)->sin6_addr;
    return IN6_IS_ADDR_LOOPBACK(&address) || IN6_IS_ADDR_LINKLOCAL(&address) ? 0 : 2;
  }
  return 2;
}

// What EFA gives, and nothing more: no ordering, completions in any order, immediates as remote CQ
// data. FI_RX_CQ_DATA is not offered, so no provider may want a posted receive for each immediate.
// Of `mr_mode` a provider returns what it needs: where FI_MR_VIRT_ADDR is missing peers name bytes
// by offset, where FI_MR_PROV_KEY is missing we choose keys.
Result<InfoHandle> find_provider(const FabricLibrary& library, const std::string& provider,
                                 bool device_memory = false) {
  InfoHandle hints(library.dup_info(nullptr), FreeInfo{library.free_info});
  if (!hints) return library.error("fi_dupinfo", -FI_ENOMEM);
  hints->caps = FI_MSG | FI_RMA | (device_memory ? FI_HMEM : 0);
  hints->mode = FI_CONTEXT | FI_CONTEXT2;
  hints->ep_attr->type = FI_EP_RDM;
  hints->tx_attr->msg_order = hints->rx_attr->msg_order = FI_ORDER_NONE;
  hints->tx_attr->comp_order = hints->rx_attr->comp_order = FI_ORDER_NONE;
  hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY |
                                (device_memory ? FI_MR_HMEM : 0);
  hints->domain_attr->threading = FI_THREAD_SAFE;  // regions are released on any thread
  hints->domain_attr->resource_mgmt = FI_RM_ENABLED;
  hints->domain_attr->cq_data_size = sizeof(Immediate);
  hints->fabric_attr->prov_name = strdup(provider.c_str());
  fi_info* found = nullptr;
  const int rc = library.get_info(kApiVersion, nullptr, nullptr, 0, hints.get(), &found);
  if (rc != 0) return library.error("fi_getinfo(" + provider + ")", rc);
  return InfoHandle(found, FreeInfo{library.free_info});
}

// Providers whose NIC reaches a GPU's memory itself: they are asked for that, too, and do without
// where this libfabric, or this machine, has no such thing. Others would copy, by the CPU.
bool may_take_device_memory(const std::string& provider) { return provider.starts_with("efa"); }

// --- /dev/shm ------------------------------------------------------------------------------------

// libfabric's shm provider keeps each endpoint in a file /dev/shm/PID:DOMAIN:ENDPOINT, removed when
// it is closed or by the provider's own signal handlers (which KeepSignals takes out again), but
// not when the process is killed.
bool looks_like_endpoint(const char* name, pid_t* pid) {
  int domain = 0, endpoint = 0, length = 0;
  return std::sscanf(name, "%d:%d:%d%n", pid, &domain, &endpoint, &length) == 3 &&
         name[length] == '\0';
}

// Removes files that killed processes of this user left. Three things must hold: the name and owner
// fit, no such process runs, and nobody has the file open or mapped. The last is asked of the
// kernel (a write lease is granted only then), because processes of another PID namespace may share
// /dev/shm. Who opens the file while we hold the lease makes the kernel send us a signal: SIGURG,
// which is ignored by default, instead of SIGIO, which is not.
void remove_stale_endpoints() {
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(opendir("/dev/shm"), closedir);
  if (!directory) return;
  const int at = dirfd(directory.get());
  while (const dirent* entry = readdir(directory.get())) {
    pid_t pid = 0;
    if (!looks_like_endpoint(entry->d_name, &pid) || pid <= 0) continue;
    if (kill(pid, 0) == 0 || errno != ESRCH) continue;
    const FileDescriptor file(
        openat(at, entry->d_name, O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
    struct stat status{};
    if (file.get() < 0 || fstat(file.get(), &status) != 0) continue;
    if (!S_ISREG(status.st_mode) || status.st_uid != geteuid()) continue;
    if (fcntl(file.get(), F_SETSIG, SIGURG) != 0) continue;
    if (fcntl(file.get(), F_SETLEASE, F_WRLCK) == 0) unlinkat(at, entry->d_name, 0);
  }
}

std::string join(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ", ") + part;
  return text;
}

// NOTE [no registration cache] libfabric keeps registrations for reuse after they were closed
// (verbs, efa): their keys would still open the memory that a region was withdrawn from. It reads
// its settings when it first looks for providers. A user's own setting wins.
void disable_registration_cache() {
  static const bool once = [] {
    setenv("FI_MR_CACHE_MAX_COUNT", "0", 0);
    setenv("FI_EFA_MR_CACHE_ENABLE", "0", 0);
    return true;
  }();
  (void)once;
}

}  // namespace

// --- FabricLibrary -------------------------------------------------------------------------------

Result<FabricLibrary> FabricLibrary::load() {
  const KeepSignals keep;
  disable_registration_cache();
  const char* asked_for = std::getenv("MOE_COMM_LIBFABRIC");
  const std::string file = asked_for && *asked_for ? asked_for : "libfabric.so.1";
  void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (handle == nullptr) {
    return Status(
        Code::kTransport,
        std::string("dlopen: ") + dlerror() +
            "; install libfabric 1.17 or newer (Debian, Ubuntu: apt-get install libfabric1), or "
            "say where it is in MOE_COMM_LIBFABRIC");
  }
  FabricLibrary library;
  decltype(&::fi_version) version = nullptr;
  auto find = [&](const char* name, auto& function) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
    return function != nullptr;
  };
  const bool complete =
      find("fi_getinfo", library.get_info) && find("fi_freeinfo", library.free_info) &&
      find("fi_dupinfo", library.dup_info) && find("fi_fabric", library.open_fabric) &&
      find("fi_strerror", library.error_text) && find("fi_version", version);
  if (!complete) return Status(Code::kTransport, file + " lacks a function of libfabric's");
  library.version = version();
  if (FI_VERSION_LT(library.version, kApiVersion)) {
    return Status(Code::kTransport,
                  "libfabric.so.1 is " + library.version_text() + ": expected 1.17 or newer");
  }
  return library;
}

Status FabricLibrary::error(const std::string& call, ssize_t rc) const {
  const int number = static_cast<int>(rc < 0 ? -rc : rc);
  if (number < FI_ERRNO_OFFSET && strerrorname_np(number)) return Status::from_errno(call, number);
  return {Code::kTransport,
          call + ": libfabric error " + std::to_string(number) + " (" + error_text(number) + ")"};
}

std::string FabricLibrary::version_text() const {
  return std::to_string(FI_MAJOR(version)) + "." + std::to_string(FI_MINOR(version));
}

// --- FabricDevice --------------------------------------------------------------------------------

Result<std::shared_ptr<FabricDevice>> FabricDevice::open(const std::string& provider,
                                                         const std::string& interface) {
  const KeepSignals keep;
  auto library = FabricLibrary::load();
  if (!library.ok()) return library.status();
  if (provider == "shm") remove_stale_endpoints();
  auto found = find_provider(library.value(), provider, may_take_device_memory(provider));
  if (!found.ok() && may_take_device_memory(provider))
    found = find_provider(library.value(), provider);
  if (!found.ok()) {
    return Status(Code::kTransport, found.status().text() +
                                        ": libfabric finds nothing here that this provider can "
                                        "use; `moe-comm doctor` says what is missing");
  }

  const fi_info* best = nullptr;
  std::vector<std::string> names;
  for (const fi_info* info = found.value().get(); info != nullptr; info = info->next) {
    const std::string name = domain_of(info) + (ip_of(info).empty() ? "" : " " + ip_of(info));
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    if (!interface.empty() && !is_named(info, interface)) continue;
    if (best == nullptr || preference(info) > preference(best)) best = info;
  }
  if (best == nullptr) {
    return Status(Code::kInvalid, "fabric:" + provider + ": interface: expected one of " +
                                      join(names) + ", got " + interface);
  }
  auto device = std::make_shared<FabricDevice>();
  device->library = library.value();
  device->provider = provider;
  device->source = domain_of(best);
  device->info = InfoHandle(device->library.dup_info(best), FreeInfo{device->library.free_info});
  if (!device->info) return device->library.error("fi_dupinfo", -FI_ENOMEM);
  fid_fabric* fabric = nullptr;
  if (int rc = device->library.open_fabric(device->info->fabric_attr, &fabric, nullptr); rc != 0) {
    return device->library.error("fi_fabric(" + provider + ")", rc);
  }
  device->fabric.reset(fabric);
  fid_domain* domain = nullptr;
  if (int rc = fi_domain(fabric, device->info.get(), &domain, nullptr); rc != 0) {
    return device->library.error("fi_domain(" + provider + "@" + device->source + ")", rc);
  }
  device->domain.reset(domain);
  return device;
}

// NOTE [remote keys] A key is a capability: who was not told it can write nothing. Keys are random
// wherever the provider lets us choose them, as wide as it allows but 63 bits (all ones means "no
// key" to libfabric).
Result<MrHandle> FabricDevice::register_bytes(void* data, size_t num_bytes, uint64_t access,
                                              DmaBuf dmabuf) const {
  const size_t key_bits = std::min<size_t>(8 * info->domain_attr->mr_key_size, 63);
  for (int attempt = 1;; ++attempt) {
    uint64_t key = 0;
    if (!wants(FI_MR_PROV_KEY)) {
      if (getrandom(&key, sizeof key, 0) != sizeof key) return Status::from_errno("getrandom");
      key &= (uint64_t{1} << key_bits) - 1;
    }
    fid_mr* region = nullptr;
    int rc = 0;
    if (dmabuf.given()) {  // libfabric asks the driver for a dmabuf itself, where it needs one
      const iovec bytes{data, num_bytes};
      fi_mr_attr attr{};
      attr.mr_iov = &bytes;
      attr.iov_count = 1;
      attr.access = access;
      attr.requested_key = key;
      attr.iface = FI_HMEM_CUDA;
      attr.device.cuda = dmabuf.device;
      rc = fi_mr_regattr(domain.get(), &attr, 0, &region);
    } else {
      rc = fi_mr_reg(domain.get(), data, num_bytes, access, 0, key, 0, &region, nullptr);
    }
    if (rc == 0) return MrHandle(region);
    if (rc != -FI_ENOKEY || attempt == kKeyAttempts) {
      const std::string call = dmabuf.given() ? "fi_mr_regattr of a GPU's " : "fi_mr_reg of ";
      return library.error(call + std::to_string(num_bytes) + " bytes", rc);
    }
  }
}

// --- closing -------------------------------------------------------------------------------------

// NOTE [closing over tcp] ofi_rxm 1.17 dies of a null pointer (rxm_handle_comp_error) if an
// endpoint is closed while a write with an immediate has half arrived. A connection that breaks is
// handled well, so all connections of an endpoint are broken first: libfabric keeps its sockets in
// (nested) epoll sets below the wait fd, and /proc lists those. What was sent before still goes
// out, unless the peer is sending too, which makes the kernel answer with a reset. Bytes must not
// be taken out of a socket here: libfabric would read what comes next as headers (seen: 4.6 GB of
// receive buffers).
void shut_down_sockets(int wait_fd) {
  std::ifstream lines("/proc/self/fdinfo/" +
                      std::to_string(wait_fd));  // "tfd: 13 events: ..." for each member
  for (std::string word; lines >> word;) {
    int fd = -1;
    if (word != "tfd:" || !(lines >> fd) || fd == wait_fd) continue;
    int domain = 0;
    socklen_t length = sizeof domain;
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) != 0) {
      shut_down_sockets(fd);  // an epoll set (or something that has no members)
    } else if (domain == AF_INET || domain == AF_INET6) {
      shutdown(fd, SHUT_RDWR);
    }
  }
}

// --- for `moe-comm doctor` -----------------------------------------------------------------------

Result<std::vector<std::string>> list_fabric_sources(const FabricLibrary& library,
                                                     const std::string& provider) {
  const KeepSignals keep;
  auto found = find_provider(library, provider);
  if (!found.ok()) return found.status();
  std::vector<std::string> names;
  for (const fi_info* info = found.value().get(); info != nullptr; info = info->next) {
    if (std::find(names.begin(), names.end(), domain_of(info)) == names.end())
      names.push_back(domain_of(info));
  }
  return names;
}

std::vector<TransportReport> probe_fabric() {
  struct Known {
    const char* provider;
    const char* fix;
  };
  constexpr Known kKnown[] = {
      {"tcp;ofi_rxm", "this libfabric has no tcp or no ofi_rxm provider: install libfabric1"},
      {"shm", "this libfabric has no shm provider; not needed, the shm backend does the same"},
      {"efa", "no EFA device: on AWS, attach an EFA interface and install AWS's EFA installer"},
      {"verbs;ofi_rxm",
       "no RDMA NIC with an IP address (see `rdma link`): where there is one, install rdma-core "
       "and "
       "give its network interface an address"},
  };
  std::vector<TransportReport> reports;
  const auto library = FabricLibrary::load();
  for (const Known& known : kKnown) {
    TransportReport report;
    report.name = std::string("fabric:") + known.provider;
    if (!library.ok()) {
      report.reason = library.status().text();
    } else if (auto sources = list_fabric_sources(library.value(), known.provider); sources.ok()) {
      report.available = true;
      report.detail = "libfabric " + library.value().version_text() + "; " + join(sources.value());
      if (may_take_device_memory(known.provider) &&
          find_provider(library.value(), known.provider, true).ok())
        report.detail += "; takes a GPU's memory";
    } else {
      report.detail = "libfabric " + library.value().version_text();
      report.reason = sources.status().text() + "; " + known.fix;
    }
    reports.push_back(std::move(report));
  }
  return reports;
}

}  // namespace moe_comm

#endif
