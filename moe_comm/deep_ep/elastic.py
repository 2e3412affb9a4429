"""ElasticBuffer: DeepEP's second interface (EPHandle, one dispatch call, expanded rows).

One `moe_comm.Buffer` with hops="rank": every pair of ranks on different nodes is linked directly, so a sum has one
level, and combine is bit for bit what DeepEP defines without its hybrid mode:

- not expanded: the ranks' rows in the order of their last lanes, fp32, from the bias, rounded once;
- expanded with allow_multiple_reduction: each rank's copies in lane order, rounded; then as above;
- expanded without: all copies in lane order, fp32, from the bias, rounded once.

Better than the original where it breaks nobody: rows are always ordered by (source rank, source token), so
`deterministic` is always so; without CPU sync the tails of recv_topk_idx are −1 and those of rows and weights 0; gaps
of expanded rows are always 0; any dtype, any number of ranks, experts and top-k, any hidden size of a multiple of 16
bytes; an exchange of any size runs in rounds over windows of `num_bytes`.

num_cpu_bytes, use_fp8_dispatch, allow_hybrid_mode, sl_idx, the number of QPs and num_gpu_timeout_secs are kept, and
tune nothing. CUDA tensors are staged through the host (staging.py); the tensors of an EPHandle stay there. With
MOE_COMM_DEVICE=cuda calls are kernels instead (kernel_rounds.py), which take at most num_sms SMs, and all tensors are
on the GPU; the host asks for counts in any case. Absent: engram_*, pp_*, agrs_*, all_gather.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import buffer as core
from ..arguments import Found, check_rows, wrong
from ..config import Config as WindowConfig
from ..dispatch import COMBINE, DISPATCH, Dispatched
from ..errors import ClosedError
from ..group import EPGroup, survey
from ..layout import RowFormat
from ..staging import staged
from .events import EventHandle, EventOverlap, wait_for_event
from .handle import EPHandle
from .legacy import CpuStream
from .normal import check_topk_idx
from .refuse import or_refuse, or_tell
from .routes import Routes, check_again

SIZE_ALIGNMENT = 2 << 20  # of num_bytes
MAX_TOPK = 32  # assumed for sizes where num_topk is 0
MAX_EXPERTS = 2048
LEAST_TOKENS = 64  # rows of a window, at least: a token may be K of them
NUM_QPS = 17


class ElasticBuffer:
    """Moves tokens of one EP group. Making one is collective, and so are dispatch, combine and barrier.

    Args:
        group: a torch ProcessGroup of any backend, or an EPGroup; used while windows are made only.
        num_bytes: for windows, a multiple of 2 MiB; default as `get_buffer_size_hint` of the next three says, which is
            at most MOE_COMM_WINDOW_BYTES.
        num_max_tokens_per_rank: M, the most tokens a rank passes, unless a call says otherwise. hidden, num_topk.
        allow_multiple_reduction: see the head of this file. num_cpu_timeout_secs: until a late peer is an error.
        explicitly_destroy: `destroy()` will be called. It need not be: a Buffer that nobody holds is closed.

    Ints are taken for bools. The rest does nothing, see the head of this file. Raises: ArgumentError, MismatchError,
    TransportError. *Source*: DeepEP 2.
    """

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float = 300,
        num_gpu_timeout_secs: float = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        self._group = EPGroup.of(group)
        with or_tell(self._group):
            if num_bytes is None and not (num_max_tokens_per_rank > 0 and hidden > 0):
                raise wrong("num_bytes", "an int, or num_max_tokens_per_rank and hidden", None)
            if num_bytes is None:
                num_bytes = self.get_buffer_size_hint(
                    group, num_max_tokens_per_rank, hidden, num_topk
                )
            if not (
                isinstance(num_bytes, int) and num_bytes > 0 and num_bytes % SIZE_ALIGNMENT == 0
            ):
                raise wrong("num_bytes", f"a multiple of {SIZE_ALIGNMENT} bytes", num_bytes)
            for name, value in (
                ("num_max_tokens_per_rank", num_max_tokens_per_rank),
                ("hidden", hidden),
                ("num_topk", num_topk),
            ):
                if not (isinstance(value, int) and value >= 0):
                    raise wrong(name, "an int >= 0", value)
            if not (isinstance(num_cpu_timeout_secs, (int, float)) and num_cpu_timeout_secs > 0):
                raise wrong("num_cpu_timeout_secs", "seconds > 0", num_cpu_timeout_secs)
        self.group = group
        self.rank_idx, self.num_ranks = self._group.rank, self._group.num_ranks
        self.num_bytes, self.num_max_tokens_per_rank = num_bytes, num_max_tokens_per_rank
        self.deterministic = bool(deterministic)
        self.allow_hybrid_mode = bool(allow_hybrid_mode)
        self.allow_multiple_reduction = bool(allow_multiple_reduction)
        self.prefer_overlap_with_compute = bool(prefer_overlap_with_compute)
        self.num_allocated_qps = num_allocated_qps or NUM_QPS
        self.explicitly_destroy = bool(explicitly_destroy)
        self.nccl_comm_handle = None
        hidden, num_topk = hidden or 7168, num_topk or MAX_TOPK
        least = _size(self.num_ranks, LEAST_TOKENS, hidden, num_topk)
        self.runtime: core.Buffer | None = core.Buffer(
            self._group,
            hidden=hidden,
            topk=num_topk,
            num_experts=MAX_EXPERTS,
            hops="rank",
            window_bytes=max(num_bytes, least),
            timeout_s=float(num_cpu_timeout_secs),
        )
        self._where = self.runtime.device if self.runtime.kernels is not None else None
        topology = self.runtime.topology
        self.num_rdma_ranks, self.num_nvlink_ranks = topology.num_nodes, topology.node_ranks
        self.num_scaleout_ranks, self.num_scaleup_ranks = 1, self.num_ranks
        self.scaleout_rank_idx, self.scaleup_rank_idx = 0, self.rank_idx

    def destroy(self) -> None:
        """Frees the windows; `runtime` is None afterwards. Needs explicitly_destroy. More than once is fine."""
        if not self.explicitly_destroy:
            raise wrong("explicitly_destroy", "True for destroy()", False)
        if self.runtime is not None:
            self.runtime.close()
        self.runtime = None

    # --- sizes and places ------------------------------------------------------------------------

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """num_bytes with which an exchange of so many bfloat16 tokens takes one round, at most MOE_COMM_WINDOW_BYTES;
        a multiple of 2 MiB. Local. More tokens than that run in several rounds."""
        for name, value in (
            ("num_max_tokens_per_rank", num_max_tokens_per_rank),
            ("hidden", hidden),
        ):
            if not (isinstance(value, int) and value > 0):
                raise wrong(name, "an int > 0", value)
        num_ranks = EPGroup.of(group).num_ranks
        budget = WindowConfig.resolve().window_bytes
        size = min(_size(num_ranks, num_max_tokens_per_rank, hidden, num_topk or MAX_TOPK), budget)
        return -(-size // SIZE_ALIGNMENT) * SIZE_ALIGNMENT

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(nodes, ranks of a node)."""
        return self.num_rdma_ranks, self.num_nvlink_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """(1, R): rows take one hop, sums have one level."""
        return self.num_scaleout_ranks, self.num_scaleup_ranks

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """How many SMs a call's kernels take unless told otherwise: a constant, 24, or 64 without
        prefer_overlap_with_compute."""
        if num_scaleout_topk != 0:
            raise wrong("num_scaleout_topk", "0", num_scaleout_topk)
        return 24 if self.prefer_overlap_with_compute else 64

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """DeepEP's number without hybrid mode: min(num_sms, 9), at most num_allocated_qps."""
        return min(num_sms, 9, self.num_allocated_qps)

    @staticmethod
    def capture() -> EventHandle:
        """Everything given to the current stream up to now."""
        return EventHandle()

    def get_comm_stream(self) -> Any:
        """The stream that results are ordered on: the current one; without CUDA an object whose methods do nothing."""
        return torch.cuda.current_stream() if torch.cuda.is_initialized() else CpuStream()

    def barrier(
        self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True
    ) -> None:
        """Returns when all ranks have called it."""
        runtime = self._open()
        where = runtime.device
        nothing = torch.empty((0, 16), device=where)
        nowhere = torch.empty((0, 1), dtype=torch.int64, device=where)
        runtime.dispatch(nothing, nowhere, num_experts=self.num_ranks)

    # --- dispatch --------------------------------------------------------------------------------

    @staged(
        "x", updates=("cumulative_local_expert_recv_stats",), order=wait_for_event,
        where=lambda self: self._where,
    )  # fmt: skip
    def dispatch(
        self,
        x: Any,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """Sends each token to the ranks that own its experts.

        Args:
            x: [T, H], or a pair (payload, sf [T, P]), sf of 4-byte items in any strides.
            topk_idx: [T, K] int64 (int32 is taken), −1: none. topk_weights: [T, K] float32, or None.
            cumulative_local_expert_recv_stats: int32 [L]; the copies received for each expert are added to it.
            num_max_tokens_per_rank: M; default the Buffer's. Needed without CPU sync, where it sizes outputs: all
                ranks raise MismatchError if one has more tokens than another's M.
            expert_alignment: 1 by default; expanded groups begin at its multiples.
            handle: of an earlier dispatch: the same routing for another x, and other topk_weights if given. topk_idx
                None; num_experts, num_max_tokens_per_rank, expert_alignment None or the same; no stats; the layout is
                that of do_expand here.
            do_handle_copy: False: handle.topk_idx is `topk_idx` itself, which must not change until combine.
            do_cpu_sync: default True, with a handle False. False: outputs of the worst case, R·M rows, or expanded
                up(R·M·min(K, L) + (alignment − 1)·L, alignment); with a handle, those of its dispatch.
            use_tma_aligned_col_major_sf: recv_sf has strides (1, rows rounded up to 4).

        Returns (recv_x or (recv_x, recv_sf), recv_topk_idx, recv_topk_weights, handle, event):
            rows by (source rank, source token), one per (token, this rank): [N, H], recv_topk_idx [N, K] local experts
            and −1, recv_topk_weights [N, K] and 0. Expanded: one per (token, local expert), grouped by expert;
            recv_topk_idx None, recv_topk_weights [N]. Gaps and tails hold 0 and −1. With a handle, the same object.
            event.event is None unless async_with_compute_stream.

        Raises: ArgumentError (the others: PeerError), MismatchError, PeerTimeout, PeerLost. Blocks until all ranks
        called.
        """
        runtime = self._open()
        expand, x = bool(do_expand), _contiguous(x)
        with or_refuse(runtime, DISPATCH):
            runtime.num_sms = num_sms or self.get_theoretical_num_sms(num_experts or 0, 0)
            wait_for_event(previous_event)
            wait_for_event(previous_event_before_epilogue, "previous_event_before_epilogue")
            if handle is not None:
                self._check_again(
                    x, topk_idx, topk_weights, cumulative_local_expert_recv_stats, num_experts,
                    num_max_tokens_per_rank, expert_alignment, handle, do_cpu_sync,
                )  # fmt: skip
            else:
                alignment = 1 if expert_alignment is None else expert_alignment
                synced = do_cpu_sync is None or bool(do_cpu_sync)
                max_tokens = self._check_fresh(x, num_experts, num_max_tokens_per_rank, synced)
                if topk_idx is None:
                    raise wrong("topk_idx", "int64 [T, K] without a handle", None)
                idx = check_topk_idx(topk_idx)
                stats = self._check_stats(cumulative_local_expert_recv_stats, num_experts)
        if handle is not None:
            rows, weights = handle._routes.dispatch_again(runtime, x, topk_weights, expand)
        else:
            got = runtime.dispatch(
                x, idx, topk_weights, num_experts=num_experts or 0,
                layout="expert" if expand else "rank", alignment=alignment,
                max_tokens=None if synced else max_tokens,
            )  # fmt: skip
            assert topk_idx is not None
            handle = self._new_handle(
                got, topk_idx.clone() if do_handle_copy else topk_idx, expand, alignment, max_tokens,
                num_sms, synced,
            )  # fmt: skip
            if stats is not None:
                stats += got.tokens_per_expert.to(stats.dtype)
            rows, weights = got.x, got.topk_weights
        num_rows = handle.num_rows(expand)
        if isinstance(rows, tuple):
            sf = _lengthen(rows[1], num_rows, 0)
            if use_tma_aligned_col_major_sf:
                sf = _column_major(sf)
            recv_x: Any = (_lengthen(rows[0], num_rows, 0), sf)
        else:
            recv_x = _lengthen(rows, num_rows, 0)
        recv_weights = None if weights is None else _lengthen(weights, num_rows, 0)
        recv_idx = None if expand else _lengthen(handle._routes.topk_idx, num_rows, -1).clone()
        return recv_x, recv_idx, recv_weights, handle, _event(async_with_compute_stream)

    def _new_handle(
        self,
        got: Dispatched,
        topk_idx: Tensor,
        expand: bool,
        alignment: int,
        max_tokens: int,
        num_sms: int,
        synced: bool,
    ) -> EPHandle:
        return EPHandle.of(
            Routes.of(got, alignment),
            topk_idx,
            do_expand=expand,
            alignment=alignment,
            max_tokens=max_tokens or max(got.handle.tokens_of),
            num_sms=num_sms
            or self.get_theoretical_num_sms(got.handle.num_experts, got.handle.topk),
            is_synced=synced,
        )

    def _check_fresh(
        self, x: Any, num_experts: Any, num_max_tokens_per_rank: int | None, synced: bool
    ) -> int:
        """M of this call, 0 if nobody said."""
        if not (isinstance(num_experts, int) and num_experts > 0):
            raise wrong("num_experts", "an int > 0 without a handle", num_experts)
        most = num_max_tokens_per_rank or self.num_max_tokens_per_rank
        if not synced and not most:
            raise wrong("num_max_tokens_per_rank", "an int > 0 without CPU sync", most)
        payload = x[0] if isinstance(x, (tuple, list)) and x else x
        check_rows("x", payload, where=self._open().device)
        if most and len(payload) > most:
            raise wrong("x", f"at most num_max_tokens_per_rank = {most} tokens", payload)
        return most

    def _check_stats(self, stats: Any, num_experts: int | None) -> Tensor | None:
        if stats is None:
            return None
        slots = -(-(num_experts or 0) // self.num_ranks)
        owned = max(0, min(slots, (num_experts or 0) - self.rank_idx * slots))
        if not (
            isinstance(stats, Tensor) and stats.dtype is torch.int32 and stats.shape == (owned,)
        ):
            raise wrong("cumulative_local_expert_recv_stats", f"int32 ({owned},)", stats)
        return stats

    @staticmethod
    def _check_again(
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        stats: Any,
        num_experts: Any,
        max_tokens: Any,
        alignment: Any,
        handle: Any,
        do_cpu_sync: Any,
    ) -> None:
        _check_handle(handle)
        if topk_idx is not None:
            raise wrong("topk_idx", "None with a handle", topk_idx)
        if stats is not None:
            raise wrong("cumulative_local_expert_recv_stats", "None with a handle", stats)
        if do_cpu_sync:
            raise wrong("do_cpu_sync", "False with a handle", do_cpu_sync)
        for name, given, kept in (
            ("num_experts", num_experts, handle.num_experts),
            ("num_max_tokens_per_rank", max_tokens, handle.num_max_tokens_per_rank),
            ("expert_alignment", alignment, handle.expert_alignment),
        ):
            if given is not None and given != kept:
                raise wrong(name, f"{kept}, the handle's", given)
        check_again(x, topk_weights, handle._routes.compact)

    # --- combine ---------------------------------------------------------------------------------

    @staged("x", order=wait_for_event, where=lambda self: self._where)
    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Returns each token's rows to its source and adds them, unweighted; the order is at the head of this file.

        Args:
            x: rows as the handle's dispatch returned them, [N, H], with or without its tail; bfloat16, float16,
                float32 or float64.
            handle: of the dispatch; may be used more than once, and with another Buffer of the group.
            topk_weights: float32 as the dispatch returned them: [N, K], or expanded [N] (needs
                allow_multiple_reduction). They return to their lanes.
            bias: where the sum starts: [T, H] of x's dtype, or a pair of such, added in fp32.

        Returns (combined_x [T, H], combined_topk_weights float32 [T, K] or None, event): weights are those passed, 0
        where topk_idx is −1. Raises and blocks as `dispatch`.
        """
        runtime = self._open()
        with or_refuse(runtime, COMBINE):
            wait_for_event(previous_event)
            wait_for_event(previous_event_before_epilogue, "previous_event_before_epilogue")
            _check_handle(handle)
            runtime.num_sms = num_sms or handle.num_sms
            expand, routes = handle.do_expand, handle._routes
            each_copy = expand and not self.allow_multiple_reduction
            if each_copy and topk_weights is not None:
                raise wrong(
                    "topk_weights", "None without allow_multiple_reduction", Found("a tensor")
                )
            order, positions = handle.reordered()
            inner = routes.handle(expand)
            if positions is not None:
                inner = _with_positions(inner, positions)
            rows = _real_rows("x", _contiguous(x), inner.num_places, handle.num_rows(expand))
            weights = topk_weights
            if weights is not None:
                weights = _real_rows(
                    "topk_weights", weights, inner.num_places, handle.num_rows(expand)
                )
            if order is not None and not expand:
                rows = rows[order]
                weights = None if weights is None else weights[order]
            if weights is not None and not expand:
                if weights.shape != routes.topk_idx.shape:
                    raise wrong("topk_weights", f"float32 {tuple(routes.topk_idx.shape)}", weights)
                weights = torch.where(routes.topk_idx >= 0, weights, 0.0)
            dtype = rows.dtype
            start = bias
            if isinstance(bias, (tuple, list)):  # rounded once, at the end
                start, rows = _pair_of_biases(bias, rows)
                if expand and not each_copy:  # what would be rounded on its way is summed here
                    rows = _sum_copies(rows, inner.positions, dtype)
                    weights = None if weights is None else _by_lane(weights, inner.positions)
                    inner = routes.compact
            lanes = handle.topk_idx.long()
        combined = runtime.combine(
            rows, inner, topk_weights=weights, bias=start, topk_idx=lanes, each_copy=each_copy
        )
        combined, columns = combined if weights is not None else (combined, None)
        return combined.to(dtype), columns, _event(async_with_compute_stream)

    def _open(self) -> core.Buffer:
        if self.runtime is None:
            raise ClosedError("ElasticBuffer: used after destroy()")
        return self.runtime


def get_physical_domain_size(group: Any) -> tuple[int, int]:
    """(nodes, ranks of a node), by trying which ranks can map each other's memory. Collective."""
    found = survey(EPGroup.of(group), WindowConfig.resolve().ranks_per_node, {}).topology
    return found.num_nodes, found.node_ranks


def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """(1, R): `ElasticBuffer` has one level, whatever `allow_hybrid_mode`. Local."""
    return 1, EPGroup.of(group).num_ranks


def _size(num_ranks: int, num_tokens: int, hidden: int, topk: int) -> int:
    """Bytes of windows for so many rows each, however the ranks are spread over nodes."""
    row = RowFormat.of_dispatch(2 * hidden, 0, topk, weights=True)
    return 4 * num_ranks * num_tokens * row.row_bytes


def _event(is_async: bool) -> EventOverlap:
    return EventOverlap(EventHandle() if is_async else None)


def _check_handle(handle: Any) -> None:
    if not isinstance(handle, EPHandle):
        raise wrong("handle", "the EPHandle of a dispatch", handle)


def _contiguous(x: Any) -> Any:
    """x, or a pair with such a payload: a gradient may be one row, expanded."""
    if isinstance(x, Tensor):
        return x.contiguous()
    if isinstance(x, (tuple, list)) and len(x) == 2 and isinstance(x[0], Tensor):
        return x[0].contiguous(), x[1]
    return x


def _real_rows(name: str, value: Any, num_rows: int, num_padded: int) -> Tensor:
    """The first `num_rows` rows of a tensor that has these or `num_padded`."""
    if not (isinstance(value, Tensor) and value.dim() > 0 and len(value) in (num_rows, num_padded)):
        raise wrong(name, f"a tensor of {num_padded} rows, those of the dispatch", value)
    return value.detach()[:num_rows]


def _lengthen(rows: Tensor, num_rows: int, filling: int) -> Tensor:
    if len(rows) == num_rows:
        return rows
    out = rows.new_empty((num_rows, *rows.shape[1:]))
    out[: len(rows)] = rows
    out[len(rows) :].fill_(filling)
    return out


def _column_major(sf: Tensor) -> Tensor:
    """The same values, strides (1, rows rounded up to 4)."""
    out = sf.new_zeros((sf.shape[1], -(-len(sf) // 4) * 4)).t()[: len(sf)]
    out.copy_(sf)
    return out


def _with_positions(inner: Any, positions: Tensor) -> Any:
    good = torch.sort(positions[positions >= 0]).values
    ours = torch.sort(inner.positions[inner.positions >= 0]).values
    if not (torch.equal(good, ours) and torch.equal(positions >= 0, inner.positions >= 0)):
        raise wrong(
            "handle.recv_src_metadata", "the places of its dispatch in some order", Found("others")
        )
    return dataclasses.replace(inner, positions=positions)


def _pair_of_biases(bias: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(their sum, rows), in fp32 (fp64)."""
    if len(bias) != 2 or not all(isinstance(b, Tensor) and b.dtype == rows.dtype for b in bias):
        raise wrong("bias", "a tensor, or a pair of them, of x's dtype", bias)
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return bias[0].detach().to(exact) + bias[1].detach().to(exact), rows.to(exact)


def _sum_copies(rows: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, H] of rows' dtype: the sum of each row's copies in lane order, rounded to `dtype`."""
    total = rows.new_zeros((len(positions), rows.shape[1]))
    for lane in range(positions.shape[1]):
        here = (positions[:, lane] >= 0).nonzero()[:, 0]
        total[here] += rows[positions[here, lane].long()]
    return total.to(dtype).to(rows.dtype)


def _by_lane(weights: Tensor, positions: Tensor) -> Tensor:
    """[N, K]: the weight of each copy, of `weights` by place, in its lane; 0 without one."""
    if not len(weights):
        return weights.new_zeros(positions.shape)
    return torch.where(positions >= 0, weights[positions.clamp(min=0).long()], 0.0)
