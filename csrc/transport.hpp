// A Transport is six functions; closing it is the destructor. Backends: shm, fabric (libfabric),
// verbs (libibverbs).
//
// Promise of every backend: writes are reliable and in no order at all; an immediate is reported
// only after the bytes of its own write can be read by this host's CPUs (H4). Nothing is promised
// between two writes, even to one peer. One proxy thread uses a transport; none of the six
// functions blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "abi.hpp"
#include "memory.hpp"
#include "status.hpp"

namespace moe_comm {

enum class PeerId : uint32_t {};  // index in this transport, dense, never reused

using Address =
    std::vector<std::byte>;  // opaque, serialisable: all another process needs to connect

// NOTE [EFA's rules] What EFA does not give, nobody is promised, so there is one code path:
// - No order between writes, immediates or completions: the promise above.
// - Immediates of 32 bits (abi.hpp); a write of nothing names a real address and key, too:
//   WriteRequest::remote. Keys are whatever 64 bits the NIC hands out: RemoteKey.
// - Bounded messages and queues, registered local memory, several NICs: fields here, which the
//   proxy obeys. A queue may be full at any time: kAgain.
// - No inline data, no ordering flags, no atomics, no wait object: asked for nowhere in
// fabric*.cpp. tests/cpp/efa_rules.cpp is a libfabric that ends the program which breaks one of
// them.
struct Capabilities {
  size_t max_message_bytes = 0;                   // longest single write
  size_t queue_depth = 0;                         // writes in flight before post_write says kAgain
  bool writes_local_memory_unregistered = false;  // local side of a write needs no registration
  size_t num_nics = 1;                            // that share the writes
};

struct Info {
  std::string name;  // "shm", "fabric:tcp;ofi_rxm@lo", "verbs:mlx5_0"
  Address address;
  Capabilities capabilities;
  int wait_fd = -1;  // readable when poll() has something after poll(…, arm = true) returned 0; -1:
                     // the proxy naps
};

struct WorkId {  // chosen by the proxy, returned with the completion
  uint64_t value = 0;
};

struct WriteRequest {
  PeerId peer{};
  const MemoryRegion* local = nullptr;  // null only when num_bytes == 0
  uint64_t local_offset = 0;
  uint64_t num_bytes = 0;  // 0: immediate only (remote must still be valid: EFA asks for it)
  const RemoteRegion* remote = nullptr;
  uint64_t remote_offset = 0;
  bool has_immediate = false;
  Immediate immediate{};
  WorkId id;
  // How many more writes come right after this one, before the next poll(): their NIC need be told
  // only once. A guess: if they do not come, poll() tells it.
  uint32_t following = 0;
};

struct Completion {
  enum class Kind {
    kWriteDone,    // id, status: our write ended; ok = the local bytes may be reused (what the peer
                   // has is said by its immediate and nothing else)
    kImmediate,    // immediate: a peer's write landed here
    kPeerReady,    // peer: may be written to
    kPeerRefused,  // peer, status: will never be
    kPeerLost,     // peer, status: was ready and is no more; after the immediates of all it wrote
  };
  Kind kind{};
  PeerId peer{};
  WorkId id;
  Immediate immediate{};
  Status status;
};

class Transport {
 public:
  virtual ~Transport() = default;
  virtual const Info& info() const = 0;
  // May be called with bytes registered before. The region stays valid until its last copy is gone;
  // the dmabuf's descriptor may be closed before.
  virtual Result<MemoryRegion> register_memory(std::span<std::byte> bytes, DmaBuf dmabuf = {}) = 0;
  // Never blocks; kPeerReady or kPeerRefused follows from poll(). Connecting twice to one address
  // gives two peers.
  virtual Result<PeerId> connect(const Address& address) = 0;
  // Ends that peer's writes with an error each (reported by poll) and touches no other peer.
  virtual void disconnect(PeerId peer) noexcept = 0;
  // kAgain: queue full, nothing was posted. Any other error: nothing was posted, the peer is to be
  // given up.
  virtual Status post_write(const WriteRequest& request) = 0;
  // Fills `out` from the front. arm: the caller is about to sleep on wait_fd; must re-check after
  // arming.
  virtual size_t poll(std::span<Completion> out, bool arm) = 0;
};

// --- the backends --------------------------------------------------------------------------------

using Secret = uint64_t;  // of the job: a peer that does not show it is refused

Result<std::unique_ptr<Transport>> open_shm(Secret secret);
// provider: "tcp;ofi_rxm", "shm", "efa", "verbs;ofi_rxm"; interface: source address or device, or
// several, "rdmap0s6+rdmap1s6"; empty: provider's choice
Result<std::unique_ptr<Transport>> open_fabric(Secret secret, const std::string& provider,
                                               const std::string& interface);
// interface: a device, or several, and settings, "mlx5_0+mlx5_1,gid=3": NOTE [verbs settings];
// empty: the first device with an active port
Result<std::unique_ptr<Transport>> open_verbs(Secret secret, const std::string& interface);
// Several NICs as one transport (backends/several.cpp); each kind must be the same.
Result<std::unique_ptr<Transport>> join_nics(std::vector<std::unique_ptr<Transport>> nics);

struct TransportReport {  // for `moe-comm doctor`
  std::string name;
  bool available = false;
  std::string detail;  // version, devices
  std::string reason;  // why not, and the fix
};
TransportReport probe_shm();
std::vector<TransportReport> probe_fabric();
TransportReport probe_verbs();

}  // namespace moe_comm
