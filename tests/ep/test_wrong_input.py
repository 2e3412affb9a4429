"""Wrong input raises on every rank, names the argument, returns nothing partial, and the next call works."""

import pytest
import torch
from cases import check_dispatched, dispatch, expected, make_case

import moe_comm
from moe_comm import ArgumentError, MismatchError, PeerError

OPTIONS = {"hidden": 64, "topk": 3, "num_experts": 8, "ranks_per_node": 2}
GOOD = make_case(4, tokens=[5, 3, 0, 4], topk=3, num_experts=8)
OTHER = make_case(4, tokens=[5, 3, 0, 4], topk=3, num_experts=8, seed=1)


def good_call(buffer, rank):
    got = dispatch(buffer, GOOD, rank)
    check_dispatched(got, expected(GOOD), rank)
    buffer.combine(got.x, got.handle)


def wrong_x(**change):
    def call(buffer, rank):
        args = {
            "x": GOOD.xs[1],
            "topk_idx": GOOD.idx[1],
            "topk_weights": GOOD.weights[1],
            "num_experts": 8,
        }
        args.update({k: v(args[k]) if callable(v) else v for k, v in change.items()})
        buffer.dispatch(args.pop("x"), **args)

    return call


def with_handle(change):
    """A combine by rank 1 with something wrong; the others combine as they should."""

    def call(buffer, rank):
        got = dispatch(buffer, GOOD, rank)
        args = {"y": got.x, "handle": got.handle}
        if rank == 1:
            change(args, buffer)
        buffer.combine(args.pop("y"), args.pop("handle"), **args)

    return call


def out_in_y(args, buffer):
    y, tokens = args["y"], args["handle"].num_tokens
    both = torch.zeros(len(y) + tokens - 1, y.shape[1], dtype=y.dtype)
    args.update(y=both[: len(y)], out=both[len(y) - 1 :])  # one row in common


DISPATCHES = {
    "dtype of topk_idx": (wrong_x(topk_idx=lambda i: i.int()), "topk_idx: expected int64"),
    "shape of topk_idx": (wrong_x(topk_idx=lambda i: i[:-1]), "topk_idx: expected [3, K"),
    "1-D topk_idx": (wrong_x(topk_idx=lambda i: i.flatten()), "topk_idx: expected int64 [T, K]"),
    "no topk_idx": (wrong_x(topk_idx=None), "topk_idx: expected a tensor [T, K], got NoneType"),
    "expert id too large": (wrong_x(topk_idx=lambda i: i * 0 + torch.tensor([0, 1, 8])), "got 8 at [0, 2]"),
    "expert id below -1": (wrong_x(topk_idx=lambda i: i * 0 + torch.tensor([0, -2, 1])), "got -2 at [0, 1]"),
    "the same expert twice": (wrong_x(topk_idx=lambda i: i * 0 + torch.tensor([4, 2, 4])), "expert 4 twice at token 0"),
    "1-D x": (wrong_x(x=lambda x: x[0]), "x: expected [T, H]"),
    "x of 24 bytes": (wrong_x(x=lambda x: x[:, :12]), "x: expected rows of a multiple of 16 bytes"),
    "transposed x": (wrong_x(x=lambda x: x.t().contiguous().t()), "x: expected rows that are contiguous"),
    "x is a list": (wrong_x(x=lambda x: x.tolist()), "x"),
    "dtype of weights": (wrong_x(topk_weights=lambda w: w.double()), "topk_weights: expected float32"),
    "shape of weights": (wrong_x(topk_weights=lambda w: w[:, :2]), "topk_weights: expected float32 (3, 3)"),
    "layout": (wrong_x(layout="rows"), "layout: expected one of"),
    "alignment": (wrong_x(alignment=0), "alignment: expected an int >= 1, got 0"),
    "num_experts": (wrong_x(num_experts=0), "num_experts: expected an int >= 1, got 0"),
    "scales": (wrong_x(x=lambda x: (x, torch.ones(2, 4))), "x[1]: expected scales [3, S]"),
    "padded without capacity": (wrong_x(layout="padded"), "capacity: expected an int, or a Buffer with max_tokens"),
    "out of another layout": (wrong_x(out=torch.zeros(1, 64)), "out: expected None unless layout is 'padded'"),
    "out": (
        wrong_x(layout="padded", capacity=2048, out=torch.zeros(2, 2048, 32).bfloat16()),
        "out: expected bfloat16 (2, 2048, 64), contiguous, on the CPU",
    ),
    "out, one of a pair": (
        wrong_x(
            layout="padded", capacity=2048, x=lambda x: (x, torch.ones(3, 2)), out=torch.zeros(2, 2048, 64).bfloat16()
        ),
        "out: expected a pair if x is one",
    ),
    "meta device": (wrong_x(x=lambda x: x.to("meta")), "x: expected a CPU or CUDA tensor"),
}  # fmt: skip

