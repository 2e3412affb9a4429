// The Python module moe_comm._engine: converts types, releases the GIL, decides nothing. Only file
// that throws.
//
// Imports without torch: tensors come as addresses, descriptors and addresses of peers as bytes.
#include "bindings.hpp"

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

#include "engine.hpp"
#include "exchange.hpp"
#include "host_pool.hpp"
#include "topology.hpp"

namespace py = pybind11;
using namespace moe_comm;  // NOLINT: one file, all of it glue

namespace {

struct Exceptions {
  PyObject *base, *argument, *peer, *mismatch, *timeout, *lost, *transport, *closed;
};
Exceptions exceptions;

PyObject* add_exception(py::module_& m, const char* name, const char* doc,
                        std::vector<PyObject*> bases) {
  py::tuple tuple(bases.size());
  for (size_t i = 0; i < bases.size(); ++i) tuple[i] = py::reinterpret_borrow<py::object>(bases[i]);
  const std::string full = std::string("moe_comm._engine.") + name;
  PyObject* type = PyErr_NewExceptionWithDoc(full.c_str(), doc, tuple.ptr(), nullptr);
  m.attr(name) = py::reinterpret_borrow<py::object>(type);
  return type;
}

}  // namespace

namespace moe_comm {

void raise(const Status& status) {
  PyObject* type = exceptions.base;
  switch (status.code()) {
    case Code::kInvalid:
      type = exceptions.argument;
      break;
    case Code::kPeerError:
      type = exceptions.peer;
      break;
    case Code::kMismatch:
      type = exceptions.mismatch;
      break;
    case Code::kPeerTimeout:
      type = exceptions.timeout;
      break;
    case Code::kPeerLost:
      type = exceptions.lost;
      break;
    case Code::kTransport:
      type = exceptions.transport;
      break;
    case Code::kClosed:
      type = exceptions.closed;
      break;
    case Code::kOk:
    case Code::kAgain:
      break;
  }
  PyErr_SetString(type, status.text().c_str());
  throw py::error_already_set();
}

std::vector<std::byte> from_bytes(const py::bytes& bytes) {
  const std::string_view view = bytes;
  std::vector<std::byte> out(view.size());
  std::memcpy(out.data(), view.data(), view.size());
  return out;
}

}  // namespace moe_comm

