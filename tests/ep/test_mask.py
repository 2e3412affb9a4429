"""mask_lost: a rank that dies or is late is left out inside the call, and the others go on without an exception."""

import dataclasses
import os
import signal
import time

import pytest
import torch
from cases import check_dispatched, dispatch, expected, make_case, same
from test_generations import OPTIONS, _case, _wait_for_all, _without

import moe_comm
from moe_comm import reference

LAYOUTS = ["rank", "expert", "padded"]


def _buffer(group, ranks_per_node, timeout_s=2.0, **more):
    return moe_comm.Buffer(
        group, hops="rank", ranks_per_node=ranks_per_node, mask_lost=True, max_tokens=16, timeout_s=timeout_s,
        **OPTIONS, **more,
    )  # fmt: skip


def _of_layout(case, layout):
    return dataclasses.replace(case, layout=layout, capacity=64 if layout == "padded" else None)


def _combined(want, ys, dead):
    """What the sources get if `dead` ranks send no results."""
    copies = list(want.bookkeeping.copies)
    for d in dead:
        nothing = torch.zeros(0, dtype=torch.int64)
        copies[d] = reference.Copies(nothing, nothing, nothing)
    bookkeeping = dataclasses.replace(want.bookkeeping, copies=tuple(copies))
    return reference.combine(ys, bookkeeping, hops="rank").x


def _check(buffer, rank, dead, layout, seed=0):
    case = _of_layout(_without(_case(seed), dead), layout)
    full = _of_layout(_case(seed), layout)  # what is passed: also experts of the dead
    want = expected(case)
    got = dispatch(buffer, full, rank)
    check_dispatched(got, want, rank)
    ys = [(x.float() * 1.5).to(x.dtype) for x in want.x]
    assert same(buffer.combine(ys[rank], got.handle), _combined(want, ys, dead)[rank])
    return got, want


def _dies_between_calls(rank, group, ranks_per_node, layout, transport):
    buffer = _buffer(group, ranks_per_node, transport=transport)
    got, _ = _check(buffer, rank, (), layout)
    _wait_for_all(group, rank, range(4), "first")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for seed in range(5):
        _check(buffer, rank, (1,), layout, seed)
    assert buffer.alive() == (True, False, True, True)
    # An old handle still serves: the dead rank's rows are zeros, and its results are left out.
    case = _of_layout(_case(), layout)
    want = expected(case)
    again = buffer.dispatch(case.xs[rank], handle=got.handle, layout=layout)
    xs = [x.clone() for x in want.x]
    token = want.bookkeeping.copies[rank].token
    first = case.xs[0].shape[0]
    of_dead = (token >= first) & (token < first + case.xs[1].shape[0])
    xs[rank].view(-1, 64)[want.bookkeeping.copies[rank].row[of_dead]] = 0
    assert same(again.x, xs[rank])
    if layout == "padded":
        given, rows = torch.ones_like(xs[rank]), want.bookkeeping.copies[rank].row
        buffer.dispatch(case.xs[rank], handle=got.handle, layout=layout, out=given)
        assert same(given.view(-1, 64)[rows], xs[rank].view(-1, 64)[rows])
    assert same(buffer.combine(want.x[rank], got.handle), _combined(want, want.x, (1,))[rank])
    buffer.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_dead_rank_is_masked(run_ranks, ranks_per_node, layout):
    run_ranks(_dies_between_calls, 4, ranks_per_node, layout, None, may_die=[1])


def test_dead_rank_is_masked_over_tcp(run_ranks):
    run_ranks(_dies_between_calls, 4, 2, "rank", "fabric:tcp;ofi_rxm", may_die=[1])


