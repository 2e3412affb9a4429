#include "rows.hpp"

#include <algorithm>
#include <cstring>
#include <string>

// One binary for every CPU of the architecture: the loader picks the clone by what the CPU can do
// (clones named after a CPU, like arch=haswell, would fit that model only). No clone may fuse
// multiply and add unasked (-ffp-contract=off), so all give the same bits.
#if !defined(__x86_64__) || defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define MOE_COMM_CLONES
#elif __GNUC__ >= 12
#define MOE_COMM_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MOE_COMM_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#endif
// GCC inlines nothing into a clone by itself, not even std::span's operators: a call for every
// item.
#define MOE_COMM_INLINE inline __attribute__((always_inline))

namespace moe_comm {
namespace {

constexpr size_t kBlock =
    512;  // items summed at a time: the accumulators stay in the nearest cache

struct BFloat16 {
  uint16_t bits;
};

MOE_COMM_INLINE float load(const float* p) { return *p; }
MOE_COMM_INLINE double load(const double* p) { return *p; }
MOE_COMM_INLINE float load(const BFloat16* p) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(p->bits) << 16);
}
MOE_COMM_INLINE float load(const _Float16* p) { return static_cast<float>(*p); }

MOE_COMM_INLINE void store(float* p, float v) { *p = v; }
MOE_COMM_INLINE void store(double* p, double v) { *p = v; }
MOE_COMM_INLINE void store(_Float16* p, float v) { *p = static_cast<_Float16>(v); }
MOE_COMM_INLINE void store(
    BFloat16* p,
    float v) {  // to nearest even; every NaN becomes the quiet one, as in torch
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  p->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

constexpr size_t kLine = 64;  // bytes of a cache line

MOE_COMM_INLINE void fetch(const std::byte* from, size_t num_bytes) {
  for (size_t i = 0; i < num_bytes; i += kLine) __builtin_prefetch(from + i, 0, 3);
}

MOE_COMM_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MOE_COMM_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

// acc[i] (= or +=) row[i], times the weight if there is one.
template <typename T, typename Acc>
MOE_COMM_INLINE void add_term(Acc* acc, const Term& term, size_t from, size_t n, bool first) {
  const T* row = reinterpret_cast<const T*>(term.row) + from;
  const Acc weight = static_cast<Acc>(term.weight);
  if (term.next) fetch(term.next + from * sizeof(T), n * sizeof(T));
  if (term.weighted) {
    if (first) {
      for (size_t i = 0; i < n; ++i) acc[i] = load(row + i) * weight;
    } else if (term.fused) {
      for (size_t i = 0; i < n; ++i)
        acc[i] = fused(static_cast<Acc>(load(row + i)), weight, acc[i]);
    } else {
      for (size_t i = 0; i < n; ++i) acc[i] += load(row + i) * weight;
    }
  } else if (first) {
    for (size_t i = 0; i < n; ++i) acc[i] = load(row + i);
  } else {
    for (size_t i = 0; i < n; ++i) acc[i] += load(row + i);
  }
}

template <typename T, typename Acc>
MOE_COMM_INLINE void sum_all(std::byte* to, const Term* terms, size_t num_terms,
                             const std::byte* bias, size_t num_items) {
  Acc acc[kBlock];
  T* out = reinterpret_cast<T*>(to);
  for (size_t from = 0; from < num_items; from += kBlock) {
    const size_t n = num_items - from < kBlock ? num_items - from : kBlock;
    if (bias) add_term<T, Acc>(acc, {bias, 0, false, nullptr}, from, n, true);
    for (size_t t = 0; t < num_terms; ++t)
      add_term<T, Acc>(acc, terms[t], from, n, !bias && t == 0);
    for (size_t i = 0; i < n; ++i) store(out + from + i, acc[i]);
  }
}

#define MOE_COMM_SUM(name, T, Acc)                                               \
  MOE_COMM_CLONES void name(std::byte* out, const Term* terms, size_t num_terms, \
                            const std::byte* bias, size_t num_items) {           \
    sum_all<T, Acc>(out, terms, num_terms, bias, num_items);                     \
  }
MOE_COMM_SUM(sum_bfloat16, BFloat16, float)
MOE_COMM_SUM(sum_float16, _Float16, float)
MOE_COMM_SUM(sum_float32, float, float)
MOE_COMM_SUM(sum_float64, double, double)
#undef MOE_COMM_SUM

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
      if (tables.lane_of_rank[rank] < 0) continue;
      ++out.rank_counts[rank];
      const auto lane = static_cast<uint32_t>(tables.lane_of_rank[rank]);
      if (rows[lane] < 0) rows[lane] = static_cast<int32_t>(out.lane_counts[lane]++);
    }
  }
  out.digest = digest;
  return {};
}

MOE_COMM_CLONES void copy_row(std::byte* out, const std::byte* in, size_t num_bytes,
                              const std::byte* next_in) {
  size_t i = 0;
  if (next_in) {
    for (; i + kLine <= num_bytes; i += kLine) {
      __builtin_prefetch(next_in + i, 0, 3);
      __builtin_prefetch(out + num_bytes + i, 1, 3);
      std::memcpy(out + i, in + i, kLine);
    }
  }
  std::memcpy(out + i, in + i, num_bytes - i);
}

void write_row(std::byte* row, const RowFormat& format, const TokenSource& source, uint32_t token,
               uint32_t next) {
  copy_row(row, source.x + token * source.x_stride, format.payload_bytes,
           next == token ? nullptr : source.x + next * source.x_stride);
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
      copy_row(out, only, num_items * item_bytes(dtype), terms.empty() ? nullptr : terms[0].next);
    } else {
      std::memset(out, 0, num_items * item_bytes(dtype));
    }
    return;
  }
  switch (dtype) {
    case DType::kBFloat16:
      return sum_bfloat16(out, terms.data(), terms.size(), bias, num_items);
    case DType::kFloat16:
      return sum_float16(out, terms.data(), terms.size(), bias, num_items);
    case DType::kFloat32:
      return sum_float32(out, terms.data(), terms.size(), bias, num_items);
    case DType::kFloat64:
      return sum_float64(out, terms.data(), terms.size(), bias, num_items);
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
