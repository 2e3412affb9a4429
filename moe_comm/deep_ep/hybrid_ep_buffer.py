"""HybridEPBuffer: DeepEP's interface of the branch hybrid-ep (routing maps, rows permuted to experts).

One `moe_comm.Buffer`, hops="node". A routing map [T, E] becomes top-k ids, an expert's lane being its turn among the
token's; how many lanes there are is the maximum over all ranks, which one small exchange before the dispatch finds (not
for topk_idx, nor with a handle). Rows are ordered by (source rank, source token), permuted rows by expert first. Sums
are those of `moe_comm.Buffer.combine`: a rank's copies by expert, the ranks of a node, the nodes.

num_sms_dispatch_api and num_sms_combine_api bound the SMs of calls by kernels (None: all); numbers of blocks, kernel
caches, fused forms and host metadata are kept and do nothing; windows serve calls of any size in rounds, so nothing has
to grow. Any dtype; any hidden size of a multiple of 16 bytes.

CUDA tensors are staged through the host (staging.py); the tensors of a handle stay there. With MOE_COMM_DEVICE=cuda
calls are kernels instead (kernel_rounds.py), and all tensors are on the GPU; the host asks for counts in any case.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import buffer as core
from ..arguments import Found, wrong
from ..config import Config as WindowConfig
from ..dispatch import COMBINE, DISPATCH
from ..errors import ArgumentError
from ..group import EPGroup
from ..layout import RowFormat
from ..staging import staged
from .normal import check_topk_idx
from .refuse import or_refuse, or_tell
from .routes import Routes, check_again

TOKEN_ALIGNMENT = 16  # of the tokens per rank that a configuration is for
LEAST_TOKENS = 64
USUAL_TOPK = 8


@dataclasses.dataclass
class BufferConfig:
    """What the buffer was made for, or has grown to."""

    hidden_dim: int
    max_num_of_tokens_per_rank: int
    num_of_experts_per_rank: int
    num_of_ranks_per_node: int
    num_of_nodes: int


@dataclasses.dataclass
class Configurer:
    """Where clients look for `buffer_config`."""

    buffer_config: BufferConfig


@dataclasses.dataclass(frozen=True, eq=False)
class HybridEPConfig:
    """What one dispatch was made with, and its routes: all that combine and a repeated dispatch need."""

    hidden_dim: int
    num_of_tokens_per_rank: int
    num_of_experts_per_rank: int
    pad_multiple: int
    topk_idx: Tensor = dataclasses.field(repr=False)  # [T, K] int64
    routes: Routes = dataclasses.field(repr=False)
    num_permuted: int | None  # rows of the permuted outputs, if not as many as came

    def num_rows(self, expand: bool) -> int:
        """Rows of the outputs in this form."""
        if expand and self.num_permuted is not None:
            return self.num_permuted
        return self.routes.num_places if expand else self.routes.num_rows


class DispatchHandle(NamedTuple):
    """Of `dispatch`. N rows received; L local experts. The maps are `moe_comm`'s own tables."""

    sparse_to_dense_map: Tensor
    rdma_to_attn_map: Tensor
    attn_to_rdma_map: Tensor
    num_dispatched_tokens_tensor: Tensor  # int32 [1]: N
    local_expert_routing_map: Tensor  # bool [N, L]
    num_of_tokens_per_rank: int
    config: HybridEPConfig


class PermuteHandle(NamedTuple):
    """Of `dispatch_with_permute`."""

    sparse_to_dense_map: Tensor
    rdma_to_attn_map: Tensor
    attn_to_rdma_map: Tensor
    num_dispatched_tokens_tensor: Tensor  # int32 [1]: N
    local_expert_routing_map: Tensor  # bool [N, L]
    dense_chunk_layout: Tensor  # int32 [R]: rows from ranks 0…i
    dense_to_expert_map: Tensor  # int32 [N, K]: permuted row of each lane's copy, or −1
    tokens_per_expert: Tensor  # int64 [L], padding not counted
    num_of_tokens_per_rank: int
    config: HybridEPConfig
    overflow_flag: Tensor  # int32 [1]: 1 if rows were dropped


