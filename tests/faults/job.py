"""What every rank of a fault test does: calls with a known result, waits for an error, goes on without the dead.

Four ranks as two nodes. Rank 3 is the one that something happens to.
"""

import contextlib
import gc
import json
import mmap
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "ep"))

from cases import check_dispatched, dispatch, expected, make_case, same
from test_generations import _without

import moe_comm
from moe_comm import MoeCommError, reference

NUM_RANKS, RANKS_PER_NODE, VICTIM = 4, 2, 3
NODES = [0, 0, 1, 1]
SLOWNESS = float(
    os.environ.get("MOE_COMM_TEST_SLOWNESS", "1")
)  # of this machine: limits are longer
TIMEOUT_S = 3.0 * SLOWNESS  # the deadline of every call
# Where a rank is to be silent: more than the second between heartbeats to other nodes.
SILENCE_S = 3.0 * SLOWNESS
GRACE_S = 1.0 * SLOWNESS  # by which an error may come later
NICS = os.environ.get("MOE_COMM_TEST_NICS", "").split()  # one for each node
SLACK_S = float(os.environ.get("MOE_COMM_TEST_SLACK_S", "0.5"))  # for a machine that does more
SMALL = (6, 9, 0, 5)  # tokens of each rank


class Job:
    """One rank's Buffer, and what its calls must return. `phase`: the call that the fault meets."""

    def __init__(
        self,
        rank,
        group,
        backend,
        hops,
        phase,
        *,
        tokens=SMALL,
        hidden=64,
        timeout_s=TIMEOUT_S,
        **options,
    ):
        self.rank, self.group, self.phase, self.hops = rank, group, phase, hops
        self.backend = backend
        use_nic(rank)
        self.deadline_s = min(timeout_s, float(os.environ.get("MOE_COMM_SILENCE_S", timeout_s)))
        moe_comm._engine.Engine(transport=backend).stop()  # libraries keep something open
        gc.collect()  # a forked rank has what its parent had not dropped yet
        self.open = open_things()
        self.case = make_case(
            NUM_RANKS, tokens=tokens, hidden=hidden, topk=8, num_experts=8, none=0.1
        )
        self.small = make_case(
            NUM_RANKS, seed=1, tokens=SMALL, hidden=hidden, topk=8, num_experts=8, none=0.1
        )
        self.buffer = moe_comm.Buffer(
            group, hidden=hidden, topk=8, num_experts=8, hops=hops, transport=backend, ranks_per_node=RANKS_PER_NODE,
            max_tokens=max(*tokens, *SMALL), timeout_s=timeout_s, **options,
        )  # fmt: skip
        self.pids = group.gather(os.getpid())
        self.dead: tuple[int, ...] = ()
        self.got = None
        self.call(self.small)
        self.call(self.small)
        self.meet("warm")
        self.begin(phase)

    def begin(self, phase):
        """The next call is one of this kind."""
        self.phase = phase
        if phase == "combine":
            self.call()
        self.meet(f"begin {phase} {self.buffer.generation}")

    # --- meeting -------------------------------------------------------------------------------------

    def say(self, tag):
        self.group.store.set(f"{tag}/{self.rank}", "1")

    def hear(self, tag, *ranks):
        self.group.store.wait([f"{tag}/{r}" for r in ranks])

    def meet(self, tag, ranks=range(NUM_RANKS)):
        self.say(tag)
        self.hear(tag, *ranks)

    def stop_here(self):
        """This process stands still until somebody continues it. Not in a wait for the store, which would be locked."""
        os.kill(os.getpid(), signal.SIGSTOP)

    def wait_for_state(self, rank, states, timeout_s=10 * SLOWNESS):
        """Until the kernel says so: T stopped, Z dead."""
        deadline = time.monotonic() + timeout_s
        while state_of(self.pids[rank]) not in states:
            assert time.monotonic() < deadline, (rank, state_of(self.pids[rank]))
            time.sleep(0.01)

    def wait_until_closing(self, rank):
        """Until a rank that was killed has given up its descriptors; closing what they are may take longer."""
        deadline = time.monotonic() + 10 * SLOWNESS
        while has_descriptors(self.pids[rank]):
            assert time.monotonic() < deadline, (rank, state_of(self.pids[rank]))
            time.sleep(0.01)

    # --- windows -------------------------------------------------------------------------------------

    def message_at(self, reader, writer, epoch):
        """Where the message of `writer` begins in the windows of `reader`."""
        at = self.buffer.layout.offsets()
        by_link = self.buffer.hops == "node" and NODES[reader] != NODES[writer]
        first, index = at["slots"], writer
        if by_link:
            first, index = at["links"], 0
        elif self.buffer.hops == "rank":  # as Exchange::slot
            far = NODES[reader] != NODES[writer]
            first = at["far_slots"] if far else first
            index = sum((NODES[r] != NODES[reader]) == far for r in range(writer))
        return first + (2 * index + epoch % 2) * at["stride"]

    def segment_of(self, rank):
        """(pid, descriptor, inode, bytes) of a rank's windows in this generation. Collective."""
        key = f"segment/{self.buffer.generation}/{self.buffer.native.next_epoch}"
        self.group.store.set(f"{key}/{self.rank}", json.dumps(self.buffer.native.segment))
        return json.loads(self.group.store.get(f"{key}/{rank}"))

    def windows_of(self, rank):
        """Another rank's windows, or one's own, as a writable map. Collective."""
        pid, descriptor, _, num_bytes = self.segment_of(rank)
        with open(f"/proc/{pid}/fd/{descriptor}", "r+b") as file:
            return mmap.mmap(file.fileno(), num_bytes)

    # --- calls ---------------------------------------------------------------------------------------

    def send(self, case=None, **more):
        """The next call: dispatch and combine in turn."""
        if self.got is None:
            self.with_case = _without(case or self.case, self.dead)
            return dispatch(self.buffer, self.with_case, self.rank, **more)
        return self.buffer.combine(self.result_of_experts(self.got.x), self.got.handle, **more)

    def result_of_experts(self, x):
        return (x.float() * 1.5).to(x.dtype)

    def call(self, case=None):
        """The same, and compares with the reference bit for bit."""
        self.check(self.send(case))

    def check(self, result):
        if self.got is None:
            self.want = expected(self.with_case)
            check_dispatched(result, self.want, self.rank)
            self.got = result
        else:
            ys = [self.result_of_experts(x) for x in self.want.x]
            back = reference.combine(
                ys, self.want.bookkeeping, hops=self.buffer.hops, node_of=NODES
            )
            assert same(result, back.x[self.rank])
            self.got = None

    def receive(self, hook):
        """What a call with a hook still has to do."""
        hook()
        self.check(hook.result)

    def told(self, kinds, *, calls=2, blame=VICTIM, since="", hook=None):
        """(class, seconds, text) of the error that one of the next calls raises. Results before it are right.

        since: where the store has the time of the fault, if it is after the call began. hook: of a call that was sent
        before.
        """
        for n in range(calls + bool(hook)):
            received = hook if n == 0 else None
            phase = "combine" if self.got else "dispatch"
            epoch = self.buffer.native.next_epoch - bool(received)
            start = time.monotonic()
            try:
                self.receive(received) if received else self.call()
            except MoeCommError as error:
                if since and self.group.store.check([since]):
                    start = max(start, float(self.group.store.get(since)))
                seconds, text = time.monotonic() - start, str(error)
                assert isinstance(error, kinds), f"{type(error).__name__}: {text}"
                assert seconds <= self.deadline_s + GRACE_S + SLACK_S, (seconds, text)
                assert re.match(rf"{phase} epoch {epoch}\b", text), (phase, epoch, text)
                gave_up = "gave up on " if blame == self.rank else ""
                blamed = f"{gave_up}rank {blame} (node {NODES[blame]})"
                assert blamed in text, text
                return type(error).__name__, seconds, text
        raise AssertionError(f"rank {self.rank}: no error in {calls} calls")

    # --- afterwards ----------------------------------------------------------------------------------

    def go_on(self, *dead, back=(), mask=()):
        """The survivors begin the next generation, with those that come `back`; their calls are right.

        With nobody dead, everybody names everybody: who was taken for lost is else not waited for.
        """
        self.dead = dead
        expect = () if dead else range(NUM_RANKS)
        alive = tuple(r not in dead for r in range(NUM_RANKS))
        if self.rank in back:
            assert self.buffer.rejoin(timeout_s=20 * SLOWNESS) == alive
        else:
            assert self.buffer.recover(expect=expect, mask=mask, timeout_s=20 * SLOWNESS) == alive
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
        gc.collect()  # errors hold the frames they came through
        now = open_things()
        assert now == self.open, (self.open, now)
        if self.backend.startswith("verbs"):
            assert not rdma_objects("qp", os.getpid())


