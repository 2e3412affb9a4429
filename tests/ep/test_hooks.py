"""Async forms: hooks in any order, skewed programs, events, and the rule of two open calls."""

import time

import pytest
import torch
from cases import check_dispatched, dispatch, expected, make_case, node_list, same

from moe_comm import ArgumentError, PeerError, reference

OPTIONS = {"hidden": 64, "topk": 3, "num_experts": 8, "ranks_per_node": 2, "max_tokens": 12}
CASES = [make_case(4, seed=s, topk=3, num_experts=8, layout="padded") for s in range(6)]
for _case in CASES:
    _case.capacity = 48


def check(hook, case, rank):
    hook()
    check_dispatched(hook.result, expected(case), rank)
    return hook.result


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("order", ["same", "reversed", "by rank"])
def test_two_open_hooks(run_threads, order, hops):
    def body(buffer, rank):
        for step in range(4):
            a, b = CASES[step], CASES[(step + 1) % 6]
            hooks = [
                (dispatch(buffer, a, rank, async_op="hook"), a),
                (dispatch(buffer, b, rank, async_op="hook"), b),
            ]
            if order == "reversed" or (order == "by rank" and rank % 2):
                hooks.reverse()
            for hook, case in hooks:
                check(hook, case, rank)

    run_threads(body, 4, hops=hops, **OPTIONS)


@pytest.mark.parametrize("hops", ["node", "rank"])
def test_skewed_programs(run_threads, hops):
    """Even ranks: hook 0, send 2, hook 1. Odd ranks: hook 1, hook 0, send 2. Both are legal with DeepEP."""

    def body(buffer, rank):
        for _ in range(5):
            first = dispatch(buffer, CASES[0], rank, async_op="hook")
            second = dispatch(buffer, CASES[1], rank, async_op="hook")
            if rank % 2 == 0:
                check(first, CASES[0], rank)
                third = dispatch(buffer, CASES[2], rank, async_op="hook")
                check(second, CASES[1], rank)
            else:
                check(second, CASES[1], rank)
                check(first, CASES[0], rank)
                third = dispatch(buffer, CASES[2], rank, async_op="hook")
            check(third, CASES[2], rank)

    run_threads(body, 4, hops=hops, **OPTIONS)


def test_open_hook_does_not_hold_up_a_call_in_rounds(run_threads):
    """A blocking call needs the bank of an un-hooked one: the receive is done for it, and the hook still delivers."""
    long = make_case(4, tokens=[12, 7, 0, 12], topk=3, num_experts=8, hidden=512)

    def body(buffer, rank):
        hook = dispatch(buffer, CASES[0], rank, async_op="hook")
        check_dispatched(dispatch(buffer, long, rank), expected(long), rank)
        for case in CASES[1:4]:
            check_dispatched(dispatch(buffer, case, rank), expected(case), rank)
        check(hook, CASES[0], rank)

    run_threads(body, 4, **OPTIONS)


@pytest.mark.parametrize("hops", ["node", "rank"])
def test_third_open_call_raises_everywhere(run_threads, hops):
    def body(buffer, rank):
        hooks = [dispatch(buffer, CASES[i], rank, async_op="hook") for i in range(2)]
        with pytest.raises((ArgumentError, PeerError), match="call an earlier hook first"):
            dispatch(buffer, CASES[2], rank, async_op="hook")
        for i, hook in enumerate(hooks):
            check(hook, CASES[i], rank)
        check(dispatch(buffer, CASES[3], rank, async_op="hook"), CASES[3], rank)

    run_threads(body, 4, hops=hops, **OPTIONS)


def test_third_open_call_on_one_rank_only(run_threads):
    """Rank 1 forgot a hook: it raises, the others learn it at their hook, nobody takes one epoch for another."""

    def body(buffer, rank):
        hooks = [dispatch(buffer, CASES[i], rank, async_op="hook") for i in range(2)]
        if rank == 1:
            with pytest.raises(ArgumentError, match="async_op"):
                dispatch(buffer, CASES[2], rank, async_op="hook")
        else:
            check(hooks[0], CASES[0], rank)
            third = dispatch(buffer, CASES[2], rank, async_op="hook")
            with pytest.raises(PeerError, match="rank 1 raised: async_op"):
                third()
        for i, hook in enumerate(hooks):
            if rank == 1 or i == 1:
                check(hook, CASES[i], rank)
        check_dispatched(dispatch(buffer, CASES[4], rank), expected(CASES[4]), rank)

    run_threads(body, 4, **OPTIONS)


