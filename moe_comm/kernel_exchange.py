"""KernelExchange: what a Buffer whose calls are kernels owns: its ring, its waits, its tables, its stream.

    begin(epoch, credits armed) ─stream waits─ write headers ─ rows ─ …      send (kernel_calls.py)
    rows armed ─stream waits─ check headers ─ … ─ unpack or add ─ release    receive

The windows are the same as those of a Buffer of CPU tensors (csrc/exchange.hpp), and so is every byte in them; who
writes and reads them are kernels on one stream, in the order of calls, and the proxy sends what they push. The host
waits for nothing, but for sizes where a call asks for exact ones. Windows lie in host memory that the device maps.

- **Epochs** are counted on the device (headers.cuh: Begin), so that a captured graph takes new ones at each replay.
- **Errors** that kernels find stand in what they tell the host (`Told`): raised by the call that reads it, or by the
  next one (`raise_errors`). Behind a wait that failed no kernel does anything, and the Buffer is spent.
- Pairs of ranks only: hops="rank", or one node. A call is one round, so `max_tokens` must fit.

*Source*: ours. Ran as threads of the host (tests/kernels/test_kernel_buffer.py), not yet on a GPU (2026-11-21).
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _engine
from .arguments import wrong
from .device_ring import DeviceRing, limit_ms
from .errors import ArgumentError, MismatchError, MoeCommError, PeerTimeout
from .kernels import for_device, fused
from .layout import ROW_ALIGNMENT
from .memory import Pinned

if TYPE_CHECKING:
    from .buffer import Buffer

HEADER_BYTES = _engine.HEADER_BYTES
CREDITS, ROWS = 0, 1  # the ring's words
TOLD_WORDS = 11 + HEADER_BYTES // 8  # headers.cuh: Told
MAX_REPORTS = 64
CAPTURED_WORDS = 1 << 21  # for what captured calls tell the host: 16 MiB
SPIN_S, NAP_S = 200e-6, 50e-6


@dataclasses.dataclass
class Round:
    """One exchange of a call, as Buffer counts it; and its words on the device, from `begin` on."""

    epochs: list[int] = dataclasses.field(default_factory=list)
    block: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    # int64: epoch, the bank's table, staged headers, groups of rows
    own_rounds: int = 1
    num_rounds: int = 1


class Told:
    """headers.cuh's Told, the tables behind it, and apart the epoch: on the device, or the host's copy."""

    def __init__(self, words: Tensor, num_ranks: int, epoch: Tensor | None = None):
        self.words, self._ranks, self.epoch = words, num_ranks, epoch
        self.tables = words[TOLD_WORDS:].view(torch.int32)

    @property
    def identity(self) -> int:
        """Its address."""
        return self.words[2:].data_ptr()

    @property
    def num_rows(self) -> Tensor:
        """int32 [1]"""
        return self.words[3:4].view(torch.int32)[:1]

    @property
    def rows(self) -> Tensor:
        return self.tables[: self._ranks]

    @property
    def starts(self) -> Tensor:
        return self.tables[self._ranks : 2 * self._ranks]

    @property
    def tokens(self) -> Tensor:
        return self.tables[2 * self._ranks : 3 * self._ranks]

    def copies(self, num_counts: int) -> Tensor:
        """int32 [R, L]"""
        first = 3 * self._ranks
        return self.tables[first : first + self._ranks * num_counts].view(self._ranks, num_counts)


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


class _Done:
    """The event of a device that is the host."""

    def query(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class KernelExchange:
    """Opened for each generation of a Buffer; `close` before its native exchange."""

    def __init__(self, buffer: "Buffer", native: _engine.Exchange):
        self.device, self.native = buffer.device, native
        topology = buffer.topology
        self.rank, self.num_ranks = topology.rank, buffer.num_ranks
        self.num_lanes = self.num_ranks
        self.kernels = for_device(self.device)
        self._late_s = buffer.config.timeout_s
        self.ring = DeviceRing(
            buffer.engine, self.device, num_words=2, timeout_s=buffer.config.timeout_s, silent_s=buffer.config.silence_s
        )  # fmt: skip
        self._ring_struct = self.ring.struct
        view = native.open_view()
        self._pinned = [
            (first, size, Pinned(first, size, self.device)) for first, size in view["segments"]
        ]
        self._waits = {CREDITS: view["credits"], ROWS: view["rows"]}  # by kind
        self.num_links, self.num_local = len(view["links"]), len(view["local"])
        banks = [self._words_of(bank) for bank in view["banks"]]
        self._num_words = len(banks[0])
        self._tables = self._constant([word for bank in banks for word in bank])
        R, links = self.num_ranks, 4 * self.num_links
        self.lanes = self._constant([*view["links"], *view["local"]], torch.int32)
        self.zeros = self._constant([0] * max(64, 2 * R), torch.int32)
        absent = native.absent
        self.lane_of_rank = self._constant(
            [R if gone else r for r, gone in enumerate(absent)], torch.int32
        )
        # Words of a block.
        self._out_at, self.in_at, self._links_at = 1, 1 + R, 1 + 2 * R
        self._commits_at = self._links_at + links
        self._releases_at = self._commits_at + self.num_local
        self._staged_at = -(-(1 + self._num_words) // 2) * 2
        self._groups_at = self._staged_at + R * HEADER_BYTES // 8
        self._block_words = self._groups_at + 4 * (self.num_links + self.num_local)
        self._next = self._constant([buffer.config.first_epoch])
        self.next_epoch = buffer.config.first_epoch  # of the next call, not counting replays
        self.scratch = self._constant([0] * 4)  # arrived [2], status of pushes
        self._likes: dict[_engine.CallFormat, Tensor] = {}
        self._reports: list[Report] = []
        self.stream = None
        if self.device.type == "cuda":
            self._captured_words = torch.zeros(CAPTURED_WORDS, dtype=torch.int64, pin_memory=True)
            self.stream = torch.cuda.Stream(self.device)
            torch.cuda.synchronize(self.device)  # what was made here was made on another stream

    # --- memory ----------------------------------------------------------------------------------

    def _constant(self, values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        if dtype is torch.int64:
            values = [v % 2**64 - (v % 2**64 >> 63 << 64) for v in values]
        return torch.tensor(values, dtype=dtype).to(self.device)

    def _words_of(self, bank: tuple) -> list[int]:
        out, into, commits, releases, links = bank
        tables = [self._on_device(a) for part in (out, into) for a in part]
        words = [word for link in links for word in link]
        return [*tables, *words, *map(self._on_device, commits), *map(self._on_device, releases)]

    def _on_device(self, address: int) -> int:
        for first, size, pinned in self._pinned:
            if first <= address < first + size:
                return pinned.on_device(address)
        if address:
            raise AssertionError(f"{address:#x} is in no segment")
        return 0

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def told_words(self, num_counts: int) -> int:
        return TOLD_WORDS + -(-self.num_ranks * (3 + num_counts) // 2)

    # --- the stream ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """What is launched inside comes after what the caller's current stream was given, on this exchange's stream."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def used_by_stream(self, *tensors: Tensor | None) -> None:
        """Memory of the caller's, not to be used again before this exchange's stream is done with it."""
        for tensor in tensors:
            if self.stream is not None and tensor is not None:
                tensor.record_stream(self.stream)

    def hand_out(self, *tensors: Tensor | None, ordered: bool) -> Any:
        """Memory made here, to be used on the caller's current stream. Returns an event behind all that was launched;
        `ordered`: the current stream is ordered behind it."""
        if self.stream is None:
            return _Done()
        current = torch.cuda.current_stream(self.device)
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(current)
        event = torch.cuda.Event()
        event.record(self.stream)
        if ordered:
            current.wait_event(event)
        return event

    def capturing(self) -> bool:
        if self.stream is None:
            return False
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    # --- steps of a call, on the stream ----------------------------------------------------------

    def _launch(
        self, kernel: str, struct: Any, kind: str = "headers", width: int = 2048, **more: Any
    ) -> None:
        fused.launch(
            kernel, struct, device=self.device, num_threads=fused.threads_for(kind, width), **more
        )  # fmt: skip

    def begin(self, call: Round, kind: int, timeout_s: float | None) -> None:
        """The next epoch: until all have released its bank, nothing behind it writes."""
        call.epochs.append(self.next_epoch)
        call.block = self.new((self._block_words,), torch.int64)
        self.next_epoch += 1
        begin = fused.Begin(
            next=self._next.data_ptr(), tables=self._tables.data_ptr(), num_words=self._num_words,
            call=call.block.data_ptr(), ring=self._ring_struct, wait=self._waits[CREDITS][kind], word_idx=CREDITS,
            timeout_ms=limit_ms(timeout_s), word=self.ring.word_address(CREDITS),
        )  # fmt: skip
        self._launch("moe_comm_begin", begin, num_blocks=1)
        self.ring.stream_wait(CREDITS)

    def like(self, found: _engine.CallFormat, texts: tuple[str, ...]) -> Tensor:
        """Headers of a format: a good one, and one for each text."""
        headers = [self.native.header_like(found, text) for text in ("", *texts)]
        return torch.frombuffer(bytearray(b"".join(headers)), dtype=torch.uint8).to(self.device)

    def kept_like(self, found: _engine.CallFormat, texts: tuple[str, ...] = ()) -> Tensor:
        """The same, kept as long as the Buffer keeps its formats."""
        made = self._likes.get(found)
        if made is None:
            made = self._likes[found] = self.like(found, texts)
        return made

    def write_headers(self, call: Round, like: Tensor, **fields: Any) -> None:
        """fields: headers.cuh's Write."""
        write = fused.Write(
            epoch=call.block.data_ptr(), like=like.data_ptr(), staged=self._at(call, self._staged_at),
            windows=self._at(call, self._out_at), lanes=self.lanes.data_ptr(), num_lanes=len(self.lanes),
            waited=self.ring.status_address(CREDITS), **fields,
        )  # fmt: skip
        self._launch("moe_comm_write_headers", write, num_blocks=len(self.lanes), width=16 * 32)

    def send_rows(self, call: Round, **fields: Any) -> None:
        """fields: dispatch.cuh's Arguments. Without any: headers alone."""
        send = fused.Send(
            num_lanes=self.num_ranks, windows=self._at(call, self._out_at), lanes=self.lanes.data_ptr(),
            num_links=self.num_links, num_local=self.num_local, **self._links(call), **self._told_by(call), **fields,
        )  # fmt: skip
        self._launch("moe_comm_dispatch_send", send, "dispatch", fields.get("payload_bytes", 16))

    def send_sums(self, dtype: torch.dtype, call: Round, **fields: Any) -> None:
        """fields: combine.cuh's Arguments."""
        send = fused.Combine(
            groups=self._at(call, self._groups_at), num_links=self.num_links, num_local=self.num_local,
            head_bytes=HEADER_BYTES, **self._links(call), **self._told_by(call), **fields,
        )  # fmt: skip
        kernel = f"moe_comm_combine_send_{fused.DTYPES[dtype]}"
        self._launch(kernel, send, "combine", fields["payload_bytes"])

    def groups_at(self, call: Round) -> int:
        return self._at(call, self._groups_at)

    def await_rows(self, call: Round, kind: int, timeout_s: float | None) -> None:
        self.ring.arm(self._waits[ROWS][kind], call.block, ROWS, timeout_s)
        self.ring.stream_wait(ROWS)

    def check_headers(self, call: Round, like: Tensor, num_counts: int = 0, **fields: Any) -> Told:
        """fields: headers.cuh's Check."""
        words = self.new((1 + self.told_words(num_counts),), torch.int64).fill_(0)
        told = Told(words[:-1], self.num_ranks, words[-1:])
        check = fused.Check(
            epoch=call.block.data_ptr(), like=like.data_ptr(), windows=self._at(call, self.in_at),
            num_ranks=self.num_ranks, num_counts=num_counts, told=words.data_ptr(), told_epoch=words[-1:].data_ptr(),
            rows=told.rows.data_ptr(),
            starts=told.starts.data_ptr(), tokens=told.tokens.data_ptr(), copies=told.copies(num_counts).data_ptr(),
            waited=self.ring.status_address(ROWS), **fields,
        )  # fmt: skip
        self._launch("moe_comm_check_headers", check, num_blocks=1)
        return told

    def collect(self, call: Round, told: Told, num_rows: int, **fields: Any) -> Tensor:
        """The parts of all rows at `part_at`, [num_rows, part_bytes] uint8, in a multiple of 16 bytes."""
        width = -(-fields["part_bytes"] // ROW_ALIGNMENT) * ROW_ALIGNMENT
        out = self.new((num_rows, width), torch.uint8)
        collect = fused.Collect(
            windows=self._at(call, self.in_at), num_ranks=self.num_ranks, rows=told.rows.data_ptr(),
            starts=told.starts.data_ptr(), out=out.data_ptr(), out_stride=width, **fields,
        )  # fmt: skip
        self._launch("moe_comm_collect", collect, width=16 * 32)
        return out

    def unpack(self, call: Round, told: Told | None, **fields: Any) -> None:
        """All rows to their places, then the banks are free. `told` None: they are freed unread."""
        if told is not None:
            fields |= {
                "windows": self._at(call, self.in_at), "num_sources": self.num_ranks,
                "num_rows": told.rows.data_ptr(), "starts": told.starts.data_ptr(),
            }  # fmt: skip
        release = fused.Release(
            words=self._at(call, self._releases_at), num_words=self.num_local,
            links=self._at(call, self._links_at), num_links=self.num_links, epoch=call.block.data_ptr(),
            arrived=self.scratch.data_ptr(), status=self.scratch[2:].data_ptr(), ring=self._ring_struct,
            waited=self.ring.status_address(ROWS),
        )  # fmt: skip
        unpack = fused.Unpack(release=release, **fields)
        self._launch(
            "moe_comm_dispatch_unpack", unpack, "dispatch", fields.get("payload_bytes", 16)
        )

    def add_rows(self, dtype: torch.dtype, call: Round, **fields: Any) -> None:
        """The last sum, then the banks are free. fields: combine.cuh's Arguments."""
        common = self._told_by(call) | {"waited": self.ring.status_address(ROWS)}
        add = fused.Combine(
            num_local=1, releases=self._at(call, self._releases_at), num_releases=self.num_local,
            release_links=self._at(call, self._links_at), num_release_links=self.num_links, **common, **fields,
        )  # fmt: skip
        self._launch(
            f"moe_comm_combine_send_{fused.DTYPES[dtype]}", add, "combine", fields["payload_bytes"]
        )

    def windows_in(self, call: Round) -> Tensor:
        """[R] int64: addresses of the windows that were written for this rank."""
        return call.block[self.in_at : self.in_at + self.num_ranks]

    def _at(self, call: Round, word: int) -> int:
        return call.block.data_ptr() + 8 * word

    def _links(self, call: Round) -> dict[str, int]:
        at = functools.partial(self._at, call)
        return {"links": at(self._links_at), "commits": at(self._commits_at)}

    def _told_by(self, call: Round) -> dict[str, Any]:
        return {
            "epoch": call.block.data_ptr(), "arrived": self.scratch.data_ptr(),
            "status": self.scratch[2:].data_ptr(), "ring": self._ring_struct,
            "waited": self.ring.status_address(CREDITS),
        }  # fmt: skip

    def late_s(self, timeout_s: float | None) -> float:
        return self._late_s if timeout_s is None else timeout_s

    def expect_room(self, num_counts: int) -> None:
        """Raises ArgumentError where graphs hold as many calls as can tell the host of errors."""
        if self.capturing() and len(self._captured_words) <= self.told_words(num_counts):
            raise ArgumentError(
                "device: expected fewer captured calls of one Buffer: make another one for more graphs"
            )

    # --- what kernels found ----------------------------------------------------------------------

    def report(self, what: str, told: Told, judge: Callable[[Told], None]) -> Report:
        """On the stream: `told` starts for the host; `judge` raises what is wrong with it."""
        if self.stream is None:
            return Report(what, told, _Done(), judge)
        captured, length = self.capturing(), 1 + len(told.words)
        assert told.epoch is not None
        if captured:  # no memory of the host can be made now
            words, self._captured_words = self._captured_words.split(
                [length, len(self._captured_words) - length]
            )
        else:
            words = torch.zeros(length, dtype=torch.int64, pin_memory=True)
        words[:-1].copy_(told.words, non_blocking=True)
        words[-1:].copy_(told.epoch, non_blocking=True)
        event: Any = _Done()  # what is captured cannot be asked
        if not captured:
            event = torch.cuda.Event()
            event.record(self.stream)
        told = Told(words[:-1], self.num_ranks, words[-1:])
        return Report(what, told, event, judge, captured)

    def read(self, report: Report, timeout_s: float) -> Told:
        """On the host, once it is there. Raises PeerTimeout, and what ended the ring."""
        start = time.monotonic()
        while not report.event.query():
            waited = time.monotonic() - start
            if waited > timeout_s + self._late_s:
                raise PeerTimeout(
                    f"{report.what}, rank {self.rank} waited {waited:.1f} s for its own stream on {self.device} to "
                    "come to this call"
                )
            time.sleep(NAP_S if waited > SPIN_S else 0)
        return report.told

    def leave(self, report: Report) -> None:
        """To be looked at now if it is there, else by a later call (`raise_errors` before it keeps them few)."""
        if report.event.query() and not report.captured:
            report.look()
        else:
            self._reports.append(report)

    def raise_errors(self) -> None:
        """What the kernels of earlier calls found, as far as they came."""
        if self.capturing():
            return
        self.raise_fault()
        open_ones = [r for r in self._reports if not r.captured]
        for report in open_ones[:-MAX_REPORTS]:
            self.read(report, self._late_s)
        for report in [report for report in self._reports if report.event.query()]:
            if not report.captured:
                self._reports.remove(
                    report
                )  # those behind one that raises are left for later calls
            report.look()

    def raise_told(self, told: Told, found: _engine.CallFormat, belongs: bool) -> None:
        """Raises PeerError, MismatchError, … if the host's copy of a Told says so; the wait's error if it failed.
        `belongs`: to an earlier dispatch, which headers name."""
        assert told.epoch is not None
        epoch = int(told.epoch) % 2**64
        status, bad, identity = told.words[:3].tolist()
        if status:
            self.raise_fault()
            raise PeerTimeout(f"epoch {epoch}: rank {self.rank}: a wait ended with status {status}")
        if bad:
            header = bytes(told.words[11:TOLD_WORDS].view(torch.uint8).tolist())
            self.native.judge(found, header, epoch, bad - 1, identity if belongs else 0)
        most, most_rank, allowed, allowed_rank = told.words[7:11].tolist()
        if 0 < allowed < most:
            raise MismatchError(
                f"dispatch epoch {epoch}: max_tokens: rank {allowed_rank} passed {allowed}, "
                f"rank {most_rank} has {most} tokens"
            )

    def raise_fault(self) -> None:
        """What ended the ring; the peers will hear whom this rank gave up on."""
        blamed = self.ring.blamed
        if blamed is not None and blamed < self.num_ranks:
            self.native.blame(blamed)
        self.ring.raise_fault()

    # --- the end ---------------------------------------------------------------------------------

    def close(self, timeout_s: float) -> None:
        """Waits for the stream, bounded, and ends the ring."""
        if self.stream is not None:
            start = time.monotonic()
            while not self.stream.query() and time.monotonic() - start < timeout_s:
                time.sleep(NAP_S)
        self.ring.close()


def opened(buffer: "Buffer", native: _engine.Exchange) -> KernelExchange:
    """Raises ArgumentError where kernels cannot be this rank, RuntimeError or ImportError where they cannot run."""
    if buffer.mask_lost or (buffer.hops == "node" and buffer.topology.num_nodes > 1):
        raise wrong(
            "device", 'None with mask_lost, or with hops="node" between nodes', str(buffer.device)
        )
    if buffer.max_tokens is None:
        raise wrong("device", "None without max_tokens", str(buffer.device))
    try:
        return KernelExchange(buffer, native)
    except (ImportError, RuntimeError) as error:
        if isinstance(error, MoeCommError):
            raise
        raise ArgumentError(f"device: {buffer.device}: {error}") from error
