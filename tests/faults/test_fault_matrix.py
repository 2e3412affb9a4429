"""Faults of ranks: fault x backend x hops x phase. What the ranks that are left are told, and that they can go on.

Each row: the right exception on the right ranks, within the deadline + 1 s, with phase, epoch, and the rank and node
that is to blame; results that were returned are right bit for bit; `recover` leads to calls that work; no thread,
descriptor or mapping more than before.
"""

import ctypes
import mmap
import os
import pathlib
import re
import resource
import signal
import subprocess
import time

import pytest
from job import (
    GRACE_S,
    NICS,
    NODES,
    NUM_RANKS,
    SILENCE_S,
    SLACK_S,
    SLOWNESS,
    SMALL,
    VICTIM,
    Job,
    limit_unread,
    limit_unsent,
)  # first: it knows where cases.py is

# isort: split
from rows import HOPS, PHASES, READER, SURVIVORS, column, summary

from moe_comm import PeerLost, PeerTimeout

NUM_ROWS = 64  # of a large message
WIRE = ("veth0", "veth1")  # between the two nodes' NICs: tests/soft_roce/init.sh


# --- killed ----------------------------------------------------------------------------------------


def killed_before(rank, group, *shape):
    """The others already wait for it."""
    job = Job(rank, group, *shape)
    if rank == VICTIM:
        job.hear("calling", *SURVIVORS)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    job.say("calling")
    told = job.told(PeerLost)
    job.go_on(VICTIM)
    job.close(VICTIM)
    return told


def killed_after(rank, group, *shape):
    """As soon as its own call returned: part of what it sent may still be on its way."""
    job = Job(rank, group, *shape)
    if rank == VICTIM:
        job.call()
        os.kill(os.getpid(), signal.SIGKILL)
    told = job.told(PeerLost)
    job.go_on(VICTIM)
    job.close(VICTIM)
    return told


def job_of_large_message(rank, group, *shape, message_s=4.0, **options):
    """In which the message of rank 3 to rank 1 is large, a MiB in many writes. Over tcp it is not sent before it is
    read; over verbs the wire is slow, and the NIC goes on sending whatever the ranks do."""
    backend, _, phase = shape  # message_s: of the wire
    tokens = [2] * NUM_RANKS
    tokens[VICTIM if phase == "dispatch" else READER] = NUM_ROWS
    os.environ["MOE_COMM_SHARD_BYTES"] = str(16 << 10)
    job = Job(rank, group, *shape, tokens=tuple(tokens), hidden=8192, **options)
    if rank == VICTIM and backend.startswith("fabric:tcp"):
        limit_unsent(4096)
    if rank == READER and backend.startswith("fabric:tcp"):
        limit_unread(1 << 18)
    if rank == VICTIM and backend == "verbs":
        slow_wire(message_s)
    return job


def slow_wire(seconds):
    """What leaves node 1 takes so long for a MiB.

    rxe ends no queue pair before all that it gave to the wire has left, and so no process that was killed: seconds too
    late for the others to see that it ended. Mending the wire drops what waits there.
    """
    num_bits = 8 << 20
    limit = f"rate {num_bits / seconds:.0f}bit burst 16kb limit 16mb"
    subprocess.run(
        ["tc", "qdisc", "replace", "dev", WIRE[1], "root", "tbf", *limit.split()], check=True
    )


def mend_wire():
    """As it was."""
    subprocess.run(["tc", "qdisc", "del", "dev", WIRE[1], "root"], capture_output=True)
    if "up" not in pathlib.Path(f"/sys/class/net/{WIRE[1]}/operstate").read_text():
        subprocess.run(["bash", "/run/wire_up"], check=True)


@pytest.fixture
def wire(backend):
    """For tests that do something to the wire between two NICs."""
    yield
    if backend == "verbs" and NICS:
        mend_wire()


