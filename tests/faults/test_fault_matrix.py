"""Faults of ranks: fault x backend x hops x phase. What the ranks that are left are told, and that they can go on.

Each row: the right exception on the right ranks, within the deadline + 1 s, with phase, epoch, and the rank and node
that is to blame; results that were returned are right bit for bit; `recover` leads to calls that work; no thread,
descriptor or mapping more than before.
"""

import ctypes
import mmap
import os
import resource
import signal
import time

import pytest
from job import NUM_RANKS, VICTIM, Job, shrink_sockets

from moe_comm import PeerLost, _engine

BACKENDS = ("shm", "fabric:tcp")
HOPS = ("node", "rank")
PHASES = ("dispatch", "combine")
READER = 1  # of what rank 3 sends to the other node
SILENCE_S = 3.0  # more than the second between heartbeats to other nodes
NUM_ROWS = 64  # of a large message
SURVIVORS = tuple(r for r in range(NUM_RANKS) if r != VICTIM)


def why_not(backend):
    for report in _engine.transports():
        if report["name"].startswith(backend):
            return "" if report["available"] else report["reason"]
    return f"{backend} was not built in"


@pytest.fixture(params=BACKENDS)
def backend(request):
    if reason := why_not(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return "fabric:tcp;ofi_rxm" if request.param == "fabric:tcp" else request.param


def column(backend, hops):
    return f"{backend.split(';')[0]} {hops}"


def summary(results):
    """"PeerLost 0.2 s": the classes the survivors saw, and the slowest of them."""
    seen = [r for r in results if r is not None]
    return f"{'/'.join(sorted({r[0] for r in seen}))} {max(r[1] for r in seen):.1f} s"


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


def job_of_large_message(rank, group, *shape, **options):
    """In which the message of rank 3 to rank 1 is large, a MiB in many writes, and over tcp is not sent before it is
    read."""
    _, _, phase = shape
    tokens = [2] * NUM_RANKS
    tokens[VICTIM if phase == "dispatch" else READER] = NUM_ROWS
    os.environ["MOE_COMM_SHARD_BYTES"] = str(16 << 10)
    job = Job(rank, group, *shape, tokens=tuple(tokens), hidden=8192, **options)
    if rank in (READER, VICTIM):
        shrink_sockets()
    return job


def protect_tail(job, epoch):
    """Of the message of rank 3 to rank 1, in rank 3: whoever writes into its second half dies of it."""
    begin = job.message_at(READER, VICTIM, epoch) + NUM_ROWS // 2 * job.buffer.layout.row_bytes
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    inode = str(job.segments[READER][2])
    libc = ctypes.CDLL(None, use_errno=True)
    for line in open("/proc/self/maps"):
        addresses, _, _, _, found, *_ = line.split()
        if found == inode:
            start = int(addresses.split("-")[0], 16) + begin
            length = NUM_ROWS // 4 * job.buffer.layout.row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.PROT_READ) == 0


def arrived_in_part(job, epoch):
    """Some rows of rank 3's message are in rank 1's window, the last ones are not."""
    windows, row = job.windows_of(READER), job.buffer.layout.row_bytes
    begin = job.message_at(READER, VICTIM, epoch) + 4096
    rows = [any(windows[begin + i * row :][:256]) for i in range(NUM_ROWS - 2)]
    windows.close()
    return rows[0] and not rows[-1]


def killed_during(rank, group, *shape):
    """Some writes of its message to rank 1 are out, others are not.

    shm: its proxy dies at a certain byte of its copy. tcp: rank 1 reads nothing, until the sockets are full and rank 3
    was killed.
    """
    over_tcp = shape[0] != "shm"
    job = job_of_large_message(rank, group, *shape)
    epoch = job.buffer.native.next_epoch
    if rank == VICTIM:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if not over_tcp:
            protect_tail(job, epoch)
        job.meet("ready")
        job.call()
        raise AssertionError("it should have died")
    job.meet("ready")
    if over_tcp and rank == READER:
        job.stop_here()
    if over_tcp and rank == 0:
        job.wait_for_state(READER, "T")
        time.sleep(0.4)
        os.kill(job.pids[VICTIM], signal.SIGKILL)
        job.wait_for_state(VICTIM, "Z")
        os.kill(job.pids[READER], signal.SIGCONT)
    told = job.told(PeerLost)
    if rank == READER:
        assert arrived_in_part(job, epoch)
    job.go_on(VICTIM)
    job.close(VICTIM)
    return told


def forwarder_killed(rank, group, *shape):
    """It has sent all of its own; what it should pass on came late. Who does not need that gets a right result."""
    job = Job(rank, group, *shape)
    late = READER if job.phase == "dispatch" else 2
    if rank == VICTIM:
        job.send(async_op="hook")
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == late:
        job.wait_for_state(VICTIM, "Z")
    told = job.told(PeerLost)
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
def test_killed(run_ranks, matrix, fault, backend, hops, phase):
    results = run_ranks(
        FAULTS[fault], NUM_RANKS, backend, hops, phase, may_die=[VICTIM], timeout_s=30
    )
    matrix(fault, phase, column(backend, hops), summary(results))


# --- stopped ---------------------------------------------------------------------------------------


def stopped(rank, group, *shape):
    """For longer than the others wait, over tcp in the middle of a message, and then continued."""
    backend, hops, _ = shape
    over_tcp = backend != "shm"
    os.environ["MOE_COMM_SILENCE_S"] = str(SILENCE_S)
    job = job_of_large_message(rank, group, *shape, timeout_s=20)
    epoch = job.buffer.native.next_epoch
    job.meet("ready")
    if rank == VICTIM:
        if not over_tcp:
            job.stop_here()
        with pytest.raises(PeerLost, match=r"(dispatch|combine) epoch \d+"):
            for _ in range(2):
                job.call()
        with pytest.raises(PeerLost, match="rank 3 was left out of generation 1"):
            job.buffer.recover()
        job.buffer.rejoin(timeout_s=20)
        told = None
    else:
        if over_tcp and rank == READER:
            job.stop_here()
        if over_tcp and rank == 0:
            job.wait_for_state(READER, "T")
            time.sleep(0.4)
            os.kill(job.pids[VICTIM], signal.SIGSTOP)
            os.kill(job.pids[READER], signal.SIGCONT)
        told = job.told(PeerLost, after_s=0.4 if over_tcp else 0)
        if over_tcp and rank == READER:
            assert arrived_in_part(job, epoch)
        job.go_on(VICTIM)
        job.meet("went on", SURVIVORS)
        if rank == 0:
            os.kill(job.pids[VICTIM], signal.SIGCONT)
        for _ in range(20):  # while its late bytes arrive
            job.call(job.small)
        job.buffer.recover(expect=[VICTIM], timeout_s=20)
    job.dead, job.got = (), None
    assert job.buffer.alive() == (True,) * NUM_RANKS and job.buffer.hops == hops
    for _ in range(4):
        job.call(job.small)
    job.close()
    return told


QUICK = {("shm", "node", "dispatch"), ("shm", "rank", "combine"), ("fabric:tcp;ofi_rxm", "rank", "dispatch"),
         ("fabric:tcp;ofi_rxm", "node", "combine")}  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("hops", HOPS)
def test_stopped(run_ranks, matrix, backend, hops, phase):
    results = run_ranks(stopped, NUM_RANKS, backend, hops, phase, timeout_s=40)
    matrix("stopped and continued", phase, column(backend, hops), summary(results))
