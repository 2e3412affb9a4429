"""TransferEngine: writes and their immediates over every transport, wrong arguments, watchers, what stays behind."""
# ruff: noqa: F401, F811

import contextlib
import gc
import importlib.machinery
import itertools
import os
import random
import subprocess
import sys
import threading
import time

import pytest
import torch
from engines import SECRET, engines, join, meet, noise, open_engine, own_threads, transport

import moe_comm
from moe_comm import ArgumentError, MoeCommError, PeerTimeout, TransferEngine, _engine
from moe_comm.engine import Write
from moe_comm.mailbox import USER_IMMEDIATES

SIZES = [1, 3, 16, 17, 255, 4097, 65535, 65537, (1 << 20) + 1, (8 << 20) - 7, 8 << 20]

# --- writes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["shared", "private"])
def test_bytes_and_immediate_arrive(engines, target: str) -> None:
    a, b = engines(2)
    peer = join(a, b)[0][1]
    room = max(SIZES) + 64
    memory = (
        b.empty(room, torch.uint8) if target == "shared" else torch.zeros(room, dtype=torch.uint8)
    )
    source = noise(room)
    with a.register(source) as local, b.register(memory) as remote:
        for i, size in enumerate(SIZES):
            memory.fill_(0xA5)
            begin, to = i % 13, 3 * i + 1
            transfer = a.write(
                *(peer, local, remote.descriptor),
                local_offset=begin,
                remote_offset=to,
                num_bytes=size,
                imm=i,
            )
            b.expect(i).wait()
            assert torch.equal(memory[to : to + size], source[begin : begin + size]), size
            assert (memory[:to] == 0xA5).all() and (memory[to + size :] == 0xA5).all(), size
            transfer.wait()
            assert transfer.done and b.count(i) == 0
        a.write(peer, local, remote.descriptor, num_bytes=0, imm=99).wait()
        b.expect(99).wait()
        assert (memory[to + size :] == 0xA5).all()


def test_dtypes_and_buffers_can_be_registered(engines) -> None:
    a, b = engines(2)
    peer = join(a, b)[0][1]
    for source in (
        torch.randn(5, 7).to(torch.bfloat16),
        torch.randn(4, 4)[1:3],
        torch.tensor(3, dtype=torch.int64),
        bytearray(b"plain bytes"),
        torch.arange(6.0).numpy(),
        torch.randn(8).to(torch.float8_e4m3fn),
    ):
        local = a.register(source)
        memory = b.empty(local.num_bytes, torch.uint8)
        a.write(peer, local, b.register(memory).descriptor, imm=1).wait()
        b.expect(1).wait()
        expected = source.reshape(-1).view(torch.uint8) if torch.is_tensor(source) else source
        assert bytes(memory.numpy()) == bytes(
            memoryview(expected).cast("B") if not torch.is_tensor(expected) else expected.numpy()
        )


def test_pages_go_where_they_belong(engines) -> None:
    a, b = engines(2)
    peer = join(a, b)[0][1]
    page, pages, stride = 24, 300, 40
    source, memory = noise(pages * stride), b.empty(pages * page + 5, torch.uint8)
    order = random.Random(1).sample(range(pages), 200)
    targets = torch.tensor(random.Random(2).sample(range(pages), 200))
    local, remote = a.register(source), b.register(memory)
    transfer = a.write_paged(
        *(peer, local, order, remote.descriptor, targets, page),
        src_stride=stride,
        remote_offset=5,
        imm=11,
    )
    b.expect(11, len(order)).wait()  # every page carries the immediate
    transfer.wait()
    expected = torch.zeros_like(memory)
    for s, d in zip(order, targets.tolist(), strict=True):
        expected[5 + page * d : 5 + page * (d + 1)] = source[stride * s : stride * s + page]
    assert torch.equal(memory, expected) and b.count(11) == 0


