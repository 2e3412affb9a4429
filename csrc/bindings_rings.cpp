// moe_comm._engine: rings that GPUs push to, and the channels, rows and waits that commands name.
//
// Words and windows come as addresses: their owner keeps them until the rows and waits are closed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.hpp"

namespace py = pybind11;

namespace moe_comm {
namespace {

Counter* at(uintptr_t address) { return reinterpret_cast<Counter*>(address); }
uintptr_t address_of(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// (address of its two words, the engine's peer or -1, who it is, address of its heartbeat or 0)
using Source = std::tuple<uintptr_t, int64_t, std::string, uintptr_t>;

uint32_t open_channel(Engine& engine, uint32_t peer, uint64_t region, const py::bytes& descriptor,
                      uint32_t row) {
  auto local = check(engine.region(region));
  Channel channel{peer,    local.get(), check(parse_region(from_bytes(descriptor))), row, {},
                  nullptr, local};
  return check(unlocked([&] { return engine.proxy().open_channel(std::move(channel)); }));
}

uint32_t open_wait(Engine& engine, const std::string& what, const std::string& who,
                   const std::vector<Source>& sources, const std::vector<uint32_t>& channels) {
  Wait wait{what, who, {}, channels};
  for (const auto& [words, peer, name, beat] : sources) {
    const uint32_t number = peer < 0 ? ~0u : static_cast<uint32_t>(peer);
    wait.sources.push_back({{at(words), at(words) + 1}, number, name, at(beat)});
  }
  return check(unlocked([&] { return engine.proxy().open_wait(std::move(wait)); }));
}

std::shared_ptr<MappedRing> attach_ring(Engine& engine, uint32_t num_slots, uint32_t num_words,
                                        uint32_t num_times, double timeout_s, double silent_s,
                                        uint64_t first_ticket) {
  auto ring = check(
      MappedRing::create({num_slots, num_words, num_times, timeout_s, silent_s, first_ticket}));
  check(unlocked([&] { return engine.proxy().attach(ring); }));
  return ring;
}

// A call of this format by kernels; `text`: of an error that this rank raises.
Call call_of(const CallFormat& format, const std::string& text) {
  Call call;
  call.kind = format.kind;
  call.agreed = format.agreed;
  if (!text.empty()) call.error = {Code::kInvalid, text};
  return call;
}

py::bytes bytes_of(const Header& header) {
  return py::bytes(reinterpret_cast<const char*>(&header), sizeof header);
}

}  // namespace

void bind_kernel_view(py::class_<Exchange>& exchange) {
  exchange
      // What KernelView holds, addresses as numbers; tables: (name, addresses?, words by bank).
      .def("open_view",
           [](Exchange& self) {
             const KernelView view = check(unlocked([&] { return self.open_view(); }));
             py::dict d;
             py::list tables, segments;
             for (const KernelView::Table& table : view.tables)
               tables.append(py::make_tuple(table.name, table.addresses, table.words));
             for (const auto& bytes : view.segments)
               segments.append(py::make_tuple(address_of(bytes.data()), bytes.size()));
             d["tables"] = tables;
             d["segments"] = segments;
             d["links"] = view.links;
             d["local"] = view.local;
             d["results"] = view.results;
             d["masks"] = address_of(view.masks);
             d["credits"] = view.credits;
             d["rows"] = view.rows;
             d["forward"] = view.forward;
             d["timed_rows"] = view.timed_rows;
             d["timed_forward"] = view.timed_forward;
             return d;
           })
      .def("header_like",
           [](const Exchange& self, const CallFormat& format, const std::string& text,
              uint32_t rounds) {
             Call call = call_of(format, text);
             call.own_rounds = rounds;
             return bytes_of(self.header_like(call));
           })
      .def("damaged_like",
           [](const Exchange& self, const CallFormat& format, uint32_t writer) {
             return bytes_of(self.damaged_like(call_of(format, ""), writer));
           })
      .def("blame", &Exchange::blame)
      .def("raise_refusal",
           [](Exchange& self, uint32_t kind, uint64_t epoch, const py::bytes& headers) {
             const auto bytes = from_bytes(headers);
             std::vector<Header> parsed(bytes.size() / sizeof(Header));
             std::memcpy(parsed.data(), bytes.data(), parsed.size() * sizeof(Header));
             check(self.refusal(static_cast<ExchangeKind>(kind), epoch, parsed));
           })
      .def("judge", [](Exchange& self, const CallFormat& format, const py::bytes& header,
                       uint64_t epoch, uint32_t source, uint64_t identity) {
        Header parsed{};
        const auto bytes = from_bytes(header);
        if (bytes.size() != sizeof parsed) throw py::value_error("header");
        std::memcpy(&parsed, bytes.data(), sizeof parsed);
        Call call = call_of(format, "");
        call.agreed.identity = identity;
        check(self.judge(call, parsed, epoch, source));
      });
}

void bind_rings(py::module_& m, py::class_<Engine>& engine) {
  using Self = MappedRing;
  py::class_<Self, std::shared_ptr<Self>>(m, "MappedRing")
      .def_property_readonly("address", [](Self& self) { return address_of(self.memory().data()); })
      .def_property_readonly("num_bytes", [](Self& self) { return self.memory().size(); })
      // (slots, taken, abort word, armed words, times)
      .def_property_readonly("addresses",
                             [](Self& self) {
                               const DeviceRing view = self.view(nullptr, nullptr);
                               return std::make_tuple(
                                   address_of(view.slots), address_of(view.taken),
                                   address_of(view.abort_word), address_of(self.words()),
                                   address_of(self.times()));
                             })
      .def_property_readonly("num_slots", [](Self& self) { return self.options().num_slots; })
      .def_property_readonly("num_words", [](Self& self) { return self.options().num_words; })
      .def_property_readonly("timeout_ns",
                             [](Self& self) { return self.view(nullptr, nullptr).timeout_ns; })
      .def("word",
           [](Self& self, uint32_t word_idx) {
             if (word_idx >= self.options().num_words) throw py::index_error();
             ArmedWord& word = self.words()[word_idx];
             const Counter ended = word_at(word.ended).load(std::memory_order_acquire);  // H6
             return std::make_tuple(ended, word_at(word.status).load(std::memory_order_relaxed));
           })
      .def("raise_fault", [](Self& self) { check(self.fault()); })
      .def_property_readonly("blamed", &Self::blamed)
      .def("stats", [](Self& self) {
        const RingStats& s = self.stats();
        py::dict d;
        d["commands"] = s.commands.load();
        d["torn"] = s.torn.load();
        d["armed"] = s.armed.load();
        d["ended"] = s.ended.load();
        d["failed"] = s.failed.load();
        return d;
      });
  engine
      .def("attach_ring", &attach_ring, py::arg("num_slots") = 4096, py::arg("num_words") = 64,
           py::arg("num_times") = 0, py::arg("timeout_s") = 300.0, py::arg("silent_s") = 30.0,
           py::arg("first_ticket") = 0, py::keep_alive<0, 1>())
      .def("detach_ring",
           [](Engine& self, const std::shared_ptr<MappedRing>& ring) {
             unlocked([&] { self.proxy().detach(ring); });
           })
      .def("open_row",
           [](Engine& self, uintptr_t words, const std::string& what, uint64_t first_epoch) {
             RowTarget target{{at(words), at(words) + 1}, nullptr, what};
             return check(
                 unlocked([&] { return self.proxy().open_row(std::move(target), first_epoch); }));
           })
      .def("close_row",
           [](Engine& self, uint32_t row) { unlocked([&] { self.proxy().close_row(row); }); })
      .def("open_channel", &open_channel)
      .def("open_wait", &open_wait)
      .def("close_channel", [](Engine& self, uint32_t channel) {
        unlocked([&] { self.proxy().close_channel(channel); });
      });
}

}  // namespace moe_comm
