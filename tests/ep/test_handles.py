"""Handles: many alive, any order, across micro-batches, after newer dispatches, after the Buffer was replaced."""

import random

import pytest
from cases import dispatch, expected, make_case, node_list, same

import moe_comm
from moe_comm import Handle, reference

OPTIONS = {"hidden": 64, "topk": 3, "num_experts": 8, "ranks_per_node": 2}
CASES = [
    make_case(4, seed=s, topk=3, num_experts=8, layout=("rank", "expert")[s % 2]) for s in range(6)
]


def combined(case, hops):
    want = expected(case)
    return reference.combine(want.x, want.bookkeeping, node_of=node_list(4, 2), hops=hops).x


@pytest.mark.parametrize("hops", ["node", "rank"])
def test_many_alive_in_any_order(run_threads, hops):
    wants = [combined(case, hops) for case in CASES]

    def body(buffer, rank):
        alive = [(i, dispatch(buffer, CASES[i], rank)) for i in range(6)]
        order = random.Random(5)  # the same on every rank
        for _ in range(12):
            i, got = alive[order.randrange(len(alive))]
            assert same(buffer.combine(got.x, got.handle), wants[i][rank])

    run_threads(body, 4, hops=hops, **OPTIONS)


@pytest.mark.parametrize("hops", ["node", "rank"])
def test_after_the_buffer_was_replaced(hops, run_threads):
    """By one with smaller windows: the combine has other rounds than its dispatch had."""
    long = make_case(4, tokens=[30, 2, 0, 17], topk=3, num_experts=8, layout="expert")
    want = combined(long, hops)

    def body(buffer, rank):
        got = dispatch(buffer, long, rank)
        buffer.close()
        with moe_comm.Buffer(
            buffer.group, hops=hops, window_bytes=8192, timeout_s=20, **OPTIONS
        ) as other:
            assert same(other.combine(got.x, got.handle), want[rank])
            newer = dispatch(other, CASES[0], rank)
            assert same(other.combine(got.x, got.handle), want[rank])
            other.combine(newer.x, newer.handle)

    run_threads(body, 4, hops=hops, **OPTIONS)


def test_as_tensors(run_threads):
    """What crosses an op's boundary: a list of tensors, and back, without loss."""
    wants = combined(CASES[1], "node")

    def body(buffer, rank):
        got = dispatch(buffer, CASES[1], rank)
        again = Handle.from_tensors([t.clone() for t in got.handle.to_tensors()])
        assert same(buffer.combine(got.x, again), wants[rank])
        assert again.num_recv_rows == got.handle.num_recv_rows
        assert again.place_shape == got.handle.place_shape

    run_threads(body, 4, **OPTIONS)


def test_two_micro_batches_combined_crosswise(run_threads):
    def body(buffer, rank):
        for step in range(4):
            a, b = CASES[step], CASES[step + 1]
            one, two = dispatch(buffer, a, rank), dispatch(buffer, b, rank)
            assert same(buffer.combine(two.x, two.handle), combined(b, "node")[rank])
            assert same(buffer.combine(one.x, one.handle), combined(a, "node")[rank])

    run_threads(body, 4, **OPTIONS)


@pytest.mark.one_round
def test_an_op_never_returns_one_tensor_twice(run_threads):
    """Empty tables are shared by handles (a forwarder's and that of copies: K = G = 2), never by what an op returns."""
    case = make_case(2, topk=2, num_experts=8, tokens=[3, 2])

    def body(buffer, rank):
        handle = dispatch(buffer, case, rank).handle
        assert handle.positions is handle.forward_rows
        once, again = handle.to_tensors(), handle.to_tensors()
        empty = [t for t in (*once, *again) if not t.numel()]
        assert len({id(t) for t in empty}) == len(empty) >= 6

    run_threads(body, 2, hidden=64, topk=2, num_experts=8)
