// Memory for results. A block whose tensor died is kept for the next result of about its size.
//
// torch's CPU allocator hands large blocks back to the system, so that every result of a new call
// is paid for page by page (measured: 2 us for each 4 KiB page, as much as all copies of a dispatch
// of 1024 tokens). Blocks in use and kept together never take more than were once in use at a time;
// what was freed longest ago goes back to the system first.
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

size_t kept_host_bytes();  // that wait for later results
void release_kept_host_memory();

}  // namespace moe_comm
