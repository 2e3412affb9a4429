// What the files of the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <utility>
#include <vector>

#include "engine.hpp"
#include "exchange.hpp"
#include "status.hpp"

namespace moe_comm {

[[noreturn]] void raise(const Status& status);  // as the exception of its code

inline void check(const Status& status) {
  if (!status.ok()) raise(status);
}
template <typename T>
T check(Result<T> result) {
  if (!result.ok()) raise(result.status());
  return std::move(result.value());
}
template <typename F>
auto unlocked(F&& function) {
  pybind11::gil_scoped_release release;
  return function();
}

std::vector<std::byte> from_bytes(const pybind11::bytes& bytes);

// What calls of the same shapes share, checked and computed once.
struct CallFormat {
  ExchangeKind kind;
  RowFormat row;
  Agreed agreed;
  uint32_t capacity;
  bool cached, expand;
};

void bind_kernel_view(pybind11::class_<Exchange>& exchange);              // bindings_rings.cpp
void bind_rows(pybind11::module_& m);                                     // bindings_rows.cpp
void bind_rings(pybind11::module_& m, pybind11::class_<Engine>& engine);  // bindings_rings.cpp

}  // namespace moe_comm
