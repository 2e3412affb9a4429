"""Dispatch and combine by device code alone, run by host threads in several processes, over the engine's proxies."""

import os
import signal
import time

import pytest
from device_rank import Rank, run_on_host

from moe_comm import PeerLost, PeerTimeout, _engine

FIRSTS = {"plain": 2, "16 bits": 2**16 - 7, "48 bits": 2**48 - 7, "64 bits": 2**64 - 7}


def why_not(name):
    for report in _engine.transports():
        if report["name"] == name:
            return "" if report["available"] else report["reason"]
    return f"{name} was not built in"


@pytest.fixture(params=["shm", "fabric:tcp;ofi_rxm"])
def transport(request):
    reason = why_not(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def _exchanges(rank, group, library, transport, first, rounds, chaos_seed):
    run_on_host(library)
    made = Rank(rank, group, transport, first, chaos_seed=chaos_seed)
    for e in range(first, first + 2 * rounds, 2):
        sources = made.dispatch(e % 2**64)
        made.combine((e + 1) % 2**64, sources)
    return made.native.transport, made.native.stats()["commands"], made.close(group)


def check(results, rounds):
    num_ranks = len(results)
    for _, own, stats in results:
        assert own == 0, "nobody used the rank's own ring"
        per_call = 2 * (num_ranks - 1) + 2  # rows, releases, two arms
        assert stats["commands"] == 2 * rounds * per_call
        assert stats["armed"] == stats["ended"] == 4 * rounds and stats["failed"] == 0


@pytest.mark.parametrize("first", FIRSTS.values(), ids=FIRSTS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_round_trips(run_ranks, library, transport, num_ranks, first):
    check(run_ranks(_exchanges, num_ranks, library._name, transport, first, 8, 0), 8)


@pytest.mark.parametrize("seed", [1, 2])
def test_shaken(run_ranks, library, transport, seed):
    """Writes late and out of order (chaos)."""
    check(run_ranks(_exchanges, 4, library._name, transport, 62, 6, seed), 6)


def test_by_efas_rules(run_ranks, library, efa_rules, monkeypatch):
    monkeypatch.setenv("MOE_COMM_LIBFABRIC", efa_rules)
    results = run_ranks(_exchanges, 3, library._name, "fabric:efa", 2**32 - 5, 6, 0)
    check(results, 6)
    assert all("efa" in name for name, _, _ in results)


# --- what goes wrong -----------------------------------------------------------------------------


def _one_never_sends(rank, group, library, transport):
    run_on_host(library)
    made = Rank(rank, group, transport, 2, timeout_s=1.0)
    made.combine(3, made.dispatch(2))
    if rank == 2:
        group.gather(None)
        made.native.stop()
        return None
    start = time.monotonic()
    with pytest.raises(PeerTimeout) as caught:
        made.dispatch(4)
    seconds = time.monotonic() - start
    with pytest.raises(PeerTimeout):  # once more, at once: the ring is spent
        made.dispatch(5)
    assert made.ring.status(1) == "aborted"
    group.gather(None)
    made.native.raise_fault()  # the engine has none
    made.native.stop()
    return str(caught.value), seconds


def test_a_peer_that_never_sends(run_ranks, library, transport):
    results = run_ranks(_one_never_sends, 3, library._name, transport)
    for rank in (0, 1):
        text, seconds = results[rank]
        assert text == (
            f"dispatch epoch 4, rank {rank} waited 1.0 s for rank 2: not complete; 2 of 2 other sources complete"
        )
        assert 1.0 <= seconds < 5.0


def _one_is_killed(rank, group, library, transport):
    run_on_host(library)
    made = Rank(rank, group, transport, 2, timeout_s=3.0)
    made.combine(3, made.dispatch(2))
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises((PeerLost, PeerTimeout), match="rank 2") as caught:
        for e in range(4, 100):
            made.dispatch(e)
    seconds = time.monotonic() - start
    assert made.ring.status(1) in ("lost", "timeout", "aborted")
    made.ring.close()
    made.native.stop()
    return type(caught.value).__name__, str(caught.value), seconds


def test_a_killed_peer(run_ranks, library, transport):
    results = run_ranks(_one_is_killed, 3, library._name, transport, may_die=(2,))
    for rank in (0, 1):
        kind, text, seconds = results[rank]
        assert seconds < 7.0, (kind, text)
        assert "rank 2" in text and f"rank {rank} waited" in text
