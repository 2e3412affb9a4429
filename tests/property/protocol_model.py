"""An executable model of one exchange and of the calls built from it.

The model runs every rank of a small world as agents that an adversarial scheduler interleaves:

- the **user's thread** of a rank sends and unpacks, in program order;
- the **forwarder** of a rank passes rows on (dispatch) and adds rows (combine), in send order, and
  is started by the send, never by a hook;
- the **network** splits each message into 1 to 64 writes, lands them in any order, and reports each
  write's immediate and its local completion any time after its bytes.

Protocol state (`protocol_state`) is what the package keeps: windows in two banks, a send region per
link and bank, the releases that a writer knows of, counts per (table row, epoch) of immediates
whose epoch and number of writes have six bits. Truth is kept beside it, where no agent may look: a
window knows whether its bytes were read, a send region how many writes may still read it. An agent
that overwrites such bytes is `Corrupt`; wrong rows, sums or verdicts are `Wrong`; when nobody can
move it is a deadlock. `protocol_world` has the worlds, calls and programs.

Rules are switched off one at a time: `VARIANTS` names each breach. Rows hold tokens instead of
numbers, and a sum is the tuple of its terms, so that lost, repeated and misordered terms differ.

Window ``("slot", n, l)`` of a rank is always written by its neighbour of local index l on behalf of
node n: in a dispatch with the rows of rank (n, l), in a combine with l's results for the source
(n, own local index). Window ``("link", q)`` is written by rank q of another node over the network.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from functools import partial

from protocol_state import (
    AgentSteps,
    CallState,
    Corrupt,
    Exchange,
    Header,
    Immediate,
    Mismatch,
    Rank,
    Row,
    Wait,
    Window,
    Write,
    Wrong,
)
from protocol_world import COMBINE, DISPATCH, Call, Key, Scenario, World

VARIANTS = {
    "separate_sequences": "dispatch and combine share one sequence of epochs and its banks",
    "kind_not_checked": "a message of another kind, or dispatch, in the expected epoch is an error",
    "narrow_epochs": "counters are wide: six bits are widened before they are compared",
    "flags_reset_by_reader": "nobody resets a flag that another may have set or may still read",
    "no_credit_check": "a bank of epoch e is written after its reader released e − 2",
    "forwarder_without_credit": "the same, for rows that the forwarder writes",
    "single_release_counter": "a release is per bank",
    "boolean_release_flag": "a release carries its epoch",
    "piggybacked_release": "a release never waits for a message to ride on",
    "release_before_forward_done": "released means all reads are done: the forwarder's",
    "release_before_unpack": "released means all reads are done: the user's",
    "reuse_send_region_before_release": "a send region is reused after the reader's release …",
    "reuse_send_region_before_local_completion": "… and the local completion of its writes",
    "forward_in_hook": "forwarding never depends on the user's hook",
    "sum_in_hook": "the forwarder's sum never depends on the user's hook",
    "third_unhooked_call": "a third un-hooked call raises",
    "raise_without_taking_part": "a rank that raises still takes part in the exchange",
    "hooked_call_in_rounds": "a call with a hook is one round",
    "older_receive_left_to_hook": "before epoch e is sent, own receives up to e − 2 are completed",
    "own_round_counts": "the number of rounds is the maximum over all ranks",
    "count_from_own_node": "the number of rounds is learnt from all R first headers",
    "count_from_own_tokens": "calls that do not learn use ⌈M/C⌉, M agreed at construction",
    "no_empty_rounds": "a rank sends empty rounds up to the maximum",
    "more_than_two_rounds_ahead": "a rank sends its own rounds at most two ahead",
    "no_header_when_empty": "every source sends a header, even with no rows",
    "epoch_bits_not_checked": "immediates are counted per (table row, epoch)",
    "read_at_first_write": "a message is complete when all of its writes were counted",
    "forwarder_drops_status": "a forwarder's header carries the status of its node's headers",
    "rows_of_latest_dispatch": "a combine uses the rows in its own dispatch's handle",
}


class Agent:
    """A thread: runs until it waits, goes on when what it waits for is true."""

    def __init__(self, steps: AgentSteps) -> None:
        self.steps, self.done = steps, False
        self.wait: Wait | None = None

    def run(self) -> bool:
        """Go on to the next wait; return whether the agent could move."""
        if self.done or (self.wait is not None and not self.wait()):
            return False
        self.wait = next(self.steps, None)
        self.done = self.wait is None
        return True


class Simulation:
    """One run of a scenario under one seeded schedule, with at most one rule broken."""

    def __init__(
        self,
        world: World,
        scenario: Scenario,
        seed: int,
        broken: str | None = None,
        first_epoch: int = 0,
        max_writes: int = 3,
    ) -> None:
        if broken is not None and broken not in VARIANTS:
            raise ValueError(f"broken: expected a key of VARIANTS, got {broken!r}")
        self.world, self.scenario, self.broken = world, scenario, broken
        self.first_epoch, self.max_writes = first_epoch, max_writes
        self.rng = random.Random(seed)
        self.events: list[tuple[float, int, Callable[[], None]]] = []  # the network: any order
        self.num_posted = 0
        self.failed = {c.idx for c in scenario.calls if c.bad_rank is not None}  # truth
        self.ranks = [Rank(r, world, first_epoch) for r in range(world.num_ranks)]
        # Both are correct: forwarding that starts before or after the send's own stores, and a
        # receive that does or does not wait for the forwarder of its rank.
        self.enqueue_first = self.rng.random() < 0.5
        self.receive_waits = world.hops == "node" and self.rng.random() < 0.5

    # ---- the scheduler -----------------------------------------------------------------------

    def run(self) -> str:
        """Return "ok", or "corrupt", "wrong", "mismatch" or "deadlock" and what happened."""
        users = [Agent(self.user(rank)) for rank in self.ranks]
        agents = users + [Agent(self.forwarder(rank)) for rank in self.ranks]
        self.rng.shuffle(agents)
        network_share = self.rng.choice((0.05, 0.4, 0.9))
        rotate_share = self.rng.choice((0.02, 1.0))  # fixed priorities for a while, or fair turns
        try:
            while not all(user.done for user in users):
                if self.events and self.rng.random() < network_share:
                    self.deliver()
                    continue
                if self.rng.random() < rotate_share:
                    first = self.rng.randrange(len(agents))
                    agents = agents[first:] + agents[:first]
                if any(agent.run() for agent in agents):
                    continue
                if not self.events:
                    return "deadlock"
                self.deliver()
        except (Corrupt, Wrong, Mismatch) as error:
            return f"{type(error).__name__.lower()}: {error}"
        return "ok"

    def post(self, event: Callable[[], None]) -> None:
        self.num_posted += 1
        heapq.heappush(self.events, (self.rng.random(), self.num_posted, event))

    def deliver(self) -> None:
        heapq.heappop(self.events)[2]()

    # ---- the network and the proxy -----------------------------------------------------------

    def write_link(
        self,
        rank: Rank,
        peer: int,
        header: Header,
        rows: Callable[[], list[Row]],
        forwarding: bool = False,
    ) -> AgentSteps:
        """Pack rows into the send region and post them as one message of several writes."""
        region, early = (header.epoch & 1, peer), self.broken == "reuse_send_region_before_release"
        if not early:
            yield from self.wait_for_credit(rank, peer, header.epoch, forwarding)
            if self.broken != "reuse_send_region_before_local_completion":
                yield lambda: not rank.in_flight[region]
        packed = rows()
        if rank.in_flight[region]:
            raise Corrupt(f"rank {rank.idx} packs epoch {header.epoch} over rows still being sent")
        if early:
            yield from self.wait_for_credit(rank, peer, header.epoch, forwarding)
        header = header._replace(num_rows=len(packed))
        num_writes = self.rng.randint(1, self.max_writes)
        rank.in_flight[region] += num_writes
        owed = rank.owed.pop(peer, [])
        for i in range(num_writes):
            part = {j: packed[j] for j in range(i, len(packed), num_writes)}
            first = (header, owed) if i == 0 else (None, [])
            write = Write(rank, peer, header.epoch, num_writes, part, *first)
            self.post(partial(self.land, write))

    def land(self, write: Write) -> None:
        """One write's bytes arrive; its immediate and its local completion follow (H4)."""
        reader, sender, epoch = self.ranks[write.peer], write.rank, write.epoch
        window = reader.window(epoch, ("link", sender.idx))
        window.write(epoch, write.header, write.rows, f"link {sender.idx}")
        if write.header and self.broken == "read_at_first_write":
            window.committed = epoch
        for released in write.owed:
            self.learn_release(reader, sender.idx, released, released)
        bits = Immediate(sender.idx, epoch, write.num_writes).pack()
        self.post(partial(self.count, reader, bits))
        self.post(partial(sender.in_flight.subtract, [(epoch & 1, write.peer)]))

    def count(self, rank: Rank, bits: int) -> None:
        """The proxy counts an immediate and publishes a message that is complete."""
        immediate = Immediate.unpack(bits)
        row, checked = immediate.table_row, self.broken != "epoch_bits_not_checked"
        counter = (row, immediate.epoch if checked else 0)
        rank.counts[counter] += 1
        if rank.counts[counter] < immediate.num_writes:
            return
        del rank.counts[counter]
        bank = immediate.epoch & 1
        last = rank.last[row, bank]
        epoch = last + 2 + ((immediate.epoch - last - 2 + 32) & 63) - 32  # widened: nearest to due
        if checked and epoch != last + 2:
            raise Wrong(f"rank {rank.idx} expects epoch {last + 2} in row {row}, got {epoch}")
        rank.last[row, bank] = epoch
        published = immediate.epoch if self.broken == "narrow_epochs" else epoch
        if row < self.world.num_ranks:
            window = rank.window(epoch, ("link", row))
            window.committed = max(window.committed, published)
        else:
            self.learn_release(rank, row - self.world.num_ranks, epoch, published)

    # ---- credits and releases ----------------------------------------------------------------

    def wait_for_credit(
        self, rank: Rank, reader: int, epoch: int, forwarding: bool = False
    ) -> AgentSteps:
        """Wait until `reader` has released epoch − 2, as far as `rank` knows."""
        bank = epoch & 1
        if self.broken == "no_credit_check":
            return
        if self.broken == "forwarder_without_credit" and forwarding:
            return
        if self.broken == "single_release_counter":
            yield lambda: rank.num_releases[reader] >= epoch - 1 - self.first_epoch
        elif self.broken == "boolean_release_flag":
            yield lambda: rank.free[reader, bank]
        else:
            yield lambda: rank.released[reader, bank] >= epoch - 2

    def write_slot(self, rank: Rank, peer: int, key: Key, header: Header, rows: list[Row]) -> None:
        """Store rows into a window of a neighbour; the commit is the last store (H1)."""
        window = self.ranks[peer].window(header.epoch, key)
        header = header._replace(num_rows=len(rows))
        window.write(header.epoch, header, dict(enumerate(rows)), f"rank {rank.idx}")
        window.committed = header.epoch

    def learn_release(self, rank: Rank, reader: int, epoch: int, published: int) -> None:
        known = rank.released[reader, epoch & 1]
        rank.released[reader, epoch & 1] = max(known, published)
        rank.num_releases[reader] += 1
        rank.free[reader, epoch & 1] = True

    def finish_read(self, rank: Rank, epoch: int, reader: str) -> None:
        """The user's thread or the forwarder is done with a bank; the last of them releases it."""
        needed = {"user", "forwarder"} if self.world.hops == "node" else {"user"}
        if self.broken == "release_before_forward_done":
            needed = {"user"}
        elif self.broken == "release_before_unpack":
            needed = {"forwarder"} & needed
        rank.finished[epoch].add(reader)
        if reader not in needed or not rank.finished[epoch] >= needed:
            return
        for peer in self.world.neighbours(rank.idx):
            self.learn_release(self.ranks[peer], rank.idx, epoch, epoch)
        for peer in self.world.link_peers(rank.idx):
            if self.broken == "piggybacked_release":
                rank.owed[peer].append(epoch)
            else:
                bits = Immediate(self.world.num_ranks + rank.idx, epoch, 1).pack()
                self.post(partial(self.count, self.ranks[peer], bits))

    # ---- sending -----------------------------------------------------------------------------

    def send(
        self, rank: Rank, state: CallState, round_idx: int, silent: bool = False
    ) -> AgentSteps:
        """Send one round: own rows at once, other ranks' rows by a job of the forwarder."""
        call = state.call
        answers = state if call.kind == DISPATCH else rank.states[call.of]
        epoch = self.take_epoch(rank, call.kind)
        of = "" if call.kind == DISPATCH else f" of epoch {answers.exchanges[0].epoch}"
        exchange = Exchange(epoch, state, round_idx, call.kind + of, answers)
        state.exchanges.append(exchange)
        rank.pending.append(exchange)
        yield from self.complete_older(rank, epoch)
        if self.broken == "flags_reset_by_reader":
            for (bank, _), window in rank.windows.items():
                window.committed = -9 if bank == epoch & 1 else window.committed
        if self.enqueue_first:
            self.enqueue(rank, exchange)
        if not silent:
            writes = self.send_dispatch if call.kind == DISPATCH else self.send_combine
            yield from writes(rank, exchange)
        if self.broken == "boolean_release_flag":
            rank.free.update({(q, epoch & 1): False for q in range(self.world.num_ranks)})
        if not self.enqueue_first:
            self.enqueue(rank, exchange)

    def take_epoch(self, rank: Rank, kind: str) -> int:
        kind = kind if self.broken == "separate_sequences" else DISPATCH
        rank.next_epoch[kind] += 1
        return rank.next_epoch[kind] - 1

    def complete_older(self, rank: Rank, epoch: int) -> AgentSteps:
        """Complete every own receive up to epoch − 2, whose hook may be called much later."""
        if self.broken in ("more_than_two_rounds_ahead", "third_unhooked_call"):
            return
        for older in [x for x in rank.pending if x.epoch <= epoch - 2]:
            if self.broken != "older_receive_left_to_hook" or not older.state.call.hooked:
                yield from self.receive(rank, older)

    @staticmethod
    def header(exchange: Exchange) -> Header:
        state = exchange.state
        num_tokens = len(state.tokens)
        num_rounds = state.rounds(num_tokens)
        return Header(exchange.epoch, exchange.kind, not state.raises, 0, num_tokens, num_rounds)

    def send_dispatch(self, rank: Rank, exchange: Exchange) -> AgentSteps:
        header = self.header(exchange)
        tokens = exchange.state.part(exchange.state.tokens, exchange.round_idx)
        for peer in self.in_some_order(rank):
            served = self.world.served(rank.idx, peer)
            rows: list[Row] = [((t, rank.idx),) for t in tokens if t.ranks & served]
            if self.broken == "no_header_when_empty" and not rows:
                continue
            if peer in self.world.neighbours(rank.idx):
                yield from self.wait_for_credit(rank, peer, exchange.epoch)
                self.write_slot(rank, peer, self.world.slot(rank.idx), header, rows)
            else:
                yield from self.write_link(rank, peer, header, partial(list, rows))

    def send_combine(self, rank: Rank, exchange: Exchange) -> AgentSteps:
        """Store the results for each source where the forwarder of its rail adds them."""
        header, world = self.header(exchange), self.world
        local = world.place(rank.idx)[1]

        def results(source: int) -> list[Row]:
            received = () if exchange.state.raises else exchange.answers.received[source]
            tokens = exchange.state.part(received, exchange.round_idx)
            return [((t, rank.idx),) for t in tokens]

        for peer in self.in_some_order(rank):
            if peer not in world.neighbours(rank.idx):
                if world.hops == "rank":
                    yield from self.write_link(rank, peer, header, partial(results, peer))
                continue
            yield from self.wait_for_credit(rank, peer, exchange.epoch)
            for source in [peer, *(world.link_peers(peer) if world.hops == "node" else ())]:
                key = ("slot", world.place(source)[0], local)
                self.write_slot(rank, peer, key, header, results(source))

    def in_some_order(self, rank: Rank) -> list[int]:
        peers = [*self.world.neighbours(rank.idx), *self.world.link_peers(rank.idx)]
        self.rng.shuffle(peers)
        return peers

    # ---- forwarding --------------------------------------------------------------------------

    def forwarder(self, rank: Rank) -> AgentSteps:
        while True:
            yield lambda: bool(rank.jobs)
            yield from rank.jobs.popleft()

    def in_hook(self, exchange: Exchange) -> bool:
        kind = exchange.state.call.kind
        return self.broken == ("forward_in_hook" if kind == DISPATCH else "sum_in_hook")

    def enqueue(self, rank: Rank, exchange: Exchange) -> None:
        if self.world.hops == "node" and not self.in_hook(exchange):
            rank.jobs.append(self.forward(rank, exchange))

    def forward(self, rank: Rank, exchange: Exchange) -> AgentSteps:
        for source in self.world.link_peers(rank.idx):
            if exchange.state.call.kind == DISPATCH:
                yield from self.forward_rows(rank, exchange, source)
            else:
                yield from self.forward_sums(rank, exchange, source)
        self.finish_read(rank, exchange.epoch, "forwarder")

    def forward_rows(self, rank: Rank, exchange: Exchange, source: int) -> AgentSteps:
        """Copy the rows of one source to the neighbours that want them."""
        window = rank.window(exchange.epoch, ("link", source))
        yield lambda: window.committed >= exchange.epoch
        header, rows = self.read(rank, window, exchange)
        exchange.state.forwarded[source] += [row[0][0] for row in rows]
        for peer in self.world.neighbours(rank.idx):
            yield from self.wait_for_credit(rank, peer, exchange.epoch, True)
            _, rows = self.read(rank, window, exchange)  # they are still there
            wanted = [row for row in rows if peer in row[0][0].ranks]
            self.write_slot(rank, peer, self.world.slot(source), header, wanted)
        window.unread = False

    def forward_sums(self, rank: Rank, exchange: Exchange, source: int) -> AgentSteps:
        """Add the neighbours' results for one source and send them there."""
        node, near = self.world.place(source)[0], self.world.neighbours(rank.idx)
        keys: list[Key] = [("slot", node, self.world.place(q)[1]) for q in near]
        windows = {q: rank.window(exchange.epoch, key) for q, key in zip(near, keys, strict=True)}
        for window in windows.values():
            yield partial(self.is_complete, window, exchange)
        handle = exchange.answers
        if self.broken == "rows_of_latest_dispatch":
            handle = [s for s in rank.states.values() if s.call.kind == DISPATCH][-1]
        all_ok = all(self.read(rank, w, exchange)[0].ok for w in windows.values())

        def sums() -> list[Row]:
            rows, next_row = [], Counter[int]()
            tokens = exchange.state.part(handle.forwarded[source], exchange.round_idx)
            for token in tokens if all_ok else ():
                adding = [q for q in near if q in token.ranks]
                rows.append(sum((windows[q].row(next_row[q]) for q in adding), ()))
                next_row.update(adding)
            return rows

        ok = all_ok or self.broken == "forwarder_drops_status"
        header = self.header(exchange)._replace(ok=ok)
        yield from self.write_link(rank, source, header, sums, forwarding=True)
        for window in windows.values():
            window.unread = False

    # ---- receiving ---------------------------------------------------------------------------

    @staticmethod
    def is_complete(window: Window, exchange: Exchange) -> bool:
        return window.committed >= exchange.epoch

    def read(self, rank: Rank, window: Window, exchange: Exchange) -> tuple[Header, list[Row]]:
        """Return what is in a complete window, after the checks that every reader makes."""
        header = window.header
        if window.epoch != exchange.epoch or header is None:
            raise Wrong(f"rank {rank.idx} reads epoch {exchange.epoch}, finds {window.epoch}")
        if header.kind != exchange.kind and self.broken != "kind_not_checked":
            raise Mismatch(f"rank {rank.idx} expects {exchange.kind}, a peer sent {header.kind}")
        return header, [window.row(i) for i in range(header.num_rows)]

    def receive(self, rank: Rank, exchange: Exchange) -> AgentSteps:
        """Unpack one exchange, unless that was done already."""
        if exchange not in rank.pending:
            return
        if self.world.hops == "node" and self.in_hook(exchange):
            yield from self.forward(rank, exchange)
        unpack = self.unpack_rows if exchange.state.call.kind == DISPATCH else self.unpack_sums
        yield from unpack(rank, exchange)
        if self.receive_waits:
            yield lambda: "forwarder" in rank.finished[exchange.epoch]
        rank.pending.remove(exchange)
        self.finish_read(rank, exchange.epoch, "user")

    def unpack_rows(self, rank: Rank, exchange: Exchange) -> AgentSteps:
        state, near = exchange.state, self.world.neighbours(rank.idx)
        for key, source in self.world.dispatch_windows(rank.idx):
            window = rank.window(exchange.epoch, key)
            yield partial(self.is_complete, window, exchange)
            header, rows = self.read(rank, window, exchange)
            window.unread = False
            state.received[source] += [row[0][0] for row in rows]
            state.num_tokens[source] = header.num_tokens
            state.ok &= header.ok
            if source in near or self.broken != "count_from_own_node":
                state.num_rounds = max(state.num_rounds, header.num_rounds)

    def unpack_sums(self, rank: Rank, exchange: Exchange) -> AgentSteps:
        state = exchange.state
        tokens = state.part(exchange.answers.tokens, exchange.round_idx)
        for key, ranks in self.world.combine_windows(rank.idx):
            window = rank.window(exchange.epoch, key)
            yield partial(self.is_complete, window, exchange)
            header, _ = self.read(rank, window, exchange)
            state.ok &= header.ok
            wanted = [t for t in tokens if t.ranks & ranks] if header.ok else []
            for row_idx, token in enumerate(wanted):
                state.sums[token] += window.row(row_idx)
            window.unread = False

    # ---- calls -------------------------------------------------------------------------------

    def user(self, rank: Rank) -> AgentSteps:
        """The program of one rank, then close(), which completes what was never hooked."""
        for action, idx in self.scenario.programs[rank.idx]:
            if action == "call":
                yield from self.call(rank, self.scenario.calls[idx])
            elif idx in rank.unhooked:
                for exchange in rank.states[idx].exchanges:
                    yield from self.receive(rank, exchange)
                rank.unhooked.remove(idx)
                self.check(rank, rank.states[idx])
        for exchange in list(rank.pending):
            yield from self.receive(rank, exchange)

    def call(self, rank: Rank, call: Call) -> AgentSteps:
        tokens = call.tokens[rank.idx] if call.kind == DISPATCH else rank.states[call.of].tokens
        state = rank.states[call.idx] = CallState(call, tokens)
        third = call.hooked and len(rank.unhooked) == 2 and self.broken != "third_unhooked_call"
        too_long = call.hooked and state.rounds(len(tokens)) > 1
        if self.broken == "hooked_call_in_rounds":
            too_long = False
        if call.bad_rank == rank.idx or third or too_long:  # take part with nothing, then raise
            self.failed.add(call.idx)
            state.tokens, state.raises, state.ok = (), True, False
            if self.broken == "raise_without_taking_part":
                return
        if not call.hooked:
            yield from self.rounds(rank, state)
            self.check(rank, state)
            return
        for round_idx in range(state.rounds(len(state.tokens))):  # one, unless that rule is broken
            yield from self.send(rank, state, round_idx)
        if not state.raises:
            rank.unhooked.add(call.idx)

    def rounds(self, rank: Rank, state: CallState) -> AgentSteps:
        """Send and receive all rounds of a blocking call, pipelined over the two banks."""
        call = state.call
        num_rounds = own_rounds = state.rounds(len(state.tokens))
        learns = call.kind == DISPATCH and call.agreed_tokens is None
        if call.kind == COMBINE:
            num_rounds = state.rounds(max(rank.states[call.of].num_tokens.values()))
        elif call.agreed_tokens is not None and self.broken != "count_from_own_tokens":
            num_rounds = state.rounds(call.agreed_tokens)
        ahead = 99 if self.broken == "more_than_two_rounds_ahead" else 2
        sent = received = 0
        while received < num_rounds:
            while sent < min(num_rounds, received + ahead):
                silent = sent >= own_rounds and self.broken == "no_empty_rounds"
                yield from self.send(rank, state, sent, silent)
                sent += 1
            yield from self.receive(rank, state.exchanges[received])
            received += 1
            if learns and self.broken != "own_round_counts":
                num_rounds = max(num_rounds, state.num_rounds)

    def check(self, rank: Rank, state: CallState) -> None:
        """Compare what a finished call returned with what it means."""
        call, failed = state.call, state.call.idx in self.failed
        if state.ok == failed:
            raise Wrong(f"call {call.idx} on rank {rank.idx}: ok is {state.ok}, failed is {failed}")
        if failed:
            return
        if call.kind == DISPATCH:
            for source, tokens in enumerate(call.tokens):
                if state.received[source] != [t for t in tokens if rank.idx in t.ranks]:
                    raise Wrong(f"rank {rank.idx} got other rows of {source} in call {call.idx}")
        else:
            sums = {t: tuple((t, q) for q in sorted(t.ranks)) for t in state.tokens if t.ranks}
            if state.sums != sums:
                raise Wrong(f"rank {rank.idx} got other sums in call {call.idx}")
