// The exchange on the CPU: one dispatch or one combine of at most C tokens per rank. The only
// primitive.
//
// Three agents: the user's thread packs, sends and unpacks; the forwarder (one native thread of a
// Buffer, only between nodes with hops="node") passes rows on and adds sums, and never depends on
// the user's hook or wait; the proxy carries what crosses nodes. Each works in epoch order. The
// rules are DESIGN's: see moe_comm/buffer.py for the whole story.
//
// NOTE [slots] Every rank has one receive slot for each rank of the group, twice (banks).
// hops="node": the slot of source (node n, local l) is always written by my node's rank l: with
// rows of that source in a dispatch (l is the source itself, or its forwarder), with l's own
// results for the source (n, my local) in a combine (I am that source, or its forwarder).
// hops="rank": slot s is written by rank s. So each slot has one writer and one commit per epoch,
// and a rank that calls dispatch while another calls combine is seen at once.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "abi.hpp"
#include "engine.hpp"
#include "memory.hpp"
#include "rows.hpp"
#include "status.hpp"
#include "wait.hpp"

namespace moe_comm {

// The last thing before it is copied into a window. `counts`: what lies behind it there, if any.
void seal(Header& header, std::span<const std::byte> counts = {});
bool is_sealed(const Header& header);  // which says nothing of the counts
bool is_sealed(const Header& header, std::span<const std::byte> counts);

// The same on every rank. Made by moe_comm/layout.py, which explains them.
struct WindowOffsets {
  // Into the segment: control words; the doorbell and own beat lie at 0 and 64.
  uint64_t beats = 0, commits = 0, releases = 0, sents = 0, masks = 0, told = 0;
  // Into the segment, or memory of their own: windows that ranks of the node write; and those that
  // the network writes or reads.
  uint64_t slots = 0;
  uint64_t far_slots = 0, links = 0, sends = 0;
  uint64_t stride = 0;
  uint64_t segment = 0;  // its bytes
};

// Memory that only windows lie in: of a device, say. Whoever made it keeps it until the exchange is
// gone. The CPU reads and writes none of it, so only kernels can be such a rank.
struct WindowMemory {
  std::span<std::byte> bytes;
  DmaBuf dmabuf;        // by which the network reaches it; none: as memory of the host
  bool linked = false;  // the network reaches it, and all windows lie there; else those of the node
};

struct GroupShape {
  uint32_t rank = 0, num_ranks = 1;
  uint32_t num_nodes = 1, node_ranks = 1;  // N, G
  bool hops_node = true;
  std::vector<uint32_t> node_of, local_of;  // [R]
  std::vector<uint32_t> rank_of;            // [N * G], by node, then local
  std::vector<bool> absent;                 // [R] lost or masked; only with hops="rank"
  bool mask_lost = false;  // a rank that cannot be waited for is absent from then on, here
};

struct Timeouts {
  double late_s = 300;     // a peer that lives but does not come
  double silent_s = 30;    // a peer whose heartbeat stopped
  double verdict_s = 0.5;  // final readers wait this much longer for the forwarder's verdict
};

// Whether rows of one are rows of the other: all but max_tokens, which a reader checks.
inline bool agrees(Agreed theirs, const Agreed& mine) {
  theirs.max_tokens = mine.max_tokens;
  return std::memcmp(&theirs, &mine, sizeof(Agreed)) == 0;
}

// One dispatch or combine in progress. Made by the caller, shared with the forwarder. Pointers are
// the caller's tensors; they stay alive until the call ends.
struct Call {
  ExchangeKind kind = kDispatch;
  bool cached = false;          // a dispatch that reuses a handle: rows carry no ids
  bool own_rows_direct = true;  // own rows are read from x or y when received, not from a slot
  RowFormat format;
  Agreed agreed{};
  uint32_t capacity = 1;    // C: source tokens per round
  uint32_t num_tokens = 0;  // T of this rank
  uint32_t num_experts = 0;
  Timeouts timeouts;
  Status error;  // of this rank's arguments: it takes part with zero rows and this text
  int64_t* wait_ns = nullptr;  // [R], or null: how long each rank was waited for is added to it
  DType dtype = DType::kBytes;

