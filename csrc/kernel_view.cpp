// The exchange as kernels see it: where they write and read, and what they wait for. The rules are
// the same as for the CPU's agents (exchange.hpp); kernels/headers.cuh has the rest.
#include "exchange.hpp"

namespace moe_comm {
namespace {
constexpr double kForwarderFirst = 0.5;  // seconds: a forwarder gives up before who waits for it
}

Result<KernelView> Exchange::open_view() {
  KernelView view;
  if (shape_.mask_lost) view.masks = &mask_word(0);
  const uint32_t me = shape_.rank, R = shape_.num_ranks, G = shape_.node_ranks;
  const bool by_node = shape_.hops_node && shape_.num_nodes > 1;
  std::vector<uint32_t> near, linked, nodes;  // ranks of this node; others; their nodes, by_node
  for (uint32_t r = 0; r < R; ++r) {
    if (is_local(r)) near.push_back(r);
    if (!by_node && !is_local(r) && links_[r].present && !shape_.absent[r]) linked.push_back(r);
  }
  for (uint32_t n = 0; by_node && n < shape_.num_nodes; ++n) {
    if (n == my_node_) continue;
    nodes.push_back(n);
    linked.push_back(rail_peer(n));
  }
  const auto lane_of = [&](uint32_t r) {
    return by_node ? static_cast<uint32_t>(lane_of_rank_[r]) : r;
  };
  for (const uint32_t r : linked) view.links.push_back(lane_of(r));
  for (const uint32_t r : near) {
    view.local.push_back(lane_of(r));
    view.segments.push_back((r == me ? segment_ : peers_[r].segment).bytes());
  }

  // --- tables, with the words of each bank
  const auto table = [&](const char* name, bool addresses, auto words_of_bank) {
    KernelView::Table made{name, addresses, {}};
    for (uint64_t bank = 0; bank < kNumBanks; ++bank) words_of_bank(bank, made.words[bank]);
    view.tables.push_back(std::move(made));
  };
  const auto address = [](const auto& what) { return reinterpret_cast<uint64_t>(what); };
  table("out", true, [&](uint64_t bank, auto& words) {
    words.assign(by_node ? num_lanes_ : R, 0);
    for (const uint32_t r : near) words[lane_of(r)] = address(slot(r, me, bank));
    for (const uint32_t r : linked) words[lane_of(r)] = address(send_region(links_[r], bank));
  });
  table("in", true, [&](uint64_t bank, auto& words) {
    for (uint32_t r = 0; r < R; ++r) {
      const bool there = by_node || is_local(r) || (links_[r].present && !shape_.absent[r]);
      words.push_back(there ? address(slot(shape_.rank, r, bank)) : 0);
    }
  });
  table("links", false, [&](uint64_t bank, auto& words) {
    for (const uint32_t r : linked) {
      const Link& link = links_[r];
      words.insert(words.end(), {link.window_channel, link.release_channel,
                                 link.send_offset + offsets_.stride * bank,
                                 link.window_offset + offsets_.stride * bank});
    }
  });
  table("commits", true, [&](uint64_t bank, auto& words) {
    for (const uint32_t r : near) words.push_back(address(&commit_word(peers_[r].base, bank, me)));
  });
  table("releases", true, [&](uint64_t bank, auto& words) {
    for (const uint32_t r : near) words.push_back(address(&release_word(peers_[r].base, bank, me)));
  });
  if (by_node) {
    const auto index_of = [&](uint32_t node, uint32_t local) {
      return shape_.rank_of[node * G + local];
    };
    // This rank's results for rank (n, l) go to rank l of the node, remote nodes first.
    for (const uint32_t n : nodes)
      for (uint32_t l = 0; l < G; ++l) view.results.push_back(index_of(n, l));
    for (uint32_t l = 0; l < G; ++l) view.results.push_back(index_of(my_node_, l));
    const auto reader = [&](uint32_t source) {
      return index_of(my_node_, shape_.local_of[source]);
    };
    const auto index = [&](uint32_t source) { return index_of(shape_.node_of[source], my_local_); };
    table("results", true, [&](uint64_t bank, auto& words) {
      for (uint32_t r = 0; r < R; ++r) words.push_back(address(slot(reader(r), index(r), bank)));
    });
    table("result_commits", true, [&](uint64_t bank, auto& words) {
      for (const uint32_t r : view.results)
        words.push_back(address(&commit_word(peers_[reader(r)].base, bank, index(r))));
    });
    table("link_in", true, [&](uint64_t bank, auto& words) {
      for (const uint32_t n : nodes) words.push_back(address(link_window(n, bank)));
    });
    table("passed", true, [&](uint64_t bank, auto& words) {
      for (const uint32_t source : linked)
        for (const uint32_t r : near) words.push_back(address(slot(r, source, bank)));
    });
    table("passed_commits", true, [&](uint64_t bank, auto& words) {
      for (const uint32_t source : linked)
        for (const uint32_t r : near)
          words.push_back(address(&commit_word(peers_[r].base, bank, source)));
    });
    table("gathered", true, [&](uint64_t bank, auto& words) {
      for (const uint32_t n : nodes)
        for (uint32_t g = 0; g < G; ++g)
          words.push_back(address(slot(shape_.rank, index_of(n, g), bank)));
    });
    table("sends", true, [&](uint64_t bank, auto& words) {
      for (const uint32_t r : linked) words.push_back(address(send_region(links_[r], bank)));
    });
    table("sums", true, [&](uint64_t bank, auto& words) {
      for (uint32_t n = 0; n < shape_.num_nodes; ++n) {
        for (uint32_t g = 0; n == my_node_ && g < G; ++g)
          words.push_back(address(slot(shape_.rank, index_of(n, g), bank)));
        if (n != my_node_) words.push_back(address(link_window(n, bank)));
      }
    });
  }

  // --- waits
  const std::string who = "rank " + std::to_string(me);
  const auto source_of = [&](uint32_t r) {
    const bool link = !is_local(r);
    WaitSource source{};
    source.who = name_of(r);
    source.rank = r;
    source.peer = link ? links_[r].engine_peer : ~0u;
    source.beat = link ? reinterpret_cast<Counter*>(base_ + offsets_.beats + 16ull * r)
                       : &beat_word(peers_[r].base);
    source.without_us = &masked_by(r);
    source.process = link ? nullptr : &peers_[r].process;
    return source;
  };
  // For `writer` to have written commit word `index`.
  const auto add_commit = [&](Wait& wait, uint32_t writer, uint32_t index, double extra_s = 0) {
    if (writer == me) return;  // its own kernels come one after the other
    WaitSource source = source_of(writer);
    source.words[0] = &commit_word(base_, 0, index);
    source.words[1] = &commit_word(base_, 1, index);
    source.extra_s = extra_s;
    source.time_idx = index < R ? index : writer;
    wait.sources.push_back(std::move(source));
  };
  Wait credits{"", who, {}, {}, "release of its bank"};
  for (const auto& ranks : {near, linked}) {
    for (const uint32_t r : ranks) {
      if (r == me) continue;
      WaitSource source = source_of(r);
      source.words[0] = &release_word(base_, 0, r);
      source.words[1] = &release_word(base_, 1, r);
      credits.sources.push_back(std::move(source));
    }
  }
  for (const uint32_t r : linked) credits.channels.push_back(links_[r].window_channel);
  for (const uint32_t kind : {kDispatch, kCombine}) {
    Wait rows{"", who, {}, {}, "header"}, forward{"", who, {}, {}, "rows by the link"};
    for (uint32_t r = 0; r < R; ++r) {
      if (is_local(r)) add_commit(rows, r, r);
      if (is_local(r) || (!by_node && !links_[r].present) || shape_.absent[r]) continue;
      if (!by_node) add_commit(rows, r, r);
      if (by_node && kind == kDispatch)
        add_commit(rows, shape_.rank_of[my_node_ * G + shape_.local_of[r]], r, kForwarderFirst);
    }
    for (const uint32_t n : nodes) {
      if (kind == kDispatch) {
        add_commit(forward, rail_peer(n), R + n);
        continue;
      }
      forward.lacks = "results";
      add_commit(rows, rail_peer(n), R + n, kForwarderFirst);
      rows.sources.back().lacks = "sums of its node";
      for (uint32_t g = 0; g < G; ++g)
        add_commit(forward, shape_.rank_of[my_node_ * G + g], shape_.rank_of[n * G + g]);
    }
    struct Opened {
      const Wait& wait;
      std::array<uint32_t, 3>& numbers;
      bool timed;
    };
    for (const auto& [wait, numbers, timed] :
         {Opened{credits, view.credits, false}, Opened{rows, view.rows, false},
          Opened{forward, view.forward, false}, Opened{rows, view.timed_rows, true},
          Opened{forward, view.timed_forward, kind == kDispatch}}) {
      Wait named = wait;
      named.timed = timed;
      named.masks = view.masks;
      named.masked = [this](uint32_t rank) { tell_masked(rank); };
      named.what = kind == kDispatch ? "dispatch" : "combine";
      named.failed = [this](const Status& status, uint64_t blamed) { fail_here(status, blamed); };
      auto opened = engine_.proxy().open_wait(std::move(named));
      if (!opened.ok()) return opened.status();
      numbers[kind] = opened.value();
      waits_.push_back(opened.value());
    }
  }
  return view;
}

// Others learn of it from the heartbeat, whatever the host does meanwhile.
void Exchange::fail_here(const Status& status, uint64_t blamed) {
  if (blamed != 0 && blamed <= shape_.num_ranks) blame(static_cast<uint32_t>(blamed - 1));
  fault_.raise(status);
  say_failed();
}

Header Exchange::damaged_like(const Call& call, uint32_t writer) const {
  Header header = verdict(call, 0, writer, damaged(writer));
  header.origin = writer;
  return header;
}

Status Exchange::judge(const Call& call, const Header& header, uint64_t epoch, uint32_t source) {
  Call judged;
  judged.kind = call.kind;
  judged.agreed = call.agreed;
  check_header(judged, header, epoch, source);
  if (!judged.failure.ok()) return judged.failure;
  blame(source);
  return damaged(source);
}

Status Exchange::refusal(ExchangeKind kind, uint64_t epoch, std::span<const Header> headers) {
  Call call;
  call.kind = kind;
  call.error = {Code::kInvalid, "refused here, too"};  // its format is not known
  const std::vector<bool> absent_now = absent();
  for (uint32_t r = 0; r < shape_.num_ranks; ++r) {
    if (r == shape_.rank || absent_now[r]) continue;
    const Header header = headers.empty()
                              ? *reinterpret_cast<const Header*>(slot(shape_.rank, r, epoch))
                              : headers[r];
    if (!is_sealed(header) || header.epoch != epoch || header.status != kHeaderError) continue;
    check_header(call, header, epoch, r);
    return call.failure;
  }
  return {};
}

}  // namespace moe_comm
