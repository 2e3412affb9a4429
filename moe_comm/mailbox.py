"""Peers of a TransferEngine, and what two engines tell each other by themselves: greetings, small messages, barriers.

Everything here is a write with an immediate; no transport has send or receive. The network keeps no order, several
peers send at once, and an immediate does not say who sent it. So:

- **Sections.** Every engine has an *inbox*, a shared segment of `max_peers` sections of `slots` slots. `connect` gives
  the peer one section, for ever. Only that peer writes there, so no two writers ever meet.
- **Greeting.** The peer must learn its section before it has one to be told in, and by immediates alone, because these
  are counted and so never overwrite each other. `connect` sends four: each carries the section and another 16 bits of a
  hash of (who greets, who is greeted). The receiver looks for the one section for which all four are there. Each side
  connects to the other, so each learns its section; until then nothing is sent that could be lost.
- **Messages.** Message n goes to slot n mod slots; its immediate says section and slot. The receiver takes slots in
  order, copies, and returns a credit for every `slots / 4` messages. So at most `slots` are under way, none is lost,
  and a full mailbox blocks its sender only.
- **Barriers.** The immediate says section and number: barrier n of this pair of engines.
- **Goodbye.** `close` tells every peer, after its own writes have ended; not every transport would notice by itself.

NOTE [internal immediates] User immediates have 31 bits (csrc/abi.hpp). 0 … 2^30 - 1 are the user's. The rest is
  1 · kind 4 · 26 bits;  kinds 0-3 greeting: tag 16 · section 10;  4 message: section 10 · slot 16;
  5 credit: section 10 · 0;  6 barrier: section 10 · number mod 2^16;  7 goodbye: section 10 · 0.
  Sections are always the receiver's.

Rejected: a section announced by a write (where to? two newcomers would need different places), and one inbox that all
senders share (needs remote atomics, which not every network has).
"""

import dataclasses
import hashlib
import itertools
import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import _engine
from .arguments import expect as require
from .errors import ArgumentError, PeerTimeout, TransportError
from .transfer import Deadline, Transfer, names_of, raise_if_lost

if TYPE_CHECKING:
    from .engine import TransferEngine

USER_IMMEDIATES = 1 << 30
MAX_SECTIONS = 1 << 10
MAX_SLOTS = 1 << 16
GREETING, MESSAGE, CREDIT, BARRIER, GOODBYE = 0, 4, 5, 6, 7  # kinds
NUM_TAGS = 4
CREDIT_TIMEOUT_S = 5.0

Entry = tuple[
    int, int, int, int, bytes, int, int
]  # a write, as the binding takes it: see _engine.pyi

_SLOT = struct.Struct("<QQ")  # message number, bytes
_HEAD = struct.Struct("<4sQIIIIIII")  # see Address
_MAGIC = b"mcA1"


def internal(kind: int, section: int, rest: int = 0) -> int:
    """See NOTE [internal immediates]; `rest`: slot or number."""
    return USER_IMMEDIATES | kind << 26 | section << 16 | rest & 0xFFFF


def greeting(sender: int, receiver: int, section: int) -> list[int]:
    """The four immediates by which engine `sender` tells engine `receiver` its section."""
    pair = sender.to_bytes(8, "little") + receiver.to_bytes(8, "little")
    tags = struct.unpack("<4H", hashlib.blake2b(pair, digest_size=8).digest())
    return [
        USER_IMMEDIATES | (GREETING + i) << 26 | tag << 10 | section for i, tag in enumerate(tags)
    ]


