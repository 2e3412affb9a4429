// Owners for what libibverbs hands out: unique_ptr deleters, the library itself (opened when asked
// for), and one opened port of a NIC.
#pragma once

#include <infiniband/verbs.h>

#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "../memory.hpp"
#include "../status.hpp"

namespace moe_comm {

template <typename T>
struct CloseVerbs {
  int (*close)(T*) = nullptr;
  void operator()(T* handle) const noexcept {
    if (const int error = close(handle); error != 0)
      std::fprintf(stderr, "moe_comm: closing an object of libibverbs: error %d\n", error);
  }
};
using ContextHandle = std::unique_ptr<ibv_context, CloseVerbs<ibv_context>>;
using PdHandle = std::unique_ptr<ibv_pd, CloseVerbs<ibv_pd>>;
using VerbsMrHandle = std::unique_ptr<ibv_mr, CloseVerbs<ibv_mr>>;
using ChannelHandle = std::unique_ptr<ibv_comp_channel, CloseVerbs<ibv_comp_channel>>;
using VerbsCqHandle = std::unique_ptr<ibv_cq, CloseVerbs<ibv_cq>>;
using SrqHandle = std::unique_ptr<ibv_srq, CloseVerbs<ibv_srq>>;
using QpHandle = std::unique_ptr<ibv_qp, CloseVerbs<ibv_qp>>;
using AhHandle = std::unique_ptr<ibv_ah, CloseVerbs<ibv_ah>>;

// The symbols that are not inline in the header. The library is never unloaded.
struct VerbsLibrary {
  decltype(&::ibv_get_device_list) get_device_list = nullptr;
  decltype(&::ibv_free_device_list) free_device_list = nullptr;
  decltype(&::ibv_get_device_name) get_device_name = nullptr;
  decltype(&::ibv_open_device) open_device = nullptr;
  decltype(&::ibv_close_device) close_device = nullptr;
  decltype(&::ibv_query_device) query_device = nullptr;
  decltype(&::ibv_query_port) query_port = nullptr;
  decltype(&::ibv_query_gid) query_gid = nullptr;
  decltype(&::ibv_alloc_pd) alloc_pd = nullptr;
  decltype(&::ibv_dealloc_pd) dealloc_pd = nullptr;
  decltype(&::ibv_reg_mr) reg_mr = nullptr;
  decltype(&::ibv_dereg_mr) dereg_mr = nullptr;
  decltype(&::ibv_create_comp_channel) create_comp_channel = nullptr;
  decltype(&::ibv_destroy_comp_channel) destroy_comp_channel = nullptr;
  decltype(&::ibv_create_cq) create_cq = nullptr;
  decltype(&::ibv_destroy_cq) destroy_cq = nullptr;
  decltype(&::ibv_get_cq_event) get_cq_event = nullptr;
  decltype(&::ibv_ack_cq_events) ack_cq_events = nullptr;
  decltype(&::ibv_create_srq) create_srq = nullptr;
  decltype(&::ibv_destroy_srq) destroy_srq = nullptr;
  decltype(&::ibv_create_qp) create_qp = nullptr;
  decltype(&::ibv_modify_qp) modify_qp = nullptr;
  decltype(&::ibv_destroy_qp) destroy_qp = nullptr;
  decltype(&::ibv_create_ah) create_ah = nullptr;
  decltype(&::ibv_destroy_ah) destroy_ah = nullptr;
  decltype(&::ibv_wc_status_str) wc_status_text = nullptr;
  // Of newer libraries, or null: registers with flags that a kernel may not know.
  ibv_mr* (*reg_mr_iova2)(ibv_pd*, void*, size_t, uint64_t, unsigned int) = nullptr;
  ibv_mr* (*reg_dmabuf_mr)(ibv_pd*, uint64_t offset, size_t, uint64_t iova, int fd, int) = nullptr;

  static Result<const VerbsLibrary*> load();
};

// NOTE [verbs settings] The `interface` string: "DEVICE", "KEY=VALUE", or several with commas
// between, as in "mlx5_0,gid=3,traffic_class=106". Several devices have a plus sign between them,
// and the settings are of each: "mlx5_0+mlx5_1,gid=3".
struct VerbsSettings {
  std::string device;     // empty: the first with an active port
  int port = 0;           // 0: the first active one
  int gid = -1;           // index; -1: chosen by type and address
  int mtu = 0;            // bytes, upper bound of the path's; 0: the port's
  int pkey = 0;           // index in the port's table
  int sl = 0;             // service level (InfiniBand), priority (RoCE)
  int traffic_class = 0;  // RoCE: the DSCP in its upper 6 bits
  int timeout = 14;       // 4.096 us * 2^timeout until a packet is sent again; 0: for ever
  int retries = 7;        // then the peer is lost
  int rnr_timer = 12;     // code of the pause of a sender that finds no receive posted; 12: 0.64 ms
  int relaxed = 1;        // relaxed ordering of writes on PCIe, where there is such a thing

  static Result<VerbsSettings> parse(const std::string& text);
};

// Where a queue pair of this NIC is found by others.
struct VerbsPlace {
  ibv_gid gid{};
  uint16_t lid = 0;
  uint8_t mtu = 0;           // ibv_mtu
  uint8_t reserved[5] = {};  // compared as bytes: no padding
};

// One port of a NIC, opened. Regions share it, so it closes after the last of them.
struct VerbsDevice {
  const VerbsLibrary* library = nullptr;
  VerbsSettings settings;
  std::string name;  // "mlx5_0"
  uint8_t port = 1;
  uint8_t gid_index = 0;
  bool is_ethernet = false;
  VerbsPlace place;
  size_t max_message_bytes = 0;
  ibv_device_attr limits{};
  ContextHandle context;
  PdHandle pd;

  static Result<std::shared_ptr<VerbsDevice>> open(const VerbsSettings& settings);
  Result<VerbsMrHandle> register_bytes(std::span<std::byte> bytes, bool remote,
                                       DmaBuf dmabuf = {}) const;
  ibv_ah_attr route_to(const VerbsPlace& to) const;
  std::string wc_error(const ibv_wc& wc) const;  // the status's name and text
};

// "10.0.0.7", "fe80::1": a GID as people write it.
std::string gid_text(const ibv_gid& gid);

}  // namespace moe_comm
