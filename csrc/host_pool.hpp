// Memory for results. A block whose tensor died is kept for the next result of about its size.
//
// torch's CPU allocator hands large blocks back to the system, so that every result of a new call
// is paid for page by page (measured: 2 us for each 4 KiB page, as much as all copies of a dispatch
// of 1024 tokens).
#pragma once

#include <cstddef>

namespace moe_comm {

class HostBlock {
 public:
  // At least `num_bytes`, page aligned, contents undefined; null data() if there is no memory.
  explicit HostBlock(size_t num_bytes);
  ~HostBlock();  // from any thread
  HostBlock(const HostBlock&) = delete;
  HostBlock& operator=(const HostBlock&) = delete;

  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_, granted_;
};

// Bytes kept for later results, at most kKeptBytes in a process.
inline constexpr size_t kKeptBytes = size_t{1} << 30;
size_t kept_host_bytes();
void release_kept_host_memory();  // gives them all back to the system

}  // namespace moe_comm
