// The exchange as kernels see it: where they write and read, and what they wait for. The rules are
// the same as for the CPU's agents (exchange.hpp), pairs only; kernels/headers.cuh has the rest.
#include "exchange.hpp"

namespace moe_comm {

Result<KernelView> Exchange::open_view() {
  if ((shape_.hops_node && shape_.num_nodes > 1) || shape_.mask_lost) {
    return Status(Code::kInvalid, "kernels: expected hops=\"rank\" or one node, and no mask_lost");
  }
  KernelView view;
  const uint32_t me = shape_.rank;
  Wait credits{"", "rank " + std::to_string(me), {}, {}, "release of its bank"};
  Wait rows{"", credits.who, {}, {}, "header"};
  for (uint32_t r = 0; r < shape_.num_ranks; ++r) {
    const bool local = is_local(r), linked = links_[r].present && !shape_.absent[r];
    if (local) {
      view.local.push_back(r);
      const SharedSegment& segment = r == me ? segment_ : peers_[r].segment;
      view.segments.push_back(segment.bytes());
    } else if (linked) {
      view.links.push_back(r);
      credits.channels.push_back(links_[r].window_channel);
    }
    for (uint64_t bank = 0; bank < kNumBanks; ++bank) {
      KernelView::Bank& b = view.banks[bank];
      b.in.push_back(local || linked ? slot(base_, r, bank) : nullptr);
      if (local) {
        b.out.push_back(slot(peers_[r].base, me, bank));
        b.commits.push_back(&commit_word(peers_[r].base, bank, me));
        b.releases.push_back(&release_word(peers_[r].base, bank, me));
      } else if (linked) {
        const Link& link = links_[r];
        b.out.push_back(send_region(link, bank));
        b.links.push_back({link.window_channel, link.release_channel,
                           link.send_offset + offsets_.stride * bank,
                           link.window_offset + offsets_.stride * bank});
      } else {
        b.out.push_back(nullptr);
      }
    }
    if (r == me || (!local && !linked)) continue;  // its own kernels come one after the other
    WaitSource source{};
    source.who = name_of(r);
    source.rank = r;
    source.peer = linked ? links_[r].engine_peer : ~0u;
    source.beat = local ? &beat_word(peers_[r].base)
                        : reinterpret_cast<Counter*>(base_ + offsets_.beats + 16ull * r);
    source.process = local ? &peers_[r].process : nullptr;
    const auto add = [&](Wait& wait, Counter& even, Counter& odd) {
      source.words[0] = &even;
      source.words[1] = &odd;
      wait.sources.push_back(source);
    };
    add(rows, commit_word(base_, 0, r), commit_word(base_, 1, r));
    add(credits, release_word(base_, 0, r), release_word(base_, 1, r));
  }
  for (const uint32_t kind : {kDispatch, kCombine}) {
    for (auto [wait, numbers] :
         {std::pair{&credits, &view.credits}, std::pair{&rows, &view.rows}}) {
      Wait named = *wait;
      named.what = kind == kDispatch ? "dispatch" : "combine";
      auto opened = engine_.proxy().open_wait(std::move(named));
      if (!opened.ok()) return opened.status();
      (*numbers)[kind] = opened.value();
      waits_.push_back(opened.value());
    }
  }
  return view;
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

}  // namespace moe_comm
