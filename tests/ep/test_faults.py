"""A peer that is killed, stopped, late, or leaves: PeerLost or PeerTimeout on every survivor, in time, naming it."""

import os
import pathlib
import signal
import threading
import time

import pytest
import torch
from cases import dispatch, make_case

import moe_comm
from moe_comm import PeerLost, PeerTimeout

OPTIONS = {"hidden": 64, "topk": 3, "num_experts": 8}
TIMEOUT_S = 2.0


def _buffer(group, hops, ranks_per_node, **more):
    return moe_comm.Buffer(
        group,
        hops=hops,
        ranks_per_node=ranks_per_node,
        timeout_s=more.pop("timeout_s", TIMEOUT_S),
        **OPTIONS,
        **more,
    )


def _case(size):
    return make_case(size, tokens=[6] * size, topk=3, num_experts=8)


def _victim_dies(rank, group, hops, ranks_per_node, victim, phase, sig):
    buffer = _buffer(group, hops, ranks_per_node)
    case = _case(group.num_ranks)
    got = dispatch(buffer, case, rank)
    buffer.combine(got.x, got.handle)
    got = dispatch(buffer, case, rank) if phase == "combine" else None
    if rank == victim:
        time.sleep(0.3)  # the others are waiting by now
        os.kill(os.getpid(), sig)
        time.sleep(60)
    start = time.monotonic()
    with pytest.raises((PeerLost, PeerTimeout)) as caught:
        if phase == "combine":
            buffer.combine(got.x, got.handle)
        else:
            dispatch(buffer, case, rank)
    seconds = time.monotonic() - start
    with pytest.raises((PeerLost, PeerTimeout)) as again:  # the fault is kept
        dispatch(buffer, case, rank)
    buffer.close()
    return str(caught.value), seconds, str(again.value)


def check_blame(results, victim, phase, ranks_per_node):
    direct = 0
    for rank, result in enumerate(results):
        if rank == victim:
            continue
        text, seconds, _ = result
        assert seconds <= TIMEOUT_S + 1.0, (rank, seconds, text)
        assert f"{phase} epoch" in text, text
        direct += f"rank {victim}" in text
    # Whoever waits for the victim itself names it; who waits for a rank that gave up names that one.
    assert direct >= (len(results) - 1 + 1) // 2, [r and r[0] for r in results]


@pytest.mark.parametrize("phase", ["dispatch", "combine"])
@pytest.mark.parametrize("hops, ranks_per_node", [("node", 4), ("node", 2), ("rank", 2)])
@pytest.mark.parametrize("victim", [0, 3])
def test_killed_peer(run_ranks, hops, ranks_per_node, victim, phase):
    results = run_ranks(
        _victim_dies,
        4,
        hops,
        ranks_per_node,
        victim,
        phase,
        signal.SIGKILL,
        may_die=(victim,),
        timeout_s=30,
    )
    check_blame(results, victim, phase, ranks_per_node)


@pytest.mark.parametrize("hops, ranks_per_node", [("node", 4), ("node", 2), ("rank", 2)])
def test_stopped_peer(run_ranks, hops, ranks_per_node):
    """SIGSTOP: alive for the kernel, but its heartbeat stands still."""
    stopped = 1

    def end_it():  # once the others are gone, so that run_ranks sees the end of all
        while len(run_ranks.processes) < 4:
            time.sleep(0.1)
        others = [p for i, p in enumerate(run_ranks.processes) if i != stopped]
        for process in others:
            process.join(25)
        run_ranks.processes[stopped].kill()

    threading.Thread(target=end_it, daemon=True).start()
    results = run_ranks(
        _victim_dies,
        4,
        hops,
        ranks_per_node,
        stopped,
        "dispatch",
        signal.SIGSTOP,
        may_die=(stopped,),
        timeout_s=30,
    )
    check_blame(results, stopped, "dispatch", ranks_per_node)


def _late(rank, group, hops):
    buffer = _buffer(group, hops, 2)
    case = _case(group.num_ranks)
    dispatch(buffer, case, rank)
    if rank == 2:
        time.sleep(3 * TIMEOUT_S)  # alive, its heartbeat goes on, but it does not call
    start = time.monotonic()
    with pytest.raises((PeerTimeout, PeerLost)) as caught:
        dispatch(buffer, case, rank)
        assert (
            rank == 2
        )  # what the others had sent is complete: the late one may still have it, but nothing more
        dispatch(buffer, case, rank)
    return type(caught.value).__name__, str(caught.value), time.monotonic() - start


@pytest.mark.parametrize("hops", ["node", "rank"])
def test_late_peer(run_ranks, hops):
    results = run_ranks(_late, 4, hops, timeout_s=30)
    for rank in (0, 1, 3):
        _, text, seconds = results[rank]
        assert "rank 2" in text or "gave up" in text, text
        assert seconds < TIMEOUT_S + 1.0
    assert any(results[r][0] == "PeerTimeout" and "rank 2" in results[r][1] for r in (0, 1, 3))
    _, text, seconds = results[2]  # the late one learns at once that it was given up
    assert seconds < 2.0 and ("gave up" in text or "ended" in text), text


