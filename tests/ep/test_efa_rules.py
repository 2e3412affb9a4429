"""Dispatch and combine between nodes over fabric:efa, by EFA's rules (tests/cpp/efa_rules.cpp)."""

import pytest
from cases import check_dispatched, dispatch, expected, make_case, node_list, same

import moe_comm
from moe_comm import reference

NUM_RANKS, RANKS_PER_NODE = 4, 2


def _round_trips(rank, group, hops, calls):
    case = make_case(NUM_RANKS, layout="expert")
    want = expected(case)
    ys = [(x.float() * 1.5 + 0.25).to(x.dtype) for x in want.x]
    back = reference.combine(
        ys, want.bookkeeping, weights=want.topk_weights,
        node_of=node_list(NUM_RANKS, RANKS_PER_NODE), hops=hops,
    )  # fmt: skip
    buffer = moe_comm.Buffer(
        group, hidden=64, topk=3, num_experts=7, hops=hops, ranks_per_node=RANKS_PER_NODE,
        transport="fabric:efa", timeout_s=30.0,
    )  # fmt: skip
    for _ in range(calls):
        got = dispatch(buffer, case, rank)
        check_dispatched(got, want, rank)
        y = buffer.combine(ys[rank], got.handle, weights=got.topk_weights)
        assert same(y, back.x[rank])
    buffer.close()


@pytest.mark.parametrize("hops", ["node", "rank"])
def test_round_trips(run_ranks, efa_rules, monkeypatch, hops):
    monkeypatch.setenv("MOE_COMM_LIBFABRIC", efa_rules)
    monkeypatch.setenv("MOE_COMM_SHARD_BYTES", "256")  # several writes for each message
    run_ranks(_round_trips, NUM_RANKS, hops, 6)
