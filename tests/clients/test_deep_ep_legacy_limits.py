"""Where DeepEP has limits and this has none: ranks, nodes, hidden sizes, top-k, experts, tokens. And lost peers."""

import os
import signal

import pytest
import torch
from deep_ep_oracle import combined, dispatched, make_case, padded_rows, same, weighted_sum

import moe_comm
from moe_comm import deep_ep

SHAPES = [
    # tokens of each rank, hidden, top-k, experts
    ([5, 0, 8], 8, 1, 1),  # one expert for three ranks
    ([1300, 2, 0], 8, 2, 10),  # more than 1024 tokens; the last rank owns fewer experts
    ([3, 4, 5], 200, 64, 100),  # top-k 64; a hidden size of no round number
    ([0, 0, 0], 64, 3, 6),  # nobody has anything
    ([2, 3, 1], 7168, 8, 700),  # 234 experts on a rank
]
RANKS = [(1, 0), (3, 0), (3, 1), (6, 3)]


@pytest.mark.parametrize("num_ranks, ranks_per_node", RANKS)
def test_normal(run_ranks, monkeypatch, num_ranks, ranks_per_node):
    if ranks_per_node:
        monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", str(ranks_per_node))
    node_of = [r // (ranks_per_node or num_ranks) for r in range(num_ranks)]
    run_ranks(check_normal, num_ranks, num_ranks, node_of)


def cases_for(num_ranks):
    for seed, (tokens, hidden, topk, experts) in enumerate(SHAPES):
        yield make_case(
            (tokens * 2)[:num_ranks], seed=seed, hidden=hidden, topk=topk, num_experts=experts
        )


def check_normal(rank, group, num_ranks, node_of):
    buffer = deep_ep.Buffer(group)  # an EPGroup will do, too
    for case in cases_for(num_ranks):
        want = dispatched(case)
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(
            case.idx[rank], case.num_experts
        )
        x, idx, weights, counts, handle, _ = buffer.dispatch(
            case.xs[rank], None, per_rank, per_node, in_rank, per_expert, case.idx[rank], case.weights[rank]
        )  # fmt: skip
        assert same(x, want.x[rank]) and same(idx, want.topk_idx[rank])
        assert same(weights, want.topk_weights[rank])
        assert counts == want.tokens_per_expert[rank].tolist()
        got, columns, _ = buffer.combine(x, handle, topk_weights=weights)
        assert same(got, combined(want.x, want.bookkeeping, rank, node_of).bfloat16())
        assert same(columns, torch.where(case.idx[rank] < 0, 0, case.weights[rank]))
        x, idx, weights, counts, handle, _ = buffer.dispatch(  # without top-k
            case.xs[rank], None, per_rank, per_node, in_rank, per_expert
        )
        assert same(x, want.x[rank]) and counts == want.tokens_per_expert[rank].tolist()


@pytest.mark.parametrize("num_ranks, ranks_per_node", RANKS)
def test_low_latency(run_ranks, monkeypatch, num_ranks, ranks_per_node):
    if ranks_per_node:
        monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", str(ranks_per_node))
    run_ranks(check_low_latency, num_ranks, num_ranks)


def check_low_latency(rank, group, num_ranks):
    buffer = deep_ep.Buffer(group, low_latency_mode=1)  # ints will do for bools
    for case in cases_for(num_ranks):
        max_tokens = max(1, *map(len, case.xs), 0)
        num_places = num_ranks * max_tokens
        wants = [padded_rows(case, r, num_places) for r in range(num_ranks)]
        packed, count, handle, _, hook = buffer.low_latency_dispatch(
            case.xs[rank], case.idx[rank], max_tokens, case.num_experts, use_fp8=0, return_recv_hook=1
        )  # fmt: skip
        hook()
        assert count.tolist() == [len(found) for found in wants[rank]]
        ys, places = [], {}
        for r in range(num_ranks):
            y = torch.zeros(len(wants[r]), num_places, case.xs[0].shape[1]).bfloat16()
            for e, found in zip(case.owned(r), wants[r], strict=True):
                for i, (source, token, row) in enumerate(found):
                    y[e - case.owned(r)[0], i] = row
                    places[e, source, token] = i
            ys.append(y)
        for e, found in enumerate(wants[rank]):  # what lies behind is undefined
            assert same(packed[e, : len(found)], ys[rank][e, : len(found)])
        got, _, hook = buffer.low_latency_combine(
            packed, case.idx[rank], case.weights[rank], handle, return_recv_hook=True
        )
        hook()
        assert same(got, weighted_sum(case, rank, ys, places))


def check_killed(rank, group, mode):
    case = make_case([4, 4, 4], num_experts=6, hidden=128)
    buffer = deep_ep.Buffer(group, low_latency_mode=True)

    def call(hook_wanted):
        if mode == "normal":
            layout = buffer.get_dispatch_layout(case.idx[rank], 6)
            names = (
                "num_tokens_per_rank",
                "num_tokens_per_rdma_rank",
                "num_tokens_per_expert",
                "is_token_in_rank",
            )
            given = dict(zip(names, layout[:4], strict=True))
            buffer.dispatch(
                case.xs[rank], topk_idx=case.idx[rank], topk_weights=case.weights[rank], **given
            )
            return None
        return buffer.low_latency_dispatch(
            case.xs[rank], case.idx[rank], 4, 6, use_fp8=False, return_recv_hook=hook_wanted
        )[4]

    call(False)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises((moe_comm.PeerLost, moe_comm.PeerTimeout)) as caught:
        hook = call(mode == "hook")
        if hook:
            hook()
    return str(caught.value)


@pytest.mark.parametrize("mode", ["normal", "low latency", "hook"])
def test_a_killed_peer_is_named(run_ranks, monkeypatch, mode):
    monkeypatch.setenv("MOE_COMM_SILENCE_S", "2")
    *said, none = run_ranks(check_killed, 3, mode, may_die=(2,))
    assert none is None
    assert any("rank 2" in text for text in said)
