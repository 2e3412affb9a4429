"""What the rows of the matrix are made of."""

import os

from job import NUM_RANKS, VICTIM

from moe_comm import _engine

# With a NIC: MOE_COMM_TEST_BACKENDS="verbs".
BACKENDS = ("shm", "fabric:tcp", *os.environ.get("MOE_COMM_TEST_BACKENDS", "").split())
HOPS = ("node", "rank")
PHASES = ("dispatch", "combine")
READER = 1  # of what rank 3 sends to the other node
SURVIVORS = tuple(r for r in range(NUM_RANKS) if r != VICTIM)


def why_not(backend):
    for report in _engine.transports():
        if report["name"].startswith(backend):
            return "" if report["available"] else report["reason"]
    return f"{backend} was not built in"


def column(backend, hops):
    return f"{backend.split(';')[0]} {hops}"


def summary(results):
    """ "PeerLost 0.2 s": the classes the survivors saw, and the slowest of them."""
    seen = [r for r in results if r is not None]
    return f"{'/'.join(sorted({r[0] for r in seen}))} {max(r[1] for r in seen):.1f} s"
