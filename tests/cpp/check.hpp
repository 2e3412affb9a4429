// CHECK for standalone C++ tests: says where, what and why, and ends this process only.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <string>

namespace check {

inline std::string prefix;  // "rank 1: "

[[noreturn]] inline void fail(const char* file, int line, const char* condition,
                              const std::string& why) {
  std::fprintf(stderr, "%s%s:%d: %s%s%s\n", prefix.c_str(), file, line, condition,
               why.empty() ? "" : ": ", why.c_str());
  std::fflush(stderr);
  _exit(1);
}

}  // namespace check

#define CHECK(condition, ...)                                                                \
  do {                                                                                       \
    if (!(condition)) check::fail(__FILE__, __LINE__, #condition, std::string(__VA_ARGS__)); \
  } while (0)
#define CHECK_OK(expression)                                                         \
  do {                                                                               \
    const moe_comm::Status status_ = (expression);                                   \
    if (!status_.ok()) check::fail(__FILE__, __LINE__, #expression, status_.text()); \
  } while (0)
