#include "peers.hpp"

#include <signal.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>

namespace moe_comm {

uint64_t random_word() {
  uint64_t word = 0;
  if (getrandom(&word, sizeof word, 0) == sizeof word) return word;
  return static_cast<uint64_t>(Clock::now().time_since_epoch().count());
}

uint64_t host_id() {
  std::string text;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> text;
  struct stat space{};
  const bool known = !text.empty() && stat("/proc/self/ns/pid", &space) == 0;
  if (!known) return random_word();  // then nobody else is on this host
  text += std::to_string(space.st_ino);
  uint64_t hash = 0xcbf29ce484222325;
  for (char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

Watched watch_process(uint64_t host, int64_t pid) {
  if (host != host_id() || pid == getpid()) return {};
  if (auto opened = ProcessWatch::open(pid); opened.ok())
    return {std::make_unique<ProcessWatch>(std::move(opened.value()))};
  return {nullptr, kill(static_cast<pid_t>(pid), 0) != 0 && errno == ESRCH};
}

Status check_write(const Info& info, const NetworkPeer& peer, const WriteRequest& request) {
  if (peer.state == NetworkPeer::kConnecting)
    return {Code::kInvalid, info.name + ": " + peer.text + " is not ready yet"};
  if (peer.state != NetworkPeer::kReady)
    return {Code::kPeerLost, info.name + ": " + peer.text + " is gone"};
  if (request.remote == nullptr)
    return {Code::kInvalid, info.name + ": a write needs a remote region, even of 0 bytes"};
  const uint64_t local_bytes = request.local ? request.local->bytes.size() : 0;
  const bool fits =
      request.num_bytes <= info.capabilities.max_message_bytes &&
      request.remote_offset <= request.remote->num_bytes &&
      request.num_bytes <= request.remote->num_bytes - request.remote_offset &&
      (request.num_bytes == 0 || (request.local_offset <= local_bytes &&
                                  request.num_bytes <= local_bytes - request.local_offset));
  if (fits) return {};
  return {Code::kInvalid, info.name + ": a write of " + std::to_string(request.num_bytes) +
                              " bytes from offset " + std::to_string(request.local_offset) +
                              " of " + std::to_string(local_bytes) + " to offset " +
                              std::to_string(request.remote_offset) + " of " +
                              std::to_string(request.remote->num_bytes) + " does not fit"};
}

}  // namespace moe_comm
