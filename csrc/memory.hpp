// Memory that peers may write: shared segments (memfd), registered regions, and how a peer names
// them.
//
// A SharedSegment has no name: it is a memfd, opened by a peer through /proc/PID/fd/FD, checked by
// inode and by the group's secret, and gone with its last mapping. /dev/shm and its size limit play
// no part.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "status.hpp"

namespace moe_comm {

class FileDescriptor {  // owns one fd
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    if (this != &other) reset(other.release());
    return *this;
  }
  ~FileDescriptor() { reset(); }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }
  void reset(int fd = -1);

 private:
  int fd_ = -1;
};

class Mapping {  // owns one mmap
 public:
  Mapping() = default;
  Mapping(void* address, size_t num_bytes) : address_(address), num_bytes_(num_bytes) {}
  Mapping(Mapping&& other) noexcept { *this = std::move(other); }
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();
  std::byte* data() const { return static_cast<std::byte*>(address_); }
  size_t size() const { return num_bytes_; }
  std::span<std::byte> bytes() const { return {data(), num_bytes_}; }
  // The addresses stay good for as long as the process lives, for memory that nobody has; what was
  // mapped is not.
  void retire();

 private:
  void* address_ = nullptr;
  size_t num_bytes_ = 0;
};

// How another process finds a segment; travels through the process group.
struct SegmentName {
  int64_t pid = 0;
  int64_t fd = -1;
  uint64_t inode = 0;
  uint64_t num_bytes = 0;
};

class SharedSegment {  // mine (create) or a peer's (open); mapped read-write
 public:
  static Result<SharedSegment> create(const std::string& label, size_t num_bytes);
  static Result<SharedSegment> open(const SegmentName& name);
  const SegmentName& name() const { return name_; }
  std::span<std::byte> bytes() const { return mapping_.bytes(); }
  std::byte* data() const { return mapping_.data(); }
  void retire();  // gone, but for its addresses: Mapping::retire

 private:
  SegmentName name_;
  FileDescriptor fd_;  // kept open by the owner only: it is the segment's name
  Mapping mapping_;
};

// Is the process that this pid meant when it was opened still running? (a pidfd: immune to reuse of
// the number)
class ProcessWatch {
 public:
  static Result<ProcessWatch> open(int64_t pid);
  bool ended() const;

 private:
  FileDescriptor pidfd_;
};

// Every segment this process created, by address: lets a backend see whether memory can be mapped
// by peers. Returns the segment that holds all of `bytes`, or nothing.
struct SegmentSlice {
  SegmentName name;
  uint64_t offset = 0;
};
Result<SegmentSlice> find_segment(std::span<const std::byte> bytes);

// --- regions -------------------------------------------------------------------------------------

// A GPU's memory, as a NIC takes it: its driver exported it. The CPU reads none.
struct DmaBuf {
  int fd = -1;          // -1: memory of the host
  uint64_t offset = 0;  // of the first byte
  int device = 0;       // which GPU of this process: libfabric takes it by that
  bool given() const { return fd >= 0; }
};

struct RemoteKey {
  uint64_t value = 0;
};

// Registered bytes. Owns its registration: releasing it withdraws the peers' right to write.
struct MemoryRegion {
  std::span<std::byte> bytes;
  void* local_key = nullptr;  // the backend's descriptor for local access
  RemoteKey remote_key;       // what a peer must show to write here
  uint64_t remote_base = 0;   // the address of bytes[0] as peers name it
  bool of_device = false;     // by DmaBuf
  std::vector<uint64_t>
      extra;  // backend-specific words that travel with the key (shm: the segment's name)
  std::shared_ptr<void> registration;
};

// A peer's region, as received in a descriptor. One per transport.
struct RemoteRegion {
  uint64_t base = 0;
  uint64_t num_bytes = 0;
  RemoteKey key;
  std::vector<uint64_t> extra;
};

inline RemoteRegion describe(const MemoryRegion& region) {
  return {region.remote_base, region.bytes.size(), region.remote_key, region.extra};
}

}  // namespace moe_comm