def protect_tail(job, epoch):
    """Of the message of rank 3 to rank 1, in rank 3: whoever writes into its second half dies of it."""
    begin = job.message_at(READER, VICTIM, epoch) + NUM_ROWS // 2 * job.buffer.layout.row_bytes
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    inode, name = str(job.segment_of(READER)[2]), "/memfd:moe_comm:windows"
    libc = ctypes.CDLL(None, use_errno=True)
    end = begin + NUM_ROWS // 4 * job.buffer.layout.row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        addresses, _, offset, _, *found = line.split()
        if found[:2] == [inode, name]:
            start, stop = (int(address, 16) for address in addresses.split("-"))
            first = int(offset, 16)
            low, high = max(begin, first), min(end, first + stop - start)
            if low < high:
                at, size = ctypes.c_void_p(start + low - first), ctypes.c_size_t(high - low)
                assert libc.mprotect(at, size, mmap.PROT_READ) == 0


def arrived_in_part(job, segment, epoch):
    """Some rows of rank 3's message are in rank 1's window, where earlier messages did not reach; the last are not."""
    pid, descriptor, _, num_bytes = segment
    row = job.buffer.layout.row_bytes
    with open(f"/proc/{pid}/fd/{descriptor}", "rb") as file:
        windows = mmap.mmap(file.fileno(), num_bytes, prot=mmap.PROT_READ)
    begin = job.message_at(READER, VICTIM, epoch) + 4096
    rows = [any(windows[begin + i * row :][:256]) for i in range(max(SMALL), NUM_ROWS - 2)]
    windows.close()
    return rows[0] and not rows[-1]


def unread_bytes():
    """Of the fullest socket of this network: sent or to be sent, and not taken."""
    lines = pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]
    return max((int(line.split()[4].split(":")[0], 16) for line in lines), default=0)


def wait_for_full_sockets():
    """Until somebody's writes go no further."""
    deadline, before = time.monotonic() + 20 * SLOWNESS, 0
    while True:
        time.sleep(0.4)
        now = unread_bytes()
        if now == before and now > 1 << 14:
            return
        assert time.monotonic() < deadline, f"no socket is full: {now} bytes"
        before = now


def wait_for_a_part(job, segment, epoch):
    """Rank 0, for all."""
    deadline = time.monotonic() + 10 * SLOWNESS
    while job.rank == 0 and not arrived_in_part(job, segment, epoch):
        assert time.monotonic() < deadline, "nothing of it came"
        time.sleep(0.01)


def meet_in_the_middle(job, segment, epoch, sig):
    """Before the call of all but rank 3: it is sent `sig` when a part of its message to rank 1 is there.

    tcp: rank 1 reads nothing, until its sockets are full and rank 3 is stopped: then it reads what is on the way, which
    the end of a connection would discard, now and then. verbs: the wire is slow.
    """
    if job.backend == "verbs":
        wait_for_a_part(job, segment, epoch)
    elif job.rank == READER:
        job.stop_here()
    elif job.rank == 0:
        job.wait_for_state(READER, "T")
        wait_for_full_sockets()
    if job.rank == 0:
        if job.backend != "verbs":
            os.kill(job.pids[VICTIM], signal.SIGSTOP)
            job.wait_for_state(VICTIM, "T")
            os.kill(job.pids[READER], signal.SIGCONT)
            wait_for_a_part(job, segment, epoch)
        os.kill(job.pids[VICTIM], sig)
        job.group.store.set("signalled", str(time.monotonic()))
        if job.backend == "verbs" and sig == signal.SIGKILL:
            job.wait_until_closing(VICTIM)
            mend_wire()
        job.wait_for_state(VICTIM, "Z" if sig == signal.SIGKILL else "T")


def killed_during(rank, group, *shape):
    """Some of its writes to rank 1 are out, others are not. shm: its proxy dies at a certain byte of its copy."""
    job = job_of_large_message(rank, group, *shape)
    epoch = job.buffer.native.next_epoch
    segment = job.segment_of(READER)
    if rank == VICTIM:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if job.backend == "shm":
            protect_tail(job, epoch)
        job.meet("ready")
        job.call()
        raise AssertionError("it should have died")
    job.meet("ready")
    if job.backend != "shm":
        meet_in_the_middle(job, segment, epoch, signal.SIGKILL)
    told = job.told(PeerLost, since="signalled")
    if rank == READER:
        assert arrived_in_part(job, segment, epoch)
    job.go_on(VICTIM)
    job.close(VICTIM)
    return told