def _dies_inside(rank, group, each_copy):
    """Between its dispatch and its combine: its tokens were received, its results are missing."""
    buffer = _buffer(group, 2, each_copy=each_copy)
    case = _of_layout(_case(), "padded")
    want = expected(case)
    more = {"topk_idx": case.idx[rank], "each_copy": True} if each_copy else {}
    for _ in range(3):  # so that both banks hold something of the dead
        got = dispatch(buffer, case, rank)
        check_dispatched(got, want, rank)
        buffer.combine(want.x[rank] + 1, got.handle, **more)
    got = dispatch(buffer, case, rank)
    _wait_for_all(group, rank, range(4), "first")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    y = buffer.combine(want.x[rank], got.handle, **more)
    if each_copy:
        dead_experts = [torch.where(i // 2 == 1, -1, i) for i in case.idx]
        left = dataclasses.replace(case, idx=dead_experts)
        want_left = expected(left)
        back = reference.combine_by_lane(
            want_left.x, want_left.bookkeeping, left.idx, 8, each_copy=True
        )
    else:
        back = _combined(want, want.x, (1,))
    assert same(y, back[rank])
    buffer.close()


@pytest.mark.parametrize("each_copy", [False, True])
def test_dies_between_dispatch_and_combine(run_ranks, each_copy):
    run_ranks(_dies_inside, 4, each_copy, may_die=[1])


def _dies_with_open_hooks(rank, group, ranks_per_node, order):
    """After it sent one dispatch, before it sends the next. Whoever is masked counts as no tokens from then on."""
    buffer = _buffer(group, ranks_per_node)
    first, second = (_of_layout(_case(seed), "padded") for seed in (1, 2))
    hooks = [dispatch(buffer, first, rank, async_op="hook")]
    _wait_for_all(group, rank, range(4), "first")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    hooks.append(dispatch(buffer, second, rank, async_op="hook"))
    wants = [
        expected(first if order == "in order" else _of_layout(_without(_case(1), (1,)), "padded")),
        expected(_of_layout(_without(_case(2), (1,)), "padded")),
    ]
    pairs = list(zip(hooks, wants, strict=True))
    for hook, want in pairs if order == "in order" else pairs[::-1]:
        hook()
        check_dispatched(hook.result, want, rank)
    for hook, want in pairs:
        y = buffer.combine(want.x[rank], hook.result.handle)
        assert same(y, _combined(want, want.x, (1,))[rank])
    buffer.close()


# By a link, what the dead rank had sent may not have left it.
@pytest.mark.parametrize(
    "ranks_per_node, order", [(4, "in order"), (4, "reversed"), (2, "reversed")]
)
def test_dies_with_open_hooks(run_ranks, ranks_per_node, order):
    run_ranks(_dies_with_open_hooks, 4, ranks_per_node, order, may_die=[1])


def _waits(rank, group):
    buffer = _buffer(group, 2, timeout_s=1.0)
    waits = torch.zeros(4, dtype=torch.int64)
    case = _case()
    _check(buffer, rank, (), "rank")
    _wait_for_all(group, rank, range(4), "first")
    if rank == 3:
        group.store.wait(["done/0", "done/1", "done/2"])  # it does not come
        os._exit(0)
    dispatch(buffer, case, rank, wait_ns=waits)
    assert 0.9e9 < waits[3] < 20e9 and buffer.alive() == (True, True, True, False)
    before = waits[3].item()
    got = dispatch(buffer, case, rank, wait_ns=waits)
    buffer.combine(got.x, got.handle, wait_ns=waits)
    assert 0 <= waits[3] - before < 0.9e9 and min(waits) >= 0  # nobody waits for it any more
    group.store.set(f"done/{rank}", "1")
    buffer.close()


def test_how_long_a_masked_rank_was_waited_for(run_ranks):
    run_ranks(_waits, 4, may_die=[3])


def _refuses(rank, group):
    """Wrong input beside a rank that is gone: those that are left hear of it, and the next call works."""
    buffer = _buffer(group, 2)
    _check(buffer, rank, (), "rank")
    _wait_for_all(group, rank, range(4), "first")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for seed in range(2):  # when it is not masked yet, and when it is
        case = _case(seed)
        if rank == 0:
            case.idx[0][0, 0] = 8
        error = moe_comm.ArgumentError if rank == 0 else moe_comm.PeerError
        with pytest.raises(error, match="topk_idx: expected expert ids in"):
            dispatch(buffer, case, rank)
        assert buffer.alive() == (True, False, True, True)
        _check(buffer, rank, (1,), "expert", seed)
    buffer.close()


def test_wrong_input_beside_a_dead_rank(run_ranks):
    run_ranks(_refuses, 4, may_die=[1])


def _late(rank, group, ranks_per_node):
    buffer = _buffer(group, ranks_per_node, timeout_s=1.0)
    _check(buffer, rank, (), "rank")
    pids = group.gather(os.getpid())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        case = _case()
        for _ in range(2):  # nobody sends to it any more: it is alone
            got = dispatch(buffer, case, rank)
        assert buffer.alive() == (False, True, False, False)
        own = expected(_without(case, (0, 2, 3)))
        check_dispatched(got, own, rank)
        buffer.rejoin(timeout_s=20)
    else:
        start = time.monotonic()
        for seed in range(6):
            _check(buffer, rank, (1,), "rank", seed)
        assert time.monotonic() - start < 10  # one deadline, not one for each call
        group.store.set(f"masked/{rank}", "1")
        if rank == 0:
            group.store.wait(["masked/2", "masked/3"])
            os.kill(pids[1], signal.SIGCONT)
        for seed in range(20):
            _check(buffer, rank, (1,), "rank", seed)
        buffer.recover(expect=[1], timeout_s=20)
    assert buffer.alive() == (True,) * 4
    _check(buffer, rank, (), "expert", 3)
    group.gather(None)
    buffer.close()


@pytest.mark.parametrize("ranks_per_node", [2, 4])
def test_late_rank_is_masked_and_rejoins(run_ranks, ranks_per_node):
    run_ranks(_late, 4, ranks_per_node)


def _by_hand(rank, group):
    buffer = _buffer(group, 2)
    if rank != 3:
        buffer.mask(3)
        _check(buffer, rank, (3,), "rank")
        assert buffer.alive() == (True, True, True, False)
        with pytest.raises(moe_comm.ArgumentError, match="rank: expected another rank of 4"):
            buffer.mask(rank)
    group.gather(None)
    buffer.close()


def test_mask_by_hand(run_ranks):
    run_ranks(_by_hand, 4)


def _stuck(rank, group):
    """More than sockets hold is on its way to a rank that is stopped, and stays so."""
    hidden, tokens = 1 << 18, 16
    buffer = moe_comm.Buffer(
        group, hops="rank", ranks_per_node=1, transport="fabric:tcp;ofi_rxm", mask_lost=True, max_tokens=tokens,
        timeout_s=2.0, hidden=hidden, topk=3, num_experts=3,
    )  # fmt: skip
    pids = group.gather(os.getpid())
    x = torch.full((tokens, hidden), float(rank), dtype=torch.bfloat16)
    idx = torch.arange(3).expand(tokens, 3).contiguous()
    got = buffer.dispatch(x, idx, num_experts=3)
    assert len(got.x) == 3 * tokens
    _wait_for_all(group, rank, range(3), "first")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    for _ in range(4):  # both banks, twice
        got = buffer.dispatch(x, idx, num_experts=3)
        assert buffer.alive() == (True, False, True)
        assert got.x[:, 0].tolist() == [0.0] * tokens + [2.0] * tokens
        y = buffer.combine(got.x, got.handle)
        assert same(y, 2 * x)
    group.store.set(f"done/{rank}", "1")
    group.store.wait(["done/0", "done/2"])
    if rank == 0:
        os.kill(pids[1], signal.SIGKILL)
    buffer.close()


def test_what_is_stuck_on_its_way_to_a_masked_rank(run_ranks):
    run_ranks(_stuck, 3, may_die=[1])


def _told(rank, group, ranks_per_node):
    """Who is masked learns it in its next call, long before its time is up."""
    buffer = _buffer(group, ranks_per_node, timeout_s=600.0)
    _check(buffer, rank, (), "rank")
    group.gather(None)
    if rank == 1:
        case = _case()
        for _ in range(2):  # what was on its way may still come
            got = dispatch(buffer, case, rank)
        assert buffer.alive() == (False, True, False, False)
        check_dispatched(got, expected(_without(case, (0, 2, 3))), rank)
    else:
        buffer.mask(1)
        _check(buffer, rank, (1,), "rank")
    group.gather(None)
    buffer.close()


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_who_is_masked_is_told(run_ranks, ranks_per_node):
    run_ranks(_told, 4, ranks_per_node)


def _one_sided(rank, group):
    """Ranks that do without different ranks agree on what a handle belongs to."""
    buffer = _buffer(group, 2)
    without = {0: (3,), 3: (0,)}.get(rank, ())
    for other in without:
        buffer.mask(other)
    for seed in range(3):
        case = _case(seed)
        want = expected(case)
        got = dispatch(buffer, case, rank)
        check_dispatched(got, expected(_without(case, without)), rank)
        back = buffer.combine(got.x, got.handle)
        assert same(back, _combined(want, want.x, without)[rank])
        again = buffer.dispatch(case.xs[rank], handle=got.handle)
        assert same(again.x, got.x)
    assert buffer.alive() == tuple(r not in without for r in range(4))
    group.gather(None)
    buffer.close()


def test_ranks_may_mask_different_ranks(run_ranks):
    run_ranks(_one_sided, 4)


def _wrong(rank, group):
    for more in ({"hops": "node", "max_tokens": 4}, {"hops": "rank"}):
        with pytest.raises(moe_comm.ArgumentError, match="mask_lost: expected False without"):
            moe_comm.Buffer(group, mask_lost=True, **more, **OPTIONS)
    with moe_comm.Buffer(
        group, hops="rank", mask_lost=True, max_tokens=512, window_bytes=1 << 16, **OPTIONS
    ) as small, pytest.raises(moe_comm.ArgumentError, match="mask_lost: expected window_bytes that"):  # fmt: skip
        dispatch(small, make_case(2, tokens=[3, 3], topk=3, num_experts=8), rank)
    buffer = moe_comm.Buffer(group, hops="rank", **OPTIONS)
    with pytest.raises(moe_comm.ArgumentError, match="mask_lost: expected True"):
        buffer.mask(1 - rank)
    buffer.close()


def test_wrong_use(run_ranks):
    run_ranks(_wrong, 2)
