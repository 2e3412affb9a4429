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
) -> Placed:
    """Read tokens, ids and weights of `rows` [n, row_bytes] uint8 and place their copies.

    `next_places` [L] int32: the place of this source's next copy of each expert; experts are those
    from the global id `first_expert` on. `weights_at` 0: rows carry no weights.
    """
    num_local = next_places.shape[0]
    local = int32_part(rows, ids_at, topk).long() - first_expert
    mine = (local >= 0) & (local < num_local)
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
        int32_part(rows, token_at, 1)[:, 0],
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
