"""What a TransferEngine hands out to wait on: writes under way (`Transfer`), immediates to come (`Expectation`).

Every wait has a deadline and is cut into slices: between two slices Python sees Ctrl-C, close() of the engine by
another thread, and peers that were lost. Waiting itself happens in C++ without the GIL.
"""

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn

from . import _engine
from .arguments import expect as require
from .errors import ClosedError, MoeCommError, PeerLost, PeerTimeout, TransportError

if TYPE_CHECKING:
    from .engine import TransferEngine
    from .mailbox import Peer

SLICE_S = 0.05  # longest time in C++ without a look at peers, signals and close()
VERDICT_S = 0.5  # a write failed: how long the transport may need to say that the peer is gone


class Deadline:
    """`seconds` from now on."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    @property
    def slice(self) -> float:
        """How long to wait in one go."""
        return min(SLICE_S, self.left)

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._end


def names_of(peers: Iterable["Peer"]) -> str:
    return ", ".join(peer.name for peer in peers)


def raise_if_lost(peers: Iterable["Peer"], what: str) -> None:
    """Raises: PeerLost naming the first lost peer and why; ClosedError if this side closed it."""
    for peer in peers:
        why = peer.lost
        if why is not None:
            kind = ClosedError if peer.closed else PeerLost
            raise kind(f"{what}: {peer.name}: {why}")


class Transfer:
    """Writes under way, as one: what `write`, `write_paged` and `scatter` return.

    It keeps its source memory alive until it ended, also if this object is dropped. The source may be changed once
    `done`, or after `wait()` returned; the bytes are then on their way and will arrive unless the connection breaks.
    What tells the *receiver* is the immediate, and nothing else: no order holds between two writes.
    """

    def __init__(
        self,
        engine: "TransferEngine",
        operation: _engine.Operation,
        peers: Sequence["Peer"],
        what: str,
        keep: object,
    ):
        self._engine = engine
        self._operation = operation
        self._peers = peers
        self._what = what
        self._keep = keep

    @property
    def done(self) -> bool:
        """True once it ended, well or not. Does not block, does not raise."""
        return self._operation.done

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until all writes ended.

        Raises: PeerTimeout naming the peers after `timeout_s` (the writes stay under way); PeerLost if a peer died or
        closed; TransportError if a call failed. More than one error: the first.
        """
        self.finish(self._engine.deadline(timeout_s))

    def finish(self, deadline: Deadline) -> None:
        """`wait()` as a step of something longer."""
        while not self._engine.wait_for(self._operation, deadline.slice):
            if deadline.over:
                raise PeerTimeout(
                    f"{self._what} to {names_of(self._peers)}: not finished after {deadline.seconds:.1f} s"
                )
            self._engine.check()
            for peer in self._peers:
                _ = peer.lost  # a peer that said goodbye: ends our writes to it
        self._keep = None
        try:
            self._operation.raise_status()
        except MoeCommError as error:
            self._raise(error)

    def settle(self, deadline: Deadline) -> None:
        """Waits until it ended, well or not; at the deadline gives up the peers that are in the way."""
        while not self._engine.wait_for(self._operation, deadline.slice):
            for peer in self._peers:
                if peer.lost is None and deadline.over:
                    peer.close()
            if deadline.over:
                return

    def _raise(self, error: MoeCommError) -> NoReturn:
        """With the peers' names; as PeerLost if the reason turns out to be that one is gone."""
        verdict = Deadline(VERDICT_S if isinstance(error, TransportError) else 0.0)
        while True:
            raise_if_lost(self._peers, self._what)
            if verdict.over:
                break
            time.sleep(0.01)
        raise type(error)(f"{self._what} to {names_of(self._peers)}: {error}") from None

    def __repr__(self) -> str:
        state = "done" if self.done else "under way"
        return f"Transfer({self._what} to {names_of(self._peers)}: {state})"


class Expectation:
    """`count` immediates of one value, to be waited for: what `expect` returns. Each takes its own off, once.

    Immediates are counted from the moment the engine exists, so it does not matter whether they arrive before or after
    `expect`. What is over stays counted, for the next expectation. Two expectations of one value share one count.
    """

    def __init__(self, engine: "TransferEngine", imm: int, count: int, peers: Sequence["Peer"]):
        self._engine = engine
        self._imm = imm
        self._count = count
        self._peers = peers
        self._taken = False

    @property
    def done(self) -> bool:
        """True if `wait()` would return at once. Does not block, takes nothing off."""
        return self._taken or self._engine.count(self._imm) >= self._count

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until the immediates are here; the bytes of their writes can then be read by the CPU.

        Raises: PeerTimeout saying how many arrived (none is taken off); PeerLost if one of `peers` was lost and they
        are not all here. Later calls return at once.
        """
        if self._taken:
            return
        deadline = self._engine.deadline(timeout_s)
        what = f"expect: immediate {self._imm}"
        while not self._engine.native.take_immediates(self._imm, self._count, deadline.slice):
            self._engine.check()
            lost = [peer for peer in self._peers if peer.lost is not None]
            if lost and not self._engine.native.take_immediates(self._imm, self._count, 0.0):
                raise_if_lost(lost, f"{what}, {self._here()}")
            elif lost:
                break
            if deadline.over:
                whom = f" for {names_of(self._peers)}" if self._peers else ""
                raise PeerTimeout(f"{what}: waited {deadline.seconds:.1f} s{whom}, {self._here()}")
        self._taken = True

    def _here(self) -> str:
        return f"{self._engine.count(self._imm)} of {self._count} arrived"


def check_timeout(timeout_s: float | None, default: float) -> float:
    """Seconds. Raises: ArgumentError unless None or a number >= 0."""
    if timeout_s is None:
        return default
    good = isinstance(timeout_s, (int, float)) and timeout_s >= 0
    require(good, "timeout_s", "a number of seconds >= 0, or None", repr(timeout_s))
    return float(timeout_s)
