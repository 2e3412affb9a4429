// What an exchange says besides rows, in kernels: its epoch, headers sent, headers that came.
//
//   begin ─epoch, the bank's addresses, credits armed─→ (leave out) write ─headers, counts─→ the
//   kernel that sends rows check ─how many rows of whom, or why none may be touched─→ collect
//   ─tokens, ids, weights─→ unpack, sums
//
// The epoch lies in device memory and is counted there, so a captured graph uses another one at
// each replay; what depends on the bank is looked up with it. A header is believed if its digest
// and all it says are this call's; else no row of that exchange is touched, and the host says what
// was wrong from the copy in Told (csrc/receive.cpp: check_header).
//
// A source is whoever wrote a window that is read: a rank, or its forwarder (relay.cuh); a lane is
// a window that is written. Written over a `Block` like dispatch.cuh.
#pragma once

#include "combine.cuh"

namespace moe_comm::headers {

using dispatch::Words;

// One block. Everything is 8 bytes wide, in all structs.
struct Begin {
  uint64_t* next;          // this rank's next epoch
  const uint64_t* tables;  // [kNumBanks, num_words] what depends on the bank
  uint64_t num_words;
  uint64_t* call;  // [1 + num_words]: the epoch of this call, then its bank's table
  DeviceRing ring;
  uint64_t
      wait;  // for all to have released the epoch before in this bank, and its writes to have left
  uint64_t word_idx, timeout_ms;
  ArmedWord* word;
};

// One block. Behind each wait that may have masked ranks (mask_lost): what the call's block has of
// them becomes null, and a kernel that finds null goes on without. What was decided then holds for
// the kernels up to the next wait.
struct LeaveOut {
  const uint64_t* masks;  // [num_ranks] not 0: masked; anybody may mask one at any time
  uint64_t num_ranks;
  uint64_t* seen;          // [num_ranks] the masks, as this call takes them
  const uint32_t* owners;  // [num_words] whose each word is
  uint64_t num_words;
  uint64_t* words;  // [num_words]
};

struct Write {
  const uint64_t* epoch;
  const Header* like;       // [3] all but what follows; by what the route found wrong
  const int32_t* error;     // [3] what is wrong with topk_idx: ERROR_…, token, entry; or null
  const int64_t* topk_idx;  // [T, K]
  uint64_t topk;
  // What follows is by lane.
  Header* staged;  // device memory
  uint8_t* const* windows;
  const uint32_t* lanes;  // [num_lanes] those that are written: links first, then those of the node
  uint64_t num_lanes;
  const uint32_t* rows;
  const uint32_t* counts;  // [lanes, num_counts] copies for each expert of the readers, or null
  uint64_t num_counts, counts_bytes;
  const uint64_t* identity;  // of the dispatch that this belongs to, or null
  combine::Group* groups;    // [num_lanes] where the rows of a combine go, or null
  const uint32_t* starts;    // by lane: the first of those
  uint64_t row_bytes;
  uint64_t tokens;      // T here
  uint64_t max_tokens;  // of any rank, or 0
  const uint64_t* waited;
};

// What a rank learned from the headers of one exchange. The host gets a copy.
struct Told {
  uint64_t status;    // WaitStatus of the wait before
  uint64_t bad;       // 1 + the first source whose header is not this call's; 0: none
  uint64_t identity;  // of the dispatch, the same on all ranks
  uint64_t num_rows;  // that came
  uint64_t error[3];  // of the route here: ERROR_…, token, entry
  // Of a fresh dispatch: the most tokens of a rank, and the fewest that a rank allows; and who.
  uint64_t most, most_rank, allowed, allowed_rank;
  uint64_t rounds;  // the most that a source takes for the call, whatever is wrong with it
  Header header;    // of that source
};

// What a header is: this call's; this call's, but its forwarder could not read the rows; another
// one; what nobody wrote.
enum Verdict : uint32_t { kGood = 0, kEmpty = 1, kBad = 2, kDamaged = 3 };

struct Check {
  const uint64_t* epoch;
  const Header* like;             // what all must say
  const uint64_t* identity;       // likewise, or null
  uint64_t identity_is_epoch;     // not 0: of a fresh dispatch; ranks may know of other sources
  const uint8_t* const* windows;  // [num_sources]; null: an absent one's
  uint64_t num_sources;
  uint64_t capacity;                  // rows of a window, at most
  const uint32_t* expected;           // [num_sources] rows of a cached dispatch, or null
  uint64_t num_counts, counts_bytes;  // of a fresh dispatch; else 0
  const int32_t* error;               // [3] of the route here, or null
  Told* told;                         // the same whenever a call is repeated
  uint64_t* told_epoch;
  // Tables that lie one behind the other, every number of them written.
  uint32_t* rows;      // [num_sources]; 0 where none may be touched
  uint32_t* starts;    // [num_sources] rows of lower sources
  uint32_t* tokens;    // [num_sources] T of each
  uint32_t* verdicts;  // [num_sources]
  uint32_t* copies;    // [num_sources, num_counts] for each expert here
  const uint64_t* waited;
  const uint64_t* times;  // [num_times] of the armed wait before it: to be added to `wait_ns`
  int64_t* wait_ns;       // [num_times]
  uint64_t num_times;
};

// The last bytes of each row, dense and in order: [sum of rows, out_stride].
struct Collect {
  const uint8_t* const* windows;  // [num_sources]
  uint64_t num_sources, head_bytes, row_bytes;
  const uint32_t* rows;
  const uint32_t* starts;        // where those of a source begin
  uint64_t part_at, part_bytes;  // of a row; multiples of 4
  uint8_t* out;
  uint64_t out_stride;
};

template <class Block>
MOE_COMM_DEVICE inline void begin(Block& block, const Begin& a) {
  const uint64_t epoch = *a.next;
  const uint64_t* table = a.tables + epoch % kNumBanks * a.num_words;
  for (uint64_t i = block.thread(); i < a.num_words; i += block.num_threads()) {
    a.call[1 + i] = table[i];
  }
  block.any(false);  // all have read the epoch
  if (block.thread() != 0) return;
  a.call[0] = epoch;
  *a.next = epoch + 1;
  const Arm credits{static_cast<uint32_t>(a.wait), static_cast<uint32_t>(a.word_idx),
                    epoch - kNumBanks, static_cast<uint32_t>(a.timeout_ms)};
  device::arm(block, a.ring, credits, a.word);
}

template <class Block>
MOE_COMM_DEVICE inline void leave_out(Block& block, const LeaveOut& a) {
  for (uint64_t r = block.thread(); r < a.num_ranks; r += block.num_threads())
    a.seen[r] = block.load_acquire(a.masks + r);
  block.any(false);  // each is read once: all words of a rank go, or none
  for (uint64_t i = block.thread(); i < a.num_words; i += block.num_threads()) {
    if (a.seen[a.owners[i]] != 0) a.words[i] = 0;
  }
}

// As the host's digest of [num_counts] with zeros up to `num_bytes`.
MOE_COMM_DEVICE inline uint32_t digest_of_counts(const uint32_t* counts, uint64_t num_counts,
                                                 uint64_t num_bytes) {
  const auto word = [&](uint64_t i) { return i < num_counts ? uint64_t{counts[i]} : 0; };
  uint64_t digest = kDigestSeed;
  for (uint64_t i = 0; i < num_bytes / 4; i += 2)
    digest = mix_digest(digest, word(i) | word(i + 1) << 32);
  return counts_digest(digest);
}

// Decimal digits of `number` behind `text[at]`; where they end. Nothing if there is no room.
MOE_COMM_DEVICE inline uint32_t write_number(char* text, uint32_t at, int64_t number) {
  uint64_t rest = number < 0 ? 0 - static_cast<uint64_t>(number) : static_cast<uint64_t>(number);
  uint32_t length = number < 0 ? 2 : 1;
  for (uint64_t more = rest; more >= 10; more /= 10) ++length;
  if (at + length >= kHeaderTextBytes) return at;
  if (number < 0) text[at] = '-';
  uint32_t i = at + length;
  do {
    text[--i] = static_cast<char>('0' + rest % 10);
    rest /= 10;
  } while (rest != 0);
  return at + length;
}

// The text of what is wrong with topk_idx, with the expert, the token and the entry for %e, %t, %k.
MOE_COMM_DEVICE inline void say_error(const Write& a, const char* like, char* text) {
  const int64_t token = a.error[1], entry = a.error[2];
  const uint64_t index = static_cast<uint64_t>(token) * a.topk + static_cast<uint64_t>(entry);
  uint32_t at = 0;
  for (; *like != 0 && at + 1 < kHeaderTextBytes; ++like) {
    if (*like != '%' || like[1] == 0) {
      text[at++] = *like;
      continue;
    }
    ++like;
    at = write_number(text, at, *like == 'e' ? a.topk_idx[index] : *like == 't' ? token : entry);
  }
  text[at] = 0;
}

// This thread's part of the digest of topk_idx, as the host's (csrc/rows.cpp: route): a sum of
// terms that know their place, in any order.
template <class Block>
MOE_COMM_DEVICE inline uint64_t routing_digest(const Block& block, const Write& a, uint64_t key) {
  uint64_t sum = block.thread() == 0 ? key : 0;
  for (uint64_t i = block.thread(); i < a.tokens * a.topk; i += block.num_threads()) {
    sum += mix_digest(mix_digest(key, i), static_cast<uint64_t>(a.topk_idx[i]));
  }
  return sum;
}

template <class Block>
MOE_COMM_DEVICE inline void write(Block& block, const Write& a) {
  if (!dispatch::came(block, a.waited)) return;
  const int32_t refused = a.error != nullptr ? *a.error : 0;
  const bool with_counts = a.counts != nullptr && refused == 0;
  for (uint64_t l = block.index(); l < a.num_lanes; l += block.num_blocks()) {
    const uint64_t rank = a.lanes[l];
    uint8_t* window = a.windows[rank];
    if (window == nullptr) {  // masked
      if (a.groups != nullptr && block.thread() == 0) a.groups[l] = {};
      continue;
    }
    Header& header = a.staged[rank];
    auto* staged = reinterpret_cast<Words*>(&header);
    const auto* like = reinterpret_cast<const Words*>(a.like + refused);
    for (uint64_t i = block.thread(); i < kHeaderBytes / 16; i += block.num_threads())
      staged[i] = like[i];
    const uint32_t* counts = a.counts + rank * a.num_counts;
    auto* there = reinterpret_cast<uint32_t*>(window + kHeaderBytes);
    for (uint64_t i = block.thread(); with_counts && i < a.counts_bytes / 4;
         i += block.num_threads()) {
      there[i] = i < a.num_counts ? counts[i] : 0;
    }
    block.any(false);
    if (a.counts != nullptr) {  // a fresh dispatch; `like` has 0
      const uint64_t key = mix_digest(mix_digest(a.tokens, a.topk), header.agreed.num_experts);
      block.add(&header.routing, routing_digest(block, a, key));
    }
    if (block.thread() == 0) {
      header.epoch = *a.epoch;
      header.rows = refused == 0 ? a.rows[rank] : 0;
      header.agreed.max_tokens = static_cast<uint32_t>(a.max_tokens);
      header.tokens = refused == 0 ? static_cast<uint32_t>(a.tokens) : 0;
      if (with_counts) {
        header.total_rows = header.rows;
        header.counts = digest_of_counts(counts, a.num_counts, a.counts_bytes);
      }
      if (refused != 0) say_error(a, a.like[refused].text, header.text);
      if (a.identity != nullptr) header.agreed.identity = *a.identity;
      if (a.groups != nullptr) {
        a.groups[l] = {window + kHeaderBytes, static_cast<int64_t>(a.row_bytes), a.starts[rank],
                       header.rows};
      }
    }
    block.any(false);  // also: its fields are written before its words are read
    if (block.thread() == 0)
      header.check = header_digest(reinterpret_cast<const uint64_t*>(staged));
    block.any(false);
    for (uint64_t i = block.thread(); i < kHeaderBytes / 16; i += block.num_threads()) {
      reinterpret_cast<Words*>(window)[i] = staged[i];
    }
  }
}

// Whether all that a header says is what this call expects, but for T and max_tokens.
template <class Block>
MOE_COMM_DEVICE inline Verdict verdict(const Block&, const Check& a, uint64_t source) {
  const uint8_t* window = a.windows[source];
  const Header& theirs = *reinterpret_cast<const Header*>(window);
  const Header& mine = *a.like;
  if (theirs.check != header_digest(reinterpret_cast<const uint64_t*>(window))) return kDamaged;
  if (theirs.epoch != *a.epoch || theirs.version != kAbiVersion || theirs.kind != mine.kind)
    return kBad;
  if (theirs.status != kHeaderOk || theirs.rounds == 0 || theirs.rows > a.capacity) return kBad;
  const Agreed &t = theirs.agreed, &m = mine.agreed;
  if (t.num_experts != m.num_experts || t.payload_bytes != m.payload_bytes || t.topk != m.topk ||
      t.scale_bytes != m.scale_bytes || t.dtype != m.dtype || t.row_bytes != m.row_bytes ||
      t.flags != m.flags || t.identity != (a.identity != nullptr ? *a.identity : m.identity)) {
    return kBad;
  }
  if (a.expected != nullptr && theirs.rows != a.expected[source])
    return theirs.rows == 0 ? kEmpty : kBad;
  if (a.num_counts == 0) return kGood;
  if (theirs.counts == 0) return kEmpty;
  const auto* counts = reinterpret_cast<const uint32_t*>(window + kHeaderBytes);
  if (theirs.counts != digest_of_counts(counts, a.num_counts, a.counts_bytes)) return kDamaged;
  return theirs.total_rows == theirs.rows ? kGood : kBad;
}

// One block.
template <class Block>
MOE_COMM_DEVICE inline void check(Block& block, const Check& a) {
  uint64_t status = kWaitOk;
  if (a.waited != nullptr) status = block.load_acquire(a.waited);  // H6
  for (uint64_t s = block.thread(); s < a.num_sources; s += block.num_threads()) {
    const bool there = status == kWaitOk && a.windows[s] != nullptr;
    a.verdicts[s] = there ? verdict(block, a, s) : kGood;
    const bool good = there && a.verdicts[s] == kGood;
    const auto* header = reinterpret_cast<const Header*>(a.windows[s]);
    a.rows[s] = good ? header->rows : 0;
    a.tokens[s] = good ? header->tokens : 0;
    for (uint64_t i = 0; i < a.num_counts; ++i) {
      a.copies[s * a.num_counts + i] =
          good ? reinterpret_cast<const uint32_t*>(a.windows[s] + kHeaderBytes)[i] : 0;
    }
  }
  for (uint64_t i = block.thread(); status == kWaitOk && i < a.num_times; i += block.num_threads())
    a.wait_ns[i] += static_cast<int64_t>(a.times[i]);
  block.any(false);
  if (block.thread() != 0) return;
  Told& told = *a.told;
  told.status = status;
  *a.told_epoch = *a.epoch;
  for (int i = 0; i < 3; ++i)
    told.error[i] = a.error != nullptr ? static_cast<uint64_t>(a.error[i]) : 0;
  told.bad = 0;
  told.most = told.most_rank = told.allowed_rank = 0;
  told.allowed = ~0ull;
  told.rounds = 1;
  uint64_t identity = 0, total = 0;
  for (uint64_t s = 0; s < a.num_sources; ++s) {
    if (status == kWaitOk && a.windows[s] != nullptr && a.verdicts[s] != kDamaged) {
      const Header& header = *reinterpret_cast<const Header*>(a.windows[s]);
      if (header.epoch == *a.epoch && header.rounds > told.rounds) told.rounds = header.rounds;
    }
    if (a.verdicts[s] != kGood) {  // one that is only empty is so because of another
      if (told.bad == 0 || (a.verdicts[told.bad - 1] == kEmpty && a.verdicts[s] != kEmpty))
        told.bad = s + 1;
      continue;
    }
    if (status != kWaitOk || a.windows[s] == nullptr) continue;
    const Header& header = *reinterpret_cast<const Header*>(a.windows[s]);
    identity = mix_digest(identity, header.routing) >> 1;
    const uint64_t allowed = header.agreed.max_tokens;
    if (header.tokens > told.most) {
      told.most = header.tokens;
      told.most_rank = s;
    }
    if (allowed != 0 && allowed < told.allowed) {
      told.allowed = allowed;
      told.allowed_rank = s;
    }
  }
  const bool good = told.bad == 0 && told.most <= told.allowed;
  for (uint64_t s = 0; s < a.num_sources; ++s) {
    if (!good) a.rows[s] = 0;
    a.starts[s] = static_cast<uint32_t>(total);
    total += a.expected != nullptr && good ? a.expected[s] : a.rows[s];
  }
  told.identity = a.identity != nullptr      ? *a.identity
                  : a.identity_is_epoch != 0 ? *a.epoch
                                             : identity;
  told.num_rows = total;
  told.header = {};
  if (told.bad != 0) told.header = *reinterpret_cast<const Header*>(a.windows[told.bad - 1]);
  // The tables end with a whole word.
  const uint64_t num_numbers = a.num_sources * (4 + a.num_counts);
  if (num_numbers % 2 != 0) a.rows[num_numbers] = 0;
}

template <class Block>
MOE_COMM_DEVICE inline void collect(Block& block, const Collect& a) {
  for (uint64_t s = 0; s < a.num_sources; ++s) {
    for (uint64_t row = block.index(); row < a.rows[s]; row += block.num_blocks()) {
      const auto* from = reinterpret_cast<const uint32_t*>(a.windows[s] + a.head_bytes +
                                                           row * a.row_bytes + a.part_at);
      auto* to = reinterpret_cast<uint32_t*>(a.out + (a.starts[s] + row) * a.out_stride);
      for (uint64_t i = block.thread(); i < a.part_bytes / 4; i += block.num_threads())
        to[i] = from[i];
    }
  }
}

#ifndef __CUDACC_RTC__
static_assert(sizeof(Begin) == 8 * 8 + sizeof(DeviceRing) && sizeof(Write) == 20 * 8);
static_assert(sizeof(Told) == 12 * 8 + kHeaderBytes && sizeof(Check) == 22 * 8 &&
              sizeof(Collect) == 10 * 8 && sizeof(LeaveOut) == 6 * 8);
#endif

}  // namespace moe_comm::headers
