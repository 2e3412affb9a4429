// Sums of rows in their stated order, in one kernel, and what tells the reader of them: a command
// for each link, a commit word for each rank of the node. One kernel for every level of a combine,
// as kernels/reduce.py: a rank's own copies, the ranks of a node, the nodes; groups of rows that go
// to a link come first so that the NIC starts early.
//
// What a sum is, kernels/reduce.py says, to the bit. Written over a `Block` like dispatch.cuh.
#pragma once

#include "dispatch.cuh"

namespace moe_comm::combine {

// Rows that lie together in one window (or in the output): sums `first_row`, … of the offsets.
struct Group {
  uint8_t* out;
  int64_t out_stride;  // bytes, a multiple of 16
  uint64_t first_row, num_rows;
};

// Everything is 8 bytes wide. Strides in bytes.
struct Arguments {
  const uint8_t* memory;   // where the terms lie
  const int64_t* offsets;  // [n, J] bytes into it, multiples of 16; -1: none
  const float* weights;    // [n, J], or null
  const uint8_t* bias;     // [n, W] of the rows' dtype, or null
  int64_t bias_stride;
  uint64_t num_terms;  // J
  uint64_t inner_first, inner_last;
  uint64_t payload_bytes;  // of a row, a multiple of 16
  const Group* groups;     // those for links first
  uint64_t num_links, num_local;
  const dispatch::Link* links;     // [num_links]
  uint64_t head_bytes, row_bytes;  // of a link's message
  Counter* const* commits;         // [num_local] words set to `epoch` (H1); null: no word
  const uint64_t* epoch;
  uint64_t* arrived;  // [2] zero before and after
  uint64_t* status;   // WaitStatus of the first push that failed
  DeviceRing ring;
  const uint64_t* waited;    // status of the armed wait before it, or null
  Counter* const* releases;  // [num_releases] words of the node and, behind it, links, at the end:
  uint64_t num_releases;     // the banks are free
  const dispatch::Link* release_links;
  uint64_t num_release_links;
  // fp32 columns beside each row: added like the terms, and never rounded.
  const float* columns;  // [n, num_columns] these are stored at `columns_at` of each row; null: the
                         // sums of those at `columns_at` of the terms are
  uint64_t num_columns, columns_at;
  float* out_columns;  // [n, num_columns] the sums go here instead; or null
  Group whole;         // if `groups` is null: the only one, of no link
  uint64_t fused;      // not 0: products are added with one rounding
};

#ifdef __CUDACC__
// Products and sums are rounded one by one, unless they are asked to be fused.
struct Cta : dispatch::Cta {
  __device__ float multiply(float a, float b) const { return __fmul_rn(a, b); }
  __device__ double multiply(double a, double b) const { return __dmul_rn(a, b); }
  __device__ float add(float a, float b) const { return __fadd_rn(a, b); }
  __device__ double add(double a, double b) const { return __dadd_rn(a, b); }
  __device__ float fused(float a, float b, float c) const { return __fmaf_rn(a, b, c); }
  __device__ double fused(double a, double b, double c) const { return __fma_rn(a, b, c); }
  __device__ float half_to_float(uint16_t bits) const {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
  __device__ uint16_t float_to_half(float value) const {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }
};
#endif

// How a row's items are held and added: Bits in memory, Exact in sums.
struct BFloat16 {
  using Bits = uint16_t;
  using Exact = float;
  template <class Block>
  MOE_COMM_DEVICE static float exact(const Block&, uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    return *reinterpret_cast<const float*>(&wide);
  }
  template <class Block>
  MOE_COMM_DEVICE static uint16_t rounded(const Block&, float value) {  // to nearest, ties to even
    const uint32_t bits = *reinterpret_cast<const uint32_t*>(&value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
};
struct Float16 {
  using Bits = uint16_t;
  using Exact = float;
  template <class Block>
  MOE_COMM_DEVICE static float exact(const Block& block, uint16_t bits) {
    return block.half_to_float(bits);
  }
  template <class Block>
  MOE_COMM_DEVICE static uint16_t rounded(const Block& block, float value) {
    return block.float_to_half(value);
  }
};
template <class T>
struct Itself {
  using Bits = T;
  using Exact = T;
  template <class Block>
  MOE_COMM_DEVICE static T exact(const Block&, T value) {
    return value;
  }
  template <class Block>
  MOE_COMM_DEVICE static T rounded(const Block&, T value) {
    return value;
  }
};

// 16 bytes of one sum. `only` is the last term: the result if it is the only one, and plain.
template <class Type>
struct Sum {
  static constexpr int kItems = 16 / sizeof(typename Type::Bits);
  struct alignas(16) Items {
    typename Type::Bits item[kItems];
  };
  typename Type::Exact total[kItems] = {};
  Items only = {};
  uint32_t count = 0;
  bool plain = true;

  template <class Block>
  MOE_COMM_DEVICE void add(const Block& block, const Items& term, bool weighted, float weight,
                           bool fused = false) {
    for (int i = 0; i < kItems; ++i) {
      typename Type::Exact value = Type::exact(block, term.item[i]);
      const auto factor = static_cast<typename Type::Exact>(weight);
      if (weighted && fused && count > 0) {
        total[i] = block.fused(value, factor, total[i]);
        continue;
      }
      if (weighted) value = block.multiply(value, factor);
      total[i] = count > 0 ? block.add(total[i], value) : value;
    }
    only = term;
    plain = !weighted;
    ++count;
  }
  template <class Block>
  MOE_COMM_DEVICE void add_one(const Block& block, float value) {  // an item alone
    total[0] = count > 0 ? block.add(total[0], value) : value;
    ++count;
  }
  template <class Block>
  MOE_COMM_DEVICE Items rounded(const Block& block) const {
    if (count == 1 && plain) return only;
    Items out;
    for (int i = 0; i < kItems; ++i) out.item[i] = Type::rounded(block, total[i]);
    return out;
  }
};

template <class Type, class Block>
MOE_COMM_DEVICE inline void sum_row(const Block& block, const Arguments& a, uint64_t row,
                                    uint8_t* out) {
  using Items = typename Sum<Type>::Items;
  const int64_t* offsets = a.offsets + row * a.num_terms;
  const auto add = [&](Sum<Type>& sum, uint64_t j, uint64_t at) {
    if (offsets[j] < 0) return;
    const bool weighted = a.weights != nullptr;
    const float weight = weighted ? a.weights[row * a.num_terms + j] : 0.0f;
    sum.add(block, *reinterpret_cast<const Items*>(a.memory + offsets[j] + at), weighted, weight,
            a.fused != 0);
  };
  for (uint64_t at = block.thread() * 16; at < a.payload_bytes; at += block.num_threads() * 16) {
    Sum<Type> sum;
    if (a.bias != nullptr) {
      const uint8_t* bias = a.bias + static_cast<int64_t>(row) * a.bias_stride;
      sum.add(block, *reinterpret_cast<const Items*>(bias + at), false, 0.0f);
    }
    for (uint64_t j = 0; j < a.inner_first; ++j) add(sum, j, at);
    Sum<Type> inner;
    for (uint64_t j = a.inner_first; j < a.inner_last; ++j) add(inner, j, at);
    if (inner.count > 0) sum.add(block, inner.rounded(block), false, 0.0f);
    for (uint64_t j = a.inner_last; j < a.num_terms; ++j) add(sum, j, at);
    *reinterpret_cast<Items*>(out + at) = sum.rounded(block);
  }
}

template <class Block>
MOE_COMM_DEVICE inline void write_columns(const Block& block, const Arguments& a, uint64_t row,
                                          uint8_t* out) {
  const int64_t* offsets = a.offsets + row * a.num_terms;
  for (uint64_t k = block.thread(); k < a.num_columns; k += block.num_threads()) {
    const uint64_t at = row * a.num_columns + k;
    float* to = a.out_columns != nullptr ? a.out_columns + at
                                         : reinterpret_cast<float*>(out + a.columns_at) + k;
    if (a.columns != nullptr) {
      *to = a.columns[at];
      continue;
    }
    Sum<Itself<float>> sum;
    const auto add = [&](Sum<Itself<float>>& to, uint64_t j) {
      if (offsets[j] < 0) return;
      to.add_one(block, reinterpret_cast<const float*>(a.memory + offsets[j] + a.columns_at)[k]);
    };
    for (uint64_t j = 0; j < a.inner_first; ++j) add(sum, j);
    Sum<Itself<float>> inner;
    for (uint64_t j = a.inner_first; j < a.inner_last; ++j) add(inner, j);
    if (inner.count > 0) sum.add_one(block, inner.total[0]);
    for (uint64_t j = a.inner_last; j < a.num_terms; ++j) add(sum, j);
    *to = sum.total[0];
  }
}

template <class Type, class Block>
MOE_COMM_DEVICE inline bool sum_groups(Block& block, const Arguments& a, const Group* groups,
                                       uint64_t num_groups, uint64_t* arrived) {
  for (uint64_t g = 0; g < num_groups; ++g) {
    for (uint64_t i = block.index(); i < groups[g].num_rows; i += block.num_blocks()) {
      const uint64_t row = groups[g].first_row + i;
      uint8_t* out = groups[g].out + static_cast<int64_t>(i) * groups[g].out_stride;
      sum_row<Type>(block, a, row, out);
      write_columns(block, a, row, out);
    }
  }
  return dispatch::is_last(block, arrived);
}

template <class Type, class Block>
MOE_COMM_DEVICE inline void send(Block& block, const Arguments& a) {
  if (!dispatch::came(block, a.waited)) return;
  const Group* groups = a.groups != nullptr ? a.groups : &a.whole;
  if (sum_groups<Type>(block, a, groups, a.num_links, a.arrived)) {
    for (uint64_t l = block.thread(); l < a.num_links; l += block.num_threads()) {
      dispatch::push_link(block, a.ring, a.links[l], *a.epoch,
                          a.head_bytes + groups[l].num_rows * a.row_bytes, a.status);
    }
  }
  if (sum_groups<Type>(block, a, groups + a.num_links, a.num_local, a.arrived + 1)) {
    for (uint64_t l = block.thread(); a.commits != nullptr && l < a.num_local;
         l += block.num_threads()) {
      if (a.commits[l] != nullptr) block.store_release(a.commits[l], *a.epoch);  // H1
    }
    dispatch::release(block, a.releases, a.num_releases, a.release_links, a.num_release_links,
                      *a.epoch, a.ring, a.status);
  }
}

#ifndef __CUDACC_RTC__
static_assert(sizeof(Arguments) == 33 * 8 + sizeof(DeviceRing) && sizeof(Group) == 32);
#endif

}  // namespace moe_comm::combine
