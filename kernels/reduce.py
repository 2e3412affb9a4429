"""reduce: sums of rows in their stated order, the same kernel at every level of a combine.

Terms are named by where they lie, a byte offset into one memory, so that a rank's own copies
(level 0: `y`), the results in a forwarder's slots (level 1) and the sums of the nodes in a source's
slots and link windows (level 2) need one kernel and no copies. `row_offsets` makes the offsets.

- Terms are added in the order of their columns, in float32 (float64 for float64).
- A sum starts at the bias, or else with its first term: one plain term passes bit for bit, −0.0 and
  NaNs too. No term and no bias: zeros.
- A product with a weight is rounded before it is added, never fused.
- What crosses a level in memory is rounded to the rows' dtype, an own-node sum like the others:
  the source's kernel adds the ranks of its own node first (`inner_first` … `inner_last`), rounds,
  and takes that as one term among the nodes'.
- float32 columns are rows of dtype float32: the same kernel, and rounding changes nothing.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def row_offsets_torch(rows: Tensor, starts: Tensor, windows: Tensor, *, row_bytes: int) -> Tensor:
    """Byte offsets [n, J] int64 of `rows` [n, J] int32, or −1: row − start, in its column's window.

    `starts` [J] int32: row number at which each column's window begins. `windows` [J] int64: byte
    offset of each column's first row.
    """
    offsets = windows + (rows - starts).long() * row_bytes
    return torch.where(rows >= 0, offsets, -1)


def reduce_torch(
    out: Tensor,
    memory: Tensor,
    offsets: Tensor,
    *,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    inner_first: int = 0,
    inner_last: int = 0,
) -> None:
    """`out` [n, W], strides respected: the sum of the rows at `offsets` [n, J] int64 (−1: none).

    `memory` [B] uint8; rows in it have `out`'s dtype and lie at multiples of its size. `weights`
    [n, J] float32 multiplies each term. `bias` [n, W] of `out`'s dtype. The columns [inner_first,
    inner_last) are summed and rounded first, and count as one term in their place.
    """
    total = _OrderedSum(out, bias)
    j = 0
    while j < offsets.shape[1]:
        if inner_first <= j < inner_last:
            inner = _OrderedSum(out, None)
            for term in _terms(out, memory, offsets, weights, range(inner_first, inner_last)):
                inner.add(*term)
            index = inner.count.nonzero()[:, 0]
            total.add(index, inner.rounded()[index], None)
            j = inner_last
        else:
            for term in _terms(out, memory, offsets, weights, range(j, j + 1)):
                total.add(*term)
            j += 1
    out.copy_(total.rounded())


def lane_columns_torch(columns: Tensor, positions: Tensor) -> Tensor:
    """[n, K] float32: the number of each copy, `columns` [P] by place, in its lane; 0 without one.

    `positions` [n, K] int32 as made by unpack's `places`.
    """
    out = columns.new_zeros(positions.shape)
    row, lane = (positions >= 0).nonzero(as_tuple=True)
    out[row, lane] = columns[positions[row, lane].long()]
    return out


def _terms(
    out: Tensor, memory: Tensor, offsets: Tensor, weights: Tensor | None, columns: range
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(rows of `out`, their terms, their weights) of each column that has any."""
    items, width = memory.view(out.dtype), out.shape[1]
    for j in columns:
        index = (offsets[:, j] >= 0).nonzero()[:, 0]
        if len(index) == 0:
            continue
        at = offsets[index, j] // out.element_size()
        starts_anywhere = items.as_strided((len(items) - width + 1, width), (1, 1))
        yield index, starts_anywhere[at], None if weights is None else weights[index, j]


class _OrderedSum:
    """Sums per row, and for those of one plain term, the term itself."""

    def __init__(self, like: Tensor, start: Tensor | None):
        exact = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.only = torch.zeros_like(like) if start is None else start.clone()
        self.total = self.only.to(exact, copy=True)
        self.count = torch.full_like(like[:, 0], start is not None, dtype=torch.int32)
        self.plain = torch.ones_like(self.count, dtype=torch.bool)

    def add(self, index: Tensor, terms: Tensor, weights: Tensor | None) -> None:
        """Add `terms` [n, W] to the rows `index` [n], each named at most once."""
        values = terms.to(self.total.dtype)
        if weights is not None:
            values = values * weights.to(self.total.dtype)[:, None]
        started = self.count[index, None] > 0
        self.total[index] = torch.where(started, self.total[index] + values, values)
        self.only[index] = terms
        self.count[index] += 1
        self.plain[index] = weights is None

    def rounded(self) -> Tensor:
        single = (self.count == 1) & self.plain
        return torch.where(single[:, None], self.only, self.total.to(self.only.dtype))