def test_scatter_reaches_several_peers(engines) -> None:
    a, *others = engines(4)
    peers = [a.connect(o.address) for o in others]
    source = noise(4 * 1000)
    memories = [o.empty(1000, torch.uint8) for o in others]
    descriptors = [o.register(m).descriptor for o, m in zip(others, memories, strict=True)]
    local = a.register(source)
    group = a.group(peers)
    group.scatter(local, descriptors, num_bytes=1000, imm=5).wait()
    for i, o in enumerate(others):
        o.expect(5).wait()
        assert torch.equal(memories[i], source[1000 * i : 1000 * (i + 1)])
    entries = [
        Write(p, local, d, 3000, i, 10, imm=6) for i, (p, d) in enumerate(zip(peers, descriptors))
    ]
    a.scatter(entries).wait()
    for i, o in enumerate(others):
        o.expect(6).wait()
        assert torch.equal(memories[i][i : i + 10], source[3000:3010])


def test_source_lives_until_written(engines, monkeypatch) -> None:
    monkeypatch.setenv("MOE_COMM_CHAOS_SEED", "3")  # holds writes back for a while
    a, b = engines(2)
    peer = join(a, b)[0][1]
    size, num_writes = 50_000, 30
    memory = b.empty((num_writes, size), torch.uint8)
    descriptor = b.register(memory).descriptor
    for i in range(num_writes):
        region = a.register(noise(size, i))
        a.write(peer, region, descriptor, remote_offset=i * size, imm=3)
        region.close()
        del region
    b.expect(3, num_writes).wait()
    for i in range(num_writes):
        assert torch.equal(memory[i], noise(size, i))


def test_threads_write_at_once(engines) -> None:
    a, b = engines(2)
    peer = join(a, b)[0][1]
    num_threads, num_writes, size = 3, 150, 512
    source = noise(num_threads * num_writes * size)
    memory = b.empty(source.numel(), torch.uint8)
    local, descriptor = a.register(source), b.register(memory).descriptor
    errors = []

    def write(t: int) -> None:
        try:
            for i in range(num_writes):
                at = (t * num_writes + i) * size
                a.write(
                    *(peer, local, descriptor),
                    local_offset=at,
                    remote_offset=at,
                    num_bytes=size,
                    imm=t,
                ).wait()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(t,)) for t in range(num_threads)]
    for thread in threads:
        thread.start()
    for t in range(num_threads):
        b.expect(t, num_writes, peers=b.peers).wait()
    for thread in threads:
        thread.join()
    assert not errors
    assert torch.equal(memory, source)


def test_expectations_leave_what_is_over(engines) -> None:
    a, b = engines(2)
    peer = join(a, b)[0][1]
    local, descriptor = a.register(noise(1)), b.register(b.empty(1)).descriptor
    first = b.expect(1, 3)
    assert not first.done
    with pytest.raises(PeerTimeout, match=r"immediate 1: waited 0.0 s, 0 of 3 arrived"):
        first.wait(0.0)
    top = USER_IMMEDIATES - 1
    for imm in (1, 1, 1, 1, 1, top, 0):
        a.write(peer, local, descriptor, num_bytes=1, imm=imm)
    first.wait()
    first.wait()  # takes nothing more
    b.expect(top).wait()
    b.expect(0).wait()
    deadline = time.monotonic() + 5
    while b.count(1) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert b.count(1) == 2
    with pytest.raises(PeerTimeout, match="2 of 3"):
        b.expect(1, 3).wait(0.01)
    b.expect(1, 2).wait(0.0)
    assert b.count(1) == 0


# --- wrong arguments -----------------------------------------------------------------------------