  // --- the handle's tables (written by a fresh dispatch, read by a combine or a cached dispatch)
  int32_t* lane_rows = nullptr;     // [T, D]
  std::vector<uint32_t> tokens_of;  // [R] T of each source
  std::vector<uint32_t> totals;     // [R] rows received from each source
  uint64_t identity = 0;  // names the dispatch: digest of all ranks' routing, the same on all ranks
  int32_t* recv_tokens = nullptr;  // [rows] source token, by (source rank, source token)
  int32_t* positions = nullptr;    // [rows, K] place of each copy in y; null: place = row
  std::vector<std::vector<int32_t>>
      forward_tokens;  // [N] source token of each link row of that node's rail peer
  std::vector<std::vector<int32_t>>
      forward_rows;  // [N] [link rows, G] row in each local rank's slot, or -1

  // --- dispatch
  TokenSource source;
  Route routes;
  std::byte* out_x = nullptr;
  std::byte* out_scales = nullptr;
  int64_t* out_ids = nullptr;         // rank layout [rows, K]; expert layout [P]; null: not wanted
  float* out_weights = nullptr;       // likewise
  std::vector<uint32_t> expert_rows;  // [R, L] copies for my experts, by source
  bool expand = false;                // expert or padded layout

  // --- combine
  const std::byte* y = nullptr;
  int64_t y_stride = 0;
  const float* y_weights = nullptr;  // [places] or null
  const float* columns = nullptr;    // [rows, K], or [places] with expand
  bool columns_by_place = false;
  const std::byte* bias = nullptr;
  int64_t bias_stride = 0;
  std::byte* out_y = nullptr;
  int64_t out_stride = 0;
  float* out_columns = nullptr;  // [T, K]
  // Of this rank's own tokens [T, K], or null: sums go by the lanes of topk_idx, see sum_tokens.
  const int64_t* lane_idx = nullptr;
  const float* lane_weights = nullptr;
  bool each_copy = false;  // copies travel one by one, by (token, lane); the source adds them

  // --- progress, per agent
  uint32_t own_rounds = 1;               // what this rank needs itself
  uint32_t num_rounds = 1;               // the maximum over ranks, once the first headers are here
  std::vector<uint64_t> epochs;          // of the rounds sent
  std::vector<uint32_t> row_starts;      // [R] reader: first received row of each source
  std::vector<uint32_t> received_rows;   // [R] reader: rows unpacked so far
  std::vector<uint64_t> copy_places;     // [R, L] reader: next place of a copy
  std::vector<uint32_t> forwarded_rows;  // [N, G] forwarder: rows passed on so far
  Status failure;                        // the first error found in the peers' headers
};

// Where a dispatch's rows will lie. num_places: rows of the output, padding included.
struct Placement {
  uint64_t num_rows = 0;    // received: one for each (token, this rank)
  uint64_t num_places = 0;  // num_rows, or copies with the padding of their groups
  uint64_t num_copies = 0;  // (token, expert) pairs
  uint64_t fullest = 0;     // copies for the expert that gets most
};

struct ExchangeStats {  // payload rows and bytes this rank stored (its node) or sent (links),
                        // headers not counted
  std::atomic<uint64_t> rows_local{0}, bytes_local{0}, rows_link{0}, bytes_link{0}, writes_link{0};
};

// What kernels need to be this rank: addresses in this process.
//
//   out [D]                windows a dispatch writes, by lane (of pairs: by rank; null: absent)
//   in [R]                 windows it reads, by source
//   links [links, 4]       as kernels/dispatch.cuh: Link
//   commits, releases      [local] words there, set by this rank
// and between nodes with hops="node", for n in the other nodes, g in the ranks of this one:
//   results [R]            windows a combine writes, by source of the tokens; pairs have `out`
//   result_commits [R]     in the order of KernelView::results
//   link_in [n]            windows that rail peers write
//   passed [n, g]          where their rows are passed on to; passed_commits likewise
//   gathered [n, g]        windows with results for the rail peers
//   sends [n]              where their sums go
//   sums [J]               windows a combine reads, by term; pairs have `in`
struct KernelView {
  struct Table {
    std::string name;
    bool addresses;  // or plain numbers
    std::array<std::vector<uint64_t>, kNumBanks> words;
  };
  std::vector<Table> tables;
  std::vector<uint32_t> links, local;          // lanes: by network, and of this node
  std::vector<uint32_t> results;               // ranks, or none
  std::vector<std::span<std::byte>> segments;  // that all those addresses are in
  Counter* masks = nullptr;                    // [R] not 0: masked since; null: without mask_lost
  // Waits by ExchangeKind: to write, to read, to pass on; and those that are timed, by source.
  std::array<uint32_t, 3> credits{}, rows{}, forward{}, timed_rows{}, timed_forward{};
};

class Exchange {
 public:
  // `windows` without bytes: they lie in the segment.
  static Result<std::unique_ptr<Exchange>> create(Engine& engine, GroupShape shape,
                                                  WindowOffsets offsets, uint64_t first_epoch,
                                                  WindowMemory windows = {});
  ~Exchange();

