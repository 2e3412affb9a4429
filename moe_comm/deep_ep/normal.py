"""Normal mode: the layout of a routing, dispatch and combine in DeepEP's forms, over one `moe_comm.Buffer`.

The row order, local expert ids, −1 and weight 0 are those of `moe_comm`'s layout "rank"; what is done here is DeepEP's
handle, padded outputs, aligned counts, and dispatches without top-k.

NOTE [handle] A tuple of ten tensors and nothing else, because clients put it through `save_for_backward`:

    0       rank_prefix_matrix int32 [R, R]: rows that ranks 0…i sent to rank j, inclusive. Only this rank's column is
            known here; the others are −1.
    1 … 5   moe_comm's own (`Handle.to_tensors`): numbers (on the host; last the rows of recv_x, padding included),
            lane_rows, recv_tokens, positions, forward_tokens
    6 = −4  recv_gbl_rank_prefix_sum int32 [R]: that column
    7 … 9   forward_rows, tokens_per_expert, `Handle.told`

By kernels (MOE_COMM_DEVICE) the Buffer's calls take as many rounds as they need (kernel_rounds.py); the host asks for
the counts of each, as it must return them.
"""

from typing import Any

import torch
from torch import Tensor

from ..arguments import Found, describe, wrong
from ..buffer import Buffer
from ..dispatch import COMBINE, DISPATCH, Dispatched
from ..handle import Handle
from .refuse import or_refuse

HANDLE_LENGTH = 10

Layout = tuple[Tensor, Tensor | None, Tensor, Tensor]


