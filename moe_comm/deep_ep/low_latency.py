"""Low-latency mode: a padded row per (token, expert), hooks, sums with the weights at the source.

Over one `moe_comm.Buffer` with hops="rank", made at the first call and made again when calls grow (windows.py).

Sums: float32 fused multiply-add in top-k order at the source, rounded once. LogFMT changes the values as DeepEP's wire
format would; the bytes that travel are those of x still.

With a `device` (MOE_COMM_DEVICE) that Buffer's calls are kernels: tensors lie there, the host knows none of their
numbers and waits for nothing, so calls can be captured once a call made windows of their size.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arguments import Found, wrong
from ..buffer import Buffer
from ..dispatch import COMBINE, DISPATCH, Dispatched
from ..handle import Handle
from ..kernel_told import Told
from ..kernels import for_device
from ..kernels.quant import GROUP
from ..memory import new_tensor
from .normal import check_topk_idx
from .quant import cast_to_fp8, through_logfmt
from .refuse import WRONG
from .windows import Sizes, Windows

TOPK_OF_HINT = 8


def size_hint(num_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Bytes of the windows for bfloat16 rows and top-k 8."""
    return Sizes(num_tokens, 2 * hidden, TOPK_OF_HINT, num_experts).window_bytes(num_ranks)


class Ticket:
    """The end of a low-latency handle: ours. `handle` is None until the dispatch's hook was called."""

    def __init__(self) -> None:
        self.handle: Handle | None = None


