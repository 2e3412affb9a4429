"""KernelExchange: what a Buffer whose calls are kernels owns: its ring, its waits, its tables, its stream.

    begin(epoch, credits armed) ─stream waits─ write headers ─ rows ─ …      send (kernel_calls.py)
    links armed ─stream waits─ check headers ─ pass on, or add, for others   between nodes (kernel_forward.py)
    rows armed ─stream waits─ check headers ─ … ─ unpack or add ─ release    receive

The windows are the same as those of a Buffer of CPU tensors (csrc/exchange.hpp), and so is every byte in them; who
writes and reads them are kernels on one stream, in the order of calls, and the proxy sends what they push. The host
waits for nothing, but for sizes where a call asks for exact ones. Windows lie in memory of the device, or of the host
that the device maps (window_memory.py); control words always there.

- **Epochs** are counted on the device (headers.cuh: Begin), so that a captured graph takes new ones at each replay.
- **Errors** that kernels find stand in what they tell the host (`Told`): raised by the call that reads it, or by the
  next one (`raise_errors`). Behind a wait that failed no kernel does anything, and the Buffer is spent.
- With `mask_lost` a wait masks whom it cannot wait for and ends well, and the call goes on without (kernel_masks.py).
- A call is one round where the Buffer's `max_tokens` fit one; else kernel_rounds.py makes several of it, and asks for
  sizes in each.

*Source*: ours. Ran as threads of the host (tests/kernels/test_kernel_buffer.py), not yet on a GPU (2026-11-21).
"""

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _engine
from .device_ring import DeviceRing, limit_ms
from .dispatch import DISPATCH
from .errors import ArgumentError, MismatchError, MoeCommError, PeerError, PeerTimeout
from .kernel_forward import KernelForwarder
from .kernel_masks import Masks
from .kernel_told import (
    CREDITS,
    HEADER_BYTES,
    LINKS,
    NAP_S,
    ROWS,
    TOLD_WORDS,
    Done,
    Lanes,
    Report,
    Round,
    Told,
    Windows,
)
from .kernels import for_device, fused
from .layout import ROW_ALIGNMENT
from .memory import Pinned

if TYPE_CHECKING:
    from .buffer import Buffer

MAX_REPORTS = 64
CAPTURED_WORDS = 1 << 21  # for what captured calls tell the host: 16 MiB
SPIN_S = 200e-6