def use_nic(rank):
    """Each node has its own, so that what goes to the other one goes over a wire."""
    if NICS:
        os.environ["MOE_COMM_INTERFACE"] = NICS[NODES[rank]]


def rdma_objects(kind, pid=None):
    """Those that the kernel knows of processes, or of one: kind "qp" or "mr". None where there is no RDMA NIC."""
    if not shutil.which("rdma") or not os.path.isdir("/sys/class/infiniband"):
        return []
    command = ["rdma", "-j", "resource", "show", kind]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout or "[]")
    return [one for one in found if one.get("pid") == pid or (pid is None and "pid" in one)]


def limit_unsent(num_bytes):
    """What the sockets of this process take before their peers read: the rest of a message stays in its memory."""
    limit_sockets(socket.SO_SNDBUF, num_bytes)


def limit_unread(num_bytes):
    """What they take before this process reads; else it may be a whole message, as they grow with what is read."""
    limit_sockets(socket.SO_RCVBUF, num_bytes)


def limit_sockets(option, num_bytes):
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as found:
                    found.setsockopt(socket.SOL_SOCKET, option, num_bytes)


def state_of(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (
        FileNotFoundError,
        ProcessLookupError,
    ):  # the second where it goes between open and read
        return "Z"


def has_descriptors(pid):
    """Whether any of its threads has: they end one by one."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if os.listdir(f"/proc/{pid}/task/{thread}/fd"):
                    return True
    return False


def open_things() -> dict[str, int]:
    """Descriptors, threads and mapped windows of this process."""
    maps = pathlib.Path("/proc/self/maps").read_text()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "windows": maps.count("moe_comm:windows"),
    }
