// Runs a function in several forked processes that can swap bytes: a hub in the parent, one socket
// to each rank.
#pragma once

#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "check.hpp"

namespace ranks {

using Bytes = std::vector<std::byte>;
using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Where a CPU emulates the machine everything takes longer: limits are multiplied by this.
inline const double kSlowness = [] {
  const char* text = std::getenv("MOE_COMM_TEST_SLOWNESS");
  return text ? std::max(1.0, std::atof(text)) : 1.0;
}();

// The rank's end of the hub.
class Hub {
 public:
  Hub(int fd, int rank, int num_ranks) : rank_(rank), num_ranks_(num_ranks), fd_(fd) {}
  int rank() const { return rank_; }
  int num_ranks() const { return num_ranks_; }

  // Everybody's bytes, by rank; empty for a rank that ended. Calls `progress` while it waits.
  std::vector<Bytes> all_gather(const Bytes& mine, const std::function<void()>& progress) {
    send_bytes(mine);
    std::vector<Bytes> all;
    for (int i = 0; i < num_ranks_; ++i) all.push_back(receive_bytes(progress));
    return all;
  }

 private:
  void send_bytes(const Bytes& bytes) {
    const uint64_t length = bytes.size();
    CHECK(write(fd_, &length, sizeof length) == sizeof length);
    CHECK(length == 0 || write(fd_, bytes.data(), length) == static_cast<ssize_t>(length));
  }
  Bytes receive_bytes(const std::function<void()>& progress) {
    uint64_t length = 0;
    receive_exactly(&length, sizeof length, progress);
    Bytes bytes(length);
    receive_exactly(bytes.data(), length, progress);
    return bytes;
  }
  void receive_exactly(void* data, size_t length, const std::function<void()>& progress) {
    const auto start = Clock::now();
    for (size_t done = 0; done < length;) {
      const ssize_t n = recv(fd_, static_cast<char*>(data) + done, length - done, MSG_DONTWAIT);
      if (n > 0) done += static_cast<size_t>(n);
      CHECK(n > 0 || (n < 0 && errno == EAGAIN), "the hub is gone");
      if (n < 0) progress();
      CHECK(seconds_since(start) < 45 * kSlowness, "another rank does not arrive");
    }
  }

  int rank_, num_ranks_, fd_;
};

// Forks `num_ranks` processes. True if each ended with 0, or was expected to be killed (bit of
// `may_die`) and was. At the first failure, and at the deadline, the rest is killed.
inline bool run(int num_ranks, double deadline_s, const std::function<void(Hub&)>& body,
                unsigned may_die = 0) {
  deadline_s *= kSlowness;
  std::vector<int> sockets(num_ranks);
  std::vector<pid_t> pids(num_ranks);
  std::fflush(nullptr);
  for (int i = 0; i < num_ranks; ++i) {
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    pids[i] = fork();
    CHECK(pids[i] >= 0);
    if (pids[i] == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      for (int j = 0; j < i; ++j) close(sockets[j]);
      close(pair[0]);
      check::prefix = "rank " + std::to_string(i) + ": ";
      Hub hub(pair[1], i, num_ranks);
      body(hub);
      _exit(0);
    }
    close(pair[1]);
    sockets[i] = pair[0];
  }

  const auto start = Clock::now();
  std::vector<bool> alive(num_ranks, true);
  bool ok = true;
  auto receive_all = [](int fd, void* data, size_t length) {
    return length == 0 || recv(fd, data, length, MSG_WAITALL) == static_cast<ssize_t>(length);
  };
  while (ok) {
    std::vector<Bytes> round(num_ranks);
    bool any = false;
    for (int i = 0; i < num_ranks && ok; ++i) {
      while (alive[i]) {  // until rank i sent its bytes or ended
        pollfd wait{sockets[i], POLLIN, 0};
        poll(&wait, 1, 100);
        uint64_t length = 0;
        if (wait.revents & POLLIN && receive_all(sockets[i], &length, sizeof length)) {
          round[i].resize(length);
          if (receive_all(sockets[i], round[i].data(), length)) {
            any = true;
            break;
          }
        }
        if (wait.revents) alive[i] = false;
        for (int j = 0; j < num_ranks; ++j) {  // a rank that failed ends the others' wait
          siginfo_t info{};
          if (waitid(P_PID, static_cast<id_t>(pids[j]), &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
              info.si_pid != 0 && info.si_code == CLD_EXITED && info.si_status != 0) {
            ok = false;
          }
        }
        if (seconds_since(start) > deadline_s) {
          std::fprintf(stderr, "deadline: %.0f s passed\n", deadline_s);
          ok = false;
        }
        if (!ok) break;
      }
    }
    if (!any || !ok) break;
    for (int i = 0; i < num_ranks; ++i) {
      if (!alive[i]) continue;
      for (const Bytes& bytes : round) {
        const uint64_t length = bytes.size();
        send(sockets[i], &length, sizeof length, MSG_NOSIGNAL);
        if (length > 0) send(sockets[i], bytes.data(), length, MSG_NOSIGNAL);
      }
    }
  }
  for (int i = 0; i < num_ranks; ++i) {
    if (!ok) kill(pids[i], SIGKILL);
    int status = 0;
    while (waitpid(pids[i], &status, ok ? WNOHANG : 0) == 0) {
      usleep(5000);
      if (seconds_since(start) < deadline_s) continue;
      std::fprintf(stderr, "rank %d did not end\n", i);
      kill(pids[i], SIGKILL);
      ok = false;
    }
    const bool was_killed =
        WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL && (may_die >> i & 1);
    if (status != 0 && !was_killed) {
      if (WIFSIGNALED(status) && ok)
        std::fprintf(stderr, "rank %d: signal %d\n", i, WTERMSIG(status));
      ok = false;
    }
    close(sockets[i]);
  }
  return ok;
}

}  // namespace ranks
