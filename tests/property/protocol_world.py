"""What the protocol model runs on: a world of ranks, collective calls, and programs of steps.

A `Scenario` is what users write: the same collective calls in the same order on every rank, with
each rank's hooks wherever it likes. `SCENARIOS` makes them at random, each kind rich in one thing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

DISPATCH, COMBINE = "dispatch", "combine"
Key = tuple[str, int] | tuple[str, int, int]  # ("link", rank) or ("slot", node, local index)
Program = list[tuple[str, int]]  # ("call", call index) or ("hook", call index)


class Token(NamedTuple):
    """Token `number` of rank `source`, wanted by `ranks`."""

    source: int
    number: int
    ranks: frozenset[int]


@dataclass(frozen=True)
class World:
    """`num_nodes` nodes of `ranks_per_node` ranks; `hops` is "node" or "rank"."""

    num_nodes: int
    ranks_per_node: int
    hops: str = "node"

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    def place(self, rank: int) -> tuple[int, int]:
        """Return (node, local index)."""
        return divmod(rank, self.ranks_per_node)

    def neighbours(self, rank: int) -> range:
        """Return the ranks of the same node, `rank` included."""
        first = rank - rank % self.ranks_per_node
        return range(first, first + self.ranks_per_node)

    def link_peers(self, rank: int) -> list[int]:
        """Return the ranks that `rank` has links with: its rail, or all ranks of other nodes."""
        near, rail = self.neighbours(rank), self.place(rank)[1]
        far = [q for q in range(self.num_ranks) if q not in near]
        return [q for q in far if self.hops == "rank" or self.place(q)[1] == rail]

    def served(self, rank: int, peer: int) -> frozenset[int]:
        """Return the ranks whose rows travel between `rank` and its neighbour or link peer."""
        if peer in self.neighbours(rank) or self.hops == "rank":
            return frozenset((peer,))
        return frozenset(self.neighbours(peer))

    def slot(self, rank: int) -> Key:
        """Return the window that stands for `rank` at the ranks of a node."""
        return ("slot", *self.place(rank))

    def dispatch_windows(self, rank: int) -> list[tuple[Key, int]]:
        """Return (window, source) of what the user's thread of `rank` unpacks in a dispatch."""
        linked = self.link_peers(rank) if self.hops == "rank" else []
        return [(("link", q) if q in linked else self.slot(q), q) for q in range(self.num_ranks)]

    def combine_windows(self, rank: int) -> list[tuple[Key, frozenset[int]]]:
        """Return (window, ranks summed in it), ascending, of what `rank` adds in a combine."""
        near: list[tuple[int, Key]] = [(q, self.slot(q)) for q in self.neighbours(rank)]
        far: list[tuple[int, Key]] = [(q, ("link", q)) for q in self.link_peers(rank)]
        return [(key, self.served(rank, q)) for q, key in sorted(near + far)]


@dataclass(frozen=True)
class Call:
    """One collective call: a dispatch of `tokens` [rank], or a combine that answers call `of`."""

    idx: int
    kind: str
    tokens: tuple[tuple[Token, ...], ...] = ()
    of: int = -1
    rows_per_round: int = 2  # C, of the Buffer that makes this call
    hooked: bool = False
    agreed_tokens: int | None = None  # M: there are ⌈M/C⌉ rounds, none is learnt
    bad_rank: int | None = None  # this rank passes a wrong argument


@dataclass(frozen=True)
class Scenario:
    """The calls, and the program of each rank."""

    calls: tuple[Call, ...]
    programs: tuple[Program, ...]


def random_tokens(rng: random.Random, world: World, limit: int) -> tuple[tuple[Token, ...], ...]:
    """Return up to `limit` tokens per rank: often none, sometimes all for one hot rank."""
    ranks, hot = range(world.num_ranks), rng.randrange(world.num_ranks)
    skewed = rng.random() < 0.2
    out = []
    for source in ranks:
        num_tokens = rng.choice((0, limit, rng.randint(0, limit)))
        wanted = [{hot} if skewed else rng.sample(ranks, rng.randint(0, len(ranks)))]
        wanted += [rng.sample(ranks, rng.randint(0, len(ranks))) for _ in range(num_tokens)]
        picks = enumerate(wanted[:num_tokens])
        out.append(tuple(Token(source, i, frozenset(want)) for i, want in picks))
    return tuple(out)


def random_programs(
    rng: random.Random, world: World, calls: tuple[Call, ...], hook_early: float
) -> tuple[Program, ...]:
    """Call in order on every rank; put hooks anywhere that is legal, differently on each rank."""
    programs = []
    for rank in range(world.num_ranks):
        steps: Program = []
        unhooked: list[int] = []
        for call in calls:
            if call.of in unhooked:  # a combine needs the rows of its dispatch
                unhooked.remove(call.of)
                steps.append(("hook", call.of))
            while unhooked and (rng.random() < hook_early or (call.hooked and len(unhooked) == 2)):
                steps.append(("hook", unhooked.pop(rng.randrange(len(unhooked)))))
            steps.append(("call", call.idx))
            if call.hooked and rank != call.bad_rank:
                unhooked.append(call.idx)
        rng.shuffle(unhooked)
        programs.append(steps + [("hook", idx) for idx in unhooked])
    return tuple(programs)