class LowLatency:
    """The low-latency half of one `deep_ep.Buffer`."""

    def __init__(self, normal: Buffer, mask_lost: bool = False, device: str = ""):
        self.group = normal.group
        self.windows = Windows(normal, mask_lost, device)
        self._combine_rows: Tensor | None = None

    def close(self) -> None:
        """Frees the windows."""
        self.windows.close()
        self._combine_rows = None

    # --- dispatch --------------------------------------------------------------------------------

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        max_tokens: int,
        num_experts: int,
        *,
        stats: Tensor | None,
        cost_stats: Tensor | None,
        use_fp8: bool,
        round_scale: bool,
        use_ue8m0: bool,
        async_finish: bool,
        hook: bool,
    ) -> tuple[Any, Tensor, tuple, Callable[[], None] | None]:
        """`Buffer.low_latency_dispatch` without its event."""
        sizes, error = _sizes_of(x, topk_idx, max_tokens, num_experts), None
        local = self._num_local(num_experts) if sizes else 0
        payload: Any = None
        idx = None
        try:
            _check_forms(async_finish, hook)
            self._check_cost_stats("dispatch_wait_recv_cost_stats", cost_stats)
            idx = check_topk_idx(topk_idx)
            _check_dispatch(x, max_tokens, num_experts, use_fp8, round_scale, use_ue8m0)
            if stats is not None:
                check_stats(stats, local)
            payload = x.detach()
            if use_fp8:
                payload = cast_to_fp8(payload, round_scale=round_scale, use_ue8m0=use_ue8m0)
        except WRONG as caught:
            error = str(caught) or type(caught).__name__
        capacity = self.group.num_ranks * max_tokens if sizes else 0

        def exchange(buffer: Buffer) -> Any:
            return buffer.dispatch(
                payload, idx, num_experts=num_experts, layout="padded", capacity=capacity, max_tokens=max_tokens,
                wait_ns=cost_stats, out=dense, async_op="hook" if hook else None,
            )  # fmt: skip

        dense: Any = None
        packed: Any = None
        if error is None:
            dense, packed = _outputs(payload, local, capacity)
        got = self.windows.call(DISPATCH, sizes, error, exchange)
        ticket = Ticket()
        new = functools.partial(torch.empty, device=x.device)
        src_info = new((local, capacity), dtype=torch.int32)
        layout_range = new((local, self.group.num_ranks), dtype=torch.int64)
        recv_count = new(local, dtype=torch.int32)
        handle = (src_info, layout_range, max_tokens, x.shape[1], num_experts, ticket)

        def settle(result: Dispatched) -> None:
            ticket.handle = result.handle
            fill_sources(result.handle, src_info, layout_range, recv_count)
            if stats is not None:
                stats.add_(recv_count)
            if isinstance(packed, tuple):
                _copy_rows(
                    dense[1], packed[1], None if self.windows.device else recv_count.tolist()
                )

        if not hook:
            settle(got)
            return packed, recv_count, handle, None

        def receive() -> None:
            if not got.done:
                self.windows.receive(got, sizes)
                settle(got.result)
                got.result = None

        return packed, recv_count, handle, receive

    def _check_cost_stats(self, name: str, stats: Any) -> None:
        shape = (self.group.num_ranks,)
        good = isinstance(stats, Tensor) and stats.dtype == torch.int64 and stats.shape == shape
        if stats is not None and not (good and stats.is_contiguous()):
            raise wrong(name, f"int64 [{shape[0]}], contiguous", stats)

    def _num_local(self, num_experts: int) -> int:
        """Experts of this rank; fewer on the last ranks if R does not divide E."""
        width = -(-num_experts // self.group.num_ranks)
        return max(0, min(width, num_experts - self.group.rank * width))

    # --- combine ---------------------------------------------------------------------------------

    def combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple,
        *,
        use_logfmt: bool,
        zero_copy: bool,
        async_finish: bool,
        hook: bool,
        out: Tensor | None,
        cost_stats: Tensor | None,
    ) -> tuple[Tensor, Callable[[], None] | None]:
        """`Buffer.low_latency_combine` without its event."""
        sizes, error = None, None
        arguments: dict[str, Any] = {}
        try:
            ours, max_tokens, num_experts = unpack_handle(handle)
            if isinstance(x, Tensor) and x.dim() == 3:
                sizes = Sizes(max_tokens, x.shape[2] * x.element_size(), ours.topk, num_experts)
            _check_forms(async_finish, hook)
            self._check_cost_stats("combine_wait_recv_cost_stats", cost_stats)
            arguments = self._combine_arguments(
                x, topk_idx, topk_weights, ours, use_logfmt, zero_copy, out
            )  # fmt: skip
        except WRONG as caught:
            error = str(caught) or type(caught).__name__

        def exchange(buffer: Buffer) -> Any:
            return buffer.combine(
                **arguments, each_copy=True, wait_ns=cost_stats, async_op="hook" if hook else None
            )

        got = self.windows.call(COMBINE, sizes, error, exchange)
        return arguments["out"], (lambda: self.windows.receive(got, sizes)) if hook else None

    def _combine_arguments(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Handle,
        use_logfmt: bool,
        zero_copy: bool,
        out: Tensor | None,
    ) -> dict[str, Any]:
        if use_logfmt and zero_copy:
            raise wrong("use_logfmt", "False with zero_copy", True)
        if not isinstance(topk_weights, Tensor):
            raise wrong("topk_weights", "float32 [T, K]", topk_weights)
        places = handle.place_shape
        if not (isinstance(x, Tensor) and x.dim() == 3 and x.shape[:2] == places):
            raise wrong("x", f"[{places[0]}, {places[1]}, H]", x)
        shape = (handle.num_tokens, x.shape[2])
        if out is None:
            out = torch.empty(shape, dtype=x.dtype, device=x.device)
        elif not (out.shape == shape and out.dtype == x.dtype and out.is_contiguous()):
            raise wrong("out", f"{x.dtype} {shape}, contiguous", out)
        y = x.detach()
        if zero_copy:
            if self._combine_rows is None or self._combine_rows.shape != x.shape:
                raise wrong(
                    "zero_copy", "rows in get_next_low_latency_combine_buffer(handle)", True
                )
            y = self._combine_rows
        if use_logfmt:
            rows = y.reshape(-1, x.shape[2])
            if not self.windows.device:
                used = handle.positions[handle.positions >= 0].long()
                y = torch.empty_like(rows)
                y[used] = through_logfmt(rows[used])
            else:  # all of them, as nobody asks how many are used
                y = through_logfmt(rows)
            y = y.view(x.shape)
        return {
            "y": y, "handle": handle, "topk_idx": check_topk_idx(topk_idx), "source_weights": topk_weights,
            "out": out,
        }  # fmt: skip

    def next_combine_rows(self, handle: tuple) -> Tensor:
        """bfloat16 [L, R·M, H], rows (2·H + 4·H/128) bytes apart; what the next combine with zero_copy sends.

        Valid until that combine; its call has read it when it returns, hook or not.
        """
        ours, *_ = unpack_handle(handle)
        shape = (*ours.place_shape, handle[3])
        if self._combine_rows is None or self._combine_rows.shape != shape:
            hidden = handle[3]
            stride = hidden + 2 * -(-hidden // GROUP)
            stride += -stride % 8  # whole rows of 16 bytes
            where = handle[0].device if self.windows.device else None
            flat = torch.zeros(shape[0] * shape[1] * stride, dtype=torch.bfloat16, device=where)
            self._combine_rows = flat.as_strided(shape, (shape[1] * stride, stride, 1))
        return self._combine_rows

    def fill_combine_rows(self, rows: Tensor) -> None:
        """Copies `rows` of a device into those of `next_combine_rows`."""
        if self._combine_rows is not None and self._combine_rows.shape == rows.shape:
            self._combine_rows.copy_(rows)

    # --- masks -----------------------------------------------------------------------------------

    def check_rank(self, rank: Any) -> None:
        num_ranks = self.group.num_ranks
        if not (isinstance(rank, int) and 0 <= rank < num_ranks):
            raise wrong("rank_to_mask", f"a rank of {num_ranks}", rank)

    def update_mask(self, rank: int, mask: bool) -> None:
        """`Buffer.low_latency_update_mask_buffer`."""
        self.check_rank(rank)
        masked = self.windows.masked()[rank]
        if masked and not mask:
            raise wrong(
                "mask",
                "True for a masked rank: it missed exchanges, so only low_latency_clean_mask_buffer(), called by all "
                "ranks that live, can take it back",
                mask,
            )
        if mask and rank == self.group.rank:
            raise wrong("rank_to_mask", "another rank", rank)
        if mask and not masked:
            self.windows.mask(rank)

    def query_mask(self, mask_status: Tensor) -> None:
        """`Buffer.low_latency_query_mask_buffer`."""
        shape = (self.group.num_ranks,)
        if not (
            isinstance(mask_status, Tensor)
            and mask_status.dtype is torch.int32
            and mask_status.shape == shape
        ):
            raise wrong("mask_status", f"int32 {shape}", mask_status)
        mask_status.copy_(torch.tensor(self.windows.masked()))


# --- arguments -----------------------------------------------------------------------------------


def _sizes_of(x: Any, topk_idx: Any, max_tokens: Any, num_experts: Any) -> Sizes | None:
    """Sizes of a dispatch, as far as its arguments allow."""
    for matrix in (x, topk_idx):
        if not (isinstance(matrix, Tensor) and matrix.dim() == 2 and matrix.shape[1]):
            return None
    for number in (max_tokens, num_experts):
        if not (isinstance(number, int) and number >= 1):
            return None
    item = max(2, x.element_size())
    return Sizes(max_tokens, x.shape[1] * item, topk_idx.shape[1], num_experts)


def _check_dispatch(
    x: Any, max_tokens: Any, num_experts: Any, use_fp8: Any, round_scale: Any, use_ue8m0: Any
) -> None:
    for name, number in (
        ("num_max_dispatch_tokens_per_rank", max_tokens),
        ("num_experts", num_experts),
    ):
        if not (isinstance(number, int) and number >= 1):
            raise wrong(name, "an int >= 1", number)
    if not (isinstance(x, Tensor) and x.dim() == 2 and x.is_floating_point()):
        raise wrong("x", "bfloat16 [T, H]", x)
    if len(x) > max_tokens:
        raise wrong("x", f"at most num_max_dispatch_tokens_per_rank = {max_tokens} tokens", x)
    if use_ue8m0 and not (use_fp8 and round_scale):
        raise wrong("use_ue8m0", "False without use_fp8 and round_scale", True)


def _check_forms(async_finish: bool, hook: bool) -> None:
    if async_finish and hook:
        raise wrong("async_finish", "False with return_recv_hook", True)


def check_stats(stats: Any, num_local: int) -> None:
    good = isinstance(stats, Tensor) and stats.dtype == torch.int32 and stats.shape == (num_local,)
    if not good:
        raise wrong("cumulative_local_expert_recv_stats", f"int32 [{num_local}]", stats)


def unpack_handle(handle: Any) -> tuple[Handle, int, int]:
    """Ours, M and E. Raises: ArgumentError for another handle, or one whose hook was not called yet."""
    if not (isinstance(handle, tuple) and len(handle) == 6 and isinstance(handle[5], Ticket)):
        found = Found(f"{len(handle)} things") if isinstance(handle, tuple) else handle
        raise wrong("handle", "that of Buffer.low_latency_dispatch", found)
    ours = handle[5].handle
    if ours is None:
        raise wrong(
            "handle", "a dispatch that was received", Found("one whose hook was not called")
        )
    return ours, handle[2], handle[4]


# --- outputs -------------------------------------------------------------------------------------


def fill_sources(handle: Handle, src_info: Tensor, layout_range: Tensor, count: Tensor) -> None:
    """`src_info` [L, P]: the source token of each row, −1: none; `layout_range` [L, R]: (first row << 32) + rows from a
    rank; `count` [L]. Rows of an expert are ordered by (source rank, source token).
    """
    num_local, num_ranks = layout_range.shape
    src_info.fill_(-1)
    if len(handle.told):  # on a device
        kernels = for_device(src_info.device)
        slots = -(-handle.num_experts // num_ranks)
        copies = Told(handle.told, num_ranks).copies(slots)[:, :num_local]
        kernels.source_ranges(layout_range, count, copies)
        tokens = handle.recv_tokens[:, None].expand(handle.positions.shape)
        kernels.unpack_lanes(src_info.view(-1), tokens, handle.positions)
        return
    layout_range.zero_()
    count.copy_(handle.tokens_per_expert)
    if not num_local or not handle.num_recv_rows:
        return
    source = torch.repeat_interleave(torch.arange(num_ranks), torch.tensor(handle.totals))
    row, lane = (handle.positions >= 0).nonzero(as_tuple=True)
    place = handle.positions[row, lane].long()
    src_info.view(-1)[place] = handle.recv_tokens[row]
    blocks = place // src_info.shape[1] * num_ranks + source[row]
    counts = torch.bincount(blocks, minlength=num_local * num_ranks).view(num_local, num_ranks)
    layout_range.copy_(((counts.cumsum(1) - counts) << 32) + counts)


def _outputs(payload: Any, num_local: int, capacity: int) -> tuple[Any, Any]:
    """What a dispatch of `payload` writes, and what is returned of it: scales [L, P, S] are stored as [L, S, P]."""
    rows, scales = payload if isinstance(payload, tuple) else (payload, None)
    out = _new(rows, (num_local, capacity, rows.shape[1]))
    if scales is None:
        return out, out
    dense = _new(scales, (num_local, capacity, scales.shape[1]))
    flat = _new(scales, (num_local, scales.shape[1], capacity))
    return (out, dense), (out, flat.transpose(1, 2))


def _new(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return new_tensor(shape, like.dtype) if like.is_cpu else like.new_empty(shape)


def _copy_rows(source: Tensor, target: Tensor, counts: list[int] | None) -> None:
    """Each expert's received rows; all where nobody knows how many they are."""
    if counts is None:
        target.copy_(source)
        return
    for expert, count in enumerate(counts):
        target[expert, :count].copy_(source[expert, :count])
