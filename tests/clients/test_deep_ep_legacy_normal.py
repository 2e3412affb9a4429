"""deep_ep.Buffer, normal mode, in real processes over gloo: the contract against plain torch, bit for bit."""

import os

import pytest
import torch
from deep_ep_oracle import combined, dispatched, layout, make_case, open_gloo, same

import moe_comm
from moe_comm import deep_ep
from moe_comm.deep_ep import normal

WORLDS = [(2, 0), (4, 0), (4, 2), (4, 1)]  # ranks, ranks per pretended node


@pytest.fixture(params=WORLDS, ids=lambda w: f"{w[0]} ranks, nodes of {w[1] or w[0]}")
def world(request, run_ranks, monkeypatch, tmp_path):
    num_ranks, ranks_per_node = request.param
    if ranks_per_node:
        monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", str(ranks_per_node))
    node_of = [r // (ranks_per_node or num_ranks) for r in range(num_ranks)]

    def run(fn, *args, **more):
        return run_ranks(fn, num_ranks, num_ranks, str(tmp_path / "gloo"), node_of, *args, **more)

    run.num_ranks = num_ranks
    return run


def tokens_of(num_ranks):
    return [9, 0, 17, 4][:num_ranks]


def layout_kwargs(buffer, case, rank):
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(
        case.idx[rank], case.num_experts
    )
    return {
        "num_tokens_per_rank": per_rank, "num_tokens_per_rdma_rank": per_node,
        "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert,
    }  # fmt: skip


def send(buffer, case, rank, **more):
    return buffer.dispatch(
        more.pop("x", case.xs[rank]), topk_idx=case.idx[rank], topk_weights=case.weights[rank],
        **layout_kwargs(buffer, case, rank), **more,
    )  # fmt: skip


def random_like(rows, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=g).to(x.dtype) for x in rows]


# --- layout --------------------------------------------------------------------------------------


def check_layout(rank, group, num_ranks, store, node_of):
    buffer = deep_ep.Buffer(open_gloo(rank, num_ranks, store), int(1e9), 0)
    assert (buffer.runtime.kernels is not None) == bool(os.environ.get("MOE_COMM_DEVICE"))
    for num_experts, topk in ((8, 3), (5, 5), (num_ranks, 1)):
        case = make_case(tokens_of(num_ranks), num_experts=num_experts, topk=topk)
        *got, event = buffer.get_dispatch_layout(case.idx[rank], num_experts)
        for mine, want in zip(got, layout(case, rank, node_of), strict=True):
            assert (mine is None and want is None) or same(mine, want)
        assert event.event is None
        # Of a device, without asking it for numbers: "meta" has none.
        for mine, want in zip(
            normal.layout_of(buffer.runtime, case.idx[rank].to("meta"), num_experts),
            got,
            strict=True,
        ):
            assert mine is want is None or (
                mine.device.type == "meta" and mine.shape == want.shape and mine.dtype == want.dtype
            )
    with pytest.raises(moe_comm.ArgumentError, match="topk_idx: expected ids in"):
        buffer.get_dispatch_layout(torch.tensor([[8]]), 8)
    with pytest.raises(moe_comm.ArgumentError, match="topk_idx: expected int64"):
        buffer.get_dispatch_layout(torch.zeros(3, 2), 8)
    return buffer.group_size, buffer.rank


def test_layout(world):
    assert world(check_layout) == [(world.num_ranks, r) for r in range(world.num_ranks)]


# --- dispatch ------------------------------------------------------------------------------------


