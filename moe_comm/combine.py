"""One combine, top to bottom: the same way back as its dispatch, adding on the way.

Each rank sums its own copies of a token (level 0, lane order), stores the row where the source, or the forwarder of the
source's rail, adds the ranks of the node (level 1, ascending) and the source adds the nodes (level 2, ascending, from
the bias). Sums are fp32 (fp64 for fp64), rounded to the dtype of y wherever a row crosses a level. No metadata travels:
rows lie where the dispatch's rows lay, and every rank knows from its handle how many rounds there are.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _engine
from .arguments import Found, check_handle, check_rows, wrong
from .dispatch import COMBINE, FLAG_WEIGHTS, error_call, load_forward
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
    timeout_s: float | None
    deferred: bool


class PendingCombine:
    """A combine from its first send to its last receive."""

    def __init__(self, buffer: "Buffer", request: CombineRequest):
        self.buffer, self.request = buffer, request
        self.call = _engine.Call(COMBINE)
        self.error: ArgumentError | None = None
        self.held: list[Any] = []
        self.call.set_timeouts(*buffer.timeouts(request.timeout_s))
        self.call.prepare_forward(buffer.topology.num_nodes, buffer.topology.node_ranks)
        try:
            self._prepare()
        except (ArgumentError, TypeError, ValueError, RuntimeError) as error:
            self.refuse(str(error))
        if self.error is None:
            load_forward(self.call, request.handle, buffer.topology.node_ranks)

    def refuse(self, text: str) -> None:
        """As in dispatch.py."""
        self.error = ArgumentError(text)
        self.call = error_call(COMBINE, text, self.buffer, self.request.timeout_s)

    def _prepare(self) -> None:
        request, call, handle = self.request, self.call, self.request.handle
        check_handle(self.buffer, handle)
        if not (isinstance(request.y, Tensor)):
            raise wrong("y", "a tensor", request.y)
        shape = (*handle.place_shape, "H")
        if not (
            request.y.dim() == len(shape) and tuple(request.y.shape[:-1]) == handle.place_shape
        ):
            raise wrong("y", f"[{', '.join(map(str, shape))}]", request.y)
        hidden = request.y.shape[-1]
        y = request.y
        if y.dim() != 2:  # padded; reshape(-1) cannot guess the rows of nothing
            y = y.reshape(handle.num_places, hidden)
        y = check_rows("y", y)
        if y.dtype not in DTYPE_CODES:
            raise wrong("y", "bfloat16, float16, float32 or float64", y)
        num_tokens, topk = handle.num_tokens, handle.topk
        self._check_weights(handle)
        columns = request.topk_weights is not None
        row = RowFormat.of_combine(hidden * y.element_size(), topk, columns=columns)
        layout = self.buffer.layout
        call.num_tokens, call.num_experts = num_tokens, handle.num_experts
        call.capacity = layout.capacity_for(row.row_bytes, 0)
        if request.deferred:
            limit = self.buffer.max_tokens
            if not (limit is not None and limit <= call.capacity):
                raise wrong(
                    "async_op",
                    f"window_bytes that hold max_tokens rows for a hook (one round of {call.capacity} rows)",
                    Found(f"max_tokens = {limit}"),
                )
        call.own_rounds = max(1, -(-max(handle.tokens_of) // call.capacity))
        call.set_format(row.payload_bytes, 0, 0, 0, 0, row.weights_at, topk, row.row_bytes)
        call.set_agreed(DTYPE_CODES[y.dtype], FLAG_WEIGHTS if columns else 0, handle.number)
        call.expand = handle.layout != "rank"
        # Own results are read where they lie, unless y may change before, or `out` may be the same memory.
        call.own_rows_direct = not request.deferred and request.out is None
        call.lane_rows = handle.lane_rows.data_ptr()
        call.recv_tokens = handle.recv_tokens.data_ptr()
        call.positions = handle.positions.data_ptr() if call.expand and handle.num_recv_rows else 0
        call.tokens_of, call.totals = handle.tokens_of, handle.totals
        self.buffer.native.place(call, 1, 0, 0)
        call.y, call.y_stride = y.data_ptr(), y.stride(0) * y.element_size()
        self.held += [y, handle]
        self._outputs(num_tokens, hidden, y.dtype, topk)

    def _check_weights(self, handle: Handle) -> None:
        request, call = self.request, self.call
        if request.weights is not None:
            weights = request.weights
            if not (handle.layout != "rank"):
                raise wrong(
                    "weights",
                    "None with layout 'rank' (rows are already summed)",
                    Found("a tensor"),
                )
            if not (
                isinstance(weights, Tensor)
                and weights.dtype == torch.float32
                and weights.device.type == "cpu"
                and tuple(weights.shape) == handle.place_shape
            ):
                raise wrong("weights", f"float32 {handle.place_shape} on the CPU", weights)
            weights = weights.detach().contiguous()
            call.y_weights = weights.data_ptr()
            self.held.append(weights)
        if request.topk_weights is not None:
            columns = request.topk_weights
            shape = (
                handle.place_shape
                if handle.layout != "rank"
                else (handle.num_recv_rows, handle.topk)
            )
            if not (
                isinstance(columns, Tensor)
                and columns.dtype == torch.float32
                and columns.device.type == "cpu"
                and tuple(columns.shape) == shape
            ):
                raise wrong("topk_weights", f"float32 {shape} on the CPU", columns)
            columns = columns.detach().contiguous()
            call.columns, call.columns_by_place = columns.data_ptr(), handle.layout != "rank"
            self.held.append(columns)

    def _outputs(self, num_tokens: int, hidden: int, dtype: torch.dtype, topk: int) -> None:
        request, call = self.request, self.call
        if request.bias is not None:
            bias = check_rows("bias", request.bias)
            if not (tuple(bias.shape) == (num_tokens, hidden) and bias.dtype == dtype):
                raise wrong(
                    "bias", f"{str(dtype).removeprefix('torch.')} {(num_tokens, hidden)}", bias
                )
            call.bias, call.bias_stride = bias.data_ptr(), bias.stride(0) * bias.element_size()
            self.held.append(bias)
        if request.out is not None:
            out = check_rows("out", request.out)
            if not (tuple(out.shape) == (num_tokens, hidden) and out.dtype == dtype):
                raise wrong(
                    "out", f"{str(dtype).removeprefix('torch.')} {(num_tokens, hidden)}", out
                )
            self.out = request.out
        else:
            out = self.out = new_tensor((num_tokens, hidden), dtype)
        call.out_y, call.out_stride = out.data_ptr(), out.stride(0) * out.element_size()
        self.out_columns = None
        if request.topk_weights is not None:
            self.out_columns = torch.empty((num_tokens, topk), dtype=torch.float32)
            call.out_columns = self.out_columns.data_ptr()

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
