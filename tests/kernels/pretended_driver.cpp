// libcuda's calls that are about memory, over memory of the host: what a device's is allocated from
// is a file without a name, an IPC handle names its process and descriptor, a dmabuf is that file.
// Strict where the driver is: what was not allocated or mapped here is an error, whoever opens its
// own handle is refused. With -DCUDA_H the compiler compares all of it with the driver's header.
#ifdef CUDA_H
#include <cuda.h>
#else
using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUdevice_attribute = int;
using CUmemRangeHandleType = int;
struct CUipcMemHandle {
  char reserved[64];
};
#define CUDAAPI
#endif

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {
constexpr CUresult kSuccess = static_cast<CUresult>(0), kInvalidValue = static_cast<CUresult>(1),
                   kOutOfMemory = static_cast<CUresult>(2),
                   kInvalidContext = static_cast<CUresult>(201);

struct Allocation {
  size_t num_bytes;
  int file;
};
struct Name {  // what an IPC handle holds
  long process;
  int file;
  size_t num_bytes;
};

std::mutex mutex;
std::map<CUdeviceptr, Allocation> allocated, opened, registered;
std::map<int, int> attributes{{19, 1}, {99, 1}, {118, 100}, {122, 1}, {124, 1}};
std::string refused;  // a call that fails

CUdeviceptr map_file(int file, size_t num_bytes) {
  void* address = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  return address == MAP_FAILED ? 0 : reinterpret_cast<CUdeviceptr>(address);
}

// The allocation, opened or not, that all of it lies in.
const Allocation* find(CUdeviceptr address, size_t num_bytes) {
  for (const auto* table : {&allocated, &opened}) {
    auto after = table->upper_bound(address);
    if (after == table->begin()) continue;
    const auto& [first, found] = *--after;
    if (address - first + num_bytes <= found.num_bytes) return &found;
  }
  return nullptr;
}
}  // namespace

#define REFUSABLE              \
  std::lock_guard lock(mutex); \
  if (refused == __func__) return kInvalidValue

extern "C" {

// --- for tests

void pretend_refuse(const char* call) { refused = call; }
void pretend_attribute(int number, int value) { attributes[number] = value; }
size_t pretend_allocated() { return allocated.size(); }
size_t pretend_opened() { return opened.size(); }
size_t pretend_registered() { return registered.size(); }

// --- the driver's

CUresult CUDAAPI cuGetErrorString(CUresult error, const char** text) {
  *text = error == kSuccess          ? "no error"
          : error == kOutOfMemory    ? "out of memory"
          : error == kInvalidContext ? "invalid device context"
                                     : "invalid argument";
  return kSuccess;
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute number, CUdevice) {
  REFUSABLE;
  const auto found = attributes.find(static_cast<int>(number));
  if (found == attributes.end()) return kInvalidValue;
  *value = found->second;
  return kSuccess;
}

CUresult CUDAAPI cuMemAlloc_v2(CUdeviceptr* address, size_t num_bytes) {
  REFUSABLE;
  const int file = memfd_create("moe_comm:pretended", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, static_cast<off_t>(num_bytes)) != 0) return kOutOfMemory;
  *address = map_file(file, num_bytes);
  if (*address == 0) return kOutOfMemory;
  std::memset(reinterpret_cast<void*>(*address), 0xA5, 4096);  // it is not zeroed
  allocated[*address] = {num_bytes, file};
  return kSuccess;
}

CUresult CUDAAPI cuMemFree_v2(CUdeviceptr address) {
  REFUSABLE;
  const auto found = allocated.find(address);
  if (found == allocated.end()) return kInvalidValue;
  munmap(reinterpret_cast<void*>(address), found->second.num_bytes);
  close(found->second.file);
  allocated.erase(found);
  return kSuccess;
}

CUresult CUDAAPI cuMemsetD8_v2(CUdeviceptr address, unsigned char byte, size_t num_bytes) {
  REFUSABLE;
  if (!find(address, num_bytes)) return kInvalidValue;
  std::memset(reinterpret_cast<void*>(address), byte, num_bytes);
  return kSuccess;
}

CUresult CUDAAPI cuMemcpyDtoH_v2(void* host, CUdeviceptr address, size_t num_bytes) {
  REFUSABLE;
  if (!find(address, num_bytes)) return kInvalidValue;
  std::memcpy(host, reinterpret_cast<void*>(address), num_bytes);
  return kSuccess;
}

CUresult CUDAAPI cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr address) {
  REFUSABLE;
  const auto found = allocated.find(address);
  if (found == allocated.end()) return kInvalidValue;
  const Name name{getpid(), found->second.file, found->second.num_bytes};
  std::memset(handle, 0, sizeof *handle);
  std::memcpy(handle->reserved, &name, sizeof name);
  return kSuccess;
}

CUresult CUDAAPI cuIpcOpenMemHandle_v2(CUdeviceptr* address, CUipcMemHandle handle,
                                       unsigned int flags) {
  REFUSABLE;
  Name name{};
  std::memcpy(&name, handle.reserved, sizeof name);
  if (flags != 1) return kInvalidValue;
  if (name.process == getpid()) return kInvalidContext;
  const std::string path =
      "/proc/" + std::to_string(name.process) + "/fd/" + std::to_string(name.file);
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) return kInvalidValue;
  *address = map_file(file, name.num_bytes);
  opened[*address] = {name.num_bytes, -1};
  close(file);
  return kSuccess;
}

CUresult CUDAAPI cuIpcCloseMemHandle(CUdeviceptr address) {
  REFUSABLE;
  const auto found = opened.find(address);
  if (found == opened.end()) return kInvalidValue;
  munmap(reinterpret_cast<void*>(address), found->second.num_bytes);
  opened.erase(found);
  return kSuccess;
}

CUresult CUDAAPI cuMemGetHandleForAddressRange(void* handle, CUdeviceptr address, size_t num_bytes,
                                               CUmemRangeHandleType type,
                                               unsigned long long flags) {
  REFUSABLE;
  const Allocation* found = find(address, num_bytes);
  const bool whole_pages = address % 4096 == 0 && num_bytes % 4096 == 0;
  if (!found || !whole_pages || static_cast<int>(type) != 1 || flags != 0) return kInvalidValue;
  *static_cast<int*>(handle) = fcntl(found->file, F_DUPFD_CLOEXEC, 0);
  return kSuccess;
}

CUresult CUDAAPI cuMemHostRegister_v2(void* address, size_t num_bytes, unsigned int flags) {
  REFUSABLE;
  const auto first = reinterpret_cast<CUdeviceptr>(address);
  if (flags != 3 || first % 4096 != 0 || registered.contains(first)) return kInvalidValue;
  registered[first] = {num_bytes, -1};
  return kSuccess;
}

CUresult CUDAAPI cuMemHostGetDevicePointer_v2(CUdeviceptr* there, void* address,
                                              unsigned int flags) {
  REFUSABLE;
  const auto first = reinterpret_cast<CUdeviceptr>(address);
  if (flags != 0 || !registered.contains(first)) return kInvalidValue;
  *there = first;
  return kSuccess;
}

CUresult CUDAAPI cuMemHostUnregister(void* address) {
  REFUSABLE;
  return registered.erase(reinterpret_cast<CUdeviceptr>(address)) == 1 ? kSuccess : kInvalidValue;
}
}