def check_dispatch(rank, group, num_ranks, store, node_of):
    buffer = deep_ep.Buffer(open_gloo(rank, num_ranks, store))
    for seed, (num_experts, alignment, dtype) in enumerate(
        [(8, 1, torch.bfloat16), (7, 4, torch.float32), (2 * num_ranks, 128, torch.bfloat16)]
    ):
        case = make_case(tokens_of(num_ranks), seed=seed, num_experts=num_experts, dtype=dtype)
        want = dispatched(case)
        x, idx, weights, counts, handle, event = send(
            buffer, case, rank, expert_alignment=alignment
        )
        assert same(x, want.x[rank])
        assert same(idx, want.topk_idx[rank])
        assert same(weights, want.topk_weights[rank])
        assert bool((weights[idx < 0] == 0).all())
        exact = want.tokens_per_expert[rank].tolist()
        assert counts == [-(-c // alignment) * alignment for c in exact]
        assert all(type(c) is int for c in counts)
        assert event.event is None
        # The boundaries of source ranks, where DeepEP's users look for them.
        per_source = torch.tensor(
            [
                sum(1 for t in want.bookkeeping.copies[rank].token.tolist() if lo <= t < hi)
                for lo, hi in bounds(case)
            ]
        )
        prefix = per_source.cumsum(0).int()
        assert same(handle[0][:, rank], prefix)
        assert same(handle[-4], prefix)
        assert all(isinstance(part, torch.Tensor) for part in handle)
        # Cached: the same routing for other rows.
        other = random_like(case.xs, 100 + seed)
        again = buffer.dispatch(other[rank], handle=handle)
        assert again[1:5] == (None, None, None, None) and isinstance(again[5], deep_ep.EventOverlap)
        case.xs = other
        assert same(again[0], dispatched(case).x[rank])


def bounds(case):
    first = 0
    for ids in case.idx:
        yield first, first + len(ids)
        first += len(ids)


def test_dispatch(world):
    world(check_dispatch)


def check_scales(rank, group, num_ranks, store, node_of):
    buffer = deep_ep.Buffer(open_gloo(rank, num_ranks, store))
    case = make_case(tokens_of(num_ranks), hidden=256, num_experts=2 * num_ranks)
    casts = [deep_ep.utils.math.per_token_cast_to_fp8(x) for x in case.xs]
    case.xs = [rows for rows, _ in casts]
    for name in ("float32", "column-major", "int32", "one"):
        scales = [s for _, s in casts]
        if name == "int32":
            scales = [s.view(torch.int32) for s in scales]
        if name == "one":
            scales = [s[:, :1].contiguous() for s in scales]
        want = dispatched(case, scales=scales)
        mine = scales[rank]
        if name == "column-major":
            mine = mine.t().contiguous().t()
        if name == "one":
            mine = mine[:, 0]
        x, *_, handle, _ = send(buffer, case, rank, x=(case.xs[rank], mine))
        assert same(x[0], want.x[rank])
        assert x[1].is_contiguous()
        assert same(x[1], want.scales[rank][:, 0] if name == "one" else want.scales[rank])
        again, *_ = buffer.dispatch((case.xs[rank], mine), handle=handle)
        assert same(again[0], x[0]) and same(again[1], x[1])


def test_scales(world):
    world(check_scales)


def check_worst(rank, group, num_ranks, store, node_of):
    buffer = deep_ep.Buffer(open_gloo(rank, num_ranks, store))
    case = make_case(tokens_of(num_ranks), num_experts=2 * num_ranks)
    want, worst = dispatched(case), 30 * num_ranks
    x, idx, weights, counts, handle, _ = send(buffer, case, rank, num_worst_tokens=worst)
    rows = len(want.x[rank])
    assert x.shape == (worst, 64) and same(x[:rows], want.x[rank])
    assert idx.shape == (worst, 3) and same(idx[:rows], want.topk_idx[rank])
    assert bool((idx[rows:] == -1).all())
    assert weights.shape == (worst, 3) and same(weights[:rows], want.topk_weights[rank])
    assert counts == []
    again, *_ = buffer.dispatch(case.xs[rank], handle=handle)
    assert again.shape == (worst, 64) and same(again[:rows], want.x[rank])
    x[rows:] = torch.nan  # undefined rows go nowhere
    weights[rows:] = torch.nan
    total = combined(want.x, want.bookkeeping, rank, node_of)
    for y, columns in ((x, weights), (x[:rows], weights[:rows])):  # with or without the padding
        got, summed, _ = buffer.combine(y, handle, topk_weights=columns)
        assert same(got, total.bfloat16())
        assert same(summed, torch.where(case.idx[rank] < 0, 0, case.weights[rank]))
    small = max(1, rows - 1) if rank == 0 else worst
    if rank == 0:
        with pytest.raises(moe_comm.ArgumentError, match=f"num_worst_tokens: .* {rows} rows"):
            send(buffer, case, rank, num_worst_tokens=small)
    else:
        send(buffer, case, rank, num_worst_tokens=small)


def test_num_worst_tokens(world):
    world(check_worst)


def check_without_topk(rank, group, num_ranks, store, node_of):
    buffer = deep_ep.Buffer(open_gloo(rank, num_ranks, store))
    for num_experts in (2 * num_ranks, 7):
        case = make_case(tokens_of(num_ranks), num_experts=num_experts)
        want = dispatched(case)
        x, idx, weights, counts, handle, _ = buffer.dispatch(
            case.xs[rank], **layout_kwargs(buffer, case, rank), expert_alignment=2
        )
        assert same(x, want.x[rank]) and idx is None and weights is None
        assert counts == [(c + 1) // 2 * 2 for c in want.tokens_per_expert[rank].tolist()]
        again, *_ = buffer.dispatch(case.xs[rank], handle=handle)
        assert same(again, x)
        got, none, _ = buffer.combine(x, handle)
        assert none is None
        assert same(got, combined(want.x, want.bookkeeping, rank, node_of).bfloat16())


def test_without_topk(world):
    world(check_without_topk)


# --- combine -------------------------------------------------------------------------------------


def check_combine(rank, group, num_ranks, store, node_of):
    buffer = deep_ep.Buffer(open_gloo(rank, num_ranks, store))
    case = make_case(tokens_of(num_ranks), num_experts=2 * num_ranks, topk=2 * num_ranks - 1)
    want = dispatched(case)
    ys = random_like(want.x, 7)
    first, second = random_like(case.xs, 8), random_like(case.xs, 9)
    handle = send(buffer, case, rank)[4]
    for bias, start in (
        (None, None),
        (first[rank], first[rank].float()),
        ((first[rank], second[rank]), first[rank].float() + second[rank].float()),
    ):
        got, weights, event = buffer.combine(ys[rank], handle, bias=bias)
        pair = isinstance(bias, tuple)
        total = combined(ys, want.bookkeeping, rank, node_of, start, round_nodes=not pair)
        assert same(got, total.bfloat16())
        assert weights is None and event.event is None
    columns = random_like(want.topk_weights, 10)
    got, weights, _ = buffer.combine(ys[rank], handle=handle, topk_weights=columns[rank])
    total = combined(columns, want.bookkeeping, rank, node_of)
    assert same(weights, total) and weights.dtype == torch.float32
    for dtype in (torch.float32, torch.float16, torch.float64):
        wide = [y.to(dtype) for y in ys]
        got, _, _ = buffer.combine(wide[rank], handle)
        total = combined(wide, want.bookkeeping, rank, node_of)
        assert got.dtype == dtype
        assert same(got, total.to(dtype)) or dtype == torch.float64
    with pytest.raises((moe_comm.ArgumentError, moe_comm.PeerError), match="bias: expected None"):
        buffer.combine(ys[rank], handle, bias=(first[rank],))
    assert same(buffer.combine(ys[rank], handle)[0], buffer.combine(ys[rank], handle)[0])
    return None


def test_combine(world):
    world(check_combine)


def test_a_pair_of_biases_is_rounded_once():
    """Or the test above would say nothing: with roundings in between, other bits come out."""
    case = make_case([64, 64], num_experts=4, topk=3)
    want = dispatched(case)
    ys = random_like(want.x, 7)
    first, second = random_like(case.xs, 8)[0], random_like(case.xs, 9)[0]
    once = combined(ys, want.bookkeeping, 0, [0, 0], first.float() + second.float()).bfloat16()
    twice = combined(ys, want.bookkeeping, 0, [0, 0], (first + second).float()).bfloat16()
    last = (combined(ys, want.bookkeeping, 0, [0, 0]).bfloat16() + first).bfloat16() + second
    assert not same(once, twice) and not same(once, last)


# --- handles -------------------------------------------------------------------------------------


def check_handles(rank, group, num_ranks, store, node_of):
    process_group = open_gloo(rank, num_ranks, store)
    buffer = deep_ep.Buffer(process_group)
    cases = [make_case(tokens_of(num_ranks), seed=s, num_experts=2 * num_ranks) for s in range(3)]
    handles = [send(buffer, case, rank)[4] for case in cases]
    buffer = deep_ep.Buffer(process_group, 1 << 20)  # the old one is gone
    for s in (2, 0, 1, 0):
        want = dispatched(cases[s])
        got, _, _ = buffer.combine(want.x[rank], handles[s])
        assert same(got, combined(want.x, want.bookkeeping, rank, node_of).bfloat16())

    class Saved(torch.autograd.Function):
        """As clients keep handles."""

        @staticmethod
        def forward(ctx, x, weights):
            recv_x, _, recv_weights, _, handle, _ = buffer.dispatch(
                x, topk_idx=case.idx[rank], topk_weights=weights, **layout_kwargs(buffer, case, rank)
            )  # fmt: skip
            ctx.save_for_backward(*handle)
            return recv_x, recv_weights

        @staticmethod
        def backward(ctx, grad_x, grad_weights):
            grad, grad_weights, _ = buffer.combine(
                grad_x.contiguous(), ctx.saved_tensors, topk_weights=grad_weights.float()
            )
            return grad, grad_weights

    case = make_case(tokens_of(num_ranks), num_experts=2 * num_ranks, dtype=torch.float32)
    x, weights = case.xs[rank].clone().requires_grad_(), case.weights[rank].clone().requires_grad_()
    recv_x, recv_weights = Saved.apply(x, weights)
    want = dispatched(case)
    grads, columns = random_like(want.x, 3), random_like(want.topk_weights, 4)
    torch.autograd.backward([recv_x, recv_weights], [grads[rank], columns[rank]])
    assert same(x.grad, combined(grads, want.bookkeeping, rank, node_of))
    assert same(weights.grad, combined(columns, want.bookkeeping, rank, node_of))


def test_handles(world):
    world(check_handles)


# --- wrong input ---------------------------------------------------------------------------------


def check_wrong(rank, group, num_ranks, store, node_of):
    buffer = deep_ep.Buffer(open_gloo(rank, num_ranks, store), explicitly_destroy=True)
    case = make_case(tokens_of(num_ranks), num_experts=2 * num_ranks)
    given = layout_kwargs(buffer, case, rank)
    mine = {"topk_idx": case.idx[rank], "topk_weights": case.weights[rank]}
    x, last = case.xs[rank], num_ranks - 1
    handle = send(buffer, case, rank)[4]
    y = dispatched(case).x[rank]

    def refused(match, call, on_rank=last):
        """`call` raises on one rank as ArgumentError, on the others as PeerError with the text; the next call works."""
        bad = rank == on_rank
        kind = moe_comm.ArgumentError if bad else moe_comm.PeerError
        with pytest.raises(kind, match=match):
            call(bad)
        if bad:
            with pytest.raises((ValueError, RuntimeError)):
                raise moe_comm.ArgumentError("is both")
        assert same(send(buffer, case, rank)[0], y)

    def dispatch(bad, **changes):
        more = changes if bad else {}
        buffer.dispatch(more.pop("x", x), **{**given, **mine, **more})

    refused("topk_weights: expected", lambda bad: dispatch(bad, topk_weights=None))
    refused(
        "num_tokens_per_expert: expected", lambda bad: dispatch(bad, num_tokens_per_expert=None)
    )
    wrong_shape = torch.zeros(len(x) + 1, num_ranks, dtype=torch.bool)
    refused("is_token_in_rank: expected", lambda bad: dispatch(bad, is_token_in_rank=wrong_shape))
    refused("expert_alignment: expected", lambda bad: dispatch(bad, expert_alignment=0))
    refused("num_worst_tokens: expected", lambda bad: dispatch(bad, num_worst_tokens=-1))
    refused("x: expected", lambda bad: dispatch(bad, x=x.view(-1, 32, 2)))
    refused("x: expected .* pair", lambda bad: dispatch(bad, x=(x, x, x)))
    refused("config: expected", lambda bad: dispatch(bad, config=7))
    refused("previous_event: expected", lambda bad: dispatch(bad, previous_event="no"))
    refused("allocate_on_comm_stream", lambda bad: dispatch(bad, allocate_on_comm_stream=True))
    refused("topk_idx: expected None", lambda bad: buffer.dispatch(
        x, handle=handle, topk_idx=case.idx[rank] if bad else None))  # fmt: skip
    refused(
        "handle: expected", lambda bad: buffer.dispatch(x, handle=handle[:3] if bad else handle)
    )
    refused("handle: expected", lambda bad: buffer.combine(y, 3 if bad else handle), 0)
    longer = torch.cat([y, y, y.new_zeros(1, 64)])
    refused("x: expected", lambda bad: buffer.combine(longer if bad else y, handle))
    refused("bias: expected", lambda bad: buffer.combine(y, handle, bias=3 if bad else None))
    with pytest.raises(TypeError, match="use_nvfp4"):
        buffer.low_latency_dispatch(x, case.idx[rank], 32, 8, use_nvfp4=True)
    with pytest.raises(moe_comm.ArgumentError, match="low_latency_mode"):
        buffer.low_latency_dispatch(x, case.idx[rank], 32, 8)
    buffer.destroy()
    assert buffer.runtime is None
    buffer.destroy()
    with pytest.raises(moe_comm.ClosedError):
        buffer.combine(y, handle)


def test_wrong_input(world):
    world(check_wrong)
