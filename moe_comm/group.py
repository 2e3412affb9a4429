"""EPGroup: the ranks that share the experts, how they talk while a Buffer is made, and which of them form nodes.

A node is a set of ranks that can store into each other's memory. Who can is not asked but tried: every rank makes a
shared segment, and every other rank maps it (the functional probe). Nodes are numbered by their lowest rank.
"""

import contextlib
import dataclasses
import datetime
import functools
import os
import pickle
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from . import _engine
from .errors import ArgumentError, MismatchError, PeerLost, PeerTimeout

GATHER_TIMEOUT_S = 300.0
_POLL_S = 0.01

_process_groups: dict[
    str, "EPGroup"
] = {}  # by c10d's name: a Buffer's successor meets the same EPGroup
_mpi_groups: list[tuple[Any, "EPGroup"]] = []  # likewise, by communicator


class EPGroup:
    """R ranks and a way to gather small objects from all of them; used while Buffers are made, never by an exchange.

    Make one by `EPGroup.of(process_group)`, `EPGroup.from_store(...)`, `EPGroup.from_mpi(comm)`, or
    `EPGroup.threads(n)` (ranks as threads of one process: unit tests without processes).
    """

    def __init__(self, rank: int, num_ranks: int, gather: Callable[[Any], list[Any]], name: str):
        self.rank = rank
        self.num_ranks = num_ranks
        self.name = name
        self.num_buffers = 0  # made so far; the same on all ranks, because making one is collective
        self._gather = gather
        self._bounded: Callable[[Any], list[Any]] | None = None
        self._secret: int | None = None
        self._store: dist.Store | None = None
        self.process_group: dist.ProcessGroup | None = None
        self.engines: dict[tuple[str, str, int, int], _engine.Engine] = {}
        self.lock = threading.Lock()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank (None of one that is absent). Blocks; collective. Raises PeerTimeout naming
        who is missing."""
        return (self._bounded or self._gather)(value)

    @contextlib.contextmanager
    def bounded(
        self, name: str, timeout_s: float, lost: Callable[[], Sequence[bool]]
    ) -> Iterator[None]:
        """Gathers inside go over the Store under `name`, end `timeout_s` from now, and do not wait for ranks that
        `lost()` [R] says ended. Without a Store they are as usual. Raises: PeerLost, PeerTimeout."""
        with contextlib.suppress(ArgumentError):
            self._bounded = gather_over(
                self.store, self.rank, range(self.num_ranks), name, timeout_s, lost
            )
        try:
            yield
        finally:
            self._bounded = None

    @property
    def store(self) -> "dist.Store":
        """What survivors meet over. Raises ArgumentError for a group without one."""
        if self._store is None:
            raise ArgumentError("group: expected one with a torch Store (EPGroup.from_store)")
        return self._store

    @property
    def secret(self) -> int:
        """63 random bits of rank 0: peers that do not show them are not admitted. Collective at first use."""
        if self._secret is None:
            self._secret = self.gather(secrets.randbits(63))[0]
        return self._secret

    @property
    def known_secret(self) -> int | None:
        """`secret`, if it was agreed on; not collective."""
        return self._secret

    def adopt(self, members: "EPGroup", secret: int) -> None:
        """The secret of those who were here before, for this group and its members."""
        self._secret = members._secret = secret

    @classmethod
    def of(cls, group: "EPGroup | dist.ProcessGroup | None") -> "EPGroup":
        """An EPGroup as it is; a torch ProcessGroup (None: the default one) wrapped once.

        Raises: ArgumentError for anything else.
        """
        if isinstance(group, EPGroup):
            return group
        if group is None:
            if not dist.is_initialized():
                raise ArgumentError(
                    "group: expected a ProcessGroup, or torch.distributed initialised, got None"
                )
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise ArgumentError(
                f"group: expected a torch ProcessGroup or an EPGroup, got {type(group).__name__}"
            )
        made = _process_groups.get(group.group_name)
        if made is None or made.process_group is not group:
            made = _ProcessGroup(group)
            _process_groups[group.group_name] = made
        return made

    @classmethod
    def from_store(
        cls,
        store: "dist.Store",
        rank: int,
        num_ranks: int,
        *,
        name: str = "ep",
        timeout_s: float = GATHER_TIMEOUT_S,
    ) -> "EPGroup":
        """Ranks that share a torch Store (FileStore, TCPStore, HashStore). `name` keeps groups on one store apart."""
        if not 0 <= rank < num_ranks:
            raise ArgumentError(f"rank: expected 0 <= rank < {num_ranks}, got {rank}")
        made = cls(
            rank, num_ranks, gather_over(store, rank, range(num_ranks), name, timeout_s), name
        )
        made._store = store
        return made

    def of_members(self, members: Sequence[int], name: str, timeout_s: float) -> "EPGroup":
        """The same ranks, of which only `members` are present: gathers over the Store under `name`."""
        found = gather_over(self.store, self.rank, members, name, timeout_s)

        def gather(value: Any) -> list[Any]:
            values: list[Any] = [None] * self.num_ranks
            for r, theirs in zip(members, found(value), strict=True):
                values[r] = theirs
            return values

        made = EPGroup(self.rank, self.num_ranks, gather, self.name)
        made.engines, made.lock, made._secret = self.engines, self.lock, self._secret
        return made

    @classmethod
    def from_mpi(cls, comm: Any, *, name: str = "mpi") -> "EPGroup":
        """The ranks of an mpi4py communicator; the same EPGroup whenever this object is passed. Keeps it alive.

        Raises: ArgumentError for what has no Get_rank, Get_size and allgather.
        """
        for known, made in _mpi_groups:
            if known is comm:
                return made
        for method in ("Get_rank", "Get_size", "allgather"):
            if not callable(getattr(comm, method, None)):
                raise ArgumentError(
                    f"comm: expected an mpi4py communicator, got {type(comm).__name__} without {method}"
                )
        made = cls(comm.Get_rank(), comm.Get_size(), comm.allgather, f"{name}{len(_mpi_groups)}")
        _mpi_groups.append((comm, made))
        return made

    @classmethod
    def threads(cls, num_ranks: int, *, name: str = "threads") -> list["EPGroup"]:
        """One EPGroup for each of `num_ranks` threads of this process."""
        store = dist.HashStore()
        return [cls.from_store(store, r, num_ranks, name=name) for r in range(num_ranks)]


def gather_over(
    store: "dist.Store",
    rank: int,
    members: Sequence[int],
    name: str,
    timeout_s: float,
    lost: Callable[[], Sequence[bool]] | None = None,
) -> Callable[[Any], list[Any]]:
    """A gather of the members' values, in their order. Raises PeerTimeout naming who is missing.

    With `lost` [R], the ranks that ended: PeerLost as soon as one of them is missing; `timeout_s` begins now, for all
    gathers together.
    """
    sequence = iter(range(1 << 62))
    deadline = time.monotonic() + timeout_s

    def gather(value: Any) -> list[Any]:
        step = next(sequence)
        keys = {r: f"moe_comm/{name}/{step}/{r}" for r in members}
        store.set(keys[rank], pickle.dumps(value))  # type: ignore[arg-type]  # bytes work, the stub says str
        what = f"group {name!r}, step {step}: rank {rank} waited"
        if lost is None:
            _wait(store, keys, what, timeout_s)
        else:
            _wait_or_lose(store, keys, what, timeout_s, deadline, lost)
        return [pickle.loads(store.get(key)) for key in keys.values()]

    return gather


def _wait(store: "dist.Store", keys: dict[int, str], what: str, timeout_s: float) -> None:
    try:
        store.wait(list(keys.values()), datetime.timedelta(seconds=timeout_s))
    except RuntimeError:  # DistStoreError is one; FileStore raises the bare class
        missing = [r for r, key in keys.items() if not store.check([key])]
        if not missing:
            raise
        raise PeerTimeout(f"{what} {timeout_s:.1f} s for ranks {missing}") from None


def _wait_or_lose(
    store: "dist.Store",
    keys: dict[int, str],
    what: str,
    timeout_s: float,
    deadline: float,
    lost: Callable[[], Sequence[bool]],
) -> None:
    while missing := [r for r, key in keys.items() if not store.check([key])]:
        ended = lost()
        if gone := [r for r in missing if ended[r]]:
            raise PeerLost(f"{what} for ranks {gone}, which ended")
        if time.monotonic() >= deadline:
            raise PeerTimeout(f"{what} {timeout_s:.1f} s for ranks {missing}")
        time.sleep(_POLL_S)


class _ProcessGroup(EPGroup):
    def __init__(self, group: dist.ProcessGroup):
        def gather(value: Any) -> list[Any]:
            values: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(values, value, group=group)
            return values

        super().__init__(dist.get_rank(group), dist.get_world_size(group), gather, group.group_name)
        self.process_group = group

    @property
    def store(self) -> "dist.Store":
        assert self.process_group is not None
        return distributed_c10d._get_process_group_store(self.process_group)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Which rank is where. N nodes of G ranks; agreed on all ranks."""

    rank: int
    num_ranks: int
    node_of: tuple[int, ...]  # [R]
    local_of: tuple[int, ...]  # [R] index inside the node
    rank_of: tuple[int, ...]  # [N * G]

    @functools.cached_property
    def num_nodes(self) -> int:
        return max(self.node_of) + 1

    @functools.cached_property
    def node_ranks(self) -> int:
        return self.num_ranks // self.num_nodes

    @property
    def node(self) -> int:
        return self.node_of[self.rank]

    def is_local(self, rank: int) -> bool:
        return self.node_of[rank] == self.node

    @classmethod
    def from_nodes(cls, rank: int, nodes: list[list[int]]) -> "Topology":
        """`nodes`: disjoint lists of ranks. Unequal ones fall back to one rank per node."""
        num_ranks = sum(len(node) for node in nodes)
        nodes = sorted((sorted(node) for node in nodes), key=lambda node: node[0])
        if len({len(node) for node in nodes}) > 1:
            nodes = [[r] for r in range(num_ranks)]
        node_of, local_of = [0] * num_ranks, [0] * num_ranks
        for n, node in enumerate(nodes):
            for local, r in enumerate(node):
                node_of[r], local_of[r] = n, local
        return cls(
            rank,
            num_ranks,
            tuple(node_of),
            tuple(local_of),
            tuple(r for node in nodes for r in node),
        )


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a group learnt about itself before its windows are made."""

    topology: Topology
    one_host: bool  # every rank can map every other's memory
    # (i, n): i-th of n ranks of this host, and of this node if nodes are pretended, that may use the same CPUs.
    place: tuple[int, int] = (0, 1)


def survey(
    group: EPGroup, ranks_per_node: int, agreed: dict[str, Any], home: tuple[int, ...] | None = None
) -> Survey:
    """Collective. Finds the nodes by the functional probe, and checks that all ranks passed the same `agreed`.

    `home`: node_of of an earlier survey, where this rank knows one: absent ranks stay with those they lived with.
    Raises: MismatchError naming the argument and both ranks; ArgumentError where `ranks_per_node` does not fit.
    """
    secret = group.secret
    probe = _engine.SharedBuffer(4096)
    memoryview(probe)[:8] = secret.to_bytes(8, "little")
    facts = group.gather(
        {
            "probe": probe.name, "agreed": agreed, "host": socket.gethostname(), "home": home,
            "cpus": sorted(os.sched_getaffinity(0)),
        }
    )  # fmt: skip
    present = [r for r, fact in enumerate(facts) if fact is not None]
    lowest = present[0]
    for name in agreed:
        for r in present:
            if facts[r]["agreed"].get(name) != facts[lowest]["agreed"].get(name):
                raise MismatchError(
                    f"{name}: rank {r} passed {facts[r]['agreed'].get(name)!r}, "
                    f"rank {lowest} passed {facts[lowest]['agreed'].get(name)!r}"
                )
    reach = [fact is not None and bool(_engine.can_map(fact["probe"], secret)[0]) for fact in facts]
    num_ranks = group.num_ranks
    can = [[False] * num_ranks if answer is None else answer for answer in group.gather(reach)]
    one_host = all(can[a][b] for a in present for b in present)
    if ranks_per_node:
        if num_ranks % ranks_per_node:
            raise ArgumentError(
                f"ranks_per_node: expected a divisor of {num_ranks} ranks, got {ranks_per_node}"
            )
        nodes = [
            list(range(first, first + ranks_per_node))
            for first in range(0, num_ranks, ranks_per_node)
        ]
        for node in nodes:
            for a in node:
                for b in node:
                    if a in present and b in present and not can[a][b]:
                        raise ArgumentError(
                            f"ranks_per_node: {ranks_per_node} puts ranks {a} and {b} on one node, but rank {a} "
                            f"({facts[a]['host']}) cannot map the memory of rank {b} ({facts[b]['host']})"
                        )
    else:
        nodes = _nodes_of(can)
        homes = [facts[r]["home"] for r in present if facts[r]["home"]]
        if len(present) < num_ranks and homes:
            nodes = _with_absent(nodes, set(present), homes[0])
    mates = next(node for node in nodes if group.rank in node) if ranks_per_node else present
    alike = [
        r for r in mates
        if r in present and can[group.rank][r] and facts[r]["cpus"] == facts[group.rank]["cpus"]
    ]  # fmt: skip
    place = (alike.index(group.rank), len(alike))
    return Survey(Topology.from_nodes(group.rank, nodes), one_host, place)


def _with_absent(
    nodes: list[list[int]], present: set[int], home: tuple[int, ...]
) -> list[list[int]]:
    """Each absent rank joins the node of those it lived with, so that nodes of one size stay so."""
    nodes = [[r for r in node if r in present] for node in nodes]
    nodes = [node for node in nodes if node]
    for r in range(len(home)):
        if r in present:
            continue
        mates = [node for node in nodes if any(home[m] == home[r] for m in node)]
        mates[0].append(r) if len(mates) == 1 else nodes.append([r])
    return nodes


def _nodes_of(can: list[list[bool]]) -> list[list[int]]:
    """Sets of ranks that all reach each other, both ways; where reach is not an equivalence, single ranks."""
    ranks = range(len(can))
    mutual = [frozenset(b for b in ranks if can[a][b] and can[b][a]) | {a} for a in ranks]
    if all(mutual[b] == mutual[a] for a in ranks for b in mutual[a]):
        return [sorted(node) for node in sorted(set(mutual), key=min)]
    return [[r] for r in ranks]