  // --- construction, in this order; names and descriptors travel through the process group
  const SegmentName& segment() const { return segment_.name(); }
  // Descriptors for link peers: of the segment, and of what windows lie in.
  std::vector<std::byte> region() const { return serialise(moe_comm::describe(region_)); }
  std::vector<std::byte> window_region() const {
    return serialise(moe_comm::describe(of_windows()));
  }
  struct Rows {
    uint32_t window = 0, release = 0;
  };
  Result<Rows> open_rows(uint32_t rank);  // my immediate rows for what `rank` writes here
  // `windows`: where this process has the peer's; null: in the segment.
  Status map_peer(uint32_t rank, const SegmentName& name, std::byte* windows = nullptr);
  Status link_peer(uint32_t rank, uint32_t engine_peer, const RemoteRegion& region,
                   const RemoteRegion& window_region, Rows rows);
  void start();

  // --- instead of calls: kernels are this rank
  Result<KernelView> open_view();  // once, after start()
  Header header_like(const Call& call) const { return make_header(call, 0); }
  // What a forwarder says of a header of `writer` that is not what anybody wrote.
  Header damaged_like(const Call& call, uint32_t writer) const;
  // What is wrong with a header that a kernel did not take.
  Status judge(const Call& call, const Header& header, uint64_t epoch, uint32_t source);
  void blame(uint32_t rank);
  // What the first rank that refused this epoch's call says; of windows that came and are not
  // released, or of their headers [R], copied from a device.
  Status refusal(ExchangeKind kind, uint64_t epoch, std::span<const Header> headers = {});

  // --- a call
  uint32_t num_lanes() const { return num_lanes_; }
  Status route_tokens(Call& call);
  Status check_lanes(const Call& call) const;      // that lane_idx is what the handle was made from
  Status send(const std::shared_ptr<Call>& call);  // the next round
  Status wait_headers(Call& call);  // round 0: tokens_of, totals, expert_rows, num_rounds
  // After wait_headers (fresh) or with a handle's totals: where each source's rows begin, and with
  // `expand` where each expert's copies do. Groups are padded to a multiple of `alignment`, or to
  // `capacity` places each if that is not 0. copies [experts this rank owns]: how many for each.
  Placement place(Call& call, uint64_t alignment, uint64_t capacity, int64_t* copies) const;
  Status receive(Call& call, uint32_t round);  // waits, unpacks, releases
  Status finish(Call& call);                   // the forwarder is done with all rounds
  uint64_t next_epoch() const { return next_epoch_; }