def _per_call_timeout(rank, group):
    buffer = _buffer(group, "node", 2, timeout_s=60)
    case = _case(group.num_ranks)
    if rank == 1:
        time.sleep(3)
        return
    start = time.monotonic()
    with pytest.raises((PeerTimeout, PeerLost)):
        dispatch(buffer, case, rank, timeout_s=0.5)
    assert time.monotonic() - start < 1.6


def test_timeout_of_one_call(run_ranks):
    run_ranks(_per_call_timeout, 4)


def _leaves(rank, group, hops):
    buffer = _buffer(group, hops, 2, timeout_s=30)
    case = _case(group.num_ranks)
    for _ in range(3):
        got = dispatch(buffer, case, rank)
        y = buffer.combine(got.x, got.handle)
    if rank == 3:
        buffer.close()  # right after its last combine: nobody may miss what it sent
        return
    start = time.monotonic()
    with pytest.raises(PeerLost) as caught:
        dispatch(buffer, case, rank)
    assert time.monotonic() - start < 4
    assert "closed its Buffer" in str(caught.value) or "gave up" in str(caught.value), str(
        caught.value
    )
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("hops", ["node", "rank"])
def test_peer_that_leaves(run_ranks, hops):
    run_ranks(_leaves, 4, hops)


def _exits_after_last_combine(rank, group, hops):
    buffer = _buffer(group, hops, 1, timeout_s=30)
    case = _case(group.num_ranks)
    for _ in range(5):
        got = dispatch(buffer, case, rank)
        y = buffer.combine(got.x, got.handle)
    buffer.close()
    return float(y.float().sum())


@pytest.mark.parametrize("hops", ["node", "rank"])
def test_everybody_exits_after_the_last_combine(run_ranks, hops):
    run_ranks(_exits_after_last_combine, 4, hops)


def _close_while_waiting(rank, group):
    buffer = _buffer(group, "node", 2, timeout_s=30)
    case = _case(group.num_ranks)
    if rank == 0:
        time.sleep(0.5)
        buffer.close()
        return
    with pytest.raises(PeerLost):
        dispatch(buffer, case, rank)


def test_close_while_others_wait(run_ranks):
    run_ranks(_close_while_waiting, 4)


def _never_calls(rank, group):
    """A rank that never makes its Buffer: the others learn who is missing."""
    short = moe_comm.EPGroup.from_store(
        group._store, rank, group.num_ranks, name="short", timeout_s=1.0
    )
    if rank == 1:
        time.sleep(3)
        return
    with pytest.raises(PeerTimeout, match=r"waited 1.0 s for ranks \[1\]"):
        moe_comm.Buffer(short, **OPTIONS)


def test_rank_that_never_joins(run_ranks):
    run_ranks(_never_calls, 2)


def _open_files():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def _made_and_closed(rank, group):
    case = _case(group.num_ranks)
    seen = []
    for _ in range(6):
        buffer = _buffer(group, "node", 2, timeout_s=30)
        got = dispatch(buffer, case, rank)
        buffer.combine(got.x, got.handle)
        group.gather(None)
        buffer.close()
        del buffer
        group.gather(None)
        seen.append(_open_files())

    def grown():
        return any(now > then for now, then in zip(seen[-1], seen[1], strict=True))

    for _ in range(500):  # Python's join returns before the kernel has forgotten a thread
        if not grown():
            break
        time.sleep(0.01)
        seen.append(_open_files())
    assert not grown(), seen  # no thread, no descriptor more from one Buffer to the next
    maps = pathlib.Path("/proc/self/maps").read_text()
    assert maps.count("moe_comm:windows") <= 2 * group.num_ranks, maps


def test_buffers_leave_nothing_behind(run_ranks):
    run_ranks(_made_and_closed, 4)


def _two_groups(rank, group):
    """Two Buffers of one group, and a second group on the same host, used in turn."""
    a, b = _buffer(group, "node", 2, timeout_s=30), _buffer(group, "rank", 2, timeout_s=30)
    case = _case(group.num_ranks)
    for _ in range(3):
        one, two = dispatch(a, case, rank), dispatch(b, case, rank)
        assert torch.equal(one.x, two.x)
        with pytest.raises((moe_comm.ArgumentError, moe_comm.PeerError)):
            b.combine(one.x, one.handle)  # another path
        b.combine(two.x, two.handle)
        a.combine(one.x, one.handle)
    assert a.engine is b.engine  # one proxy for both
    a.close()
    got = dispatch(b, case, rank)
    b.combine(got.x, got.handle)


def test_two_buffers_share_an_engine(run_ranks):
    run_ranks(_two_groups, 4)
