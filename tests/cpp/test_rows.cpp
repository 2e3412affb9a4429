// The CPU's row loops against naive ones: sums of every dtype and odd value, rows written, tokens
// routed.
//
// Halves are converted here by hand (search and compare, no _Float16), so that the compiler's
// conversions are tested too.
#include <bit>
#include <cmath>
#include <limits>
#include <set>

#include "cases.hpp"
#include "rows.hpp"

using namespace moe_comm;
using cases::Random;

namespace {

// --- numbers -------------------------------------------------------------------------------------

double half_value(uint16_t bits) {  // by the definition
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) {
    return fraction ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

uint16_t half_bits(float value) {  // to nearest, ties to even; any NaN gives 0x7e00
  if (std::isnan(value)) return 0x7e00;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(static_cast<double>(value));
  if (size >= 65520) return sign | 0x7c00;
  uint16_t below = 0;  // the largest half that is not larger
  for (uint16_t bit = 1 << 14; bit; bit >>= 1) {
    if ((below | bit) < 0x7c00 && half_value(below | bit) <= size) below |= bit;
  }
  const double under = size - half_value(below);
  const double over = (below == 0x7bff ? 65536.0 : half_value(below + 1)) - size;
  return sign | static_cast<uint16_t>(below + (over < under || (over == under && (below & 1))));
}

uint16_t bfloat_bits(float value) {  // likewise; NaN 0x7fc0
  if (std::isnan(value)) return 0x7fc0;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t below = bits >> 16, rest = bits & 0xffff;
  return static_cast<uint16_t>(below + (rest > 0x8000 || (rest == 0x8000 && (below & 1))));
}

struct Half {
  using Item = uint16_t;
  using Sum = float;
  static constexpr DType kDType = DType::kFloat16;
  static float load(uint16_t bits) { return static_cast<float>(half_value(bits)); }
  static uint16_t store(float value) { return half_bits(value); }
};
struct Bfloat {
  using Item = uint16_t;
  using Sum = float;
  static constexpr DType kDType = DType::kBFloat16;
  static float load(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
  static uint16_t store(float value) { return bfloat_bits(value); }
};
struct Single {
  using Item = uint32_t;
  using Sum = float;
  static constexpr DType kDType = DType::kFloat32;
  static float load(uint32_t bits) { return std::bit_cast<float>(bits); }
  static uint32_t store(float value) { return std::bit_cast<uint32_t>(value); }
};
struct Double {
  using Item = uint64_t;
  using Sum = double;
  static constexpr DType kDType = DType::kFloat64;
  static double load(uint64_t bits) { return std::bit_cast<double>(bits); }
  static uint64_t store(double value) { return std::bit_cast<uint64_t>(value); }
};

// Bits of numbers that are easily got wrong, and ordinary ones.
template <typename Of>
typename Of::Item odd_item(Random& random) {
  using Item = typename Of::Item;
  constexpr int kBits = sizeof(Item) * 8;
  constexpr int kFraction = Of::kDType == DType::kFloat16    ? 10
                            : Of::kDType == DType::kBFloat16 ? 7
                            : Of::kDType == DType::kFloat32  ? 23
                                                             : 52;
  const auto sign = static_cast<Item>(static_cast<Item>(random() & 1) << (kBits - 1));
  const Item fraction = static_cast<Item>(random()) & ((Item{1} << kFraction) - 1);
  const Item infinity = static_cast<Item>((Item{1} << (kBits - 1)) - (Item{1} << kFraction));
  switch (random() % 16) {
    case 0:
      return sign;  // 0, -0
    case 1:
      return sign | fraction;  // subnormal
    case 2:
      return sign | 1;  // the smallest
    case 3:
      return sign | static_cast<Item>(Item{1} << kFraction);  // the smallest normal
    case 4:
      return sign | static_cast<Item>(infinity - 1);  // the largest
    case 5:
      return random() % 8 ? sign : sign | infinity;
    case 6:
      return random() % 8 ? sign
                          : static_cast<Item>(sign | infinity | fraction | 1);  // NaN, quiet or not
    case 7:
      return static_cast<Item>(random());  // anything
    default:
      return Of::store(
          static_cast<typename Of::Sum>(static_cast<double>(random() % 20001) / 777.0 - 13.0));
  }
}

float odd_weight(Random& random) {
  constexpr float kWeights[] = {0.0f, -0.0f, 1.0f, -1.0f, 1e-38f, 1e-45f, 3e38f, 0.1f, 0.3333333f};
  return random() % 3 ? static_cast<float>(random() % 1000) / 999.0f : kWeights[random() % 9];
}

// --- sums ----------------------------------------------------------------------------------------

template <typename Of>
bool same_number(typename Of::Item a, typename Of::Item b) {
  if (a == b) return true;
  // Which NaN is the processor's choice, except in bfloat16, where it is one.
  return Of::kDType != DType::kBFloat16 && std::isnan(Of::load(a)) && std::isnan(Of::load(b));
}

template <typename Of>
void check_sum(size_t num_items, size_t num_terms, int weighted, bool with_bias, Random& random) {
  using Item = typename Of::Item;
  using Sum = typename Of::Sum;
  constexpr Item kGuard = static_cast<Item>(0x5a5a5a5a5a5a5a5a);
  std::vector<std::vector<Item>> rows(num_terms, std::vector<Item>(num_items));
  std::vector<Item> bias(num_items), out(num_items + 2, kGuard);
  std::vector<Term> terms;
  for (auto& row : rows) {
    for (Item& item : row) item = odd_item<Of>(random);
    Term term{reinterpret_cast<const std::byte*>(row.data()), odd_weight(random), false};
    term.weighted =
        weighted == 2 ? random() % 2 : weighted;  // the weight of an unweighted term means nothing
    if (random() % 2) term.next = term.row;       // what is fetched changes nothing
    terms.push_back(term);
  }
  for (Item& item : bias) item = odd_item<Of>(random);
  sum_rows(reinterpret_cast<std::byte*>(out.data() + 1), terms,
           with_bias ? reinterpret_cast<const std::byte*>(bias.data()) : nullptr, num_items,
           Of::kDType);
  CHECK(out.front() == kGuard && out.back() == kGuard, "written outside the row");
  const bool plain = num_terms + with_bias <= 1 && (num_terms == 0 || !terms[0].weighted);
  for (size_t i = 0; i < num_items; ++i) {
    Item expected = 0;
    if (plain) {  // bit for bit, even a NaN
      if (with_bias) expected = bias[i];
      if (num_terms) expected = rows[0][i];
      CHECK(out[i + 1] == expected, "a single plain term must pass bit for bit");
      continue;
    }
    volatile Sum sum = 0;  // volatile: every step is rounded, none fused
    bool first = true;
    if (with_bias) sum = Of::load(bias[i]), first = false;
    for (size_t t = 0; t < num_terms; ++t) {
      volatile Sum value = Of::load(rows[t][i]);
      if (terms[t].weighted) value = value * static_cast<Sum>(terms[t].weight);
      if (first)
        sum = value;
      else
        sum = sum + value;
      first = false;
    }
    expected = Of::store(sum);
    CHECK(same_number<Of>(out[i + 1], expected),
          "item " + std::to_string(i) + " of " + std::to_string(num_items) + ", " +
              std::to_string(num_terms) + " terms, dtype " +
              std::to_string(static_cast<int>(Of::kDType)) + ": got bits " +
              std::to_string(out[i + 1]) + ", expected " + std::to_string(expected));
  }
}

constexpr size_t kSizes[] = {0, 1, 2, 7, 8, 15, 17, 511, 512, 513, 1023, 1024, 1025};

template <typename Of>
void sums() {
  Random random(static_cast<uint64_t>(Of::kDType));
  CHECK(item_bytes(Of::kDType) == sizeof(typename Of::Item));
  for (const size_t num_items : kSizes) {
    for (size_t num_terms = 0; num_terms <= 9; ++num_terms) {
      for (int weighted = 0; weighted < 3; ++weighted) {
        for (const bool with_bias : {false, true})
          check_sum<Of>(num_items, num_terms, weighted, with_bias, random);
      }
    }
  }
}

// Every half, added to zero, weighted by one, and rounded from every neighbourhood of a half.
template <typename Of>
void every_half() {
  std::vector<uint16_t> all(65536), zeros(65536, 0x8000), out(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  const auto bytes = [](const std::vector<uint16_t>& v) {
    return reinterpret_cast<const std::byte*>(v.data());
  };
  const auto check = [&](const Term& a, const Term* b, auto&& expected) {
    std::vector<Term> terms{a};
    if (b) terms.push_back(*b);
    sum_rows(reinterpret_cast<std::byte*>(out.data()), terms, nullptr, all.size(), Of::kDType);
    for (size_t i = 0; i < all.size(); ++i) {
      CHECK(same_number<Of>(out[i], Of::store(expected(Of::load(all[i])))),
            "of half " + std::to_string(i));
    }
  };
  const Term plain{bytes(all), 0, false}, zero{bytes(zeros), 0, false};
  check(plain, &zero, [](float v) { return v; });  // x + -0 is x, for -0 as well
  for (const float w : {1.0f, 0.5f, 1.0f / 3.0f, 1.0009765625f, 6.1e-5f, 256.0f}) {
    const Term term{bytes(all), w, true};
    check(term, nullptr, [w](float v) { return v * w; });
  }
  check(plain, &plain, [](float v) { return v + v; });
}

void columns() {
  Random random(5);
  for (size_t num_terms = 0; num_terms <= 9; ++num_terms) {
    for (const size_t num_columns : {1, 8, 9}) {
      std::vector<std::vector<float>> rows(num_terms, std::vector<float>(num_columns));
      std::vector<const float*> terms;
      for (auto& row : rows) {
        for (float& v : row) v = random() % 4 ? odd_weight(random) : -0.0f;
        terms.push_back(row.data());
      }
      std::vector<float> out(num_columns + 1, 77.0f);
      sum_columns(out.data(), terms, num_columns);
      for (size_t k = 0; k < num_columns; ++k) {
        volatile float sum = num_terms ? rows[0][k] : 0.0f;
        for (size_t t = 1; t < num_terms; ++t) sum = sum + rows[t][k];
        CHECK(std::bit_cast<uint32_t>(out[k]) == std::bit_cast<uint32_t>(static_cast<float>(sum)));
      }
      CHECK(out[num_columns] == 77.0f);
    }
  }
}

// --- rows ----------------------------------------------------------------------------------------

void rows_are_copied() {
  Random random(11);
  for (size_t num_bytes = 16; num_bytes <= 272; num_bytes += 16) {
    std::vector<std::byte> from(2 * num_bytes), to(num_bytes + 2, std::byte{0x5a});
    for (std::byte& b : from) b = static_cast<std::byte>(random());
    for (const bool next : {false, true}) {
      std::fill(to.begin(), to.end(), std::byte{0x5a});
      copy_row(to.data() + 1, from.data(), num_bytes, next ? from.data() + num_bytes : nullptr);
      CHECK(std::equal(from.begin(), from.begin() + static_cast<long>(num_bytes), to.begin() + 1));
      CHECK(to.front() == std::byte{0x5a} && to.back() == std::byte{0x5a}, "outside the row");
    }
  }
}

void rows_are_written() {
  Random random(6);
  for (int round = 0; round < 300; ++round) {
    constexpr uint32_t kTokens = 3;
    RowFormat f;
    f.payload_bytes = static_cast<uint32_t>(random() % 700);
    f.topk = static_cast<uint32_t>(1 + random() % 9);
    const uint32_t item = random() % 2 ? 4 : 1;
    const uint32_t num_scales = static_cast<uint32_t>(random() % 12);
    f.scale_bytes = num_scales * item;
    const auto align = [](uint32_t v) { return (v + 15) / 16 * 16; };
    f.scales_at = align(f.payload_bytes);
    f.token_at = align(f.scales_at + f.scale_bytes);
    f.ids_at = f.token_at + 4;
    f.weights_at = f.ids_at + 4 * f.topk;
    f.row_bytes = align(f.weights_at + 4 * f.topk);
    const bool fresh = random() % 4, weights = random() % 2;
    const int layout =
        static_cast<int>(random() % 3);  // of the scales: rows, column major, rows backwards

    const int64_t x_stride = f.payload_bytes + static_cast<int64_t>(random() % 40);
    std::vector<std::byte> x(kTokens * x_stride + 1), scales(kTokens * (num_scales + 1) * item);
    for (auto* bytes : {&x, &scales}) {
      for (std::byte& b : *bytes) b = static_cast<std::byte>(random());
    }
    std::vector<int64_t> ids(kTokens * f.topk);
    std::vector<float> w(kTokens * f.topk);
    for (int64_t& id : ids) id = static_cast<int64_t>(random() % 300) - 1;
    for (float& v : w) v = odd_weight(random);

    TokenSource source;
    source.x = x.data();
    source.x_stride = x_stride;
    source.scale_item_bytes = item;
    if (f.scale_bytes) {
      const int64_t row_stride = static_cast<int64_t>((num_scales + 1) * item);
      source.scales = scales.data() + (layout == 2 ? (kTokens - 1) * row_stride : 0);
      source.scale_stride_token = layout == 0 ? row_stride : layout == 1 ? item : -row_stride;
      source.scale_stride = layout == 1 ? static_cast<int64_t>(kTokens * item) : item;
    }
    if (fresh) source.topk_idx = ids.data();
    if (weights) source.topk_weights = w.data();
    for (uint32_t t = 0; t < kTokens; ++t) {
      alignas(16) std::byte row[1024], expected[1024];
      std::memset(row, 0x5a, sizeof row);
      std::memset(expected, 0x5a, sizeof expected);
      for (uint32_t i = 0; i < f.payload_bytes; ++i) expected[i] = x[t * x_stride + i];
      for (uint32_t s = 0; s < num_scales; ++s) {
        for (uint32_t b = 0; b < item; ++b) {
          expected[f.scales_at + s * item + b] =
              source.scales[static_cast<int64_t>(t) * source.scale_stride_token +
                            s * source.scale_stride + b];
        }
      }
      if (fresh) {
        const auto put = [&](uint32_t at, auto value) { std::memcpy(expected + at, &value, 4); };
        put(f.token_at, static_cast<int32_t>(t));
        for (uint32_t k = 0; k < f.topk; ++k) {
          put(f.ids_at + 4 * k, static_cast<int32_t>(ids[t * f.topk + k]));
          if (weights) put(f.weights_at + 4 * k, w[t * f.topk + k]);
        }
      }
      write_row(row, f, source, t, t + 1 < kTokens ? t + 1 : t);
      CHECK(std::memcmp(row, expected, sizeof row) == 0, "round " + std::to_string(round));
    }
  }
}

// --- routes --------------------------------------------------------------------------------------

struct Lanes {
  std::vector<int32_t> of_rank;
  uint32_t num_lanes;
  RouteTables tables() const {
    return {of_rank.data(), num_lanes, static_cast<uint32_t>(of_rank.size())};
  }
};

void check_route(const std::vector<int64_t>& topk_idx, uint32_t T, uint32_t K, uint32_t E,
                 const Lanes& lanes) {
  const uint32_t R = static_cast<uint32_t>(lanes.of_rank.size()), D = lanes.num_lanes;
  std::vector<int32_t> rows(T * D + 1, 1234);
  Route out;
  CHECK_OK(route(topk_idx.data(), T, K, E, lanes.tables(), rows.data(), out));
  CHECK(rows.back() == 1234 && out.lane_counts.size() == D && out.rank_counts.size() == R);
  const uint32_t L = (E + R - 1) / R;
  std::vector<uint32_t> lane_counts(D, 0), rank_counts(R, 0), expert_counts(R * L, 0);
  for (uint32_t t = 0; t < T; ++t) {
    std::set<uint32_t> ranks, used;
    for (uint32_t k = 0; k < K; ++k) {
      const int64_t expert = topk_idx[t * K + k];
      if (expert < 0) continue;
      ++expert_counts[expert];
      ranks.insert(static_cast<uint32_t>(expert) / L);
    }
    for (const uint32_t rank : ranks) ++rank_counts[rank], used.insert(lanes.of_rank[rank]);
    for (uint32_t d = 0; d < D; ++d) {
      CHECK(rows[t * D + d] == (used.count(d) ? static_cast<int32_t>(lane_counts[d]++) : -1));
    }
  }
  CHECK(out.lane_counts == lane_counts && out.rank_counts == rank_counts &&
        out.expert_counts == expert_counts);
}

void routes() {
  Random random(7);
  for (int round = 0; round < 400; ++round) {
    const uint32_t R = static_cast<uint32_t>(1 + random() % 9),
                   K = static_cast<uint32_t>(1 + random() % 8);
    const uint32_t E = static_cast<uint32_t>(K + random() % 20),
                   T = static_cast<uint32_t>(random() % 20);
    Lanes lanes{{}, static_cast<uint32_t>(1 + random() % R)};
    for (uint32_t r = 0; r < R; ++r)
      lanes.of_rank.push_back(static_cast<int32_t>(random() % lanes.num_lanes));
    std::vector<int64_t> topk_idx(T * K, -1);
    const uint64_t some = random() % 3;  // none at all, some, most
    for (uint32_t t = 0; t < T; ++t) {
      std::set<int64_t> chosen;
      for (uint32_t k = 0; k < K; ++k) {
        const auto expert = static_cast<int64_t>(
            random() % (round % 5 ? E : K));  // sometimes all on the first ranks
        if (some && random() % 4 < some + 1 && chosen.insert(expert).second)
          topk_idx[t * K + k] = expert;
      }
    }
    check_route(topk_idx, T, K, E, lanes);
  }
  const Lanes lanes{{0, 1}, 2};
  check_route({}, 0, 8, 4, lanes);
  check_route({-1, -1}, 2, 1, 0, lanes);      // no experts
  check_route({0, 2, 2, 1}, 2, 2, 3, lanes);  // experts do not divide by ranks
}

void wrong_routes_are_named() {
  const Lanes lanes{{0, 0}, 1};
  const auto text = [&](std::vector<int64_t> topk_idx) {
    std::vector<int32_t> rows(topk_idx.size() / 2);
    Route out;
    const Status status = route(topk_idx.data(), static_cast<uint32_t>(rows.size()), 2, 4,
                                lanes.tables(), rows.data(), out);
    CHECK(status.code() == Code::kInvalid);
    return status.text();
  };
  const auto has = [](const std::string& whole, const std::string& part) {
    CHECK(whole.find(part) != std::string::npos, "'" + part + "' is not in: " + whole);
  };
  has(text({0, 1, 2, 4}), "got 4 at [1, 1]");
  has(text({-2, 1}), "got -2 at [0, 0]");
  has(text({1, 1ll << 32}), "got 4294967296 at [0, 1]");
  has(text({0, 1, 3, 3}), "expert 3 twice at token 1");
}

}  // namespace

int main(int argc, char** argv) {
  return cases::run(argc, argv,
                    {{"sums_float16", sums<Half>},
                     {"sums_bfloat16", sums<Bfloat>},
                     {"sums_float32", sums<Single>},
                     {"sums_float64", sums<Double>},
                     {"every_float16", every_half<Half>},
                     {"every_bfloat16", every_half<Bfloat>},
                     {"columns", columns},
                     {"rows_are_copied", rows_are_copied},
                     {"rows_are_written", rows_are_written},
                     {"routes", routes},
                     {"wrong_routes_are_named", wrong_routes_are_named}});
}