  void fail(const Status& status);  // ends the exchange for good: waits end, peers are told
  Status fault() const { return fault_.raised() ? fault_.status() : Status(); }
  std::vector<bool> absent() const;
  void mask(uint32_t rank);        // between calls; with mask_lost
  std::vector<bool> lost() const;  // [R] ended, or cut off; one that is stopped cannot be told
  Status close(double seconds);    // goodbye: drains, tells the peers
  const ExchangeStats& stats() const { return stats_; }

 private:
  struct Link {
    bool present = false;
    uint32_t engine_peer = 0;
    uint32_t window_channel = 0, release_channel = 0;
    uint64_t window_offset = 0;  // of the peer's window for me, bank 0
    uint64_t send_offset = 0;    // of my send region for it, bank 0
    Rows rows;                   // mine, for it
    bool rows_open = false;
    uint64_t pushed[kNumBanks] = {0, 0};
  };
  struct Peer {  // of my node
    SharedSegment segment;
    std::byte* base = nullptr;     // of the segment
    std::byte* windows = nullptr;  // likewise, or of memory of their own
    ProcessWatch process;
  };
  struct Seen {  // a peer's heartbeat, as this wait saw it last
    uint64_t beat = ~0ull;
    Clock::time_point at;
  };
  struct Waited {  // what a wait is for, for errors
    const Call* call;
    uint64_t epoch;
    uint32_t rank;  // who must act
    const char* what;
    double extra_s = 0;
    const std::function<void()>* meanwhile = nullptr;  // at each look
  };

  Exchange(Engine& engine, GroupShape shape, WindowOffsets offsets, uint64_t first_epoch,
           WindowMemory windows);
  Status init();
  Status drain(double seconds);
  void say_failed();
  void fail_here(const Status& status, uint64_t blamed);  // on the proxy's thread

  // places
  // Of my node, and there. An absent rank sends nothing, gets nothing and is not waited for.
  bool is_local(uint32_t rank) const {
    return shape_.node_of[rank] == my_node_ && !shape_.absent[rank];
  }
  std::byte* slot(uint32_t reader, uint32_t index, uint64_t epoch) const;
  std::byte* link_window(uint32_t node, uint64_t epoch) const;
  // What the network reaches windows in.
  std::byte* far_windows() const { return windows_.linked ? windows_.bytes.data() : base_; }
  const MemoryRegion& of_windows() const { return windows_.linked ? window_region_ : region_; }
  uint32_t far_index(uint32_t rank, uint32_t reader) const;
  std::byte* send_region(const Link& link, uint64_t epoch) const;
  uint32_t link_index(uint32_t node, uint32_t mine) const { return node < mine ? node : node - 1; }
  uint32_t rail_peer(uint32_t node) const;
  Counter& commit_word(std::byte* base, uint64_t epoch, uint32_t index) const;
  Counter& release_word(std::byte* base, uint64_t epoch, uint32_t rank) const;
  Counter& sent_word(uint64_t epoch, uint32_t rank);
  Counter& mask_word(uint32_t rank) const;  // for kernels, whose waits set it, too
  // Not 0: that rank masked this one. A rank of the node says it in its own mask word.
  Counter& masked_by(uint32_t rank) const;
  void tell_masked(uint32_t rank);  // in a turn of the proxy
  Counter& beat_word(std::byte* base) const;
  uint64_t beat_of(uint32_t rank) const;
  uint64_t blamed_by(uint32_t rank) const;
  Doorbell& bell(std::byte* base) const;
  size_t counts_bytes(const Call& call, bool link) const;
  uint32_t num_local_experts(const Call& call) const;

  // waits
  Status mask_or(uint32_t rank, Status status);
  Status wait(Counter& word, uint64_t target, const Waited& waited);
  Status look_at_peer(const Waited& waited, Seen& seen, Clock::time_point start);
  std::string name_of(uint32_t rank) const;
  Status damaged(uint32_t writer) const;
  std::string describe(const Waited& waited, double seconds) const;

