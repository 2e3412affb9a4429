"""Dispatch and combine against moe_comm.reference, bit for bit: every layout, both hops, several nodes and rounds."""

import pytest
import torch
from cases import check_dispatched, dispatch, expected, make_case, node_list, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_comm import reference

SHAPES = [(1, 1), (2, 2), (3, 3), (4, 2), (4, 1), (6, 3), (6, 2), (8, 4)]  # (R, ranks per node)
SMALL = {"hidden": 64, "topk": 3, "num_experts": 8}


def outputs_of_experts(want):
    """What experts would return: any function of the received rows."""
    return [(x.float() * 1.5 + 0.25).to(x.dtype) for x in want.x]


def check_round_trip(run_threads, case, num_ranks, ranks_per_node, hops, **options):
    want = expected(case)
    ys = outputs_of_experts(want)
    weighted = case.layout != "rank"
    bias = [torch.ones_like(x) * 0.5 for x in case.xs]
    back = reference.combine(
        ys, want.bookkeeping, weights=want.topk_weights if weighted else None, bias=bias,
        node_of=node_list(num_ranks, ranks_per_node), hops=hops,
    )  # fmt: skip

    def body(buffer, rank):
        for _ in range(3):  # three calls: both banks, and the first one again
            got = dispatch(buffer, case, rank)
            check_dispatched(got, want, rank)
            y = buffer.combine(
                ys[rank],
                got.handle,
                weights=got.topk_weights if weighted else None,
                bias=bias[rank],
            )
            assert same(y, back.x[rank])

    run_threads(body, num_ranks, ranks_per_node=ranks_per_node, hops=hops, **{**SMALL, **options})


@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(run_threads, shape, hops, layout):
    case = make_case(shape[0], layout=layout, alignment=4 if layout == "expert" else 1)
    check_round_trip(run_threads, case, *shape, hops)


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("tokens", [[40, 0, 7, 25], [0, 0, 0, 0], [0, 33, 0, 0]], ids=str)
def test_rounds(run_threads, hops, tokens):
    """Windows of a few rows: up to dozens of rounds, another number on every rank, zero on some."""
    case = make_case(4, tokens=tokens, layout="expert")
    check_round_trip(run_threads, case, 4, 2, hops, window_bytes=8 * 1024)


@pytest.mark.parametrize("routing", ["hot", "none"])
@pytest.mark.parametrize("hops", ["node", "rank"])
def test_skew(run_threads, routing, hops):
    case = make_case(4, tokens=[20, 3, 0, 11], routing=routing, none=0.0, layout="expert")
    check_round_trip(run_threads, case, 4, 2, hops)


@pytest.mark.parametrize("num_experts, topk", [(1, 1), (2, 2), (3, 1), (5, 5), (13, 8), (64, 20)])
def test_experts_that_do_not_divide(run_threads, num_experts, topk):
    """The last ranks own fewer experts, or none."""
    case = make_case(4, num_experts=num_experts, topk=topk, layout="expert", tokens=[9, 2, 0, 5])
    check_round_trip(run_threads, case, 4, 2, "node")


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("hidden", [8, 24, 520, 1032])
def test_dtypes_and_widths(run_threads, dtype, hidden):
    case = make_case(4, dtype=dtype, hidden=hidden, layout="expert")
    check_round_trip(run_threads, case, 4, 2, "node", hidden=hidden, dtype=dtype)


@pytest.mark.parametrize("scales", ["row-major", "column-major"])
@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_payload_with_scales(run_threads, dtype, layout, scales):
    case = make_case(4, hidden=128, dtype=dtype, layout=layout, scales=scales)
    want = expected(case)

    def body(buffer, rank):
        check_dispatched(dispatch(buffer, case, rank), want, rank)

    run_threads(body, 4, ranks_per_node=2, **SMALL)


