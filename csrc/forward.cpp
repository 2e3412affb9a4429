// The forwarder: a native thread that passes rows on inside its node and adds its node's results,
// in epoch order.
//
// It never depends on the user's hook or wait. When a source is missing it says so in that source's
// windows, so that every reader behind it blames the right rank.
#include <pthread.h>

#include <cstring>

#include "exchange.hpp"

namespace moe_comm {

void Exchange::forwarder() noexcept {
  pthread_setname_np(pthread_self(), "moe_comm:forward");
  while (true) {
    Work work;
    {
      std::unique_lock lock(work_mutex_);
      work_changed_.wait(lock, [this] { return stop_ || !work_.empty(); });
      if (stop_ && (work_.empty() || fault_.raised())) return;
      work = std::move(work_.front());
      work_.pop_front();
    }
    Call& call = *work.call;
    Status status = call.kind == kDispatch ? forward_dispatch(call, work.epoch, work.round)
                                           : forward_combine(call, work.epoch, work.round);
    if (!status.ok()) fault_.raise(status);
    word_at(forwarded_until_).store(work.epoch, std::memory_order_release);
    ring(bell(base_));
  }
}

Status Exchange::forward_dispatch(Call& call, uint64_t epoch, uint32_t round) {
  for (uint32_t step = 1; step < shape_.num_nodes; ++step) {
    const uint32_t node = (my_node_ + step) % shape_.num_nodes;
    const Waited waited{&call, epoch, rail_peer(node), "rows by the link"};
    pass_on(call, node, epoch, round,
            wait(commit_word(base_, epoch, shape_.num_ranks + node), epoch, waited));
  }
  return {};
}

// One rail peer's rows to the ranks of my node that hold one of their experts.
void Exchange::pass_on(Call& call, uint32_t node, uint64_t epoch, uint32_t round,
                       const Status& arrival) {
  const uint32_t source = rail_peer(node), G = shape_.node_ranks, K = call.format.topk;
  const uint32_t L = num_local_experts(call);
  const std::byte* window = link_window(node, epoch);
  Header header{};
  Status found = arrival;
  bool same_call = false;
  if (found.ok()) {
    header = *reinterpret_cast<const Header*>(window);
    same_call = header.kind == kDispatch && agrees(header.agreed, call.agreed);
    if (!is_sealed(header) ||
        (same_call && !is_sealed(header, {window + kHeaderBytes, counts_bytes(call, true)}))) {
      found = damaged(source);
      blame(source);
    }
  }
  if (!found.ok()) header = verdict(call, epoch, source, found);
  const bool readable = header.status == kHeaderOk && call.error.ok() && same_call;
  std::vector<uint32_t> here(G, 0);  // rows of this round for each local rank
  if (readable) {
    const std::byte* rows = window + kHeaderBytes + counts_bytes(call, true);
    const size_t row_bytes = call.format.row_bytes;
    uint32_t from = 0;
    std::vector<int32_t> starts(G, -1);
    if (call.cached) {
      const auto& tokens = call.forward_tokens[node];
      from = range_of_round(call, round, tokens.data(), static_cast<uint32_t>(tokens.size())).first;
    }
    for (uint32_t i = 0; i < header.rows; ++i, rows += row_bytes) {
      int32_t targets[512];
      std::vector<int32_t> many;
      int32_t* to = targets;
      if (G > 512) many.resize(G), to = many.data();
      if (call.cached) {
        std::memcpy(to, call.forward_rows[node].data() + (static_cast<size_t>(from) + i) * G,
                    G * sizeof(int32_t));
      } else {
        std::fill_n(to, G, -1);
        const auto* ids = reinterpret_cast<const int32_t*>(rows + call.format.ids_at);
        for (uint32_t k = 0; k < K; ++k) {
          if (ids[k] < 0) continue;
          const uint32_t owner = static_cast<uint32_t>(ids[k]) / L;
          if (!is_local(owner) || to[shape_.local_of[owner]] >= 0) continue;
          const uint32_t g = shape_.local_of[owner];
          to[g] = static_cast<int32_t>(call.forwarded_rows[node * G + g]++);
        }
        int32_t token;
        std::memcpy(&token, rows + call.format.token_at, sizeof token);
        call.forward_tokens[node].push_back(token);
        call.forward_rows[node].insert(call.forward_rows[node].end(), to, to + G);
      }
      for (uint32_t g = 0; g < G; ++g) {
        if (to[g] < 0) continue;
        if (starts[g] < 0) starts[g] = to[g];
        std::byte* window_of = slot(shape_.rank_of[my_node_ * G + g], source, epoch);
        copy_row(window_of + kHeaderBytes + counts_bytes(call, false) +
                     static_cast<size_t>(to[g] - starts[g]) * row_bytes,
                 rows, row_bytes, i + 1 < header.rows ? rows + row_bytes : nullptr);
        ++here[g];
      }
    }
  }
  for (uint32_t g = 0; g < G; ++g) {
    const uint32_t reader = shape_.rank_of[my_node_ * G + g];
    std::byte* window_of = slot(reader, source, epoch);
    Header passed = header;
    passed.rows = here[g];
    passed.total_rows = 0;
    std::span<std::byte> behind;
    if (readable && round == 0 && !call.cached) {
      const auto* counts = reinterpret_cast<const uint32_t*>(window + kHeaderBytes) + g * (1 + L);
      passed.total_rows = counts[0];
      std::memcpy(window_of + kHeaderBytes, counts + 1, L * sizeof(uint32_t));
      behind = {window_of + kHeaderBytes, counts_bytes(call, false)};
    }
    seal(passed, behind);
    std::memcpy(window_of, &passed, sizeof passed);
    commit(reader, source, epoch);
  }
}

// My node's results for each rail peer's tokens: summed over the ranks of my node (level 1), one
// row per token.
Status Exchange::forward_combine(Call& call, uint64_t epoch, uint32_t round) {
  const uint32_t G = shape_.node_ranks, K = call.format.topk;
  const size_t row_bytes = call.format.row_bytes;
  const size_t num_items = call.format.payload_bytes / item_bytes(call.dtype);
  for (uint32_t step = 1; step < shape_.num_nodes; ++step) {
    const uint32_t node = (my_node_ + step) % shape_.num_nodes;
    const uint32_t source = rail_peer(node);
    Header header = make_header(call, epoch);
    bool readable = call.error.ok();
    std::vector<const std::byte*> windows(G);
    for (uint32_t g = 0; g < G; ++g) {
      const uint32_t writer = shape_.rank_of[my_node_ * G + g];
      const uint32_t index = shape_.rank_of[node * G + g];
      const Waited waited{&call, epoch, writer, "results"};
      Status status = wait(commit_word(base_, epoch, index), epoch, waited);
      windows[g] = slot(shape_.rank, index, epoch);
      if (status.ok() && !is_sealed(*reinterpret_cast<const Header*>(windows[g]))) {
        blame(writer);
        status = damaged(writer);
      }
      const Header& from = *reinterpret_cast<const Header*>(windows[g]);
      const uint32_t rounds = std::max(header.rounds, status.ok() ? from.rounds : 0);
      if (header.status == kHeaderOk) {
        if (!status.ok()) {
          header = verdict(call, epoch, writer, status);
        } else if (from.status != kHeaderOk) {
          header = from;  // its text travels on as it is
        } else if (from.kind != kCombine ||
                   std::memcmp(&from.agreed, &call.agreed, sizeof(Agreed)) != 0) {
          header = from;
          header.status = kHeaderDisagrees;
          const Disagreed mine{shape_.rank, kCombine, call.agreed};
          std::memset(header.text, 0, sizeof header.text);
          std::memcpy(header.text, &mine, sizeof mine);
        }
      }
      header.rounds = rounds;
      readable = readable && header.status == kHeaderOk && status.ok() &&
                 from.status == kHeaderOk && from.kind == kCombine &&
                 std::memcmp(&from.agreed, &call.agreed, sizeof(Agreed)) == 0;
    }
    Link& link = links_[source];
    std::byte* out = send_region(link, epoch);
    header.rows = 0;
    if (readable) {
      const auto& tokens = call.forward_tokens[node];
      const auto [from, to] =
          range_of_round(call, round, tokens.data(), static_cast<uint32_t>(tokens.size()));
      std::vector<int32_t> starts(G, -1);
      std::vector<Term> terms;
      std::vector<const float*> columns;
      for (uint32_t i = from; i < to; ++i) {
        const int32_t* rows = call.forward_rows[node].data() + static_cast<size_t>(i) * G;
        std::byte* sum = out + kHeaderBytes + static_cast<size_t>(i - from) * row_bytes;
        terms.clear(), columns.clear();
        for (uint32_t g = 0; g < G; ++g) {
          if (rows[g] < 0) continue;
          if (starts[g] < 0) starts[g] = rows[g];
          const std::byte* row =
              windows[g] + kHeaderBytes + static_cast<size_t>(rows[g] - starts[g]) * row_bytes;
          terms.push_back({row, 0, false, i + 1 < to ? row + row_bytes : nullptr});
          columns.push_back(reinterpret_cast<const float*>(row + call.format.weights_at));
        }
        sum_rows(sum, terms, nullptr, num_items, call.dtype);
        if (call.format.weights_at)
          sum_columns(reinterpret_cast<float*>(sum + call.format.weights_at), columns, K);
      }
      header.rows = to - from;
    }
    seal(header);
    std::memcpy(out, &header, sizeof header);
    const size_t num_bytes = kHeaderBytes + header.rows * row_bytes;
    if (Status status = push(link, epoch, num_bytes); !status.ok()) return status;
    stats_.rows_link += header.rows;
    stats_.bytes_link += static_cast<uint64_t>(header.rows) * call.format.payload_bytes;
    ++stats_.writes_link;
  }
  return {};
}

}  // namespace moe_comm
