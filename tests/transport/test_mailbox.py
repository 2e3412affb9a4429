"""Messages and barriers of a TransferEngine: order, several senders, full mailboxes, one-way connections."""
# ruff: noqa: F401, F811

import random
import threading

import pytest
import torch
from engines import engines, join, meet, noise, transport

from moe_comm import PeerTimeout, TransferEngine
from moe_comm.mailbox import USER_IMMEDIATES, greeting, internal


def exchange_messages(members: list[TransferEngine], num_messages: int, most: int = 4080) -> None:
    """Everybody sends to everybody, two threads each; every message is checked, the order of each thread's, and that
    there are no more."""
    peers = join(*members)
    ranks = range(len(members))
    pairs = [(i, j) for i in ranks for j in ranks if i != j]
    errors = []

    def text(i: int, j: int, t: int, n: int) -> bytes:
        generator = random.Random(f"{i} {j} {t} {n}")
        length = generator.choice([0, 1, 50, most - 20])
        return b"%d %d %d %d|" % (i, j, t, n) + generator.randbytes(length)

    def send(i: int, j: int, t: int) -> None:
        try:
            for n in range(num_messages):
                peers[i][j].send(text(i, j, t, n))
        except BaseException as error:
            errors.append(error)

    def receive(j: int) -> None:
        try:
            expected = {(i, t): 0 for i in ranks if i != j for t in range(2)}
            while any(n < num_messages for n in expected.values()):
                peer, data = members[j].recv()
                i, t = peers[j].index(peer), int(data.split(b" ")[2])
                assert data == text(i, j, t, expected[i, t])
                expected[i, t] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=receive, args=(j,)) for j in ranks]
    threads += [threading.Thread(target=send, args=(*pair, t)) for pair in pairs for t in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    for member in members:
        with pytest.raises(PeerTimeout, match=r"recv: waited 0\.0 s"):
            member.recv(0.0)


def test_messages_of_several_senders_both_ways(engines) -> None:
    exchange_messages(engines(3), 50)


def test_messages_and_writes_over_a_network_that_reorders(engines, monkeypatch) -> None:
    monkeypatch.setenv("MOE_COMM_CHAOS_SEED", "7")
    members = engines(3, mailbox_slots=5, message_bytes=100)
    exchange_messages(members, 20, most=100)
    a, b, _ = members
    source, memory = noise(64 * 100), b.empty(64 * 100, torch.uint8)
    local, descriptor = a.register(source), b.register(memory).descriptor
    a.write_paged(a.connect(b.address), local, range(64), descriptor, range(64), 100, imm=1)
    b.expect(1, 64).wait()
    assert torch.equal(memory, source)
    for _ in range(5):
        meet(members)


def test_messages_that_overtake_each_other_wait(engines, monkeypatch) -> None:
    a, b = engines(2, mailbox_slots=4)
    peers = join(a, b)
    a.send(peers[0][1], b"first")
    b.recv()
    post, held = a._mailbox._post, []
    monkeypatch.setattr(a._mailbox, "_post", lambda writes: held.append(writes) or post([]))
    for n in range(4):
        a.send(peers[0][1], b"%d" % n)
    for writes in reversed(held):
        with pytest.raises(PeerTimeout):
            b.recv(0.01)
        post(writes).wait(5.0)
    assert [b.recv()[1] for _ in range(4)] == [b"0", b"1", b"2", b"3"]


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_full_mailbox_holds_its_sender_back(engines, slots: int) -> None:
    a, b, c = engines(3, mailbox_slots=slots)
    peers = join(a, b, c)
    for n in range(slots):
        a.send(peers[0][1], b"%d" % n)
    with pytest.raises(
        PeerTimeout, match=rf"send to engine 1: its mailbox stayed full \({slots} messages\)"
    ):
        a.send(peers[0][1], b"too many", 0.05)
    c.send(peers[2][1], b"from c")  # another sender has room of its own
    assert b.recv(peer=peers[1][2]) == (peers[1][2], b"from c")
    late = threading.Thread(target=lambda: a.send(peers[0][1], b"%d" % slots))
    late.start()
    for n in range(slots + 1):
        assert b.recv() == (peers[1][0], b"%d" % n)
    late.join()
    with pytest.raises(PeerTimeout):
        b.recv(0.0)


def test_one_way_connection_writes_but_sends_nothing(engines) -> None:
    a, b = engines(2)
    peer = a.connect(b.address)
    memory = b.empty(4)
    a.write(peer, a.register(torch.ones(4)), b.register(memory).descriptor, imm=1)
    b.expect(1).wait()
    assert memory.sum() == 4
    with pytest.raises(PeerTimeout, match="each side has to connect"):
        a.send(peer, b"hello", 0.05)
    back = b.connect(a.address)
    a.send(peer, b"hello")
    assert b.recv() == (back, b"hello")
    assert a.connect(b.address) is peer


def test_an_engine_can_talk_to_itself(engines) -> None:
    (a,) = engines(1)
    me = a.connect(a.address)
    a.send(me, b"note")
    assert a.recv() == (me, b"note")
    a.barrier([me])


def test_internal_immediates_are_apart_from_each_other() -> None:
    kinds = [
        internal(kind, section, rest)
        for kind in (4, 5, 6, 7)
        for section in (0, 1023)
        for rest in (0, 65535)
    ]
    hellos = [v for section in (0, 1023) for v in greeting(1, 2, section)]
    assert len(set(kinds + hellos)) == len(kinds + hellos)
    assert all(USER_IMMEDIATES <= v < 2 * USER_IMMEDIATES for v in kinds + hellos)
    assert greeting(1, 2, 0) != greeting(2, 1, 0)