  // sending
  Header make_header(const Call& call, uint64_t epoch) const;
  Status await_credits(const Call& call, uint64_t epoch);
  Status send_dispatch(Call& call, uint64_t epoch, uint32_t round);
  Status send_combine(Call& call, uint64_t epoch, uint32_t round);
  void write_result(const Call& call, std::byte* out, size_t row, size_t next);
  uint32_t write_copies(const Call& call, std::byte* out, size_t from, size_t to);
  void commit(uint32_t rank, uint32_t index, uint64_t epoch);
  Status push(Link& link, uint64_t epoch, size_t num_bytes);
  void write_counts(const Call& call, std::byte* counts, uint32_t rank) const;

  // forwarding
  void forwarder() noexcept;
  Status forward_dispatch(Call& call, uint64_t epoch, uint32_t round);
  Status forward_combine(Call& call, uint64_t epoch, uint32_t round);
  void pass_on(Call& call, uint32_t node, uint64_t epoch, uint32_t round, const Status& arrival);
  Header verdict(const Call& call, uint64_t epoch, uint32_t origin, const Status& why) const;

  // receiving
  void check_header(Call& call, const Header& header, uint64_t epoch, uint32_t source);
  struct RowView {  // one row, wherever its parts lie
    const std::byte* payload;
    const std::byte* scales;
    const int32_t* ids;
    const float* weights;
    int32_t token;
    const std::byte* next;  // payload of the row after it, or null
  };
  void unpack_slot(Call& call, uint32_t source, const std::byte* rows, uint32_t num_rows);
  void unpack_own(Call& call, uint32_t round);
  void clear_rows(const Call& call, uint32_t source);
  void place_row(Call& call, uint32_t source, const RowView& row);
  void sum_tokens(Call& call, uint64_t epoch, uint32_t round);
  void sum_copies(const Call& call, uint64_t epoch, uint32_t round);
  void release(uint64_t epoch);
  static std::pair<uint32_t, uint32_t> range_of_round(const Call& call, uint32_t round,
                                                      const int32_t* tokens, uint32_t num_tokens);

  Engine& engine_;
  GroupShape shape_;
  WindowOffsets offsets_;
  uint32_t my_node_, my_local_, num_lanes_;
  std::vector<int32_t> lane_of_rank_;
  SharedSegment segment_;
  WindowMemory windows_;
  MemoryRegion region_, window_region_;  // of the segment; of windows_, if there are any
  std::byte* base_ = nullptr;
  std::vector<Peer> peers_;  // [R], mapped ones have base
  std::vector<Link> links_;  // [R]
  uint64_t first_epoch_, next_epoch_;
  uint64_t heartbeat_ = 0;
  bool linked_ = false;  // to any rank: else the proxy has nothing that a wait could help with
  bool started_ = false;
  std::vector<uint32_t> waits_;  // opened for kernels
  std::atomic<bool> closing_{false}, closed_{false};
  Fault fault_;
  std::atomic<uint64_t> blamed_{0};  // 1 + the rank that the first failed wait was for; 0: none
  ExchangeStats stats_;
  // Scratch of the user's thread.
  std::vector<std::byte> node_sum_, own_result_;  // one row
  std::vector<float> node_columns_;
  std::vector<uint32_t> lane_tokens_;  // of a window being packed
  std::vector<Term> copies_;           // of a result being written

  struct Work {
    std::shared_ptr<Call> call;
    uint64_t epoch;
    uint32_t round;
  };
  std::mutex work_mutex_;
  std::condition_variable work_changed_;
  std::deque<Work> work_;
  Counter forwarded_until_ = 0;  // newest epoch the forwarder ended (successfully or not)
  bool stop_ = false;
  std::thread forwarder_;
};

}  // namespace moe_comm
