"""TransferEngine: one-sided writes between processes, for people and for modules other than the exchange.

    a = TransferEngine(secret=s)                    b = TransferEngine(secret=s)          # addresses and descriptors
    peer = a.connect(b_address)                     peer = b.connect(a_address)           # travel by any means
    source = a.register(tensor)                     target = b.register(b.empty(n, dtype))
    a.write(peer, source, descriptor, imm=7)        b.expect(7, 1).wait()                 # now the bytes are here

What holds, on every transport (csrc/transport.hpp):

- Writes are reliable and in **no order**, not even two to one peer. The receiver learns that bytes arrived by the
  **immediate** of the same write, and by nothing else: it counts them, so both sides must agree on how many there are.
  One `write` carries one immediate, a `write_paged` of N pages carries N, an entry of a `scatter` one each.
- **Immediates** are 0 … 2^30 - 1; the engine's own lie above (mailbox.py, NOTE [internal immediates]). They are counted
  per value and engine, whoever sends them: give each peer, layer or request values of its own.
- **Admission**: a peer that does not show the same `secret` is refused, whatever it knows of addresses and descriptors.
  The secret is in neither: it travels with the process group (`group=…`) or by the user.
- **Waiting** is always bounded. A peer that is late: PeerTimeout; that died, closed or was disconnected: PeerLost; both
  name it. A lost peer stays lost: the process that comes back is a new engine with a new address.
- **Threads**: every method may be called by any thread. One native thread (the proxy) does the work; it sleeps when
  there is nothing to do, and steps aside while a thread that waits here anyway does the work itself.
- **Memory** registered or written from is kept alive by the engine until it is closed, or written.

Over "shm" memory made by `empty` is written by plain stores; other memory by a system call (process_vm_writev), which
some machines forbid between processes (the error says so).
"""

import contextlib
import dataclasses
import os
import secrets
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _engine, config, lifetime
from .arguments import describe
from .arguments import expect as require
from .errors import ArgumentError, ClosedError, MoeCommError, PeerTimeout
from .group import EPGroup
from .mailbox import MAX_SECTIONS, MAX_SLOTS, USER_IMMEDIATES, Address, Entry, Mailbox, Peer
from .region import Region, locate, shared_tensor
from .transfer import Deadline, Expectation, Transfer, check_timeout
from .watcher import Watcher
from .writes import Pages, Write, check_pages, check_peer, check_target, check_writes, is_int

if TYPE_CHECKING:
    from .device_ring import DeviceRing

CLOSE_TIMEOUT_S = 5.0  # of writes under way
GOODBYE_TIMEOUT_S = 1.0
KEPT_TRANSFERS = 64  # unfinished ones are looked through when there are so many