COMBINES = {
    "out in y": (with_handle(out_in_y), "out: expected memory that y does not use, got a part of y"),
    "rows": (with_handle(lambda a, b: a.update(y=a["y"][:-1])), "y: expected"),
    "dtype of y": (with_handle(lambda a, b: a.update(y=a["y"].to(torch.int16))), "y: expected bfloat16"),
    "handle": (with_handle(lambda a, b: a.update(handle=3)), "handle: expected a Handle"),
    "weights with layout rank": (with_handle(lambda a, b: a.update(weights=torch.ones(3))), "weights: expected None"),
    "bias": (with_handle(lambda a, b: a.update(bias=torch.zeros(3, 63))), "bias: expected"),
    "bias dtype": (with_handle(lambda a, b: a.update(bias=torch.zeros(3, 64))), "bias: expected bfloat16 (3, 64)"),
    "out": (with_handle(lambda a, b: a.update(out=torch.zeros(3, 32).bfloat16())), "out: expected bfloat16 (3, 64)"),
    "topk_weights": (with_handle(lambda a, b: a.update(topk_weights=torch.ones(1, 3))), "topk_weights: expected"),
}  # fmt: skip


def named(cases):
    """Where another device does as well what the CPU cannot, a case is not run through it."""
    reasons = {"meta device": "is Far's own", "out in y": "y was copied before out is written"}
    marks = {c: pytest.mark.host(reason) for c, reason in reasons.items()}
    marks["padded without capacity"] = pytest.mark.loops("kernels have max_tokens")
    return [pytest.param(c, id=c, marks=marks.get(c, ())) for c in cases]


def check_all_raise(run_threads, wrong, right, text, hops, other=1):
    """`wrong` on rank `other` raises ArgumentError with `text`, the others PeerError with it; then a call works."""

    def body(buffer, rank):
        for _ in range(2):
            with pytest.raises(ArgumentError if rank == other else PeerError) as caught:
                (wrong if rank == other else right)(buffer, rank)
            assert text in str(caught.value)
            if rank != other:
                assert f"rank {other} raised" in str(caught.value)
            good_call(buffer, rank)

    run_threads(body, 4, hops=hops, **OPTIONS)


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("case", named(DISPATCHES))
def test_wrong_dispatch(run_threads, case, hops):
    wrong, text = DISPATCHES[case]
    check_all_raise(run_threads, wrong, lambda b, r: dispatch(b, GOOD, r), text, hops)


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("case", named(COMBINES))
def test_wrong_combine(run_threads, case, hops):
    call, text = COMBINES[case]
    check_all_raise(run_threads, call, call, text, hops)


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("other", range(4))
def test_whoever_it_is(run_threads, other, hops):
    """Also one that passes on what ranks before it sent."""
    wrong, text = DISPATCHES["alignment"]
    check_all_raise(run_threads, wrong, lambda b, r: dispatch(b, GOOD, r), text, hops, other)


def test_error_while_others_run_in_rounds(run_threads):
    """The wrong rank has one round, the others many: all end, all raise, the next call works."""
    case = make_case(4, tokens=[40, 3, 25, 0], topk=3, num_experts=8)

    def body(buffer, rank):
        with pytest.raises(ArgumentError if rank == 1 else PeerError):
            if rank == 1:
                buffer.dispatch(case.xs[1], case.idx[1].int(), num_experts=8)
            else:
                dispatch(buffer, case, rank)
        got = dispatch(buffer, case, rank)
        check_dispatched(got, expected(case), rank)
        with pytest.raises(ArgumentError if rank == 2 else PeerError):
            buffer.combine(got.x if rank != 2 else got.x[:0], got.handle)
        buffer.combine(got.x, got.handle)

    run_threads(body, 4, window_bytes=12 * 1024, **OPTIONS)


