"""A Buffer of kernels, run by threads of the host in several processes: over the engine's proxies and real transports.

The whole suites of tests/ep run over it, too: `pytest tests/ep --through kernels`.
"""

import sys
from pathlib import Path

import pytest
import torch
from host_device import run_on_host

import moe_comm
from moe_comm import ArgumentError, _engine, reference

sys.path.append(str(Path(__file__).resolve().parents[1] / "ep"))
from cases import check_dispatched, dispatch, expected, make_case, node_list, same

FIRSTS = {"plain": 2, "16 bits": 2**16 - 8, "48 bits": 2**48 - 8, "64 bits": 2**64 - 8}
SIZES = {"hidden": 64, "topk": 3, "num_experts": 8}
CALLS = 6


def why_not(name):
    for report in _engine.transports():
        if report["name"] == name:
            return "" if report["available"] else report["reason"]
    return f"{name} was not built in"


@pytest.fixture(params=["shm", "fabric:tcp;ofi_rxm"])
def transport(request):
    reason = why_not(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def _calls(rank, group, library, transport, layout, ranks_per_node):
    """Dispatches and combines of cases of all seeds, the last a dispatch with the handle of the first."""
    run_on_host(library)
    num_ranks = group.num_ranks
    cases = [make_case(num_ranks, layout=layout, seed=s, tokens=9) for s in range(CALLS)]
    interface = "lo" if transport.startswith("fabric:tcp") else None
    with moe_comm.Buffer(
        group, hops="rank", device="cpu", max_tokens=10, transport=transport, interface=interface,
        ranks_per_node=ranks_per_node, timeout_s=20, **SIZES,
    ) as buffer:  # fmt: skip
        for case in cases:
            want = expected(case)
            got = dispatch(buffer, case, rank)
            check_dispatched(got, want, rank)
            ys = [(x.float() * 1.5 + rank).to(x.dtype) for rank, x in enumerate(want.x)]
            weights = None if layout == "rank" else want.topk_weights
            columns = want.topk_weights
            back = reference.combine(
                ys, want.bookkeeping, weights=weights, topk_weights=columns,
                node_of=node_list(num_ranks, ranks_per_node), hops="rank",
            )  # fmt: skip
            y, summed = buffer.combine(
                ys[rank], got.handle, weights=None if weights is None else weights[rank], topk_weights=columns[rank]
            )  # fmt: skip
            assert same(y, back.x[rank]) and same(summed, back.topk_weights[rank])
            again = buffer.dispatch(case.xs[rank] * 2, handle=got.handle, layout=layout)
            assert same(again.x, got.x * 2)
    return buffer.engine.transport, buffer.kernels.num_links, buffer.kernels.ring.stats()


def check(results):
    for _, num_links, stats in results:
        calls = 3 * CALLS
        assert stats["commands"] == calls * (2 * num_links + 2)  # rows, releases, two arms
        assert stats["armed"] == stats["ended"] == 2 * calls and stats["failed"] == 0


@pytest.mark.parametrize("first", FIRSTS.values(), ids=FIRSTS)
@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
def test_round_trips(run_ranks, library, transport, layout, first, monkeypatch):
    monkeypatch.setenv("MOE_COMM_FIRST_EPOCH", str(first))
    check(run_ranks(_calls, 3, library._name, transport, layout, 1))


@pytest.mark.parametrize("seed", [1, 2])
def test_shaken(run_ranks, library, transport, seed, monkeypatch):
    """Writes late, cut and out of order (chaos)."""
    monkeypatch.setenv("MOE_COMM_CHAOS_SEED", str(seed))
    monkeypatch.setenv("MOE_COMM_SHARD_BYTES", "256")
    check(run_ranks(_calls, 4, library._name, transport, "expert", 2))


def test_by_efas_rules(run_ranks, library, efa_rules, monkeypatch):
    monkeypatch.setenv("MOE_COMM_LIBFABRIC", efa_rules)
    results = run_ranks(_calls, 3, library._name, "fabric:efa", "expert", 1)
    check(results)
    assert all("efa" in name for name, _, _ in results)


# --- what it cannot do ---------------------------------------------------------------------------


def _refused(rank, group, library):
    run_on_host(library)
    for options, text in (
        (
            {"ranks_per_node": 1},
            'device: expected None with mask_lost, or with hops="node" between nodes',
        ),
        ({"hops": "rank", "mask_lost": True}, "device: expected None with mask_lost"),
        ({"max_tokens": None}, "device: expected None without max_tokens"),
    ):
        with pytest.raises(ArgumentError, match=text):
            moe_comm.Buffer(group, device="cpu", **{"max_tokens": 8, **SIZES, **options})
    with pytest.raises(ArgumentError, match="device: expected cuda or cuda:N, got 'gpus'"):
        moe_comm.Buffer(group, device="gpus", **SIZES)
    with moe_comm.Buffer(group, device="cpu", max_tokens=8, **SIZES) as buffer:
        case = make_case(2, tokens=[5, 3], num_experts=8)
        got = dispatch(buffer, case, rank)
        with pytest.raises(ArgumentError, match="wait_ns: expected None on cpu"):
            buffer.combine(got.x, got.handle, wait_ns=torch.zeros(2, dtype=torch.int64))
        wide = torch.zeros(8, 512, dtype=torch.bfloat16)
        with pytest.raises(ArgumentError, match=r"x: expected at most . tokens of such rows"):
            buffer.dispatch(wide, case.idx[rank].new_zeros(8, 1), num_experts=8)
        check_dispatched(dispatch(buffer, case, rank), expected(case), rank)


def test_refused(run_ranks, library):
    run_ranks(_refused, 2, library._name)
