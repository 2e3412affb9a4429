"""One dispatch, top to bottom: check, route, send rounds, learn sizes, receive rounds, hand out.

    x[T, H] --pack(H1)--> window --command(H2)--> ring -> proxy --work request(H3)--> NIC --bytes + immediate(H4)-->
    peer's proxy --count(H5, FULL)--> counter --unpack(H6)--> recv_x --(H7, EMPTY)--> bank free

A call of T > C tokens runs in rounds over ranges of tokens. How many is the maximum over the ranks: each rank says its
own number in its first headers, sends at most two rounds ahead, learns the maximum from everybody's first headers, and
then sends empty rounds up to it. The first headers also say how many rows will come from whom for which expert, so
outputs are allocated exactly, and every row's place is known whatever order rows arrive in.

A rank whose arguments are wrong takes part all the same, with no tokens and its error's text in the header; so the
others raise PeerError, every rank has used the same epochs, and the next call works.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _engine
from .arguments import Found, check_handle, check_rows, wrong
from .errors import ArgumentError
from .handle import LAYOUTS, Handle
from .layout import RowFormat, counts_bytes, dtype_code
from .memory import new_tensor

if TYPE_CHECKING:
    from .buffer import Buffer

DISPATCH, COMBINE = 1, 2  # csrc/abi.hpp: ExchangeKind
FLAG_IDS, FLAG_WEIGHTS, FLAG_CACHED = 1, 2, 4


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """What this rank received. L: experts it owns; K: top-k; rows in the order of (source rank, source token).

    - layout "rank": `x` [rows, H], one row for each token with an expert here; `topk_idx` [rows, K] int64 local expert
      ids, −1 elsewhere; `topk_weights` [rows, K] float32, 0 elsewhere.
    - layout "expert": `x` [P, H], one row for each (token, local expert), grouped by expert, groups padded with zero
      rows to a multiple of `alignment`; `topk_idx` [P] int64 local expert (−1: padding); `topk_weights` [P] float32.
    - layout "padded": `x` [L, capacity, H], expert l's rows first, zeros behind; `topk_idx` None; `topk_weights`
      [L, capacity] float32.

    `x` is a pair (payload, scales) if one was passed, `topk_weights` None if none were. `tokens_per_expert` [L] int64
    counts copies, padding not included. `handle` goes to combine. All are fresh tensors, owned by the caller.
    """

    x: Any
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    tokens_per_expert: Tensor
    handle: Handle


@dataclasses.dataclass
class DispatchRequest:
    """Arguments of one dispatch, as given."""

    x: Any
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    num_experts: int
    layout: str
    alignment: int
    handle: Handle | None  # cached: places from here, topk_idx and topk_weights None
    capacity: int | None  # rows per expert of the padded layout
    timeout_s: float | None
    deferred: bool  # received later, by a hook


class PendingDispatch:
    """A dispatch from its first send to its last receive."""

    def __init__(self, buffer: "Buffer", request: DispatchRequest):
        self.buffer, self.request = buffer, request
        self.call = _engine.Call(DISPATCH)
        self.error: ArgumentError | None = None
        self.result: Dispatched | None = None
        self.held: list[Any] = []  # tensors whose addresses the call knows
        self.call.set_timeouts(*buffer.timeouts(request.timeout_s))
        self.call.prepare_forward(buffer.topology.num_nodes, buffer.topology.node_ranks)
        try:
            self._prepare()
        except (ArgumentError, TypeError, ValueError, RuntimeError) as error:
            self.refuse(str(error))  # whatever is wrong: the peers wait for our header
        if self.error is None and request.handle is not None:
            load_forward(self.call, request.handle, buffer.topology.node_ranks)

    def refuse(self, text: str) -> None:
        """This rank takes part with no tokens and `text`; `finish` raises it."""
        self.error = ArgumentError(text)
        self.call = error_call(DISPATCH, text, self.buffer, self.request.timeout_s)

    # --- before the first byte ---------------------------------------------------------------------

    def _prepare(self) -> None:
        request, call = self.request, self.call
        x, scales = request.x, None
        if isinstance(x, (tuple, list)):
            if not (len(x) == 2):
                raise wrong("x", "a tensor, or a pair (payload, scales)", Found(f"{len(x)} things"))
            x, scales = x
        name = "x" if scales is None else "x[0]"
        x = check_rows(name, x)
        num_tokens, hidden = x.shape
        scales = self._check_scales(scales, num_tokens)
        if request.layout not in LAYOUTS:
            raise wrong("layout", f"one of {LAYOUTS}", request.layout)
        if not (isinstance(request.alignment, int) and request.alignment >= 1):
            raise wrong("alignment", "an int >= 1", request.alignment)
        if request.layout == "padded" and request.handle is None:
            capacity = self.buffer.padded_capacity(request.capacity)
            if not (isinstance(capacity, int) and capacity >= 1):
                raise wrong("capacity", "an int >= 1", capacity)
        limit = self.buffer.max_tokens
        if not (limit is None or num_tokens <= limit):
            raise wrong(name, f"at most max_tokens = {limit} tokens", x)
        if request.handle is not None:
            topk, num_experts = self._check_cached(request.handle, num_tokens)
        else:
            topk, num_experts = self._check_routing(num_tokens)
        self.hidden, self.dtype, self.topk = hidden, x.dtype, topk
        self.scale_shape = None if scales is None else (scales.shape[1], scales.dtype)
        call.cached = request.handle is not None
        call.expand = request.layout != "rank"
        call.own_rows_direct = not request.deferred
        scale_bytes = 0 if scales is None else scales.shape[1] * scales.element_size()
        row = RowFormat.of_dispatch(
            hidden * x.element_size(),
            scale_bytes,
            topk,
            weights=request.topk_weights is not None,
            cached=call.cached,
        )
        layout = self.buffer.layout
        counts = 0
        if not call.cached:
            counts = counts_bytes(
                num_experts, layout.num_ranks, layout.node_ranks, by_node=layout.hops == "node"
            )
        call.num_tokens, call.num_experts = num_tokens, num_experts
        call.capacity = layout.capacity_for(row.row_bytes, counts)
        if request.deferred and not (limit is not None and limit <= call.capacity):
            raise wrong(
                "async_op",
                f"window_bytes that hold max_tokens rows for a hook (one round of {call.capacity} rows)",
                Found(f"max_tokens = {limit}"),
            )
        call.own_rounds = max(1, -(-num_tokens // call.capacity))
        call.set_format(
            row.payload_bytes, row.scale_bytes, row.scales_at, row.token_at, row.ids_at, row.weights_at, topk,
            row.row_bytes,
        )  # fmt: skip
        flags = FLAG_CACHED if call.cached else FLAG_IDS | (FLAG_WEIGHTS if row.weights_at else 0)
        number = request.handle.number if request.handle is not None else 0
        call.set_agreed(dtype_code(x.dtype), flags, number)
        call.x, call.x_stride = x.data_ptr(), x.stride(0) * x.element_size()
        if scales is not None:
            item = scales.element_size()
            call.scales = scales.data_ptr()
            call.set_scale_strides(scales.stride(0) * item, scales.stride(1) * item, item)
        self.held += [x, scales]
        if request.handle is None:
            self.lane_rows = torch.empty(
                (num_tokens, self.buffer.native.num_lanes), dtype=torch.int32
            )
            call.lane_rows = self.lane_rows.data_ptr()
            self.buffer.native.route(call)  # raises for ids out of range and for an expert twice
        else:
            call.lane_rows = request.handle.lane_rows.data_ptr()
            call.tokens_of, call.totals = request.handle.tokens_of, request.handle.totals

    def _check_scales(self, scales: Any, num_tokens: int) -> Tensor | None:
        if scales is None:
            return None
        if not (isinstance(scales, Tensor)):
            raise wrong("x[1]", "a tensor of scales [T, S]", scales)
        if not (scales.device.type == "cpu"):
            raise wrong("x[1]", "a CPU tensor", scales)
        if not (scales.dim() == 2 and scales.shape[0] == num_tokens and scales.shape[1] > 0):
            raise wrong("x[1]", f"scales [{num_tokens}, S]", scales)
        return scales.detach()

    def _check_routing(self, num_tokens: int) -> tuple[int, int]:
        request, call = self.request, self.call
        idx, weights = request.topk_idx, request.topk_weights
        if not (isinstance(idx, Tensor)):
            raise wrong("topk_idx", "a tensor [T, K]", idx)
        if not (idx.dtype == torch.int64 and idx.dim() == 2 and idx.device.type == "cpu"):
            raise wrong("topk_idx", "int64 [T, K] on the CPU", idx)
        if not (idx.shape[0] == num_tokens and idx.shape[1] >= 1):
            raise wrong("topk_idx", f"[{num_tokens}, K >= 1]", idx)
        if not (isinstance(request.num_experts, int) and 0 < request.num_experts < 2**31):
            raise wrong("num_experts", "an int >= 1", request.num_experts)
        if weights is not None:
            if not (
                isinstance(weights, Tensor)
                and weights.dtype == torch.float32
                and weights.device.type == "cpu"
                and weights.shape == idx.shape
            ):
                raise wrong("topk_weights", f"float32 {tuple(idx.shape)} on the CPU", weights)
            weights = (weights.detach() if weights.requires_grad else weights).contiguous()
            call.topk_weights = weights.data_ptr()
        idx = idx.contiguous()
        call.topk_idx = idx.data_ptr()
        self.held += [idx, weights]
        return idx.shape[1], request.num_experts

    def _check_cached(self, handle: Handle, num_tokens: int) -> tuple[int, int]:
        request = self.request
        check_handle(self.buffer, handle)
        if request.topk_idx is not None:
            raise wrong("topk_idx", "None with a handle", request.topk_idx)
        if request.topk_weights is not None:
            raise wrong("topk_weights", "None with a handle", request.topk_weights)
        if not (request.layout == handle.layout):
            raise wrong("layout", f"{handle.layout!r}, the handle's", request.layout)
        if not (num_tokens == handle.num_tokens):
            raise wrong("x", f"{handle.num_tokens} tokens, the handle's", num_tokens)
        return handle.topk, handle.num_experts

    # --- sending and receiving ---------------------------------------------------------------------

    def send(self) -> None:
        self.buffer.native.send(self.call)

    def receive_first(self) -> None:
        """Round 0's headers: sizes. Allocates the outputs."""
        native, call = self.buffer.native, self.call
        native.wait_headers(call)
        if self.error is None and not call.failed:
            try:
                self._allocate()
            except ArgumentError as error:  # e.g. more rows than the padded capacity
                self.error = error
                call.set_error(str(error))
            except (RuntimeError, MemoryError) as error:  # no memory for what the peers send
                self.error = ArgumentError(f"x: no memory for the received rows: {error}")
                call.set_error(str(self.error))

    def receive(self, round_idx: int) -> None:
        self.buffer.native.receive(self.call, round_idx)

    def _allocate(self) -> None:
        request, call, handle = self.request, self.call, self.request.handle
        capacity = 0
        if request.layout == "padded" and handle is None:
            capacity = self.buffer.padded_capacity(request.capacity)
        if handle is None:
            slots = -(-call.num_experts // self.buffer.num_ranks)  # experts of the first ranks
            owned = max(0, min(slots, call.num_experts - self.buffer.rank * slots))
            self.tokens_per_expert = torch.empty(owned, dtype=torch.int64)
        else:
            self.tokens_per_expert = handle.tokens_per_expert
        rows, places, copies, fullest = self.buffer.native.place(
            call, request.alignment, capacity, self.tokens_per_expert.data_ptr()
        )
        shape: tuple[int, ...] = (places,)
        padded = call.expand and places != copies
        if handle is not None:
            self.recv_tokens, self.positions = handle.recv_tokens, handle.positions
            places, shape, padded = handle.num_places, handle.place_shape, call.expand
        else:
            if capacity:
                if fullest > capacity:
                    raise ArgumentError(
                        f"capacity: expected at least {fullest} rows for the fullest expert of rank "
                        f"{self.buffer.rank}, got {capacity}"
                    )
                shape = (owned, capacity)
            if not (places < 2**31 and rows < 2**31):
                raise wrong("x", "fewer than 2^31 received rows", places)
            self.recv_tokens = torch.empty(rows, dtype=torch.int32)
            self.positions = no_rows(self.topk)
            if call.expand:
                self.positions = new_tensor((rows, self.topk), torch.int32)
            call.recv_tokens = self.recv_tokens.data_ptr()
        call.positions = self.positions.data_ptr() if call.expand else 0
        x = new_tensor((*shape, self.hidden), self.dtype)
        call.out_x = x.data_ptr()
        out_x: Any = x
        if self.scale_shape is not None:
            scales = new_tensor((*shape, self.scale_shape[0]), self.scale_shape[1])
            call.out_scales = scales.data_ptr()
            out_x = (x, scales)
        if padded:  # rows that nobody writes
            x.zero_()
            if self.scale_shape is not None:
                scales.zero_()
        ids = weights = None
        if handle is None:
            per_copy = shape if call.expand else (*shape, self.topk)
            if request.layout != "padded":
                ids = torch.empty(per_copy, dtype=torch.int64)
                call.out_ids = ids.data_ptr()
                if padded:
                    ids.fill_(-1)
            if request.topk_weights is not None:
                weights = torch.empty(per_copy, dtype=torch.float32)
                call.out_weights = weights.data_ptr()
                if padded:
                    weights.zero_()
        self.places, self.shape = places, shape
        self.out = (out_x, ids, weights)

    def finish(self) -> Dispatched:
        """After the last round. Raises this rank's error, then the peers'."""
        if self.error is not None:
            raise self.error
        self.call.raise_failure()
        topology, handle = self.buffer.topology, self.request.handle
        if handle is None:
            forward_tokens, forward_rows, forward_counts = take_forward(self.call, topology)
            handle = Handle(
                group_key=self.buffer.group_key,
                number=self.call.identity,
                rank=topology.rank, hops=self.buffer.hops, layout=self.request.layout,
                num_experts=self.call.num_experts, topk=self.topk,
                num_tokens=self.call.num_tokens, num_places=self.places, place_shape=self.shape,
                tokens_of=tuple(self.call.tokens_of), totals=tuple(self.call.totals),
                forward_counts=forward_counts, lane_rows=self.lane_rows, recv_tokens=self.recv_tokens,
                positions=self.positions, forward_tokens=forward_tokens, forward_rows=forward_rows,
                tokens_per_expert=self.tokens_per_expert,
            )  # fmt: skip
        out_x, ids, weights = self.out
        self.result = Dispatched(out_x, ids, weights, self.tokens_per_expert, handle)
        return self.result


def error_call(kind: int, text: str, buffer: "Buffer", timeout_s: float | None) -> _engine.Call:
    """A call without tokens whose headers carry an error's text."""
    call = _engine.Call(kind)
    call.set_timeouts(*buffer.timeouts(timeout_s))
    call.prepare_forward(buffer.topology.num_nodes, buffer.topology.node_ranks)
    call.set_error(text)
    return call


def load_forward(call: _engine.Call, handle: Handle, node_ranks: int) -> None:
    at = 0
    for node, count in enumerate(handle.forward_counts):
        if not count:
            continue
        tokens, rows = handle.forward_tokens[at : at + count], handle.forward_rows[at : at + count]
        call.set_forward(node, tokens.data_ptr(), rows.data_ptr(), count, node_ranks)
        at += count


@functools.cache
def no_rows(columns: int) -> Tensor:
    """int32 [0, columns]; [0] for columns = 0."""
    return torch.empty((0, columns) if columns else 0, dtype=torch.int32)


def take_forward(call: _engine.Call, topology) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    counts = tuple(call.forward_size(node) for node in range(topology.num_nodes))
    if not any(counts):
        return no_rows(0), no_rows(topology.node_ranks), counts
    tokens = torch.empty(sum(counts), dtype=torch.int32)
    rows = torch.empty((sum(counts), topology.node_ranks), dtype=torch.int32)
    at = 0
    for node, count in enumerate(counts):
        if count:
            call.copy_forward(node, tokens[at:].data_ptr(), rows[at:].data_ptr())
        at += count
    return tokens, rows, counts
