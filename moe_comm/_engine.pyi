"""Types of the engine in C++ (csrc/bindings.cpp). It imports without torch: tensors come as addresses, peers and
regions as bytes. Every call raises `MoeCommError` or one of its kinds; calls that wait release the GIL.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, final

ABI_VERSION: int
HEADER_BYTES: int
ROW_ALIGNMENT: int
rows: ModuleType  # the CPU's kernels one by one, for tests: csrc/bindings_rows.cpp

_SegmentName = tuple[int, int, int, int]
"""How another process finds a shared segment: pid, fd, inode, bytes."""

_Write = tuple[int, int, int, int, bytes, int, int]
"""One write: peer, local region, local offset, bytes, remote descriptor, remote offset, immediate (-1: none)."""

class MoeCommError(RuntimeError):
    """Base of every error of moe_comm."""

class ArgumentError(MoeCommError, ValueError):
    """A wrong argument of this rank: name, expected, found."""

class PeerError(MoeCommError):
    """Another rank raised in the same call; its text follows."""

class MismatchError(PeerError):
    """Ranks passed different parameters to the same call."""

class PeerTimeout(MoeCommError, TimeoutError):
    """A peer that lives did not come before the deadline."""

class PeerLost(MoeCommError, ConnectionError):
    """A peer died, left, or gave up."""

class TransportError(MoeCommError):
    """A call of the network or the system failed."""

class ClosedError(MoeCommError):
    """Used after close()."""

def can_map(name: _SegmentName, secret: int) -> tuple[bool, str]:
    """Whether this process can map that segment and finds `secret` in its first 8 bytes; if not, why."""

def choose_nics(
    *,
    efa: bool,
    gpu: str = "",
    cpus: list[int] | None = None,
    place: int = 0,
    num_places: int = 1,
    sysfs: str = "",
) -> tuple[list[str], str]:
    """The NICs that a rank takes, and why: those nearest to its GPU (a PCI address); without one its share, `place` of
    `num_places`, of those at the NUMA nodes of `cpus` (default: this thread's). Raises TransportError if there is none.
    """

def gpus(sysfs: str = "") -> list[str]:
    """PCI addresses of this host's NVIDIA GPUs, ascending."""

def transports() -> list[dict]:
    """Every transport that was built in: `name`, `available`, `detail` (version, devices), `reason` (why not, fix)."""

@final
class HostBlock:
    """Memory with the buffer protocol, from the process's pool and back to it: csrc/host_pool.hpp."""

    def __init__(self, num_bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def never_destroy(thing: object) -> None:
    """Keeps a reference for as long as the process lives."""

def kept_host_bytes() -> int: ...
def release_kept_host_memory() -> None: ...
def wait_word(address: int, old: int, seconds: float) -> int:
    """The uint64 at `address` once it differs from `old`, or as it is after `seconds`. Spins, yields, then naps."""

@final
class Operation:
    """Writes under way, as one. It ends once: well, or with the first error."""

    @property
    def done(self) -> bool: ...
    def wait(self, seconds: float) -> bool:
        """Blocks until it ended; False after `seconds`."""

    def raise_status(self) -> None:
        """Raises the first error, if any."""

@final
class SharedBuffer:
    """Memory without a name (a memfd) that shm peers write without a system call; whole pages, zeros.

    Writable through the buffer protocol. Lives as long as this object or a view of it.
    """

    def __init__(self, num_bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def address(self) -> int: ...
    @property
    def name(self) -> _SegmentName: ...

@final
class Engine:
    """One transport and the proxy thread that drives it. May be used by any thread."""

    def __init__(
        self,
        transport: str = "shm",
        interface: str = "",
        secret: int = 0,
        shard_bytes: int = 0,
        chaos_seed: int = 0,
        gpu: str = "",
    ) -> None:
        """`transport`: "shm", "fabric:<provider>", "verbs", or with devices "fabric:efa:rdmap0s6+rdmap1s6",
        "verbs:mlx5_0". Peers with another `secret` (64 bits) are refused. `gpu`: as in `choose_nics`, where
        fabric:efa or verbs is given no device."""

    @property
    def transport(self) -> str: ...
    @property
    def address(self) -> bytes: ...
    def register(
        self, address: int, num_bytes: int, dmabuf: int = -1, offset: int = 0, device: int = 0
    ) -> int:
        """Registers memory of the host, or, with its dmabuf, of a GPU (`device`: its number); returns the region's
        number. The caller keeps the memory alive."""

    def forget(self, region: int) -> None:
        """Withdraws a registration once writes under way from it have ended."""

    def describe(self, region: int) -> bytes:
        """The descriptor by which peers write there: uint64 words; base, bytes, key, then the backend's own."""

    def connect(self, address: bytes) -> int:
        """Begins to connect; returns the peer's number. Never blocks."""

    def wait_ready(self, peer: int, seconds: float) -> None:
        """Returns when the peer is ready. Raises PeerTimeout after `seconds`; TransportError or PeerLost if refused."""

    def disconnect(self, peer: int) -> None:
        """Ends that peer's writes with an error each; touches no other peer."""

    def peer_state(self, peer: int) -> tuple[str, str]:
        """("connecting" | "ready" | "lost", why it was lost)."""

    def write(self, writes: Sequence[_Write]) -> Operation:
        """Hands writes to the proxy, in no order. Each carries its own immediate (31 bits), if any."""

    def wait(self, operation: Operation, seconds: float) -> bool:
        """`operation.wait`, doing the proxy's work meanwhile if nobody else does."""

    def take_immediates(self, value: int, count: int, seconds: float) -> bool:
        """Waits until `value` was counted `count` times since the last take, takes them off; False after `seconds`."""

    def count_immediates(self, value: int) -> int:
        """How often `value` was counted and not yet taken."""

    def wait_immediates(self, seen: int, seconds: float) -> int:
        """Waits until more than `seen` immediates ever arrived, of any value; returns how many did."""

    def raise_fault(self) -> None:
        """Raises the proxy's first error, if any."""

    def stop(self) -> None:
        """Drains what is under way (at most 5 s) and ends the proxy. Peers notice when this object is gone."""

    def stats(self) -> dict[str, int]:
        """Counts since it was made: writes, bytes, immediates, commands, loops, sleeps, dropped_immediates."""

    # csrc/bindings_rings.cpp
    def attach_ring(
        self,
        num_slots: int = 4096,
        num_words: int = 64,
        num_times: int = 0,
        timeout_s: float = 300.0,
        silent_s: float = 30.0,
        first_ticket: int = 0,
    ) -> MappedRing:
        """A ring that the proxy serves from now on."""

    def detach_ring(self, ring: MappedRing) -> None:
        """Ends what is armed in it; its memory stays as long as the ring."""

    def open_row(self, words: int, what: str, first_epoch: int) -> int:
        """An immediate row whose completed epochs go to the two words (uint64, by bank) at that address."""

    def close_row(self, row: int) -> None: ...
    def open_channel(self, peer: int, region: int, descriptor: bytes, row: int) -> int:
        """What a Transfer names: writes from that region to the peer's, counted in the peer's `row`."""

    def open_wait(
        self,
        what: str,
        who: str,
        sources: Sequence[tuple[int, int, str, int]],
        channels: Sequence[int],
    ) -> int:
        """What an Arm names: the epoch is complete when each source's word (two by bank, at its address) says so, and
        this rank's writes of its bank on `channels` ended. A source: address, peer (-1: none), who it is, address of
        its heartbeat word (0: none).
        """

    def close_channel(self, channel: int) -> None:
        """Of `open_channel` or `open_wait`; what is armed with it ends."""

@final
class MappedRing:
    """A command ring in host memory that a GPU can map: csrc/mapped_ring.hpp."""

    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """Of the slots, the word `taken`, the abort word, the words of armed waits, the times of timed ones."""

    @property
    def num_slots(self) -> int: ...
    @property
    def num_words(self) -> int: ...
    @property
    def timeout_ns(self) -> int: ...
    def word(self, word_idx: int) -> tuple[int, int]:
        """(ended, status) of an armed wait."""

    def raise_fault(self) -> None:
        """Raises what ended it, if anything."""

    @property
    def blamed(self) -> int:
        """1 + the rank for which the wait was that ended it; 0: none."""

    def stats(self) -> dict[str, int]:
        """commands, torn, armed, ended, failed."""

@final
class CallFormat:
    """What calls of the same shapes share. `row`: the eight numbers of a RowFormat, in its order."""

    def __init__(
        self,
        kind: int,
        row: Sequence[int],
        num_experts: int,
        dtype: int,
        flags: int,
        capacity: int,
        cached: bool,
        expand: bool,
        /,
    ) -> None: ...
    @property
    def capacity(self) -> int: ...

@final
class Call:
    """One dispatch (kind 1) or combine (kind 2) in progress: csrc/exchange.hpp. Tensors come as addresses (0: none),
    their strides in bytes; whoever calls keeps them alive."""

    def __init__(
        self,
        format: CallFormat,
        late_s: float,
        silent_s: float,
        num_nodes: int,
        node_ranks: int,
        own_rows_direct: bool,
        /,
    ) -> None: ...
    def set_source(
        self,
        num_tokens: int,
        x: int,
        x_stride: int,
        topk_idx: int,
        topk_weights: int,
        lane_rows: int,
        /,
    ) -> None: ...
    def set_scales(
        self, scales: int, token_stride: int, item_stride: int, item_bytes: int, /
    ) -> None: ...
    def set_handle(
        self,
        number: int,
        lane_rows: int,
        recv_tokens: int,
        positions: int,
        tokens_of: Sequence[int],
        totals: Sequence[int],
        /,
    ) -> None:
        """Of the dispatch that a combine, or a cached dispatch, repeats."""

    def set_received(
        self, x: int, scales: int, ids: int, weights: int, recv_tokens: int, positions: int, /
    ) -> None:
        """A dispatch's outputs."""

    def set_results(
        self,
        num_tokens: int,
        y: int,
        y_stride: int,
        weights: int,
        columns: int,
        columns_by_place: bool,
        /,
    ) -> None:
        """A combine's inputs."""

    def set_summed(
        self, out: int, out_stride: int, columns: int, bias: int, bias_stride: int, /
    ) -> None:
        """A combine's outputs, and the bias its sums start from."""

    def set_lanes(self, topk_idx: int, weights: int, each_copy: bool, /) -> None:
        """Of this rank's tokens: sums go by the lanes of topk_idx. each_copy: the copies travel one by one."""

    def set_wait_ns(self, wait_ns: int) -> None:
        """Of int64 [R], kept alive by the caller: the nanoseconds this rank waited for each rank are added."""

    def set_max_tokens(self, max_tokens: int) -> None:
        """Of a dispatch: all ranks raise MismatchError if one of them has more tokens."""

    def set_error(self, text: str) -> None:
        """This rank's arguments were wrong: it takes part with no tokens, the others raise PeerError."""

    @property
    def failed(self) -> bool: ...
    def raise_failure(self) -> None:
        """Raises the first error found in the peers' headers, if any."""

    def set_forward(
        self,
        node: int,
        tokens: int,
        rows: int,
        num_rows: int,
        node_ranks: int,
        /,
    ) -> None:
        """Loads a handle's forward table of one node: addresses of int32 [num_rows] and [num_rows, G]."""

    @property
    def forward_counts(self) -> tuple[int, ...]: ...
    def copy_forward(self, node: int, tokens: int, rows: int) -> None: ...
    @property
    def own_rounds(self) -> int: ...
    @property
    def num_rounds(self) -> int: ...
    @property
    def tokens_of(self) -> tuple[int, ...]: ...
    @property
    def totals(self) -> tuple[int, ...]: ...
    @property
    def identity(self) -> int: ...
    @property
    def epochs(self) -> list[int]: ...

@final
class Exchange:
    """One rank's windows and links: csrc/exchange.hpp. Made in the order of its methods; keeps its engine alive."""

    def __init__(
        self,
        engine: Engine,
        shape: Mapping[str, object],
        offsets: Mapping[str, int],
        first_epoch: int,
        windows: tuple[int, int, int, int, int, bool],
        owner: object,
    ) -> None:
        """`windows`: address and bytes of memory of their own (0, 0: in the segment), a dmabuf of it (-1: none), its
        offset and the device's number, and whether the network is to reach it. `owner` is kept until they are not used
        any more."""

    @property
    def segment(self) -> _SegmentName: ...
    @property
    def regions(self) -> tuple[bytes, bytes]:
        """Descriptors of the segment, and of what the windows lie in."""

    def open_rows(self, rank: int) -> tuple[int, int]:
        """Immediate rows (window, release) for what `rank` writes here."""

    def map_peer(self, rank: int, name: _SegmentName, windows: int) -> None:
        """`windows`: where this process has the peer's; 0: in the segment."""

    def link_peer(
        self, rank: int, engine_peer: int, regions: tuple[bytes, bytes], window: int, release: int
    ) -> None: ...
    def start(self) -> None: ...
    def open_view(self) -> dict[str, Any]:
        """What kernels need to be this rank, addresses as numbers: csrc/exchange.hpp: KernelView."""

    def header_like(self, format: CallFormat, text: str, rounds: int) -> bytes:
        """A header of a call of this format, in so many rounds, but for what each says; of an error with this text,
        unless empty."""

    def damaged_like(self, format: CallFormat, writer: int) -> bytes:
        """What a forwarder says where the header of `writer` is not what anybody wrote, but for the epoch."""

    def judge(
        self, format: CallFormat, header: bytes, epoch: int, source: int, identity: int
    ) -> None:
        """Raises what is wrong with a header that a kernel did not take."""

    def raise_refusal(self, kind: int, epoch: int, headers: bytes) -> None:
        """Raises the PeerError of the first rank that refused this epoch's call, whose windows came. `headers`: of all
        ranks, copied from a device; none: those in the windows."""

    def blame(self, rank: int) -> None:
        """What this rank's fault goes back to, unless it is known."""

    @property
    def num_lanes(self) -> int: ...
    @property
    def next_epoch(self) -> int: ...
    def route(self, call: Call) -> None: ...
    def check_lanes(self, call: Call) -> None:
        """Raises ArgumentError unless the lanes' topk_idx is the one that the handle was made from."""

    def send(self, call: Call) -> None:
        """Sends the next round. Waits for its bank."""

    def wait_headers(self, call: Call) -> None: ...
    def place(
        self, call: Call, alignment: int, capacity: int, copies: int
    ) -> tuple[int, int, int, int]:
        """Where received rows go. Returns rows, places, copies, copies of the fullest expert; fills `copies` [L]."""

    def receive(self, call: Call, round: int) -> None:
        """Waits for one round, unpacks it, releases its bank."""

    def finish(self, call: Call) -> None: ...
    def fail(self, text: str) -> None:
        """Ends the exchange for good; the peers are told."""

    def raise_fault(self) -> None: ...
    @property
    def absent(self) -> list[bool]:
        """[R] not of this generation, or masked since."""

    def mask(self, rank: int) -> None:
        """That rank is absent from now on, for this one."""

    @property
    def lost(self) -> list[bool]:
        """[R] absent, ended, cut off, or closed; a rank that is only stopped cannot be told."""

    def close(self, seconds: float) -> None: ...
    def stats(self) -> dict[str, int]:
        """rows_local, bytes_local, rows_link, bytes_link, writes."""
