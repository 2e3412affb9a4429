"""What kernels and the host tell each other of one exchange: epochs and tables, lanes, headers' numbers, errors."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _engine
from .errors import PeerError

HEADER_BYTES = _engine.HEADER_BYTES
NAP_S = 50e-6  # between looks at a stream
CREDITS, ROWS, LINKS = 0, 1, 2  # the ring's words: of what a rank writes, reads, passes on
TOLD_WORDS = 12 + HEADER_BYTES // 8  # headers.cuh: Told


@dataclasses.dataclass
class Round:
    """One exchange of a call, as Buffer counts it; and its words on the device, from `begin` on."""

    epochs: list[int] = dataclasses.field(default_factory=list)
    block: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    # int64: epoch, the bank's table, staged headers, groups of rows
    forwarded: Any = None  # what the forwarder was given for it, if there is one
    own_rounds: int = 1
    num_rounds: int = 1  # the maximum over ranks, once headers came
    refusal: PeerError | None = None  # a peer's, where this rank refused, too

    def raise_failure(self) -> None:
        if self.refusal is not None:
            raise self.refusal


class Lanes(NamedTuple):
    """Windows that a kernel writes: tables of their addresses and of the commit words behind them."""

    numbers: Tensor  # int32: those by network first
    windows: str
    num_links: int
    num_local: int
    commits: str = ""


class Windows(NamedTuple):
    """Rows to be read, of several sources. All on the device."""

    addresses: int  # where a table of them is
    rows: Tensor  # int32 [sources]
    starts: Tensor  # int32 [sources]: where those of a source begin in what is made of them
    head_bytes: int  # what lies in front of the rows
    free: bool = True  # who read them all tells the writers


class Told:
    """headers.cuh's Told, the tables behind it (by source), and perhaps the epoch behind those: on the device, or the
    host's copy. `whole`: all of it; `words`: but for the epoch."""

    def __init__(self, words: Tensor, num_sources: int, *, with_epoch: bool = False):
        self.whole, self._sources = words, num_sources
        self.epoch = words[-1:] if with_epoch else None
        self.words = words = words[:-1] if with_epoch else words
        self.tables = words[TOLD_WORDS:].view(torch.int32)

    @property
    def identity(self) -> int:
        """Its address."""
        return self.words[2:].data_ptr()

    @property
    def most_rounds(self) -> int:
        """The address of `rounds`."""
        return self.words[11:].data_ptr()

    @property
    def num_rows(self) -> Tensor:
        """int32 [1]"""
        return self.words[3:4].view(torch.int32)[:1]

    @property
    def rounds(self) -> int:
        """Of the host's copy."""
        return int(self.words[11])

    @property
    def rows(self) -> Tensor:
        return self._table(0)

    @property
    def starts(self) -> Tensor:
        return self._table(1)

    @property
    def tokens(self) -> Tensor:
        return self._table(2)

    @property
    def verdicts(self) -> Tensor:
        return self._table(3)

    def _table(self, number: int) -> Tensor:
        return self.tables[number * self._sources : (number + 1) * self._sources]

    def copies(self, num_counts: int) -> Tensor:
        """int32 [sources, num_counts]"""
        first = 4 * self._sources
        return self.tables[first : first + self._sources * num_counts].view(-1, num_counts)

    @staticmethod
    def num_words(num_sources: int, num_counts: int) -> int:
        return TOLD_WORDS + -(-num_sources * (4 + num_counts) // 2)


@dataclasses.dataclass(eq=False)
class Report:
    """A Told on its way to the host, and how its numbers become an error."""

    what: str  # "dispatch epoch 42"
    told: Told
    event: Any  # query()
    judge: Callable[[Told], None]
    captured: bool = False  # it comes again, with each replay
    judged: int = 0  # the epoch of the last one

    def look(self) -> None:
        """Raises what is wrong, once."""
        assert self.told.epoch is not None
        epoch = int(self.told.epoch)
        if epoch != self.judged:
            self.judged = epoch
            self.judge(self.told)


class Done:
    """The event of a device that is the host."""

    def query(self) -> bool:
        return True

    def wait(self) -> None:
        pass
