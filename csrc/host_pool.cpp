#include "host_pool.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <deque>
#include <mutex>

namespace moe_comm {
namespace {

struct Kept {
  size_t granted;
  void* data;
};

struct Pool {
  std::mutex mutex;
  std::deque<Kept> kept;  // the one freed last, and warmest, at the end
  size_t kept_bytes = 0, used_bytes = 0, peak_bytes = 0;

  void trim() {
    for (; !kept.empty() && used_bytes + kept_bytes > peak_bytes; kept.pop_front()) {
      munmap(kept.front().data, kept.front().granted);
      kept_bytes -= kept.front().granted;
    }
  }
};

Pool& pool() {
  static Pool* of_process = new Pool;  // never destroyed: tensors may outlive every static object
  return *of_process;
}

// Eight sizes between two powers of two: calls whose row counts differ a little share blocks.
size_t granted_for(size_t num_bytes) {
  constexpr size_t kPage = 4096;
  const size_t pages = std::max<size_t>(1, num_bytes / kPage + (num_bytes % kPage != 0));
  const size_t step = std::max<size_t>(1, std::bit_ceil(pages) / 16);
  return (pages + step - 1) / step * step * kPage;
}

}  // namespace

HostBlock::HostBlock(size_t num_bytes) : size_(num_bytes), granted_(granted_for(num_bytes)) {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  const auto fits = [this](const Kept& kept) { return kept.granted == granted_; };
  if (const auto found = std::find_if(p.kept.rbegin(), p.kept.rend(), fits);
      found != p.kept.rend()) {
    data_ = found->data;
    p.kept.erase(std::next(found).base());
    p.kept_bytes -= granted_;
  } else {
    data_ = mmap(nullptr, granted_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) data_ = nullptr;
  }
  if (!data_) return;
  p.used_bytes += granted_;
  p.peak_bytes = std::max(p.peak_bytes, p.used_bytes);
  p.trim();
}

HostBlock::~HostBlock() {
  if (!data_) return;
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  p.kept.push_back({granted_, data_});
  p.kept_bytes += granted_;
  p.used_bytes -= granted_;
}

size_t kept_host_bytes() {
  std::lock_guard lock(pool().mutex);
  return pool().kept_bytes;
}

void release_kept_host_memory() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  p.peak_bytes = 0;
  p.trim();
  p.peak_bytes = p.used_bytes;
}

}  // namespace moe_comm