namespace {

py::bytes to_bytes(std::span<const std::byte> bytes) {
  return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}
using NameTuple = std::tuple<int64_t, int64_t, uint64_t, uint64_t>;
NameTuple to_tuple(const SegmentName& n) { return {n.pid, n.fd, n.inode, n.num_bytes}; }
SegmentName from_tuple(const NameTuple& t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

template <typename T>
T* at(uintptr_t address) {  // 0: null
  return reinterpret_cast<T*>(address);
}

void bind_call(py::module_& m) {
  py::class_<CallFormat>(m, "CallFormat")
      .def(py::init([](uint32_t kind, const std::array<uint32_t, 8>& row, uint32_t num_experts,
                       uint32_t dtype, uint32_t flags, uint32_t capacity, bool cached,
                       bool expand) {
        const auto [payload, scale, scales_at, token_at, ids_at, weights_at, topk, bytes] = row;
        const Agreed agreed{num_experts, payload, scale, topk, dtype, bytes, flags, 0, 0};
        return CallFormat{static_cast<ExchangeKind>(kind),
                          {payload, scale, scales_at, token_at, ids_at, weights_at, topk, bytes},
                          agreed,
                          capacity,
                          cached,
                          expand};
      }))
      .def_readonly("capacity", &CallFormat::capacity);
  py::class_<Call, std::shared_ptr<Call>> c(m, "Call");
  c.def(py::init([](const CallFormat& format, double late_s, double silent_s, uint32_t num_nodes,
                    uint32_t node_ranks, bool own_rows_direct) {
    auto call = std::make_shared<Call>();
    call->kind = format.kind;
    call->format = format.row;
    call->agreed = format.agreed;
    call->dtype = static_cast<DType>(format.agreed.dtype);
    call->num_experts = format.agreed.num_experts;
    call->capacity = format.capacity;
    call->cached = format.cached;
    call->expand = format.expand;
    call->own_rows_direct = own_rows_direct;
    call->timeouts.late_s = late_s;
    call->timeouts.silent_s = silent_s;
    call->forward_tokens.resize(num_nodes);
    call->forward_rows.resize(num_nodes);
    call->forwarded_rows.assign(static_cast<size_t>(num_nodes) * node_ranks, 0);
    return call;
  }));
  c.def("set_source", [](Call& call, uint32_t num_tokens, uintptr_t x, int64_t x_stride,
                         uintptr_t topk_idx, uintptr_t topk_weights, uintptr_t lane_rows) {
    call.num_tokens = num_tokens;
    call.own_rounds = std::max(1u, (num_tokens + call.capacity - 1) / call.capacity);
    call.source.x = at<const std::byte>(x);
    call.source.x_stride = x_stride;
    call.source.topk_idx = at<const int64_t>(topk_idx);
    call.source.topk_weights = at<const float>(topk_weights);
    call.lane_rows = at<int32_t>(lane_rows);
  });
  c.def("set_scales", [](Call& call, uintptr_t scales, int64_t token_stride, int64_t item_stride,
                         uint32_t item_bytes) {
    call.source.scales = at<const std::byte>(scales);
    call.source.scale_stride_token = token_stride;
    call.source.scale_stride = item_stride;
    call.source.scale_item_bytes = item_bytes;
  });
  // Of the dispatch that a combine or a cached dispatch repeats.
  c.def("set_handle",
        [](Call& call, uint64_t number, uintptr_t lane_rows, uintptr_t recv_tokens,
           uintptr_t positions, std::vector<uint32_t> tokens_of, std::vector<uint32_t> totals) {
          call.agreed.identity = number;
          call.lane_rows = at<int32_t>(lane_rows);
          call.recv_tokens = at<int32_t>(recv_tokens);
          call.positions = at<int32_t>(positions);
          call.tokens_of = std::move(tokens_of);
          call.totals = std::move(totals);
          if (call.kind == kDispatch) return;
          uint32_t most = 1;
          for (const uint32_t tokens : call.tokens_of) most = std::max(most, tokens);
          call.own_rounds = (most + call.capacity - 1) / call.capacity;
        });
  c.def("set_received", [](Call& call, uintptr_t x, uintptr_t scales, uintptr_t ids,
                           uintptr_t weights, uintptr_t recv_tokens, uintptr_t positions) {
    call.out_x = at<std::byte>(x);
    call.out_scales = at<std::byte>(scales);
    call.out_ids = at<int64_t>(ids);
    call.out_weights = at<float>(weights);
    call.recv_tokens = at<int32_t>(recv_tokens);
    call.positions = at<int32_t>(positions);
  });
  c.def("set_results", [](Call& call, uint32_t num_tokens, uintptr_t y, int64_t y_stride,
                          uintptr_t weights, uintptr_t columns, bool columns_by_place) {
    call.num_tokens = num_tokens;
    call.y = at<const std::byte>(y);
    call.y_stride = y_stride;
    call.y_weights = at<const float>(weights);
    call.columns = at<const float>(columns);
    call.columns_by_place = columns_by_place;
  });
  c.def("set_summed", [](Call& call, uintptr_t out, int64_t out_stride, uintptr_t columns,
                         uintptr_t bias, int64_t bias_stride) {
    call.out_y = at<std::byte>(out);
    call.out_stride = out_stride;
    call.out_columns = at<float>(columns);
    call.bias = at<const std::byte>(bias);
    call.bias_stride = bias_stride;
  });
  // Of this rank's tokens: sums go by the lanes of topk_idx; each_copy: copies travel one by one.
  c.def("set_lanes", [](Call& call, uintptr_t topk_idx, uintptr_t weights, bool each_copy) {
    call.lane_idx = at<const int64_t>(topk_idx);
    call.lane_weights = at<const float>(weights);
    call.each_copy = each_copy;
  });
  c.def("set_error",
        [](Call& call, const std::string& text) { call.error = Status(Code::kInvalid, text); });
  c.def_property_readonly("failed", [](const Call& call) { return !call.failure.ok(); });
  c.def("raise_failure", [](const Call& call) { check(call.failure); });
  c.def("set_forward", [](Call& call, uint32_t node, uintptr_t tokens, uintptr_t rows,
                          size_t num_rows, uint32_t G) {
    const auto* t = at<const int32_t>(tokens);
    const auto* r = at<const int32_t>(rows);
    call.forward_tokens[node].assign(t, t + num_rows);
    call.forward_rows[node].assign(r, r + num_rows * G);
  });
  c.def_property_readonly("forward_counts", [](const Call& call) {
    py::tuple counts(call.forward_tokens.size());
    for (size_t node = 0; node < call.forward_tokens.size(); ++node) {
      counts[node] = call.forward_tokens[node].size();
    }
    return counts;
  });
  c.def("copy_forward", [](const Call& call, uint32_t node, uintptr_t tokens, uintptr_t rows) {
    const auto& t = call.forward_tokens[node];
    const auto& r = call.forward_rows[node];
    std::memcpy(at<void>(tokens), t.data(), t.size() * sizeof(int32_t));
    std::memcpy(at<void>(rows), r.data(), r.size() * sizeof(int32_t));
  });
  c.def("set_wait_ns", [](Call& call, uintptr_t wait_ns) { call.wait_ns = at<int64_t>(wait_ns); });
  c.def("set_max_tokens",
        [](Call& call, uint32_t max_tokens) { call.agreed.max_tokens = max_tokens; });
  c.def_readonly("own_rounds", &Call::own_rounds)
      .def_readonly("num_rounds", &Call::num_rounds)
      .def_property_readonly("tokens_of",
                             [](const Call& call) { return py::tuple(py::cast(call.tokens_of)); })
      .def_property_readonly("totals",
                             [](const Call& call) { return py::tuple(py::cast(call.totals)); })
      .def_readonly("epochs", &Call::epochs)
      .def_readonly("identity", &Call::identity);
}

void bind_exchange(py::module_& m) {
  using Self = Exchange;
  py::class_<Self> c(m, "Exchange");
  bind_kernel_view(c);
  c.def(py::init([](Engine& engine, const py::dict& shape, const py::dict& offsets,
                    uint64_t first_epoch,
                    const std::tuple<uintptr_t, size_t, int, uint64_t, int, bool>& windows,
                    const py::object&) {
          GroupShape s;
          s.rank = shape["rank"].cast<uint32_t>();
          s.num_ranks = shape["num_ranks"].cast<uint32_t>();
          s.num_nodes = shape["num_nodes"].cast<uint32_t>();
          s.node_ranks = shape["node_ranks"].cast<uint32_t>();
          s.hops_node = shape["hops_node"].cast<bool>();
          s.node_of = shape["node_of"].cast<std::vector<uint32_t>>();
          s.local_of = shape["local_of"].cast<std::vector<uint32_t>>();
          s.rank_of = shape["rank_of"].cast<std::vector<uint32_t>>();
          s.absent = shape["absent"].cast<std::vector<bool>>();
          s.mask_lost = shape["mask_lost"].cast<bool>();
          WindowOffsets o;
          const auto at = [&](const char* name) { return offsets[name].cast<uint64_t>(); };
          o = {at("beats"), at("commits"), at("releases"), at("sents"),
               at("masks"), at("told"),    at("slots"),    at("far_slots"),
               at("links"), at("sends"),   at("stride"),   at("segment")};
          const auto& [address, num_bytes, dmabuf, offset, device, linked] = windows;
          const WindowMemory memory{
              {reinterpret_cast<std::byte*>(address), num_bytes}, {dmabuf, offset, device}, linked};
          auto made = unlocked(
              [&] { return Exchange::create(engine, std::move(s), o, first_epoch, memory); });
          return check(std::move(made));
        }),
        py::keep_alive<1, 2>(), py::keep_alive<1, 7>())
      .def_property_readonly("segment", [](Self& self) { return to_tuple(self.segment()); })
      .def_property_readonly("regions",
                             [](Self& self) {
                               return std::make_tuple(to_bytes(self.region()),
                                                      to_bytes(self.window_region()));
                             })
      .def("open_rows",
           [](Self& self, uint32_t rank) {
             auto rows = check(unlocked([&] { return self.open_rows(rank); }));
             return std::make_tuple(rows.window, rows.release);
           })
      .def("map_peer",
           [](Self& self, uint32_t rank, const NameTuple& name, uintptr_t windows) {
             check(self.map_peer(rank, from_tuple(name), reinterpret_cast<std::byte*>(windows)));
           })
      .def("link_peer",
           [](Self& self, uint32_t rank, uint32_t engine_peer,
              const std::tuple<py::bytes, py::bytes>& regions, uint32_t window, uint32_t release) {
             const auto region = check(parse_region(from_bytes(std::get<0>(regions))));
             const auto windows = check(parse_region(from_bytes(std::get<1>(regions))));
             check(unlocked([&] {
               return self.link_peer(rank, engine_peer, region, windows, {window, release});
             }));
           })
      .def("start", [](Self& self) { unlocked([&] { self.start(); }); })
      .def_property_readonly("num_lanes", &Self::num_lanes)
      .def_property_readonly("next_epoch", &Self::next_epoch)
      .def("route",
           [](Self& self, Call& call) { check(unlocked([&] { return self.route_tokens(call); })); })
      .def("check_lanes",
           [](Self& self, const Call& call) {
             check(unlocked([&] { return self.check_lanes(call); }));
           })
      .def("send",
           [](Self& self, const std::shared_ptr<Call>& call) {
             check(unlocked([&] { return self.send(call); }));
           })
      .def("wait_headers",
           [](Self& self, Call& call) { check(unlocked([&] { return self.wait_headers(call); })); })
      .def("place",
           [](Self& self, Call& call, uint64_t alignment, uint64_t capacity, uintptr_t copies) {
             const Placement p =
                 self.place(call, alignment, capacity, reinterpret_cast<int64_t*>(copies));
             return std::make_tuple(p.num_rows, p.num_places, p.num_copies, p.fullest);
           })
      .def("receive",
           [](Self& self, Call& call, uint32_t round) {
             check(unlocked([&] { return self.receive(call, round); }));
           })
      .def("finish",
           [](Self& self, Call& call) { check(unlocked([&] { return self.finish(call); })); })
      .def("fail",
           [](Self& self, const std::string& text) {
             unlocked([&] { self.fail({Code::kPeerLost, text}); });
           })
      .def("raise_fault", [](Self& self) { check(self.fault()); })
      .def_property_readonly("lost", &Self::lost)
      .def_property_readonly("absent", [](const Self& self) { return self.absent(); })
      .def("mask", &Self::mask)
      .def("close",
           [](Self& self, double seconds) { check(unlocked([&] { return self.close(seconds); })); })
      .def("stats", [](Self& self) {
        const ExchangeStats& s = self.stats();
        py::dict d;
        d["rows_local"] = s.rows_local.load();
        d["bytes_local"] = s.bytes_local.load();
        d["rows_link"] = s.rows_link.load();
        d["bytes_link"] = s.bytes_link.load();
        d["writes"] = s.writes_link.load();
        return d;
      });
}

void bind_host_pool(py::module_& m) {
  py::class_<HostBlock>(m, "HostBlock", py::buffer_protocol())
      .def(py::init([](size_t num_bytes) {
        auto block = std::make_unique<HostBlock>(num_bytes);
        if (!block->data()) throw std::bad_alloc();
        return block;
      }))
      .def_buffer([](HostBlock& block) {
        return py::buffer_info(static_cast<uint8_t*>(block.data()),
                               static_cast<py::ssize_t>(block.size()));
      });
  m.def("never_destroy", [](const py::object& thing) { thing.inc_ref(); });
  m.def("kept_host_bytes", &kept_host_bytes);
  m.def("release_kept_host_memory", &release_kept_host_memory);
}

struct SharedBuffer {  // a shared segment with the buffer protocol: memory that shm peers write
                       // without a system call
  SharedSegment segment;
};

void bind_engine(py::module_& m) {
  py::class_<Operation, std::shared_ptr<Operation>>(m, "Operation")
      .def_property_readonly("done", &Operation::done)
      .def("wait", [](Operation& self,
                      double seconds) { return unlocked([&] { return self.wait(seconds); }); })
      .def("raise_status", [](Operation& self) { check(self.status()); });
  py::class_<SharedBuffer>(m, "SharedBuffer", py::buffer_protocol())
      .def(py::init([](size_t num_bytes) {
        return SharedBuffer{check(SharedSegment::create("moe_comm:buffer", num_bytes))};
      }))
      .def_property_readonly(
          "address",
          [](SharedBuffer& self) { return reinterpret_cast<uintptr_t>(self.segment.data()); })
      .def_property_readonly("name",
                             [](SharedBuffer& self) { return to_tuple(self.segment.name()); })
      .def_buffer([](SharedBuffer& self) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(self.segment.data()),
                               static_cast<py::ssize_t>(self.segment.bytes().size()));
      });
  using Self = Engine;
  py::class_<Self> engine(m, "Engine");
  bind_rings(m, engine);
  engine
      .def(py::init([](const std::string& transport, const std::string& interface, uint64_t secret,
                       uint64_t shard_bytes, uint64_t chaos_seed, const std::string& gpu) {
             EngineOptions options{transport, interface, secret, shard_bytes, chaos_seed, gpu};
             return check(unlocked([&] { return Engine::open(options); }));
           }),
           py::arg("transport") = "shm", py::arg("interface") = "", py::arg("secret") = 0,
           py::arg("shard_bytes") = 0, py::arg("chaos_seed") = 0, py::arg("gpu") = "")
      .def_property_readonly("transport", [](Self& self) { return self.transport_name(); })
      .def_property_readonly("address",
                             [](Self& self) { return to_bytes(self.proxy().info().address); })
      .def(
          "register",
          [](Self& self, uintptr_t address, size_t num_bytes, int dmabuf, uint64_t offset,
             int device) {
            const std::span<std::byte> bytes(reinterpret_cast<std::byte*>(address), num_bytes);
            return check(unlocked(
                [&] { return self.register_memory(bytes, DmaBuf{dmabuf, offset, device}); }));
          },
          py::arg("address"), py::arg("num_bytes"), py::arg("dmabuf") = -1, py::arg("offset") = 0,
          py::arg("device") = 0)
      .def("forget", [](Self& self,
                        uint64_t region) { check(unlocked([&] { return self.forget(region); })); })
      .def("describe",
           [](Self& self, uint64_t region) {
             return to_bytes(serialise(describe(*check(self.region(region)))));
           })
      .def("connect",
           [](Self& self, const py::bytes& address) {
             const auto bytes = from_bytes(address);
             return check(unlocked([&] { return self.proxy().connect(bytes); }));
           })
      .def("wait_ready",
           [](Self& self, uint32_t peer, double seconds) {
             check(unlocked([&] { return self.wait_ready(peer, seconds); }));
           })
      .def("disconnect",
           [](Self& self, uint32_t peer) { unlocked([&] { self.proxy().disconnect(peer); }); })
      .def("peer_state",
           [](Self& self, uint32_t peer) {
             const char* names[] = {"connecting", "ready", "lost"};
             return std::make_tuple(
                 std::string(names[static_cast<int>(self.proxy().peer_state(peer))]),
                 self.proxy().peer_status(peer).text());
           })
      // writes: (peer, local region, local offset, bytes, descriptor, remote offset, immediate or
      // -1)
      .def(
          "write",
          [](Self& self, const std::vector<std::tuple<uint32_t, uint64_t, uint64_t, uint64_t,
                                                      py::bytes, uint64_t, int64_t>>& writes) {
            struct Held {
              std::vector<std::shared_ptr<const MemoryRegion>> locals;
              std::deque<RemoteRegion> remotes;
            };
            auto held = std::make_shared<Held>();
            std::vector<Proxy::UserWrite> out;
            for (const auto& [peer, region, offset, num_bytes, descriptor, remote_offset,
                              immediate] : writes) {
              held->locals.push_back(check(self.region(region)));
              held->remotes.push_back(check(parse_region(from_bytes(descriptor))));
              const MemoryRegion& local = *held->locals.back();
              const RemoteRegion& remote = held->remotes.back();
              const auto outside = [n = num_bytes](uint64_t at, uint64_t size) {
                return at > size || n > size - at;  // at + n may wrap
              };
              if (outside(offset, local.bytes.size()) || outside(remote_offset, remote.num_bytes)) {
                check(Status(Code::kInvalid, "write: " + std::to_string(num_bytes) +
                                                 " bytes at offset " + std::to_string(offset) +
                                                 " of " + std::to_string(local.bytes.size()) +
                                                 " to offset " + std::to_string(remote_offset) +
                                                 " of " + std::to_string(remote.num_bytes) +
                                                 ": outside the region"));
              }
              out.push_back({peer, &local, offset, num_bytes, &remote, remote_offset,
                             immediate >= 0, static_cast<uint32_t>(immediate)});
            }
            return unlocked([&] { return self.proxy().submit(std::move(out), held); });
          })
      .def("wait",
           [](Self& self, Operation& operation, double seconds) {
             return unlocked([&] { return self.proxy().wait(operation, seconds); });
           })
      .def("take_immediates",
           [](Self& self, uint32_t value, uint64_t count, double seconds) {
             return unlocked([&] { return self.proxy().take_immediates(value, count, seconds); });
           })
      .def("count_immediates",
           [](Self& self, uint32_t value) { return self.proxy().count_immediates(value); })
      .def("wait_immediates",
           [](Self& self, uint64_t seen, double seconds) {
             return unlocked([&] { return self.proxy().wait_immediates(seen, seconds); });
           })
      .def("raise_fault", [](Self& self) { check(self.proxy().fault()); })
      .def("stop", [](Self& self) { unlocked([&] { self.proxy().stop(); }); })
      .def("stats", [](Self& self) {
        const ProxyStats& s = self.proxy().stats();
        py::dict d;
        d["writes"] = s.writes.load();
        d["bytes"] = s.bytes.load();
        d["immediates"] = s.immediates.load();
        d["commands"] = s.commands.load();
        d["loops"] = s.loops.load();
        d["sleeps"] = s.sleeps.load();
        d["helped"] = s.helped.load();
        d["dropped_immediates"] = unlocked([&] { return self.proxy().dropped_immediates(); });
        return d;
      });
}