@dataclasses.dataclass(frozen=True)
class Address:
    """What `TransferEngine.address` says, unpacked."""

    engine_id: int
    max_peers: int
    slots: int
    message_bytes: int
    transport: str
    name: str
    endpoint: bytes  # for the transport
    inbox: bytes  # descriptor, for the transport

    def pack(self) -> bytes:
        parts = [self.transport.encode(), self.name.encode(), self.endpoint, self.inbox]
        numbers = (self.engine_id, self.max_peers, self.slots, self.message_bytes)
        return _HEAD.pack(_MAGIC, *numbers, *map(len, parts)) + b"".join(parts)

    @classmethod
    def unpack(cls, address: bytes) -> "Address":
        """Raises: ArgumentError."""
        require(isinstance(address, bytes), "address", "bytes", type(address).__name__)
        good = len(address) >= _HEAD.size and address.startswith(_MAGIC)
        require(good, "address", "TransferEngine.address", f"{len(address)} other bytes")
        _, engine_id, max_peers, slots, message_bytes, *lengths = _HEAD.unpack_from(address)
        ends = list(itertools.accumulate(lengths, initial=_HEAD.size))
        require(ends[-1] == len(address), "address", f"{ends[-1]} bytes", len(address))
        transport, name, endpoint, inbox = (address[a:b] for a, b in itertools.pairwise(ends))
        return cls(
            engine_id=engine_id,
            max_peers=max_peers,
            slots=slots,
            message_bytes=message_bytes,
            transport=transport.decode(),
            name=name.decode(),
            endpoint=endpoint,
            inbox=inbox,
        )

    @property
    def slot_bytes(self) -> int:
        return -(-(_SLOT.size + self.message_bytes) // 64) * 64

    @property
    def section_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def batch(self) -> int:
        """How many messages one credit stands for."""
        return max(1, self.slots // 4)


class Peer:
    """Another engine, connected. Made by `TransferEngine.connect`; good until either side closes or dies."""

    def __init__(self, engine: "TransferEngine", address: Address, number: int, section: int):
        self.engine = engine
        self.address = address
        self.number = number  # the engine's own
        self.section = section  # the peer's, in our inbox
        self.there: int | None = None  # ours, in the peer's inbox, once greeted
        self.sent = self.credits = 0  # messages; `sent` may be `slots` ahead
        self.taken = 0  # messages received
        self.barriers = 0
        self.send_lock = threading.Lock()
        self.closed = False
        self._outbox: tuple[memoryview, int] | None = None
        self._left = False

    @property
    def name(self) -> str:
        """As its engine was named: "host:pid/…" unless `TransferEngine(name=…)` said otherwise."""
        return self.address.name

    @property
    def lost(self) -> str | None:
        """Why nothing can be sent to it any more; None while it is connected. Noticed within about 0.2 s."""
        if self.closed:
            return "closed by this engine"
        if self.engine.closed:
            return "this engine was closed"
        if not self._left and self.engine.native.count_immediates(internal(GOODBYE, self.section)):
            self._left = True
            self.engine.native.disconnect(self.number)  # ends our writes to it
        if self._left:
            return "it closed its engine"
        state, why = self.engine.native.peer_state(self.number)
        return (why or "lost") if state == "lost" else None

    def send(self, data: bytes, timeout_s: float | None = None) -> None:
        """See `TransferEngine.send`."""
        self.engine.send(self, data, timeout_s)

    def close(self) -> None:
        """Ends the connection to this peer and no other; its writes under way fail. It cannot be connected again."""
        if not self.closed:
            self.closed = True
            self.engine.native.disconnect(self.number)

    def outbox(self) -> tuple[memoryview, int]:
        """Where messages to it wait until they were read, and the region of that memory. Made when first needed."""
        if self._outbox is None:
            memory = _engine.SharedBuffer(self.address.section_bytes)
            region = self.engine.native.register(memory.address, self.address.section_bytes)
            self._outbox = memoryview(memory), region
        return self._outbox

    def __repr__(self) -> str:
        return f"Peer({self.name!r}{', lost' if self.lost is not None else ''})"


class Mailbox:
    """The inbox of one engine and the protocol above. All methods may be called by any thread."""

    def __init__(self, engine: "TransferEngine", address: Address):
        self._engine = engine
        self._address = address  # our own; endpoint and inbox are not filled in yet
        num_bytes = address.max_peers * address.section_bytes
        self._memory = _engine.SharedBuffer(num_bytes)  # sparse: a page exists once it was written
        self._view = memoryview(self._memory)
        self._region = engine.native.register(self._memory.address, num_bytes)
        self.descriptor = engine.native.describe(self._region)
        self._lock = threading.Lock()  # of what is taken: greetings, messages
        self._sections = itertools.count()
        self._first = 0  # who is looked at first by the next receive: everybody in turn
        self.num_sent = self.num_received = 0

    # --- greetings ---------------------------------------------------------------------------------

    def admit(self, address: Address, number: int) -> Peer:
        """A section for a peer, and the greeting that tells it. Raises: ArgumentError if none is left."""
        section = next(self._sections)
        if section >= self._address.max_peers:
            raise ArgumentError(
                f"address: expected at most {self._address.max_peers} peers in an engine's life (max_peers), "
                "got one more"
            )
        peer = Peer(self._engine, address, number, section)
        values = greeting(self._engine.id, address.engine_id, section)
        self._post([self._signal(peer, value) for value in values])
        return peer

    def pair(self, peer: Peer, deadline: Deadline, what: str) -> int:
        """Our section in the peer's inbox; waits until it connected to us."""
        seen = 0
        while (there := self._find_greeting(peer)) is None:
            self._engine.check()
            raise_if_lost([peer], what)
            if deadline.over:
                raise PeerTimeout(
                    f"{what}: {peer.name} did not connect to this engine within {deadline.seconds:.1f} s "
                    "(each side has to connect to the other)"
                )
            seen = self._engine.native.wait_immediates(seen, deadline.slice)
        return there

    def _find_greeting(self, peer: Peer) -> int | None:
        if peer.there is not None:
            return peer.there
        native = self._engine.native
        values = greeting(peer.address.engine_id, self._engine.id, 0)
        with self._lock:
            for section in range(peer.address.max_peers):
                if peer.there is None and all(native.count_immediates(v | section) for v in values):
                    for v in values:
                        native.take_immediates(v | section, 1, 0.0)
                    peer.there = section
        return peer.there

    def _signal(self, peer: Peer, immediate: int) -> Entry:
        """An immediate and no bytes. Some networks want memory to be named all the same."""
        return (peer.number, self._region, 0, 0, peer.address.inbox, 0, immediate)

    def _post(self, writes: list[Entry]) -> _engine.Operation:
        return self._engine.native.write(writes)

    def say_goodbye(self, deadline: Deadline) -> None:
        """To every peer that connected to us."""
        peers = [
            p for p in self._engine.peers if self._find_greeting(p) is not None and p.lost is None
        ]
        if peers:
            signals = [self._signal(p, internal(GOODBYE, p.there or 0)) for p in peers]
            Transfer(self._engine, self._post(signals), peers, "goodbye", None).settle(deadline)

    # --- messages ----------------------------------------------------------------------------------

    def send(self, peer: Peer, data: bytes, deadline: Deadline) -> None:
        """Blocks while the peer's mailbox is full."""
        limit = peer.address.message_bytes
        require(len(data) <= limit, "data", f"at most {limit} bytes", f"{len(data)}")
        what = "send"
        if not peer.send_lock.acquire(timeout=deadline.left):
            raise PeerTimeout(
                f"{what} to {peer.name}: another thread's send waits for {deadline.seconds:.1f} s"
            )
        try:
            there = self.pair(peer, deadline, what)
            self._await_credit(peer, deadline, what)
            slot = peer.sent % peer.address.slots
            place = slot * peer.address.slot_bytes
            view, region = peer.outbox()
            _SLOT.pack_into(view, place, peer.sent, len(data))
            view[place + _SLOT.size : place + _SLOT.size + len(data)] = data
            target = there * peer.address.section_bytes + place
            write = (
                *(peer.number, region, place, _SLOT.size + len(data), peer.address.inbox, target),
                internal(MESSAGE, there, slot),
            )
            operation = self._post([write])
            peer.sent += 1
            self.num_sent += 1
        finally:
            peer.send_lock.release()
        Transfer(self._engine, operation, [peer], what, None).finish(deadline)

    def _await_credit(self, peer: Peer, deadline: Deadline, what: str) -> None:
        value = internal(CREDIT, peer.section)
        while peer.sent - peer.credits >= peer.address.slots:
            if self._engine.native.take_immediates(value, 1, deadline.slice):
                peer.credits += peer.address.batch
                continue
            self._engine.check()
            raise_if_lost([peer], what)
            if deadline.over:
                raise PeerTimeout(
                    f"{what} to {peer.name}: its mailbox stayed full ({peer.address.slots} messages) "
                    f"for {deadline.seconds:.1f} s"
                )

    def receive(self, peers: Sequence[Peer] | None, deadline: Deadline) -> tuple[Peer, bytes]:
        """The next message of one of `peers`, or of any peer (None: peers may come while this waits)."""
        seen = 0
        while True:
            lost = [
                p for p in peers or () if p.lost is not None
            ]  # before looking: its last words count
            candidates = self._engine.peers if peers is None else peers
            message = self._take(candidates)
            if message is not None:
                return message
            self._engine.check()
            raise_if_lost(lost, "recv")
            if deadline.over:
                whom = names_of(candidates) or "anybody: no peer is connected"
                raise PeerTimeout(f"recv: waited {deadline.seconds:.1f} s for {whom}")
            seen = self._engine.native.wait_immediates(seen, deadline.slice)

    def _take(self, candidates: Sequence[Peer]) -> tuple[Peer, bytes] | None:
        native = self._engine.native
        with self._lock:
            for i in range(len(candidates)):
                peer = candidates[(self._first + i) % len(candidates)]
                slot = peer.taken % self._address.slots
                value = internal(MESSAGE, peer.section, slot)
                if native.count_immediates(value) and native.take_immediates(value, 1, 0.0):
                    self._first += i + 1
                    data = self._read(peer, slot)
                    break
            else:
                return None
            peer.taken += 1
            self.num_received += 1
            credit = peer.taken % self._address.batch == 0
        if credit and peer.lost is None:
            deadline = Deadline(
                CREDIT_TIMEOUT_S
            )  # it greeted before it sent; greetings may be overtaken, that is all
            there = self.pair(peer, deadline, "recv")
            operation = self._post([self._signal(peer, internal(CREDIT, there))])
            self._engine.hold(Transfer(self._engine, operation, [peer], "credit", None))
        return peer, data

    def _read(self, peer: Peer, slot: int) -> bytes:
        place = peer.section * self._address.section_bytes + slot * self._address.slot_bytes
        number, num_bytes = _SLOT.unpack_from(self._view, place)
        if number != peer.taken or num_bytes > self._address.message_bytes:
            raise TransportError(
                f"recv: {peer.name}: expected message {peer.taken}, found {number} of {num_bytes} bytes"
            )
        return bytes(self._view[place + _SLOT.size : place + _SLOT.size + num_bytes])

    # --- barriers ----------------------------------------------------------------------------------

    def barrier(self, peers: Sequence[Peer], deadline: Deadline) -> None:
        with self._lock:
            for peer in peers:
                peer.barriers += 1
            numbers = [peer.barriers for peer in peers]
        signals = []
        for peer, number in zip(peers, numbers, strict=True):
            there = self.pair(peer, deadline, "barrier")
            signals.append(self._signal(peer, internal(BARRIER, there, number)))
        operation = self._post(signals)
        waiting = {
            internal(BARRIER, peer.section, number): peer
            for peer, number in zip(peers, numbers, strict=True)
        }
        native = self._engine.native
        seen = 0
        while waiting:
            lost = [peer for peer in waiting.values() if peer.lost is not None]
            for value in list(waiting):
                if native.count_immediates(value) and native.take_immediates(value, 1, 0.0):
                    del waiting[value]
            self._engine.check()
            raise_if_lost([peer for peer in lost if peer in waiting.values()], "barrier")
            if waiting and deadline.over:
                raise PeerTimeout(
                    f"barrier: waited {deadline.seconds:.1f} s for {names_of(waiting.values())}; "
                    f"{len(peers) - len(waiting)} of {len(peers)} others are there"
                )
            if waiting:
                seen = native.wait_immediates(seen, deadline.slice)
        Transfer(self._engine, operation, peers, "barrier", None).finish(deadline)
