"""TransferEngines of several processes; peers that are killed, that close, and use after close."""
# ruff: noqa: F401, F811

import os
import signal
import threading
import time

import pytest
import torch
from engines import LOST_S, engines, join, noise, transport

from moe_comm import ArgumentError, ClosedError, PeerLost, TransferEngine

# --- processes -----------------------------------------------------------------------------------


def rank_traffic(rank: int, group, transport: str) -> None:
    """Four processes: private and shared targets, messages, and a barrier nobody leaves before the last one came."""
    options = {"interface": "lo"} if transport.startswith("fabric:tcp") else {}
    with TransferEngine(
        transport, group=group, name=f"rank {rank}", timeout_s=20, **options
    ) as engine:
        assert engine.secret == group.secret
        others = engine.connect_group()
        assert [p.name for p in others] == [f"rank {r}" for r in range(4) if r != rank]
        size = 300_001
        memories = [engine.empty((4, size), torch.uint8), torch.zeros(4, size, dtype=torch.uint8)]
        descriptors = group.gather([engine.register(m).descriptor for m in memories])
        source = noise(size, rank)
        local = engine.register(source)
        for kind in range(2):
            theirs = [d[kind] for r, d in enumerate(descriptors) if r != rank]
            others.scatter(
                *(local, theirs),
                num_bytes=size,
                local_offsets=[0] * 3,
                remote_offsets=[rank * size] * 3,
                imm=kind,
            ).wait()
            engine.expect(kind, 3, peers=others).wait()
            for r in range(4):
                if r != rank:
                    assert torch.equal(memories[kind][r], noise(size, r))
        for _ in range(3):
            for peer in others:
                peer.send(b"to " + peer.name.encode())
            for _ in range(3):
                assert engine.recv()[1] == b"to rank %d" % rank
        times = []
        for n in range(4):
            time.sleep(0.05 * ((rank + n) % 4))
            came = time.monotonic()
            others.barrier()
            times.append((came, time.monotonic()))
        for each in zip(*group.gather(times), strict=True):
            assert max(came for came, _ in each) <= min(left for _, left in each)
        others.barrier()


def test_four_processes(run_ranks, transport: str) -> None:
    run_ranks(rank_traffic, 4, transport)


def rank_killed(rank: int, group, transport: str) -> None:
    options = {"interface": "lo"} if transport.startswith("fabric:tcp") else {}
    engine = TransferEngine(transport, group=group, name=f"rank {rank}", timeout_s=20, **options)
    others = engine.connect_group()
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    descriptors = group.gather(engine.register(memory).descriptor)
    local = engine.register(memory)
    if rank == 1:
        others[0].send(b"last words")
        others[0].send(b"more")
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    victim = next(p for p in others if p.name == "rank 1")
    calls = {
        0: lambda: engine.expect(1, peers=[victim]).wait(),
        2: lambda: engine.barrier([victim]),
        3: lambda: engine.recv(peer=victim),
    }
    begin = time.monotonic()
    if rank == 0:
        assert engine.recv() == (victim, b"last words")
    with pytest.raises(PeerLost, match=r"rank 1: .*(ended|lost)") as caught:
        calls[rank]()
    assert time.monotonic() - begin < 0.3 + LOST_S, caught.value
    if rank == 0:
        assert engine.recv(peer=victim) == (victim, b"more")  # what it had sent is still there
    begin = time.monotonic()
    for call in (
        lambda: engine.write(victim, local, descriptors[1], imm=1).wait(),
        lambda: engine.send(victim, b"?"),
        lambda: engine.barrier([victim]),
        lambda: engine.recv(peer=victim),
    ):
        with pytest.raises(PeerLost, match="rank 1"):
            call()
    assert time.monotonic() - begin < LOST_S
    alive = [p for p in others if p is not victim]
    group = engine.group(alive)
    group.scatter(
        *(local, [d for r, d in enumerate(descriptors) if r not in (1, rank)]),
        num_bytes=5,
        local_offsets=[0, 0],
        imm=2,
    ).wait()
    engine.expect(2, 2, peers=alive).wait()
    engine.barrier(alive)
    engine.close()


def test_killed_peer_is_lost_and_touches_no_other(run_ranks, transport: str) -> None:
    run_ranks(rank_killed, 4, transport, may_die={1})


def rank_writes_into_killed(rank: int, group, transport: str) -> None:
    """A stream of writes, into private memory, to a process that is killed in the middle."""
    options = {"interface": "lo"} if transport.startswith("fabric:tcp") else {}
    engine = TransferEngine(transport, group=group, name=f"rank {rank}", timeout_s=20, **options)
    others = engine.connect_group()
    memory = torch.zeros(4 << 20, dtype=torch.uint8)
    descriptors = group.gather(engine.register(memory).descriptor)
    if rank == 1:
        engine.expect(1, 3).wait()
        os.kill(os.getpid(), signal.SIGKILL)
    local = engine.register(memory)
    begin = time.monotonic()
    with pytest.raises(PeerLost, match="rank 1"):
        while time.monotonic() - begin < 10:
            engine.write(others[0], local, descriptors[1], imm=1).wait()
    assert time.monotonic() - begin < LOST_S


def test_killed_in_the_middle_of_writes(run_ranks, transport: str) -> None:
    run_ranks(rank_writes_into_killed, 2, transport, may_die={1})


# --- the end -------------------------------------------------------------------------------------


def test_closed_peer_is_lost_after_its_last_words(engines) -> None:
    a, b, c = engines(3)
    peers = join(a, b, c)
    descriptor = b.register(b.empty(4)).descriptor
    b.send(peers[1][0], b"bye")
    waiting = []

    def wait() -> None:
        with pytest.raises(PeerLost, match="expect: immediate 9, 0 of 1 arrived: engine 1"):
            a.expect(9, peers=[peers[0][1]]).wait()
        waiting.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    b.close()
    thread.join()
    assert waiting
    assert a.recv(peer=peers[0][1]) == (peers[0][1], b"bye")
    with pytest.raises(PeerLost):
        a.recv(peer=peers[0][1])
    begin = time.monotonic()
    with pytest.raises(PeerLost, match="write of 16 bytes: engine 1"):
        a.write(peers[0][1], a.register(torch.ones(4)), descriptor).wait()
    assert time.monotonic() - begin < LOST_S
    assert peers[0][2].lost is None
    peers[0][2].close()
    with pytest.raises(ClosedError):
        a.send(peers[0][2], b"?")


def test_use_after_close_raises(engines) -> None:
    a, b = engines(2)
    peer = join(a, b)[0][1]
    local, descriptor = a.register(torch.ones(4)), b.register(b.empty(4)).descriptor
    expectation = a.expect(1)
    ended = []

    def wait() -> None:
        with pytest.raises(ClosedError):
            a.recv()
        ended.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    a.close()
    a.close()
    thread.join(5)
    assert ended
    local.close()
    for call in (
        lambda: a.write(peer, local, descriptor),
        lambda: a.register(torch.ones(1)),
        lambda: a.connect(b.address),
        lambda: a.send(peer, b"x"),
        lambda: a.recv(),
        lambda: a.barrier([peer]),
        lambda: a.watcher(),
        lambda: a.stats(),
        lambda: expectation.wait(),
    ):
        with pytest.raises((ClosedError, ArgumentError)):
            call()
    assert "closed" in repr(a)
