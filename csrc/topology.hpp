// Which NICs a rank takes: GPUs, NICs and NUMA nodes of this host, from sysfs.
//
// The nearest ones: those that share the deepest PCI switch with the rank's GPU; where none shares
// any (GB200, many virtual machines) those of its NUMA node, or all. GPUs with the same nearest
// NICs divide them. A rank without a GPU takes its share of those at the NUMA nodes it may run on.
// Each rank of a host gets as many as the others, because NIC i talks to the peer's NIC i; that
// hosts agree, moe_comm/nics.py sees to.
#pragma once

#include <string>
#include <vector>

#include "status.hpp"

namespace moe_comm {

struct PciPlace {
  std::string address;            // "0000:4f:00.0"
  std::vector<std::string> path;  // from the root down, itself last
  int numa_node = -1;             // -1: unknown
};

struct Gpu {
  PciPlace place;
};

struct Nic {
  std::string name;    // "mlx5_0", "rdmap79s0"
  std::string driver;  // "mlx5_core", "efa"
  std::string link;    // "InfiniBand", "Ethernet", "Unspecified"
  double gbps = 0;     // of the best port that is active; 0: none is
  PciPlace place;
};

struct HostTopology {
  std::vector<Gpu> gpus;  // both by PCI address
  std::vector<Nic> nics;
  std::vector<std::vector<int>> cpus_of_node;  // by NUMA node

  // root: empty: MOE_COMM_SYSFS, or /sys. What is not there is left out.
  static HostTopology read(std::string root = "");
};

struct NicRequest {
  bool efa = false;       // NICs of EFA's driver, or all others
  std::string gpu;        // PCI address of the rank's GPU; empty: it has none
  std::vector<int> cpus;  // it may run on; empty: any
  int place = 0;          // among the ranks of this host that divide them
  int num_places = 1;
};

struct NicChoice {
  std::vector<std::string> nics;
  std::string why;
};

// kInvalid for a GPU that is not there, kTransport if there is no NIC to be used, and why.
Result<NicChoice> choose_nics(const HostTopology& host, const NicRequest& request);

std::vector<int> usable_cpus();  // of this thread

}  // namespace moe_comm
