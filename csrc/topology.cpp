#include "topology.hpp"

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <tuple>

namespace moe_comm {
namespace {

namespace fs = std::filesystem;
constexpr size_t kMaxNics = 4;  // of one rank: one proxy thread drives them all (p5: 4 a GPU)

std::string read_line(const fs::path& path) {
  std::string line;
  std::ifstream file(path);
  std::getline(file, line);
  return line;
}

std::vector<fs::path> children(const fs::path& folder) {
  std::vector<fs::path> found;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) found.push_back(entry.path());
  std::sort(found.begin(), found.end());
  return found;
}

// "0000:4f:00.0"
bool is_pci_address(const std::string& name) {
  return std::count(name.begin(), name.end(), ':') == 2 && name.find('.') != std::string::npos;
}

// `device`: a PCI device's folder, or a link to it.
PciPlace place_of(const fs::path& device) {
  PciPlace place;
  std::error_code error;
  const fs::path real = fs::canonical(device, error);
  if (error) return place;
  for (const fs::path& part : real) {
    const std::string name = part.string();
    const bool is_root = name.starts_with("pci") && name.find(':') != std::string::npos;
    if (is_root || is_pci_address(name)) place.path.push_back(name);
  }
  place.address = real.filename().string();
  const std::string node = read_line(real / "numa_node");
  if (!node.empty()) place.numa_node = std::atoi(node.c_str());
  return place;
}

// "0-3,8" as numbers
std::vector<int> parse_list(const std::string& text) {
  std::vector<int> numbers;
  const char* at = text.c_str();
  while (*at >= '0' && *at <= '9') {
    char* end = nullptr;
    const long first = strtol(at, &end, 10);
    const long last = *end == '-' ? strtol(end + 1, &end, 10) : first;
    for (long i = first; i <= last; ++i) numbers.push_back(static_cast<int>(i));
    at = *end == ',' ? end + 1 : end;
  }
  return numbers;
}

Nic read_nic(const fs::path& device) {
  Nic nic;
  nic.name = device.filename().string();
  nic.place = place_of(device / "device");
  std::error_code error;
  nic.driver = fs::canonical(device / "device" / "driver", error).filename().string();
  for (const fs::path& port : children(device / "ports")) {
    if (read_line(port / "state").find("ACTIVE") == std::string::npos) continue;
    const double gbps = std::atof(read_line(port / "rate").c_str());  // "400 Gb/sec (4X NDR)"
    if (gbps < nic.gbps) continue;
    nic.gbps = gbps;
    nic.link = read_line(port / "link_layer");
  }
  return nic;
}

std::string names_of(const std::vector<const Nic*>& nics) {
  std::string text;
  for (const Nic* nic : nics) text += (text.empty() ? "" : ", ") + nic->name;
  return text;
}

// The NICs that may be used: of the wanted kind, with an active port, and of one network: of those
// with the same link and rate the group with most bandwidth. A slow one beside them is for other
// things (management, storage).
Result<std::vector<const Nic*>> usable_nics(const HostTopology& host, bool efa) {
  std::map<std::pair<std::string, double>, std::vector<const Nic*>> networks;
  std::string down;
  for (const Nic& nic : host.nics) {
    if ((nic.driver == "efa") != efa) continue;
    if (nic.gbps > 0) {
      networks[{nic.link, nic.gbps}].push_back(&nic);
    } else {
      down += (down.empty() ? "" : ", ") + nic.name;
    }
  }
  if (networks.empty() && !down.empty())
    return Status(Code::kTransport, "no NIC with an active port: " + down + " are down");
  if (networks.empty() && efa) {
    return Status(Code::kTransport,
                  "no EFA NIC in /sys/class/infiniband: on AWS, attach an EFA interface and load "
                  "the driver efa; elsewhere use verbs or fabric:tcp;ofi_rxm");
  }
  if (networks.empty()) {
    return Status(Code::kTransport,
                  "no RDMA NIC in /sys/class/infiniband: load its driver (mlx5_ib, bnxt_re, ...), "
                  "or use fabric:tcp;ofi_rxm");
  }
  const auto best = std::max_element(networks.begin(), networks.end(), [](auto& a, auto& b) {
    return a.first.second * static_cast<double>(a.second.size()) <
           b.first.second * static_cast<double>(b.second.size());
  });
  return best->second;
}

size_t common_depth(const PciPlace& a, const PciPlace& b) {
  const size_t most = std::min(a.path.size(), b.path.size());
  size_t depth = 0;
  while (depth < most && a.path[depth] == b.path[depth]) ++depth;
  return depth;
}

struct Near {
  std::vector<const Nic*> nics;
  std::string how;
};

Near nearest(const PciPlace& gpu, const std::vector<const Nic*>& usable) {
  size_t deepest = 0;
  for (const Nic* nic : usable) deepest = std::max(deepest, common_depth(gpu, nic->place));
  Near near;
  for (const Nic* nic : usable) {
    if (deepest > 0 ? common_depth(gpu, nic->place) == deepest
                    : gpu.numa_node >= 0 && nic->place.numa_node == gpu.numa_node)
      near.nics.push_back(nic);
  }
  if (deepest > 0) {
    near.how = "share PCI " + gpu.path[deepest - 1];
  } else if (!near.nics.empty()) {
    near.how = "are at its NUMA node " + std::to_string(gpu.numa_node);
  } else {
    near = {usable, "are all there are, none is near"};
  }
  return near;
}

size_t share(size_t num_nics, size_t num_places) {
  return std::min(std::max<size_t>(num_nics / num_places, 1), kMaxNics);
}

NicChoice take(const std::vector<const Nic*>& from, size_t place, size_t num_places, size_t count) {
  const size_t first = std::min(place * from.size() / num_places, from.size() - count);
  NicChoice choice;
  for (size_t i = first; i < first + count; ++i) choice.nics.push_back(from[i]->name);
  return choice;
}

std::string share_text(size_t place, size_t num_places, const std::string& of) {
  if (num_places == 1) return "";
  return "; share " + std::to_string(place + 1) + " of " + std::to_string(num_places) + ", by " +
         of;
}

Result<NicChoice> choose_for_gpu(const HostTopology& host, const std::string& address,
                                 const std::vector<const Nic*>& usable) {
  std::vector<Near> near_of;
  for (const Gpu& gpu : host.gpus) near_of.push_back(nearest(gpu.place, usable));
  size_t count = kMaxNics, wanted = host.gpus.size(), place = 0, num_places = 0;
  for (size_t i = 0; i < host.gpus.size(); ++i) {
    const auto alike =
        static_cast<size_t>(std::count_if(near_of.begin(), near_of.end(), [&](const Near& other) {
          return other.nics == near_of[i].nics;
        }));
    count = std::min(count, share(near_of[i].nics.size(), alike));  // the same for every GPU
    if (host.gpus[i].place.address == address) {
      wanted = i;
      num_places = alike;
    }
  }
  if (wanted == host.gpus.size()) {
    return Status(Code::kInvalid,
                  "gpu: expected a PCI address of a GPU of this host, got " + address);
  }
  const Near& near = near_of[wanted];
  for (size_t i = 0; i < wanted; ++i) place += near_of[i].nics == near.nics;
  NicChoice choice = take(near.nics, place, num_places, count);
  choice.why = "for GPU " + address + ": " + names_of(near.nics) + " " + near.how +
               share_text(place, num_places, "GPU");
  return choice;
}

// The NUMA nodes with at least one of these CPUs.
std::vector<int> nodes_of(const HostTopology& host, const std::vector<int>& cpus) {
  std::vector<int> nodes;
  for (size_t node = 0; node < host.cpus_of_node.size(); ++node) {
    const std::vector<int>& here = host.cpus_of_node[node];
    const bool may = std::any_of(cpus.begin(), cpus.end(), [&](int cpu) {
      return std::find(here.begin(), here.end(), cpu) != here.end();
    });
    if (may) nodes.push_back(static_cast<int>(node));
  }
  return nodes;
}

NicChoice choose_for_cpus(const HostTopology& host, const NicRequest& request,
                          const std::vector<const Nic*>& usable) {
  const std::vector<int> nodes = nodes_of(host, request.cpus);
  std::vector<const Nic*> near;
  for (const Nic* nic : usable) {
    if (std::find(nodes.begin(), nodes.end(), nic->place.numa_node) != nodes.end())
      near.push_back(nic);
  }
  const bool by_node = !near.empty() && near.size() < usable.size();
  if (near.empty()) near = usable;
  std::stable_sort(near.begin(), near.end(), [](const Nic* a, const Nic* b) {
    return a->place.numa_node < b->place.numa_node;
  });
  const auto place = static_cast<size_t>(request.place);
  const auto num_places = static_cast<size_t>(request.num_places);
  NicChoice choice = take(near, place, num_places, share(near.size(), num_places));
  choice.why = names_of(near) + (by_node ? " are at the NUMA nodes it may run on" : " are usable") +
               share_text(place, num_places, "rank");
  return choice;
}

}  // namespace

