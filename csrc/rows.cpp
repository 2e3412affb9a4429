#include "rows.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

// One binary for every CPU of the architecture: the loader picks the clone. No clone may fuse
// multiply and add
// (-ffp-contract=off), so all give the same bits.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define MOE_COMM_CLONES \
  __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#else
#define MOE_COMM_CLONES
#endif

namespace moe_comm {
namespace {

constexpr size_t kBlock =
    512;  // items summed at a time: the accumulators stay in the nearest cache

struct BFloat16 {
  uint16_t bits;
};

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const BFloat16* p) {
  return std::bit_cast<float>(static_cast<uint32_t>(p->bits) << 16);
}
inline float load(const _Float16* p) { return static_cast<float>(*p); }

inline void store(float* p, float v) { *p = v; }
inline void store(double* p, double v) { *p = v; }
inline void store(_Float16* p, float v) { *p = static_cast<_Float16>(v); }
inline void store(BFloat16* p,
                  float v) {  // to nearest even; every NaN becomes the quiet one, as in torch
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  p->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

template <typename T, typename Acc>
inline __attribute__((always_inline)) void sum_block(T* out, std::span<const Term> terms,
                                                     const T* bias, size_t from, size_t n) {
  Acc acc[kBlock];
  size_t first = 0;
  if (bias) {
    for (size_t i = 0; i < n; ++i) acc[i] = load(bias + from + i);
  } else {
    const T* row = reinterpret_cast<const T*>(terms[0].row) + from;
    const Acc weight = static_cast<Acc>(terms[0].weight);
    if (terms[0].weighted) {
      for (size_t i = 0; i < n; ++i) acc[i] = load(row + i) * weight;
    } else {
      for (size_t i = 0; i < n; ++i) acc[i] = load(row + i);
    }
    first = 1;
  }
  for (size_t t = first; t < terms.size(); ++t) {
    const T* row = reinterpret_cast<const T*>(terms[t].row) + from;
    const Acc weight = static_cast<Acc>(terms[t].weight);
    if (terms[t].weighted) {
      for (size_t i = 0; i < n; ++i) acc[i] += load(row + i) * weight;
    } else {
      for (size_t i = 0; i < n; ++i) acc[i] += load(row + i);
    }
  }
  for (size_t i = 0; i < n; ++i) store(out + from + i, acc[i]);
}

template <typename T, typename Acc>
inline __attribute__((always_inline)) void sum_all(std::byte* out, std::span<const Term> terms,
                                                   const std::byte* bias, size_t num_items) {
  for (size_t from = 0; from < num_items; from += kBlock) {
    sum_block<T, Acc>(reinterpret_cast<T*>(out), terms, reinterpret_cast<const T*>(bias), from,
                      std::min(kBlock, num_items - from));
  }
}

MOE_COMM_CLONES void sum_bfloat16(std::byte* out, std::span<const Term> terms,
                                  const std::byte* bias, size_t n) {
  sum_all<BFloat16, float>(out, terms, bias, n);
}
MOE_COMM_CLONES void sum_float16(std::byte* out, std::span<const Term> terms, const std::byte* bias,
                                 size_t n) {
  sum_all<_Float16, float>(out, terms, bias, n);
}
MOE_COMM_CLONES void sum_float32(std::byte* out, std::span<const Term> terms, const std::byte* bias,
                                 size_t n) {
  sum_all<float, float>(out, terms, bias, n);
}
MOE_COMM_CLONES void sum_float64(std::byte* out, std::span<const Term> terms, const std::byte* bias,
                                 size_t n) {
  sum_all<double, double>(out, terms, bias, n);
}

}  // namespace

size_t item_bytes(DType dtype) {
  switch (dtype) {
    case DType::kBytes:
      return 1;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
  }
  return 0;
}

Status route(const int64_t* topk_idx, uint32_t num_tokens, uint32_t topk, uint32_t num_experts,
             const RouteTables& tables, int32_t* lane_rows, Route& out) {
  const uint32_t R = tables.num_ranks, D = tables.num_lanes;
  const uint32_t L = (num_experts + R - 1) / R;
  out.lane_counts.assign(D, 0);
  out.rank_counts.assign(R, 0);
  out.expert_counts.assign(static_cast<size_t>(R) * L, 0);
  std::vector<uint32_t> expert_stamp(num_experts, 0), rank_stamp(R, 0);
  std::vector<uint32_t> rank_of(num_experts);  // a division per expert, not per entry
  for (uint32_t e = 0; e < num_experts; ++e) rank_of[e] = e / L;
  std::fill_n(lane_rows, static_cast<size_t>(num_tokens) * D, -1);
  const uint64_t digest_key = mix_digest(mix_digest(num_tokens, topk), num_experts);
  uint64_t digest = digest_key;
  for (uint32_t t = 0; t < num_tokens; ++t) {
    const int64_t* ids = topk_idx + static_cast<size_t>(t) * topk;
    int32_t* rows = lane_rows + static_cast<size_t>(t) * D;
    for (uint32_t k = 0; k < topk; ++k) {
      // A sum of position-keyed terms, so that a GPU can compute it in any order.
      digest +=
          mix_digest(mix_digest(digest_key, uint64_t{t} * topk + k), static_cast<uint64_t>(ids[k]));
      if (ids[k] == -1) continue;
      if (ids[k] < -1 || ids[k] >= static_cast<int64_t>(num_experts)) {
        return {Code::kInvalid, "topk_idx: expected expert ids in [0, " +
                                    std::to_string(num_experts) + ") or -1, got " +
                                    std::to_string(ids[k]) + " at [" + std::to_string(t) + ", " +
                                    std::to_string(k) + "]"};
      }
      const auto expert = static_cast<uint32_t>(ids[k]);
      if (expert_stamp[expert] == t + 1) {
        return {Code::kInvalid, "topk_idx: expected different experts for one token, got expert " +
                                    std::to_string(expert) + " twice at token " +
                                    std::to_string(t)};
      }
      expert_stamp[expert] = t + 1;
      ++out.expert_counts[expert];
      const uint32_t rank = rank_of[expert];
      if (rank_stamp[rank] == t + 1) continue;
      rank_stamp[rank] = t + 1;
      ++out.rank_counts[rank];
      const auto lane = static_cast<uint32_t>(tables.lane_of_rank[rank]);
      if (rows[lane] < 0) rows[lane] = static_cast<int32_t>(out.lane_counts[lane]++);
    }
  }
  out.digest = digest;
  return {};
}

void write_row(std::byte* row, const RowFormat& format, const TokenSource& source, uint32_t token) {
  std::memcpy(row, source.x + token * source.x_stride, format.payload_bytes);
  if (format.scale_bytes) {
    const std::byte* from = source.scales + token * source.scale_stride_token;
    const uint32_t item = source.scale_item_bytes;
    if (source.scale_stride == static_cast<int64_t>(item)) {
      std::memcpy(row + format.scales_at, from, format.scale_bytes);
    } else {
      for (uint32_t i = 0; i * item < format.scale_bytes; ++i) {
        std::memcpy(row + format.scales_at + i * item, from + i * source.scale_stride, item);
      }
    }
  }
  if (!source.topk_idx) return;
  const auto token_idx = static_cast<int32_t>(token);
  std::memcpy(row + format.token_at, &token_idx, sizeof token_idx);
  const int64_t* ids = source.topk_idx + static_cast<size_t>(token) * format.topk;
  auto* row_ids = reinterpret_cast<int32_t*>(row + format.ids_at);
  for (uint32_t k = 0; k < format.topk; ++k) row_ids[k] = static_cast<int32_t>(ids[k]);
  if (source.topk_weights) {
    std::memcpy(row + format.weights_at,
                source.topk_weights + static_cast<size_t>(token) * format.topk,
                format.topk * sizeof(float));
  }
}

void sum_rows(std::byte* out, std::span<const Term> terms, const std::byte* bias, size_t num_items,
              DType dtype) {
  if (terms.empty() || (terms.size() == 1 && !terms[0].weighted && !bias)) {
    const std::byte* only = terms.empty() ? bias : terms[0].row;
    if (only) {
      std::memcpy(out, only, num_items * item_bytes(dtype));
    } else {
      std::memset(out, 0, num_items * item_bytes(dtype));
    }
    return;
  }
  switch (dtype) {
    case DType::kBFloat16:
      return sum_bfloat16(out, terms, bias, num_items);
    case DType::kFloat16:
      return sum_float16(out, terms, bias, num_items);
    case DType::kFloat32:
      return sum_float32(out, terms, bias, num_items);
    case DType::kFloat64:
      return sum_float64(out, terms, bias, num_items);
    case DType::kBytes:
      return;  // nothing to add: refused in Python
  }
}

void sum_columns(float* out, std::span<const float* const> terms, size_t num_columns) {
  if (terms.empty()) {
    std::memset(out, 0, num_columns * sizeof(float));
    return;
  }
  std::memcpy(out, terms[0], num_columns * sizeof(float));
  for (size_t t = 1; t < terms.size(); ++t) {
    for (size_t k = 0; k < num_columns; ++k) out[k] += terms[t][k];
  }
}

}  // namespace moe_comm