def forwarder_killed(rank, group, *shape):
    """It has sent all of its own; what it should pass on came late.

    Who needs none of that returns a right result, and raises in the next call: no rank gets further, and none gets
    less than all.
    """
    job = Job(rank, group, *shape)
    late = READER if job.phase == "dispatch" else 2
    epoch = job.buffer.native.next_epoch
    if rank == VICTIM:
        job.send(async_op="hook")
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == late:
        job.wait_for_state(VICTIM, "Z")
    told = job.told(PeerLost)
    with pytest.raises(PeerLost):
        job.send()
    returned = int(re.search(r"epoch (\d+)", told[2])[1]) - epoch
    needs_it = 2 if job.phase == "dispatch" else READER
    assert returned == (rank != needs_it), told
    job.go_on(VICTIM)
    job.close(VICTIM)
    return told


def exits_after_combine(rank, group, *shape):
    """It closes as soon as its combine returned, and ends: the others have all of that call, and learn at the next."""
    job = Job(rank, group, *shape)
    assert job.phase == "combine"
    job.call()
    if rank == VICTIM:
        job.buffer.close()
        os._exit(0)
    told = job.told(PeerLost, calls=1)
    job.go_on(VICTIM)
    job.close(VICTIM)
    return told


FAULTS = {
    "killed before its send": killed_before,
    "killed during its send": killed_during,
    "killed after its send": killed_after,
    "killed as forwarder": forwarder_killed,
}
ROWS = [
    (fault, hops)
    for fault in FAULTS
    for hops in HOPS
    if (fault, hops) != ("killed as forwarder", "rank")  # nobody forwards
]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fault, hops", ROWS)
def test_killed(run_ranks, matrix, wire, fault, backend, hops, phase):
    results = run_ranks(
        FAULTS[fault], NUM_RANKS, backend, hops, phase, may_die=[VICTIM], timeout_s=30
    )
    matrix(fault, phase, column(backend, hops), summary(results))


# --- stopped ---------------------------------------------------------------------------------------


def stopped(rank, group, *shape):
    """For longer than the others wait, between two hosts in the middle of a message, and then continued."""
    os.environ["MOE_COMM_SILENCE_S"] = str(SILENCE_S)
    job = job_of_large_message(
        rank, group, *shape, message_s=1.5 * SILENCE_S, timeout_s=20 * SLOWNESS
    )
    epoch = job.buffer.native.next_epoch
    segment = job.segment_of(READER)
    job.meet("ready")
    if rank == VICTIM:
        if job.backend == "shm":
            job.stop_here()
        with pytest.raises(PeerLost, match=r"(dispatch|combine) epoch \d+"):
            for _ in range(2):
                job.call()
        limit_unsent(1 << 18)
        with pytest.raises(PeerLost, match="rank 3 was left out of generation 1"):
            job.buffer.recover()
        job.buffer.rejoin(timeout_s=20 * SLOWNESS)
        told = None
    else:
        if job.backend != "shm":
            meet_in_the_middle(job, segment, epoch, signal.SIGSTOP)
        told = job.told(PeerLost, since="signalled")
        if rank == READER and job.backend != "shm":
            assert arrived_in_part(job, segment, epoch)
        if rank == READER and job.backend == "verbs":
            mend_wire()
        job.go_on(VICTIM, mask=[VICTIM])  # it lives: without, they would wait for it
        job.meet("went on", SURVIVORS)
        if rank == 0:
            os.kill(job.pids[VICTIM], signal.SIGCONT)
        for _ in range(5 if NICS else 20):  # while its late bytes arrive
            job.call(job.small)
        job.buffer.recover(expect=[VICTIM], timeout_s=20 * SLOWNESS)
    job.dead, job.got = (), None
    assert job.buffer.alive() == (True,) * NUM_RANKS and job.buffer.hops == job.hops
    for _ in range(4):
        job.call(job.small)
    job.close()
    return told