def disagree(change, other):
    def call(buffer, rank):
        args = {
            "x": GOOD.xs[rank],
            "topk_idx": GOOD.idx[rank],
            "num_experts": 8,
            "topk_weights": GOOD.weights[rank],
        }
        if rank == other:
            args.update(change(args))
        buffer.dispatch(args.pop("x"), **args)

    return call


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize(
    "change, text",
    [
        (lambda a: {"num_experts": 9}, "num_experts"),
        (lambda a: {"x": torch.cat([a["x"], a["x"]], 1)}, "bytes in a row"),
        (lambda a: {"x": a["x"].to(torch.float16)}, "dtype"),
        (
            lambda a: {"topk_idx": a["topk_idx"][:, :2], "topk_weights": a["topk_weights"][:, :2]},
            "topk_idx: K",
        ),
        (lambda a: {"topk_weights": None}, "topk_weights"),
        (lambda a: {"x": (a["x"], torch.ones(len(a["x"]), 2))}, "scales"),
    ],
)
@pytest.mark.parametrize("other", [1, 3])
def test_ranks_disagree(run_threads, change, text, other, hops):
    call = disagree(change, other)

    def body(buffer, rank):
        for _ in range(2):
            with pytest.raises(MismatchError) as caught:
                call(buffer, rank)
            assert text in str(caught.value)
            assert rank == other or f"rank {other} disagrees" in str(caught.value)
            good_call(buffer, rank)

    run_threads(body, 4, hops=hops, **OPTIONS)


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("other", range(4))
def test_one_combines_while_others_dispatch(run_threads, other, hops):
    def body(buffer, rank):
        got = dispatch(buffer, GOOD, rank)
        with pytest.raises(
            MismatchError, match=r"called (dispatch|combine) where this rank called"
        ):
            if rank == other:
                buffer.combine(got.x, got.handle)
            else:
                dispatch(buffer, GOOD, rank)
        good_call(buffer, rank)

    run_threads(body, 4, hops=hops, **OPTIONS)


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("other", range(4))
def test_combine_of_another_dispatch(run_threads, other, hops):
    def body(buffer, rank):
        first, second = dispatch(buffer, OTHER, rank), dispatch(buffer, GOOD, rank)
        with pytest.raises(MismatchError, match="handle") as caught:
            mine = first if rank == other else second
            buffer.combine(mine.x, mine.handle)
        assert rank == other or f"rank {other} disagrees" in str(caught.value)
        if rank != other:
            numbers = f"it passed {first.handle.number}, this rank {second.handle.number}"
            assert numbers in str(caught.value)
        good_call(buffer, rank)

    run_threads(body, 4, hops=hops, **OPTIONS)


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("other", range(4))
def test_combines_disagree(run_threads, other, hops):
    """Whoever it is that passes rows of another size: all ranks are told, by its name."""

    def body(buffer, rank):
        got = dispatch(buffer, GOOD, rank)
        y = torch.cat([got.x, got.x], 1) if rank == other else got.x
        with pytest.raises(MismatchError, match="bytes in a row") as caught:
            buffer.combine(y, got.handle)
        assert rank == other or f"rank {other} disagrees" in str(caught.value)
        good_call(buffer, rank)

    run_threads(body, 4, hops=hops, **OPTIONS)


def test_handle_of_another_group(run_threads):
    foreign = run_threads(lambda b, r: dispatch(b, GOOD, r).handle, 4, **OPTIONS)

    def body(buffer, rank):
        with pytest.raises(ArgumentError, match="handle: expected one of this group"):
            buffer.combine(torch.zeros(1, 64), foreign[rank])
        good_call(buffer, rank)

    run_threads(body, 4, **OPTIONS)


