// moe_comm._engine.rows: the CPU's kernels (rows.hpp) one by one, for tests that compare them with
// their torch twins.
//
// Nothing in the package calls these: an exchange calls them itself. Tensors come as addresses (0:
// null), unchecked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "rows.hpp"

namespace py = pybind11;

namespace moe_comm {
namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_rows(py::module_& m) {
  py::module_ rows =
      m.def_submodule("rows", "The loops over rows of an exchange on the CPU, one by one.");
  // (error text or "", lane_counts, rank_counts, expert_counts)
  rows.def("route",
           [](uintptr_t topk_idx, uint32_t num_tokens, uint32_t topk, uint32_t num_experts,
              const std::vector<int32_t>& lane_of_rank, uint32_t num_lanes, uintptr_t lane_rows) {
             const RouteTables tables{lane_of_rank.data(), num_lanes,
                                      static_cast<uint32_t>(lane_of_rank.size())};
             Route out;
             const Status status = route(at<int64_t>(topk_idx), num_tokens, topk, num_experts,
                                         tables, at<int32_t>(lane_rows), out);
             return std::make_tuple(status.ok() ? std::string() : status.text(), out.lane_counts,
                                    out.rank_counts, out.expert_counts);
           });
  rows.def("write_row",
           [](uintptr_t row,
              const std::tuple<uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t,
                               uint32_t>& format,
              const std::tuple<uintptr_t, int64_t>& x,  // address, bytes between tokens
              const std::tuple<uintptr_t, int64_t, int64_t, uint32_t>&
                  scales,  // likewise, between items, of an item
              uintptr_t topk_idx, uintptr_t topk_weights, uint32_t token) {
             const auto [payload, scale, scales_at, token_at, ids_at, weights_at, topk, row_bytes] =
                 format;
             TokenSource source;
             source.x = at<std::byte>(std::get<0>(x));
             source.x_stride = std::get<1>(x);
             source.scales = at<std::byte>(std::get<0>(scales));
             source.scale_stride_token = std::get<1>(scales);
             source.scale_stride = std::get<2>(scales);
             source.scale_item_bytes = std::get<3>(scales);
             source.topk_idx = at<int64_t>(topk_idx);
             source.topk_weights = at<float>(topk_weights);
             write_row(at<std::byte>(row),
                       {payload, scale, scales_at, token_at, ids_at, weights_at, topk, row_bytes},
                       source, token, token);
           });
  // terms: (address, weight or None)
  rows.def("sum_rows", [](uintptr_t out,
                          const std::vector<std::tuple<uintptr_t, std::optional<float>>>& terms,
                          uintptr_t bias, size_t num_items, uint32_t dtype) {
    std::vector<Term> list;
    for (const auto& [row, weight] : terms) {
      list.push_back({at<std::byte>(row), weight.value_or(0.0f), weight.has_value()});
    }
    sum_rows(at<std::byte>(out), list, at<std::byte>(bias), num_items, static_cast<DType>(dtype));
  });
  rows.def("sum_columns",
           [](uintptr_t out, const std::vector<uintptr_t>& terms, size_t num_columns) {
             std::vector<const float*> list;
             for (const uintptr_t term : terms) list.push_back(at<float>(term));
             sum_columns(at<float>(out), list, num_columns);
           });
}

}  // namespace moe_comm
