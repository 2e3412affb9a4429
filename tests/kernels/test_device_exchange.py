"""Dispatch and combine by device code alone, run by host threads in several processes, over the engine's proxies.

The tests of DeviceRing itself run on a GPU, too, where there is one.
"""

import os
import signal
import time

import pytest
import torch
from device_rank import Rank, run_on_host, words
from test_kernels import random_bytes

from moe_comm import ArgumentError, ClosedError, PeerLost, PeerTimeout, TransferEngine, _engine
from moe_comm.kernels import fused

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


# --- a ring and its waits ------------------------------------------------------------------------


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, library, monkeypatch):
    if request.param == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr(fused, "run", fused.run)
    monkeypatch.setattr(fused, "stream_wait", fused.stream_wait)
    run_on_host(library._name)
    return torch.device("cpu")


class Unpacked:
    """A kernel behind an armed wait: did it run?"""

    def __init__(self, ring, word):
        self.rows = random_bytes(3, 48, seed=1).to(ring.device)
        self.out = torch.zeros(3, 16, dtype=torch.int16, device=ring.device)
        self.tables = [
            t.to(ring.device) for t in (torch.arange(3, dtype=torch.int32), words([3], torch.int32))
        ]
        self.arrived = torch.zeros(1, dtype=torch.int64, device=ring.device)
        positions, count = self.tables
        arguments = fused.Unpack(
            rows=self.rows.data_ptr(), num_rows=count.data_ptr(), row_bytes=48, payload_bytes=32,
            positions=positions.data_ptr(), num_positions=1, out_x=self.out.data_ptr(),
            arrived=self.arrived.data_ptr(), waited=ring.status_address(word),
        )  # fmt: skip
        fused.launch("moe_comm_dispatch_unpack", arguments, device=ring.device)

    def ran(self):
        got, want = self.out.view(torch.uint8).cpu(), self.rows[:, :32].cpu()
        assert torch.equal(got, want) or not got.any()
        return torch.equal(got, want)


def test_stream_waits(device):
    """A wait that ends well, one that its source is late for, and those that come after it."""
    came = torch.zeros(2, dtype=torch.int64)
    with (
        TransferEngine("shm") as engine,
        engine.device_ring(device, num_words=4, timeout_s=5.0) as ring,
    ):
        late = engine.native.open_wait(
            "dispatch", "rank 0", [(came.data_ptr(), -1, "rank 1 (node 1)", 0)], []
        )
        assert ring.status(0) is None
        came[1] = 7
        behind = []
        for word, epoch in enumerate((7, 9, 7)):
            ring.arm(late, epoch, word, timeout_s=0.3)
            ring.stream_wait(word)
            behind.append(Unpacked(ring, word))
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert [ring.status(word) for word in range(4)] == ["ok", "timeout", "aborted", "aborted"]
        assert [b.ran() for b in behind] == [True, False, False]
        for _ in range(2):
            with pytest.raises(PeerTimeout) as caught:
                ring.raise_fault()
        assert str(caught.value) == (
            "dispatch epoch 9, rank 0 waited 0.3 s for rank 1 (node 1): not complete; 0 of 0 other sources complete"
        )
        engine.check()
        stats = ring.stats()
        assert (stats["armed"], stats["ended"], stats["failed"]) == (2, 2, 1)


def test_the_end_of_a_ring(device):
    with TransferEngine("shm") as engine:
        with pytest.raises(ArgumentError, match=r"num_slots: expected a power of two, .* got 3"):
            engine.device_ring(device, num_slots=3)
        ring, other = (engine.device_ring(device, num_words=2, timeout_s=5.0) for _ in range(2))
        with pytest.raises(ArgumentError, match="word: expected 0 to 1, got 2"):
            ring.status_address(2)
        came = torch.zeros(2, dtype=torch.int64)
        sources = [(came.data_ptr(), -1, "rank 1", 0)]
        never = engine.native.open_wait("dispatch", "rank 0", sources, [])
        ring.arm(never, 4)
        ring.close()
        ring.close()
        ring.stream_wait()
        ring.arm(never, 4, 1)
        ring.stream_wait(1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert [ring.status(w) for w in (0, 1)] == ["aborted"] * 2
        with pytest.raises(ClosedError, match="the ring was closed"):
            ring.raise_fault()
        other.raise_fault()
    with pytest.raises(ClosedError, match="the engine is closed"):
        other.raise_fault()
    with pytest.raises(ClosedError):
        engine.device_ring(device)


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