@pytest.mark.parametrize("hops", ["node", "rank"])
def test_hooked_combine(run_threads, hops):
    case = CASES[0]
    want = expected(case)
    back = reference.combine(
        want.x, want.bookkeeping, weights=want.topk_weights, node_of=node_list(4, 2), hops=hops
    )

    def body(buffer, rank):
        for _ in range(3):
            got = check(dispatch(buffer, case, rank, async_op="hook"), case, rank)
            hook = buffer.combine(got.x, got.handle, weights=got.topk_weights, async_op="hook")
            other = dispatch(buffer, CASES[1], rank, async_op="hook")
            hook()
            assert same(hook.result, back.x[rank])
            check(other, CASES[1], rank)

    run_threads(body, 4, hops=hops, **OPTIONS)


def test_input_may_change_after_a_hooked_send(run_threads):
    def body(buffer, rank):
        x = CASES[0].xs[rank].clone()
        hook = buffer.dispatch(
            x,
            CASES[0].idx[rank],
            CASES[0].weights[rank],
            num_experts=7,
            layout="padded",
            capacity=48,
            async_op="hook",
        )
        x.zero_()
        hook()
        return hook.result.x

    case = make_case(4, seed=0, topk=3, num_experts=8, layout="padded")
    case.num_experts = 7
    case.idx = [torch.where(i == 7, -1, i) for i in case.idx]
    CASES[0].idx[:] = case.idx
    case.capacity = 48
    want = expected(case)
    got = run_threads(body, 4, **OPTIONS)
    for rank in range(4):
        assert same(got[rank], want.x[rank])


@pytest.mark.host("asks the event at once")
def test_events(run_threads):
    def body(buffer, rank):
        got, event = dispatch(buffer, CASES[1], rank, async_op="event")
        event.wait()
        assert event.query()
        check_dispatched(got, expected(CASES[1]), rank)
        y, event = buffer.combine(got.x, got.handle, async_op="event")
        event.current_stream_wait()
        assert y.shape == CASES[1].xs[rank].shape

    run_threads(body, 4, **OPTIONS)


@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("late, async_op", [(1, None), (3, None), (1, "hook")])
def test_waits_are_timed_for_each_rank(run_threads, hops, late, async_op):
    after_s = 0.3

    def body(buffer, rank):
        waits = torch.zeros(4, dtype=torch.int64)
        for step in range(2):
            if rank == late:
                time.sleep(after_s)
            got = dispatch(buffer, CASES[step], rank, async_op=async_op, wait_ns=waits)
            if async_op:
                got()
                got = got.result
        before = waits.clone()
        buffer.combine(got.x, got.handle, wait_ns=waits)
        assert (waits >= before).all()
        with pytest.raises(ArgumentError, match=r"wait_ns: expected int64 \[4\]"):
            buffer.combine(got.x, got.handle, wait_ns=waits.int())
        return before

    for rank, waits in enumerate(run_threads(body, 4, hops=hops, **OPTIONS)):
        assert waits.min() >= 0
        if (
            rank != late
        ):  # whoever comes in between is not charged with it, but with its own scheduling
            relayed = [late ^ 2] if hops == "node" else []  # its rows come by way of the late one
            others = [r for r in range(4) if r not in (late, *relayed)]
            assert waits[late] > 0.9e9 * after_s and waits[others].max() < waits[late] / 2, waits


@pytest.mark.loops("they are given max_tokens")
def test_hook_needs_one_round(run_threads):
    def body(buffer, rank):
        with pytest.raises((ArgumentError, PeerError), match="async_op"):
            dispatch(buffer, CASES[0], rank, async_op="hook")
        with pytest.raises(ArgumentError, match='async_op: expected None, "event" or "hook"'):
            dispatch(buffer, CASES[0], rank, async_op="later")

    run_threads(body, 4, **{**OPTIONS, "max_tokens": None})
