// The receiving half of an exchange, on the user's thread: wait (H6), check headers, place or sum
// rows, release (H7).
#include <algorithm>
#include <cstring>

#include "exchange.hpp"

namespace moe_comm {
namespace {

constexpr double kRingFullTimeout = 30.0;  // seconds

const Header& header_of(const std::byte* window) {
  return *reinterpret_cast<const Header*>(window);
}

// The first agreed field that differs, as the argument a user knows it by.
std::string difference(const Agreed& theirs, const Agreed& mine) {
  const auto differ = [](const char* argument, uint64_t a, uint64_t b) {
    return std::string(argument) + ": it passed " + std::to_string(a) + ", this rank " +
           std::to_string(b);
  };
  if (theirs.num_experts != mine.num_experts)
    return differ("num_experts", theirs.num_experts, mine.num_experts);
  if (theirs.dtype != mine.dtype) return differ("x: dtype code", theirs.dtype, mine.dtype);
  if (theirs.payload_bytes != mine.payload_bytes) {
    return differ("x: bytes in a row", theirs.payload_bytes, mine.payload_bytes);
  }
  if (theirs.scale_bytes != mine.scale_bytes)
    return differ("scales: bytes in a row", theirs.scale_bytes, mine.scale_bytes);
  if (theirs.topk != mine.topk) return differ("topk_idx: K", theirs.topk, mine.topk);
  if (theirs.flags != mine.flags)
    return differ("topk_weights or handle: flags", theirs.flags, mine.flags);
  if (theirs.identity != mine.identity) {
    return differ("handle: number of the dispatch", theirs.identity, mine.identity);
  }
  if (theirs.row_bytes != mine.row_bytes)
    return differ("bytes in a row", theirs.row_bytes, mine.row_bytes);
  return "";
}

// What the headers of a dispatch say of T: the most of a rank, and the least that a rank allows.
struct TokenBounds {
  uint32_t most = 0, most_rank = 0, allowed = UINT32_MAX, allowed_rank = 0;