def test_strided_rows(run_threads):
    """x, y, bias and out as slices of wider tensors."""
    case = make_case(2, tokens=[6, 4])
    want = expected(case)
    back = reference.combine(want.x, want.bookkeeping)

    def wide(x):
        return torch.cat([x, x.flip(1)], 1)[:, : x.shape[1]]

    def body(buffer, rank):
        got = buffer.dispatch(
            wide(case.xs[rank]), case.idx[rank], case.weights[rank], num_experts=case.num_experts
        )
        check_dispatched(got, want, rank)
        out = torch.full((case.xs[rank].shape[0], 2 * 64), 7.0, dtype=torch.bfloat16)
        y = buffer.combine(wide(got.x), got.handle, out=out[:, 64:])
        assert y.data_ptr() == out[:, 64:].data_ptr()
        assert same(y.contiguous(), back.x[rank])
        assert (out[:, :64] == 7).all()

    run_threads(body, 2, **SMALL)


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_columns(run_threads, hops, layout):
    """topk_weights given to combine come back summed, in fp32, unrounded."""
    case = make_case(4, layout=layout, tokens=[9, 0, 4, 6])
    want = expected(case)
    back = reference.combine(
        want.x, want.bookkeeping, node_of=node_list(4, 2), hops=hops, topk_weights=want.topk_weights
    )

    def body(buffer, rank):
        got = dispatch(buffer, case, rank)
        y, columns = buffer.combine(got.x, got.handle, topk_weights=got.topk_weights)
        assert same(y, back.x[rank])
        assert torch.equal(columns, back.topk_weights[rank])
        mask = case.idx[rank] >= 0  # every lane went somewhere and came back
        assert torch.equal(columns, torch.where(mask, case.weights[rank], 0.0))

    run_threads(body, 4, ranks_per_node=2, hops=hops, **SMALL)


@pytest.mark.parametrize("num_ranks, ranks_per_node", [(4, 4), (4, 2), (6, 2), (6, 3)])
@pytest.mark.parametrize("hops", ["node", "rank"])
def test_order_of_columns(run_threads, hops, num_ranks, ranks_per_node):
    """Any numbers in all of them: the ranks of a node are added first."""
    case = make_case(num_ranks, tokens=20, topk=8, num_experts=16, none=0.0)
    want = expected(case)
    g = torch.Generator().manual_seed(1)
    given = [torch.randn(len(x), 8, generator=g) for x in want.x]
    node_of = node_list(num_ranks, ranks_per_node)
    back = reference.combine(
        want.x, want.bookkeeping, node_of=node_of, hops=hops, topk_weights=given
    )

    def body(buffer, rank):
        got = dispatch(buffer, case, rank)
        _, columns = buffer.combine(got.x, got.handle, topk_weights=given[rank])
        assert torch.equal(columns, back.topk_weights[rank])

    sizes = {**SMALL, "topk": 8, "num_experts": 16}
    run_threads(body, num_ranks, ranks_per_node=ranks_per_node, hops=hops, **sizes)


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
def test_cached_dispatch(run_threads, hops, layout):
    """The same routing again, with other rows, another width and another dtype; also in rounds."""
    case = make_case(4, layout=layout, tokens=[30, 0, 11, 5])
    other = make_case(4, layout=layout, tokens=[30, 0, 11, 5], hidden=128, dtype=torch.float32)
    want = expected(case)
    other.idx, other.weights = case.idx, case.weights
    want_other = expected(other)

    def body(buffer, rank):
        first = dispatch(buffer, case, rank)
        check_dispatched(first, want, rank)
        again = buffer.dispatch(other.xs[rank], handle=first.handle, layout=layout)
        assert same(again.x, want_other.x[rank])
        assert again.handle is first.handle
        assert torch.equal(again.tokens_per_expert, want.tokens_per_expert[rank])

    run_threads(body, 4, ranks_per_node=2, hops=hops, window_bytes=32 * 1024, **SMALL)


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("scales", [None, "row-major"])
@pytest.mark.parametrize("async_op", [None, "hook"])
def test_into_given_memory(run_threads, request, hops, scales, async_op):
    """Also of a cached dispatch. What lies behind the counts is nobody's."""
    case = make_case(4, layout="padded", topk=3, num_experts=8, tokens=[7, 0, 12, 3], scales=scales)
    want = expected(case)
    moved = request.config.getoption("--through") == "far"  # there and back

    def check(got, out, rank, factor):
        if async_op:
            got()
            got = got.result
        parts = got.x if scales else (got.x,)
        wants = [want.x[rank] * factor] + ([want.scales[rank]] if scales else [])
        for part, place, right in zip(parts, out, wants, strict=True):
            assert moved or part.data_ptr() == place.data_ptr()
            for expert, count in enumerate(want.tokens_per_expert[rank].tolist()):
                assert same(part[expert, :count], right[expert, :count])
        return got.handle

    def body(buffer, rank):
        out = [torch.full(want.x[rank].shape, 7.0, dtype=torch.bfloat16)]
        x = case.xs[rank] * 2
        if scales:
            out.append(torch.full(want.scales[rank].shape, 7.0))
            x = (x, case.scales[rank])
        into = {"out": tuple(out) if scales else out[0], "async_op": async_op}
        for _ in range(2):
            handle = check(dispatch(buffer, case, rank, **into), out, rank, 1)
            check(buffer.dispatch(x, handle=handle, layout="padded", **into), out, rank, 2)

    sizes = {**SMALL, "hidden": 128}  # scales need room, too
    run_threads(body, 4, hops=hops, ranks_per_node=2, max_tokens=12, **sizes)


