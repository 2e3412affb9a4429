"""Faults that nobody dies of, and of opening: damaged headers, other parameters, memory, keys, secrets, connections.

Each row as in test_fault_matrix.py; everybody stays alive, and all go on together.
"""

import ctypes
import dataclasses
import mmap
import os
import pathlib
import random
import resource
import signal
import struct
import time

import pytest
from job import (
    GRACE_S,
    NICS,
    NUM_RANKS,
    SLACK_S,
    SLOWNESS,
    TIMEOUT_S,
    VICTIM,
    Job,
    use_nic,
)  # first: it knows where cases.py is

# isort: split
from cases import dispatch
from rows import HOPS, PHASES, READER, column, summary

import moe_comm
from moe_comm import MismatchError, MoeCommError, PeerLost, PeerTimeout, TransportError

HEADER_BYTES = 256


# --- one job for several: everybody stays alive, and all go on together ----------------------------


def garbage(windows, at, seed):
    windows[at : at + HEADER_BYTES] = random.Random(seed).randbytes(HEADER_BYTES)


def huge_counts(windows, at, seed):
    """rows, rounds, tokens and total rows, as a peer with a bug of its own might leave them."""
    windows[at + 20 : at + 36] = b"\xff" * 16


def other_epoch(windows, at, seed):
    windows[at] ^= 2


def other_counts(windows, at, seed):
    """Of rows for each expert, behind the header of a dispatch."""
    windows[at + HEADER_BYTES : at + HEADER_BYTES + 8] = b"\xff\xff\xff\x3f" * 2


def damaged_header(job, reader, damage):
    """Rank 3 writes over the header that it sent, before anybody looked at it."""
    epoch = job.buffer.native.next_epoch
    hook, tag = None, f"{job.phase} {damage.__name__} {reader}"
    windows = job.windows_of(reader)
    if job.phase == "combine" and reader == READER and job.rank == 2:
        hook = job.send(async_op="hook")  # rank 3 adds to this what it sends, and waits for it
    if job.rank == VICTIM:
        at = job.message_at(reader, VICTIM, epoch)
        hook = job.send(async_op="hook")
        deadline = time.monotonic() + 5 * SLOWNESS
        while windows[at : at + 8] != epoch.to_bytes(8, "little"):
            assert time.monotonic() < deadline, "its message did not arrive"
            time.sleep(0.001)
        damage(windows, at, epoch)
    job.meet(tag)
    told = job.told((TransportError, PeerLost), hook=hook)
    if job.rank == reader:
        assert told[0] == "TransportError", told
    return told


def other_parameters(job):
    """Rank 3 passes something else. The call is over everywhere, and no recovery is needed."""
    start = time.monotonic()
    with pytest.raises(
        MismatchError, match=f"{job.phase} epoch {job.buffer.native.next_epoch}: rank "
    ) as caught:
        if job.phase == "dispatch":
            case = job.case
            if job.rank == VICTIM:
                case = dataclasses.replace(case, num_experts=12)
            dispatch(job.buffer, case, job.rank)
        else:
            y = job.got.x.float() if job.rank == VICTIM else job.got.x
            job.buffer.combine(y, job.got.handle)
    told = type(caught.value).__name__, time.monotonic() - start, str(caught.value)
    if job.rank != VICTIM:
        assert "rank 3" in told[2] and ("num_experts" in told[2] or "dtype" in told[2]), told[2]
    job.got = None
    for _ in range(2):
        job.call(job.small)
    return told


def closes_in_flight(job):
    """Rank 3 closes what it sent but did not receive: the others get all of it, and learn at the next call."""
    phase = job.phase
    if job.rank == VICTIM:
        job.send(async_op="hook")
        job.buffer.native.close(5.0)  # as Buffer.close does; the Buffer is to go on
        job.meet(f"told {phase}")
        job.go_on(back=[VICTIM])
        return None
    told = job.told(PeerLost)
    job.meet(f"told {phase}")
    assert "closed its Buffer" in told[2] or "gave up on rank 3" in told[2], told[2]
    assert not told[2].startswith(f"{phase} "), "what it had sent was not received"
    job.go_on(back=[VICTIM])
    return told


SHARED = {
    "damaged header, other node": lambda job: damaged_header(job, READER, garbage),
    "damaged header, own node": lambda job: damaged_header(job, 2, garbage),
    "huge counts in a header": lambda job: damaged_header(job, READER, huge_counts),
    "header of another epoch": lambda job: damaged_header(job, READER, other_epoch),
    "damaged counts, other node": lambda job: damaged_header(job, READER, other_counts),
    "damaged counts, own node": lambda job: damaged_header(job, 2, other_counts),
    "other parameters": other_parameters,
    "closed with a call in flight": closes_in_flight,
}


# In an emulated machine, where each takes seconds: those that have to do with the transport.
OVER_NICS = ("damaged header, other node", "other parameters", "closed with a call in flight")


def shared_faults(rank, group, backend, hops):
    """Each fault for each phase. Returns what this rank was told of each."""
    job = Job(rank, group, backend, hops, "dispatch")
    told = {}
    for name in OVER_NICS if NICS else SHARED:
        fault = SHARED[name]
        for phase in PHASES if "damaged counts" not in name else ["dispatch"]:
            job.begin(phase)
            told[name, phase] = fault(job)
            if fault not in (other_parameters, closes_in_flight):
                job.go_on()
            assert job.buffer.hops == hops
    job.close()
    return told