class KernelExchange:
    """Opened for each generation of a Buffer; `close` before its native exchange."""

    def __init__(self, buffer: "Buffer", native: _engine.Exchange):
        self.device, self.native = buffer.device, native
        self.num_sms = buffer.num_sms  # that kernels take at most; 0: all
        topology = buffer.topology
        self.rank, self.num_ranks = topology.rank, buffer.num_ranks
        self.kernels = for_device(self.device)
        self._late_s = buffer.config.timeout_s
        self._windows = buffer.window_memory
        self.ring = DeviceRing(
            buffer.engine, self.device, num_words=3, num_times=self.num_ranks, timeout_s=buffer.config.timeout_s,
            silent_s=buffer.config.silence_s,
        )  # fmt: skip
        self._ring_struct = self.ring.struct
        view = native.open_view()
        self._read = {name: words for name, _, words in view["tables"]}["in"]
        self._pinned = [
            (first, size, Pinned(first, size, self.device)) for first, size in view["segments"]
        ]
        # By word, and whether they are timed; then by kind of call.
        self._waits = {
            (CREDITS, False): view["credits"], (ROWS, False): view["rows"], (ROWS, True): view["timed_rows"],
            (LINKS, False): view["forward"], (LINKS, True): view["timed_forward"],
        }  # fmt: skip
        self.num_links, self.num_local = len(view["links"]), len(view["local"])
        R, nodes, node_ranks = self.num_ranks, topology.num_nodes, topology.node_ranks
        by_node = buffer.hops == "node" and nodes > 1
        self.num_lanes = nodes + node_ranks if by_node else R
        numbers = self.constant([*view["links"], *view["local"]], torch.int32)
        # Tokens of a round, of rows as the Buffer was made for; and whether a call may need more than one.
        self.chunk = max(1, buffer.layout.capacity // buffer.rows_per_token)
        self.in_rounds = buffer.max_tokens is None or buffer.max_tokens > self.chunk
        self.lanes = Lanes(numbers, "out", self.num_links, self.num_local, "commits")
        self.results, self.num_sums = self.lanes, R
        self.sum_ranks: Sequence[int] = range(R)  # who wrote the windows that a combine reads
        if by_node:
            results = self.constant(view["results"], torch.int32)
            self.results = Lanes(results, "results", 0, len(results), "result_commits")
            self.num_sums = node_ranks + nodes - 1
        absent = native.absent
        lanes = [
            node_ranks + node if by_node and node != topology.node else local if by_node else r
            for r, (node, local) in enumerate(zip(topology.node_of, topology.local_of, strict=True))
        ]
        self.lane_of_rank = self.constant(
            [self.num_lanes if absent[r] else lane for r, lane in enumerate(lanes)], torch.int32
        )
        # Words of a block, behind its epoch: the bank's tables, then what kernels write.
        banks: tuple[list[int], list[int]] = ([], [])
        self._places: dict[str, int] = {}
        for name, addresses, words in view["tables"]:
            self._places[name] = 1 + len(banks[0])
            for bank, found in zip(banks, words, strict=True):
                bank += map(self._on_device, found) if addresses else found
        if not by_node:
            self._places |= {"results": self._places["out"], "sums": self._places["in"]}
        self._num_words = len(banks[0])
        self._tables = self.constant([*banks[0], *banks[1]])
        self._places["staged"] = -(-(1 + self._num_words) // 2) * 2
        self._places["groups"] = self._places["staged"] + max(R, self.num_lanes) * HEADER_BYTES // 8
        self._block_words = self._places["groups"] + 4 * R
        self.masks: Masks | None = None  # with `mask_lost`
        if view["masks"]:
            address = self._on_device(view["masks"])
            self.masks = Masks(address, R, view, self._block_words, self.constant)
            self._block_words += R
        self.zeros = self.constant([0] * max(64, 2 * R), torch.int32)
        self._next = self.constant([buffer.config.first_epoch])
        self.next_epoch = buffer.config.first_epoch  # of the next call, not counting replays
        self.scratch = self.constant([0] * 8)  # of each stream: arrived [2], status of pushes
        self._likes: dict[tuple[_engine.CallFormat, int], Tensor] = {}
        self._reports: list[Report] = []
        self._groups: dict[tuple[int, int], Tensor] = {}
        self.stream = None
        self.forwarder = KernelForwarder(self, topology) if by_node else None
        if self.forwarder is not None:
            self.sum_ranks = self.forwarder.sum_ranks
        if self.device.type == "cuda":
            self._captured_words = torch.zeros(CAPTURED_WORDS, dtype=torch.int64, pin_memory=True)
            self.stream = torch.cuda.Stream(self.device)
            torch.cuda.synchronize(self.device)  # what was made here was made on another stream

    # --- memory ----------------------------------------------------------------------------------

    def constant(self, values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        if dtype is torch.int64:
            values = [v % 2**64 - (v % 2**64 >> 63 << 64) for v in values]
        return torch.tensor(values, dtype=dtype).to(self.device)

    def _on_device(self, address: int) -> int:
        for first, size, pinned in self._pinned:
            if first <= address < first + size:
                return pinned.on_device(address)
        for first, size in self._windows.spans if self._windows is not None else ():
            if first <= address < first + size:
                return address
        if address:
            raise AssertionError(f"{address:#x} is in no segment")
        return 0

    def first_of_groups(self, num_groups: int, capacity: int) -> Tensor:
        """int32: places 0, capacity, … Nobody writes to it."""
        made = self._groups.get((num_groups, capacity))
        if made is None:
            made = torch.arange(num_groups, dtype=torch.int32, device=self.device) * capacity
            self._groups[num_groups, capacity] = made
        return made

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def handle_words(self, num_counts: int) -> int:
        """Of a dispatch's Told."""
        return Told.num_words(self.num_ranks, num_counts)

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

    def order_behind(self) -> None:
        """The caller's current stream comes behind what was launched: what was read may be changed there."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def used_by_stream(self, *tensors: Tensor | None) -> None:
        """Memory of the caller's, not to be used again before this exchange's stream is done with it."""
        for tensor in tensors:
            if self.stream is not None and tensor is not None:
                tensor.record_stream(self.stream)

    def hand_out(self, *tensors: Tensor | None, ordered: bool) -> Any:
        """Memory made here, to be used on the caller's current stream. Returns an event behind all that was launched;
        `ordered`: the current stream is ordered behind it."""
        if self.stream is None:
            return Done()
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
        self, kernel: str, struct: Any, kind: str = "headers", width: int = 2048, num_blocks: int | None = None
    ) -> None:  # fmt: skip
        """`width`: bytes that a block has to do at a time."""
        most = self.num_sms  # a block may get an SM of its own
        if most and self.forwarder is not None:  # its stream has kernels at the same time
            most = max(1, most // 2)
        if most:
            num_blocks = min(num_blocks or most, most)
        threads = fused.threads_for(kind, width)
        fused.launch(kernel, struct, device=self.device, num_threads=threads, num_blocks=num_blocks)

    def begin(self, call: Round, kind: int, timeout_s: float | None) -> None:
        """The next epoch: until all have released its bank, nothing behind it writes."""
        call.epochs.append(self.next_epoch)
        call.block = self.new((self._block_words,), torch.int64)
        self.next_epoch += 1
        begin = fused.Begin(
            next=self._next.data_ptr(), tables=self._tables.data_ptr(), num_words=self._num_words,
            call=call.block.data_ptr(), ring=self._ring_struct, wait=self._waits[CREDITS, False][kind],
            word_idx=CREDITS, timeout_ms=limit_ms(timeout_s), word=self.ring.word_address(CREDITS),
        )  # fmt: skip
        self._launch("moe_comm_begin", begin, num_blocks=1)
        self.ring.stream_wait(CREDITS)
        self._leave_out(call)

    def _leave_out(self, call: Round) -> None:
        """What is launched from here on goes without the ranks that the wait before masked."""
        if self.masks is not None:
            self._launch("moe_comm_leave_out", self.masks.leave_out(call.block), num_blocks=1)

    def like(self, found: _engine.CallFormat, texts: tuple[str, ...], rounds: int = 1) -> Tensor:
        """Headers of a format: a good one, and one for each text."""
        headers = [self.native.header_like(found, text, rounds) for text in ("", *texts)]
        return torch.frombuffer(bytearray(b"".join(headers)), dtype=torch.uint8).to(self.device)

    def kept_like(
        self, found: _engine.CallFormat, texts: tuple[str, ...] = (), rounds: int = 1
    ) -> Tensor:
        """The same, kept as long as the Buffer keeps its formats."""
        made = self._likes.get((found, rounds))
        if made is None:
            made = self._likes[found, rounds] = self.like(found, texts, rounds)
        return made

    def write_headers(
        self, call: Round, like: Tensor, lanes: Lanes, part: slice = slice(None), **fields: Any
    ) -> None:
        """Of a part of the lanes. fields: headers.cuh's Write."""
        numbers = lanes.numbers[part]
        write = fused.Write(
            epoch=call.block.data_ptr(), like=like.data_ptr(), staged=self.at(call, "staged"),
            windows=self.at(call, lanes.windows), lanes=numbers.data_ptr(), num_lanes=len(numbers),
            waited=self.ring.status_address(CREDITS), **fields,
        )  # fmt: skip
        self._launch("moe_comm_write_headers", write, num_blocks=len(numbers), width=16 * 32)

    def send_rows(self, call: Round, lanes: Lanes, word: int = CREDITS, **fields: Any) -> None:
        """fields: dispatch.cuh's Arguments."""
        fields.setdefault("link_head_bytes", fields["head_bytes"])
        send = fused.Send(
            num_lanes=self.num_lanes, lanes=lanes.numbers.data_ptr(), **self._to(call, lanes),
            **self._told_by(call, word), windows=self.at(call, lanes.windows), **fields,
        )  # fmt: skip
        self._launch("moe_comm_dispatch_send", send, "dispatch", fields.get("payload_bytes", 16))

    def send_sums(
        self, dtype: torch.dtype, call: Round, lanes: Lanes, word: int = CREDITS, **fields: Any
    ) -> None:
        """fields: combine.cuh's Arguments."""
        send = fused.Combine(
            groups=self.at(call, "groups"), head_bytes=HEADER_BYTES, **self._to(call, lanes),
            **self._told_by(call, word), **fields,
        )  # fmt: skip
        kernel = f"moe_comm_combine_send_{fused.DTYPES[dtype]}"
        self._launch(kernel, send, "combine", fields["payload_bytes"])

    def await_rows(
        self, call: Round, kind: int, timeout_s: float | None, timed: bool = False
    ) -> None:
        if self.forwarder is not None:
            self.forwarder.join(call)
        # If the forwarder's wait failed, the ring has ended, and so will this one.
        self.ring.arm(self._waits[ROWS, timed][kind], call.block, ROWS, timeout_s)
        self.ring.stream_wait(ROWS)
        self._leave_out(call)

    def await_links(
        self, call: Round, kind: int, timeout_s: float | None, timed: bool = False
    ) -> None:
        self.ring.arm(self._waits[LINKS, timed][kind], call.block, LINKS, timeout_s)
        self.ring.stream_wait(LINKS)

    def check_headers(
        self, call: Round, like: Tensor, windows: str, num_sources: int, num_counts: int = 0, word: int = ROWS,
        **fields: Any,
    ) -> Told:  # fmt: skip
        """fields: headers.cuh's Check."""
        wait_ns = fields.pop("wait_ns", None)
        if wait_ns is not None:
            fields |= {
                "times": self.ring.times_address(), "wait_ns": wait_ns.data_ptr(), "num_times": self.num_ranks
            }  # fmt: skip
        words = self.new((1 + Told.num_words(num_sources, num_counts),), torch.int64)
        told = Told(words, num_sources, with_epoch=True)
        check = fused.Check(
            epoch=call.block.data_ptr(), like=like.data_ptr(), windows=self.at(call, windows),
            num_sources=num_sources, num_counts=num_counts, identity_is_epoch=int(self.masks is not None),
            told=words.data_ptr(), told_epoch=words[-1:].data_ptr(),
            rows=told.rows.data_ptr(), starts=told.starts.data_ptr(), tokens=told.tokens.data_ptr(),
            verdicts=told.verdicts.data_ptr(), copies=told.copies(num_counts).data_ptr() if num_counts else 0,
            waited=self.ring.status_address(word), **fields,
        )  # fmt: skip
        self._launch("moe_comm_check_headers", check, num_blocks=1)
        return told

    def collect(self, windows: Windows, out: Tensor, **fields: Any) -> None:
        """The parts of all rows at `part_at` to `out` [rows, width] uint8. fields: headers.cuh's Collect."""
        collect = fused.Collect(
            windows=windows.addresses, num_sources=len(windows.rows), rows=windows.rows.data_ptr(),
            starts=windows.starts.data_ptr(), head_bytes=windows.head_bytes, out=out.data_ptr(),
            out_stride=out.shape[1], **fields,
        )  # fmt: skip
        self._launch("moe_comm_collect", collect, width=16 * 32)

    def new_parts(self, num_rows: int, part_bytes: int) -> Tensor:
        """For `collect`: uint8 [num_rows, part_bytes], which is made a multiple of 16."""
        return self.new((num_rows, -(-part_bytes // ROW_ALIGNMENT) * ROW_ALIGNMENT), torch.uint8)

    def pass_on(self, call: Round, **fields: Any) -> None:
        """fields: relay.cuh's Arguments."""
        struct = fused.PassOn(
            epoch=call.block.data_ptr(), waited=self.ring.status_address(LINKS), staged=self.at(call, "staged"),
            **fields,
        )  # fmt: skip
        self._launch(
            "moe_comm_pass_on", struct, num_blocks=max(1, fields["num_outs"]), width=16 * 32
        )

    def forward(self, call: Round, **fields: Any) -> None:
        """fields: receive.cuh's Forward."""
        release = self._told_by(call, LINKS) | {
            "words": self.at(call, "passed_commits"), "num_words": self.num_links * self.num_local,
        }  # fmt: skip
        forward = fused.Forward(
            sources=self.at(call, "link_in"), windows=self.at(call, "passed"), node_ranks=self.num_local,
            release=fused.Release(**release), **fields,
        )  # fmt: skip
        self._launch("moe_comm_dispatch_forward", forward, "dispatch", fields.get("row_bytes", 16))

    def unpack(self, call: Round, windows: Windows | None, **fields: Any) -> None:
        """All rows to their places, then the banks are free. None: they are freed unread."""
        release = self._told_by(call, ROWS)
        if windows is not None:
            fields |= {
                "windows": windows.addresses, "num_sources": len(windows.rows), "head_bytes": windows.head_bytes,
                "num_rows": windows.rows.data_ptr(), "starts": windows.starts.data_ptr(),
            }  # fmt: skip
        if windows is None or windows.free:
            release |= {
                "words": self.at(call, "releases"), "num_words": self.num_local,
                "links": self.at(call, "links"), "num_links": self.num_links,
            }  # fmt: skip
        unpack = fused.Unpack(release=fused.Release(**release), **fields)
        self._launch(
            "moe_comm_dispatch_unpack", unpack, "dispatch", fields.get("payload_bytes", 16)
        )

    def add_rows(self, dtype: torch.dtype, call: Round, **fields: Any) -> None:
        """The last sum, then the banks are free. fields: combine.cuh's Arguments."""
        add = fused.Combine(
            num_local=1, releases=self.at(call, "releases"), num_releases=self.num_local,
            release_links=self.at(call, "links"), num_release_links=self.num_links, **self._told_by(call, ROWS),
            **fields,
        )  # fmt: skip
        self._launch(
            f"moe_comm_combine_send_{fused.DTYPES[dtype]}", add, "combine", fields["payload_bytes"]
        )

    def table(self, call: Round, name: str, length: int) -> Tensor:
        """int64: what csrc/exchange.hpp's KernelView has under this name, for the call's bank."""
        first = self._places[name]
        return call.block[first : first + length]

    def at(self, call: Round, name: str) -> int:
        """Its address."""
        return call.block.data_ptr() + 8 * self._places[name]

    def _to(self, call: Round, lanes: Lanes) -> dict[str, int]:
        return {
            "num_links": lanes.num_links, "num_local": lanes.num_local, "links": self.at(call, "links"),
            "commits": self.at(call, lanes.commits) if lanes.commits else 0,
        }  # fmt: skip

    def _told_by(self, call: Round, word: int) -> dict[str, Any]:
        """Of a kernel behind the wait that ends `word`; those behind LINKS are on another stream."""
        scratch = self.scratch[4:] if word == LINKS else self.scratch
        return {
            "epoch": call.block.data_ptr(), "arrived": scratch.data_ptr(), "status": scratch[2:].data_ptr(),
            "ring": self._ring_struct, "waited": self.ring.status_address(word),
        }  # fmt: skip

    def late_s(self, timeout_s: float | None) -> float:
        return self._late_s if timeout_s is None else timeout_s

    def expect_room(self, num_counts: int) -> None:
        """Raises ArgumentError where graphs hold as many calls as can tell the host of errors."""
        if self.capturing() and len(self._captured_words) <= self.handle_words(num_counts):
            raise ArgumentError(
                "device: expected fewer captured calls of one Buffer: make another one for more graphs"
            )

    # --- what kernels found ----------------------------------------------------------------------

    def report(self, what: str, told: Told, judge: Callable[[Told], None]) -> Report:
        """On the stream: `told` starts for the host; `judge` raises what is wrong with it."""
        if self.stream is None:
            return Report(what, told, Done(), judge)
        captured, length = self.capturing(), len(told.whole)
        if captured:  # no memory of the host can be made now
            words, self._captured_words = self._captured_words.split(
                [length, len(self._captured_words) - length]
            )
        else:
            words = torch.zeros(length, dtype=torch.int64, pin_memory=True)
        words.copy_(told.whole, non_blocking=True)
        event: Any = Done()  # what is captured cannot be asked
        if not captured:
            event = torch.cuda.Event()
            event.record(self.stream)
        told = Told(words, len(told.rows), with_epoch=True)
        return Report(what, told, event, judge, captured)

    def read(self, report: Report, timeout_s: float) -> Told:
        """On the host, once it is there. Raises PeerTimeout."""
        self._wait(report.event, report.what, timeout_s)
        return report.told

    def _wait(self, event: Any, what: str, timeout_s: float) -> None:
        start = time.monotonic()
        # Behind a wait that masked somebody comes another one.
        limit_s = (timeout_s + self._late_s) * (1 if self.masks is None else 2)
        while not event.query():
            waited = time.monotonic() - start
            if waited > limit_s:
                raise PeerTimeout(
                    f"{what}, rank {self.rank} waited {waited:.1f} s for its own stream on {self.device} to come to "
                    "this call"
                )
            time.sleep(NAP_S if waited > SPIN_S else 0)

    def hear_refusals(self, call: Round, kind: int, timeout_s: float | None) -> None:
        """Of a call that this rank refuses, once its windows came, on the stream: was it alone in that? And how many
        rounds do the others take?"""
        if self.capturing():
            return
        found = refused_format(kind)
        windows, sources = ("in", self.num_ranks) if kind == DISPATCH else ("sums", self.num_sums)
        like = self.kept_like(found)
        report = self.report(
            "a refused call", self.check_headers(call, like, windows, sources), no_judge
        )
        told = self.read(report, self.late_s(timeout_s))
        assert told.epoch is not None
        if told.words[0]:  # the next call says it
            return
        call.num_rounds, epoch = told.rounds, int(told.epoch)
        try:
            self.native.raise_refusal(kind, epoch % 2**64, self._headers(epoch % 2))
        except PeerError as refusal:
            call.refusal = refusal

    def _headers(self, bank: int) -> bytes:
        """Of all ranks, where the host cannot read all windows."""
        if self._windows is None:
            return b""
        return b"".join(self._header_at(address) for address in self._read[bank])

    def _header_at(self, address: int) -> bytes:
        first, size = self._windows.spans[0]
        if first <= address < first + size:
            found: bytes = self._windows.read(address, HEADER_BYTES)
            return found
        return ctypes.string_at(address, HEADER_BYTES) if address else bytes(HEADER_BYTES)

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

    def raise_told(
        self, told: Told, found: _engine.CallFormat, belongs: bool, ranks: Sequence[int]
    ) -> None:
        """Raises PeerError, MismatchError, … if the host's copy of a Told says so; the wait's error if it failed.
        `belongs`: to an earlier dispatch, which headers name. `ranks`: who wrote for each source."""
        assert told.epoch is not None
        epoch = int(told.epoch) % 2**64
        status, bad, identity = told.words[:3].tolist()
        if status:
            self.raise_fault()
            raise PeerTimeout(f"epoch {epoch}: rank {self.rank}: a wait ended with status {status}")
        if bad:
            header = bytes(told.words[12:TOLD_WORDS].view(torch.uint8).tolist())
            self.native.judge(found, header, epoch, ranks[bad - 1], identity if belongs else 0)
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
        start = time.monotonic()

        def left() -> float:
            return max(0.0, timeout_s - (time.monotonic() - start))

        while self.stream is not None and not self.stream.query() and left():
            time.sleep(NAP_S)
        if self.forwarder is not None:
            self.forwarder.drain(left)
        self.ring.close()
        if self.forwarder is not None:
            self.forwarder.close()
            self.forwarder = None  # which has this object


def refused_format(kind: int) -> _engine.CallFormat:
    """Of a call of which no format is known."""
    return _engine.CallFormat(kind, (0,) * 8, 0, 0, 0, 1, False, False)


def no_judge(told: Told) -> None:
    """Whatever it is, this call is refused."""


def opened(buffer: "Buffer", native: _engine.Exchange) -> KernelExchange:
    """Raises ArgumentError where they cannot run."""
    try:
        return KernelExchange(buffer, native)
    except (ImportError, RuntimeError) as error:
        if isinstance(error, MoeCommError):
            raise
        raise ArgumentError(f"device: {buffer.device}: {error}") from error
