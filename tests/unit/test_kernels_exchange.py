"""The steps of kernels/, composed into whole exchanges (simulated_exchange.py), against reference.py, bit for bit: a
device's path can be built from them. And the C++ loops that cannot be called alone, forward and unpack, against the
twins through the handles of real Buffers.
"""

import pytest
import torch
from simulated_exchange import Combine, Dispatch, Inputs, Ranks

from moe_comm import reference

NODES = {
    "one": [[0]],
    "node of 3": [[0, 1, 2]],
    "2 x 2": [[0, 1], [2, 3]],
    "2 x 2 interleaved": [[0, 2], [1, 3]],
    "3 x 2 shuffled": [[1, 4], [0, 5], [2, 3]],
    "4 x 1": [[0], [1], [2], [3]],
}


def make_inputs(
    num_tokens,
    *,
    hidden=24,
    topk=3,
    num_experts=7,
    dtype=torch.bfloat16,
    scales=False,
    seed=0,
    **layout,
):
    g = torch.Generator().manual_seed(seed)
    out = Inputs([], [] if scales else None, [], [], num_experts, **layout)
    for t in num_tokens:
        out.xs.append(torch.randn(t, hidden, generator=g).to(dtype))
        ids = torch.rand(t, num_experts, generator=g).argsort(1)[:, :topk]
        out.idx.append(torch.where(torch.rand(ids.shape, generator=g) < 0.15, -1, ids))
        out.weights.append(torch.rand(ids.shape, generator=g))
        if scales:
            out.scales.append(torch.rand(hidden // 8, t, generator=g).t())  # strides (1, T)
    return out


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    )


def round_trip(nodes, hops, inputs, capacity):
    """One dispatch and its combine; every output equals the reference's. Returns their numbers of rounds."""
    ranks = Ranks(nodes, hops, inputs.row_format().row_bytes, capacity, inputs.num_experts)
    got = Dispatch(ranks, inputs, first_epoch=62)
    want = reference.dispatch(
        inputs.xs, inputs.idx, inputs.weights, inputs.num_experts, inputs.layout, inputs.alignment, inputs.capacity,
        inputs.scales,
    )  # fmt: skip
    for r in ranks.all:
        assert same(got.x[r].view_as(want.x[r]), want.x[r])
        assert same(got.weights[r].view_as(want.topk_weights[r]), want.topk_weights[r])
        assert torch.equal(got.counts[r], want.tokens_per_expert[r])
        if want.topk_idx is not None:
            assert torch.equal(got.ids[r], want.topk_idx[r])
        if inputs.scales:
            assert same(got.scales[r].view_as(want.scales[r]), want.scales[r])

    g = torch.Generator().manual_seed(9)
    ys = [(x.double() * 1.37 + 0.25).to(x.dtype) for x in want.x]
    weighted = inputs.layout != "rank"
    bias = [torch.randn(x.shape, generator=g).to(x.dtype) for x in inputs.xs]
    back = reference.combine(
        ys, want.bookkeeping, weights=want.topk_weights if weighted else None, bias=bias,
        node_of=ranks.at[0].node_of, hops=hops, topk_weights=want.topk_weights,
    )  # fmt: skip
    ys = [y.reshape(got.x[r].shape) for r, y in enumerate(ys)]
    summed = Combine(
        got, ys, got.weights if weighted else None, got.weights, bias, first_epoch=62 + got.num_rounds
    )  # fmt: skip
    for r in ranks.all:
        assert same(summed.x[r], back.x[r])
        assert same(summed.columns[r], back.topk_weights[r])
    return got.num_rounds, summed.num_rounds


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
def test_round_trip(nodes, hops, layout):
    num_tokens = [11, 0, 17, 4, 8, 1][: sum(map(len, NODES[nodes]))]
    more = {"rank": {}, "expert": {"alignment": 4}, "padded": {"capacity": 60}}[layout]
    inputs = make_inputs(num_tokens, layout=layout, **more)
    assert round_trip(NODES[nodes], hops, inputs, capacity=20) == (1, 1)
    rounds = round_trip(NODES[nodes], hops, inputs, capacity=5)
    assert rounds[0] == -(-max(num_tokens) // 5) and 1 < rounds[1] <= rounds[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hops", ["node", "rank"])
def test_dtypes_and_scales(dtype, hops):
    inputs = make_inputs([9, 13, 0, 6], dtype=dtype, scales=True, topk=4, layout="expert", seed=1)
    round_trip(NODES["2 x 2"], hops, inputs, capacity=4)


@pytest.mark.parametrize("num_experts, topk", [(1, 1), (3, 2), (13, 8)])
def test_ranks_that_own_little(num_experts, topk):
    inputs = make_inputs([7, 2, 0, 9], num_experts=num_experts, topk=topk, layout="expert")
    round_trip(NODES["2 x 2"], "node", inputs, capacity=3)


def test_no_token_at_all():
    round_trip(NODES["2 x 2"], "node", make_inputs([0, 0, 0, 0]), capacity=3)


def dispatch_in_rounds(buffer, rank, inputs):
    got = buffer.dispatch(
        inputs.xs[rank], inputs.idx[rank], inputs.weights[rank], num_experts=inputs.num_experts,
        layout=inputs.layout, alignment=inputs.alignment, capacity=inputs.capacity,
    )  # fmt: skip
    return got, buffer.layout, buffer.stats()["rounds"]


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
def test_tables_of_a_real_exchange(run_threads, hops, layout):
    """What route, forward and unpack of csrc leave in handles, over several rounds, is what the twins leave."""
    more = {"rank": {}, "expert": {"alignment": 2}, "padded": {"capacity": 60}}[layout]
    inputs = make_inputs([11, 0, 17, 6], hidden=32, num_experts=8, layout=layout, **more)
    results = run_threads(
        lambda buffer, rank: dispatch_in_rounds(buffer, rank, inputs), 4, ranks_per_node=2, hops=hops, hidden=32,
        topk=3, num_experts=8, window_bytes=12 * 1024,
    )  # fmt: skip
    layout_used = results[0][1]
    row_bytes = inputs.row_format().row_bytes
    ranks = Ranks(NODES["2 x 2"], hops, row_bytes, layout_used.capacity, inputs.num_experts)
    assert ranks.layout == layout_used
    twins = Dispatch(ranks, inputs, first_epoch=2)
    for r, (got, _, num_rounds) in enumerate(results):
        handle, twin = got.handle, twins.handles[r]
        assert num_rounds == twins.num_rounds > 1
        assert torch.equal(handle.lane_rows, twin.routed.lane_rows)
        assert torch.equal(handle.recv_tokens, twin.recv_tokens)
        assert list(handle.totals) == twin.totals
        if layout != "rank":
            assert torch.equal(handle.positions, twin.positions)
        assert torch.equal(handle.forward_tokens, torch.cat(twin.forward_tokens))
        assert torch.equal(handle.forward_rows, torch.cat(twin.forward_rows))
        assert same(got.x, twins.x[r].view_as(got.x))
        assert same(got.topk_weights, twins.weights[r].view_as(got.topk_weights))
