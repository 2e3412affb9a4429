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

from .language import Items, jit, launch, load_number, rounded_to, tl, to_float, up


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
    num_tokens: Tensor | None = None,
) -> None:
    """`out` [n, W], strides respected: the sum of the rows at `offsets` [n, J] int64 (−1: none).

    `memory` [B] uint8; rows in it have `out`'s dtype and lie at multiples of its size, of 16 if a row's
    bytes are one. `weights` [n, J] float32 multiplies each term. `bias` [n, W] of `out`'s dtype. The
    columns [inner_first, inner_last) are summed and rounded first, and count as one term in their place.
    `num_tokens`: NOTE [numbers on the device]; rows of `out` from it on stay as they are.
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
    if num_tokens is None:
        out.copy_(total.rounded())
    else:
        real = torch.arange(len(out), device=out.device) < num_tokens
        out.copy_(torch.where(real[:, None], total.rounded(), out))


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


@jit
def add_terms(
    total, only, count, plain, memory, offsets, weights, first, last, items, mask,
    ITEM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Adds the columns [first, last). `only` is the last term, `count` how many there were."""
    for j in range(first, last):
        offset = tl.load(offsets + j)
        if offset >= 0:
            term = tl.load(memory + offset // (ITEM * UNIT) * UNIT + items, mask=mask, other=0.0)
            value = to_float(term)
            plain = tl.full((), 1, tl.int32)
            if weights is not None:
                value = value * tl.load(weights + j).to(total.dtype)
                plain = tl.full((), 0, tl.int32)
            total = tl.where(count > 0, total + value, value)
            only = term
            count += 1
    return total, only, count, plain


@jit
def reduce_rows(
    out, out_stride, out_item_stride, memory, offsets, offsets_stride, weights, weights_stride,
    bias, bias_stride, bias_item_stride, width, num_terms, inner_first, inner_last, num_rows, limit,
    ITEM: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one sum. Compiled without fused multiply-add: a product is rounded."""
    row = tl.program_id(0).to(tl.int64)
    items = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = items < width * UNIT
    dtype = out.dtype.element_ty
    exact = tl.float64 if ITEM == 8 else tl.float32
    zero = tl.full((), 0, tl.int32)
    one = tl.full((), 1, tl.int32)
    if row < load_number(limit, num_rows):
        terms = memory.to(tl.pointer_type(dtype))
        offsets += row * offsets_stride
        if weights is not None:
            weights += row * weights_stride
        only = tl.zeros([BLOCK], dtype=dtype)
        count = zero
        if bias is not None:
            if UNIT > 1:
                only = tl.load(bias + row * bias_stride * UNIT + items, mask=mask)
            else:
                only = tl.load(
                    bias + row * bias_stride + items.to(tl.int64) * bias_item_stride, mask=mask
                )
            count = one
        total = to_float(only)
        total, only, count, plain = add_terms(
            total, only, count, one, terms, offsets, weights, 0, inner_first, items, mask, ITEM, UNIT
        )  # fmt: skip
        inner, inner_only, inner_count, inner_plain = add_terms(
            tl.zeros([BLOCK], dtype=exact), tl.zeros([BLOCK], dtype=dtype), zero, one,
            terms, offsets, weights, inner_first, inner_last, items, mask, ITEM, UNIT,
        )  # fmt: skip
        if inner_count > 0:
            rounded = tl.where(
                (inner_count == 1) & (inner_plain == 1), inner_only, rounded_to(inner, dtype)
            )
            value = to_float(rounded)
            total = tl.where(count > 0, total + value, value)
            only = rounded
            count += 1
            plain = one
        total, only, count, plain = add_terms(
            total, only, count, plain, terms, offsets, weights, inner_last, num_terms, items, mask, ITEM, UNIT
        )  # fmt: skip
        rounded = tl.where((count == 1) & (plain == 1), only, rounded_to(total, dtype))
        if UNIT > 1:
            tl.store(out + row * out_stride * UNIT + items, rounded, mask=mask)
        else:
            tl.store(
                out + row * out_stride + items.to(tl.int64) * out_item_stride, rounded, mask=mask
            )


def reduce_triton(
    out: Tensor,
    memory: Tensor,
    offsets: Tensor,
    *,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    inner_first: int = 0,
    inner_last: int = 0,
    num_tokens: Tensor | None = None,
) -> None:
    item = out.element_size()
    width = out.shape[1]
    rows = (out,) if bias is None else (out, bias)
    aligned = Items.of(width * item, item, memory, *rows).unit > 1
    unit = 16 // item if aligned else 1
    block = 2048 // item
    inner = max(inner_first, inner_last)
    launch(
        reduce_rows, (len(out), up(width, block)), out, out.stride(0) // unit, out.stride(1), memory,
        offsets, offsets.stride(0), weights, 0 if weights is None else weights.stride(0),
        bias, *((0, 0) if bias is None else (bias.stride(0) // unit, bias.stride(1))), width // unit,
        offsets.shape[1], inner_first, inner, len(out), num_tokens, ITEM=item, UNIT=unit, BLOCK=block,
        enable_fp_fusion=False,
    )  # fmt: skip


@jit
def gather_columns(
    out, columns, positions, positions_stride, num_values, topk, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_values
    place = tl.load(positions + at // topk * positions_stride + at % topk, mask=mask, other=-1).to(
        tl.int64
    )
    tl.store(out + at, tl.load(columns + place, mask=place >= 0, other=0.0), mask=mask)


def lane_columns_triton(columns: Tensor, positions: Tensor) -> Tensor:
    out = columns.new_empty(positions.shape)
    launch(
        gather_columns, (up(out.numel(), 512),), out, columns.contiguous(), positions, positions.stride(0),
        out.numel(), positions.shape[1], BLOCK=512,
    )  # fmt: skip
    return out


@jit
def offsets_of(
    out, rows, rows_stride, rows_item_stride, starts, windows, row_bytes, num_values, num_columns, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_values
    i, j = (at // num_columns).to(tl.int64), at % num_columns
    row = tl.load(rows + i * rows_stride + j * rows_item_stride, mask=mask, other=-1)
    inside = (row - tl.load(starts + j, mask=mask, other=0)).to(tl.int64) * row_bytes
    offset = tl.load(windows + j, mask=mask, other=0) + inside
    tl.store(out + at, tl.where(row >= 0, offset, -1), mask=mask)


def row_offsets_triton(rows: Tensor, starts: Tensor, windows: Tensor, *, row_bytes: int) -> Tensor:
    out = torch.empty(rows.shape, dtype=torch.int64, device=rows.device)
    launch(
        offsets_of, (up(out.numel(), 512),), out, rows, *rows.stride(), starts.contiguous(), windows.contiguous(),
        row_bytes, out.numel(), rows.shape[1], BLOCK=512,
    )  # fmt: skip
    return out
