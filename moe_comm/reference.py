"""Dispatch and combine in plain torch: what this package means.

One process holds the inputs of all ranks and computes the outputs of all ranks; a list has one
entry per rank. Nothing here is fast and nothing here communicates. Every backend, layout and kernel
is tested against these two functions: dispatch bit for bit, and combine too where the order of sums
below is kept.

- **Owner** of expert e: rank ``e // L`` with ``L = ceil(E / R)``; the last ranks may own fewer
  experts, or none.
- **Order** of received rows: (source rank, source token) in every layout; layouts that group rows
  keep this order within a group.
- **Sums** of combine are taken in float32 (float64 for float64 rows) at three levels: a rank's own
  copies of a token in lane order, the ranks of a node ascending, the nodes ascending (numbered by
  their lowest rank). What crosses a level is rounded to the dtype of the rows. ``hops="rank"`` has
  no second level: all ranks ascending are one sum. The last sum starts at the bias and is rounded
  to the output dtype. A sum without bias starts at its first term, so that a single term passes bit
  for bit, −0.0 too. ``a * b + c`` is a product, rounded, then a sum: never fused.

Both functions are differentiable; gradients of the package are compared with autograd through them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["rank", "expert", "padded"]


@dataclass(frozen=True)
class Copies:
    """What one rank received, one entry per copy, ordered by (source rank, source token, lane).

    `token` [n] int64: the token's number, counted over the tokens of all ranks. `lane` [n] int64: k
    in 0…K−1 (all 0 for layout "rank", where one copy serves every lane). `row` [n] int64: its row
    in the rank's ``x`` seen as [rows, H].
    """

    token: Tensor
    lane: Tensor
    row: Tensor


@dataclass(frozen=True)
class Bookkeeping:
    """What `combine` needs from `dispatch`: the reference's handle."""

    layout: Layout
    num_tokens: tuple[int, ...]
    num_topk: int
    copies: tuple[Copies, ...]


@dataclass(frozen=True)
class ReferenceDispatched:
    """Outputs of `dispatch`, one list entry per rank; the shapes are listed there."""

    x: list[Tensor]
    topk_idx: list[Tensor] | None
    topk_weights: list[Tensor] | None
    tokens_per_expert: list[Tensor]
    scales: list[Tensor] | None
    bookkeeping: Bookkeeping


@dataclass(frozen=True)
class ReferenceCombined:
    """Outputs of `combine`, one list entry per rank: `x` [T, H], `topk_weights` [T, K] or None."""

    x: list[Tensor]
    topk_weights: list[Tensor] | None