def test_single_rows_pass_bit_for_bit(run_threads):
    """One term is not touched: -0.0, NaN payloads and subnormals survive; so the sum starts with its first term."""
    bits = torch.tensor(
        [0x8000, 0x7FC1, 0xFFFF, 0x0001, 0x7F80, 0xFF80, 0x3F80, 0x8001], dtype=torch.int32
    )
    x = bits.to(torch.uint16).view(torch.bfloat16).repeat(2, 8)

    def body(buffer, rank):
        idx = torch.tensor([[5], [0]])
        got = buffer.dispatch(x, idx, num_experts=8)
        y = buffer.combine(got.x, got.handle)
        assert torch.equal(y.view(torch.uint16), x.view(torch.uint16))

    run_threads(body, 4, ranks_per_node=2, **SMALL)


def test_combine_is_bitwise_stable(run_threads):
    """The same sums on every run and for every C: only hops, R and G decide the order."""
    case = make_case(4, tokens=[50, 20, 0, 33], layout="expert")
    seen = []
    for window_bytes in (8 * 1024, 20 * 1024, 1 << 20):
        out = run_threads(
            lambda b, r: (lambda d: b.combine(d.x, d.handle, weights=d.topk_weights))(dispatch(b, case, r)),
            4, ranks_per_node=2, window_bytes=window_bytes, **SMALL,
        )  # fmt: skip
        seen.append(out)
    for other in seen[1:]:
        assert all(same(a, b) for a, b in zip(seen[0], other))


def test_combine_error_is_bounded_by_the_dtype(run_threads):
    """Against float64: level 0, node, total are each rounded once, relative to the sum of magnitudes."""
    case = make_case(4, tokens=[30, 20, 10, 5], layout="expert", hidden=256, topk=6, num_experts=16)

    def body(buffer, rank):
        got = dispatch(buffer, case, rank)
        return buffer.combine(got.x, got.handle, weights=got.topk_weights)

    got = run_threads(body, 4, ranks_per_node=2, hidden=256, topk=6, num_experts=16)
    for rank in range(4):
        w = torch.where(case.idx[rank] >= 0, case.weights[rank], 0.0).double().sum(1, keepdim=True)
        exact = case.xs[rank].double() * w
        bound = exact.abs() * 3 * 2.0**-8 + 1e-30
        assert ((got[rank].double() - exact).abs() <= bound).all()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape(run_threads, data):
    ranks_per_node = data.draw(st.integers(1, 3), "G")
    num_ranks = ranks_per_node * data.draw(st.integers(1, 3), "N")
    num_experts = data.draw(st.integers(1, 20), "E")
    layout = data.draw(st.sampled_from(["rank", "expert", "padded"]), "layout")
    case = make_case(
        num_ranks,
        seed=data.draw(st.integers(0, 1 << 16), "seed"),
        hidden=8 * data.draw(st.integers(1, 20), "H / 8"),
        topk=data.draw(st.integers(1, 8), "K"),
        num_experts=num_experts,
        tokens=data.draw(st.lists(st.integers(0, 25), min_size=num_ranks, max_size=num_ranks), "T"),
        layout=layout,
        alignment=data.draw(st.integers(1, 9), "alignment") if layout == "expert" else 1,
        none=data.draw(st.sampled_from([0.0, 0.3, 0.9]), "none"),
    )
    check_round_trip(
        run_threads, case, num_ranks, ranks_per_node, data.draw(st.sampled_from(["node", "rank"]), "hops"),
        window_bytes=data.draw(st.sampled_from([1 << 16, 1 << 20]), "window_bytes"),
    )  # fmt: skip
