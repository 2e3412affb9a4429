"""What every rank of a fault test does: calls with a known result, waits for an error, goes on without the dead.

Four ranks as two nodes. Rank 3 is the one that something happens to.
"""

import gc
import os
import pathlib
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "ep"))

import torch
from cases import check_dispatched, dispatch, expected, make_case, same
from test_generations import _without

import moe_comm
from moe_comm import MoeCommError, reference

NUM_RANKS, RANKS_PER_NODE, VICTIM = 4, 2, 3
NODES = [0, 0, 1, 1]
TIMEOUT_S = 1.5  # the deadline of every call
GRACE_S = 1.0  # by which an error may come later
SLACK_S = float(os.environ.get("MOE_COMM_TEST_SLACK_S", "0.5"))  # for a machine that does more
SMALL = (6, 9, 0, 5)  # tokens of each rank


class Job:
    """One rank's Buffer, and what its calls must return. `phase`: the call that the fault meets."""

    def __init__(self, rank, group, backend, hops, phase, *, tokens=SMALL, hidden=64, **options):
        self.rank, self.group, self.phase, self.hops = rank, group, phase, hops
        self.backend = backend
        moe_comm._engine.Engine(transport=backend).stop()  # libraries keep something open
        self.open = open_things()
        self.case = make_case(NUM_RANKS, tokens=tokens, hidden=hidden, topk=8, num_experts=8, none=0.1)
        self.small = make_case(NUM_RANKS, seed=1, tokens=SMALL, hidden=hidden, topk=8, num_experts=8, none=0.1)
        self.buffer = moe_comm.Buffer(
            group, hidden=hidden, topk=8, num_experts=8, hops=hops, transport=backend, ranks_per_node=RANKS_PER_NODE,
            max_tokens=max(*tokens, *SMALL), timeout_s=options.pop("timeout_s", TIMEOUT_S), **options,
        )  # fmt: skip
        self.pids = group.gather(os.getpid())
        self.dead: tuple[int, ...] = ()
        self.got = None
        self.call(self.small)
        self.call(self.small)
        self.meet("warm")
        if phase == "combine":
            self.call()
            self.meet("dispatched")

    # --- meeting -------------------------------------------------------------------------------------

    def say(self, tag):
        self.group.store.set(f"{tag}/{self.rank}", "1")

    def hear(self, tag, *ranks):
        self.group.store.wait([f"{tag}/{r}" for r in ranks])

    def meet(self, tag, ranks=range(NUM_RANKS)):
        self.say(tag)
        self.hear(tag, *ranks)

    # --- calls ---------------------------------------------------------------------------------------

    def send(self, case=None, **more):
        """The next call, dispatch and combine in turn: what it returns, and what it must return."""
        if self.got is None:
            self.with_case = _without(case or self.case, self.dead)
            self.want = expected(self.with_case)
            return dispatch(self.buffer, self.with_case, self.rank, **more), None
        ys = [(x.float() * 1.5).to(x.dtype) for x in self.want.x]
        back = reference.combine(ys, self.want.bookkeeping, hops=self.buffer.hops, node_of=NODES)
        return self.buffer.combine(ys[self.rank], self.got.handle, **more), back.x[self.rank]

    def call(self, case=None):
        """The same, and compares bit for bit."""
        result, back = self.send(case)
        if back is None:
            check_dispatched(result, self.want, self.rank)
            self.got = result
        else:
            assert same(result, back)
            self.got = None

    def told(self, kinds, *, calls=2, blame=VICTIM):
        """(class, seconds, text) of the error that one of the next calls raises. Results before it are right."""
        for _ in range(calls):
            phase = "combine" if self.got else "dispatch"
            epoch = self.buffer.native.next_epoch
            start = time.monotonic()
            try:
                self.call()
            except MoeCommError as error:
                seconds, text = time.monotonic() - start, str(error)
                assert isinstance(error, kinds), f"{type(error).__name__}: {text}"
                assert seconds <= TIMEOUT_S + GRACE_S + SLACK_S, (seconds, text)
                assert re.match(rf"{phase} epoch {epoch}\b", text), (phase, epoch, text)
                assert f"rank {blame} (node {NODES[blame]})" in text, text
                return type(error).__name__, seconds, text
        raise AssertionError(f"rank {self.rank}: no error in {calls} calls")

    # --- afterwards ----------------------------------------------------------------------------------

    def go_on(self, *dead):
        """The survivors begin the next generation; their calls are right."""
        self.dead = dead
        alive = tuple(r not in dead for r in range(NUM_RANKS))
        assert self.buffer.recover(timeout_s=10) == alive
        self.got = None
        for _ in range(4):
            self.call(self.small)

    def close(self, *dead):
        """Closes everything; nothing is left of it."""
        self.meet("closing", [r for r in range(NUM_RANKS) if r not in dead])
        self.buffer.close()
        self.group.engines.clear()
        del self.buffer
        self.got = None
        gc.collect()
        assert open_things() == self.open


def open_things() -> dict[str, int]:
    """Descriptors, threads and mapped windows of this process."""
    maps = pathlib.Path("/proc/self/maps").read_text()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "windows": maps.count("moe_comm:windows"),
    }
