"""unpack: the rows of one source's window to their places in the output (H6 came before, H7 follows).

Every place is known before the first row arrives, because the first headers say how many copies of
which expert come from whom: `first_places`. `places` then numbers the copies of one window by
prefix sums, and `unpack` moves bytes. Order is (source rank, source token) in every layout, in
whatever order windows are unpacked.

- layout "rank": a row has one place, behind the rows of lower sources; `positions` is [n, 1].
- layouts "expert" and "padded": a place for each of its experts here; `positions` is [n, K].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .forward import int32_part
from .language import Items, as_integers, items_at, jit, launch, load_number, tl, up
from .scan import KEYS, ROWS, Ids, Keys, count, hits_of, key_of, rows_before


class Placed(NamedTuple):
    """What one window says about its n rows.

    `tokens` [n] int32: source token. `ids` [n, K] int64: local expert, or −1. `weights` [n, K]
    float32, 0 where `ids` is −1; None without weights. `positions` [n, K] int32: place of each copy
    in the expert and padded layouts, or −1. `next_places` [L] int32: for this source's next round.
    """

    tokens: Tensor
    ids: Tensor
    weights: Tensor | None
    positions: Tensor
    next_places: Tensor


def first_places_torch(
    copies: Tensor, *, alignment: int = 1, capacity: int | None = None
) -> tuple[Tensor, Tensor]:
    """Where each source's copies of each expert begin, and how many places each expert has.

    `copies` [R, L] integer: copies for this rank's experts, by source. Groups are as long as their
    copies, rounded up to `alignment` (layout "expert"), or `capacity` each (layout "padded").
    Returns int32 [R, L] and [L].
    """
    counts = copies.sum(0)
    if capacity is None:
        sizes = (counts + alignment - 1) // alignment * alignment
    else:
        sizes = torch.full_like(counts, capacity)
    groups = sizes.cumsum(0) - sizes
    return (groups + copies.cumsum(0) - copies).int(), sizes.int()


def places_torch(
    rows: Tensor,
    next_places: Tensor,
    *,
    first_expert: int,
    topk: int,
    token_at: int,
    ids_at: int,
    weights_at: int = 0,
    num_rows: Tensor | None = None,
) -> Placed:
    """Read tokens, ids and weights of `rows` [n, row_bytes] uint8 and place their copies.

    `next_places` [L] int32: the place of this source's next copy of each expert; experts are those
    from the global id `first_expert` on. `weights_at` 0: rows carry no weights. `num_rows`: NOTE [numbers on the
    device]; rows from it on have token −1 and no copies.
    """
    num_local = next_places.shape[0]
    local = int32_part(rows, ids_at, topk).long() - first_expert
    mine = (local >= 0) & (local < num_local)
    tokens = int32_part(rows, token_at, 1)[:, 0]
    if num_rows is not None:
        real = torch.arange(len(rows), device=rows.device) < num_rows
        mine, tokens = mine & real[:, None], torch.where(real, tokens, -1)
    index = torch.where(mine, local, num_local)  # L collects what is not mine
    hits = torch.zeros((len(rows), num_local + 1), dtype=torch.int32, device=rows.device)
    hits.scatter_(1, index, 1)
    places = hits.cumsum(0, dtype=torch.int32) - 1
    places[:, :num_local] += next_places
    weights = None
    if weights_at:
        weights = int32_part(rows, weights_at, topk).view(torch.float32)
        weights = torch.where(mine, weights, 0.0)
    return Placed(
        tokens,
        torch.where(mine, local, -1),
        weights,
        torch.where(mine, places.gather(1, index), -1),
        next_places + hits[:, :num_local].sum(0, dtype=torch.int32),
    )


def unpack_torch(
    out_x: Tensor,
    rows: Tensor,
    positions: Tensor,
    *,
    out_scales: Tensor | None = None,
    scales_at: int = 0,
) -> None:
    """Copy payload and scales of each row to its places, those >= 0 of `positions` [n, J] int32.

    `out_x` [P, H] and `out_scales` [P, S] of any dtype, contiguous; `rows` [n, row_bytes] uint8.
    """
    row, copy = (positions >= 0).nonzero(as_tuple=True)
    place = positions[row, copy].long()
    for out, offset in ((out_x, 0), (out_scales, scales_at)):
        if out is not None:
            part = out.view(torch.uint8)
            part[place] = rows[row, offset : offset + part.shape[1]]


def unpack_lanes_torch(out: Tensor, values: Tensor, positions: Tensor) -> None:
    """Scatter ids or weights: `values` [n, K] to `out` [P] (a copy's lane) or [P, K] (all lanes).

    `positions` as in `unpack`: [n, K] for `out` [P], [n, 1] for `out` [P, K].
    """
    row, copy = (positions >= 0).nonzero(as_tuple=True)
    out[positions[row, copy].long()] = values[row] if out.dim() == 2 else values[row, copy]


@jit
def place_copies(
    tokens, ids, weights, positions, next_places_out, next_places, counts, rows, stride, token_at, ids_at, weights_at,
    num_rows, limit, topk, rows_per_block, num_local, first_expert,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One block of rows, KEYS of the experts; the first tile also writes what has no expert here."""
    block, tile = tl.program_id(0), tl.program_id(1)
    columns = tile * KEYS + tl.arange(0, KEYS)
    limit = load_number(limit, num_rows)
    words = items_at(rows, 4)
    place = rows_before(counts, block, columns, num_local, ROWS, KEYS)
    place += tl.load(next_places + columns, mask=columns < num_local, other=0)
    for first in range(block * rows_per_block, (block + 1) * rows_per_block, ROWS):
        at = first + tl.arange(0, ROWS)
        real, inside = at < limit, at < num_rows
        row = at.to(tl.int64)
        hits = hits_of(
            words + ids_at, stride, at, limit, topk, columns, first_expert, num_local, 1, None, ROWS, KEYS
        )  # fmt: skip
        before = tl.cumsum(hits, axis=0) - hits + place[None, :]
        for k in range(topk):
            id = tl.load(words + row * stride + ids_at + k, mask=real, other=-1)
            expert = key_of(id, real, first_expert, num_local, 1, None)
            mine = (expert >= tile * KEYS) & (expert < (tile + 1) * KEYS)
            found = tl.sum(tl.where(expert[:, None] == columns[None, :], before, 0), axis=1)
            tl.store(positions + row * topk + k, found, mask=inside & mine)
            if tile == 0:
                tl.store(positions + row * topk + k, expert, mask=inside & (expert < 0))
                tl.store(ids + row * topk + k, expert.to(tl.int64), mask=inside)
                if weights is not None:
                    weight = tl.load(words + row * stride + weights_at + k, mask=real, other=0)
                    weight = tl.where(expert >= 0, weight, 0)
                    tl.store(
                        weights.to(tl.pointer_type(tl.int32)) + row * topk + k, weight, mask=inside
                    )
        if tile == 0:
            token = tl.load(words + row * stride + token_at, mask=real, other=-1)
            tl.store(tokens + row, token, mask=inside)
        place += tl.sum(hits, axis=0)
    if block == tl.num_programs(0) - 1:
        tl.store(next_places_out + columns, place, mask=columns < num_local)


def places_triton(
    rows: Tensor,
    next_places: Tensor,
    *,
    first_expert: int,
    topk: int,
    token_at: int,
    ids_at: int,
    weights_at: int = 0,
    num_rows: Tensor | None = None,
) -> Placed:
    n, num_local = len(rows), len(next_places)
    ids = Ids.in_rows(rows, ids_at, topk, num_rows)
    keys = Keys(num_local, first_expert, num_local, 1)
    counts = count(ids, keys)
    out = Placed(
        counts.new_empty(n),
        counts.new_empty((n, topk), dtype=torch.int64),
        counts.new_empty((n, topk), dtype=torch.float32) if weights_at else None,
        counts.new_empty((n, topk)),
        torch.empty_like(next_places) if n else next_places.clone(),
    )
    launch(
        place_copies, (ids.num_blocks, max(1, keys.tiles)), *out, next_places, counts, rows, ids.stride, token_at // 4,
        ids.first, weights_at // 4, n, num_rows, topk, ids.rows_per_block, num_local, first_expert,
        ROWS=ROWS, KEYS=KEYS,
    )  # fmt: skip
    return out


@jit
def unpack_rows(
    out_x, out_x_stride, width, rows, rows_stride, positions, positions_stride, num_positions,
    out_scales, out_scales_stride, num_scales, scales_at,
    BYTES: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, SCALE_BYTES: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """One tile of one row: read once, written to all its places."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    items = tile * BLOCK + tl.arange(0, BLOCK)
    mask = items < width * UNIT
    values = tl.load(items_at(rows, BYTES) + row * rows_stride * UNIT + items, mask=mask)
    for j in range(num_positions):
        place = tl.load(positions + row * positions_stride + j).to(tl.int64)
        if place >= 0:
            tl.store(
                items_at(out_x, BYTES) + place * out_x_stride * UNIT + items, values, mask=mask
            )
            if out_scales is not None:  # noqa: SIM102
                if tile == 0:
                    from_ = items_at(rows, SCALE_BYTES) + row * (
                        rows_stride * UNIT * BYTES // SCALE_BYTES
                    )
                    from_ += scales_at // SCALE_BYTES
                    for some in range(0, num_scales, SMALL):
                        i = some + tl.arange(0, SMALL)
                        scales = tl.load(from_ + i, mask=i < num_scales)
                        tl.store(
                            out_scales + place * out_scales_stride + i, scales, mask=i < num_scales
                        )


def unpack_triton(
    out_x: Tensor,
    rows: Tensor,
    positions: Tensor,
    *,
    out_scales: Tensor | None = None,
    scales_at: int = 0,
) -> None:
    items = Items.of(out_x.shape[1] * out_x.element_size(), out_x.element_size(), out_x, rows)
    out_s = None if out_scales is None else as_integers(out_scales)
    launch(
        unpack_rows, (len(rows), items.tiles), as_integers(out_x), items.stride(out_x), items.width,
        rows, items.stride(rows), positions, positions.stride(0), positions.shape[1],
        out_s, *((0, 0) if out_s is None else (out_s.stride(0), out_s.shape[1])), scales_at,
        BYTES=items.bytes, UNIT=items.unit, BLOCK=items.block,
        SCALE_BYTES=4 if out_s is None else out_s.element_size(), SMALL=64,
    )  # fmt: skip


@jit
def scatter_lanes(
    out, out_stride, values, values_stride, positions, positions_stride, num_values, topk,
    ALL_LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_values
    row, lane = (at // topk).to(tl.int64), at % topk
    value = tl.load(values + row * values_stride + lane, mask=mask)
    if ALL_LANES:
        place = tl.load(positions + row * positions_stride, mask=mask, other=-1).to(tl.int64)
        tl.store(out + place * out_stride + lane, value, mask=mask & (place >= 0))
    else:
        place = tl.load(positions + row * positions_stride + lane, mask=mask, other=-1).to(tl.int64)
        tl.store(out + place, value, mask=mask & (place >= 0))


def unpack_lanes_triton(out: Tensor, values: Tensor, positions: Tensor) -> None:
    values = as_integers(values if values.stride(1) == 1 else values.contiguous())
    launch(
        scatter_lanes, (up(values.numel(), 512),), as_integers(out), out.stride(0), values, values.stride(0),
        positions, positions.stride(0), values.numel(), values.shape[1], ALL_LANES=out.dim() == 2, BLOCK=512,
    )  # fmt: skip
