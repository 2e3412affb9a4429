// A standalone C++ test: `PROGRAM` runs every case, `PROGRAM NAME...` those named. Exit status 0:
// all passed.
#pragma once

#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"

namespace cases {

using Random = std::mt19937_64;

struct Case {
  const char* name;
  void (*body)();
};

inline const char* running = "";  // for the watchdog

inline void run_too_long(int) {
  for (const char* text : {running, ": did not end in 60 s\n"}) {
    [[maybe_unused]] const ssize_t ignored = write(STDERR_FILENO, text, std::strlen(text));
  }
  _exit(1);
}

inline int run(int argc, char** argv, const std::vector<Case>& all) {
  signal(SIGALRM, run_too_long);
  int ran = 0;
  for (const Case& one : all) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted |= std::strcmp(argv[i], one.name) == 0;
    if (!wanted) continue;
    running = one.name;
    check::prefix = std::string(one.name) + ": ";
    alarm(60);
    const auto start = std::chrono::steady_clock::now();
    one.body();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%-40s %.2f s\n", one.name, seconds.count());
    std::fflush(stdout);
    ++ran;
  }
  CHECK(ran > 0, "no case of that name");
  return 0;
}

}  // namespace cases
