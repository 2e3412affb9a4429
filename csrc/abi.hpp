// What two sides must agree on: read by g++ (csrc), nvcc and NVRTC (kernels), and, as numpy dtypes,
// by Python.
//
// No standard header under __CUDACC_RTC__: NVRTC has none. Everything here is fixed-width and
// little-endian.
#pragma once

#ifdef __CUDACC_RTC__
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int32_t = int;
using uint64_t = unsigned long long;
using int64_t = long long;
#else
#include <cstddef>
#include <cstdint>
#endif

#ifdef __CUDACC__
#define MOE_COMM_HOST_DEVICE __host__ __device__
#else
#define MOE_COMM_HOST_DEVICE
#endif

namespace moe_comm {

constexpr uint32_t kAbiVersion = 1;
constexpr uint32_t kRowAlignment =
    16;  // every row, offset and length of the exchange is a multiple of this
constexpr uint32_t kHeaderBytes = 256;      // in front of the counts and rows of every window
constexpr uint32_t kHeaderTextBytes = 160;  // an error's text, cut, zero-terminated
constexpr uint32_t kNumBanks = 2;           // every window exists twice: even and odd epochs

using Counter =
    uint64_t;  // monotonic; holds an epoch or a count; written by one agent, never reset

// --- the ring ------------------------------------------------------------------------------------

// NOTE [command layout] One transfer wanted by a GPU or CPU kernel: H2.
//   word 0:  lap 1 · channel 15 · local offset / 16  32 · epoch 16 (only its low 6 bits travel)
//   word 1:  lap 1 · bytes / 16  31 · remote offset / 16  32
// Both words carry the lap bit of the pass over the ring in which they were written; a command is
// taken when both show it, so it does not matter in which order (or whether in one piece) the two
// words land.
struct Command {
  uint64_t word0;
  uint64_t word1;
};

struct Transfer {  // a Command, unpacked
  uint32_t channel;
  uint32_t epoch;
  uint64_t local_offset;
  uint64_t remote_offset;
  uint64_t num_bytes;
};

constexpr uint32_t kMaxChannels = 1u << 15;

MOE_COMM_HOST_DEVICE inline Command pack_command(const Transfer& t, uint32_t lap) {
  const uint64_t lap_bit = static_cast<uint64_t>(lap & 1u) << 63;
  Command c;
  c.word0 = lap_bit | (static_cast<uint64_t>(t.channel & 0x7fffu) << 48) |
            ((t.local_offset >> 4 & 0xffffffffull) << 16) | (t.epoch & 0xffffu);
  c.word1 =
      lap_bit | ((t.num_bytes >> 4 & 0x7fffffffull) << 32) | (t.remote_offset >> 4 & 0xffffffffull);
  return c;
}

MOE_COMM_HOST_DEVICE inline Transfer unpack_command(const Command& c) {
  Transfer t;
  t.channel = static_cast<uint32_t>(c.word0 >> 48) & 0x7fffu;
  t.epoch = static_cast<uint32_t>(c.word0 & 0xffffu);
  t.local_offset = (c.word0 >> 16 & 0xffffffffull) << 4;
  t.num_bytes = (c.word1 >> 32 & 0x7fffffffull) << 4;
  t.remote_offset = (c.word1 & 0xffffffffull) << 4;
  return t;
}

// NOTE [arm layout] A wait that a kernel arms, in the same ring and with the same lap bits. Its
// channel number stands for a set of sources (Proxy::open_wait), so no bit has to tell it apart.
//   word 0:  lap 1 · channel 15 · which of the ring's words 32 · epoch, bits 0 to 15
//   word 1:  lap 1 · milliseconds 31 (0: the ring's limit) · epoch, bits 16 to 47
struct Arm {  // a Command, unpacked
  uint32_t channel;
  uint32_t word_idx;
  uint64_t epoch;  // modulo 2^48
  uint32_t timeout_ms;
};

MOE_COMM_HOST_DEVICE inline Command pack_command(const Arm& a, uint32_t lap) {
  const uint64_t lap_bit = static_cast<uint64_t>(lap & 1u) << 63;
  Command c;
  c.word0 = lap_bit | (static_cast<uint64_t>(a.channel & 0x7fffu) << 48) |
            (static_cast<uint64_t>(a.word_idx) << 16) | (a.epoch & 0xffffu);
  c.word1 = lap_bit | (static_cast<uint64_t>(a.timeout_ms & 0x7fffffffu) << 32) |
            (a.epoch >> 16 & 0xffffffffull);
  return c;
}

MOE_COMM_HOST_DEVICE inline Arm unpack_arm(const Command& c) {
  Arm a;
  a.channel = static_cast<uint32_t>(c.word0 >> 48) & 0x7fffu;
  a.word_idx = static_cast<uint32_t>(c.word0 >> 16);
  a.epoch = (c.word1 & 0xffffffffull) << 16 | (c.word0 & 0xffffu);
  a.timeout_ms = static_cast<uint32_t>(c.word1 >> 32) & 0x7fffffffu;
  return a;
}

enum WaitStatus : uint32_t { kWaitOk = 0, kWaitTimeout = 1, kWaitAborted = 2, kWaitLost = 3 };

// What an armed wait ends with, in host memory that a GPU polls. The kernel that arms clears
// `ended`; whoever ends the wait stores `status`, then `ended` = 1, each by a release store (H5). A
// stream wait for `ended`, then the next kernel, which reads `status` before anything else (H6).
struct ArmedWord {
  Counter ended;
  uint64_t status;  // WaitStatus
};

// What a device needs to push: kernels/ring.cuh. Tickets are handed out in device memory, so a ring
// has producers of one kind only; the consumer is csrc/ring.hpp's, on `slots` and the word `taken`.
struct DeviceRing {
  Command* slots;         // [num_slots], a power of two; pinned host memory
  uint64_t* reserved;     // device memory: the next ticket
  uint64_t* taken_seen;   // device memory: the newest `taken` that a producer saw, or an older one
  const uint64_t* taken;  // pinned host memory: tickets below it were taken
  const uint64_t* abort_word;  // pinned host memory: not 0 ends every wait
  uint64_t num_slots;
  uint64_t timeout_ns;  // of one wait for room
};

// --- the immediate -------------------------------------------------------------------------------

// NOTE [immediate layout] 32 bits delivered with a write.
//   protocol: 0 · table row 19 · epoch 6 · (writes of this message - 1) 6
//   user:     1 · value 31
// The row was handed out by the receiver when the channel was made; everything wide (buffer,
// window, source, full epoch) stands in the receiver's table. Epochs are told apart modulo 64; at
// most two of a row are ever in flight.
constexpr uint32_t kUserImmediateBit = 1u << 31;
constexpr uint32_t kImmediateRows = 1u << 19;
constexpr uint32_t kEpochBits = 6;
constexpr uint32_t kMaxWritesPerMessage = 64;

struct Immediate {
  uint32_t bits;