class TransferEngine:
    """One opened transport, with its regions and peers.

    Args:
        transport: "shm" (one host), "fabric:tcp;ofi_rxm", "fabric:efa", …; "auto" means "shm", because one engine alone
            cannot know where its peers are (default: MOE_COMM_TRANSPORT, "auto").
        interface: device, interface or source address (default: MOE_COMM_INTERFACE, the transport's own choice).
        secret: 63 bits that all peers share; default: those of `group`, else random (`engine.secret`).
        group: a torch ProcessGroup, an EPGroup, or None: gives the secret (collective) and allows `connect_group`.
        name: what errors of other engines call this one; default "host:pid/id".
        timeout_s: of every wait that is given none (MOE_COMM_TIMEOUT_S, 300).
        max_peers, mailbox_slots, message_bytes: the inbox for `send`: how many peers in the engine's life (at most
            1024), how many messages of each under way, of at most how many bytes. It takes memory where it was used.

    Raises: ArgumentError; TransportError with the reason if the transport cannot be opened.
    Source: the interface follows pplx-garden's TransferEngine; deadlines, mailboxes and admission are ours.
    """

    def __init__(
        self,
        transport: str | None = None,
        *,
        interface: str | None = None,
        secret: int | None = None,
        group: Any = None,
        name: str | None = None,
        timeout_s: float | None = None,
        max_peers: int = 128,
        mailbox_slots: int = 16,
        message_bytes: int = 4080,
    ):
        self._native: _engine.Engine | None = None  # until everything stands, and after close()
        self._closing = False
        self._lock = threading.RLock()
        self._connecting = threading.Lock()
        self._regions: set[Region] = set()
        self._watchers: set[Watcher] = set()
        self._peers: dict[int, Peer] = {}  # by engine id
        self._unfinished: list[Transfer] = []
        self._purge_at = KEPT_TRANSFERS
        require(is_int(max_peers, 1, MAX_SECTIONS), "max_peers", f"1 to {MAX_SECTIONS}", max_peers)
        require(
            is_int(mailbox_slots, 1, MAX_SLOTS),
            "mailbox_slots",
            f"1 to {MAX_SLOTS}",
            mailbox_slots,
        )
        require(is_int(message_bytes, 1, 1 << 30), "message_bytes", "1 to 2^30", message_bytes)
        require(
            secret is None or is_int(secret, 0, (1 << 63) - 1),
            "secret",
            "63 bits or None",
            "something else",
        )
        self._group = None if group is None else EPGroup.of(group)
        if secret is None:
            secret = self._group.secret if self._group is not None else secrets.randbits(63)
        self._secret = secret
        self._timeout_s = check_timeout(config.read("MOE_COMM_TIMEOUT_S", timeout_s), 0.0)
        asked = config.read("MOE_COMM_TRANSPORT", transport)
        require(isinstance(asked, str), "transport", "a name", describe(asked))
        self.transport = "shm" if asked == "auto" else asked
        self.id = secrets.randbits(64)
        self.name = (
            f"{socket.gethostname()}:{os.getpid()}/{self.id & 0xFFFF:04x}" if name is None else name
        )
        require(isinstance(self.name, str), "name", "a str", type(name).__name__)
        self._native = _engine.Engine(
            transport=self.transport,
            interface=config.read("MOE_COMM_INTERFACE", interface),
            secret=self._secret,
            chaos_seed=config.read("MOE_COMM_CHAOS_SEED"),
        )
        mine = Address(
            engine_id=self.id,
            max_peers=max_peers,
            slots=mailbox_slots,
            message_bytes=message_bytes,
            transport=self.transport,
            name=self.name,
            endpoint=self._native.address,
            inbox=b"",  # known once the mailbox stands
        )
        try:
            self._mailbox = Mailbox(self, mine)
        except BaseException:
            self._native = None  # its destructor ends the thread
            raise
        self._address = dataclasses.replace(mine, inbox=self._mailbox.descriptor).pack()
        lifetime.opened(self)

    # --- what it is --------------------------------------------------------------------------------

    @property
    def address(self) -> bytes:
        """All that another engine needs to `connect`, except the secret. The same for every peer; some 300 bytes."""
        return self._address

    @property
    def secret(self) -> int:
        """What peers must be given, by a way that only they can read."""
        return self._secret

    @property
    def peers(self) -> list[Peer]:
        """Every peer ever connected and not closed by this engine, in the order of `connect`."""
        return [peer for peer in list(self._peers.values()) if not peer.closed]

    @property
    def closed(self) -> bool:
        return self._native is None

    @property
    def native(self) -> _engine.Engine:
        """The engine in C++. Raises: ClosedError."""
        native = self._native
        if native is None:
            raise ClosedError(f"TransferEngine {self.name!r} was closed")
        return native

    def check(self) -> None:
        """Raises: ClosedError; the first error of the native thread."""
        self.native.raise_fault()

    def wait_for(self, operation: _engine.Operation, seconds: float) -> bool:
        """Whether it ended within `seconds`."""
        native = self._native
        return operation.wait(seconds) if native is None else native.wait(operation, seconds)

    def deadline(self, timeout_s: float | None) -> Deadline:
        """From now on. Raises: ArgumentError."""
        return Deadline(check_timeout(timeout_s, self._timeout_s))

    def stats(self) -> dict[str, int]:
        """Counted since the engine was made, its own writes included: writes, bytes, immediates (received), loops
        (helped: those of threads that waited, with something to do), sleeps, messages_sent, messages_received; and now:
        regions, peers, unfinished transfers."""
        self._purge()
        return {
            **self.native.stats(),
            "messages_sent": self._mailbox.num_sent,
            "messages_received": self._mailbox.num_received,
            "regions": len(self._regions),
            "peers": len(self.peers),
            "unfinished": len(self._unfinished),
        }

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self.peers)} peers"
        return f"TransferEngine({self.name!r}, {self.transport!r}, {state})"

    # --- memory ------------------------------------------------------------------------------------

    def register(self, memory: Any) -> Region:
        """Makes memory readable for writes of this engine and writable for its peers.

        Args:
            memory: a contiguous CPU tensor of any dtype (a view is fine: its bytes and no others), or an object with a
                writable, contiguous buffer: bytearray, numpy array, memoryview, mmap. At least 1 byte. Over "verbs"
                and "fabric:efa" also a CUDA tensor, whose device exports a dmabuf (never ran on hardware): streams that
                use it are the caller's to order.

        The memory must not move (`Tensor.resize_`, `set_`) while registered. Each call registers anew.
        Raises: ArgumentError; TransportError. Blocks for as long as the device needs to pin the pages.
        """
        self.check()
        region = Region(self, *locate(memory))
        with self._lock:
            self._regions.add(region)
        return region

    def empty(self, shape: int | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of zeros in shared memory: peers on this host write it by plain stores, without a system call.

        It has no name, no place in /dev/shm, and no limit but memory; it lives as long as the tensor or a view of it.
        Not registered yet. Raises: ArgumentError; TransportError if there is not enough memory.
        """
        return shared_tensor(shape, dtype)

    def forget(self, region: Region, number: int) -> None:
        """`Region.close` for the engine's part."""
        with self._lock:
            self._regions.discard(region)
            native = self._native
        if native is not None:
            native.forget(number)

    # --- peers -------------------------------------------------------------------------------------

    def connect(self, address: bytes, timeout_s: float | None = None) -> Peer:
        """Connects to the engine of that address, so that this engine may write to it. Blocks until it stands.

        A connection has one direction. `write` and `scatter` need no more; `send`, `barrier` and messages from the peer
        need it to connect to this engine, too (in any order: neither waits for the other here). Connecting again to the
        same engine returns the same Peer. An engine may connect to itself.

        Raises: ArgumentError for another transport's address, for one peer more than `max_peers`; PeerTimeout;
        MoeCommError saying so if the peer refuses (another secret); PeerLost if it is gone.
        """
        parsed = Address.unpack(address)
        deadline = self.deadline(timeout_s)
        same = parsed.transport == self.transport
        require(same, "address", f"one of transport {self.transport}", parsed.transport)
        self.check()
        if not self._connecting.acquire(timeout=deadline.left):
            raise PeerTimeout(f"connect to {parsed.name}: another thread's connect is under way")
        try:
            found = self._peers.get(parsed.engine_id)
            if found is not None:
                if found.closed:
                    raise ClosedError(
                        f"connect to {parsed.name}: it was closed by this engine, for good"
                    )
                return found
            number = self._open(parsed, deadline)
            peer = self._mailbox.admit(parsed, number)
            self._peers[parsed.engine_id] = peer
            return peer
        finally:
            self._connecting.release()

    def _open(self, address: Address, deadline: Deadline) -> int:
        """The number of a peer that is ready."""
        native = self.native
        number = native.connect(address.endpoint)
        while True:
            refused = native.peer_state(number)[0] == "lost"  # then wait_ready says why, at once
            try:
                native.wait_ready(number, deadline.slice)
                return number
            except MoeCommError as error:
                if refused or not isinstance(error, PeerTimeout):
                    raise type(error)(f"connect to {address.name}: {error}") from None
            if deadline.over:
                native.disconnect(number)
                raise PeerTimeout(
                    f"connect to {address.name}: no answer after {deadline.seconds:.1f} s"
                )
            self.check()

    def connect_group(self, timeout_s: float | None = None) -> "PeerGroup":
        """Connects all engines of `group` with each other. Collective, as are the gather and the barrier inside.

        Returns the others in the order of ranks. Raises: ArgumentError without a group; as `connect` and `barrier`.
        """
        if self._group is None:
            raise ArgumentError("group: expected TransferEngine(group=…), got None")
        addresses = self._group.gather(self.address)
        peers = [
            self.connect(a, timeout_s) for r, a in enumerate(addresses) if r != self._group.rank
        ]
        group = self.group(peers)
        group.barrier(timeout_s)
        return group

    def group(self, peers: Iterable[Peer]) -> "PeerGroup":
        """Some peers as one, checked once. Local: the others need not know."""
        return PeerGroup(self, peers)

    # --- writes ------------------------------------------------------------------------------------

    def write(
        self,
        peer: Peer,
        region: Region,
        descriptor: bytes,
        *,
        local_offset: int = 0,
        remote_offset: int = 0,
        num_bytes: int | None = None,
        imm: int | None = None,
    ) -> Transfer:
        """Writes bytes of `region` into the peer's region behind `descriptor`. Does not wait for the network.

        Args:
            local_offset, remote_offset: in bytes, from the beginning of each region.
            num_bytes: default: from `local_offset` to the end of the local region. 0 with `imm`: the immediate alone.
            imm: 0 … 2^30 - 1, counted once at the peer when these bytes can be read there; None: nothing is counted.
                With an immediate at most 2^30 bytes.

        Raises: ArgumentError if the bytes do not lie inside both regions, for a descriptor of another engine than the
        peer's, for closed regions; nothing was written then. All else is raised by `Transfer.wait`.
        """
        entry = Write(peer, region, descriptor, local_offset, remote_offset, num_bytes, imm)
        return self.scatter([entry])

    def scatter(self, writes: Sequence[Write]) -> Transfer:
        """Several writes at once, to any peers. Each has its own immediate. They are independent: one peer that is lost
        or slow holds up no other, but the Transfer is done when all are, with the first error.

        Raises: ArgumentError as `write`, before anything is written; it names the entry.
        """
        entries = check_writes(self, writes)
        peers = list(dict.fromkeys(w.peer for w in writes))
        what = f"write of {sum(entry[3] for entry in entries)} bytes"
        return self._post(entries, peers, what, [w.region.memory for w in writes])

    def write_paged(
        self,
        peer: Peer,
        region: Region,
        pages_src: Any,
        descriptor: bytes,
        pages_dst: Any,
        page_bytes: int,
        *,
        src_stride: int | None = None,
        dst_stride: int | None = None,
        local_offset: int = 0,
        remote_offset: int = 0,
        imm: int | None = None,
    ) -> Transfer:
        """Writes N pages: page `pages_src[i]` of `region` to page `pages_dst[i]` of the peer's region.

        Args:
            pages_src, pages_dst: N page numbers each: lists, or 1-D integer tensors on the CPU.
            page_bytes: bytes of a page.
            src_stride, dst_stride: bytes from one page to the next (default: `page_bytes`).
            local_offset, remote_offset: where page 0 begins: source i is at local_offset + src_stride * pages_src[i].
            imm: carried by **every page**: the receiver expects N counts.

        Raises: ArgumentError if a page does not lie inside its region; nothing was written then.
        """
        check_target(self, peer, region, descriptor, "")
        source = Pages("src", pages_src, src_stride, local_offset)
        target = Pages("dst", pages_dst, dst_stride, remote_offset)
        entries = check_pages(peer, region, source, descriptor, target, page_bytes, imm)
        return self._post(entries, [peer], f"write of {len(entries)} pages", region.memory)

    def _post(self, entries: list[Entry], peers: list[Peer], what: str, keep: object) -> Transfer:
        transfer = Transfer(self, self.native.write(entries), peers, what, keep)
        self.hold(transfer)
        return transfer

    def hold(self, transfer: Transfer) -> None:
        """Until it ended: somebody has to hold its memory, also if the caller drops it."""
        if not transfer.done:
            with self._lock:
                self._unfinished.append(transfer)
                if len(self._unfinished) >= self._purge_at:
                    self._purge()

    def _purge(self) -> None:
        with self._lock:
            self._unfinished = [transfer for transfer in self._unfinished if not transfer.done]
            self._purge_at = max(KEPT_TRANSFERS, 2 * len(self._unfinished))

    # --- immediates --------------------------------------------------------------------------------

    def expect(self, imm: int, count: int = 1, *, peers: Iterable[Peer] = ()) -> Expectation:
        """`count` immediates of value `imm`, to be waited for: `expect(7, 3).wait(timeout_s)`.

        `peers`: who is to send them; if one is lost, `wait` raises PeerLost at once instead of PeerTimeout later.
        Raises: ArgumentError.
        """
        require(is_int(imm, 0, USER_IMMEDIATES - 1), "imm", "0 to 2^30 - 1", imm)
        require(is_int(count, 1, 1 << 62), "count", "at least 1", count)
        senders = list(peers)
        for peer in senders:
            check_peer(self, peer, "peers")
        self.check()
        return Expectation(self, imm, count, senders)

    def count(self, imm: int) -> int:
        """How many immediates of this value arrived and were not taken off by an Expectation."""
        return self.native.count_immediates(imm)

    # --- messages and barriers ---------------------------------------------------------------------

    def send(self, peer: Peer, data: bytes, timeout_s: float | None = None) -> None:
        """Sends a small message: it is copied, arrives whole, once, and in the order of this engine's sends to it.

        Blocks until it was handed to the network: so while the peer's mailbox is full (the peer has to `recv`), and
        until the peer connected to this engine.

        Args:
            data: bytes or another contiguous buffer, at most the peer's `message_bytes` (4080); may be empty.

        Raises: ArgumentError; PeerTimeout (nothing was sent, unless it says "not finished"); PeerLost.
        """
        check_peer(self, peer, "peer")
        try:
            message = bytes(memoryview(data))
        except (TypeError, ValueError, BufferError):
            raise ArgumentError(f"data: expected bytes, got {describe(data)}") from None
        self.check()
        self._mailbox.send(peer, message, self.deadline(timeout_s))

    def recv(
        self, timeout_s: float | None = None, *, peer: Peer | None = None
    ) -> tuple[Peer, bytes]:
        """The next message and who sent it; of `peer` alone, or of all peers in turn. Makes room for one more.

        Messages of one peer come in order. What a peer sent before it closed or died can still be received.
        Raises: PeerTimeout; PeerLost if `peer` is given, is lost, and left no message.
        """
        if peer is not None:
            check_peer(self, peer, "peer")
        self.check()
        return self._mailbox.receive(None if peer is None else [peer], self.deadline(timeout_s))

    def barrier(self, peers: Iterable[Peer], timeout_s: float | None = None) -> None:
        """Returns when every one of `peers` called `barrier` with the same set (each without itself) as often.

        Between two engines barriers are matched in the order of calls, whatever other peers they name. One that raised
        counts as called. It says nothing about writes: wait for their immediates.

        Raises: PeerTimeout naming who is missing; PeerLost; ArgumentError.
        """
        members = list(dict.fromkeys(peers))
        for peer in members:
            check_peer(self, peer, "peers")
        self.check()
        if members:
            self._mailbox.barrier(members, self.deadline(timeout_s))

    # --- watchers ----------------------------------------------------------------------------------

    def watcher(self, word: Tensor | None = None) -> Watcher:
        """A 64-bit word that somebody bumps and this process reacts to; see `Watcher`.

        `word`: int64 [1] on the CPU (pinned memory that a kernel writes, say); default: a new one, zero, in shared
        memory, which a peer can bump as well if it is registered.
        """
        self.check()
        watcher = Watcher(self, word)
        with self._lock:
            self._watchers.add(watcher)
        return watcher

    def forget_watcher(self, watcher: Watcher) -> None:
        with self._lock:
            self._watchers.discard(watcher)

    # --- rings of GPUs -----------------------------------------------------------------------------

    def device_ring(self, device: torch.device | str, **options: Any) -> "DeviceRing":
        """A ring that kernels of `device` push commands to; see `DeviceRing`."""
        from .device_ring import DeviceRing  # loads device code

        return DeviceRing(self.native, device, **options)

    # --- end ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Waits for writes under way (at most 5 s); ends watchers, connections and registrations. Twice is fine.

        Peers raise PeerLost from now on; waits of other threads of this engine raise ClosedError. Raises what a
        watcher's callback raised.
        """
        with self._lock:
            native = self._native
            watchers = list(self._watchers)
            if native is None or self._closing:
                return
            self._closing = True
        error: BaseException | None = None
        for watcher in watchers:
            try:
                watcher.close()
            except BaseException as raised:
                error = error or raised
        deadline = Deadline(CLOSE_TIMEOUT_S)
        for transfer in list(self._unfinished):
            transfer.settle(deadline)
        deadline = Deadline(GOODBYE_TIMEOUT_S)
        with contextlib.suppress(MoeCommError):
            self._mailbox.say_goodbye(deadline)
        with self._lock:
            self._native = None
        native.stop()  # nothing reads or writes our memory from here on
        self._unfinished.clear()
        self._regions.clear()
        if error is not None:
            raise error

    def leave_to_parent(self) -> list[object]:
        """See lifetime.py."""
        native, self._native = self._native, None
        self._closing = True
        self._lock = threading.RLock()  # a thread of the parent may hold the old one
        return [] if native is None else [native]

    def __enter__(self) -> "TransferEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_native", None) is not None:
            self.close()


class PeerGroup:
    """Some peers of one engine, checked and put in order once: `engine.group([…])`, `engine.connect_group()`."""

    def __init__(self, engine: TransferEngine, peers: Iterable[Peer]):
        self._engine = engine
        self.peers = tuple(peers)
        for peer in self.peers:
            check_peer(engine, peer, "peers")
        distinct = len(set(self.peers)) == len(self.peers)
        require(distinct, "peers", "each peer once", "one of them twice")

    def scatter(
        self,
        region: Region,
        descriptors: Sequence[bytes],
        *,
        num_bytes: int,
        local_offsets: Sequence[int] | None = None,
        remote_offsets: Sequence[int] | None = None,
        imm: int | None = None,
    ) -> Transfer:
        """`num_bytes` bytes to each peer: from `local_offsets[i]` (default: i * num_bytes; all 0 is a broadcast) to
        `remote_offsets[i]` (default: 0) of `descriptors[i]`, with the immediate. Raises as `TransferEngine.scatter`."""
        n = len(self.peers)
        local = [i * num_bytes for i in range(n)] if local_offsets is None else local_offsets
        remote = [0] * n if remote_offsets is None else remote_offsets
        lists = {"descriptors": descriptors, "local_offsets": local, "remote_offsets": remote}
        for name, values in lists.items():
            require(len(values) == n, name, f"one for each of {n} peers", len(values))
        return self._engine.scatter(
            [
                Write(p, region, d, at, to, num_bytes, imm)
                for p, d, at, to in zip(self.peers, descriptors, local, remote, strict=True)
            ]
        )

    def barrier(self, timeout_s: float | None = None) -> None:
        """See `TransferEngine.barrier`."""
        self._engine.barrier(self.peers, timeout_s)

    def __iter__(self) -> Iterator[Peer]:
        return iter(self.peers)

    def __len__(self) -> int:
        return len(self.peers)

    def __getitem__(self, index: int) -> Peer:
        return self.peers[index]
