// Errors are values: Status, Result<T>, and Fault, which keeps the first error of a thread that
// cannot throw.
#pragma once

#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <variant>

namespace moe_comm {

enum class Code {
  kOk,
  kAgain,        // queue full: try later, nothing happened
  kInvalid,      // a wrong argument, of this rank
  kPeerError,    // a wrong argument, of another rank
  kMismatch,     // ranks disagree
  kPeerTimeout,  // a live peer is late
  kPeerLost,     // a peer died, left, or gave up
  kTransport,    // a call of the network failed
  kClosed,       // used after close
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string text) : code_(code), text_(std::move(text)) {}
  static Status again() { return {Code::kAgain, "queue full"}; }
  // call, errno's name and text: "mmap: ENOMEM (Cannot allocate memory)"
  static Status from_errno(const std::string& call, int error = errno) {
    const char* name = strerrorname_np(error);
    return {Code::kTransport, call + ": " + (name ? name : "errno " + std::to_string(error)) +
                                  " (" + strerrordesc_np(error) + ")"};
  }
  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& text() const { return text_; }
  Status with_prefix(const std::string& prefix) const { return {code_, prefix + text_}; }

 private:
  Code code_ = Code::kOk;
  std::string text_;
};

template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}  // NOLINT: implicit by design, as std::expected
  Result(Status status) : state_(std::move(status)) {}  // NOLINT
  bool ok() const { return std::holds_alternative<T>(state_); }
  const Status& status() const { return std::get<Status>(state_); }
  T& value() { return std::get<T>(state_); }
  const T& value() const { return std::get<T>(state_); }

 private:
  std::variant<T, Status> state_;
};

// The first error of a background thread. `raised()` is one relaxed load; the text is read under a
// lock.
class Fault {
 public:
  void raise(Status status) {
    std::lock_guard lock(mutex_);
    if (raised_.load(std::memory_order_relaxed)) return;
    status_ = std::move(status);
    raised_.store(true, std::memory_order_release);
  }
  bool raised() const { return raised_.load(std::memory_order_acquire); }
  Status status() const {
    std::lock_guard lock(mutex_);
    return status_;
  }

 private:
  mutable std::mutex mutex_;
  std::atomic<bool> raised_{false};
  Status status_;
};

}  // namespace moe_comm
