"""What one rank of the protocol model keeps: windows, counts, releases, and the calls it makes.

Beside the state of the protocol stands the truth, marked so, which only the model may look at: a
window knows whether its bytes were read, and says so when somebody overwrites them too early.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from protocol_world import COMBINE, DISPATCH, Call, Key, Token, World

Wait = Callable[[], bool]
AgentSteps = Generator[Wait, None, None]  # an agent: yields what it waits for
Row = tuple[tuple[Token, int], ...]  # terms (token, rank): one in a dispatch, the sum in a combine


class Corrupt(Exception):
    """Bytes were overwritten that somebody had still to read."""


class Wrong(Exception):
    """A rank got other rows, sums or errors than it should."""


class Mismatch(Exception):
    """A rank noticed that its peer makes another call: the error that users are to see."""


class Header(NamedTuple):
    """What precedes the rows of a message."""

    epoch: int
    kind: str
    ok: bool
    num_rows: int
    num_tokens: int
    num_rounds: int


class Window:
    """Receive memory of one source in one bank."""

    def __init__(self, committed: int) -> None:
        self.committed = committed  # what readers wait for: the last complete epoch
        self.epoch = committed  # truth: whose bytes are there
        self.unread = False  # truth: the reader of these bytes is not done
        self.header: Header | None = None
        self.rows: dict[int, Row] = {}

    def write(self, epoch: int, header: Header | None, rows: dict[int, Row], who: str) -> None:
        if epoch != self.epoch:
            if self.unread:
                raise Corrupt(f"{who} writes epoch {epoch} over unread epoch {self.epoch}")
            self.epoch, self.header, self.rows, self.unread = epoch, None, {}, True
        self.header = header or self.header
        self.rows.update(rows)

    def row(self, row_idx: int) -> Row:
        if row_idx not in self.rows:
            raise Wrong(f"row {row_idx} of epoch {self.epoch} was read before it was written")
        return self.rows[row_idx]


class Immediate(NamedTuple):
    """32 bits: 1 protocol · 19 table row · 6 epoch · 6 number of writes − 1."""

    table_row: int
    epoch: int
    num_writes: int

    def pack(self) -> int:
        return 1 << 31 | self.table_row << 12 | (self.epoch & 63) << 6 | (self.num_writes - 1) & 63

    @staticmethod
    def unpack(bits: int) -> Immediate:
        return Immediate(bits >> 12 & 0x7FFFF, bits >> 6 & 63, (bits & 63) + 1)


@dataclass(eq=False)
class CallState:
    """What one rank knows of one call; for a dispatch this is the handle."""

    call: Call
    tokens: tuple[Token, ...]  # its own; none where the call raises
    raises: bool = False  # on this rank, for its own arguments
    ok: bool = True  # nobody's header says that it raises
    num_rounds: int = 1  # the most that a first header says
    num_tokens: dict[int, int] = field(default_factory=dict)  # of each source
    received: dict[int, list[Token]] = field(default_factory=lambda: defaultdict(list))
    forwarded: dict[int, list[Token]] = field(default_factory=lambda: defaultdict(list))
    sums: dict[Token, Row] = field(default_factory=lambda: defaultdict(tuple))
    exchanges: list[Exchange] = field(default_factory=list)

    def rounds(self, num_tokens: int) -> int:
        """Return how many rounds `num_tokens` of a rank make: at least the one with the header."""
        return max(1, -(-num_tokens // self.call.rows_per_round))

    def part(self, tokens: Iterable[Token], round_idx: int) -> list[Token]:
        """Return those of `tokens` that this call carries in round `round_idx`."""
        return [t for t in tokens if t.number // self.call.rows_per_round == round_idx]


class Write(NamedTuple):
    """One of the `num_writes` writes of a message to `peer`; the first one has the header."""

    rank: Rank
    peer: int
    epoch: int
    num_writes: int
    rows: dict[int, Row]
    header: Header | None
    owed: list[int]  # releases that ride along, where they are allowed to


@dataclass(eq=False)
class Exchange:
    """One epoch, as one rank sees it."""

    epoch: int
    state: CallState
    round_idx: int
    kind: str
    answers: CallState  # the dispatch itself, or the one that this combine answers


class Rank:
    """The protocol state of one rank, as if all epochs before `first_epoch` were over."""

    def __init__(self, idx: int, world: World, first_epoch: int) -> None:
        self.idx = idx
        before = {bank: first_epoch - 2 + (bank - first_epoch) % 2 for bank in (0, 1)}
        ranks, links = range(world.num_ranks), world.link_peers(idx)
        keys = [world.slot(q) for q in ranks] + [("link", q) for q in links]
        self.windows = {(b, key): Window(before[b]) for b in before for key in keys}
        self.in_flight: Counter[tuple[int, int]] = Counter()  # (bank, peer): writes not completed
        # What this rank knows as a writer of others' banks: the epoch released per (reader, bank),
        # and two poorer forms of it that variants use.
        self.released = {(q, b): before[b] for q in ranks for b in before}
        self.num_releases: Counter[int] = Counter()
        self.free = {(q, b): True for q in ranks for b in before}
        # The proxy: immediates per (table row, epoch), the last complete epoch per (row, bank).
        # Table rows 0…R−1 are the link windows of each source, R…2R−1 the releases of each reader.
        self.counts: Counter[tuple[int, int]] = Counter()
        self.last = {(row, b): before[b] for row in range(2 * world.num_ranks) for b in before}
        # The user's thread.
        self.next_epoch = {DISPATCH: first_epoch, COMBINE: first_epoch}
        self.states: dict[int, CallState] = {}  # by call
        self.pending: list[Exchange] = []  # sent, not yet received
        self.unhooked: set[int] = set()  # calls
        # The forwarder, and which of the two is done with an epoch.
        self.jobs: deque[AgentSteps] = deque()
        self.finished: dict[int, set[str]] = defaultdict(set)
        self.owed: dict[int, list[int]] = defaultdict(list)  # releases that wait for a message

    def window(self, epoch: int, key: Key) -> Window:
        return self.windows[epoch & 1, key]
