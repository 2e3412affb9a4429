"""Ranks in two network namespaces: the right address is advertised, and a link that is cut is an error in time.

Each namespace is a host of its own: a `lo`, an interface that the other cannot reach (it comes first and has the lower
address, or last and the higher one), and one end of a veth pair. Two ranks in each, as two nodes, over fabric:tcp.
"""

import ctypes
import os
import pickle
import shutil
import subprocess
import time
import traceback
from pathlib import Path

import pytest
import torch.distributed as dist
from job import GRACE_S, NUM_RANKS, SILENCE_S, SLACK_S
from rows import summary, why_not

# isort: split
from cases import check_dispatched, dispatch, expected, make_case

import moe_comm
from moe_comm import MoeCommError, PeerLost, PeerTimeout

CLONE_NEWNET = 0x40000000
SPACES = {"pid": 0x20000000, "net": CLONE_NEWNET, "mnt": 0x00020000}  # of a container
TCP = "fabric:tcp;ofi_rxm"


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def wait_until_carried(names, seconds=10.0):
    """The kernel says a little later that a link is up; libfabric lists interfaces once, and not those without."""
    deadline = time.monotonic() + seconds
    for name in names:
        while " state UP " not in ip("-n", name, "-o", "link", "show", "wire0"):
            if time.monotonic() > deadline:
                raise OSError(f"wire0 of {name} is not up after {seconds} s")
            time.sleep(0.02)


@pytest.fixture
def hosts(request):
    """The names of two namespaces, mefA… and mefB…, whose veth ends have the addresses 10.98.7.1 and .2."""
    if why := why_not("fabric:tcp"):
        pytest.skip(f"fabric:tcp: {why}")
    if not shutil.which("ip"):
        pytest.skip("no ip command (Debian: apt-get install iproute2)")
    names = [f"mef{side}{os.getpid()}" for side in "AB"]
    try:
        for name in names:
            ip("netns", "add", name)
            request.addfinalizer(lambda name=name: ip("netns", "del", name))
            ip("-n", name, "link", "set", "lo", "up")

        def add_away():  # both ends here: up, with an address, and leading nowhere
            for i, name in enumerate(names):
                ip("-n", name, "link", "add", "away0", "type", "veth", "peer", "name", "away1")
                ip("-n", name, "address", "add", f"10.{99 * last + 1}.{i + 1}.1/24", "dev", "away0")
                for end in ("away0", "away1"):
                    ip("-n", name, "link", "set", end, "up")

        last = getattr(request, "param", "first") == "last"
        if not last:
            add_away()
        wire = ["link", "add", "wire0", "type", "veth", "peer", "name", "wire0", "netns", names[1]]
        ip("-n", names[0], *wire)
        for i, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.98.7.{i + 1}/24", "dev", "wire0")
            ip("-n", name, "link", "set", "wire0", "up")
        if last:
            add_away()
        wait_until_carried(names)
    except OSError as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    return names


def enter(name):
    enter_space(f"/run/netns/{name}", CLONE_NEWNET)


def enter_space(path, kind):
    with open(path) as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), kind) != 0:
            raise OSError(ctypes.get_errno(), f"setns({path})")


def open_buffer(group, hops="node", **more):
    return moe_comm.Buffer(group, hidden=64, topk=3, num_experts=8, hops=hops, transport=TCP, ranks_per_node=2,
                           window_bytes=1 << 20, **{"timeout_s": 20.0, **more})  # fmt: skip


def exchange(buffer, rank, seed=0):
    case = make_case(NUM_RANKS, seed=seed, topk=3, num_experts=8)
    got = dispatch(buffer, case, rank)
    check_dispatched(got, expected(case), rank)
    return buffer.combine(got.x, got.handle)