def test_wrong_arguments_name_what_is_wrong(engines, transport: str) -> None:
    a, b = engines(2)
    peer = join(a, b)[0][1]
    source, memory = noise(100), b.empty(50, torch.uint8)
    local, remote = a.register(source), b.register(memory)
    d = remote.descriptor
    closed = a.register(noise(4))
    closed.close()

    def wrong(text: str, call, *args, **kwargs) -> None:
        with pytest.raises(ArgumentError, match=text):
            call(*args, **kwargs)

    wrong("remote_offset: expected 51 bytes", a.write, peer, local, d, num_bytes=51)
    wrong("remote_offset: .* offset 1", a.write, peer, local, d, remote_offset=1, num_bytes=50)
    wrong("local_offset", a.write, peer, local, d, local_offset=60, num_bytes=50)
    wrong("local_offset", a.write, peer, local, d, local_offset=-1, num_bytes=5)
    wrong("local_offset", a.write, peer, local, d, local_offset=101)
    wrong("remote_offset", a.write, peer, local, d, remote_offset=1 << 64, num_bytes=1)
    wrong("num_bytes", a.write, peer, local, d, num_bytes=-1)
    wrong("num_bytes", a.write, peer, local, d, num_bytes=1.5)
    wrong("imm: expected 0 to", a.write, peer, local, d, num_bytes=1, imm=USER_IMMEDIATES)
    wrong("imm", a.write, peer, local, d, num_bytes=1, imm=-1)
    wrong("peer: expected a Peer of this engine", b.write, peer, remote, d)
    wrong("region: expected a Region of this engine", a.write, peer, remote, d)
    wrong("region: expected an open region", a.write, peer, closed, d)
    wrong("descriptor: expected bytes, got str", a.write, peer, local, "x")
    wrong("descriptor: expected a region's", a.write, peer, local, b"x")
    wrong("descriptor: expected a region of engine 1", a.write, peer, local, local.descriptor)
    wrong(
        r"writes\[1\].imm",
        a.scatter,
        [Write(peer, local, d, num_bytes=1), Write(peer, local, d, num_bytes=1, imm=-2)],
    )
    wrong("writes: expected at least one", a.scatter, [])
    wrong("pages_dst: .* page 5 of 10", a.write_paged, peer, local, [0, 1], d, [0, 5], 10)
    wrong("pages_src: .* page -1", a.write_paged, peer, local, [0, -1], d, [0, 1], 10)
    wrong("pages_dst: expected 2 pages", a.write_paged, peer, local, [0, 1], d, [0], 10)
    wrong("pages_src: expected 1-D integers", a.write_paged, peer, local, torch.ones(2), d, [0], 10)
    wrong("page_bytes", a.write_paged, peer, local, [0], d, [0], 0)
    wrong("memory: expected a contiguous tensor", a.register, torch.zeros(4, 4).t())
    wrong("memory: expected writable", a.register, b"fixed")
    wrong("memory: expected a tensor on the CPU", a.register, torch.zeros(4, device="meta"))
    wrong("memory: expected at least 1 byte", a.register, torch.zeros(0))
    wrong("memory: expected a tensor or a buffer, got int", a.register, 3)
    wrong("address: expected TransferEngine.address", a.connect, b"nonsense")
    wrong("data: expected at most 4080 bytes, got 4081", a.send, peer, b"x" * 4081)
    wrong("data: expected bytes, got 'text'", a.send, peer, "text")
    wrong("imm", a.expect, USER_IMMEDIATES)
    wrong("count", a.expect, 1, 0)
    wrong("timeout_s", a.expect(1).wait, -1.0)
    wrong("word: expected int64", a.watcher, torch.zeros(1))
    wrong("message_bytes", open_engine, transport, message_bytes=0)
    wrong("transport: expected", open_engine, "carrier pigeon")
    if transport != "shm":
        with open_engine("shm") as other:
            wrong("address: expected one of transport fabric", a.connect, other.address)
    assert (memory == 0).all() and a.stats()["unfinished"] == 0


