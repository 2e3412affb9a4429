// The sending half of an exchange, on the user's thread: credits, rows, headers, commits (H1),
// commands (H2).
#include <algorithm>
#include <cstring>

#include "exchange.hpp"

namespace moe_comm {
namespace {

constexpr double kRingFullTimeout = 30.0;  // seconds

void set_text(Header& header, const std::string& text) {
  const size_t length = std::min<size_t>(text.size(), kHeaderTextBytes - 1);
  std::memcpy(header.text, text.data(), length);
  header.text[length] = 0;
}

}  // namespace

Status Exchange::route_tokens(Call& call) {
  const RouteTables tables{lane_of_rank_.data(), num_lanes_, shape_.num_ranks};
  return route(call.source.topk_idx, call.num_tokens, call.format.topk, call.num_experts, tables,
               call.lane_rows, call.routes);
}

Status Exchange::check_lanes(const Call& call) const {
  const uint32_t K = call.format.topk, L = num_local_experts(call);
  const auto differs = [](uint32_t token) {
    return Status(Code::kInvalid,
                  "topk_idx: expected that of the handle's dispatch, got other ids for token " +
                      std::to_string(token));
  };
  std::vector<uint32_t> stamp(num_lanes_, 0);
  for (uint32_t t = 0; t < call.num_tokens; ++t) {
    const int32_t* rows = call.lane_rows + static_cast<size_t>(t) * num_lanes_;
    for (uint32_t k = 0; k < K; ++k) {
      const int64_t id = call.lane_idx[static_cast<size_t>(t) * K + k];
      if (id == -1) continue;
      if (id < 0 || id >= static_cast<int64_t>(call.num_experts)) return differs(t);
      const int32_t lane = lane_of_rank_[static_cast<size_t>(id) / L];
      if (lane < 0) continue;  // an absent rank's
      if (rows[lane] < 0) return differs(t);
      stamp[lane] = t + 1;
    }
    for (uint32_t lane = 0; lane < num_lanes_; ++lane) {
      if (!shape_.hops_node && shape_.absent[lane]) continue;
      if (rows[lane] >= 0 && stamp[lane] != t + 1) return differs(t);
    }
  }
  return {};
}

Header Exchange::make_header(const Call& call, uint64_t epoch) const {
  Header header{};
  header.epoch = epoch;
  header.kind = call.kind;
  header.status = call.error.ok() ? kHeaderOk : kHeaderError;
  header.origin = shape_.rank;
  header.rounds = call.own_rounds;
  header.tokens = call.error.ok() ? call.num_tokens : 0;
  header.version = kAbiVersion;
  header.agreed = call.agreed;
  header.routing = call.routes.digest;
  if (!call.error.ok()) set_text(header, call.error.text());
  return header;
}

// A forwarder's header on behalf of a rank that did not deliver; it blames whom that rank blames.
Header Exchange::verdict(const Call& call, uint64_t epoch, uint32_t origin,
                         const Status& why) const {
  Header header = make_header(call, epoch);
  header.status = why.code() == Code::kPeerTimeout ? kHeaderMissing
                  : why.code() == Code::kTransport ? kHeaderDamaged
                                                   : kHeaderLost;
  header.origin = origin;
  if (const uint64_t blamed = blamed_.load()) header.origin = static_cast<uint32_t>(blamed - 1);
  header.tokens = 0;
  set_text(header, why.text());
  return header;
}

// The bank of this epoch may be written when its reader released the epoch before in it (H7).
Status Exchange::await_credits(const Call& call, uint64_t epoch) {
  for (uint32_t r = 0; r < shape_.num_ranks; ++r) {
    if (shape_.absent[r] || (!is_local(r) && !links_[r].present)) continue;
    if (Status status = mask_or(r, wait(release_word(base_, epoch, r), epoch - kNumBanks,
                                        {&call, epoch, r, "release of its bank"}));
        !status.ok()) {
      return status;
    }
    if (shape_.absent[r] || !links_[r].present) continue;
    // Our own copy must have left the send region, too: the peer's release does not say so.
    if (Status status = mask_or(r, wait(sent_word(epoch, r), links_[r].pushed[epoch % kNumBanks],
                                        {&call, epoch, r, "completion of earlier writes to it"}));
        !status.ok()) {
      return status;
    }
  }
  return {};
}

Status Exchange::send(const std::shared_ptr<Call>& call) {
  if (fault_.raised()) return fault_.status();
  const uint64_t epoch = next_epoch_;
  const auto round = static_cast<uint32_t>(call->epochs.size());
  if (Status status = await_credits(*call, epoch); !status.ok()) return status;
  ++next_epoch_;
  call->epochs.push_back(epoch);
  Status status = call->kind == kDispatch ? send_dispatch(*call, epoch, round)
                                          : send_combine(*call, epoch, round);
  if (!status.ok()) return status;
  if (forwarder_.joinable()) {
    std::lock_guard lock(work_mutex_);
    work_.push_back({call, epoch, round});
    work_changed_.notify_one();
  } else {
    word_at(forwarded_until_).store(epoch, std::memory_order_release);
  }
  return {};
}

void Exchange::commit(uint32_t rank, uint32_t index, uint64_t epoch) {
  std::byte* base = peers_[rank].base;
  word_at(commit_word(base, epoch, index))
      .store(epoch, std::memory_order_release);  // H1: after rows and header
  ring(bell(base));
}

Status Exchange::push(Link& link, uint64_t epoch, size_t num_bytes) {
  Transfer transfer{};
  transfer.channel = link.window_channel;
  transfer.epoch = static_cast<uint32_t>(epoch & 0xffffu);
  transfer.local_offset = link.send_offset + offsets_.stride * (epoch % kNumBanks);
  transfer.remote_offset = link.window_offset + offsets_.stride * (epoch % kNumBanks);
  transfer.num_bytes = num_bytes;
  ++link.pushed[epoch % kNumBanks];
  return engine_.proxy().push(transfer, kRingFullTimeout);
}

// What the readers behind this window will get from us, over all rounds: enough to allocate outputs
// exactly.
void Exchange::write_counts(const Call& call, std::byte* counts, uint32_t rank) const {
  const uint32_t L = num_local_experts(call);
  std::memcpy(counts, call.routes.expert_counts.data() + static_cast<size_t>(rank) * L,
              L * sizeof(uint32_t));
}

Status Exchange::send_dispatch(Call& call, uint64_t epoch, uint32_t round) {
  const bool counts = round == 0 && call.error.ok() && !call.cached;
  const uint32_t first =
      std::min<uint64_t>(call.num_tokens, static_cast<uint64_t>(round) * call.capacity);
  const uint32_t last =
      call.error.ok()
          ? std::min<uint64_t>(call.num_tokens, static_cast<uint64_t>(first) + call.capacity)
          : first;
  const size_t row_bytes = call.format.row_bytes;
  const auto pack = [&](std::byte* window, bool link, uint32_t rank, uint32_t lane,
                        bool skip_rows) {
    std::byte* rows = window + kHeaderBytes + counts_bytes(call, link);
    Header header = make_header(call, epoch);
    lane_tokens_.clear();  // a lane's rows lie in the order of their tokens, without gaps
    for (uint32_t t = first; t < last; ++t) {
      if (call.lane_rows[static_cast<size_t>(t) * num_lanes_ + lane] >= 0)
        lane_tokens_.push_back(t);
    }
    header.rows = static_cast<uint32_t>(lane_tokens_.size());
    for (size_t i = 0; i < lane_tokens_.size() && !skip_rows; ++i) {
      write_row(rows + i * row_bytes, call.format, call.source, lane_tokens_[i],
                lane_tokens_[std::min(i + 1, lane_tokens_.size() - 1)]);
    }
    if (counts && link && shape_.hops_node) {
      auto* words = reinterpret_cast<uint32_t*>(window + kHeaderBytes);
      const uint32_t L = num_local_experts(call);
      for (uint32_t g = 0; g < shape_.node_ranks; ++g) {
        const uint32_t reader = shape_.rank_of[shape_.node_of[rank] * shape_.node_ranks + g];
        words[g * (1 + L)] = call.routes.rank_counts[reader];
        write_counts(call, reinterpret_cast<std::byte*>(words + g * (1 + L) + 1), reader);
      }
      header.total_rows = call.routes.lane_counts[lane];
    } else if (counts) {
      write_counts(call, window + kHeaderBytes, rank);
      header.total_rows = call.routes.rank_counts[rank];
    }
    seal(header, {window + kHeaderBytes, counts ? counts_bytes(call, link) : 0});
    std::memcpy(window, &header, sizeof header);
    return header.rows;
  };
  // Links first: the network works while we copy to our own node.
  for (uint32_t r = 0; r < shape_.num_ranks; ++r) {
    Link& link = links_[r];
    if (!link.present || shape_.absent[r]) continue;
    const uint64_t rows =
        pack(send_region(link, epoch), true, r, static_cast<uint32_t>(lane_of_rank_[r]), false);
    const size_t num_bytes = kHeaderBytes + counts_bytes(call, true) + rows * row_bytes;
    if (Status status = push(link, epoch, num_bytes); !status.ok()) return status;
    stats_.rows_link += rows;
    stats_.bytes_link += rows * call.format.payload_bytes;
    ++stats_.writes_link;
  }
  for (uint32_t r = 0; r < shape_.num_ranks; ++r) {
    if (!is_local(r)) continue;
    const bool own = r == shape_.rank && call.own_rows_direct;
    const uint64_t rows =
        pack(slot(r, shape_.rank, epoch), false, r, static_cast<uint32_t>(lane_of_rank_[r]), own);
    stats_.rows_local += rows;
    stats_.bytes_local += rows * call.format.payload_bytes;
    commit(r, shape_.rank, epoch);
  }
  return {};
}

// The result for one received row, with its columns at weights_at: a rank's own copies are summed
// here (level 0), in lane order. `next` is the row whose result follows (or `row`).
void Exchange::write_result(const Call& call, std::byte* out, size_t row, size_t next) {
  const uint32_t K = call.format.topk;
  auto* columns = reinterpret_cast<float*>(out + call.format.weights_at);
  if (!call.positions) {
    copy_row(out, call.y + row * call.y_stride, call.format.payload_bytes,
             next == row ? nullptr : call.y + next * call.y_stride);
    if (call.columns) std::memcpy(columns, call.columns + row * K, K * sizeof(float));
    return;
  }
  copies_.clear();
  const int32_t* places = call.positions + row * K;
  for (uint32_t k = 0; k < K; ++k) {
    if (call.columns) {
      columns[k] = call.columns_by_place ? (places[k] < 0 ? 0.0f : call.columns[places[k]])
                                         : call.columns[row * K + k];
    }
    if (places[k] < 0) continue;
    const bool weighted = call.y_weights != nullptr;
    const std::byte* copy = call.y + places[k] * call.y_stride;
    // The next row of its expert is mostly the one after it.
    copies_.push_back({copy, weighted ? call.y_weights[places[k]] : 0.0f, weighted,
                       next == row ? nullptr : copy + call.y_stride});
  }
  sum_rows(out, copies_, nullptr, call.format.payload_bytes / item_bytes(call.dtype), call.dtype);
}

// Copies of the received rows [from, to), by (row, lane). Returns how many.
uint32_t Exchange::write_copies(const Call& call, std::byte* out, size_t from, size_t to) {
  const uint32_t K = call.format.topk;
  uint32_t copies = 0;
  for (const int32_t* place = call.positions + from * K; place < call.positions + to * K; ++place) {
    if (*place < 0) continue;
    const std::byte* copy = call.y + *place * call.y_stride;
    copy_row(out + copies * size_t{call.format.row_bytes}, copy, call.format.payload_bytes,
             nullptr);
    ++copies;
  }
  return copies;
}

Status Exchange::send_combine(Call& call, uint64_t epoch, uint32_t round) {
  const size_t row_bytes = call.format.row_bytes;
  const auto pack = [&](std::byte* window, uint32_t source) {
    Header header = make_header(call, epoch);
    if (call.error.ok()) {
      const size_t start = call.row_starts[source];
      const auto [from, to] =
          range_of_round(call, round, call.recv_tokens + start, call.totals[source]);
      header.rows = to - from;
      const bool direct = source == shape_.rank && call.own_rows_direct;
      std::byte* row = window + kHeaderBytes;
      if (call.each_copy) {
        header.rows = direct ? 0 : write_copies(call, row, start + from, start + to);
      } else {
        for (uint32_t i = from; i < to && !direct; ++i, row += row_bytes) {
          write_result(call, row, start + i, start + std::min(i + 1, to - 1));
        }
      }
    }
    seal(header);
    std::memcpy(window, &header, sizeof header);
    return header.rows;
  };
  if (!shape_.hops_node) {
    for (uint32_t r = 0; r < shape_.num_ranks; ++r) {
      Link& link = links_[r];
      if (!link.present || shape_.absent[r]) continue;
      const uint32_t rows = pack(send_region(link, epoch), r);
      if (Status status = push(link, epoch, kHeaderBytes + rows * row_bytes); !status.ok())
        return status;
      stats_.rows_link += rows;
      stats_.bytes_link += static_cast<uint64_t>(rows) * call.format.payload_bytes;
      ++stats_.writes_link;
    }
  }
  // To rank l of my node: the results for source l itself and, with hops="node", for its rails (n,
  // l). Remote nodes first: their forwarders have a way to go.
  const auto store = [&](uint32_t local, uint32_t node) {
    const uint32_t reader = shape_.rank_of[my_node_ * shape_.node_ranks + local];
    const uint32_t source = shape_.rank_of[node * shape_.node_ranks + local];
    const uint32_t index = shape_.rank_of[node * shape_.node_ranks + my_local_];
    if (shape_.absent[reader]) return;
    const uint32_t rows = pack(slot(reader, index, epoch), source);
    stats_.rows_local += rows;
    stats_.bytes_local += static_cast<uint64_t>(rows) * call.format.payload_bytes;
    commit(reader, index, epoch);
  };
  if (shape_.hops_node) {
    for (uint32_t n = 0; n < shape_.num_nodes; ++n) {
      for (uint32_t l = 0; n != my_node_ && l < shape_.node_ranks; ++l) store(l, n);
    }
  }
  for (uint32_t l = 0; l < shape_.node_ranks; ++l) store(l, my_node_);
  return {};
}

}  // namespace moe_comm