def two_hosts(rank, group, hosts, interfaces):
    """`interfaces`: MOE_COMM_INTERFACE of each, or None. Returns the source that was chosen."""
    enter(hosts[rank // 2])
    if interfaces:
        os.environ["MOE_COMM_INTERFACE"] = interfaces[rank // 2]
    with open_buffer(group) as buffer:
        for seed in range(4):
            exchange(buffer, rank, seed)
        group.gather(None)
        return buffer.engine.transport


@pytest.mark.parametrize(
    "hosts, interfaces",
    [
        ("first", None),
        ("last", None),
        ("first", ("wire0", "wire0")),
        ("last", ("10.98.7.1", "10.98.7.2")),
    ],
    ids=["other first", "other last", "name", "address"],
    indirect=["hosts"],
)
def test_two_hosts(run_ranks, matrix, hosts, interfaces):
    sources = run_ranks(two_hosts, NUM_RANKS, hosts, interfaces)
    matrix(
        f"two hosts, interface {'unset' if interfaces is None else interfaces[0]}",
        "open",
        "fabric:tcp node",
        "ok",
    )
    assert all("wire0" in source or "10.98.7." in source for source in sources), sources


@pytest.fixture
def containers(hosts):
    """In each of `hosts` a process that is number 1 of its own, with its own /proc. {host: its number out here}."""
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sleep", "600"]
    started, first = [], {}
    try:
        for name in hosts:
            started.append(subprocess.Popen(["ip", "netns", "exec", name, *inside]))
        for name, process in zip(hosts, started, strict=True):
            deadline = time.monotonic() + 10.0
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while not (found := children.read_text().split()):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.skip("process namespaces cannot be made here")
                time.sleep(0.02)
            first[name] = int(found[0])
        yield first
    finally:
        for process in started:
            process.kill()
            process.wait(10)


def in_container(number, work):
    """What `work()` returns in a new process of the container whose first process has this `number`."""
    reader, writer = os.pipe()
    child = (
        os.fork()
    )  # setns wants a process without threads, and only its children are of another pid namespace
    if child == 0:
        try:
            spaces = [(f"/proc/{number}/ns/{name}", kind) for name, kind in SPACES.items()]
            for path, kind in spaces:
                enter_space(path, kind)
            if os.fork() == 0:
                os.write(writer, pickle.dumps(work()))
            else:
                os.wait()
        except BaseException:
            os.write(writer, pickle.dumps(traceback.format_exc()))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        result = pickle.load(file)
    os.waitpid(child, 0)
    assert not isinstance(result, str), result  # its traceback
    return result


def two_containers(rank, group, hosts, containers, path):
    """Which transport and nodes were found by themselves, and the process number in there."""

    def work():
        group = moe_comm.EPGroup.from_store(
            dist.FileStore(path, NUM_RANKS), rank, NUM_RANKS, timeout_s=20
        )
        with moe_comm.Buffer(
            group, hidden=64, topk=3, num_experts=8, window_bytes=1 << 20, timeout_s=20.0
        ) as buffer:
            for seed in range(4):
                exchange(buffer, rank, seed)
            group.gather(None)
            return buffer.engine.transport.partition(":")[0], buffer.topology.node_of, os.getpid()

    return in_container(containers[hosts[rank // 2]], work)


def test_two_containers(run_ranks, matrix, hosts, containers, tmp_path):
    """Nothing is told: memory that cannot be mapped makes two nodes, and a network between them is found.

    Their processes have the same numbers, so whoever looks for a peer's by its number finds another.
    """
    found = run_ranks(two_containers, NUM_RANKS, hosts, containers, str(tmp_path / "inside"))
    assert [f[:2] for f in found] == [("fabric", (0, 0, 1, 1))] * NUM_RANKS, found
    numbers = [{f[2] for f in found[:2]}, {f[2] for f in found[2:]}]
    assert numbers[0] & numbers[1], f"the test is to have processes of one number: {found}"
    matrix("two containers, nothing said", "open", "fabric:tcp node", "ok")


def wrong_interface(rank, group, hosts):
    """An interface that the others cannot reach is used if it is asked for: and so they cannot connect."""
    enter(hosts[rank // 2])
    os.environ["MOE_COMM_INTERFACE"] = "away0"
    start = time.monotonic()
    with pytest.raises(MoeCommError, match=r"rank \d") as caught:
        open_buffer(group)
    return type(caught.value).__name__, time.monotonic() - start, str(caught.value)


@pytest.mark.slow
def test_unreachable_interface(run_ranks, hosts):
    run_ranks(wrong_interface, NUM_RANKS, hosts)


def link_cut(rank, group, hosts, hops, cut):
    """Nobody dies: only the bytes stop."""
    enter(hosts[rank // 2])
    os.environ["MOE_COMM_SILENCE_S"] = str(SILENCE_S)
    buffer = open_buffer(group, hops)
    exchange(buffer, rank)
    group.gather(None)
    if rank == 0:
        subprocess.run(cut, check=True)
    group.gather(None)
    start = time.monotonic()
    with pytest.raises((PeerLost, PeerTimeout), match=r"(dispatch|combine) epoch \d+") as caught:
        exchange(buffer, rank)
        exchange(buffer, rank)
    seconds, text = time.monotonic() - start, str(caught.value)
    assert seconds <= SILENCE_S + GRACE_S + SLACK_S, (seconds, text)
    other = ("(node 1)", "(node 0)")[rank // 2]
    assert other in text, (rank, text)
    buffer.close(0.1)
    return type(caught.value).__name__, seconds, text


CUTS = {
    "link down": ["ip", "link", "set", "wire0", "down"],
    "packets dropped": ["ip", "route", "replace", "blackhole", "10.98.7.2/32"],
}


@pytest.mark.parametrize(
    "cut, hops",
    [
        ("link down", "node"),
        ("packets dropped", "rank"),
        pytest.param("link down", "rank", marks=pytest.mark.slow),
        pytest.param("packets dropped", "node", marks=pytest.mark.slow),
    ],
)
def test_link_is_cut(run_ranks, matrix, hosts, hops, cut):
    results = run_ranks(link_cut, NUM_RANKS, hosts, hops, CUTS[cut])
    matrix(f"link cut: {cut}", "dispatch", f"fabric:tcp {hops}", summary(results))
