#include "host_pool.hpp"

#include <sys/mman.h>

#include <bit>
#include <map>
#include <mutex>
#include <vector>

namespace moe_comm {
namespace {

struct Pool {
  std::mutex mutex;
  std::map<size_t, std::vector<void*>> free;  // by granted size; the last one is the warmest
  size_t kept = 0;                            // bytes in free
};

Pool& pool() {
  static Pool* of_process = new Pool;  // never destroyed: tensors may outlive every static object
  return *of_process;
}

// Eight sizes between two powers of two: calls whose row counts differ a little share blocks.
size_t granted_for(size_t num_bytes) {
  constexpr size_t kPage = 4096;
  const size_t pages = num_bytes < kPage ? 1 : (num_bytes + kPage - 1) / kPage;
  const size_t step = std::bit_ceil(pages) / 16 ? std::bit_ceil(pages) / 16 : 1;
  return (pages + step - 1) / step * step * kPage;
}

}  // namespace

HostBlock::HostBlock(size_t num_bytes) : size_(num_bytes), granted_(granted_for(num_bytes)) {
  {
    Pool& p = pool();
    std::lock_guard lock(p.mutex);
    if (const auto found = p.free.find(granted_); found != p.free.end() && !found->second.empty()) {
      data_ = found->second.back();
      found->second.pop_back();
      p.kept -= granted_;
      return;
    }
  }
  data_ = mmap(nullptr, granted_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data_ == MAP_FAILED) data_ = nullptr;
}

HostBlock::~HostBlock() {
  if (!data_) return;
  {
    Pool& p = pool();
    std::lock_guard lock(p.mutex);
    if (p.kept + granted_ <= kKeptBytes) {
      p.free[granted_].push_back(data_);
      p.kept += granted_;
      return;
    }
  }
  munmap(data_, granted_);
}

size_t kept_host_bytes() {
  std::lock_guard lock(pool().mutex);
  return pool().kept;
}

void release_kept_host_memory() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  for (auto& [granted, blocks] : p.free) {
    for (void* block : blocks) munmap(block, granted);
  }
  p.free.clear();
  p.kept = 0;
}

}  // namespace moe_comm