HostTopology HostTopology::read(std::string root) {
  if (root.empty()) {
    const char* asked_for = std::getenv("MOE_COMM_SYSFS");
    root = asked_for && *asked_for ? asked_for : "/sys";
  }
  HostTopology host;
  for (const fs::path& device : children(root + "/class/infiniband"))
    host.nics.push_back(read_nic(device));
  for (const fs::path& device : children(root + "/bus/pci/devices")) {
    if (read_line(device / "vendor") != "0x10de") continue;          // NVIDIA
    if (!read_line(device / "class").starts_with("0x03")) continue;  // a display controller
    host.gpus.push_back({place_of(device)});
  }
  for (const fs::path& folder : children(root + "/devices/system/node")) {
    const std::string name = folder.filename().string();
    if (!name.starts_with("node") || name.find_first_not_of("0123456789", 4) != std::string::npos)
      continue;
    const auto node = static_cast<size_t>(std::atoi(name.c_str() + 4));
    if (host.cpus_of_node.size() <= node) host.cpus_of_node.resize(node + 1);
    host.cpus_of_node[node] = parse_list(read_line(folder / "cpulist"));
  }
  std::sort(host.nics.begin(), host.nics.end(), [](const Nic& a, const Nic& b) {
    return std::tie(a.place.address, a.name) < std::tie(b.place.address, b.name);
  });
  std::sort(host.gpus.begin(), host.gpus.end(),
            [](const Gpu& a, const Gpu& b) { return a.place.address < b.place.address; });
  return host;
}

Result<NicChoice> choose_nics(const HostTopology& host, const NicRequest& request) {
  if (request.num_places < 1 || request.place < 0 || request.place >= request.num_places) {
    return Status(Code::kInvalid, "place: expected one below " +
                                      std::to_string(request.num_places) + ", got " +
                                      std::to_string(request.place));
  }
  auto usable = usable_nics(host, request.efa);
  if (!usable.ok()) return usable.status();
  if (!request.gpu.empty()) return choose_for_gpu(host, request.gpu, usable.value());
  return choose_for_cpus(host, request, usable.value());
}

std::vector<int> usable_cpus() {
  std::vector<int> cpus;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

}  // namespace moe_comm
