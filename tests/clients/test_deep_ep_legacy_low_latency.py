"""deep_ep.Buffer, low-latency mode, in real processes over gloo: the contract against plain torch, bit for bit."""

import time

import pytest
import torch
from deep_ep_oracle import (
    combined,
    dispatched,
    make_case,
    open_gloo,
    padded_rows,
    same,
    weighted_sum,
)

import moe_comm
from moe_comm import deep_ep
from moe_comm.deep_ep.quant import (
    cast_from_fp8,
    cast_to_fp8,
    pack_ue8m0,
    through_logfmt,
)
from moe_comm.deep_ep.utils.math import calc_diff

WORLDS = [(2, 0), (4, 0), (4, 2)]  # ranks, ranks per pretended node
MAX_TOKENS = 20


@pytest.fixture(params=WORLDS, ids=lambda w: f"{w[0]} ranks, nodes of {w[1] or w[0]}")
def world(request, run_ranks, monkeypatch, tmp_path):
    num_ranks, ranks_per_node = request.param
    if ranks_per_node:
        monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", str(ranks_per_node))
    node_of = [r // (ranks_per_node or num_ranks) for r in range(num_ranks)]

    def run(fn, *args, **more):
        return run_ranks(fn, num_ranks, num_ranks, str(tmp_path / "gloo"), node_of, *args, **more)

    return run


def make(num_ranks, *, seed=0, num_experts=None, hidden=512, **more):
    tokens = [9, 0, MAX_TOKENS, 4][:num_ranks]
    return make_case(
        tokens[seed % num_ranks :] + tokens[: seed % num_ranks], seed=seed, hidden=hidden,
        num_experts=num_experts or 2 * num_ranks, **more,
    )  # fmt: skip


def open_buffer(rank, num_ranks, store):
    return deep_ep.Buffer(
        open_gloo(rank, num_ranks, store), low_latency_mode=True, explicitly_destroy=True
    )


def check_received(case, rank, packed, count, handle, rows=None):
    """Rows, counts, sources and ranges; `rows`: what of each token should have arrived, default x."""
    num_ranks, num_places = case.num_ranks, case.num_ranks * MAX_TOKENS
    want = padded_rows(case, rank, num_places, rows)
    src_info, layout_range, max_tokens, hidden, num_experts = handle[:5]
    num_local = len(want)
    assert packed.shape[:2] == (num_local, num_places)
    assert count.dtype == torch.int32 and count.tolist() == [len(found) for found in want]
    assert src_info.dtype == torch.int32 and src_info.shape == (num_local, num_places)
    assert layout_range.dtype == torch.int64 and layout_range.shape == (num_local, num_ranks)
    assert (max_tokens, hidden, num_experts) == (
        MAX_TOKENS,
        case.xs[0].shape[1],
        case.num_experts,
    )
    for e, found in enumerate(want):
        for i, (_, token, row) in enumerate(found):
            assert src_info[e, i] == token
            assert same(packed[e, i], row)
        end = 0
        for r in range(num_ranks):
            begin, number = int(layout_range[e, r]) >> 32, int(layout_range[e, r]) & 0xFFFFFFFF
            assert begin == end
            assert number == sum(source == r for source, _, _ in found)
            assert all(source == r for source, _, _ in found[begin : begin + number])
            end = begin + number


def send(buffer, case, rank, **more):
    return buffer.low_latency_dispatch(
        case.xs[rank], case.idx[rank], MAX_TOKENS, case.num_experts, **{"use_fp8": False, **more}
    )


def results_of(case, rank, seed=5):
    """Random results of all ranks' experts, [L, P, H], bfloat16; and the place of each copy."""
    g = torch.Generator().manual_seed(seed)
    ys, places = [], {}
    for r in range(case.num_ranks):
        shape = (len(case.owned(r)), case.num_ranks * MAX_TOKENS, case.xs[0].shape[1])
        ys.append(torch.randn(shape, generator=g).to(case.xs[0].dtype))
        for e, found in zip(
            case.owned(r), padded_rows(case, r, case.num_ranks * MAX_TOKENS), strict=True
        ):
            for i, (source, token, _) in enumerate(found):
                places[e, source, token] = i
    return ys, places


# --- dispatch ------------------------------------------------------------------------------------


def check_dispatch(rank, group, num_ranks, store, node_of):
    buffer = open_buffer(rank, num_ranks, store)
    for seed, num_experts in enumerate((2 * num_ranks, 7, 2 * num_ranks)):
        case = make(num_ranks, seed=seed, num_experts=num_experts, topk=min(4, num_experts))
        packed, count, handle, event, hook = send(buffer, case, rank)
        assert event.event is None and hook is None
        check_received(case, rank, packed, count, handle)
        packed, count, handle, event, hook = send(buffer, case, rank, async_finish=True)
        assert hook is None
        event.current_stream_wait()
        check_received(case, rank, packed, count, handle)
        packed, count, handle, event, hook = send(buffer, case, rank, return_recv_hook=True)
        assert event.event is None
        before = packed.data_ptr()
        hook()
        assert packed.data_ptr() == before
        check_received(case, rank, packed, count, handle)
        hook()  # does nothing more
        check_received(case, rank, packed, count, handle)


def test_dispatch(world):
    world(check_dispatch)


def check_fp8(rank, group, num_ranks, store, node_of):
    buffer = open_buffer(rank, num_ranks, store)
    case = make(num_ranks)
    case.xs = [x * 10 ** torch.linspace(-3, 3, len(x) or 1)[: len(x), None] for x in case.xs]
    case.xs = [x.bfloat16() for x in case.xs]
    for hidden in (512, 1024, 144):  # 144: groups of 128 do not fill a row
        case.xs = [x.repeat(1, 2)[:, :hidden].contiguous() for x in case.xs]
        for hook_wanted in (False, True):
            for round_scale, use_ue8m0 in ((False, False), (True, False), (True, True)):
                (rows, scales), count, handle, _, hook = send(
                    buffer, case, rank, use_fp8=True, round_scale=round_scale, use_ue8m0=use_ue8m0,
                    return_recv_hook=hook_wanted,
                )  # fmt: skip
                if hook:
                    hook()
                casts = [cast_to_fp8(x, round_scale=round_scale) for x in case.xs]
                check_received(case, rank, rows, count, handle, [c[0] for c in casts])
                sent = [pack_ue8m0(c[1]) if use_ue8m0 else c[1] for c in casts]
                check_received(case, rank, scales, count, handle, sent)
                num_places, groups = num_ranks * MAX_TOKENS, -(-hidden // 128)
                width = -(-groups // 4) if use_ue8m0 else groups
                assert scales.shape == (rows.shape[0], num_places, width)
                assert scales.stride() == (num_places * width, 1, num_places)
                assert scales.dtype == (torch.int32 if use_ue8m0 else torch.float32)
                for e, found in enumerate(padded_rows(case, rank, num_places)):
                    for i, (_, _, row) in enumerate(found):
                        back = cast_from_fp8(rows[e, i], scales[e, i])
                        error = (back.float() - row.float()).abs().max() / row.float().abs().max()
                        assert error < (0.1 if round_scale else 0.05)


def test_fp8(world):
    world(check_fp8)


def check_stats(rank, group, num_ranks, store, node_of):
    buffer = open_buffer(rank, num_ranks, store)
    case = make(num_ranks)
    stats = torch.full((2,), 5, dtype=torch.int32)
    waits, sums = torch.zeros(2, num_ranks, dtype=torch.int64)
    for hook_wanted in (False, True):
        if rank == 0:
            time.sleep(0.2)  # the others wait for it
        _, count, handle, _, hook = send(
            buffer,
            case,
            rank,
            cumulative_local_expert_recv_stats=stats,
            dispatch_wait_recv_cost_stats=waits,
            return_recv_hook=hook_wanted,
        )
        if hook:
            hook()
    assert same(stats, 5 + 2 * count)
    assert count.sum() > 0
    assert (waits >= 0).all() and (rank == 0 or waits[0] > 0)
    ys, _ = results_of(case, rank)
    if rank == 1:
        time.sleep(0.2)
    buffer.low_latency_combine(
        ys[rank], case.idx[rank], case.weights[rank], handle, combine_wait_recv_cost_stats=sums
    )
    assert (sums >= 0).all() and (rank == 1 or sums[1] > 0)


def test_stats_accumulate(world):
    world(check_stats)


# --- combine -------------------------------------------------------------------------------------


def check_combine(rank, group, num_ranks, store, node_of):
    buffer = open_buffer(rank, num_ranks, store)
    for seed, (num_experts, topk) in enumerate(((2 * num_ranks, 3), (7, 7))):
        case = make(num_ranks, seed=seed, num_experts=num_experts, topk=topk)
        handle = send(buffer, case, rank)[2]
        ys, places = results_of(case, rank)
        mine = (ys[rank], case.idx[rank], case.weights[rank], handle)
        want = weighted_sum(case, rank, ys, places)
        got, event, hook = buffer.low_latency_combine(*mine)
        assert same(got, want) and event.event is None and hook is None
        out = torch.full_like(want, torch.nan)
        got, event, hook = buffer.low_latency_combine(*mine, async_finish=True, out=out)
        event.current_stream_wait()
        assert got is out and same(out, want) and hook is None
        out = torch.full_like(want, torch.nan)
        y = ys[rank].clone()
        got, event, hook = buffer.low_latency_combine(
            y, *mine[1:], return_recv_hook=True, out=out, zero_copy=False
        )
        y.fill_(torch.nan)  # may be reused as soon as the call returned
        hook()
        assert got is out and same(out, want)

        through = [through_logfmt(y * 0.01) for y in ys]
        small = (ys[rank] * 0.01, *mine[1:])
        got, _, _ = buffer.low_latency_combine(*small, use_logfmt=True)
        assert same(got, weighted_sum(case, rank, through, places))
        if got.numel():
            exact = weighted_sum(case, rank, [y * 0.01 for y in ys], places)
            assert not same(got, exact)
            assert calc_diff(got, exact) < 1e-4

        view = buffer.get_next_low_latency_combine_buffer(handle)
        hidden = case.xs[0].shape[1]
        assert view.shape == ys[rank].shape and view.dtype == torch.bfloat16
        assert view.stride(1) == (2 * hidden + 4 * hidden // 128) // 2
        view.copy_(ys[rank])
        nothing = torch.full_like(ys[rank], torch.nan)
        got, _, _ = buffer.low_latency_combine(nothing, *mine[1:], zero_copy=True)
        assert same(got, want)
        view = buffer.get_next_low_latency_combine_buffer(handle)
        view.copy_(ys[rank])
        got, _, hook = buffer.low_latency_combine(
            nothing, *mine[1:], zero_copy=True, return_recv_hook=True
        )
        view.fill_(torch.nan)
        hook()
        assert same(got, want)


def test_combine(world):
    world(check_combine)


def check_precision(rank, group, num_ranks, store, node_of):
    """Other floats than bfloat16, which tests of models like."""
    buffer = open_buffer(rank, num_ranks, store)
    for dtype in (torch.float32, torch.float16):
        case = make(num_ranks, dtype=dtype, hidden=64)
        packed, count, handle, _, _ = send(buffer, case, rank)
        check_received(case, rank, packed, count, handle)
        ys, places = results_of(case, rank)
        got, _, _ = buffer.low_latency_combine(ys[rank], case.idx[rank], case.weights[rank], handle)
        assert same(got, weighted_sum(case, rank, ys, places))


def test_other_dtypes(world):
    world(check_precision)


# --- calls in flight -----------------------------------------------------------------------------


def check_in_flight(rank, group, num_ranks, store, node_of):
    """Two micro-batches, hooks in another order on odd ranks; windows that grow while hooks are open."""
    buffer = open_buffer(rank, num_ranks, store)
    cases = [make(num_ranks, seed=s) for s in range(4)]
    for step in range(3):
        pair = (cases[step], cases[step + 1])
        sent = [send(buffer, case, rank, return_recv_hook=True) for case in pair]
        order = (1, 0) if rank % 2 else (0, 1)
        for i in order:
            sent[i][4]()
            check_received(pair[i], rank, *sent[i][:3])
        back = []
        for case, (_, _, handle, _, _) in zip(pair, sent, strict=True):
            ys, places = results_of(case, rank)
            got, _, hook = buffer.low_latency_combine(
                ys[rank], case.idx[rank], case.weights[rank], handle, return_recv_hook=True
            )
            back.append((got, hook, weighted_sum(case, rank, ys, places)))
        for i in order:
            back[i][1]()
        assert all(same(got, want) for got, _, want in back)
    # A third that is not received yet.
    sent = [send(buffer, cases[i], rank, return_recv_hook=True) for i in range(2)]
    with pytest.raises(
        (moe_comm.ArgumentError, moe_comm.PeerError), match="call an earlier hook first"
    ):
        send(buffer, cases[2], rank, return_recv_hook=True)
    with pytest.raises((moe_comm.ArgumentError, moe_comm.PeerError), match="handle: expected"):
        ys, _ = results_of(cases[0], rank)
        buffer.low_latency_combine(ys[rank], cases[0].idx[rank], cases[0].weights[rank], sent[0][2])
    # Growth: a larger H, then a larger K, with these two still open.
    larger = make(num_ranks, hidden=1024, topk=4, seed=1)
    packed, count, handle, _, _ = send(buffer, larger, rank)
    check_received(larger, rank, packed, count, handle)
    assert len(buffer._low_latency.windows.retired) == 1
    for i in order:
        sent[i][4]()
        check_received(cases[i], rank, *sent[i][:3])
    for case, old in ((cases[0], sent[0][2]), (larger, handle)):  # handles of both windows
        ys, places = results_of(case, rank)
        got, _, _ = buffer.low_latency_combine(ys[rank], case.idx[rank], case.weights[rank], old)
        assert same(got, weighted_sum(case, rank, ys, places))
    largest = make(num_ranks, hidden=2048, seed=2)
    packed, count, handle, _, _ = send(buffer, largest, rank)
    check_received(largest, rank, packed, count, handle)
    assert buffer._low_latency.windows.retired == []


def test_in_flight(world):
    world(check_in_flight)


def check_both_modes(rank, group, num_ranks, store, node_of):
    """One Buffer, prefill and decode in turns, with the calls that clients make in between."""
    buffer = open_buffer(rank, num_ranks, store)
    for seed in range(3):
        case = make(num_ranks, seed=seed)
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(
            case.idx[rank], case.num_experts
        )
        x, _, _, _, handle, _ = buffer.dispatch(
            case.xs[rank], None, per_rank, per_node, in_rank, per_expert, case.idx[rank], case.weights[rank]
        )  # fmt: skip
        buffer.clean_low_latency_buffer(MAX_TOKENS, 512, case.num_experts)
        packed, count, low_latency, _, _ = send(buffer, case, rank)
        check_received(case, rank, packed, count, low_latency)
        want = dispatched(case)
        got, _, _ = buffer.combine(x, handle)
        assert same(got, combined(want.x, want.bookkeeping, rank, node_of).bfloat16())
        buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True).zero_()
        ys, places = results_of(case, rank)
        got, _, _ = buffer.low_latency_combine(
            ys[rank], case.idx[rank], case.weights[rank], low_latency
        )
        assert same(got, weighted_sum(case, rank, ys, places))
    buffer.destroy()


def test_both_modes(world):
    world(check_both_modes)


# --- wrong input ---------------------------------------------------------------------------------


def check_wrong(rank, group, num_ranks, store, node_of):
    process_group = open_gloo(rank, num_ranks, store)
    buffer = deep_ep.Buffer(process_group, low_latency_mode=True)
    case, last = make(num_ranks, seed=1), num_ranks - 1
    assert len(case.xs[last])
    x, idx, weights = case.xs[rank], case.idx[rank], case.weights[rank]

    def refused(match, call):
        kind = moe_comm.ArgumentError if rank == last else moe_comm.PeerError
        with pytest.raises(kind, match=match):
            call(rank == last)

    def refused_by_all(call):
        with pytest.raises(moe_comm.MismatchError, match="needs Sizes"):
            call()

    def dispatch(bad, **changes):
        given = {
            "x": x, "topk_idx": idx, "num_max_dispatch_tokens_per_rank": MAX_TOKENS,
            "num_experts": case.num_experts, "use_fp8": False,
        }  # fmt: skip
        return buffer.low_latency_dispatch(**{**given, **(changes if bad else {})})

    long = torch.zeros(MAX_TOKENS + 1, 512, dtype=torch.bfloat16)
    changes = [  # each both before there are windows and after
        ("x: expected bfloat16", {"x": x[0] if len(x) else x.view(-1)}),
        ("x: expected at most", {"x": long, "topk_idx": torch.zeros(len(long), 3).long()}),
        ("topk_idx: expected", {"topk_idx": None}),
        ("topk_idx", {"topk_idx": torch.full_like(idx, 99)}),
        ("num_experts: expected", {"num_experts": 0}),
        ("use_ue8m0: expected", {"use_ue8m0": True}),
        ("async_finish: expected", {"async_finish": True, "return_recv_hook": True}),
        (
            "dispatch_wait_recv_cost_stats",
            {"dispatch_wait_recv_cost_stats": torch.zeros(1, dtype=torch.int64)},
        ),
        ("cumulative_local_expert_recv_stats", {"cumulative_local_expert_recv_stats": idx}),
    ]
    grown = {"x": torch.cat([x, x], 1)}
    hooked = {"return_recv_hook": True, **(grown if rank == last else {})}
    for _ in range(2):
        for match, change in changes:
            refused(match, lambda bad, change=change: dispatch(bad, **change))
        packed, count, handle, _, _ = dispatch(False)
        check_received(case, rank, packed, count, handle)
        # Windows must grow, but not on all ranks; or on all but one, whose arguments are wrong.
        refused_by_all(lambda: dispatch(rank != last, **grown))
        refused_by_all(lambda: dispatch(rank == last, **grown))
        refused_by_all(lambda: dispatch(True, num_max_dispatch_tokens_per_rank=50 + rank))
        refused_by_all(lambda: dispatch(True, **hooked)[4]())
        refused(
            "topk_idx: expected",
            lambda bad: dispatch(True, **grown, **({"topk_idx": 3} if bad else {})),
        )

    # Windows that hold more: M is what the call says all the same.
    more = {"num_max_dispatch_tokens_per_rank": 2 * MAX_TOKENS}
    dispatch(True, **more)
    few = len(case.xs[last]) - 1
    refused("x: expected at most", lambda bad: dispatch(bad, num_max_dispatch_tokens_per_rank=few))

    def combine(bad, **changes):
        given = {"x": packed, "topk_idx": idx, "topk_weights": weights, "handle": handle}
        return buffer.low_latency_combine(**{**given, **(changes if bad else {})})

    for match, change in [
        ("x: expected", {"x": packed[:, 1:]}),
        ("handle: expected", {"handle": handle[:5]}),
        ("topk_idx: expected", {"topk_idx": weights}),
        ("topk_weights: expected", {"topk_weights": None}),
        ("topk_weights|source_weights", {"topk_weights": weights[:, 1:]}),
        ("out: expected", {"out": packed[0]}),
        ("use_logfmt: expected", {"use_logfmt": True, "zero_copy": True}),
        ("zero_copy: expected", {"zero_copy": True}),
        ("combine_wait_recv_cost_stats", {"combine_wait_recv_cost_stats": weights}),
        ("async_finish: expected", {"async_finish": True, "return_recv_hook": True}),
    ]:
        refused(match, lambda bad, change=change: combine(bad, **change))
    ys, places = results_of(case, rank)
    got, _, _ = buffer.low_latency_combine(ys[rank], idx, weights, handle)
    assert same(got, weighted_sum(case, rank, ys, places))


def test_wrong_input(world):
    world(check_wrong)


def check_wrong_while_others_grow(rank, group, num_ranks, store, node_of):
    """A rank whose call has room, but is wrong, hears that the others meet to make more, and comes."""
    buffer = open_buffer(rank, num_ranks, store)
    case = make(num_ranks)
    send(buffer, case, rank)
    last = rank == num_ranks - 1
    with pytest.raises(moe_comm.ArgumentError if last else moe_comm.PeerError, match="use_ue8m0"):
        max_tokens = MAX_TOKENS if last else 3 * MAX_TOKENS
        buffer.low_latency_dispatch(
            case.xs[rank], case.idx[rank], max_tokens, case.num_experts, use_ue8m0=last, use_fp8=False
        )  # fmt: skip
    packed, count, handle, _, _ = send(buffer, case, rank)
    check_received(case, rank, packed, count, handle)


def test_wrong_while_others_grow(world, monkeypatch):
    monkeypatch.setenv("MOE_COMM_TIMEOUT_S", "10")
    world(check_wrong_while_others_grow)
