"""A dispatch and a combine by kernels: the same checks, formats and results as the CPU's, other hands.

    begin: credits · · · · route ─ write headers ─ pack, store, push
                                   write headers ─ sum own copies, store, push
    armed: rows · · · · ·  check headers ─ collect ─ places ─ unpack, release
                           check headers ─ add, release

All is launched on the exchange's stream (kernel_exchange.py). Exact layouts ask for sizes, once, between two waits;
layout "padded" does not, and nothing does while a graph is captured: then outputs are as large as they can become.
Calls of several rounds are made of these (kernel_rounds.py).
*Source*: ours.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _engine
from .arguments import wrong
from .combine import COMBINE, CombineRequest, PendingCombine
from .dispatch import DISPATCH, Dispatched, DispatchRequest, PendingDispatch, check_wait_ns, no_rows
from .errors import ArgumentError
from .handle import Handle
from .kernel_exchange import KernelExchange, refused_format
from .kernel_forward import Passed
from .kernel_judges import LANES_TEXT, is_out_of_memory, judge_combine, judge_dispatch, route_texts
from .kernel_told import HEADER_BYTES, Report, Round, Told, Windows
from .kernels import fused
from .layout import RowFormat, counts_bytes
from .memory import allocated_by


class ByKernels:
    """What both kinds of calls have."""

    in_rounds = False  # this is one of the rounds of a call
    rounds, chunk = 1, 0  # of the call; the most tokens that a rank has in one
    exchange: KernelExchange
    error: ArgumentError | None
    request: Any
    what: str  # its first argument
    _send: Callable[[], None]
    _receive: Callable[[], None]

    def __init__(self, buffer: Any, request: DispatchRequest | CombineRequest):
        self.exchange, self.call = buffer.kernels, Round()
        self.report: Report | None = None
        super().__init__(buffer, request)  # type: ignore[call-arg]

    def refuse(self, text: str) -> None:
        """This rank takes part with no tokens and `text`; `finish` raises it."""
        self.error, self.text = ArgumentError(text), text

    def send(self) -> None:
        with self.exchange.on_stream():
            self._send()
        if self.request.deferred:
            self.exchange.order_behind()

    def receive(self, round_idx: int) -> None:
        """What came, to the outputs; or nowhere, if this rank refused, or has no memory for it."""
        with self.exchange.on_stream():
            if self.error is None:
                try:
                    return self._receive()
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self.error = ArgumentError(
                        f"{self.what}: no memory for the received rows: {error}"
                    )
            self.exchange.unpack(self.call, None)


class KernelDispatch(ByKernels, PendingDispatch):
    """A dispatch from its first send to its last receive."""

    what = "x"

    def _check(self) -> None:
        super()._check()
        request = self.request
        check_wait_ns(request.wait_ns, self.buffer)
        if not self.in_rounds:
            self.chunk = self.buffer.max_tokens or 0
        most = self.most = self.buffer.num_ranks * min(self.chunk, request.max_tokens or 2**32)
        self.capacity = 0
        if request.layout == "padded" and request.handle is None:
            self.capacity = self.buffer.padded_capacity(request.capacity)
        # A padded output that holds whatever comes needs no sizes.
        self.exact = self.in_rounds or not (self.capacity >= most or self.exchange.capturing())
        if 0 < self.capacity < most and not self.exact:
            raise wrong("capacity", f"at least {most} while a graph is captured", self.capacity)

    def _begin(self, found: _engine.CallFormat) -> None:
        request = self.request
        scale_bytes = (
            0 if self.scales is None else self.scales.shape[1] * self.scales.element_size()
        )
        self.row = RowFormat.of_dispatch(
            self.hidden * self.dtype.itemsize, scale_bytes, self.topk, weights=self.weights is not None,
            cached=request.handle is not None,
        )  # fmt: skip
        self.format = found
        self.num_counts = self.counts_bytes = self.link_counts_bytes = 0
        self.forward_tokens = no_rows(0, self.exchange.device)
        self.forward_rows = no_rows(self.buffer.topology.node_ranks, self.exchange.device)
        self.identity = 0
        if request.handle is not None:
            self.identity = Told(request.handle.told, self.exchange.num_ranks).identity
        if request.handle is None:
            layout = self.buffer.layout
            self.num_counts = -(-self.num_experts // layout.num_ranks)
            self.counts_bytes = counts_bytes(
                self.num_experts, layout.num_ranks, layout.node_ranks, by_node=False
            )
            self.link_counts_bytes = counts_bytes(
                self.num_experts,
                layout.num_ranks,
                layout.node_ranks,
                by_node=self.exchange.forwarder is not None,
            )
        self.exchange.expect_room(self.num_counts)
        texts = () if request.handle is not None else route_texts(self.num_experts)
        self.like = self.exchange.kept_like(found, texts, self.rounds)

    # --- sending ---------------------------------------------------------------------------------

    def _send(self) -> None:
        exchange, request, handle = self.exchange, self.request, self.request.handle
        call = self.call
        exchange.begin(call, DISPATCH, request.timeout_s)
        if self.error is not None:
            send_refusal(exchange, call, DISPATCH, self.text, request.timeout_s)
            return
        x, scales, idx, weights, row = self.x, self.scales, self.idx, self.weights, self.row
        exchange.used_by_stream(x, scales, idx, weights, request.wait_ns)
        error, forwarder, lanes = 0, exchange.forwarder, exchange.lanes
        says: dict[str, Any] = {"tokens": len(x), "max_tokens": request.max_tokens or 0}
        if handle is None:
            assert idx is not None
            self.routed = exchange.kernels.route(
                idx, exchange.lane_of_rank, num_experts=self.num_experts, num_ranks=exchange.num_ranks,
                num_lanes=exchange.num_lanes, capacity=max(1, len(x)),
            )  # fmt: skip
            routed, self.lane_rows = self.routed, self.routed.lane_rows
            starts, error = routed.round_starts, routed.error.data_ptr()
            says |= {
                "rows": starts[1].data_ptr(), "error": error, "topk_idx": idx.data_ptr(), "topk": self.topk
            }  # fmt: skip
            if forwarder is None:
                exchange.write_headers(
                    call, self.like, lanes, counts=routed.expert_counts.data_ptr(), num_counts=self.num_counts,
                    counts_bytes=self.counts_bytes, **says,
                )  # fmt: skip
            else:
                forwarder.write_headers(call, self.like, routed, self.num_counts, **says)
        else:
            self.lane_rows, starts = handle.lane_rows, sent_rows(handle)
            says |= {"rows": starts[1].data_ptr(), "identity": self.identity}
            exchange.write_headers(call, self.like, lanes, **says)
        item = 0 if scales is None else scales.element_size()
        exchange.send_rows(
            call, lanes, x=x.data_ptr(), x_stride=x.stride(0) * x.element_size(), payload_bytes=row.payload_bytes,
            scales=0 if scales is None else scales.data_ptr(),
            scale_token_stride=0 if scales is None else scales.stride(0) * item,
            scale_stride=0 if scales is None else scales.stride(1) * item,
            scale_item=item, num_scales=0 if scales is None else scales.shape[1],
            topk_idx=0 if idx is None else idx.data_ptr(),
            topk_weights=0 if weights is None else weights.data_ptr(), topk=self.topk,
            lane_rows=self.lane_rows.data_ptr(), starts=starts.data_ptr(), last_token=len(x),
            scales_at=row.scales_at, token_at=row.token_at, ids_at=row.ids_at, weights_at=row.weights_at,
            row_bytes=row.row_bytes, link_head_bytes=HEADER_BYTES + self.link_counts_bytes,
            head_bytes=HEADER_BYTES + self.counts_bytes, error=error,
        )  # fmt: skip
        if forwarder is not None:
            passed = Passed(
                self.format, self.like, row, self.identity, handle, request.timeout_s, self.num_experts,
                self.chunk, request.wait_ns is not None,
            )  # fmt: skip
            forwarder.begin(
                call, () if handle is None else (handle.told, handle.forward_rows),
                lambda: self._passed(*forwarder.pass_rows(call, passed)),
            )  # fmt: skip

    def _passed(self, tokens: Tensor, rows: Tensor) -> None:
        """For the handle: of the forwarder."""
        self.forward_tokens, self.forward_rows = tokens, rows

    # --- receiving -------------------------------------------------------------------------------

    def receive_first(self) -> None:
        """Headers, and sizes if they are asked for."""
        exchange, request = self.exchange, self.request
        with exchange.on_stream():
            exchange.await_rows(self.call, DISPATCH, request.timeout_s, request.wait_ns is not None)
            if self.error is not None:
                exchange.hear_refusals(self.call, DISPATCH, request.timeout_s)
                return
            expected: dict[str, int] = {"error": 0}
            if request.handle is None:
                expected["error"] = self.routed.error.data_ptr()
            else:
                rows = Told(request.handle.told, exchange.num_ranks).rows
                expected |= {"expected": rows.data_ptr(), "identity": self.identity}
            self.told = exchange.check_headers(
                self.call, self.like, "in", exchange.num_ranks, self.num_counts, counts_bytes=self.counts_bytes,
                capacity=self.format.capacity, wait_ns=request.wait_ns, **expected,
            )  # fmt: skip
            judge = functools.partial(
                judge_dispatch, exchange, self.format, self.num_experts, self.idx
            )
            self.report = exchange.report(f"dispatch epoch {self.call.epochs[0]}", self.told, judge)
        self.known: Told | None = None
        if self.in_rounds or (self.exact and request.handle is None):
            self.known = exchange.read(self.report, exchange.late_s(request.timeout_s))
            self.call.num_rounds = self.known.rounds

    def _receive(self) -> None:
        if self.request.handle is None:
            self._place()
        else:
            self._place_again(self.request.handle)

    def windows(self) -> Windows:
        """What came, by source."""
        heads = HEADER_BYTES + self.counts_bytes
        address = self.exchange.at(self.call, "in")
        return Windows(address, self.told.rows, self.told.starts, heads)

    def _place(self) -> None:
        known, num_rows, counts = self.known, None, None
        total = self.copies_of(self.told)
        if known is not None:
            num_rows, counts = int(known.num_rows), self.copies_of(known)
        self.place(self.windows(), total, num_rows, counts)

    def copies_of(self, told: Told) -> Tensor:
        """int64 [L]"""
        return told.copies(self.num_counts)[:, : self._owned()].sum(0, dtype=torch.int64)

    def place(
        self, windows: Windows, total: Tensor, num_rows: int | None, counts: Tensor | None
    ) -> None:
        """Where each row goes; then it goes there. `total`: copies for each expert; `counts`: the host's copy of it,
        None if it knows no numbers."""
        exchange, request, row = self.exchange, self.request, self.row
        first, owned = exchange.rank * self.num_counts, self._owned()
        most, known = self.most, num_rows is not None
        if num_rows is None or counts is None:
            num_rows, num_copies = most, most * min(self.topk, max(1, owned))
            num_places = num_copies + owned * (request.alignment - 1)
        else:
            sizes = -(-counts // request.alignment) * request.alignment
            num_copies, num_places = int(counts.sum()), int(sizes.sum())
            fullest = int(counts.max()) if owned else 0
            if 0 < self.capacity < fullest:
                self.error = ArgumentError(
                    f"capacity: expected at least {fullest} rows for the fullest expert of rank "
                    f"{exchange.rank}, got {self.capacity}"
                )
                return self._free(windows)
        shape: tuple[int, ...] = (num_places,)
        if not self.expand:
            shape = (num_rows,)
        elif self.capacity:
            shape = (owned, self.capacity)
        if not math.prod(shape) < 2**31:
            self.error = wrong("x", "fewer than 2^31 received rows", math.prod(shape))
            return self._free(windows)
        if self.capacity:
            next_places = exchange.first_of_groups(owned, self.capacity)[None]
        else:
            next_places, _ = exchange.kernels.first_places(
                total[None], alignment=request.alignment, capacity=None
            )
        part_bytes = 4 + 4 * self.topk * (1 + (self.weights is not None))
        meta = exchange.new_parts(num_rows, part_bytes)
        exchange.collect(
            windows, meta, row_bytes=row.row_bytes, part_at=row.token_at, part_bytes=part_bytes
        )
        placed = exchange.kernels.places(
            meta, next_places[0], first_expert=first, topk=self.topk, token_at=0, ids_at=4,
            weights_at=4 + 4 * self.topk if self.weights is not None else 0,
            num_rows=None if known else self.told.num_rows,
        )  # fmt: skip
        ids: Tensor | None = placed.ids
        weights: Tensor | None = placed.weights
        if self.expand:
            ids, weights = self._by_place(placed, math.prod(shape))
        self.tokens_per_expert, self.recv_tokens = total, placed.tokens
        self.positions = placed.positions if self.expand else no_rows(self.topk, exchange.device)
        padded = not known or (self.expand and math.prod(shape) != num_copies)
        self.unpack(windows, shape, padded, self.positions if self.expand else None)
        if request.layout == "padded" and weights is not None:
            weights = weights.view(shape)
        self.out = (self.out_x, ids, weights)

    def _free(self, windows: Windows) -> None:
        if windows.free:
            self.exchange.unpack(self.call, None)

    def _by_place(self, placed: Any, num_places: int) -> tuple[Tensor | None, Tensor | None]:
        exchange, ids, weights = self.exchange, None, None
        if self.request.layout != "padded":
            ids = exchange.new((num_places,), torch.int64).fill_(-1)
            exchange.kernels.unpack_lanes(ids, placed.ids, placed.positions)
        if placed.weights is not None:
            weights = exchange.new((num_places,), torch.float32).fill_(0)
            exchange.kernels.unpack_lanes(weights, placed.weights, placed.positions)
        return ids, weights

    def _place_again(self, handle: Handle) -> None:
        self.tokens_per_expert, self.recv_tokens = handle.tokens_per_expert, handle.recv_tokens
        self.positions = handle.positions
        places = (
            self.positions if self.positions.shape[0] else None
        )  # layout "rank" in rounds has some, too
        partly = self.expand or not handle.number or self.exchange.masks is not None
        self.unpack(self.windows(), handle.place_shape, partly, places)
        self.out = (self.out_x, None, None)

    def outputs(self, shape: tuple[int, ...], padded: bool) -> tuple[Tensor, Tensor | None]:
        """x and its scales, as given or new. `padded`: there are rows that nobody writes; those of a rank that is left
        out since the handle was made are zeros."""
        exchange, scales = self.exchange, None
        if self.given is not None:
            x, scales = self.given
            exchange.used_by_stream(x, scales)
            padded = self.request.handle is not None and exchange.masks is not None
        else:
            x = exchange.new((*shape, self.hidden), self.dtype)
            if self.scale_shape is not None:
                scales = exchange.new((*shape, self.scale_shape[0]), self.scale_shape[1])
        for tensor in (x, scales):
            if padded and tensor is not None:
                tensor.view(torch.uint8).fill_(0)  # not every dtype can be filled
        return x, scales

    def unpack(
        self, windows: Windows, shape: tuple[int, ...], padded: bool, places: Tensor | None
    ) -> None:
        """`places` int32 [rows, J]; None: the rows' order."""
        exchange, row = self.exchange, self.row
        x, scales = self.outputs(shape, padded)
        exchange.unpack(
            self.call, windows, row_bytes=row.row_bytes, payload_bytes=row.payload_bytes,
            positions=0 if places is None else places.data_ptr(),
            num_positions=0 if places is None else places.shape[1], out_x=x.data_ptr(),
            out_scales=0 if scales is None else scales.data_ptr(),
            scales_at=row.scales_at, scale_bytes=row.scale_bytes,
        )  # fmt: skip
        self.out_x = x if scales is None else (x, scales)
        self.places, self.shape = math.prod(shape), shape

    def finish(self) -> Dispatched:
        exchange, handle, known = self.exchange, self.request.handle, getattr(self, "known", None)
        if known is not None and self.report is not None:
            self.report.look()
        elif self.report is not None:
            exchange.leave(self.report)
        if self.error is not None:
            raise self.error
        if handle is None:
            none, nodes = (0,) * exchange.num_ranks, self.buffer.topology.num_nodes
            handle = Handle(
                group_key=self.buffer.group_key, number=0 if known is None else int(known.words[2]),
                rank=exchange.rank, hops=self.buffer.hops, layout=self.request.layout, num_experts=self.num_experts,
                topk=self.topk, num_tokens=len(self.lane_rows), num_places=self.places, place_shape=self.shape,
                tokens_of=none if known is None else tuple(known.tokens.tolist()),
                totals=none if known is None else tuple(known.rows.tolist()), forward_counts=(0,) * nodes,
                lane_rows=self.lane_rows, recv_tokens=self.recv_tokens, positions=self.positions,
                forward_tokens=self.forward_tokens, forward_rows=self.forward_rows,
                tokens_per_expert=self.tokens_per_expert, told=self.told.words, generation=self.buffer.generation,
                chunk=self.chunk,
            )  # fmt: skip
        return self.hand_out(handle)

    def hand_out(self, handle: Handle, *tables: Tensor) -> Dispatched:
        """What was received; `tables`: more of the handle's, made on the exchange's stream."""
        x, ids, weights = self.out
        payload, scales = x if isinstance(x, tuple) else (x, None)
        self.event = self.exchange.hand_out(
            payload, scales, ids, weights, self.tokens_per_expert, self.recv_tokens, self.positions, self.told.words,
            *tables, ordered=self.ordered,
        )  # fmt: skip
        self.result = Dispatched(x, ids, weights, self.tokens_per_expert, handle)
        return self.result


