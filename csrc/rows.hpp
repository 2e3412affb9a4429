// The CPU's kernels: route, copy and sum rows. Plain loops over plain memory; no threads, no waits,
// no protocol.
//
// Each has a torch twin in kernels/ and is compared with it bit for bit. They are C++ because the
// forwarder must run without the interpreter's lock, and because torch's per-call overhead is most
// of the time at T = 128.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "abi.hpp"
#include "status.hpp"

namespace moe_comm {

enum class DType : uint32_t { kBytes = 0, kBFloat16 = 1, kFloat16 = 2, kFloat32 = 3, kFloat64 = 4 };

size_t item_bytes(DType dtype);  // kBytes: 1

// Where the parts of one row lie; made by moe_comm/layout.py, the same on every rank of a call.
struct RowFormat {
  uint32_t payload_bytes = 0;
  uint32_t scale_bytes = 0;  // 0: none
  uint32_t scales_at = 0;
  uint32_t token_at = 0;    // int32 source token; fresh dispatch only
  uint32_t ids_at = 0;      // int32 [topk], global expert ids; fresh dispatch only
  uint32_t weights_at = 0;  // float32 [topk]: weights (fresh dispatch) or columns (combine), if any
  uint32_t topk = 0;
  uint32_t row_bytes = 0;
};

// --- route ---------------------------------------------------------------------------------------

struct RouteTables {            // who goes where; D lanes, see Exchange
  const int32_t* lane_of_rank;  // [R] the lane a row for this rank takes; -1: it gets none
  uint32_t num_lanes;
  uint32_t num_ranks;
};

struct Route {
  std::vector<uint32_t> lane_counts;    // [D] rows in each lane, all rounds
  std::vector<uint32_t> rank_counts;    // [R] rows each rank will receive of us
  std::vector<uint32_t> expert_counts;  // [R * L] (token, expert) copies, by global expert id
  uint64_t digest = 0;                  // of topk_idx and its shape
};

// topk_idx [T, K] int64 -> lane_rows [T, D] int32: the token's row in each lane, counted from the
// first token of the call, or -1. Deterministic: prefix counts in token order. Errors name the
// token and the entry.
Status route(const int64_t* topk_idx, uint32_t num_tokens, uint32_t topk, uint32_t num_experts,
             const RouteTables& tables, int32_t* lane_rows, Route& out);

// --- copy ----------------------------------------------------------------------------------------

struct TokenSource {  // the user's tensors of one dispatch
  const std::byte* x = nullptr;
  int64_t x_stride = 0;  // bytes between tokens
  const std::byte* scales = nullptr;
  int64_t scale_stride_token = 0, scale_stride = 0;  // bytes
  uint32_t scale_item_bytes = 0;
  const int64_t* topk_idx = nullptr;  // [T, K]; null: cached
  const float* topk_weights = nullptr;
};

// Copies one row and fetches the next: `next_in` (null: there is none), to go behind this one in
// `out`. Where rows come from memory, not from a cache, this moves 1.3 to 1.7 times the bytes of a
// memcpy for each.
void copy_row(std::byte* out, const std::byte* in, size_t num_bytes, const std::byte* next_in);

// One token's row, payload to weights; `next` is the token whose row follows (or `token`).
void write_row(std::byte* row, const RowFormat& format, const TokenSource& source, uint32_t token,
               uint32_t next);

// --- sum -----------------------------------------------------------------------------------------

struct Term {
  const std::byte* row = nullptr;
  float weight = 0;
  bool weighted = false;
  const std::byte* next = nullptr;  // the row that will be read after this one, to be fetched
  bool fused = false;               // multiplied and added with one rounding (a term with a weight)
};

// out[h] = round(bias[h] + terms in order), accumulated in fp32 (fp64 for kFloat64); a product is
// rounded before it is added, unless its term says fused. Without a bias the sum starts with the
// first term, so one plain term passes bit for bit. No term and no bias: zeros. bias has the
// payload's dtype. out may not overlap the terms.
void sum_rows(std::byte* out, std::span<const Term> terms, const std::byte* bias, size_t num_items,
              DType dtype);

// fp32 columns: out[k] = sum of terms in order, starting with the first; no rounding; none: zeros.
void sum_columns(float* out, std::span<const float* const> terms, size_t num_columns);

}  // namespace moe_comm