def layout_of(buffer: Buffer, topk_idx: Tensor, num_experts: int) -> Layout:
    """Local. Returns num_tokens_per_rank int32 [R], num_tokens_per_node int32 [N] (None for one node),
    num_tokens_per_expert int32 [E], is_token_in_rank bool [T, R]; a token counts once per rank and node.

    Raises: ArgumentError for ids out of [-1, num_experts); those of a device are counted for nobody, and found by the
    dispatch, as the host does not wait here.
    """
    idx = check_topk_idx(topk_idx)
    if not (isinstance(num_experts, int) and num_experts >= 1):
        raise wrong("num_experts", "an int >= 1", num_experts)
    if idx.is_cpu and idx.numel() and not (int(idx.min()) >= -1 and int(idx.max()) < num_experts):
        found = Found(f"{int(idx.min())} … {int(idx.max())}")
        raise wrong("topk_idx", f"ids in [-1, {num_experts})", found)
    num_tokens, num_ranks = idx.shape[0], buffer.num_ranks
    valid = (idx >= 0) & (idx < num_experts)
    owner = torch.where(valid, idx // -(-num_experts // num_ranks), num_ranks)
    in_rank = _marks(owner, num_ranks)
    counts = idx.new_zeros(num_experts + 1)
    counts.scatter_add_(
        0, torch.where(valid, idx, num_experts).view(-1), torch.ones_like(idx).view(-1)
    )
    per_expert = counts[:num_experts]
    per_node = None
    if buffer.topology.num_nodes > 1:
        node_of = [*buffer.topology.node_of, buffer.topology.num_nodes]
        nodes = torch.tensor(node_of).to(idx.device)
        per_node = _marks(nodes[owner], buffer.topology.num_nodes).sum(0).int()
    assert in_rank.shape == (num_tokens, num_ranks)
    return in_rank.sum(0).int(), per_node, per_expert.int(), in_rank


def _marks(owner: Tensor, num_owners: int) -> Tensor:
    """bool [T, num_owners]: which of them `owner` [T, K] names; `num_owners` is nobody."""
    marks = owner.new_zeros((owner.shape[0], num_owners + 1), dtype=torch.bool)
    return marks.scatter_(1, owner, True)[:, :num_owners].contiguous()


def check_topk_idx(topk_idx: Any) -> Tensor:
    """int64 [T, K]. int32 is accepted."""
    good = isinstance(topk_idx, Tensor) and topk_idx.dtype in (torch.int64, torch.int32)
    if not (good and topk_idx.dim() == 2):
        raise wrong("topk_idx", "int64 [T, K]", topk_idx)
    return topk_idx.long()


# --- dispatch ------------------------------------------------------------------------------------


def dispatch(
    buffer: Buffer,
    x: Any,
    handle: Any,
    layout: tuple[Any, Any, Any],
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    expert_alignment: int,
    num_worst_tokens: int,
) -> tuple:
    """`Buffer.dispatch` of legacy.py without its event: five values. `layout`: num_tokens_per_rank, is_token_in_rank,
    num_tokens_per_expert."""
    if handle is not None:
        return _dispatch_again(buffer, x, handle, topk_idx, topk_weights)
    with or_refuse(buffer, DISPATCH):
        payload, flat_scales = _payload(x)
        num_experts = _check_layout(buffer, payload, layout)
        if not (isinstance(expert_alignment, int) and expert_alignment >= 1):
            raise wrong("expert_alignment", "an int >= 1", expert_alignment)
        if (topk_idx is None) != (topk_weights is None):
            raise wrong("topk_weights", "given or omitted as topk_idx is", topk_weights)
        if num_worst_tokens < 0 or (num_worst_tokens and topk_idx is None):
            raise wrong("num_worst_tokens", "0, or an int > 0 with topk_idx", num_worst_tokens)
        if topk_idx is None:
            idx, spread = _lane_per_rank(layout[1]), buffer.num_ranks
        else:
            idx, spread = check_topk_idx(topk_idx), num_experts
    got = buffer.dispatch(payload, idx, topk_weights, num_experts=spread)
    if topk_idx is None:
        got_idx, counts = None, _exchange_counts(buffer, layout[2])
    else:
        got_idx, counts = got.topk_idx, got.tokens_per_expert.tolist()
    aligned = [-(-count // expert_alignment) * expert_alignment for count in counts]
    rows = got.handle.num_recv_rows
    if num_worst_tokens:
        if rows > num_worst_tokens:
            raise wrong("num_worst_tokens", f"at least the {rows} rows received", num_worst_tokens)
        rows, aligned = num_worst_tokens, []
    recv_x = _received(got, flat_scales, rows)
    recv_idx = None if got_idx is None else _lengthen(got_idx, rows, -1)
    recv_weights = None if got.topk_weights is None else _lengthen(got.topk_weights, rows, 0)
    return recv_x, recv_idx, recv_weights, aligned, pack_handle(got.handle, rows)


def _dispatch_again(buffer: Buffer, x: Any, handle: Any, topk_idx: Any, topk_weights: Any) -> tuple:
    """The handle's routing for other rows."""
    with or_refuse(buffer, DISPATCH):
        payload, flat_scales = _payload(x)
        ours, rows = unpack_handle(handle)
        for name, value in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
            if value is not None:
                raise wrong(name, "None with a handle", value)
    got = buffer.dispatch(payload, handle=ours)
    return _received(got, flat_scales, rows), None, None, None, None


def _payload(x: Any) -> tuple[Any, bool]:
    """x as `moe_comm` takes it, and whether its scales are 1-D."""
    if not isinstance(x, (tuple, list)):
        return x, False
    if len(x) != 2:
        raise wrong("x", "a tensor, or a pair (rows, scales)", Found(f"{len(x)} things"))
    rows, scales = x
    flat = isinstance(scales, Tensor) and scales.dim() == 1
    return (rows, scales[:, None] if flat else scales), flat


def _check_layout(buffer: Buffer, payload: Any, layout: tuple[Any, Any, Any]) -> int:
    """E. The numbers themselves are not needed: moe_comm counts again."""
    names = ("num_tokens_per_rank", "is_token_in_rank", "num_tokens_per_expert")
    for name, tensor in zip(names, layout, strict=True):
        if not isinstance(tensor, Tensor):
            raise wrong(name, "that of get_dispatch_layout, without a handle", tensor)
    per_rank, in_rank, per_expert = layout
    rows = payload[0] if isinstance(payload, tuple) else payload
    num_ranks = buffer.num_ranks
    if per_rank.shape != (num_ranks,):
        raise wrong("num_tokens_per_rank", f"int32 [{num_ranks}]", per_rank)
    if not isinstance(rows, Tensor) or in_rank.shape != (rows.shape[0], num_ranks):
        expected = f"[{len(rows) if isinstance(rows, Tensor) else 'T'}, {num_ranks}], x's tokens"
        raise wrong("is_token_in_rank", f"bool {expected}", in_rank)
    if per_expert.dim() != 1 or not len(per_expert):
        raise wrong("num_tokens_per_expert", "int32 [E]", per_expert)
    return len(per_expert)


def _lane_per_rank(is_token_in_rank: Tensor) -> Tensor:
    """Routing without top-k: as if each rank were one expert, lane r that of rank r. int64 [T, R]."""
    ranks = torch.arange(is_token_in_rank.shape[1], device=is_token_in_rank.device)
    return torch.where(is_token_in_rank.bool(), ranks, -1)


def _exchange_counts(buffer: Buffer, num_tokens_per_expert: Tensor) -> list[int]:
    """Without top-k nothing that travels says which experts are meant: one row of counts to each rank does."""
    num_ranks, num_experts = buffer.num_ranks, len(num_tokens_per_expert)
    width = -(-num_experts // num_ranks)
    where = buffer.device
    counts = torch.zeros(num_ranks * width, dtype=torch.int32, device=where)
    counts[:num_experts] = num_tokens_per_expert
    rows = torch.nn.functional.pad(counts.view(num_ranks, width), (0, -width % 4))
    ranks = torch.arange(num_ranks, device=where)[:, None]
    got = buffer.dispatch(rows, ranks, num_experts=num_ranks)
    first = buffer.rank * width
    owned = max(0, min(width, num_experts - first))
    return got.x.sum(0)[:owned].tolist()


def _received(got: Dispatched, flat_scales: bool, rows: int) -> Any:
    if not isinstance(got.x, tuple):
        return _lengthen(got.x, rows, None)
    payload, scales = (_lengthen(part, rows, None) for part in got.x)
    return payload, scales[:, 0] if flat_scales else scales


def _lengthen(tensor: Tensor, rows: int, filling: int | None) -> Tensor:
    """With undefined rows, or rows of `filling`, behind its own."""
    if len(tensor) == rows:
        return tensor
    longer = tensor.new_empty((rows, *tensor.shape[1:]))
    longer[: len(tensor)] = tensor
    if filling is not None:
        longer[len(tensor) :] = filling
    return longer


# --- combine -------------------------------------------------------------------------------------


def combine(
    buffer: Buffer, x: Tensor, handle: Any, topk_weights: Tensor | None, bias: Any
) -> tuple[Tensor, Tensor | None]:
    """`Buffer.combine` of legacy.py without its event."""
    with or_refuse(buffer, COMBINE):
        ours, rows = unpack_handle(handle)
        _check_rows("x", x, rows, ours)
        y, columns, lanes = x[: ours.num_recv_rows], None, 0
        if topk_weights is not None:
            _check_rows("topk_weights", topk_weights, rows, ours)
            lanes = topk_weights.shape[1]
            columns = topk_weights[: ours.num_recv_rows]
            columns = torch.nn.functional.pad(columns, (0, max(0, ours.topk - lanes)))
        first, second = unpack_bias(bias)
        if (first is None) != (bias is None):
            raise wrong("bias", "None, a tensor [T, H], or a pair of them", bias)
        if second is not None:
            wide = torch.promote_types(y.dtype, torch.float32)
            y, first = y.to(wide), first.to(wide) + second.to(wide)
    got = buffer.combine(y, ours, topk_weights=columns, bias=first)
    combined, weights = got if isinstance(got, tuple) else (got, None)
    return combined.to(x.dtype), None if weights is None else weights[:, :lanes]


def _check_rows(name: str, value: Any, rows: int, handle: Handle) -> None:
    """With or without the padding of num_worst_tokens."""
    lengths = (rows, handle.num_recv_rows)
    if not (isinstance(value, Tensor) and value.dim() == 2 and len(value) in lengths):
        raise wrong(name, f"[{rows}, …], the rows of the dispatch", value)


def unpack_bias(bias: Any) -> tuple[Any, Any]:
    """A tensor: (it, None); a pair of tensors: the pair; else (None, None)."""
    if isinstance(bias, Tensor):
        return bias, None
    if isinstance(bias, tuple) and len(bias) == 2 and all(isinstance(b, Tensor) for b in bias):
        return bias
    return None, None


# --- the handle ----------------------------------------------------------------------------------


def pack_handle(handle: Handle, rows: int) -> tuple[Tensor, ...]:
    """NOTE [handle]."""
    numbers, lane_rows, recv_tokens, positions, forward_tokens, forward_rows, counts, told = (
        handle.to_tensors()
    )
    prefix = torch.tensor(handle.totals, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    prefix = prefix.to(lane_rows.device)
    matrix = prefix.new_full((len(prefix), len(prefix)), -1)
    matrix[:, handle.rank] = prefix
    numbers = torch.cat([numbers, numbers.new_tensor([rows])])
    return (
        matrix, numbers, lane_rows, recv_tokens, positions, forward_tokens, prefix, forward_rows, counts, told,
    )  # fmt: skip


def unpack_handle(handle: Any) -> tuple[Handle, int]:
    """The Handle, and the rows of recv_x. Raises: ArgumentError for what is no handle of `dispatch`."""
    if not (
        isinstance(handle, (tuple, list))
        and len(handle) == HANDLE_LENGTH
        and all(isinstance(part, Tensor) for part in handle)
    ):
        found = Found(f"{len(handle)} things") if isinstance(handle, (tuple, list)) else handle
        raise wrong("handle", "that of Buffer.dispatch", Found(describe(found)))
    return Handle.from_tensors([*handle[1:6], *handle[7:]]), int(handle[1][-1])