def test_more_tokens_than_max_tokens(run_threads):
    def body(buffer, rank):
        case = make_case(2, tokens=[9, 4], topk=3, num_experts=8)
        with pytest.raises(ArgumentError if rank == 0 else PeerError, match="max_tokens = 8"):
            dispatch(buffer, case, rank)

    run_threads(body, 2, max_tokens=8, hidden=64, topk=3, num_experts=8)


def test_padded_capacity_exceeded(run_threads):
    """Only the receiver can see it: it raises, the others have their result, and the next call works."""
    case = make_case(
        2, tokens=[9, 9], topk=1, num_experts=2, routing="hot", none=0.0, layout="padded"
    )
    case.capacity = 8

    def body(buffer, rank):
        if rank == 1:
            with pytest.raises(ArgumentError, match="capacity: expected at least 18"):
                dispatch(buffer, case, rank)
        else:
            dispatch(buffer, case, rank)
        case.capacity = 18
        dispatch(buffer, case, rank)

    run_threads(body, 2, hidden=64, topk=1, num_experts=2)


@pytest.mark.parametrize("hops", ["node", "rank"])
def test_more_tokens_than_a_rank_allows(run_threads, hops):
    """Each rank has as many as it allows itself; all learn who allows too few for whom."""

    def body(buffer, rank):
        for rank_that_says, least in ((3, 4), (2, 1)):
            text = f"max_tokens: rank {rank_that_says} passed {least}, rank 0 has 5 tokens"
            given = {2: 1, 3: 4} if rank_that_says == 2 else {3: 4}
            with pytest.raises(MismatchError, match=text):
                dispatch(buffer, GOOD, rank, max_tokens=given.get(rank))
            good_call(buffer, rank)
        dispatch(buffer, GOOD, rank, max_tokens=5 + rank)
        with pytest.raises(ArgumentError if rank == 1 else PeerError, match="max_tokens: expected"):
            dispatch(buffer, GOOD, rank, max_tokens=0 if rank == 1 else 5)
        good_call(buffer, rank)

    run_threads(body, 4, **OPTIONS, hops=hops)


def test_row_larger_than_the_window(run_threads):
    def body(buffer, rank):
        with pytest.raises(ArgumentError, match="window_bytes"):
            buffer.dispatch(
                torch.zeros(1, 1 << 16), torch.zeros(1, 1, dtype=torch.int64), num_experts=2
            )

    run_threads(body, 2, hidden=64, topk=1, num_experts=2, window_bytes=1 << 12)


def test_use_after_close(run_threads):
    def body(buffer, rank):
        good_call(buffer, rank)
        buffer.close()
        buffer.close()
        with pytest.raises(moe_comm.ClosedError, match="was closed"):
            dispatch(buffer, GOOD, rank)

    run_threads(body, 4, **OPTIONS)


def test_constructor_arguments(run_threads):
    groups = moe_comm.EPGroup.threads(1)
    with pytest.raises(ArgumentError, match="hops"):
        moe_comm.Buffer(groups[0], hops="both")
    with pytest.raises(ArgumentError, match="ranks_per_node: expected a divisor of 1"):
        moe_comm.Buffer(groups[0], ranks_per_node=2)
    with pytest.raises(ArgumentError, match="transport"):
        moe_comm.Buffer(groups[0], transport="carrier-pigeon")
    with pytest.raises(ArgumentError, match="group"):
        moe_comm.Buffer(17)
    with moe_comm.Buffer(groups[0], hidden=64) as buffer:
        assert "rank 0 of 1" in repr(buffer)


def _differ(rank, group):
    with pytest.raises(MismatchError, match="hidden: rank 1 passed 128, rank 0 passed 64"):
        moe_comm.Buffer(group, hidden=64 * (rank + 1))


@pytest.mark.loops("is given another hidden there")
def test_constructors_disagree(run_ranks):
    run_ranks(_differ, 2)


def _bad_environment(rank, group):
    import os

    os.environ["MOE_COMM_TIMEOUT_S"] = "soon"
    with pytest.raises(ArgumentError, match="MOE_COMM_TIMEOUT_S: expected float, got 'soon'"):
        moe_comm.Buffer(group)


def test_environment_is_checked(run_ranks):
    run_ranks(_bad_environment, 1)