py::dict to_dict(const TransportReport& report) {
  py::dict d;
  d["name"] = report.name;
  d["available"] = report.available;
  d["detail"] = report.detail;
  d["reason"] = report.reason;
  return d;
}

}  // namespace

PYBIND11_MODULE(_engine, m) {
  m.doc() = "The engine of moe_comm in C++: transports, proxy, and the CPU's exchange.";
  exceptions.base =
      add_exception(m, "MoeCommError", "Base of every error of moe_comm.", {PyExc_RuntimeError});
  exceptions.argument =
      add_exception(m, "ArgumentError", "A wrong argument of this rank: name, expected, found.",
                    {exceptions.base, PyExc_ValueError});
  exceptions.peer = add_exception(
      m, "PeerError", "Another rank raised in the same call; its text follows.", {exceptions.base});
  exceptions.mismatch = add_exception(
      m, "MismatchError", "Ranks passed different parameters to the same call.", {exceptions.peer});
  exceptions.timeout =
      add_exception(m, "PeerTimeout", "A peer that lives did not come before the deadline.",
                    {exceptions.base, PyExc_TimeoutError});
  exceptions.lost = add_exception(m, "PeerLost", "A peer died, left, or gave up.",
                                  {exceptions.base, PyExc_ConnectionError});
  exceptions.transport = add_exception(
      m, "TransportError", "A call of the network or the system failed.", {exceptions.base});
  exceptions.closed = add_exception(m, "ClosedError", "Used after close().", {exceptions.base});
  m.attr("ABI_VERSION") = kAbiVersion;
  m.attr("HEADER_BYTES") = kHeaderBytes;
  m.attr("ROW_ALIGNMENT") = kRowAlignment;
  bind_engine(m);
  bind_call(m);
  bind_exchange(m);
  bind_host_pool(m);
  bind_rows(m);
  m.def("can_map", [](const NameTuple& name, uint64_t secret) {
    auto segment = SharedSegment::open(from_tuple(name));
    uint64_t found = 0;
    if (segment.ok()) std::memcpy(&found, segment.value().data(), sizeof found);
    return std::make_tuple(segment.ok() && found == secret,
                           segment.ok() ? std::string() : segment.status().text());
  });
  m.def("wait_word", [](uintptr_t address, uint64_t old, double seconds) {
    return unlocked(
        [&] { return wait_change(*reinterpret_cast<Counter*>(address), old, seconds); });
  });
  m.def(
      "choose_nics",
      [](bool efa, const std::string& gpu, std::optional<std::vector<int>> cpus, int place,
         int num_places, const std::string& sysfs) {
        NicRequest request{efa, gpu, cpus ? *cpus : usable_cpus(), place, num_places};
        NicChoice choice = check(choose_nics(HostTopology::read(sysfs), request));
        return std::make_tuple(choice.nics, choice.why);
      },
      py::kw_only(), py::arg("efa"), py::arg("gpu") = "", py::arg("cpus") = py::none(),
      py::arg("place") = 0, py::arg("num_places") = 1, py::arg("sysfs") = "");
  m.def(
      "gpus",
      [](const std::string& sysfs) {
        std::vector<std::string> addresses;
        for (const Gpu& gpu : HostTopology::read(sysfs).gpus)
          addresses.push_back(gpu.place.address);
        return addresses;
      },
      py::arg("sysfs") = "");
  m.def("transports", [] {
    std::vector<py::dict> out{to_dict(probe_shm())};
    for (const TransportReport& report : probe_fabric()) out.push_back(to_dict(report));
    out.push_back(to_dict(probe_verbs()));
    return out;
  });
}
