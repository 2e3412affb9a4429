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
from .arguments import CPU, Found, check_floats, check_handle, check_rows, place, wrong
from .errors import ArgumentError
from .handle import LAYOUTS, Handle
from .layout import RowFormat, counts_bytes, dtype_code
from .memory import new_tensor

if TYPE_CHECKING:
    from .buffer import Buffer

DISPATCH, COMBINE = 1, 2  # csrc/abi.hpp: ExchangeKind
FLAG_IDS, FLAG_WEIGHTS, FLAG_CACHED, FLAG_EACH_COPY = 1, 2, 4, 8


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
    max_tokens: int | None = None  # of any rank in this call
    wait_ns: Tensor | None = None  # [R]
    out: Any = None  # as x


class PendingDispatch:
    """A dispatch from its first send to its last receive."""

    call: Any  # _engine.Call; or, of kernels, a Round
    ordered = True  # whether the caller's stream waits for results, or an event does

    def __init__(self, buffer: "Buffer", request: DispatchRequest):
        self.buffer, self.request = buffer, request
        self.error: ArgumentError | None = None
        self.result: Dispatched | None = None
        self.held: tuple[Any, ...] = ()  # tensors whose addresses the call knows
        try:
            self._prepare()
        except (ArgumentError, TypeError, ValueError, RuntimeError) as error:
            self.refuse(str(error))  # whatever is wrong: the peers wait for our header

    def refuse(self, text: str) -> None:
        """This rank takes part with no tokens and `text`; `finish` raises it."""
        self.error = ArgumentError(text)
        self.call = error_call(DISPATCH, text, self.buffer, self.request.timeout_s)

    # --- before the first byte ---------------------------------------------------------------------

    def _prepare(self) -> None:
        self._check()
        buffer, handle = self.buffer, self.request.handle
        key = (
            DISPATCH, self.hidden, self.dtype, self.scale_shape, self.topk, self.num_experts, self.weights is None,
            handle is None, self.expand,
        )  # fmt: skip
        found = buffer.formats.get(key)
        if found is None:
            found = buffer.formats[key] = self._format(self.weights is not None, handle is not None)
        buffer.require_one_round(found.capacity, self.request.deferred)
        self._begin(found)

    def _check(self) -> None:
        """All but the values of tensors."""
        request, buffer = self.request, self.buffer
        x, scales, handle = request.x, None, request.handle
        if isinstance(x, (tuple, list)):
            if not (len(x) == 2):
                raise wrong("x", "a tensor, or a pair (payload, scales)", Found(f"{len(x)} things"))
            x, scales = x
        name = "x" if scales is None else "x[0]"
        x = check_rows(name, x, where=buffer.device)
        num_tokens, hidden = x.shape
        if scales is not None:
            scales = self._check_scales(scales, num_tokens)
        if request.layout not in LAYOUTS:
            raise wrong("layout", f"one of {LAYOUTS}", request.layout)
        if not (isinstance(request.alignment, int) and request.alignment >= 1):
            raise wrong("alignment", "an int >= 1", request.alignment)
        if request.layout == "padded" and handle is None:
            capacity = buffer.padded_capacity(request.capacity)
            if not (isinstance(capacity, int) and capacity >= 1):
                raise wrong("capacity", "an int >= 1", capacity)
        limit = buffer.max_tokens
        if not (limit is None or num_tokens <= limit):
            raise wrong(name, f"at most max_tokens = {limit} tokens", x)
        most = request.max_tokens
        if not (most is None or (isinstance(most, int) and 0 < most < 2**32)):
            raise wrong("max_tokens", "an int >= 1 or None", most)
        idx = weights = None
        if handle is not None:
            topk, num_experts = self._check_cached(handle, num_tokens)
        else:
            topk, num_experts = self._check_routing(num_tokens)
            assert request.topk_idx is not None
            idx = request.topk_idx.contiguous()
            if request.topk_weights is not None:
                weights = check_floats(
                    "topk_weights", request.topk_weights, idx.shape, buffer.device
                )
        self.x, self.scales, self.idx, self.weights = x, scales, idx, weights
        self.hidden, self.dtype, self.topk, self.num_experts = hidden, x.dtype, topk, num_experts
        self.expand = request.layout != "rank"
        self.scale_shape = None if scales is None else (scales.shape[1], scales.dtype)
        self.given = None if request.out is None else self._check_out()

    def _check_out(self) -> tuple[Tensor, Tensor | None]:
        request, handle, buffer = self.request, self.request.handle, self.buffer
        if request.layout != "padded":
            raise wrong("out", "None unless layout is 'padded'", request.out)
        shape: tuple[int, ...] = (self._owned(), buffer.padded_capacity(request.capacity))
        if handle is not None:
            shape = handle.place_shape
        rows = [((*shape, self.hidden), self.dtype)]
        if self.scale_shape is not None:
            rows.append(((*shape, self.scale_shape[0]), self.scale_shape[1]))
        given = request.out if isinstance(request.out, (tuple, list)) else (request.out,)
        if len(given) != len(rows):
            raise wrong("out", "a pair if x is one, else a tensor", request.out)
        for tensor, (wanted, dtype) in zip(given, rows, strict=True):
            good = isinstance(tensor, Tensor) and tensor.dtype == dtype and tensor.is_contiguous()
            if not (good and tensor.shape == wanted and tensor.device == buffer.device):
                text = f"{str(dtype).removeprefix('torch.')} {tuple(wanted)}, contiguous, "
                raise wrong("out", text + place(buffer.device), tensor)
        return given[0], given[1] if len(given) > 1 else None

    def _owned(self) -> int:
        """Experts of this rank."""
        slots = -(-self.num_experts // self.buffer.num_ranks)  # of the first ranks
        return max(0, min(slots, self.num_experts - self.buffer.rank * slots))

    def _begin(self, found: _engine.CallFormat) -> None:
        request, buffer, handle = self.request, self.buffer, self.request.handle
        x, scales, idx, weights = self.x, self.scales, self.idx, self.weights
        num_tokens = len(x)
        call = self.call = new_call(buffer, found, request.timeout_s, not request.deferred)
        if handle is None:
            self.lane_rows = torch.empty((num_tokens, buffer.native.num_lanes), dtype=torch.int32)
        else:
            self.lane_rows = handle.lane_rows
            load_handle(call, handle, buffer.topology.node_ranks)
        if request.max_tokens is not None:
            call.set_max_tokens(request.max_tokens)
        time_waits(call, request.wait_ns, buffer)
        self.held = (x, scales, idx, weights, handle, request.wait_ns)
        call.set_source(
            num_tokens, x.data_ptr(), x.stride(0) * x.element_size(), 0 if idx is None else idx.data_ptr(),
            0 if weights is None else weights.data_ptr(), self.lane_rows.data_ptr(),
        )  # fmt: skip
        if scales is not None:
            item = scales.element_size()
            call.set_scales(
                scales.data_ptr(), scales.stride(0) * item, scales.stride(1) * item, item
            )
        if handle is None:
            buffer.native.route(call)  # raises for ids out of range and for an expert twice

    def _format(self, weights: bool, cached: bool) -> _engine.CallFormat:
        layout = self.buffer.layout
        scale_bytes = (
            0 if self.scale_shape is None else self.scale_shape[0] * self.scale_shape[1].itemsize
        )
        row = RowFormat.of_dispatch(
            self.hidden * self.dtype.itemsize,
            scale_bytes,
            self.topk,
            weights=weights,
            cached=cached,
        )
        counts = 0
        if not cached:
            counts = counts_bytes(
                self.num_experts, layout.num_ranks, layout.node_ranks, by_node=layout.hops == "node"
            )
        flags = FLAG_CACHED if cached else FLAG_IDS | (FLAG_WEIGHTS if weights else 0)
        return _engine.CallFormat(
            DISPATCH, dataclasses.astuple(row), self.num_experts, dtype_code(self.dtype), flags,
            layout.capacity_for(row.row_bytes, counts), cached, self.expand,
        )  # fmt: skip

    def _check_scales(self, scales: Any, num_tokens: int) -> Tensor:
        if not (isinstance(scales, Tensor)):
            raise wrong("x[1]", "a tensor of scales [T, S]", scales)
        if scales.device != self.buffer.device:
            raise wrong("x[1]", f"a tensor {place(self.buffer.device)}, as x[0]", scales)
        if not (scales.dim() == 2 and scales.shape[0] == num_tokens and scales.shape[1] > 0):
            raise wrong("x[1]", f"scales [{num_tokens}, S]", scales)
        return scales.detach()

    def _check_routing(self, num_tokens: int) -> tuple[int, int]:
        request = self.request
        idx = request.topk_idx
        if not (isinstance(idx, Tensor)):
            raise wrong("topk_idx", "a tensor [T, K]", idx)
        where = self.buffer.device
        if not (idx.dtype is torch.int64 and idx.dim() == 2 and idx.device == where):
            raise wrong("topk_idx", f"int64 [T, K] {place(where)}", idx)
        if not (idx.shape[0] == num_tokens and idx.shape[1] >= 1):
            raise wrong("topk_idx", f"[{num_tokens}, K >= 1]", idx)
        if not (isinstance(request.num_experts, int) and 0 < request.num_experts < 2**31):
            raise wrong("num_experts", "an int >= 1", request.num_experts)
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
        if handle is None:
            owned = self._owned()
            self.tokens_per_expert = new_tensor((owned,), torch.int64)
            if request.layout == "padded":
                capacity = self.buffer.padded_capacity(request.capacity)
        else:
            self.tokens_per_expert = handle.tokens_per_expert
        rows, places, copies, fullest = self.buffer.native.place(
            call, request.alignment, capacity, self.tokens_per_expert.data_ptr()
        )
        shape: tuple[int, ...] = (places,)
        padded = self.expand and places != copies
        if handle is not None:
            self.recv_tokens, self.positions = handle.recv_tokens, handle.positions
            places, shape, padded = handle.num_places, handle.place_shape, self.expand
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
            if self.expand:
                self.positions = new_tensor((rows, self.topk), torch.int32)
        scales = ids = weights = None
        if self.given is not None:
            x, scales = self.given
        else:
            x = new_tensor((*shape, self.hidden), self.dtype)
            if self.scale_shape is not None:
                scales = new_tensor((*shape, self.scale_shape[0]), self.scale_shape[1])
        if handle is None:
            per_copy = shape if self.expand else (places, self.topk)
            if request.layout != "padded":
                ids = new_tensor(per_copy, torch.int64)
            if request.topk_weights is not None:
                weights = new_tensor(per_copy, torch.float32)
        if padded:  # rows that nobody writes
            written = [(ids, -1), (weights, 0)]
            if self.given is None:
                written += [(x, 0), (scales, 0)]
            for tensor, filling in written:
                if tensor is not None:
                    tensor.fill_(filling)
        call.set_received(
            x.data_ptr(), 0 if scales is None else scales.data_ptr(), 0 if ids is None else ids.data_ptr(),
            0 if weights is None else weights.data_ptr(), self.recv_tokens.data_ptr(),
            self.positions.data_ptr() if self.expand else 0,
        )  # fmt: skip
        self.places, self.shape = places, shape
        self.out = (x if scales is None else (x, scales), ids, weights)

    def finish(self) -> Dispatched:
        """After the last round. Raises this rank's error, then the peers'."""
        if self.error is not None:
            raise self.error
        self.call.raise_failure()
        topology, handle = self.buffer.topology, self.request.handle
        if handle is None:
            forward_tokens, forward_rows, forward_counts = take_forward(
                self.call, topology.node_ranks
            )
            handle = Handle(
                group_key=self.buffer.group_key,
                number=self.call.identity,
                rank=topology.rank, hops=self.buffer.hops, layout=self.request.layout,
                num_experts=self.num_experts, topk=self.topk,
                num_tokens=len(self.lane_rows), num_places=self.places, place_shape=self.shape,
                tokens_of=self.call.tokens_of, totals=self.call.totals,
                forward_counts=forward_counts, lane_rows=self.lane_rows, recv_tokens=self.recv_tokens,
                positions=self.positions, forward_tokens=forward_tokens, forward_rows=forward_rows,
                tokens_per_expert=self.tokens_per_expert, told=no_words(), generation=self.buffer.generation,
            )  # fmt: skip
        out_x, ids, weights = self.out
        self.result = Dispatched(out_x, ids, weights, self.tokens_per_expert, handle)
        return self.result


def new_call(
    buffer: "Buffer", found: _engine.CallFormat, timeout_s: float | None, direct: bool
) -> _engine.Call:
    late_s, silent_s = buffer.timeouts(timeout_s)
    topology = buffer.topology
    return _engine.Call(found, late_s, silent_s, topology.num_nodes, topology.node_ranks, direct)


def error_call(kind: int, text: str, buffer: "Buffer", timeout_s: float | None) -> _engine.Call:
    """A call without tokens whose headers carry an error's text."""
    nothing = _engine.CallFormat(kind, (0,) * 8, 0, 0, 0, 1, False, False)
    call = new_call(buffer, nothing, timeout_s, True)
    call.set_error(text)
    return call


def time_waits(call: _engine.Call, wait_ns: Any, buffer: "Buffer") -> None:
    """Has the call add to wait_ns [R] how long it waited for each rank."""
    if wait_ns is not None:
        check_wait_ns(wait_ns, buffer)
        call.set_wait_ns(wait_ns.data_ptr())


def check_wait_ns(wait_ns: Any, buffer: "Buffer") -> None:
    ranks = buffer.num_ranks
    good = isinstance(wait_ns, Tensor) and wait_ns.dtype == torch.int64
    if wait_ns is not None and not (
        good
        and wait_ns.shape == (ranks,)
        and wait_ns.is_contiguous()
        and wait_ns.device == buffer.device
    ):
        raise wrong("wait_ns", f"int64 [{ranks}], contiguous, {place(buffer.device)}", wait_ns)


def load_handle(call: _engine.Call, handle: Handle, node_ranks: int) -> None:
    """The tables of the dispatch that `call` repeats or answers."""
    call.set_handle(
        handle.number, handle.lane_rows.data_ptr(), handle.recv_tokens.data_ptr(),
        handle.positions.data_ptr() if handle.layout != "rank" else 0, handle.tokens_of, handle.totals,
    )  # fmt: skip
    at = 0
    for node, count in enumerate(handle.forward_counts):
        if not count:
            continue
        tokens, rows = handle.forward_tokens[at : at + count], handle.forward_rows[at : at + count]
        call.set_forward(node, tokens.data_ptr(), rows.data_ptr(), count, node_ranks)
        at += count


@functools.cache
def no_rows(columns: int, where: torch.device = CPU) -> Tensor:
    """int32 [0, columns]; [0] for columns = 0."""
    return torch.empty((0, columns) if columns else 0, dtype=torch.int32, device=where)


@functools.cache
def no_words() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


def take_forward(call: _engine.Call, node_ranks: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """What this rank forwarded, for the handle."""
    counts = call.forward_counts
    if not any(counts):
        return no_rows(0), no_rows(node_ranks), counts
    tokens = torch.empty(sum(counts), dtype=torch.int32)
    rows = torch.empty((sum(counts), node_ranks), dtype=torch.int32)
    at = 0
    for node, count in enumerate(counts):
        if count:
            call.copy_forward(node, tokens[at:].data_ptr(), rows[at:].data_ptr())
        at += count
    return tokens, rows, counts