def mixed(
    rng: random.Random,
    world: World,
    num_calls: int = 5,
    hooked: float = 0.5,
    max_tokens: int = 5,
    max_rows: int = 3,
    combines: float = 0.5,
    bad: float = 0.05,
    agreed: float = 0.2,
) -> Scenario:
    """Return calls of every kind that the protocol allows.

    `hooked`, `combines`, `bad` and `agreed` are the shares of calls that have a hook, answer an
    earlier dispatch, are refused by one rank, or have an agreed number of rounds.
    """
    calls: list[Call] = []
    for idx in range(num_calls):
        dispatches = [c for c in calls if c.kind == DISPATCH and c.bad_rank is None]
        has_hook, num_rows = rng.random() < hooked, rng.randint(1, max_rows)
        bad_rank = rng.randrange(world.num_ranks) if rng.random() < bad else None
        if dispatches and rng.random() < combines:
            of = rng.choice(dispatches)
            longest = max(map(len, of.tokens))
            num_rows = max(num_rows, longest) if has_hook else num_rows
            call = Call(idx, COMBINE, (), of.idx, num_rows, has_hook, None, bad_rank)
        else:
            tokens = random_tokens(rng, world, num_rows if has_hook else max_tokens)
            most = max(map(len, tokens)) + rng.randint(0, 2)
            agreed_tokens = most if rng.random() < agreed and not has_hook else None
            call = Call(idx, DISPATCH, tokens, -1, num_rows, has_hook, agreed_tokens, bad_rank)
        calls.append(call)
    hook_early = rng.choice((0.1, 0.5))
    return Scenario(tuple(calls), random_programs(rng, world, tuple(calls), hook_early))


def hooks(rng: random.Random, world: World) -> Scenario:
    """Only calls with hooks: two in flight nearly always."""
    return mixed(rng, world, 6, hooked=1.0, bad=0.0)


def rounds(rng: random.Random, world: World) -> Scenario:
    """Only blocking calls, of one token per round and very different lengths."""
    return mixed(rng, world, 3, hooked=0.0, max_rows=1, bad=0.0, agreed=0.0)


def agreed_rounds(rng: random.Random, world: World) -> Scenario:
    """The same with round counts that follow from an agreed M."""
    return mixed(rng, world, 3, hooked=0.0, max_rows=1, bad=0.0, agreed=1.0)


def wrong_input(rng: random.Random, world: World) -> Scenario:
    """Many calls that some rank refuses."""
    return mixed(rng, world, bad=0.5)


def handles(rng: random.Random, world: World) -> Scenario:
    """Two dispatches, then their combines, twice each, in any order."""
    calls = [Call(i, DISPATCH, random_tokens(rng, world, 4), rows_per_round=2) for i in (0, 1)]
    answered = [0, 1, 0, 1]
    rng.shuffle(answered)
    for idx, of in enumerate(answered, 2):  # with another C than the dispatch had
        calls.append(Call(idx, COMBINE, of=of, rows_per_round=rng.randint(1, 4)))
    return Scenario(tuple(calls), random_programs(rng, world, tuple(calls), 0.5))


def blocking_after_hooked(rng: random.Random, world: World) -> Scenario:
    """A call whose hook is called last of all, after blocking calls that need its bank."""
    calls = [Call(0, DISPATCH, random_tokens(rng, world, 2), hooked=True)]
    calls += [Call(i, DISPATCH, random_tokens(rng, world, 5)) for i in (1, 2)]
    programs = [[("call", 0), ("call", 1), ("call", 2), ("hook", 0)]] * world.num_ranks
    return Scenario(tuple(calls), tuple(programs))


def third_unhooked(rng: random.Random, world: World) -> Scenario:
    """One rank makes a third call without having hooked any; the others called a hook in time."""
    calls = [Call(i, DISPATCH, random_tokens(rng, world, 2), hooked=i < 3) for i in range(4)]
    late = [("call", 0), ("call", 1), ("call", 2), ("hook", 1), ("hook", 0), ("call", 3)]
    timely = [("call", 0), ("call", 1), ("hook", 0), ("call", 2), ("hook", 1), ("hook", 2)]
    programs = [[*timely, ("call", 3)] for _ in range(world.num_ranks)]
    programs[rng.randrange(world.num_ranks)] = late
    return Scenario(tuple(calls), tuple(programs))


def too_long_for_a_hook(rng: random.Random, world: World) -> Scenario:
    """A call with a hook that has more than C tokens on one rank, then a blocking call."""
    tokens = list(random_tokens(rng, world, 2))
    long = rng.randrange(world.num_ranks)
    tokens[long] = tuple(Token(long, i, frozenset((i % world.num_ranks,))) for i in range(3))
    calls = (
        Call(0, DISPATCH, tuple(tokens), hooked=True),
        Call(1, DISPATCH, random_tokens(rng, world, 3)),
    )
    programs = [[("call", 0), ("hook", 0), ("call", 1)] for _ in range(world.num_ranks)]
    programs[long] = [("call", 0), ("call", 1)]
    return Scenario(calls, tuple(programs))


def different_calls(rng: random.Random, world: World) -> Scenario:
    """One rank combines while the others dispatch, or answers another dispatch than they do."""
    scenario = handles(rng, world)
    odd = rng.randrange(world.num_ranks)
    other = Call(6, DISPATCH, random_tokens(rng, world, 2))
    if rng.random() < 0.5:
        other = replace(scenario.calls[2], idx=6, of=1 - scenario.calls[2].of)
    programs = list(scenario.programs)
    programs[odd] = [(action, 6 if idx == 2 else idx) for action, idx in programs[odd]]
    return Scenario((*scenario.calls, other), tuple(programs))


SCENARIOS: dict[str, Callable[[random.Random, World], Scenario]] = {
    f.__name__: f
    for f in (
        mixed,
        hooks,
        rounds,
        agreed_rounds,
        wrong_input,
        handles,
        blocking_after_hooked,
        third_unhooked,
        too_long_for_a_hook,
        different_calls,
    )
}
