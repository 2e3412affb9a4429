"""The `moe_comm.Buffer` of low-latency mode: made when calls tell how large it must be, made again when they grow.

Its windows must hold all M tokens of a rank at once, because a hook receives one round. DeepEP names M
(num_max_dispatch_tokens_per_rank), H, K and E only at the call; they must be the same on all ranks, so growth is
collective. Handles go on working; a Buffer with open hooks lives until they were called.

Ranks that disagree, or whose arguments are wrong, must not leave the others waiting. So a rank that needs more room
first refuses one exchange of the present Buffer for that reason, which costs growth one exchange; a rank that did not
know learns it there and joins the gather in which all ranks say what they need, or what is wrong.

NOTE [masks] With `mask_lost` a rank that is lost or late is masked, by each rank for itself, and calls go on without
it. A local change cannot take it back: it missed exchanges, and its windows may belong to a dead process. So all ranks
that live meet (`unmask`), and those who come begin the next generation. Growth needs every rank, so it ends with the
first mask.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch

from ..arguments import device_named
from ..buffer import Buffer
from ..errors import ArgumentError, MismatchError, PeerError, PeerLost
from ..event import Hook
from ..layout import RowFormat
from .refuse import take_part

GROWS = "low-latency windows must grow"
MEET_TIMEOUT_S = 10.0  # for masked ranks that may come back
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What windows are made for."""

    tokens: int  # M
    hidden_bytes: int  # of a row of x, or of a combine's
    topk: int
    experts: int

    def holds(self, other: "Sizes") -> bool:
        return self.union(other) == self

    def union(self, other: "Sizes") -> "Sizes":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Sizes(*(max(pair) for pair in pairs))

    def copies(self, num_ranks: int) -> int:
        """Rows of one token that one rank may return."""
        return min(self.topk, -(-self.experts // num_ranks))

    def window_bytes(self, num_ranks: int) -> int:
        """Enough for windows of M tokens, all copies of each, whatever the nodes: 2 banks, R windows received and R
        sent."""
        row = RowFormat.of_dispatch(self.hidden_bytes, 0, self.topk, weights=True)
        return 2 * 2 * num_ranks * self.tokens * self.copies(num_ranks) * row.row_bytes


class Windows:
    """The present Buffer, and smaller ones whose hooks are open; all of `device`. `mask_lost`: NOTE [masks]."""

    def __init__(self, normal: Buffer, mask_lost: bool = False, device: str = ""):
        self.group = normal.group
        self.mask_lost, self.device = mask_lost, device
        self.where = device_named(device) if device else None
        self._normal = normal  # knows who ended before there are windows
        self._num_agreements = 0
        self._masked: set[int] = set()  # as far as was told, or asked for
        self.buffer: Buffer | None = None
        self.retired: list[Buffer] = []
        self._sizes = Sizes(1, 16, 1, 1)
        self._hooks: list[tuple[Buffer, Hook]] = []  # made by calls, maybe called since

    def close(self) -> None:
        for buffer in (*self.retired, *([self.buffer] if self.buffer else [])):
            buffer.close()
        self.retired.clear()

    def call(
        self, kind: int, sizes: Sizes | None, error: str | None, exchange: Callable[[Buffer], Any]
    ) -> Any:
        """`exchange` with a Buffer that has room for `sizes`; collective. Returns what it does.

        `error`: what is wrong with this rank's arguments; `sizes` may be None then. `kind`: DISPATCH or COMBINE.
        Raises: what is wrong here as ArgumentError, elsewhere as PeerError; MismatchError if sizes differ.
        """
        buffer = self.buffer
        if buffer is None or not (sizes is None or self._sizes.holds(sizes)):
            if buffer is not None:
                take_part(buffer, kind, f"{GROWS}: {sizes}")
                self._check_all_there(sizes)
            with self._bounded():
                self._agree(sizes, error)
                assert sizes is not None
                buffer = self._grow(sizes)
        if error is not None:
            self._join(take_part(buffer, kind, error), sizes, error)
            raise ArgumentError(error)
        try:
            got = exchange(buffer)
        except PeerError as refused:
            self._join(refused, sizes, None)
            raise
        if isinstance(got, Hook):
            self._hooks = [*((b, h) for b, h in self._hooks if not h.done), (buffer, got)]
        self._tell_masked()
        return got

    def receive(self, hook: Hook, sizes: Sizes | None) -> None:
        """Calls the hook that a `call` returned."""
        try:
            hook()
        except PeerError as refused:
            self._join(refused, sizes, None)
            raise
        self._tell_masked()

    # --- masks -----------------------------------------------------------------------------------

    def masked(self) -> tuple[bool, ...]:
        """[R]: ranks that this rank does without."""
        ranks = range(self.group.num_ranks)
        if self.buffer is None:
            return tuple(r in self._masked for r in ranks)
        return tuple(not alive for alive in self.buffer.alive())

    def mask(self, rank: int) -> None:
        """From the next call on, as if `rank` were lost. Local; another rank than this."""
        if self.buffer is not None:
            self.buffer.mask(rank)
        self._masked.add(rank)

    def unmask(self) -> None:
        """Collective of the ranks that live, masked or not: those who come within 10 s go on together, nobody of them
        masked. Handles and hooks from before raise."""
        self._masked.clear()
        if self.buffer is None:
            return
        timeout_s = min(MEET_TIMEOUT_S, self.buffer.config.timeout_s)
        everyone = range(self.group.num_ranks)
        self._hooks.clear()
        try:
            self.buffer.recover(expect=everyone, timeout_s=timeout_s)
        except PeerLost:  # the others met before without this rank
            self.buffer.rejoin(timeout_s=timeout_s)
        self._tell_masked()

    def _tell_masked(self) -> None:
        """Logs which ranks were masked since the last call."""
        found = {rank for rank, masked in enumerate(self.masked()) if masked}
        for rank in sorted(found - self._masked):
            _log.warning(
                "low-latency call: rank %d goes on without rank %d, which is lost or late",
                self.group.rank,
                rank,
            )
        self._masked = found

    def _check_all_there(self, sizes: Sizes | None) -> None:
        """Before windows grow."""
        masked = [rank for rank, masked in enumerate(self.masked()) if masked]
        if masked:
            raise ArgumentError(
                f"low-latency call: expected at most {self._sizes} while ranks {masked} are masked, got {sizes}"
            )

    # --- growth ----------------------------------------------------------------------------------

    def _join(self, refused: PeerError | None, sizes: Sizes | None, error: str | None) -> None:
        """Where a peer refused an exchange in order to grow: the gather that it waits in. Raises then."""
        if refused is not None and GROWS in str(refused):
            self._check_all_there(sizes)
            with self._bounded():
                self._agree(sizes, error)

    def _bounded(self) -> contextlib.AbstractContextManager[None]:
        """What is gathered inside is part of a call: it ends with the call's deadline, or when a rank has ended."""
        self._num_agreements += 1
        name = f"{self._normal.group.name}/{self._normal.serial}/low_latency/{self._num_agreements}"
        return self.group.bounded(
            name, self._normal.config.timeout_s, lambda: self._normal.native.lost
        )

    def _agree(self, sizes: Sizes | None, error: str | None) -> None:
        """All ranks say what they need. Raises on all of them unless they need the same and nothing is wrong."""
        answers = self.group.gather((sizes, error))
        if error is not None:
            raise ArgumentError(error)
        for rank, (theirs, text) in enumerate(answers):
            if text is not None:
                raise PeerError(f"low-latency call: rank {rank} raised: {text}")
            if theirs != sizes:
                raise MismatchError(
                    f"low-latency call: rank {self.group.rank} needs {sizes}, rank {rank} {theirs}"
                )

    def _grow(self, sizes: Sizes) -> Buffer:
        num_ranks = self.group.num_ranks
        self._retire()
        sizes = self._sizes = self._sizes.union(sizes)
        self.buffer = Buffer(
            self.group, hops="rank", max_tokens=sizes.tokens, topk=sizes.topk, num_experts=sizes.experts,
            hidden=sizes.hidden_bytes, dtype=torch.uint8, each_copy=True,
            window_bytes=sizes.window_bytes(num_ranks), mask_lost=self.mask_lost, device=self.device,
        )  # fmt: skip
        for rank in self._masked:
            self.buffer.mask(rank)
        return self.buffer

    def _retire(self) -> None:
        """The present Buffer makes room; one with open hooks is closed at a later growth."""
        self._hooks = [(buffer, hook) for buffer, hook in self._hooks if not hook.done]
        busy = [buffer for buffer, _ in self._hooks]
        candidates = [*self.retired, *([self.buffer] if self.buffer else [])]
        self.retired = [buffer for buffer in candidates if buffer in busy]
        for buffer in candidates:
            if buffer not in busy:
                buffer.close()
        self.buffer = None