@pytest.mark.parametrize("hops", HOPS)
def test_exits_after_its_last_combine(run_ranks, matrix, backend, hops):
    results = run_ranks(
        exits_after_combine, NUM_RANKS, backend, hops, "combine", may_die=[VICTIM], timeout_s=30
    )
    matrix("exits after its last combine", "combine", column(backend, hops), summary(results))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("hops", HOPS)
def test_stopped(run_ranks, matrix, wire, backend, hops, phase):
    if (backend, hops, phase) == ("verbs", "rank", "combine"):
        pytest.skip("rank 2 sends as much on the wire that is slow, and its heartbeats behind it")
    results = run_ranks(stopped, NUM_RANKS, backend, hops, phase, timeout_s=40)
    matrix("stopped and continued", phase, column(backend, hops), summary(results))


def link_cut(rank, group, *shape):
    """One end of the wire goes down. Nobody dies; when it is up again, all go on."""
    os.environ["MOE_COMM_SILENCE_S"] = str(SILENCE_S)
    job = Job(rank, group, *shape, timeout_s=20 * SLOWNESS)
    if rank == VICTIM:
        subprocess.run(["ip", "link", "set", WIRE[1], "down"], check=True)
    job.meet("cut")
    start = time.monotonic()
    with pytest.raises((PeerLost, PeerTimeout), match=rf"{job.phase} epoch \d+") as caught:
        job.call()
    seconds, text = time.monotonic() - start, str(caught.value)
    assert seconds <= SILENCE_S + GRACE_S + SLACK_S, (seconds, text)
    assert f"(node {1 - NODES[rank]})" in text, text
    told = type(caught.value).__name__, seconds, text
    del caught  # it holds the frames it came through, and so the Buffer
    job.meet("told")
    if rank == VICTIM:
        mend_wire()
    job.meet("mended")
    job.go_on()
    job.close()
    return told


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("hops", HOPS)
def test_link_is_cut(run_ranks, matrix, wire, backend, hops, phase):
    """Over verbs; for fabric:tcp see test_namespaces.py."""
    if backend != "verbs" or not NICS:
        pytest.skip("needs two NICs with a wire that may be cut")
    results = run_ranks(link_cut, NUM_RANKS, backend, hops, phase, timeout_s=40)
    matrix("link cut: link down", phase, column(backend, hops), summary(results))


# --- elsewhere -------------------------------------------------------------------------------------

ELSEWHERE = {
    "full send queue": "cpp/transport_suite.cpp full_queue",
    "exhausted receive pool": "cpp/transport_suite.cpp many_immediates",
    "stale key of an engine": "cpp/transport_faults.cpp withdrawn_region",
    "refused, of an engine": "cpp/transport_suite.cpp nobody_there",
    "callback that raises": "transport/test_engine.py test_watcher_word_can_be_written_by_a_peer_and_errors_are_kept",
    "late peer": "ep/test_faults.py test_late_peer",
    "all exit after the last combine": "ep/test_faults.py test_everybody_exits_after_the_last_combine",
    "ends without close": "ep/test_lifetime.py test_process_that_ends_without_close",
    "mask instead of an error": "ep/test_mask.py test_dead_rank_is_masked",
    "killed engine": "transport/test_engine_peers.py test_killed_in_the_middle_of_writes",
}


@pytest.mark.parametrize("fault", ELSEWHERE)
def test_elsewhere(matrix, fault):
    """What is tested where there are no ranks, or was before: still there, for all backends of its suite."""
    file, name = ELSEWHERE[fault].split()
    text = (pathlib.Path(__file__).resolve().parents[1] / file).read_text()
    assert re.search(rf"^(def|void) {name}\(", text, re.MULTILINE), f"no {name} in {file}"
    matrix(fault, "", "elsewhere", f"tests/{file}: {name}")