def indices_to_map(
    topk_idx: Tensor, topk_weights: Tensor, num_of_tokens: int, num_of_experts: int
) -> tuple[Tensor, Tensor]:
    """(routing_map bool [T, E], probs float32 [T, E]) of topk_idx [T, K] (−1: none) and topk_weights [T, K]."""
    shape = (num_of_tokens, num_of_experts)
    if not (
        isinstance(topk_idx, Tensor) and topk_idx.dim() == 2 and len(topk_idx) == num_of_tokens
    ):
        raise wrong("topk_idx", f"int64 [{num_of_tokens}, K]", topk_idx)
    if not (isinstance(topk_weights, Tensor) and topk_weights.shape == topk_idx.shape):
        raise wrong("topk_weights", f"float32 {tuple(topk_idx.shape)}", topk_weights)
    return _dense_map(topk_idx, shape), _dense(topk_weights, topk_idx, shape)


class HybridEPBuffer:
    """Moves tokens of one EP group. Making one is collective, and so are dispatch and combine in both forms.

    Args:
        group: a torch ProcessGroup of any backend, or an EPGroup; used while windows are made only.
        hidden_dim, max_num_of_tokens_per_rank, num_local_experts: the largest usual call; windows are made for it, of
            at most MOE_COMM_WINDOW_BYTES.

    The rest does nothing, see the head of this file. `configurer.buffer_config` says what it was made for. A Buffer
    that nobody holds is closed. Raises: ArgumentError, MismatchError, TransportError. *Source*: DeepEP, hybrid-ep.
    """

    def __init__(
        self,
        group: Any,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        num_sms_dispatch_api: int | None = None,
        num_sms_combine_api: int | None = None,
        num_sms_preprocessing_api: int | None = None,
        num_blocks_permute: int | None = None,
        num_blocks_unpermute: int | None = None,
        load_cached_kernels: bool = False,
        use_shared_buffer: bool = True,
        enable_custom_allgather: bool = False,
        num_of_hybrid_ep_ranks_per_nvlink_domain: int | None = None,
        use_mnnvl: bool | None = None,
    ) -> None:
        self.group = group
        self._group = EPGroup.of(group)
        with or_tell(self._group):
            for name, value in (
                ("hidden_dim", hidden_dim),
                ("max_num_of_tokens_per_rank", max_num_of_tokens_per_rank),
                ("num_local_experts", num_local_experts),
            ):
                if not (isinstance(value, int) and value > 0):
                    raise wrong(name, "an int > 0", value)
            for name, num_sms in (
                ("num_sms_dispatch_api", num_sms_dispatch_api),
                ("num_sms_combine_api", num_sms_combine_api),
            ):
                if not (num_sms is None or (isinstance(num_sms, int) and num_sms >= 0)):
                    raise wrong(name, "an int >= 0 or None", num_sms)
        self._num_sms = {DISPATCH: num_sms_dispatch_api or 0, COMBINE: num_sms_combine_api or 0}
        self.rank, self.group_size = self._group.rank, self._group.num_ranks
        num_ranks = self.group_size
        row = RowFormat.of_dispatch(2 * hidden_dim, 0, USUAL_TOPK, weights=True)
        tokens = max(max_num_of_tokens_per_rank, LEAST_TOKENS)
        budget = WindowConfig.resolve().window_bytes
        self.runtime = core.Buffer(
            self._group,
            hidden=hidden_dim,
            topk=USUAL_TOPK,
            num_experts=num_ranks * num_local_experts,
            window_bytes=min(budget, 6 * num_ranks * tokens * row.row_bytes),
        )
        self._where = self.runtime.device if self.runtime.kernels is not None else None
        topology = self.runtime.topology
        self.configurer = Configurer(
            BufferConfig(
                hidden_dim,
                max_num_of_tokens_per_rank,
                num_local_experts,
                topology.node_ranks,
                topology.num_nodes,
            )
        )

    def empty_jit_cache(self) -> None:
        """There are no compiled kernels to delete."""

    def update_template_config(
        self,
        hidden_dim: int | None = None,
        num_of_tokens_per_rank: int | None = None,
        num_local_experts: int | None = None,
        pad_multiple: int | None = None,
        use_fp8: bool | None = None,
        fuse_permute_dispatch: bool = False,
        **kwargs: Any,
    ) -> BufferConfig:
        """Notes larger sizes in `configurer.buffer_config`, tokens rounded up to 16, and returns it. Local."""
        config = self.configurer.buffer_config
        tokens = -(-(num_of_tokens_per_rank or 0) // TOKEN_ALIGNMENT) * TOKEN_ALIGNMENT
        if (num_of_tokens_per_rank or 0) > config.max_num_of_tokens_per_rank:
            config.max_num_of_tokens_per_rank = tokens
        config.hidden_dim = max(config.hidden_dim, hidden_dim or 0)
        config.num_of_experts_per_rank = max(config.num_of_experts_per_rank, num_local_experts or 0)
        return config

    # --- rows as they came -----------------------------------------------------------------------

    @staged(
        "hidden",
        keeps=(3,),
        either=("num_dispatched_tokens_tensor",),
        where=lambda self: self._where,
    )
    def dispatch(
        self,
        hidden: Tensor,
        scaling_factor: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_of_experts: int | None = None,
        probs: Tensor | None = None,
        routing_map: Tensor | None = None,
        num_dispatched_tokens_tensor: Tensor | None = None,
        num_dispatched_tokens: int | None = None,
        handle: tuple | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, DispatchHandle]:
        """Sends each token to the ranks that own its experts, one row for each rank.

        Args:
            hidden: [T, H]. scaling_factor: [T, S] of 4-byte items, or None; travels along.
            routing_map: bool [T, E], with probs float32 [T, E] or None. Or topk_idx int64 [T, K] (−1: none) with
                topk_weights float32 [T, K] or None, and num_of_experts.
            handle: of an earlier dispatch: the same routing again, and other probs or topk_weights if given.
            num_dispatched_tokens…: not needed.

        Returns (token [N, H], probs float32 [N, E], 0 for experts elsewhere, or None; scaling_factor [N, S] or None;
        handle). Raises: ArgumentError (the others: PeerError), MismatchError, PeerTimeout, PeerLost. Blocks until all
        ranks called.
        """
        routing = (routing_map, probs, topk_idx, topk_weights)
        rows, weights, scales, config = self._exchange(
            hidden, scaling_factor, routing, num_of_experts, handle, expand=False, alignment=1
        )
        routes = config.routes
        dense = None
        if weights is not None:
            first = self.rank * -(-routes.compact.num_experts // self.group_size)
            shape = (routes.num_rows, routes.compact.num_experts)
            dense = _dense(
                weights, torch.where(routes.topk_idx < 0, -1, routes.topk_idx + first), shape
            )
        return rows, dense, scales, DispatchHandle(*_tables(config), len(hidden), config)

    @staged("hidden", where=lambda self: self._where)
    def combine(
        self, hidden: Tensor, probs: Tensor | None = None, handle: tuple | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns each token's rows to its source and adds them. `hidden` [N, H] and `probs` float32 [N, E] or None, as
        `dispatch` returned them. Returns (token [T, H], probs [T, E] or None), 0 where a token does not go.

        Raises and blocks as `dispatch`.
        """
        with or_refuse(self.runtime, COMBINE):
            config = _config_of(handle)
            routes, columns = config.routes, None
            if probs is not None:
                shape = (routes.num_rows, routes.compact.num_experts)
                if not (isinstance(probs, Tensor) and probs.shape == shape):
                    raise wrong("probs", f"float32 {shape}", probs)
                first = self.rank * -(-shape[1] // self.group_size)
                columns = _picked(
                    probs.detach(), torch.where(routes.topk_idx < 0, -1, routes.topk_idx + first)
                )
        return self._add(hidden, columns, config, expand=False)

    # --- rows by expert --------------------------------------------------------------------------

    @staged("hidden", keeps=(4,), either=("num_permuted_tokens",), where=lambda self: self._where)
    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        num_of_experts: int | None = None,
        use_fp8: bool | None = None,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        scaling_factor: Tensor | None = None,
        num_permuted_tokens: Any = None,
        pad_multiple: int | None = None,
        handle: tuple | None = None,
        non_blocking: bool = False,
        fuse_permute_dispatch: bool = False,
        num_dispatched_tokens: int | None = None,
        use_host_meta: bool | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, PermuteHandle]:
        """As `dispatch`, but one row for each (token, local expert), grouped by expert.

        Args:
            pad_multiple: groups are padded with zero rows to multiples of it.
            num_permuted_tokens: an int or a tensor of one: the outputs have so many rows. Default: as many as came.
            non_blocking: more rows than num_permuted_tokens (then needed) are dropped, and handle[-1] is 1. Without it
                that is an ArgumentError.
            handle: of an earlier dispatch_with_permute; pad_multiple None or the same.

        Returns (token [P, H], probs float32 [P] or None, scaling_factor [P, S] or None, tokens_per_expert int64 [L],
        padding included, dropped rows not; handle).
        """
        routing = (routing_map, probs, topk_idx, topk_weights)
        if num_of_experts is None and num_of_experts_per_rank is not None:
            num_of_experts = num_of_experts_per_rank * self.group_size
        with or_refuse(self.runtime, DISPATCH):
            limit = None if num_permuted_tokens is None else int(num_permuted_tokens)
            if non_blocking and limit is None and handle is None:
                raise wrong("num_permuted_tokens", "an int with non_blocking", None)
            alignment = pad_multiple or 1
            if handle is not None and pad_multiple is None:
                alignment = _config_of(handle).pad_multiple
        rows, weights, scales, config = self._exchange(
            hidden,
            scaling_factor,
            routing,
            num_of_experts,
            handle,
            expand=True,
            alignment=alignment,
        )
        routes = config.routes
        if limit is None:
            limit = config.num_rows(True)
        dropped = routes.num_places > limit
        if dropped and not non_blocking and limit != config.num_permuted:
            raise wrong(
                "num_permuted_tokens", f"at least the {routes.num_places} rows received", limit
            )
        config = dataclasses.replace(config, num_permuted=limit)
        rows = _fit(rows, limit)
        weights = None if weights is None else _fit(weights, limit)
        scales = None if scales is None else _fit(scales, limit)
        counts = routes.tokens_per_expert
        ends = ((counts + alignment - 1) // alignment * alignment).cumsum(0).clamp(max=limit)
        padded = torch.diff(ends, prepend=ends.new_zeros(1))
        totals = torch.tensor(routes.compact.totals).to(counts.device)
        made = PermuteHandle(
            *_tables(config),
            totals.cumsum(0).int(),
            routes.expanded.positions,
            counts,
            len(hidden),
            config,
            torch.tensor([int(dropped)], dtype=torch.int32).to(counts.device),
        )
        return rows, weights, scales, padded, made

    @staged("hidden", where=lambda self: self._where)
    def combine_with_unpermute(
        self,
        *,
        hidden: Tensor,
        probs: Tensor | None = None,
        handle: tuple | None = None,
        pad_multiple: int | None = None,
        fuse_unpermute_combine: bool = False,
        num_dispatched_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `combine`, for `hidden` [P, H] and `probs` float32 [P] or None as `dispatch_with_permute` returned them.
        Dropped rows count as zeros."""
        with or_refuse(self.runtime, COMBINE):
            config = _config_of(handle)
            if probs is not None:
                if not (isinstance(probs, Tensor) and probs.shape == (config.num_rows(True),)):
                    raise wrong("probs", f"float32 ({config.num_rows(True)},)", probs)
                probs = probs.detach()
        return self._add(hidden, probs, config, expand=True)

    # --- both ------------------------------------------------------------------------------------

    def _exchange(
        self,
        hidden: Any,
        scales: Any,
        routing: tuple[Any, Any, Any, Any],
        num_experts: int | None,
        handle: Any,
        *,
        expand: bool,
        alignment: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, HybridEPConfig]:
        """(rows, weights by row, scales, config). `routing`: routing_map, probs, topk_idx, topk_weights."""
        runtime = self.runtime
        runtime.num_sms = self._num_sms[DISPATCH]
        if isinstance(hidden, Tensor):
            hidden = hidden.contiguous()  # a gradient may be one row, expanded
        x = hidden if scales is None else (hidden, scales)
        if handle is not None:
            with or_refuse(runtime, DISPATCH):
                config = _config_of(handle)
                weights = self._weights_again(config, routing)
                check_again(x, weights, config.routes.compact)
                if alignment != config.pad_multiple and expand:
                    raise wrong("pad_multiple", f"{config.pad_multiple}, the handle's", alignment)
            rows, got_weights = config.routes.dispatch_again(runtime, x, weights, expand)
        else:
            idx, weights, num_experts = self._route(hidden, routing, num_experts)
            got = runtime.dispatch(
                x, idx, weights, num_experts=num_experts,
                layout="expert" if expand else "rank", alignment=alignment,
            )  # fmt: skip
            routes = Routes.of(got, alignment)
            config = HybridEPConfig(
                hidden.shape[1], len(hidden), -(-num_experts // self.group_size), alignment, idx, routes,
                None,
            )  # fmt: skip
            rows, got_weights = got.x, got.topk_weights
            self.update_template_config(
                hidden.shape[1], len(hidden), config.num_of_experts_per_rank
            )
        got_scales = None
        if isinstance(rows, tuple):
            rows, got_scales = rows
        return rows, got_weights, got_scales, config

    def _route(
        self, hidden: Any, routing: tuple[Any, Any, Any, Any], num_experts: int | None
    ) -> tuple[Tensor, Tensor | None, int]:
        """(topk_idx [T, K] int64, weights [T, K], E). For a routing map an exchange finds K."""
        routing_map, probs, topk_idx, topk_weights = routing
        with or_refuse(self.runtime, DISPATCH):
            if (routing_map is None) == (topk_idx is None):
                raise ArgumentError("routing_map: expected it or topk_idx, got both or none")
            if not isinstance(hidden, Tensor):
                raise wrong("hidden", "a tensor [T, H]", hidden)
            if topk_idx is not None:
                if num_experts is None:
                    raise wrong("num_of_experts", "an int with topk_idx", None)
                return check_topk_idx(topk_idx), topk_weights, num_experts
            if not (
                isinstance(routing_map, Tensor)
                and routing_map.dim() == 2
                and len(routing_map) == len(hidden)
            ):
                raise wrong("routing_map", f"bool [{len(hidden)}, E]", routing_map)
            if num_experts is not None and routing_map.shape[1] != num_experts:
                raise wrong("routing_map", f"bool [{len(hidden)}, {num_experts}]", routing_map)
            if probs is not None and not (
                isinstance(probs, Tensor) and probs.shape == routing_map.shape
            ):
                raise wrong("probs", f"float32 {tuple(routing_map.shape)}", probs)
            here = routing_map != 0
            lanes = here.cumsum(1) - 1
            mine = int(lanes.max()) + 1 if len(here) else 0
        topk = max(1, self._largest(mine))
        idx = torch.full((len(here), topk), -1, dtype=torch.int64, device=here.device)
        token, expert = here.nonzero(as_tuple=True)
        idx[token, lanes[token, expert]] = expert
        weights = None if probs is None else _picked(probs.detach().float(), idx)
        return idx, weights, routing_map.shape[1]

    def _largest(self, value: int) -> int:
        """The maximum over the ranks, by one row from each to each."""
        where = self.runtime.device
        row = torch.full((1, 4), value, dtype=torch.int32, device=where)
        everyone = torch.arange(self.group_size, device=where)[None]
        return int(self.runtime.dispatch(row, everyone, num_experts=self.group_size).x.max())

    @staticmethod
    def _weights_again(config: HybridEPConfig, routing: tuple[Any, Any, Any, Any]) -> Tensor | None:
        """New weights [T, K] for a handle's routing, of probs [T, E] or topk_weights [T, K]."""
        _, probs, _, weights = routing
        idx = config.topk_idx
        if probs is not None:
            shape = (len(idx), config.routes.compact.num_experts)
            if not (isinstance(probs, Tensor) and probs.shape == shape):
                raise wrong("probs", f"float32 {shape}", probs)
            return _picked(probs.detach().float(), idx)
        return weights

    def _add(
        self, hidden: Any, columns: Tensor | None, config: HybridEPConfig, *, expand: bool
    ) -> tuple[Tensor, Tensor | None]:
        routes = config.routes
        num_rows = routes.num_places if expand else routes.num_rows
        given = config.num_rows(expand)
        with or_refuse(self.runtime, COMBINE):
            self.runtime.num_sms = self._num_sms[COMBINE]
            if not (isinstance(hidden, Tensor) and hidden.dim() == 2 and len(hidden) == given):
                raise wrong("hidden", f"[{given}, H]", hidden)
            rows = _fit(hidden.detach(), num_rows).contiguous()
            columns = None if columns is None else _fit(columns.float(), num_rows)
        out = self.runtime.combine(rows, routes.handle(expand), topk_weights=columns)
        if columns is None:
            return out, None
        shape = (len(config.topk_idx), routes.compact.num_experts)
        return out[0], _dense(out[1], config.topk_idx, shape)


def _config_of(handle: Any) -> HybridEPConfig:
    for part in handle if isinstance(handle, (tuple, list)) else ():
        if isinstance(part, HybridEPConfig):
            return part
    found = Found("None") if handle is None else handle
    raise wrong("handle", "one of HybridEPBuffer's dispatches", found)


def _tables(config: HybridEPConfig) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    routes = config.routes
    inner, num_local = routes.compact, len(routes.tokens_per_expert)
    return (
        inner.lane_rows,
        inner.forward_rows,
        inner.forward_tokens,
        torch.tensor([routes.num_rows], dtype=torch.int32).to(inner.lane_rows.device),
        _dense_map(routes.topk_idx, (routes.num_rows, num_local)),
    )


def _dense_map(ids: Tensor, shape: tuple[int, int]) -> Tensor:
    """bool `shape`: which ids [n, K] (−1: none) each row has."""
    row, lane = (ids >= 0).nonzero(as_tuple=True)
    out = torch.zeros(shape, dtype=torch.bool, device=ids.device)
    out[row, ids[row, lane].long()] = True
    return out


def _dense(values: Tensor, ids: Tensor, shape: tuple[int, int]) -> Tensor:
    """float32 `shape`: each of `values` [n, K] in the column that `ids` [n, K] names (−1: none)."""
    row, lane = (ids >= 0).nonzero(as_tuple=True)
    out = torch.zeros(shape, device=ids.device)
    out[row, ids[row, lane].long()] = values[row, lane].float()
    return out


def _picked(dense: Tensor, ids: Tensor) -> Tensor:
    """The reverse of `_dense`: [n, K], 0 where `ids` is −1."""
    return torch.where(ids >= 0, dense.gather(1, ids.clamp(min=0)), 0.0)


def _fit(rows: Tensor, num_rows: int) -> Tensor:
    """The first `num_rows` rows, zeros behind."""
    if len(rows) >= num_rows:
        return rows[:num_rows]
    out = rows.new_zeros((num_rows, *rows.shape[1:]))
    out[: len(rows)] = rows
    return out