def dispatch(
    xs: Sequence[Tensor],
    topk_idx: Sequence[Tensor],
    topk_weights: Sequence[Tensor] | None,
    num_experts: int,
    layout: Layout = "rank",
    alignment: int = 1,
    capacity: int | None = None,
    scales: Sequence[Tensor] | None = None,
) -> ReferenceDispatched:
    """Carry every token to the ranks that own its experts.

    Inputs, one per rank: `xs` [T, H] of any dtype; `topk_idx` [T, K] integer (−1: none);
    `topk_weights` [T, K] or None; `scales` [T, S] of any dtype or None, which travel as rows do.
    T may differ between ranks and be 0.

    Outputs, with L_r the number of experts that rank r really owns. `tokens_per_expert` [L_r] int64
    counts (token, expert) copies. The other shapes depend on `layout`:

    - ``"rank"``: a row per (token, rank that owns one of its experts). `x` [P, H]; `topk_idx`
      [P, K] int64, the local expert, or −1 for an expert of another rank; `topk_weights` [P, K]
      float32, 0 where `topk_idx` is −1.
    - ``"expert"``: a row per (token, local expert), grouped by expert ascending, each group
      followed by zero rows up to a multiple of `alignment`. `x` [P, H]; `topk_idx` [P] int64, −1 in
      padding rows; `topk_weights` [P] float32, 0 there.
    - ``"padded"``: the same rows with group l at ``x[l]``. `x` [L_r, capacity, H]; `topk_idx` None;
      `topk_weights` [L_r, capacity] float32.

    Raises ValueError when layout "padded" has no capacity, or one that an expert exceeds.
    """
    if layout == "padded" and capacity is None:
        raise ValueError('capacity: expected a number for layout "padded", got None')
    num_ranks = len(xs)
    experts_per_rank = -(-num_experts // num_ranks)
    idx = torch.cat(list(topk_idx)).long()
    columns = {"x": torch.cat(list(xs))}  # what travels: [all tokens, …]
    if scales is not None:
        columns["scales"] = torch.cat(list(scales))
    weights = None if topk_weights is None else torch.cat(list(topk_weights)).float()
    out: dict[str, list[Tensor]] = {name: [] for name in ("x", "scales", "idx", "weights", "count")}
    all_copies = []
    for rank in range(num_ranks):
        first_expert = min(rank * experts_per_rank, num_experts)
        num_local = min(experts_per_rank, num_experts - first_expert)
        local = idx - first_expert
        mine = (local >= 0) & (local < num_local)
        token, lane = mine.nonzero(as_tuple=True)  # ordered by token, then lane
        count = torch.bincount(local[token, lane], minlength=num_local)
        if layout == "rank":
            token = mine.any(dim=1).nonzero()[:, 0]
            lane, row = torch.zeros_like(token), torch.arange(len(token))
            shape: tuple[int, ...] = (len(token),)
            lanes: tuple[Tensor, ...] = (token,)  # a row carries all K lanes of its token …
        else:
            expert, limit = local[token, lane], capacity if layout == "padded" else None
            row, shape = _grouped_rows(expert, count, alignment, limit)
            lanes = (token, lane)  # … or the one lane it was copied for
        for name, values in columns.items():
            out[name].append(_place(values[token], row, shape))
        out["idx"].append(_place(torch.where(mine, local, -1)[lanes], row, shape, fill=-1))
        if weights is not None:
            out["weights"].append(_place(torch.where(mine, weights, 0)[lanes], row, shape))
        out["count"].append(count)
        all_copies.append(Copies(token, lane, row))
    return ReferenceDispatched(
        x=out["x"],
        topk_idx=None if layout == "padded" else out["idx"],
        topk_weights=None if weights is None else out["weights"],
        tokens_per_expert=out["count"],
        scales=None if scales is None else out["scales"],
        bookkeeping=Bookkeeping(
            layout, tuple(len(x) for x in xs), idx.shape[1], copies=tuple(all_copies)
        ),
    )


def combine(
    ys: Sequence[Tensor],
    bookkeeping: Bookkeeping,
    weights: Sequence[Tensor] | None = None,
    bias: Sequence[Tensor] | None = None,
    node_of: Sequence[int] | None = None,
    hops: Literal["node", "rank"] = "node",
    topk_weights: Sequence[Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> ReferenceCombined:
    """Carry results back to each token's source and sum them in the order stated above.

    Inputs, one per rank: `ys` shaped like dispatch's ``x``. `weights`, shaped like its
    ``topk_weights``, multiply the rows before the first sum (layouts "expert" and "padded" only).
    `bias` [T, H] starts the last sum. `topk_weights` [P, K] (layouts "expert" and "padded": one
    number per row, for the row's lane) are columns added like the rows, in float32, never rounded.
    `node_of` [R] is the node of each rank; the default is one node.

    Returns `x` [T, H] per rank, of `out_dtype` (default: the dtype of `ys`): zeros, or the bias,
    for a token without rows; and `topk_weights` [T, K] float32 if they were given.

    Raises ValueError for `weights` with layout "rank", whose rows serve several experts.
    """
    if weights is not None and bookkeeping.layout == "rank":
        raise ValueError('weights: expected None for layout "rank", got tensors')
    wire, hidden, num_tokens = ys[0].dtype, ys[0].shape[-1], sum(bookkeeping.num_tokens)
    exact = torch.float64 if wire == torch.float64 else torch.float32
    nodes = list(node_of) if node_of is not None else [0] * len(ys)
    if hops == "rank":
        nodes = list(range(len(ys)))  # nodes of one rank: their level passes its single term
    terms, columns = [], []
    for rank, copies in enumerate(bookkeeping.copies):
        rows = ys[rank].reshape(-1, hidden)[copies.row].to(exact)
        if weights is not None:
            rows = rows * weights[rank].reshape(-1)[copies.row].to(exact)[:, None]
        own = _RowSum(num_tokens, hidden, exact)
        nth = _nth_of_token(copies.token)
        for n in range(int(nth.max()) + 1 if len(nth) else 0):
            own.add(copies.token[nth == n], rows[nth == n])
        terms.append(own.terms(wire))
        if topk_weights is not None:
            columns.append(_columns(topk_weights[rank], copies, bookkeeping))
    sizes = list(bookkeeping.num_tokens)
    start = _RowSum(num_tokens, hidden, exact, None if bias is None else torch.cat(list(bias)))
    x = _sum_ranks(terms, nodes, wire, start).to(out_dtype or wire)
    if topk_weights is None:
        return ReferenceCombined(list(x.split(sizes)), None)
    start = _RowSum(num_tokens, bookkeeping.num_topk, torch.float32)
    summed = _sum_ranks(columns, nodes, torch.float32, start)
    return ReferenceCombined(list(x.split(sizes)), list(summed.split(sizes)))


def combine_by_lane(
    ys: Sequence[Tensor],
    bookkeeping: Bookkeeping,
    topk_idx: Sequence[Tensor],
    num_experts: int,
    bias: Sequence[Tensor] | None = None,
    each_copy: bool = False,
    source_weights: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Combine in the order of each token's lanes, `topk_idx` [T, K] per rank; one level.

    Without `each_copy` a rank's copies are summed and rounded as in `combine`, and stand where the
    last lane of that rank does. With it every copy is a term of its own, in lane order; with
    `source_weights` [T, K] float32 it is multiplied and added with one rounding (computed here in
    float64, for rows of at most float32). Layouts "expert" and "padded" for `each_copy`.

    Returns x [T, H] per rank, of the dtype of `ys`.
    """
    wire, hidden, num_tokens = ys[0].dtype, ys[0].shape[-1], sum(bookkeeping.num_tokens)
    exact = torch.float64 if wire == torch.float64 else torch.float32
    idx = torch.cat(list(topk_idx)).long()
    owner = torch.where(idx < 0, -1, idx // -(-num_experts // len(ys)))
    total = _RowSum(num_tokens, hidden, exact, None if bias is None else torch.cat(list(bias)))
    weights = None if source_weights is None else torch.cat(list(source_weights))
    terms = []
    for rank, copies in enumerate(bookkeeping.copies):
        rows = ys[rank].reshape(-1, hidden)[copies.row]
        lane = copies.lane
        if not each_copy:
            own, nth = _RowSum(num_tokens, hidden, exact), _nth_of_token(copies.token)
            for n in range(int(nth.max()) + 1 if len(nth) else 0):
                own.add(copies.token[nth == n], rows[nth == n])
            token, rows = own.terms(wire)
            last = (owner[token] == rank) * torch.arange(1, idx.shape[1] + 1)
            lane = last.max(dim=1).values - 1
            copies = Copies(token, lane, token)
        terms.append((copies.token, lane, rows))
    for k in range(idx.shape[1]):
        for token, lane, rows in terms:
            here = lane == k
            if weights is None:
                total.add(token[here], rows[here])
            else:
                total.add_fused(token[here], rows[here], weights[token[here], k])
    return list(total.total.to(wire).split(list(bookkeeping.num_tokens)))


class _RowSum:
    """A sum per row, which starts at `start` or else at its first term."""

    def __init__(
        self, num_rows: int, width: int, dtype: torch.dtype, start: Tensor | None = None
    ) -> None:
        zeros = torch.zeros(num_rows, width, dtype=dtype)
        self.total = zeros if start is None else start.to(dtype, copy=True)
        self.present = torch.full((num_rows,), start is not None)

    def add(self, row: Tensor, values: Tensor) -> None:
        """Add `values` [n, width] to the rows `row` [n] int64, each named at most once."""
        values = values.to(self.total.dtype)
        added = torch.where(self.present[row, None], self.total[row] + values, values)
        self.total[row] = added
        self.present[row] = True

    def add_fused(self, row: Tensor, values: Tensor, weight: Tensor) -> None:
        """`add` of `values` times `weight` [n], rounded once."""
        products = values.double() * weight.double()[:, None]  # exact: 24 + 24 bits
        sums = torch.where(self.present[row, None], self.total[row].double() + products, products)
        self.total[row] = sums.to(self.total.dtype)
        self.present[row] = True

    def terms(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the rows that have a sum, and these sums rounded to `dtype`."""
        row = self.present.nonzero()[:, 0]
        return row, self.total[row].to(dtype)


def _sum_ranks(
    terms: list[tuple[Tensor, Tensor]], node_of: list[int], wire: torch.dtype, total: _RowSum
) -> Tensor:
    """Add each rank's `terms` (row, values): ranks within nodes, then nodes onto `total`."""
    for node in sorted(set(node_of), key=node_of.index):  # by lowest rank
        own = _RowSum(len(total.total), total.total.shape[1], total.total.dtype)
        for rank in range(len(terms)):
            if node_of[rank] == node:
                own.add(*terms[rank])
        total.add(*own.terms(wire))
    return total.total


def _columns(values: Tensor, copies: Copies, bookkeeping: Bookkeeping) -> tuple[Tensor, Tensor]:
    """Return (token [n], columns [n, K] float32) of one rank; n counts its distinct tokens."""
    if bookkeeping.layout == "rank":
        return copies.token, values[copies.row].float()
    token, nth = copies.token.unique_consecutive(return_inverse=True)
    columns = torch.zeros(len(token), bookkeeping.num_topk)
    columns[nth, copies.lane] = values.reshape(-1)[copies.row].float()
    return token, columns


def _grouped_rows(
    expert: Tensor, count: Tensor, alignment: int, capacity: int | None
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the row of each copy, grouped by `expert` [n], and the leading shape of the output."""
    if capacity is None:
        size = (count + alignment - 1) // alignment * alignment
        shape: tuple[int, ...] = (int(size.sum()),)
    else:
        largest = int(count.max()) if len(count) else 0
        if largest > capacity:
            raise ValueError(f"capacity: expected at least {largest}, got {capacity}")
        size, shape = torch.full_like(count, capacity), (len(count), capacity)
    by_expert = torch.argsort(expert, stable=True)  # keeps (source rank, source token)
    grouped = expert[by_expert]
    row = torch.empty_like(expert)
    row[by_expert] = torch.arange(len(expert)) - (count.cumsum(0) - count)[grouped]
    row += (size.cumsum(0) - size)[expert]
    return row, shape


def _place(values: Tensor, row: Tensor, shape: tuple[int, ...], fill: int = 0) -> Tensor:
    """Return [*shape, …] of `fill` with `values` [n, …] at the rows `row` [n] of its flat view."""
    out = values.new_zeros(math.prod(shape), *values.shape[1:])
    if fill:
        out.fill_(fill)
    out[row] = values
    return out.view(*shape, *values.shape[1:])


def _nth_of_token(token: Tensor) -> Tensor:
    """Return, for the ascending `token` [n], how many earlier entries name the same token."""
    return torch.arange(len(token)) - torch.searchsorted(token, token)
