"""One combine, top to bottom: the same way back as its dispatch, adding on the way.

Each rank sums its own copies of a token (level 0, lane order), stores the row where the source, or the forwarder of the
source's rail, adds the ranks of the node (level 1, ascending) and the source adds the nodes (level 2, ascending, from
the bias). Sums are fp32 (fp64 for fp64), rounded to the dtype of y wherever a row crosses a level. No metadata travels:
rows lie where the dispatch's rows lay, and every rank knows from its handle how many rounds there are.

With `topk_idx` (one level only: hops="rank", or one node) sums go by the token's lanes: each rank's sum stands where
the last lane of that rank does. With `each_copy` no rank adds: one row per (token, expert) travels, in the order of
(token, lane), and the source adds them in lane order, by fused multiply-add if it has weights. Where a copy lies
follows from topk_idx at the source and from the handle at the sender, so here, too, no metadata travels.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _engine
from .arguments import Found, check_floats, check_handle, check_rows, overlap, place, wrong
from .dispatch import (
    COMBINE,
    FLAG_EACH_COPY,
    FLAG_WEIGHTS,
    error_call,
    load_handle,
    new_call,
    time_waits,
)
from .errors import ArgumentError
from .handle import Handle
from .layout import DTYPE_CODES, RowFormat
from .memory import new_tensor

if TYPE_CHECKING:
    from .buffer import Buffer


@dataclasses.dataclass
class CombineRequest:
    """Arguments of one combine, as given."""

    y: Any
    handle: Handle
    weights: Tensor | None
    topk_weights: Tensor | None
    bias: Tensor | None
    out: Tensor | None
    topk_idx: Tensor | None
    each_copy: bool
    source_weights: Tensor | None
    timeout_s: float | None
    deferred: bool
    wait_ns: Tensor | None = None  # [R]


class PendingCombine:
    """A combine from its first send to its last receive."""

    call: Any  # as in dispatch.py
    ordered = True

    def __init__(self, buffer: "Buffer", request: CombineRequest):
        self.buffer, self.request = buffer, request
        self.error: ArgumentError | None = None
        self.held: tuple[Any, ...] = ()
        try:
            self._prepare()
        except (ArgumentError, TypeError, ValueError, RuntimeError) as error:
            self.refuse(str(error))

    def refuse(self, text: str) -> None:
        """As in dispatch.py."""
        self.error = ArgumentError(text)
        self.call = error_call(COMBINE, text, self.buffer, self.request.timeout_s)

    def _prepare(self) -> None:
        self._check()
        request, buffer, handle, y = self.request, self.buffer, self.request.handle, self.y
        key = (
            COMBINE, y.shape[1], y.dtype, handle.topk, handle.num_experts, self.columns is None, handle.layout,
            request.each_copy,
        )  # fmt: skip
        found = buffer.formats.get(key)
        if found is None:
            found = buffer.formats[key] = self._format(handle, y, self.columns is not None)
        buffer.require_one_round(found.capacity, request.deferred)
        self._begin(found)

    def _check(self) -> None:
        """All but the values of tensors."""
        request, buffer, handle = self.request, self.buffer, self.request.handle
        check_handle(buffer, handle)
        y = request.y
        if not (isinstance(y, Tensor)):
            raise wrong("y", "a tensor", y)
        places = handle.place_shape
        if not (y.dim() == len(places) + 1 and y.shape[:-1] == places):
            raise wrong("y", f"[{', '.join(map(str, (*places, 'H')))}]", y)
        hidden = y.shape[-1]
        if y.dim() != 2:
            y = y.reshape(handle.num_places, hidden)
        y = check_rows("y", y, where=buffer.device)
        if y.dtype not in DTYPE_CODES:
            raise wrong("y", "bfloat16, float16, float32 or float64", y)
        weights = columns = bias = None
        if request.weights is not None:
            weights = self._check_weights(handle, request.weights)
        if request.topk_weights is not None:
            columns = self._check_columns(handle, request.topk_weights)
        if request.bias is not None:
            bias = self._check_summed("bias", request.bias, handle, y)
        self.lanes = self._check_lanes(handle)
        self.y, self.weights, self.columns, self.bias = y, weights, columns, bias
        if request.out is not None:
            self.summed = self._check_summed("out", request.out, handle, y)
            if overlap(self.summed, y):
                raise wrong("out", "memory that y does not use", Found("a part of y"))

    def _new_outputs(self) -> None:
        num_tokens, y = self.request.handle.num_tokens, self.y
        if self.request.out is not None:
            self.out = self.request.out
        else:
            self.out = self.summed = new_tensor((num_tokens, y.shape[1]), y.dtype)
        self.out_columns = None
        if self.columns is not None:
            self.out_columns = new_tensor((num_tokens, self.request.handle.topk), torch.float32)

    def _begin(self, found: _engine.CallFormat) -> None:
        request, buffer, handle = self.request, self.buffer, self.request.handle
        self._new_outputs()
        y, weights, columns, bias, out = self.y, self.weights, self.columns, self.bias, self.summed
        lanes, lane_weights = self.lanes
        direct = (
            not request.deferred
        )  # own results are read where they lie, unless y may change before
        call = self.call = new_call(buffer, found, request.timeout_s, direct)
        load_handle(call, handle, buffer.topology.node_ranks)
        item = y.element_size()
        call.set_results(
            handle.num_tokens, y.data_ptr(), y.stride(0) * item, 0 if weights is None else weights.data_ptr(),
            0 if columns is None else columns.data_ptr(), handle.layout != "rank",
        )  # fmt: skip
        call.set_summed(
            out.data_ptr(), out.stride(0) * item,
            0 if self.out_columns is None else self.out_columns.data_ptr(),
            0 if bias is None else bias.data_ptr(), 0 if bias is None else bias.stride(0) * item,
        )  # fmt: skip
        if lanes is not None:
            call.set_lanes(
                lanes.data_ptr(), 0 if lane_weights is None else lane_weights.data_ptr(), request.each_copy
            )  # fmt: skip
            buffer.native.check_lanes(call)
        buffer.native.place(call, 1, 0, 0)
        time_waits(call, request.wait_ns, buffer)
        self.held = (y, handle, weights, columns, bias, lanes, lane_weights, request.wait_ns)

    def _format(self, handle: Handle, y: Tensor, columns: bool) -> _engine.CallFormat:
        row = RowFormat.of_combine(y.shape[1] * y.element_size(), handle.topk, columns=columns)
        flags = FLAG_WEIGHTS if columns else 0
        rows_per_token = 1
        if self.request.each_copy:
            flags |= FLAG_EACH_COPY
            rows_per_token = min(handle.topk, -(-handle.num_experts // self.buffer.num_ranks))
        return _engine.CallFormat(
            COMBINE, dataclasses.astuple(row), handle.num_experts, DTYPE_CODES[y.dtype], flags,
            self.buffer.layout.capacity_for(row.row_bytes * rows_per_token, 0), False, handle.layout != "rank",
        )  # fmt: skip

    def _check_lanes(self, handle: Handle) -> tuple[Tensor | None, Tensor | None]:
        request, buffer = self.request, self.buffer
        idx, weights = request.topk_idx, request.source_weights
        if idx is None:
            if request.each_copy or weights is not None:
                raise wrong("topk_idx", "the dispatch's, with each_copy or source_weights", None)
            return None, None
        shape = (handle.num_tokens, handle.topk)
        if not (
            isinstance(idx, Tensor)
            and idx.dtype is torch.int64
            and idx.device == buffer.device
            and idx.shape == shape
        ):
            raise wrong("topk_idx", f"int64 {shape} {place(buffer.device)}", idx)
        if buffer.hops == "node" and buffer.topology.num_nodes > 1:
            raise wrong("topk_idx", 'None with hops="node" between nodes', idx)
        if request.each_copy:
            if handle.layout == "rank":
                raise wrong("each_copy", "False with layout 'rank' (rows are already summed)", True)
            if request.weights is not None or request.topk_weights is not None:
                raise wrong("each_copy", "False with weights or topk_weights", True)
        if weights is not None:
            if not request.each_copy:
                raise wrong("source_weights", "None without each_copy", weights)
            weights = check_floats("source_weights", weights, shape, buffer.device)
        return idx.contiguous(), weights

    def _check_weights(self, handle: Handle, weights: Any) -> Tensor:
        if not (handle.layout != "rank"):
            raise wrong(
                "weights", "None with layout 'rank' (rows are already summed)", Found("a tensor")
            )
        return check_floats("weights", weights, handle.place_shape, self.buffer.device)

    def _check_columns(self, handle: Handle, columns: Any) -> Tensor:
        shape = handle.place_shape
        if handle.layout == "rank":
            shape = (handle.num_recv_rows, handle.topk)
        return check_floats("topk_weights", columns, shape, self.buffer.device)

    def _check_summed(self, name: str, value: Any, handle: Handle, y: Tensor) -> Tensor:
        rows = check_rows(name, value, where=self.buffer.device)
        shape = (handle.num_tokens, y.shape[1])
        if not (tuple(rows.shape) == shape and rows.dtype == y.dtype):
            raise wrong(name, f"{str(y.dtype).removeprefix('torch.')} {shape}", rows)
        return rows

    def send(self) -> None:
        self.buffer.native.send(self.call)

    def receive_first(self) -> None:
        self.buffer.native.wait_headers(self.call)

    def receive(self, round_idx: int) -> None:
        self.buffer.native.receive(self.call, round_idx)

    def finish(self) -> Tensor | tuple[Tensor, Tensor]:
        if self.error is not None:
            raise self.error
        self.call.raise_failure()
        return self.out if self.out_columns is None else (self.out, self.out_columns)