def test_wrong_secret_is_refused(transport: str) -> None:
    with open_engine(transport) as a, open_engine(transport, secret=SECRET + 1, name="b") as b:
        region = b.register(b.empty(8))
        begin = time.monotonic()
        with pytest.raises(MoeCommError, match=r"connect to b: .*secret"):
            a.connect(b.address)
        assert time.monotonic() - begin < 5
        assert a.peers == [] and SECRET.to_bytes(8, "little") not in a.address + region.descriptor
        with TransferEngine(transport) as c, TransferEngine(transport) as d:
            assert c.secret != d.secret  # default: random


# --- watcher -------------------------------------------------------------------------------------


def test_watcher_sees_the_newest_value() -> None:
    with open_engine("shm") as engine:
        watcher = engine.watcher()
        assert watcher.value == 0
        with pytest.raises(PeerTimeout, match="stayed 0"):
            watcher.wait(0, 0.01)
        seen = []
        changed = threading.Event()

        def note(old: int, new: int) -> bool:
            seen.append((old, new))
            changed.set()
            return new < 1000

        watcher.watch(note)
        for _ in range(500):
            watcher.tensor += 1
        assert watcher.wait(499) == 500
        while (seen[-1:] != [] and seen[-1][1] < 500) or not seen:
            assert changed.wait(5)
            changed.clear()
        watcher.tensor.fill_(-1)
        assert watcher.wait(500) == 2**64 - 1
        watcher.close()
        assert seen[0][0] == 0 and seen[-1][1] == 2**64 - 1
        assert all(
            a[1] == b[0] for a, b in itertools.pairwise(seen)
        )  # each begins where the last ended


def test_watcher_word_can_be_written_by_a_peer_and_errors_are_kept(engines) -> None:
    a, b = engines(2)
    peer = join(a, b)[0][1]
    word = torch.zeros(1, dtype=torch.int64)
    watcher = b.watcher(word)

    def fail(old: int, new: int) -> None:
        raise ZeroDivisionError(f"from {old} to {new}")

    watcher.watch(fail)
    with pytest.raises(ArgumentError, match="callback"):
        watcher.watch(fail)
    a.write(peer, a.register(torch.tensor([5])), b.register(word).descriptor)
    assert watcher.wait(0) == 5
    with pytest.raises(ZeroDivisionError, match="from 0 to 5"):
        watcher.close()
    again = b.watcher()
    again.watch(fail)
    again.tensor += 1
    time.sleep(0.05)
    with pytest.raises(ZeroDivisionError):
        b.close()
    assert b.closed and not [name for name in own_threads() if "watcher" in name]


# --- what stays behind, what it costs ------------------------------------------------------------


def test_nothing_stays_behind(transport: str) -> None:
    def files() -> set[str]:
        links = set()
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                links.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        return links

    def use() -> None:
        with open_engine(transport) as a, open_engine(transport) as b:
            peers = join(a, b)
            assert len([name for name in own_threads() if "proxy" in name]) == others + 2
            a.send(peers[0][1], b"x")
            assert b.recv()[1] == b"x"
            watcher = a.watcher()
            watcher.watch(lambda old, new: None)
        assert len(own_threads()) == others

    others = len(own_threads())  # of Buffers of other tests
    use()  # what a library opens once and keeps
    gc.collect()
    before, shm = files(), set(os.listdir("/dev/shm"))
    use()
    gc.collect()
    assert len(files()) <= len(before), files() - before
    assert set(os.listdir("/dev/shm")) <= shm


SMALL_SHM = """
import os, torch
from moe_comm import TransferEngine
space = os.statvfs("/dev/shm")
assert space.f_blocks * space.f_frsize <= 1 << 20
with TransferEngine("shm", secret=1) as a, TransferEngine("shm", secret=1) as b:
    size = 200 << 20
    memory = b.empty(size, torch.uint8)
    source = a.empty(size // 8, torch.int64)
    torch.arange(size // 8, out=source)
    a.write(a.connect(b.address), a.register(source), b.register(memory).descriptor, imm=1).wait()
    b.expect(1).wait(10)
    assert torch.equal(memory.view(torch.int64), source)
assert os.listdir("/dev/shm") == []
"""