  void add(uint32_t rank, const Header& header) {
    if (header.tokens > most) {
      most = header.tokens;
      most_rank = rank;
    }
    const uint32_t bound = header.agreed.max_tokens;
    if (bound != 0 && bound < allowed) {
      allowed = bound;
      allowed_rank = rank;
    }
  }
};

}  // namespace

// Keeps the first error found, in slot order, so that every rank blames the same peer where it can.
void Exchange::check_header(Call& call, const Header& header, uint64_t epoch, uint32_t source) {
  if (!call.failure.ok()) return;
  const std::string phase = std::string(call.kind == kDispatch ? "dispatch" : "combine") +
                            " epoch " + std::to_string(epoch) + ": ";
  if (!is_sealed(header) || header.origin >= shape_.num_ranks) {
    blame(source);
    call.failure = damaged(source).with_prefix(phase);
    return;
  }
  const std::string who = "rank " + std::to_string(header.origin);
  const auto mismatch = [&](uint32_t rank, uint32_t kind, const Agreed& agreed) -> Status {
    const std::string name = phase + "rank " + std::to_string(rank);
    if (kind != call.kind) {
      return {Code::kMismatch, name + " called " + (kind == kDispatch ? "dispatch" : "combine") +
                                   " where this rank called " +
                                   (call.kind == kDispatch ? "dispatch" : "combine")};
    }
    const std::string what = call.error.ok() ? difference(agreed, call.agreed) : "";
    return what.empty() ? Status() : Status(Code::kMismatch, name + " disagrees in " + what);
  };
  if (header.epoch != epoch || header.version != kAbiVersion) {
    blame(source);
    call.failure = {Code::kTransport, phase + "window of rank " + std::to_string(source) +
                                          ": expected epoch " + std::to_string(epoch) + ", found " +
                                          std::to_string(header.epoch)};
  } else if (header.kind != call.kind) {
    call.failure = mismatch(header.origin, header.kind, header.agreed);
  } else if (header.status == kHeaderDisagrees) {
    Disagreed other;
    std::memcpy(&other, header.text, sizeof other);
    call.failure = mismatch(header.origin, header.kind, header.agreed);
    if (call.failure.ok()) call.failure = mismatch(other.rank, other.kind, other.agreed);
    if (call.failure.ok() && call.error.ok())
      call.failure = {Code::kMismatch, phase + who + " and its forwarder disagree"};
  } else if (header.status == kHeaderError) {
    call.failure = {Code::kPeerError, phase + who + " raised: " + header.text};
  } else if (header.status == kHeaderMissing) {
    blame(header.origin);
    call.failure = {Code::kPeerTimeout, phase + name_of(header.origin) +
                                            " is missing; a forwarder says: " + header.text};
  } else if (header.status == kHeaderLost) {
    blame(header.origin);
    call.failure = {Code::kPeerLost,
                    phase + name_of(header.origin) + " is lost; a forwarder says: " + header.text};
  } else if (header.status == kHeaderDamaged) {
    blame(header.origin);
    call.failure = {Code::kTransport, phase + name_of(header.origin) +
                                          " sent something else; a forwarder says: " + header.text};
  } else {
    call.failure = mismatch(header.origin, header.kind, header.agreed);
  }
}

// After the first round of a fresh dispatch has arrived: what every source will send in all rounds.
Status Exchange::wait_headers(Call& call) {
  const uint64_t epoch = call.epochs[0];
  const uint32_t R = shape_.num_ranks;
  const bool fresh = call.kind == kDispatch && !call.cached;
  const uint32_t L = num_local_experts(call);
  call.num_rounds = call.own_rounds;
  TokenBounds bounds;
  std::vector<uint32_t> awaited;
  const auto start = Clock::now();
  const std::function<void()> time_arrivals = [&] {  // of all, as they come or are masked
    std::erase_if(awaited, [&](uint32_t source) {
      if (!shape_.absent[source] &&
          word_at(commit_word(base_, epoch, source)).load(std::memory_order_acquire) < epoch)
        return false;
      call.wait_ns[source] += std::chrono::nanoseconds(Clock::now() - start).count();
      return true;
    });
  };
  for (uint32_t source = 0; call.wait_ns != nullptr && source < R; ++source) {
    if (!shape_.absent[source]) awaited.push_back(source);
  }
  if (fresh) {
    call.totals.assign(R, 0);
    call.tokens_of.assign(R, 0);
    call.expert_rows.assign(static_cast<size_t>(R) * L, 0);
  }
  for (uint32_t source = 0; source < R; ++source) {
    if (shape_.absent[source]) continue;
    const bool forwarded = shape_.hops_node && !is_local(source);
    const uint32_t writer =
        forwarded ? shape_.rank_of[my_node_ * shape_.node_ranks + shape_.local_of[source]] : source;
    Waited waited{&call, epoch, writer, "header", forwarded ? call.timeouts.verdict_s : 0};
    if (!awaited.empty()) waited.meanwhile = &time_arrivals;
    if (Status status = mask_or(source, wait(commit_word(base_, epoch, source), epoch, waited));
        !status.ok())
      return status;
    if (shape_.absent[source]) {
      time_arrivals();
      continue;
    }
    const std::byte* window = slot(shape_.rank, source, epoch);
    const Header& header = header_of(window);
    check_header(call, header, epoch, source);
    if (call.failure.code() == Code::kTransport) continue;
    call.num_rounds = std::max(call.num_rounds, header.rounds);
    if (!fresh || !call.failure.ok()) continue;
    bounds.add(source, header);
    call.tokens_of[source] = header.tokens;
    call.totals[source] = header.total_rows;
    // Ranks that may see different sets of sources agree on the epoch alone.
    call.identity = shape_.mask_lost ? epoch : mix_digest(call.identity, header.routing) >> 1;
    if (header.status == kHeaderOk && call.error.ok() && header.counts) {
      if (!is_sealed(header, {window + kHeaderBytes, counts_bytes(call, false)})) {
        blame(source);
        call.failure =
            damaged(source).with_prefix("dispatch epoch " + std::to_string(epoch) + ": ");
        continue;
      }
      std::memcpy(call.expert_rows.data() + static_cast<size_t>(source) * L, window + kHeaderBytes,
                  L * sizeof(uint32_t));
    }
  }
  if (bounds.most > bounds.allowed && call.failure.ok()) {
    call.failure = {Code::kMismatch, "dispatch epoch " + std::to_string(epoch) +
                                         ": max_tokens: rank " +
                                         std::to_string(bounds.allowed_rank) + " passed " +
                                         std::to_string(bounds.allowed) + ", rank " +
                                         std::to_string(bounds.most_rank) + " has " +
                                         std::to_string(bounds.most) + " tokens"};
  }
  if (call.kind == kCombine &&
      shape_.hops_node) {  // contributions of other nodes come by the links
    for (uint32_t n = 0; n < shape_.num_nodes; ++n) {
      if (n == my_node_) continue;
      const Waited waited{&call, epoch, rail_peer(n), "sums of its node", call.timeouts.verdict_s};
      if (Status status = wait(commit_word(base_, epoch, shape_.num_ranks + n), epoch, waited);
          !status.ok())
        return status;
      const Header& header = header_of(link_window(n, epoch));
      check_header(call, header, epoch, rail_peer(n));
      if (call.failure.code() != Code::kTransport)
        call.num_rounds = std::max(call.num_rounds, header.rounds);
    }
  }
  return {};
}

Placement Exchange::place(Call& call, uint64_t alignment, uint64_t capacity,
                          int64_t* copies) const {
  const uint32_t R = shape_.num_ranks, L = num_local_experts(call);
  Placement out;
  call.received_rows.assign(R, 0);
  call.row_starts.resize(R);
  for (uint32_t r = 0; r < R; ++r) {
    call.row_starts[r] = static_cast<uint32_t>(out.num_rows);
    out.num_rows += call.totals[r];
  }
  out.num_places = out.num_rows;
  if (call.cached || call.kind == kCombine) return out;
  const uint64_t first = uint64_t{shape_.rank} * L;
  if (call.expand) call.copy_places.assign(static_cast<size_t>(R) * L, 0);
  uint64_t group = 0;  // the first place of this expert's
  for (uint64_t e = 0; e < L && first + e < call.num_experts; ++e) {
    uint64_t at = group;
    for (uint32_t r = 0; r < R; ++r) {
      if (call.expand) call.copy_places[uint64_t{r} * L + e] = at;
      at += call.expert_rows[uint64_t{r} * L + e];
    }
    const uint64_t count = at - group;
    copies[e] = static_cast<int64_t>(count);
    out.num_copies += count;
    out.fullest = std::max(out.fullest, count);
    group += capacity ? capacity : (count + alignment - 1) / alignment * alignment;
  }
  if (call.expand) out.num_places = group;
  return out;
}

Status Exchange::receive(Call& call, uint32_t round) {
  if (fault_.raised()) return fault_.status();
  const uint64_t epoch = call.epochs[round];
  const bool combine_by_node = call.kind == kCombine && shape_.hops_node;
  for (uint32_t source = 0; source < shape_.num_ranks; ++source) {
    if (shape_.absent[source]) continue;
    const bool remote = shape_.hops_node && !is_local(source);
    const uint32_t writer =
        remote ? shape_.rank_of[my_node_ * shape_.node_ranks + shape_.local_of[source]] : source;
    const Waited waited{&call, epoch, writer, "rows", remote ? call.timeouts.verdict_s : 0};
    if (Status status = mask_or(source, wait(commit_word(base_, epoch, source), epoch, waited));
        !status.ok())
      return status;
    if (shape_.absent[source]) continue;
    const std::byte* window = slot(shape_.rank, source, epoch);
    check_header(call, header_of(window), epoch, source);
  }
  for (uint32_t n = 0; combine_by_node && n < shape_.num_nodes; ++n) {
    if (n == my_node_) continue;
    const Waited waited{&call, epoch, rail_peer(n), "sums of its node", call.timeouts.verdict_s};
    if (Status status = wait(commit_word(base_, epoch, shape_.num_ranks + n), epoch, waited);
        !status.ok())
      return status;
    check_header(call, header_of(link_window(n, epoch)), epoch, rail_peer(n));
  }
  if (call.failure.ok() && call.error.ok()) {
    if (call.kind == kCombine && call.each_copy) {
      sum_copies(call, epoch, round);
    } else if (call.kind == kCombine) {
      sum_tokens(call, epoch, round);
    } else {
      const size_t rows_at = kHeaderBytes + counts_bytes(call, false);
      for (uint32_t source = 0; source < shape_.num_ranks; ++source) {
        if (shape_.absent[source]) {
          clear_rows(call, source);
          continue;
        }
        const std::byte* window = slot(shape_.rank, source, epoch);
        if (source == shape_.rank && call.own_rows_direct) {
          unpack_own(call, round);
        } else {
          unpack_slot(call, source, window + rows_at, header_of(window).rows);
        }
      }
    }
  }
  // The bank is free when both its readers are done: this thread, and the forwarder.
  const Waited waited{&call, epoch, shape_.rank, "own forwarder"};
  if (Status status = wait(forwarded_until_, epoch, waited); !status.ok()) return status;
  release(epoch);
  return call.failure.code() == Code::kTransport ? call.failure : Status();  // not to be trusted on
}

// What a handle promises of a rank that is absent now: rows of zeros.
void Exchange::clear_rows(const Call& call, uint32_t source) {
  const uint32_t K = call.format.topk;
  const auto clear = [&](size_t place) {
    std::memset(call.out_x + place * call.format.payload_bytes, 0, call.format.payload_bytes);
    if (call.format.scale_bytes)
      std::memset(call.out_scales + place * call.format.scale_bytes, 0, call.format.scale_bytes);
  };
  for (size_t row = call.row_starts[source]; row < call.row_starts[source] + call.totals[source];
       ++row) {
    if (!call.expand) clear(row);
    for (uint32_t k = 0; call.expand && k < K; ++k) {
      if (const int32_t place = call.positions[row * K + k]; place >= 0)
        clear(static_cast<size_t>(place));
    }
  }
}

void Exchange::unpack_slot(Call& call, uint32_t source, const std::byte* rows, uint32_t num_rows) {
  const RowFormat& f = call.format;
  for (uint32_t i = 0; i < num_rows; ++i, rows += f.row_bytes) {
    RowView row{rows, rows + f.scales_at, nullptr, nullptr, 0, nullptr};
    if (i + 1 < num_rows) row.next = rows + f.row_bytes;
    if (!call.cached) {
      row.ids = reinterpret_cast<const int32_t*>(rows + f.ids_at);
      row.weights = reinterpret_cast<const float*>(rows + f.weights_at);
      std::memcpy(&row.token, rows + f.token_at, sizeof row.token);
    }
    place_row(call, source, row);
  }
}

void Exchange::unpack_own(Call& call, uint32_t round) {
  const uint32_t lane = static_cast<uint32_t>(lane_of_rank_[shape_.rank]);
  const uint32_t first =
      std::min<uint64_t>(call.num_tokens, static_cast<uint64_t>(round) * call.capacity);
  const uint32_t last =
      std::min<uint64_t>(call.num_tokens, static_cast<uint64_t>(first) + call.capacity);
  const RowFormat& f = call.format;
  std::vector<std::byte> scales(f.scale_bytes);
  std::vector<int32_t> ids(f.topk);
  for (uint32_t t = first; t < last; ++t) {
    if (call.lane_rows[static_cast<size_t>(t) * num_lanes_ + lane] < 0) continue;
    const std::byte* payload = call.source.x + t * call.source.x_stride;
    RowView row{payload, nullptr, nullptr, nullptr, static_cast<int32_t>(t), nullptr};
    if (t + 1 < last) row.next = payload + call.source.x_stride;
    if (f.scale_bytes) {
      const uint32_t item = call.source.scale_item_bytes;
      for (uint32_t i = 0; i * item < f.scale_bytes; ++i) {
        std::memcpy(
            scales.data() + i * item,
            call.source.scales + t * call.source.scale_stride_token + i * call.source.scale_stride,
            item);
      }
      row.scales = scales.data();
    }
    if (!call.cached) {
      for (uint32_t k = 0; k < f.topk; ++k) {
        ids[k] = static_cast<int32_t>(call.source.topk_idx[static_cast<size_t>(t) * f.topk + k]);
      }
      row.ids = ids.data();
      row.weights = call.source.topk_weights
                        ? call.source.topk_weights + static_cast<size_t>(t) * f.topk
                        : nullptr;
    }
    place_row(call, shape_.rank, row);
  }
}

// One received row to its place (rank layout) or places (one for each of its experts here).
void Exchange::place_row(Call& call, uint32_t source, const RowView& row) {
  const RowFormat& f = call.format;
  const uint32_t K = f.topk, L = num_local_experts(call);
  const size_t out = call.row_starts[source] + call.received_rows[source]++;
  const auto put = [&](size_t place) {
    copy_row(call.out_x + place * f.payload_bytes, row.payload, f.payload_bytes, row.next);
    if (f.scale_bytes)
      std::memcpy(call.out_scales + place * f.scale_bytes, row.scales, f.scale_bytes);
  };
  if (call.cached) {
    if (!call.expand) return put(out);
    for (uint32_t k = 0; k < K; ++k) {
      if (const int32_t place = call.positions[out * K + k]; place >= 0)
        put(static_cast<size_t>(place));
    }
    return;
  }
  call.recv_tokens[out] = row.token;
  const int64_t first_expert = static_cast<int64_t>(shape_.rank) * L;
  if (!call.expand) put(out);
  for (uint32_t k = 0; k < K; ++k) {
    const int64_t local = row.ids[k] - first_expert;
    const bool mine = row.ids[k] >= 0 && local >= 0 && local < static_cast<int64_t>(L);
    const float weight = mine && row.weights && f.weights_at ? row.weights[k] : 0.0f;
    if (!call.expand) {
      if (call.out_ids) call.out_ids[out * K + k] = mine ? local : -1;
      if (call.out_weights) call.out_weights[out * K + k] = weight;
      continue;
    }
    if (!mine) {
      call.positions[out * K + k] = -1;
      continue;
    }
    const uint64_t place =
        call.copy_places[static_cast<size_t>(source) * L + static_cast<size_t>(local)]++;
    call.positions[out * K + k] = static_cast<int32_t>(place);
    put(place);
    if (call.out_ids) call.out_ids[place] = local;
    if (call.out_weights) call.out_weights[place] = weight;
  }
}

// Level 1 for the own node, then level 2 over the nodes; with hops="rank" one sum over the ranks.
// With lane_idx (one level only) the ranks' sums are added in the order of the last lane of each.
void Exchange::sum_tokens(Call& call, uint64_t epoch, uint32_t round) {
  const size_t row_bytes = call.format.row_bytes;
  const size_t num_items = call.format.payload_bytes / item_bytes(call.dtype);
  const uint32_t K = call.format.topk, L = num_local_experts(call);
  const uint32_t first =
      std::min<uint64_t>(call.num_tokens, static_cast<uint64_t>(round) * call.capacity);
  const uint32_t last =
      std::min<uint64_t>(call.num_tokens, static_cast<uint64_t>(first) + call.capacity);
  node_sum_.resize(call.format.payload_bytes);
  node_columns_.resize(K);
  own_result_.resize(row_bytes);
  const auto own_lane = static_cast<uint32_t>(lane_of_rank_[shape_.rank]);
  std::vector<const std::byte*> windows(num_lanes_);  // rows of each lane
  for (uint32_t lane = 0; lane < num_lanes_; ++lane) {
    if (!shape_.hops_node) {
      windows[lane] = slot(shape_.rank, lane, epoch) + kHeaderBytes;
    } else if (lane < shape_.node_ranks) {
      windows[lane] =
          slot(shape_.rank, shape_.rank_of[my_node_ * shape_.node_ranks + lane], epoch) +
          kHeaderBytes;
    } else if (lane - shape_.node_ranks != my_node_) {
      windows[lane] = link_window(lane - shape_.node_ranks, epoch) + kHeaderBytes;
    }
  }
  std::vector<int32_t> starts(num_lanes_, -1);
  std::vector<Term> local, terms;
  std::vector<const float*> local_columns, columns;
  for (uint32_t t = first; t < last; ++t) {
    const int32_t* rows = call.lane_rows + static_cast<size_t>(t) * num_lanes_;
    terms.clear(), local.clear(), columns.clear(), local_columns.clear();
    const auto add = [&](uint32_t lane, std::vector<Term>& to,
                         std::vector<const float*>& columns_to) {
      if (rows[lane] < 0) return;
      if (starts[lane] < 0) starts[lane] = rows[lane];
      if (lane == own_lane && call.own_rows_direct) {
        const size_t own = call.row_starts[shape_.rank] + static_cast<size_t>(rows[lane]);
        if (!call.positions) {
          const std::byte* row = call.y + own * call.y_stride;
          to.push_back({row, 0, false, t + 1 < last ? row + call.y_stride : nullptr});
          columns_to.push_back(call.columns ? call.columns + own * K : nullptr);
          return;
        }
        write_result(call, own_result_.data(), own, own);
        to.push_back({own_result_.data()});
        columns_to.push_back(
            reinterpret_cast<const float*>(own_result_.data() + call.format.weights_at));
        return;
      }
      const std::byte* row =
          windows[lane] + static_cast<size_t>(rows[lane] - starts[lane]) * row_bytes;
      to.push_back({row, 0, false, t + 1 < last ? row + row_bytes : nullptr});
      columns_to.push_back(reinterpret_cast<const float*>(row + call.format.weights_at));
    };
    if (call.lane_idx) {
      const int64_t* ids = call.lane_idx + static_cast<size_t>(t) * K;
      for (uint32_t k = 0; k < K; ++k) {
        if (ids[k] < 0) continue;
        const int64_t rank = ids[k] / L;
        if (shape_.absent[static_cast<size_t>(rank)]) continue;
        const bool last_of_rank = std::none_of(
            ids + k + 1, ids + K, [&](int64_t id) { return id >= 0 && id / L == rank; });
        if (last_of_rank)
          add(static_cast<uint32_t>(lane_of_rank_[static_cast<size_t>(rank)]), terms, columns);
      }
    } else if (!shape_.hops_node) {
      for (uint32_t r = 0; r < shape_.num_ranks; ++r) {
        if (!shape_.absent[r]) add(r, terms, columns);
      }
    } else {
      for (uint32_t g = 0; g < shape_.node_ranks; ++g) add(g, local, local_columns);
      for (uint32_t n = 0; n < shape_.num_nodes; ++n) {
        if (n != my_node_) {
          add(shape_.node_ranks + n, terms, columns);
        } else if (local.size() == 1) {
          terms.push_back(local[0]);
          columns.push_back(local_columns[0]);
        } else if (!local.empty()) {
          sum_rows(node_sum_.data(), local, nullptr, num_items,
                   call.dtype);  // rounded like any other node's
          terms.push_back({node_sum_.data(), 0, false});
          if (call.out_columns) sum_columns(node_columns_.data(), local_columns, K);
          columns.push_back(node_columns_.data());
        }
      }
    }
    const std::byte* bias = call.bias ? call.bias + t * call.bias_stride : nullptr;
    sum_rows(call.out_y + t * call.out_stride, terms, bias, num_items, call.dtype);
    if (call.out_columns) sum_columns(call.out_columns + static_cast<size_t>(t) * K, columns, K);
  }
}

// Each token's copies in the order of its lanes: the copies of a rank lie in that order, too.
void Exchange::sum_copies(const Call& call, uint64_t epoch, uint32_t round) {
  const size_t num_items = call.format.payload_bytes / item_bytes(call.dtype);
  const uint32_t K = call.format.topk, L = num_local_experts(call);
  const uint32_t first =
      std::min<uint64_t>(call.num_tokens, static_cast<uint64_t>(round) * call.capacity);
  const uint32_t last =
      std::min<uint64_t>(call.num_tokens, static_cast<uint64_t>(first) + call.capacity);
  const auto own_lane = static_cast<uint32_t>(lane_of_rank_[shape_.rank]);
  std::vector<const std::byte*> next_copy(shape_.num_ranks);
  for (uint32_t r = 0; r < shape_.num_ranks; ++r) {
    next_copy[r] = slot(shape_.rank, r, epoch) + kHeaderBytes;
  }
  for (uint32_t t = first; t < last; ++t) {
    copies_.clear();
    const int32_t* rows = call.lane_rows + static_cast<size_t>(t) * num_lanes_;
    for (uint32_t k = 0; k < K; ++k) {
      const size_t at = static_cast<size_t>(t) * K + k;
      if (call.lane_idx[at] < 0) continue;
      const auto rank = static_cast<uint32_t>(call.lane_idx[at] / L);
      if (shape_.absent[rank]) continue;
      Term& term = copies_.emplace_back();
      if (rank == shape_.rank && call.own_rows_direct) {
        const size_t row = call.row_starts[rank] + static_cast<size_t>(rows[own_lane]);
        term.row = call.y + call.positions[row * K + k] * call.y_stride;
      } else {
        term.row = next_copy[rank];
        next_copy[rank] += call.format.row_bytes;
        term.next = next_copy[rank];
      }
      term.weighted = term.fused = call.lane_weights != nullptr;
      if (term.weighted) term.weight = call.lane_weights[at];
    }
    const std::byte* bias = call.bias ? call.bias + t * call.bias_stride : nullptr;
    sum_rows(call.out_y + t * call.out_stride, copies_, bias, num_items, call.dtype);
  }
}

void Exchange::release(uint64_t epoch) {
  for (uint32_t r = 0; r < shape_.num_ranks; ++r) {
    if (is_local(r)) {
      word_at(release_word(peers_[r].base, epoch, shape_.rank))
          .store(epoch, std::memory_order_release);  // H7
      ring(bell(peers_[r].base));
    } else if (links_[r].present && !shape_.absent[r]) {
      Transfer transfer{};
      transfer.channel = links_[r].release_channel;
      transfer.epoch = static_cast<uint32_t>(epoch & 0xffffu);
      if (Status status = engine_.proxy().push(transfer, kRingFullTimeout); !status.ok())
        fault_.raise(status);
    }
  }
}

Status Exchange::finish(Call& call) {
  if (call.epochs.empty()) return {};
  const Waited waited{&call, call.epochs.back(), shape_.rank, "own forwarder"};
  return wait(forwarded_until_, call.epochs.back(), waited);
}

}  // namespace moe_comm
