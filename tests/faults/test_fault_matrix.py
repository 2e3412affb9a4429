"""Faults of ranks: fault x backend x hops x phase. What the ranks that are left are told, and that they can go on.

Each row: the right exception on the right ranks, within the deadline + 1 s, with phase, epoch, and the rank and node
that is to blame; results that were returned are right bit for bit; `recover` leads to calls that work; no thread,
descriptor or mapping more than before.
"""

import ctypes
import mmap
import os
import signal
import time

import pytest
from job import NUM_RANKS, VICTIM, Job

from moe_comm import PeerLost, _engine

BACKENDS = ("shm", "fabric:tcp")
HOPS = ("node", "rank")
PHASES = ("dispatch", "combine")
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
    told = job.told(PeerLost, calls=1)
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


FAULTS = {"killed before its send": killed_before, "killed after its send": killed_after}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("hops", HOPS)
@pytest.mark.parametrize("fault", FAULTS)
def test_killed(run_ranks, matrix, fault, backend, hops, phase):
    results = run_ranks(FAULTS[fault], NUM_RANKS, backend, hops, phase, may_die=[VICTIM], timeout_s=30)
    matrix(fault, phase, column(backend, hops), summary(results))