  MOE_COMM_HOST_DEVICE static Immediate user(uint32_t value) { return {kUserImmediateBit | value}; }
  MOE_COMM_HOST_DEVICE static Immediate protocol(uint32_t row, uint64_t epoch,
                                                 uint32_t num_writes) {
    return {(row & (kImmediateRows - 1)) << 12 | static_cast<uint32_t>(epoch & 63u) << 6 |
            ((num_writes - 1) & 63u)};
  }
  MOE_COMM_HOST_DEVICE bool is_user() const { return (bits & kUserImmediateBit) != 0; }
  MOE_COMM_HOST_DEVICE uint32_t user_value() const { return bits & ~kUserImmediateBit; }
  MOE_COMM_HOST_DEVICE uint32_t row() const { return bits >> 12 & (kImmediateRows - 1); }
  MOE_COMM_HOST_DEVICE uint32_t epoch() const { return bits >> 6 & 63u; }
  MOE_COMM_HOST_DEVICE uint32_t num_writes() const { return (bits & 63u) + 1; }
};

// --- the header ----------------------------------------------------------------------------------

enum ExchangeKind : uint32_t { kNoExchange = 0, kDispatch = 1, kCombine = 2 };

enum HeaderStatus : uint32_t {
  kHeaderOk = 0,
  kHeaderError = 1,      // the sender's arguments were wrong; its text says which
  kHeaderMissing = 2,    // a forwarder's verdict: `origin` sent nothing before the deadline
  kHeaderLost = 3,       // likewise: `origin` died
  kHeaderDamaged = 4,    // likewise: the header that came from `origin` is not what anybody wrote
  kHeaderDisagrees = 5,  // a forwarder's own call is another than this one of `origin`
};

// What every rank must pass alike to one call. Compared field by field, so that an error names the
// argument.
struct Agreed {
  uint32_t num_experts;
  uint32_t payload_bytes;  // of one row
  uint32_t scale_bytes;    // of one row, 0: none
  uint32_t topk;
  uint32_t dtype;  // code of the payload's dtype, as in moe_comm/layout.py
  uint32_t row_bytes;
  uint32_t flags;  // bit 0: rows carry top-k ids and weights; bit 1: fp32 columns; bit 2: from a
                   // cached handle; bit 3: a combine whose copies travel one by one
  uint32_t max_tokens;  // of any rank in this dispatch, 0: any number. Ranks may say different ones
  uint64_t identity;    // combine and cached dispatch: which dispatch this belongs to; else 0
};

// In front of every window, in the same write as its rows. Sent in every exchange, even with no
// rows. Behind it come the counts (dispatch, first round) and then the rows, at an offset that both
// sides compute from the call.
struct Header {
  uint64_t epoch;
  uint16_t kind;        // ExchangeKind
  uint16_t status;      // HeaderStatus
  uint32_t counts;      // digest of the counts behind the header; 0: there are none
  uint32_t origin;      // the rank that `status` and `text` speak of
  uint32_t rows;        // rows in this window, this round
  uint32_t rounds;      // how many rounds the sender itself needs for this call
  uint32_t tokens;      // T of the source
  uint32_t total_rows;  // rows for the reader of this window, over all rounds
  uint32_t version;     // kAbiVersion
  Agreed agreed;        // of the rank that wrote the window
  uint64_t routing;  // fresh dispatch, first round: digest of the source's topk_idx; all together
                     // name the dispatch
  uint64_t check;  // digest of the other fields; a reader that finds another believes none of them
  char text[kHeaderTextBytes];
};

// The text of a header with kHeaderDisagrees: the forwarder's call. Nobody between the two knows
// which of them is wrong; a reader finds the one that is not as its own.
struct Disagreed {
  uint32_t rank;
  uint32_t kind;  // ExchangeKind
  Agreed agreed;
};

// Order matters: digest of a sequence = mix of the digest so far and the next word.
constexpr uint64_t kDigestSeed = 0xcbf29ce484222325ull;

MOE_COMM_HOST_DEVICE inline uint64_t mix_digest(uint64_t digest, uint64_t word) {
  digest = (digest ^ word) * 0x9e3779b97f4a7c15ull;
  return digest ^ (digest >> 29);
}

// What Header::counts says of a digest; never 0.
MOE_COMM_HOST_DEVICE inline uint32_t counts_digest(uint64_t digest) {
  return static_cast<uint32_t>(digest >> 32) | 1u;
}

constexpr uint32_t kHeaderWords = kHeaderBytes / 8;
constexpr uint32_t kCheckWord = 11;  // of a Header: `check`

// Header::check of a header, as its words.
MOE_COMM_HOST_DEVICE inline uint64_t header_digest(const uint64_t* words) {
  uint64_t digest = kDigestSeed;
  for (uint32_t i = 0; i < kHeaderWords; ++i)
    digest = mix_digest(digest, i == kCheckWord ? 0 : words[i]);
  return digest;
}

// --- words a GPU or a CPU thread waits for -------------------------------------------------------

// NOTE [heartbeat word] count · 4 | state. Written by the rank itself (into its own control block,
// and into the one of each link peer), so a reader learns in one load whether it lives and whether
// it said goodbye or gave up. The word behind it (the blame word) holds 1 + the rank that it gave
// up on; 0: none. Stored before the state, so that who waits for a rank that gave up can say whom
// it really misses.
enum RankState : uint64_t { kAlive = 0, kClosed = 1, kFailed = 2 };

#ifndef __CUDACC_RTC__
static_assert(sizeof(Command) == 16 && sizeof(ArmedWord) == 16 && offsetof(ArmedWord, status) == 8);
static_assert(sizeof(DeviceRing) == 56);
static_assert(sizeof(Immediate) == 4);
static_assert(sizeof(Agreed) == 40 && sizeof(Disagreed) == 48);
static_assert(sizeof(Header) == kHeaderBytes && offsetof(Header, agreed) == 40 &&
              offsetof(Header, check) == 8 * kCheckWord && offsetof(Header, text) == 96);
#endif

}  // namespace moe_comm