class KernelCombine(ByKernels, PendingCombine):
    """A combine from its first send to its last receive."""

    what = "y"

    def _check(self) -> None:
        super()._check()
        check_wait_ns(self.request.wait_ns, self.buffer)

    def _begin(self, found: _engine.CallFormat) -> None:
        handle, each = self.request.handle, self.request.each_copy
        self.exchange.expect_room(0)
        self.format = found
        self.row = RowFormat.of_combine(
            self.y.shape[1] * self.y.element_size(),
            self.request.handle.topk,
            columns=self.columns is not None,
        )
        self.experts_per_rank = -(-handle.num_experts // self.exchange.num_ranks)
        self.rows_per_token = min(handle.topk, self.experts_per_rank) if each else 1
        self.like = self.exchange.kept_like(found, (LANES_TEXT,), self.rounds)

    def _send(self) -> None:
        exchange, request, handle = self.exchange, self.request, self.request.handle
        call = self.call
        exchange.begin(call, COMBINE, request.timeout_s)
        if self.error is not None:
            send_refusal(exchange, call, COMBINE, self.text, request.timeout_s)
            return
        y, weights, columns, row = self.y, self.weights, self.columns, self.row
        exchange.used_by_stream(y, weights, columns, self.bias, request.wait_ns, *self.lanes)
        kernels, stride = exchange.kernels, y.stride(0) * y.element_size()
        told = Told(handle.told, exchange.num_ranks)
        rows, starts = told.rows, told.starts
        if request.each_copy:
            copies, rows, starts = kernels.copy_offsets(
                handle.positions, rows, starts, row_bytes=stride
            )
            offsets = copies[:, None]
        elif handle.layout == "rank" and len(handle.positions):  # one of several rounds
            offsets = handle.positions.long() * stride
        elif handle.layout == "rank":
            offsets = (torch.arange(len(handle.recv_tokens), device=exchange.device) * stride)[
                :, None
            ]
        else:
            zeros = handle.positions.new_zeros(handle.topk)
            offsets = kernels.row_offsets(handle.positions, zeros, zeros.long(), row_bytes=stride)
            if weights is not None:
                weights = kernels.lane_columns(weights.view(-1), handle.positions)
            if columns is not None:
                columns = kernels.lane_columns(columns.view(-1), handle.positions)
        self.lane_error = self._find_lanes()
        exchange.write_headers(
            call, self.like, exchange.results, rows=rows.data_ptr(), starts=starts.data_ptr(),
            row_bytes=row.row_bytes, groups=exchange.at(call, "groups"), identity=told.identity,
            tokens=handle.num_tokens, error=self.lane_error, topk=handle.topk,
            topk_idx=0 if self.lanes[0] is None else self.lanes[0].data_ptr(),
        )  # fmt: skip
        exchange.send_sums(
            y.dtype, call, exchange.results, memory=y.data_ptr(), offsets=offsets.data_ptr(),
            num_terms=offsets.shape[1], weights=0 if weights is None else weights.data_ptr(),
            payload_bytes=row.payload_bytes, row_bytes=row.row_bytes,
            columns=0 if columns is None else columns.data_ptr(),
            num_columns=0 if columns is None else handle.topk, columns_at=row.weights_at,
        )  # fmt: skip
        if exchange.forwarder is not None:
            passed = Passed(self.format, self.like, row, told.identity, handle, request.timeout_s)
            exchange.forwarder.begin(
                call, (handle.told, handle.forward_rows),
                functools.partial(exchange.forwarder.add_rows, call, passed, y.dtype, columns is not None),
            )  # fmt: skip

    def receive_first(self) -> None:
        exchange, request = self.exchange, self.request
        with exchange.on_stream():
            exchange.await_rows(self.call, COMBINE, request.timeout_s, request.wait_ns is not None)
            if self.error is not None:
                exchange.hear_refusals(self.call, COMBINE, request.timeout_s)
                return
            identity = Told(request.handle.told, exchange.num_ranks).identity
            self.told = exchange.check_headers(
                self.call, self.like, "sums", exchange.num_sums, identity=identity, error=self.lane_error,
                capacity=self.format.capacity * self.rows_per_token, wait_ns=request.wait_ns,
            )  # fmt: skip
            judge = functools.partial(judge_combine, exchange, self.format)
            self.report = exchange.report(f"combine epoch {self.call.epochs[0]}", self.told, judge)
        if self.in_rounds:
            self.call.num_rounds = exchange.read(
                self.report, exchange.late_s(request.timeout_s)
            ).rounds

    def _receive(self) -> None:
        exchange, handle = self.exchange, self.request.handle
        with allocated_by(exchange.new):
            self._new_outputs()
        exchange.used_by_stream(self.summed)
        rows, bias, lanes = self.row, self.bias, self.lanes[0]
        windows = exchange.table(self.call, "sums", exchange.num_sums) + HEADER_BYTES
        # A node's sum is rounded.
        inner = (0, exchange.num_ranks if handle.hops == "node" else 0)
        weights = None
        if lanes is None:
            lane_rows = handle.lane_rows
            if exchange.forwarder is not None:
                inner = exchange.forwarder.inner
                lane_rows = lane_rows.index_select(1, exchange.forwarder.sum_lanes)
            if exchange.masks is not None:  # whoever is left out sent nothing
                lane_rows = lane_rows.masked_fill(self.told.rows == 0, -1)
            starts = exchange.zeros[: exchange.num_sums]
            offsets = exchange.kernels.row_offsets(
                lane_rows, starts, windows, row_bytes=rows.row_bytes
            )
        else:
            inner, weights = (0, 0), self.lanes[1]
            offsets = exchange.kernels.lane_offsets(
                lanes, self.found.numbers, self.told.rows, windows, experts_per_rank=self.experts_per_rank,
                row_bytes=rows.row_bytes,
            )  # fmt: skip
        item = self.y.element_size()
        exchange.add_rows(
            self.y.dtype, self.call, offsets=offsets.data_ptr(), num_terms=offsets.shape[1],
            inner_first=inner[0], inner_last=inner[1],
            weights=0 if weights is None else weights.data_ptr(), fused=1,
            bias=0 if bias is None else bias.data_ptr(), bias_stride=0 if bias is None else bias.stride(0) * item,
            payload_bytes=rows.payload_bytes, whole=fused.Group(
                out=self.summed.data_ptr(), out_stride=self.summed.stride(0) * item, num_rows=len(self.summed)
            ),
            num_columns=0 if self.out_columns is None else handle.topk, columns_at=rows.weights_at,
            out_columns=0 if self.out_columns is None else self.out_columns.data_ptr(),
        )  # fmt: skip

    def _find_lanes(self) -> int:
        """Which row or copy of its owner each lane's term is. Returns where it says whether topk_idx is the dispatch's,
        as route does."""
        idx, handle = self.lanes[0], self.request.handle
        if idx is None:
            return 0
        self.found = self.exchange.kernels.lane_numbers(
            idx, handle.lane_rows, experts_per_rank=self.experts_per_rank, num_experts=handle.num_experts,
            each_copy=self.request.each_copy,
        )  # fmt: skip
        return self.found.error.data_ptr()

    def finish(self) -> Tensor | tuple[Tensor, Tensor]:
        if self.report is not None:
            self.exchange.leave(self.report)
        if self.error is not None:
            raise self.error
        self.event = self.exchange.hand_out(self.out, self.out_columns, ordered=self.ordered)
        return self.out if self.out_columns is None else (self.out, self.out_columns)


def sent_rows(handle: Handle) -> Tensor:
    """int32 [2, D]: zeros, and how many rows this rank sends by each lane, as route says it of one round."""
    counts = (handle.lane_rows >= 0).sum(0, dtype=torch.int32)
    return torch.stack([torch.zeros_like(counts), counts])


NO_ROW = RowFormat.of_combine(16, 1, columns=False)


def send_refusal(
    exchange: KernelExchange, call: Round, kind: int, text: str, timeout_s: float | None
) -> None:
    """Headers that say what is wrong here, and no rows."""
    found = refused_format(kind)
    like = exchange.like(found, (text,))[HEADER_BYTES:]
    lanes = exchange.lanes if kind == DISPATCH else exchange.results
    zeros = exchange.zeros.data_ptr()
    exchange.write_headers(call, like, lanes, rows=zeros)
    exchange.send_rows(call, lanes, starts=zeros, lane_rows=zeros, head_bytes=HEADER_BYTES)
    if exchange.forwarder is not None:
        passed = Passed(found, like, NO_ROW, timeout_s=timeout_s)
        exchange.forwarder.begin(
            call, (like,), functools.partial(exchange.forwarder.refuse, call, kind, passed)
        )
