// What must any exchange over shared memory do at least? The same rows, copied by plain loops: none
// of our code, no protocol, no allocation. moe_comm/bench/floor.py compiles this file, makes the
// tables and runs it in every rank at once.
//
// dispatch: x -> the readers' slots, barrier, slots -> rows (own rows straight from x). combine:
// rows -> the sources' slots, barrier, sum in fp32 -> out. Two banks of slots, so that one barrier
// in each is enough. bf16.
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif

struct Tables {  // starts: prefix sums, one more than entries
  int64_t rank, ranks, tokens, items, slot_bytes;
  char* const* bases;          // [R] every rank's segment
  const int64_t* send_starts;  // [R + 1] of send_tokens, by reader
  const int64_t* send_tokens;
  const int64_t* receive_starts;  // [R + 1] received rows by source
  const int64_t* place_starts;    // [received rows + 1] of places; null: row i has the one place i
  const int64_t* places;
  const float* place_weights;
  const int64_t* term_starts;  // [T + 1] of terms
  const int64_t* term_ranks;   // a term: the rank that returns it, and which of my rows to it
  const int64_t* term_rows;
  char *x, *rows, *out;
};

namespace {

constexpr int64_t kWords = 4096;  // bytes in front of the slots
constexpr int64_t kBlock = 512;   // items
int64_t bank = 0;

char* slot(const Tables& t, int64_t owner, int64_t writer) {
  return t.bases[owner] + kWords + (2 * writer + bank) * t.slot_bytes;
}

std::atomic_ref<uint64_t> word(const Tables& t, int64_t rank) {
  return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(t.bases[rank]));
}

void barrier(const Tables& t) {
  const uint64_t epoch = word(t, t.rank).load(std::memory_order_relaxed) + 1;
  word(t, t.rank).store(epoch, std::memory_order_release);
  for (int64_t r = 0; r < t.ranks; ++r) {
    for (int spins = 0; word(t, r).load(std::memory_order_acquire) < epoch; ++spins) {
      if (spins > 64) sched_yield();
    }
  }
}

inline __attribute__((always_inline)) float load(uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}
inline __attribute__((always_inline)) uint16_t round_off(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// out = the terms, each times its weight (null: 1), added in fp32.
CLONES void sum(char* out, const char* const* terms, const float* weights, int64_t count,
                int64_t items) {
  if (count == 1 && !weights) {
    std::memcpy(out, terms[0], items * 2);
    return;
  }
  for (int64_t from = 0; from < items; from += kBlock) {
    const int64_t n = items - from < kBlock ? items - from : kBlock;
    float total[kBlock];
    for (int64_t k = 0; k < count; ++k) {
      const uint16_t* row = reinterpret_cast<const uint16_t*>(terms[k]) + from;
      const float weight = weights ? weights[k] : 1.0f;
      if (k == 0) {
        for (int64_t i = 0; i < n; ++i) total[i] = load(row[i]) * weight;
      } else {
        for (int64_t i = 0; i < n; ++i) total[i] += load(row[i]) * weight;
      }
    }
    uint16_t* to = reinterpret_cast<uint16_t*>(out) + from;
    for (int64_t i = 0; i < n; ++i) to[i] = round_off(total[i]);
  }
}

}  // namespace

extern "C" void floor_dispatch(const Tables* tables) {
  const Tables& t = *tables;
  const int64_t row = t.items * 2;
  for (int64_t step = 1; step < t.ranks; ++step) {
    const int64_t r = (t.rank + step) % t.ranks;
    char* to = slot(t, r, t.rank);
    for (int64_t i = t.send_starts[r]; i < t.send_starts[r + 1]; ++i, to += row) {
      std::memcpy(to, t.x + t.send_tokens[i] * row, row);
    }
  }
  barrier(t);
  for (int64_t s = 0; s < t.ranks; ++s) {
    const char* window = slot(t, t.rank, s);
    const int64_t* own = t.send_tokens + t.send_starts[t.rank];
    for (int64_t i = t.receive_starts[s]; i < t.receive_starts[s + 1]; ++i, window += row) {
      const char* from = s == t.rank ? t.x + own[i - t.receive_starts[s]] * row : window;
      if (!t.place_starts) {
        std::memcpy(t.rows + i * row, from, row);
        continue;
      }
      for (int64_t k = t.place_starts[i]; k < t.place_starts[i + 1]; ++k) {
        std::memcpy(t.rows + t.places[k] * row, from, row);
      }
    }
  }
  bank ^= 1;
}

extern "C" void floor_combine(const Tables* tables) {
  const Tables& t = *tables;
  const int64_t row = t.items * 2;
  const char* terms[64];
  for (int64_t step = 1; step <= t.ranks; ++step) {
    const int64_t s = (t.rank + step) % t.ranks;
    char* to = slot(t, s, t.rank);
    if (s == t.rank && !t.place_starts) break;  // own rows are added where they lie
    for (int64_t i = t.receive_starts[s]; i < t.receive_starts[s + 1]; ++i, to += row) {
      if (!t.place_starts) {
        std::memcpy(to, t.rows + i * row, row);
        continue;
      }
      const int64_t first = t.place_starts[i], count = t.place_starts[i + 1] - first;
      for (int64_t k = 0; k < count; ++k) terms[k] = t.rows + t.places[first + k] * row;
      sum(to, terms, t.place_weights + first, count, t.items);
    }
  }
  barrier(t);
  for (int64_t token = 0; token < t.tokens; ++token) {
    const int64_t first = t.term_starts[token], count = t.term_starts[token + 1] - first;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t r = t.term_ranks[first + k], i = t.term_rows[first + k];
      terms[k] = r == t.rank && !t.place_starts ? t.rows + (t.receive_starts[r] + i) * row
                                                : slot(t, t.rank, r) + i * row;
    }
    sum(t.out + token * row, terms, nullptr, count, t.items);
  }
  bank ^= 1;
}
