#include "memory.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>

namespace moe_comm {
namespace {

// NOTE [segment registry] The only global of the engine: which address ranges of this process are
// shared segments. It is a fact about the process's address space, which is global too; nothing is
// configured through it.
struct Registry {
  std::mutex mutex;
  std::map<const std::byte*, SegmentName> by_address;
};
Registry& registry() {
  static Registry* instance =
      new Registry;  // never destroyed: threads may outlive static destructors
  return *instance;
}

void forget_segment(const void* address) {
  std::lock_guard lock(registry().mutex);
  registry().by_address.erase(static_cast<const std::byte*>(address));
}

Result<Mapping> map_shared(int fd, size_t num_bytes) {
  void* address =
      mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (address == MAP_FAILED)
    return Status::from_errno("mmap of " + std::to_string(num_bytes) + " bytes");
  madvise(address, num_bytes,
          MADV_DONTFORK);  // a forked child must not keep a dead job's windows alive
  return Mapping(address, num_bytes);
}

}  // namespace

void FileDescriptor::reset(int fd) {
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(address_, other.address_);
  std::swap(num_bytes_, other.num_bytes_);
  return *this;
}

Mapping::~Mapping() {
  if (!address_) return;
  forget_segment(address_);
  munmap(address_, num_bytes_);
}

void Mapping::retire() {
  if (!address_) return;
  forget_segment(address_);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(address_, num_bytes_, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) return;
  madvise(address_, num_bytes_, MADV_DONTFORK);
  address_ = nullptr;
}

void SharedSegment::retire() {
  mapping_.retire();
  fd_.reset();
}

Result<SharedSegment> SharedSegment::create(const std::string& label, size_t num_bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  num_bytes = (std::max<size_t>(num_bytes, 1) + page - 1) / page * page;
  FileDescriptor fd(memfd_create(label.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd.get() < 0) return Status::from_errno("memfd_create");
  if (ftruncate(fd.get(), static_cast<off_t>(num_bytes)) != 0) {
    return Status::from_errno("ftruncate of a shared segment to " + std::to_string(num_bytes) +
                              " bytes");
  }
  // A segment never shrinks, so no peer can be made to fault on a page that went away.
  if (fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return Status::from_errno("fcntl(F_ADD_SEALS)");
  }
  struct stat info{};
  if (fstat(fd.get(), &info) != 0) return Status::from_errno("fstat");
  auto mapping = map_shared(fd.get(), num_bytes);
  if (!mapping.ok()) return mapping.status();
  SharedSegment segment;
  segment.name_ = {getpid(), fd.get(), static_cast<uint64_t>(info.st_ino), num_bytes};
  segment.fd_ = std::move(fd);
  segment.mapping_ = std::move(mapping.value());
  std::lock_guard lock(registry().mutex);
  registry().by_address[segment.data()] = segment.name_;
  return segment;
}

Result<SharedSegment> SharedSegment::open(const SegmentName& name) {
  const std::string path = "/proc/" + std::to_string(name.pid) + "/fd/" + std::to_string(name.fd);
  FileDescriptor fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (fd.get() < 0) return Status::from_errno("open(" + path + ")");
  struct stat info{};
  if (fstat(fd.get(), &info) != 0) return Status::from_errno("fstat(" + path + ")");
  if (static_cast<uint64_t>(info.st_ino) != name.inode ||
      static_cast<uint64_t>(info.st_size) != name.num_bytes) {
    return Status(Code::kTransport,
                  path + " is another file now: its process ended or closed the segment");
  }
  auto mapping = map_shared(fd.get(), name.num_bytes);
  if (!mapping.ok()) return mapping.status();
  SharedSegment segment;
  segment.name_ = name;
  segment.mapping_ = std::move(mapping.value());
  return segment;
}

Result<ProcessWatch> ProcessWatch::open(int64_t pid) {
  ProcessWatch watch;
  watch.pidfd_.reset(static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0)));
  if (watch.pidfd_.get() < 0) return Status::from_errno("pidfd_open(" + std::to_string(pid) + ")");
  return watch;
}

bool ProcessWatch::ended() const {
  if (pidfd_.get() < 0) return false;
  pollfd fd{pidfd_.get(), POLLIN, 0};
  return ::poll(&fd, 1, 0) > 0;
}

Result<SegmentSlice> find_segment(std::span<const std::byte> bytes) {
  std::lock_guard lock(registry().mutex);
  auto& map = registry().by_address;
  auto next = map.upper_bound(bytes.data());
  if (next != map.begin()) {
    const auto& [start, name] = *std::prev(next);
    const uint64_t offset = static_cast<uint64_t>(bytes.data() - start);
    if (offset + bytes.size() <= name.num_bytes) return SegmentSlice{name, offset};
  }
  return Status(Code::kInvalid, "not inside a shared segment of this process");
}

}  // namespace moe_comm
