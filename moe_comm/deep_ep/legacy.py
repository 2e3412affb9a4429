"""Buffer: DeepEP's first interface, normal and low-latency mode, of all its generations.

Made of `moe_comm.Buffer`s: one for normal mode and, in low-latency mode, one with hops="rank" (low_latency.py). Both
may be used in any order; nothing has to be cleaned in between.

- Config and set_num_sms bound the SMs that kernels of normal mode take (0: all; MOE_COMM_NUM_SMS is that of low-latency
  calls; by copies it is without effect), and tune nothing else. num_nvl_bytes, num_rdma_bytes and num_qps_per_rank are
  kept for clients that compare them: normal mode's windows are sized by MOE_COMM_WINDOW_BYTES, and a call of any size
  runs in rounds; low-latency windows are as large as M, H, K and E ask.
- Any number of ranks, ranks per node, experts and top-k; any hidden size of a multiple of 16 bytes; bfloat16, float16,
  float32 and float64 where DeepEP takes bfloat16. The last ranks own fewer experts if R does not divide E.
- Where DeepEP asserts, traps or hangs, this raises ArgumentError (a ValueError and a RuntimeError). The other ranks of
  a collective call raise PeerError with its text, and the next call works. A lost peer raises PeerLost, a late one
  PeerTimeout.
- On the CPU a call is done when it returns; events exist and behave. `event.event` is None unless async_finish.
- CUDA tensors are staged through the host (staging.py); the tables of a normal handle stay there. With
  MOE_COMM_DEVICE=cuda calls are kernels instead (kernel_exchange.py). In normal mode the host asks for counts only, as
  it must return them; low-latency calls wait for nothing, and can be captured in a graph once a call of their sizes
  was made.
- With enable_shrink, low-latency calls go on without a rank that is lost or late (MOE_COMM_TIMEOUT_S,
  MOE_COMM_SILENCE_S): a warning is logged, its mask is 1, it has no tokens, tokens for its experts are dropped, and
  what it owed is left out of sums. Normal mode has no masks, as in DeepEP: there, a lost peer ends the Buffer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import buffer as core
from ..arguments import Found, wrong
from ..config import Config as WindowConfig
from ..dispatch import COMBINE, DISPATCH
from ..errors import ArgumentError, ClosedError
from ..group import EPGroup, survey
from ..staging import device_of, new_on, staged
from . import normal
from .config import Config
from .events import EventHandle, EventOverlap, wait_for_event
from .low_latency import LowLatency, size_hint
from .refuse import or_refuse, or_tell


class CpuStream:
    """What `get_comm_stream` returns where there is no CUDA: work is done when a call returns, so nothing waits."""

    def synchronize(self) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def query(self) -> bool:
        return True


class Buffer:
    """Moves tokens of one EP group. Making one is collective, and so are dispatch and combine in all their forms.

    Args:
        group: a torch ProcessGroup of any backend, or an EPGroup; used while windows are made only.
        comm: instead of `group` (None then), an mpi4py communicator.
        low_latency_mode: low_latency_dispatch and low_latency_combine may be called as well as the normal ones.
        explicitly_destroy: `destroy()` will be called. It need not be: a Buffer that nobody holds is closed.
        enable_shrink: low-latency calls mask ranks that are lost or late instead of raising.

    The rest is kept and does nothing, see the head of this file. Positional arguments are read as DeepEP 2 orders them;
    where the types say that an older order is meant (a communicator in the ninth place, use_fabric in the eighth of
    eleven), as that.

    Raises: ArgumentError (the others: PeerError); MismatchError where sizes or modes differ; TransportError. *Source*:
    DeepEP's Buffer.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        use_fabric: bool = False,
    ) -> None:
        if isinstance(comm, (bool, int)):  # use_fabric came eighth
            explicitly_destroy, enable_shrink, comm = enable_shrink, bool(comm), use_fabric or None
        shrink: Any = enable_shrink
        if not isinstance(shrink, (bool, int)):  # comm came ninth
            enable_shrink, comm = False, shrink
        if group is not None:
            self._group = EPGroup.of(group)
        elif comm is not None:
            self._group = EPGroup.from_mpi(comm)
        else:
            raise ArgumentError("Either 'group' or 'comm' must be provided.")
        sizes = {"num_nvl_bytes": num_nvl_bytes, "num_rdma_bytes": num_rdma_bytes}
        with or_tell(self._group):
            for name, value in sizes.items():
                if not (isinstance(value, int) and value >= 0):
                    raise wrong(name, "an int >= 0", value)
        self.group = group
        self.rank, self.group_size = self._group.rank, self._group.num_ranks
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = bool(low_latency_mode)
        self.explicitly_destroy = bool(explicitly_destroy)
        self.enable_shrink = bool(enable_shrink)
        # On one node both paths are the same, but for hops="rank" the sum starts at the bias, as in DeepEP's kernels
        # for one node; between nodes it starts there after the nodes were summed, as in theirs.
        # Clients compare sizes with what they need and make another Buffer: sizes that differ would part the ranks.
        agreed = {
            **sizes, "low_latency_mode": self.low_latency_mode, "enable_shrink": self.enable_shrink,
            "MOE_COMM_DEVICE": torch.device(WindowConfig.resolve().device or "cpu").type,
        }  # fmt: skip
        found = survey(self._group, WindowConfig.resolve().ranks_per_node, agreed)
        hops = "rank" if found.topology.num_nodes == 1 else "node"
        self.runtime: core.Buffer | None = core.Buffer(self._group, hops=hops)
        self._where = self.runtime.device if self.runtime.kernels is not None else None
        device = WindowConfig.resolve().device
        self._low_latency = LowLatency(self.runtime, self.enable_shrink, device)
        self._scratch: dict[bool, Tensor] = {}
        self._device_rows: Tensor | None = (
            None  # stand for those of get_next_low_latency_combine_buffer
        )

    def destroy(self) -> None:
        """Frees the windows; `runtime` is None afterwards. Needs explicitly_destroy. More than once is fine.

        Raises: ArgumentError without explicitly_destroy.
        """
        if not self.explicitly_destroy:
            raise wrong("explicitly_destroy", "True for destroy()", False)
        if self.runtime is not None:
            self.runtime.close()
            self._low_latency.close()
            self._scratch.clear()
        self.runtime = None

    # --- what DeepEP asks of a class -------------------------------------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        """True: FP8 works."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Kept in `Buffer.num_sms`. Raises: ArgumentError unless even and >= 0."""
        if not (isinstance(new_num_sms, int) and new_num_sms >= 0 and new_num_sms % 2 == 0):
            raise wrong("new_num_sms", "an even int >= 0", new_num_sms)
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """Everything given to the current stream up to now."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes that the windows of low-latency mode will take, for top-k 8."""
        return size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """A Config for any number of ranks."""
        if not (isinstance(num_ranks, int) and num_ranks >= 1):
            raise wrong("num_ranks", "an int >= 1", num_ranks)
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """As `get_dispatch_config`."""
        return Buffer.get_dispatch_config(num_ranks)

    @staticmethod
    def _unpack_bias(bias: Any) -> tuple[Any, Any]:
        return normal.unpack_bias(bias)

    def get_comm_stream(self) -> Any:
        """The stream that results are ordered on: the current one; without CUDA an object whose methods do nothing."""
        return torch.cuda.current_stream() if torch.cuda.is_initialized() else CpuStream()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> Tensor:
        """Scratch memory of num_nvl_bytes (num_rdma_bytes) bytes, zeros at first, the same at each call.

        Returns it flat from element `offset` on, or its first elements as `size`. No window: what a client writes
        here, zeros too, changes nothing that travels. Raises: ArgumentError if `size` does not fit.
        """
        where = self._check_alive().device
        key = bool(use_rdma_buffer)
        if key not in self._scratch:
            num_bytes = self.num_rdma_bytes if key else self.num_nvl_bytes
            self._scratch[key] = torch.zeros(num_bytes, dtype=torch.int8, device=where)
        raw = self._scratch[key]
        flat = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)
        if not 0 <= offset <= len(flat):
            raise wrong("offset", f"at most the {len(flat)} elements of the buffer", offset)
        flat = flat[offset:]
        if size is None:
            return flat
        num_elements = torch.Size(size).numel()
        if num_elements > len(flat):
            raise wrong("size", f"at most {len(flat)} elements", Found(tuple(size)))
        return flat[:num_elements].view(size)

    def _check_alive(self) -> core.Buffer:
        if self.runtime is None:
            raise ClosedError("Buffer: destroy() was called")
        return self.runtime

    # --- normal mode -----------------------------------------------------------------------------

    @staged("topk_idx", order=wait_for_event, where=lambda self: self._where)
    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Counts a routing: `topk_idx` int64 [T, K], −1: none. Local, not collective.

        Returns num_tokens_per_rank int32 [R] and num_tokens_per_rdma_rank int32 [N] (None on one node), each token
        counted once; num_tokens_per_expert int32 [E]; is_token_in_rank bool [T, R]; the event. Raises: ArgumentError.
        """
        buffer = self._check_alive()
        _check_async(previous_event, async_finish, allocate_on_comm_stream)
        wait_for_event(previous_event)
        return (*normal.layout_of(buffer, topk_idx, num_experts), _event(async_finish))

    @staged("x", keeps=(4,), order=wait_for_event, where=lambda self: self._where)
    def dispatch(
        self,
        x: Any,
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor | None, list[int] | None, tuple | None, EventOverlap]:
        """Sends each token to the ranks that own its experts.

        Args:
            x: [T, H] of any dtype, or (rows [T, H], scales [T, S] or [T] of any strides), T may be 0.
            handle: of an earlier dispatch: its routing for this x. Then topk_idx and topk_weights must be None.
            num_tokens_per_rank … num_tokens_per_expert: from `get_dispatch_layout`. Their shapes are checked; with
                topk_idx, only E is taken from them. Without, is_token_in_rank says where tokens go.
            topk_idx, topk_weights: int64 and float32 [T, K], both or neither.
            expert_alignment: counts of experts are rounded up to it; no row is added.
            num_worst_tokens: if > 0, results have so many rows. Rows behind the real ones hold −1 in recv_topk_idx, 0
                in recv_topk_weights, anything in recv_x.
            config: how many SMs kernels take at most, default `Buffer.num_sms`; the rest is checked, without effect.
            allocate_on_comm_stream: checked, else without effect.

        Returns: recv_x [N, H] (a pair if x is one), one row for each token with an expert here, by (source rank, source
        token); recv_topk_idx int64 [N, K] of local experts, −1 elsewhere; recv_topk_weights float32 [N, K], 0
        elsewhere; the aligned count of each local expert ([] with num_worst_tokens); the handle, a tuple of tensors
        (NOTE [handle] in normal.py); the event. With a handle: (recv_x, None, None, None, None, event).

        Raises: ArgumentError, PeerError, MismatchError, PeerTimeout, PeerLost. Blocks until all ranks called.
        """
        buffer = self._check_alive()
        with or_refuse(buffer, DISPATCH):
            _check_async(previous_event, async_finish, allocate_on_comm_stream)
            buffer.num_sms = _num_sms_of(config)
            wait_for_event(previous_event)
        results = normal.dispatch(
            buffer, x, handle, (num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert),
            topk_idx, topk_weights, expert_alignment, num_worst_tokens,
        )  # fmt: skip
        return (*results, _event(async_finish))

    internode_dispatch = dispatch

    @staged("x", order=wait_for_event, where=lambda self: self._where)
    def combine(
        self,
        x: Tensor,
        handle: tuple,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Returns each token's rows to its source and adds them, without weights.

        Args:
            x: [N, H] as recv_x of the handle's dispatch; bfloat16, float16, float32 or float64.
            topk_weights: float32 [N, K] columns that are added, too; they multiply nothing.
            bias: None, [T, H] where the sum starts, or a pair whose float32 sum that is.

        Returns: [T, H] of x's dtype, the bias or 0 for a token without rows; float32 [T, K] or None; the event.

        Sums are float32 (float64 for float64) from the bias on, by ascending rank, rounded once. Between nodes: first
        the ranks of a node, rounded to x's dtype, then the nodes from the bias on. With a pair, rows travel as
        float32, so that nothing is rounded but the result. Raises: as `dispatch`.
        """
        buffer = self._check_alive()
        with or_refuse(buffer, COMBINE):
            _check_async(previous_event, async_finish, allocate_on_comm_stream)
            buffer.num_sms = _num_sms_of(config)
            wait_for_event(previous_event)
        results = normal.combine(buffer, x, handle, topk_weights, bias)
        return (*results, _event(async_finish))

    internode_combine = combine

    # --- low-latency mode ------------------------------------------------------------------------

    @staged(
        "x", updates=("cumulative_local_expert_recv_stats", "dispatch_wait_recv_cost_stats"),
        where=lambda self: self._low_latency.windows.where,
    )  # fmt: skip
    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, Tensor, tuple, EventOverlap, Callable[[], None] | None]:
        """Sends a row per (token, expert) to a padded place.

        L: experts of this rank; M: num_max_dispatch_tokens_per_rank.

        Args:
            x: [T, H], T <= M; bfloat16, or another float. Cast to FP8 here unless use_fp8=False.
            topk_idx: int64 [T, K], −1: none.
            num_max_dispatch_tokens_per_rank, num_experts: the same on all ranks, like H and K.
            cumulative_local_expert_recv_stats: int32 [L], the received counts are added to it. A bool here is use_fp8,
                which stood fifth once.
            dispatch_wait_recv_cost_stats: int64 [R]; the nanoseconds waited for each source rank are added to it.
            round_scale: scales are powers of two; use_ue8m0 (with it): packed as bytes of their exponents.
            return_recv_hook: only send. Results may be used after the hook, which is the last value, was called. At
                most two calls may be un-hooked.

        Returns:
            [L, R·M, H] rows, float8_e4m3fn (then a pair with the scales [L, R·M, S], S = ceil(H / 128), float32; or
            packed int32 [L, R·M, ceil(S / 4)]; the last two dimensions are stored the other way round) or x's dtype;
            recv_count int32 [L]: rows behind the first recv_count[l] are undefined;
            a handle (src_info int32 [L, R·M]: source token of each row; layout_range int64 [L, R]: (first row << 32) +
            rows, of each source rank; M; H; E; ours), rows by (source rank, source token); the event; the hook.

        Raises: as `dispatch`.
        """
        low_latency = self._check_low_latency()
        stats: Any = cumulative_local_expert_recv_stats
        if isinstance(stats, bool):
            stats, use_fp8 = None, stats
        packed, count, handle, hook = low_latency.dispatch(
            x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts,
            stats=stats, cost_stats=dispatch_wait_recv_cost_stats, use_fp8=use_fp8, round_scale=round_scale,
            use_ue8m0=use_ue8m0, async_finish=async_finish, hook=return_recv_hook,
        )  # fmt: skip
        return packed, count, handle, _event(async_finish), hook

    @staged(
        "x", fills=("out",), updates=("combine_wait_recv_cost_stats",),
        where=lambda self: self._low_latency.windows.where,
    )  # fmt: skip
    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Callable[[], None] | None]:
        """Returns each row to its source, which adds them times their weights: float32, in top-k order, rounded once.

        Args:
            x: [L, R·M, H] bfloat16, float16, float32 or float64, one row for each of the dispatch's.
            topk_idx, topk_weights: the dispatch's; float32 [T, K].
            use_logfmt: rows are as LogFMT-10 would leave them (quant.py). They travel as they are: no bytes are saved.
            zero_copy: rows are taken from get_next_low_latency_combine_buffer(handle), only the shape of x counts.
            return_recv_hook: only send; the result may be used after the hook was called. x may be changed before.
            out: [T, H] of x's dtype, contiguous; the result.
            combine_wait_recv_cost_stats: as in low_latency_dispatch.

        Returns: [T, H], 0 for a token without experts; the event; the hook or None. Raises: as `dispatch`.
        """
        low_latency = self._check_low_latency()
        if zero_copy and self._device_rows is not None:
            low_latency.fill_combine_rows(self._device_rows)
        combined, hook = low_latency.combine(
            x, topk_idx, topk_weights, handle, use_logfmt=use_logfmt, zero_copy=zero_copy,
            async_finish=async_finish, hook=return_recv_hook, out=out, cost_stats=combine_wait_recv_cost_stats,
        )  # fmt: skip
        return combined, _event(async_finish), hook

    def get_next_low_latency_combine_buffer(self, handle: tuple) -> Tensor:
        """bfloat16 [L, R·M, H] to write results into for low_latency_combine(zero_copy=True); rows have a stride of
        their own. It is that combine's until the call returns, then the next one's."""
        rows = self._check_low_latency().next_combine_rows(handle)
        device = device_of(handle)
        self._device_rows = None if device in (None, rows.device) else new_on(device, rows)
        return rows if self._device_rows is None else self._device_rows

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Returns: normal and low-latency calls share nothing that would have to be cleaned. Not collective."""
        self._check_low_latency()

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """mask=True: low-latency calls go on without `rank_to_mask`, which is told and will mask this rank in its next
        call. Local. mask=False: for a rank that is not masked, nothing.

        Raises: ArgumentError without enable_shrink; for this rank itself; for mask=False if the rank is masked: it
        missed exchanges, so a change on one rank cannot take it back (`low_latency_clean_mask_buffer` can).
        """
        self._check_shrink().update_mask(rank_to_mask, bool(mask))

    @staged("mask_status", fills=("mask_status",))
    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Writes int32 [R]: 1 for ranks that are masked here, else 0. Local; knows of a loss after the call that found
        it. Raises: ArgumentError without enable_shrink, or for another tensor."""
        self._check_shrink().query_mask(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Takes masked ranks back. Collective of the ranks that live, masked ones too, where DeepEP's is local.

        Those who come within 10 s (MOE_COMM_TIMEOUT_S, if less) go on with one another; who does not come stays
        masked. Handles and hooks from before raise. Before the first low-latency call it only forgets masks, and is
        local. Raises: ArgumentError without enable_shrink; PeerTimeout on a masked rank whom nobody met.
        """
        self._check_shrink().windows.unmask()

    def _check_shrink(self) -> LowLatency:
        low_latency = self._check_low_latency()
        if not self.enable_shrink:
            raise wrong("enable_shrink", "True for masks", False)
        return low_latency

    def _check_low_latency(self) -> LowLatency:
        self._check_alive()
        if not self.low_latency_mode:
            raise wrong("low_latency_mode", "True for low-latency calls", False)
        return self._low_latency


def _event(async_finish: bool) -> EventOverlap:
    return EventOverlap(EventHandle() if async_finish else None)


def _check_async(previous_event: Any, async_finish: bool, allocate_on_comm_stream: bool) -> None:
    if allocate_on_comm_stream and not (previous_event is not None and async_finish):
        raise wrong(
            "allocate_on_comm_stream", "False without previous_event and async_finish", True
        )


def _num_sms_of(config: Any) -> int:
    if not (config is None or isinstance(config, Config)):
        raise wrong("config", "a Config or None", config)
    return Buffer.num_sms if config is None else config._num_sms
