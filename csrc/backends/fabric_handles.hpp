// Owners for what libfabric hands out: unique_ptr deleters, and the library itself, opened when
// asked for.
#pragma once

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <signal.h>

#include <array>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "../status.hpp"

namespace moe_comm {

struct CloseFid {
  template <typename Fid>
  void operator()(Fid* handle) const noexcept {
    if (const int rc = fi_close(&handle->fid); rc != 0) {
      std::fprintf(stderr, "moe_comm: fi_close of a libfabric object: error %d\n", -rc);
    }
  }
};
using FabricHandle = std::unique_ptr<fid_fabric, CloseFid>;
using DomainHandle = std::unique_ptr<fid_domain, CloseFid>;
using AvHandle = std::unique_ptr<fid_av, CloseFid>;
using CqHandle = std::unique_ptr<fid_cq, CloseFid>;
using EndpointHandle = std::unique_ptr<fid_ep, CloseFid>;
using MrHandle = std::unique_ptr<fid_mr, CloseFid>;

struct FreeInfo {
  void (*free_info)(fi_info*) = nullptr;
  void operator()(fi_info* info) const noexcept { free_info(info); }
};
using InfoHandle = std::unique_ptr<fi_info, FreeInfo>;

// The five symbols that are not inline in the headers. The library is never unloaded: its providers
// start threads and keep thread-local state.
struct FabricLibrary {
  decltype(&::fi_getinfo) get_info = nullptr;
  decltype(&::fi_freeinfo) free_info = nullptr;
  decltype(&::fi_dupinfo) dup_info = nullptr;
  decltype(&::fi_fabric) open_fabric = nullptr;
  decltype(&::fi_strerror) error_text = nullptr;
  uint32_t version = 0;  // as FI_VERSION(major, minor)

  static Result<FabricLibrary> load();
  // `call`, errno's name and text; libfabric adds numbers of its own to errno's.
  Status error(const std::string& call, ssize_t rc) const;
  std::string version_text() const;
};

// libfabric 1.17's shm provider replaces SIGINT, SIGTERM, SIGSEGV and SIGBUS handlers when the
// library first looks for providers, whichever was asked for: Python would lose Ctrl-C. Debian's
// libfabric also loads libpsm_infinipath, which takes SIGILL, SIGABRT and more as soon as it is
// loaded; its handler ends a crashing process by exit(), with other threads running. This puts back
// what was there.
class KeepSignals {
 public:
  KeepSignals() {
    for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], nullptr, &saved_[i]);
  }
  ~KeepSignals() {
    for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &saved_[i], nullptr);
  }
  KeepSignals(const KeepSignals&) = delete;

 private:
  static constexpr std::array kSignals{SIGHUP, SIGINT, SIGQUIT, SIGILL,  SIGTRAP, SIGABRT,
                                       SIGBUS, SIGFPE, SIGSEGV, SIGTERM, SIGUSR1, SIGUSR2};
  std::array<struct sigaction, kSignals.size()> saved_{};
};

// One NIC, opened. Regions share it, so it closes after the last of them.
struct FabricDevice {
  FabricLibrary library;
  std::string provider;  // as asked for
  std::string source;    // domain or interface that was chosen: "lo", "eth0", "mlx5_0"
  InfoHandle info;
  FabricHandle fabric;
  DomainHandle domain;

  static Result<std::shared_ptr<FabricDevice>> open(const std::string& provider,
                                                    const std::string& interface);
  Result<MrHandle> register_bytes(void* data, size_t num_bytes, uint64_t access,
                                  DmaBuf dmabuf = {}) const;
  bool takes_device_memory() const { return (info->caps & FI_HMEM) != 0; }
  bool wants(int mode_bit) const { return (info->domain_attr->mr_mode & mode_bit) != 0; }
};

// Breaks the connections whose sockets are behind a completion queue's wait fd: NOTE [closing over
// tcp].
void shut_down_sockets(int wait_fd);

// The interfaces or devices that a provider can use here, or why there is none.
Result<std::vector<std::string>> list_fabric_sources(const FabricLibrary& library,
                                                     const std::string& provider);

}  // namespace moe_comm