@pytest.mark.parametrize("hops", HOPS)
def test_nobody_dies(run_ranks, matrix, backend, hops):
    results = run_ranks(shared_faults, NUM_RANKS, backend, hops, timeout_s=100)
    for fault, phase in results[0]:
        matrix(fault, phase, column(backend, hops), summary([r[fault, phase] for r in results]))


# --- opening ---------------------------------------------------------------------------------------


# Registering is what takes long: in an emulated machine 7 s for 128 MB.
SMALL_WINDOWS = 1 << 20


def try_to_open(group, backend, hops, **options):
    """(class, seconds, text) of the error, or None."""
    use_nic(group.rank)
    start = time.monotonic()
    try:
        moe_comm.Buffer(group, hidden=64, topk=2, num_experts=8, hops=hops, transport=backend,
                        **{"ranks_per_node": 2, "window_bytes": SMALL_WINDOWS, **options}).close()  # fmt: skip
    except MoeCommError as error:
        return type(error).__name__, time.monotonic() - start, str(error)


def no_memory(rank, group, backend, hops):
    """Rank 3 may not register (verbs) or map its windows. When it may again, all can open."""
    assert try_to_open(group, backend, hops) is None  # libraries are loaded
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    if rank == VICTIM and backend == "verbs":
        lock_memory(group, False)
    elif rank == VICTIM:
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
    num_bytes = 1 << 26 if backend == "verbs" else 4 << 30
    told = try_to_open(group, backend, hops, window_bytes=num_bytes)
    assert told[0] == "TransportError" and "ENOMEM" in told[2], told
    assert "ibv_reg_mr" in told[2] or backend != "verbs", told
    assert rank == VICTIM or "rank 3 failed" in told[2], told
    if rank == VICTIM and backend == "verbs":
        lock_memory(group, True)
    elif rank == VICTIM:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert try_to_open(group, backend, hops) is None
    return told


def lock_memory(group, may):
    """Whether the threads made from now on may lock more than 32 MiB of memory, as registering does."""
    ipc_lock = 1 << 14
    libc = ctypes.CDLL(None, use_errno=True)
    who = struct.pack("Ii", 0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; and those above 32
    assert libc.capget(who, sets) == 0
    sets[0] = sets[0] | ipc_lock if may else sets[0] & ~ipc_lock
    assert libc.capset(who, sets) == 0, os.strerror(ctypes.get_errno())
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (32 << 20, resource.RLIM_INFINITY))
    group.engines.clear()  # its thread registers


def other_secret(rank, group, backend, hops):
    """Rank 3 is of another job."""
    secret = group.secret
    if rank == VICTIM:
        group._secret ^= 1
    told = try_to_open(group, backend, hops, ranks_per_node=1)
    assert told[0] == "TransportError" and "rank 3" in told[2] and "secret" in told[2], told
    group._secret = secret
    group.engines.clear()  # rank 3 opened its own with the other one
    assert try_to_open(group, backend, hops) is None
    return told


NOTICED_S = 2.0 * SLOWNESS


def refused(rank, group, backend, hops):
    """Rank 3 dies between its address and its connections."""
    group = moe_comm.EPGroup.from_store(
        group.store, rank, NUM_RANKS, name="short", timeout_s=TIMEOUT_S
    )
    gather = group._gather

    def die_after_the_addresses(value):
        answers = gather(value)
        if isinstance(value, tuple) and isinstance(value[1], dict) and "address" in value[1]:
            group.store.set("died", str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        return answers

    if rank == VICTIM:
        group._gather = die_after_the_addresses
    kind, _, text = try_to_open(group, backend, hops, ranks_per_node=1)
    seconds = time.monotonic() - float(group.store.get("died"))
    # Until the transport says that the process has ended, and from then on the deadline of the gather.
    assert seconds <= NOTICED_S + TIMEOUT_S + GRACE_S + SLACK_S, (kind, seconds, text)
    why = {
        "TransportError": "to rank 3",
        "PeerTimeout": "for ranks [3]",
    }  # connected in its last moment
    assert why[kind] in text, (kind, text)
    return kind, seconds, text


OPENING = {
    "no memory to register": no_memory,
    "other secret": other_secret,
    "connection refused": refused,
}


@pytest.mark.parametrize("hops", HOPS)
@pytest.mark.parametrize("fault", OPENING)
def test_opening(run_ranks, matrix, fault, backend, hops):
    results = run_ranks(
        OPENING[fault],
        NUM_RANKS,
        backend,
        hops,
        may_die=[VICTIM] if fault == "connection refused" else [],
    )
    matrix(fault, "open", column(backend, hops), summary(results))


def stale_key(rank, group, *shape):
    """The others write to rank 3 with a key that opens nothing."""
    gather, broken = group._gather, []

    def offer_another_key(value):
        if isinstance(value, tuple) and isinstance(value[1], dict) and not broken:
            regions = [bytearray(region) for region in value[1]["regions"]]
            for region in regions:
                region[16] ^= 0x5A
            broken.append(value[1].update(regions=tuple(map(bytes, regions))))
        return gather(value)

    if rank == VICTIM:
        group._gather = offer_another_key
    with pytest.raises(
        (PeerLost, PeerTimeout, TransportError),
        match=r"(dispatch|combine) epoch \d+.*rank \d \(node \d\)",
    ) as caught:
        start = time.monotonic()
        Job(rank, group, *shape)
    return type(caught.value).__name__, time.monotonic() - start, str(caught.value)


@pytest.mark.parametrize("hops", HOPS)
def test_stale_key(run_ranks, matrix, backend, hops):
    results = run_ranks(stale_key, NUM_RANKS, backend, hops, "dispatch")
    matrix("stale remote key", "dispatch", column(backend, hops), summary(results))