def test_size_of_dev_shm_is_no_limit() -> None:
    mount = ["unshare", "--mount", "--map-root-user"] if os.getuid() else ["unshare", "--mount"]
    shell = 'mount -t tmpfs -o size=1M tmpfs /dev/shm && exec "$@"'
    try:
        possible = subprocess.run([*mount, "sh", "-c", shell, "sh", "true"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs unshare (util-linux)")
    if possible.returncode:
        pytest.skip(f"cannot mount a small /dev/shm: {possible.stderr.decode().strip()}")
    command = [*mount, "sh", "-c", shell, "sh", sys.executable, "-c", SMALL_SHM]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


NO_TORCH = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("moe_comm._engine", sys.argv[1])
engine = importlib.util.module_from_spec(spec)
spec.loader.exec_module(engine)
a, b = engine.Engine(secret=3), engine.Engine(secret=3)
memory = engine.SharedBuffer(64)
peer = a.connect(b.address)
a.wait_ready(peer, 5.0)
source = engine.SharedBuffer(64)
memoryview(source)[:5] = b"bytes"
write = (peer, a.register(source.address, 64), 0, 64, b.describe(b.register(memory.address, 64)), 0, 1)
assert a.write([write]).wait(5.0) and b.take_immediates(1, 1, 5.0)
assert bytes(memoryview(memory)[:5]) == b"bytes"
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"torch", "numpy"}, loaded
"""


def test_engine_works_without_torch() -> None:
    assert isinstance(_engine.__loader__, importlib.machinery.ExtensionFileLoader)
    command = [sys.executable, "-S", "-c", NO_TORCH, _engine.__file__]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def proxy_seconds() -> float:
    """CPU time of all proxy threads of this process so far."""
    total = 0.0
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            with open(f"/proc/self/task/{task}/comm") as comm:
                if comm.read().strip() != "moe_comm:proxy":
                    continue
            with open(f"/proc/self/task/{task}/schedstat") as stat:
                total += int(stat.read().split()[0]) / 1e9
    return total


def test_parked_proxy_uses_no_cpu(engines, record_property) -> None:
    a, b = engines(2)
    join(a, b)
    meet([a, b])
    time.sleep(0.2)
    shares: list[float] = []
    while len(shares) < 5 and min(shares, default=1.0) >= 0.03:  # others may disturb it
        begin, used = time.monotonic(), proxy_seconds()
        time.sleep(1.0)
        shares.append((proxy_seconds() - used) / (time.monotonic() - begin) / 2)
    share = min(shares)
    record_property("share_of_a_core", share)
    print(f"one parked proxy: {share:.2%} of a core")
    assert share < 0.03


def test_public_name() -> None:
    assert moe_comm.TransferEngine is TransferEngine


LOOKS_AT_SIGNALS = """
import os, signal, sys
from moe_comm import _engine

def caught():
    lines = open("/proc/self/status").read().splitlines()
    return next(line for line in lines if line.startswith("SigCgt"))

before = caught()
_engine.transports()
assert caught() == before, (before, caught())
for name in sys.argv[1:]:
    engine = _engine.Engine(transport=name, interface="", secret=1, shard_bytes=0, chaos_seed=0)
    assert caught() == before, (name, before, caught())
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    print("interrupted")
"""


def test_signal_handlers_stay(tmp_path):
    """What libfabric loads installs handlers of its own: Ctrl-C would no longer be an exception."""
    names = [t["name"] for t in _engine.transports() if t["available"]]
    done = subprocess.run(
        [sys.executable, "-c", LOOKS_AT_SIGNALS, *names],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == "interrupted\n", done.stderr
    assert not list(tmp_path.iterdir())
