"""Ranks that die, are masked, come back or are replaced: the survivors go on, and what they get is right."""

import os
import signal
import time

import pytest
import torch
from cases import Case, check_dispatched, dispatch, expected, make_case, same

import moe_comm
from moe_comm import PeerLost, PeerTimeout, reference

OPTIONS = {"hidden": 64, "topk": 3, "num_experts": 8}
SHAPES = [("node", 4), ("node", 2), ("rank", 2), ("rank", 1)]


def _case(seed=0, num_ranks=4):
    tokens = [6, 9, 0, 5] * (num_ranks // 4)
    return make_case(
        num_ranks, seed=seed, tokens=tokens, topk=3, num_experts=2 * num_ranks, none=0.05
    )


def _without(case, dead):
    """The same inputs where `dead` ranks have no tokens and nobody asks for their experts."""
    local = case.num_experts // len(case.xs)
    idx = []
    for rank, ids in enumerate(case.idx):
        gone = torch.zeros_like(ids, dtype=torch.bool)
        for d in dead:
            gone |= ids // local == d
        idx.append(torch.where(gone, -1, ids)[: 0 if rank in dead else None])
    keep = [slice(0, 0) if r in dead else slice(None) for r in range(len(case.xs))]
    xs = [x[k] for x, k in zip(case.xs, keep, strict=True)]
    weights = [w[k] for w, k in zip(case.weights, keep, strict=True)]
    return Case(xs, idx, weights, case.num_experts)


def _check(buffer, rank, dead, seed=0, hops="rank", node_of=None, num_ranks=4):
    """A round trip of the whole case; results as if the dead had no tokens and no experts."""
    case = _case(seed, num_ranks)
    want = expected(_without(case, dead))
    got = dispatch(buffer, case, rank)
    check_dispatched(got, want, rank)
    ys = [(x.float() * 1.5).to(x.dtype) for x in want.x]
    back = reference.combine(ys, want.bookkeeping, hops=hops, node_of=node_of)
    assert same(buffer.combine(ys[rank], got.handle), back.x[rank])
    return got.handle


def _wait_for_all(group, rank, ranks, tag):
    """A killed process takes with it what its proxy did not send yet: so after the others have it all."""
    group.store.set(f"{tag}/{rank}", "1")
    group.store.wait([f"{tag}/{r}" for r in ranks])


def _buffer(group, hops, ranks_per_node, **more):
    return moe_comm.Buffer(
        group, hops=hops, ranks_per_node=ranks_per_node, **{"timeout_s": 2.0, **OPTIONS, **more}
    )


def _nodes(ranks_per_node):
    return [r // ranks_per_node for r in range(4)]


def _one_dies(rank, group, hops, ranks_per_node, transport):
    buffer = _buffer(group, hops, ranks_per_node, transport=transport)
    old = _check(buffer, rank, (), hops=hops, node_of=_nodes(ranks_per_node))
    _wait_for_all(group, rank, range(4), "first")
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises((PeerLost, PeerTimeout)):
        for _ in range(2):
            dispatch(buffer, _case(), rank)
    start = time.monotonic()
    assert buffer.recover(timeout_s=20) == (True, True, False, True)
    seconds = time.monotonic() - start
    for seed in range(4):
        _check(buffer, rank, (2,), seed)
    with pytest.raises(
        moe_comm.ArgumentError, match="one of generation 1, got one of generation 0"
    ):
        buffer.combine(torch.zeros(old.num_places, 64, dtype=torch.bfloat16), old)
    _check(buffer, rank, (2,))  # the epoch was used by all, and it goes on
    assert buffer.alive() == (True, True, False, True)
    buffer.close()
    return seconds


@pytest.mark.parametrize("hops, ranks_per_node", SHAPES)
def test_survivors_go_on(run_ranks, hops, ranks_per_node):
    seconds = run_ranks(_one_dies, 4, hops, ranks_per_node, None, may_die=[2])
    assert max(s for s in seconds if s is not None) < 15  # nobody waited for the dead until the end


def test_survivors_go_on_over_tcp(run_ranks):
    run_ranks(_one_dies, 4, "node", 2, "fabric:tcp;ofi_rxm", may_die=[2])


def _two_die_in_turn(rank, group):
    buffer = _buffer(group, "node", 2)
    dead = []
    for victim in (3, 0):
        _check(buffer, rank, dead, hops=buffer.hops, node_of=_nodes(2))
        _wait_for_all(group, rank, [r for r in range(4) if r not in dead], victim)
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        dead.append(victim)
        with pytest.raises((PeerLost, PeerTimeout)):
            for _ in range(2):
                dispatch(buffer, _case(), rank)
        buffer.recover(timeout_s=20)
    _check(buffer, rank, dead)
    assert (buffer.generation, buffer.alive()) == (2, (False, True, True, False))
    buffer.close()


def test_two_generations(run_ranks):
    run_ranks(_two_die_in_turn, 4, may_die=[0, 3])


def _stopped(rank, group, hops, ranks_per_node):
    """Rank 1 is stopped for longer than the others wait, goes on, learns that it was left out, and rejoins."""
    buffer = _buffer(group, hops, ranks_per_node)
    _check(buffer, rank, (), hops=hops, node_of=_nodes(ranks_per_node))
    pids = group.gather(os.getpid())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        with pytest.raises(
            (PeerLost, PeerTimeout)
        ):  # its peers closed this generation, or it waits in vain
            for _ in range(2):
                dispatch(buffer, _case(), rank)
        with pytest.raises(PeerLost, match="left out of generation 1"):
            buffer.recover()
        buffer.rejoin(timeout_s=20)
    else:
        with pytest.raises((PeerLost, PeerTimeout)):
            for _ in range(2):
                dispatch(buffer, _case(), rank)
        assert buffer.recover(timeout_s=2) == (True, False, True, True)
        _check(buffer, rank, (1,), 5)
        if rank == 0:
            os.kill(pids[1], signal.SIGCONT)
        for seed in range(20):  # while its late bytes arrive
            _check(buffer, rank, (1,), seed)
        buffer.recover(expect=[1], timeout_s=20)
    assert buffer.alive() == (True,) * 4
    assert buffer.hops == hops
    for seed in range(3):
        _check(buffer, rank, (), seed, hops=hops, node_of=_nodes(ranks_per_node))
    group.gather(None)
    buffer.close()


@pytest.mark.parametrize("hops, ranks_per_node", SHAPES)
def test_stopped_rank_rejoins(run_ranks, hops, ranks_per_node):
    run_ranks(_stopped, 4, hops, ranks_per_node)


def _masked(rank, group):
    buffer = _buffer(group, "rank", 2)
    _check(buffer, rank, ())
    if rank == 3:
        with pytest.raises(PeerLost, match=r"closed its Buffer|gave up"):
            dispatch(buffer, _case(), rank)
        group.gather(None)
        buffer.rejoin(timeout_s=20)
    else:
        assert buffer.recover(mask=[3]) == (True, True, True, False)
        _check(buffer, rank, (3,))
        group.gather(None)
        buffer.recover(expect=[3], timeout_s=20)
    _check(buffer, rank, ())
    group.gather(None)
    buffer.close()


def test_masked_rank_is_told(run_ranks):
    run_ranks(_masked, 4)


def _replaced(rank, group):
    """Process 4 takes the place of rank 2, which dies."""

    def job(place):
        return moe_comm.EPGroup.from_store(group.store, place, 4, name="job", timeout_s=20)

    if rank == 4:
        group.store.wait(["dead"])
        buffer = _buffer(job(2), "node", 2, rejoin=True, timeout_s=20)
        place = 2
    else:
        place, buffer = rank, _buffer(job(rank), "node", 2)
        _check(buffer, rank, (), hops="node", node_of=_nodes(2))
        _wait_for_all(group, rank, range(4), "first")
        if rank == 2:
            group.store.set("dead", "1")
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises((PeerLost, PeerTimeout)):
            for _ in range(2):
                dispatch(buffer, _case(), rank)
        buffer.recover(expect=[2], timeout_s=20)
    assert buffer.alive() == (True,) * 4
    for seed in range(3):
        _check(buffer, place, (), seed, hops="node", node_of=_nodes(2))
    buffer.close()


def test_new_process_takes_the_place(run_ranks):
    run_ranks(_replaced, 5, may_die=[2])


def _hook_over_recovery(rank, group):
    buffer = _buffer(group, "rank", 2, max_tokens=16)
    hook = dispatch(buffer, _case(), rank, async_op="hook")
    buffer.recover()
    with pytest.raises(PeerLost, match="hook: its call was of generation 0, this is 1"):
        hook()
    _check(buffer, rank, ())
    group.gather(None)
    buffer.close()


def test_hooks_of_before_raise(run_ranks):
    run_ranks(_hook_over_recovery, 4)


def _nobody_recovers(rank, group):
    buffer = _buffer(group, "rank", 2)
    if rank == 1:
        with pytest.raises(PeerTimeout, match="nobody called recover"):
            buffer.rejoin(timeout_s=0.5)
    group.gather(None)
    if rank == 0:  # alone, and without the one that came in vain
        assert buffer.recover(timeout_s=0.5) == (True, False)
        _alone = make_case(2, tokens=[3, 0], topk=3, num_experts=8)
        dispatch(buffer, _alone, rank)
    group.gather(None)
    buffer.close()


def test_rejoining_alone_ends(run_ranks):
    run_ranks(_nobody_recovers, 2)
