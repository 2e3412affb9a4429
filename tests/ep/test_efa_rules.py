"""Dispatch and combine between nodes over fabric:efa, by EFA's rules (tests/cpp/efa_rules.cpp)."""

import os

import pytest
from cases import check_dispatched, dispatch, expected, make_case, node_list, same
from efa_rules import sysfs_with_nics

import moe_comm
from moe_comm import reference

NUM_RANKS, RANKS_PER_NODE = 4, 2


def _round_trips(rank, group, hops, calls, nics=()):
    if nics:
        os.environ["EFA_RULES_NICS"] = ",".join(nics)
    buffer = moe_comm.Buffer(
        group, hidden=64, topk=3, num_experts=7, hops=hops, ranks_per_node=RANKS_PER_NODE,
        transport="fabric:efa", timeout_s=30.0,
    )  # fmt: skip
    for call in range(calls):  # other bytes in each: what is left of an earlier call is wrong
        case = make_case(NUM_RANKS, seed=call, tokens=[40] * NUM_RANKS, layout="expert")
        want = expected(case)
        ys = [(x.float() * 1.5 + 0.25).to(x.dtype) for x in want.x]
        back = reference.combine(
            ys, want.bookkeeping, weights=want.topk_weights,
            node_of=node_list(NUM_RANKS, RANKS_PER_NODE), hops=hops,
        )  # fmt: skip
        got = dispatch(buffer, case, rank)
        check_dispatched(got, want, rank)
        y = buffer.combine(ys[rank], got.handle, weights=got.topk_weights)
        assert same(y, back.x[rank])
    transport = buffer.engine.transport
    buffer.close()
    return transport


@pytest.mark.parametrize("hops", ["node", "rank"])
def test_round_trips(run_ranks, efa_rules, monkeypatch, hops):
    monkeypatch.setenv("MOE_COMM_LIBFABRIC", efa_rules)
    monkeypatch.setenv("MOE_COMM_SHARD_BYTES", "256")  # several writes for each message
    run_ranks(_round_trips, NUM_RANKS, hops, 6)


def test_ranks_divide_the_nics_of_their_node(run_ranks, efa_rules, monkeypatch, tmp_path):
    """Eight NICs, two pretended nodes of two ranks that name none: four each, to each node all of them."""
    nics = [f"rdmap{i}s6" for i in range(8)]
    monkeypatch.setenv("MOE_COMM_LIBFABRIC", efa_rules)
    monkeypatch.setenv("MOE_COMM_SYSFS", sysfs_with_nics(tmp_path / "sys", *nics))
    taken = run_ranks(_round_trips, NUM_RANKS, "node", 3, nics)
    halves = ["+".join(f"fabric:efa@{nic}-rdm" for nic in half) for half in (nics[:4], nics[4:])]
    assert [transport.removesuffix("+chaos") for transport in taken] == halves * 2
