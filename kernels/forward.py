"""forward: rows that came by a link, on to the ranks of the own node that hold one of their experts.

Two steps: `forward_tables` reads the ids of a round's link rows and numbers the rows of each local
rank in link order; `forward` copies the rows. A cached dispatch has the tables already. The tables
are the forwarder's part of the handle: a combine finds in them which rows of which rank to add.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .language import Items, items_at, jit, launch, load_number, tl
from .pack import copy_tile
from .scan import KEYS, ROWS, Ids, Keys, count, number_block


class Forwarded(NamedTuple):
    """`tokens` [n] int32: source token of each link row; `rows` [n, G] int32: its row, −1: none."""

    tokens: Tensor
    rows: Tensor


def int32_part(rows: Tensor, offset: int, num: int) -> Tensor:
    """The int32 [n, num] at byte `offset` of each row of `rows` [n, row_bytes] uint8."""
    return rows[:, offset : offset + 4 * num].contiguous().view(torch.int32)


def forward_tables_torch(
    link_rows: Tensor,
    local_of_rank: Tensor,
    starts: Tensor,
    *,
    experts_per_rank: int,
    topk: int,
    token_at: int,
    ids_at: int,
    num_rows: Tensor | None = None,
) -> Forwarded:
    """Number the rows of each local rank, from `starts` [G] int32 on: those of earlier rounds.

    `link_rows` [n, row_bytes] uint8: the rows of one round of one link. `local_of_rank` [R] int32:
    a rank's index in this node, −1 for ranks of other nodes. `num_rows`: NOTE [numbers on the device]; rows from it on
    have token −1 and go nowhere.
    """
    num_ranks, node_ranks = local_of_rank.shape[0], starts.shape[0]
    ids = int32_part(link_rows, ids_at, topk).long()
    owner = torch.where(ids >= 0, ids // experts_per_rank, num_ranks)
    # index G collects what is not for this node
    local = torch.where(local_of_rank < 0, node_ranks, local_of_rank).long()
    local = torch.cat([local, local.new_full((1,), node_ranks)])
    hits = torch.zeros((len(ids), node_ranks + 1), dtype=torch.bool, device=ids.device)
    hits = hits.scatter_(1, local[owner], True)[:, :node_ranks]
    tokens = int32_part(link_rows, token_at, 1)[:, 0]
    if num_rows is not None:
        real = torch.arange(len(ids), device=ids.device) < num_rows
        hits, tokens = hits & real[:, None], torch.where(real, tokens, -1)
    rows = hits.cumsum(0, dtype=torch.int32) - 1 + starts
    return Forwarded(tokens, torch.where(hits, rows, -1))


def forward_torch(
    window: Tensor, link_rows: Tensor, rows: Tensor, starts: Tensor, *, local: int
) -> None:
    """Copy the link rows for local rank `local` into its `window` [C, row_bytes] uint8.

    `link_rows` [n, row_bytes] uint8, `rows` [n, G] and `starts` [G] int32 as in `forward_tables`.
    """
    index = (rows[:, local] >= 0).nonzero()[:, 0]
    window[(rows[index, local] - starts[local]).long()] = link_rows[index]


@jit
def number_links(
    tokens, out, starts, counts, rows, ids, tokens_at, stride, num_rows, limit, topk, rows_per_block, num_keys,
    num_experts, experts_per_key, table,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`rows` are int32; ids, tokens_at and stride in int32 words."""
    block, tile = tl.program_id(0), tl.program_id(1)
    limit = load_number(limit, num_rows)
    words = items_at(rows, 4)
    number_block(
        out, starts, None, counts, words + ids, stride, block, rows_per_block, num_rows, limit, topk, 1,
        tile * KEYS + tl.arange(0, KEYS), num_keys, 0, num_experts, experts_per_key, table, ROWS, KEYS,
    )  # fmt: skip
    if tile == 0:
        for first in range(block * rows_per_block, (block + 1) * rows_per_block, ROWS):
            at = first + tl.arange(0, ROWS)
            token = tl.load(words + at.to(tl.int64) * stride + tokens_at, mask=at < limit, other=-1)
            tl.store(tokens + at, token, mask=at < num_rows)


def forward_tables_triton(
    link_rows: Tensor,
    local_of_rank: Tensor,
    starts: Tensor,
    *,
    experts_per_rank: int,
    topk: int,
    token_at: int,
    ids_at: int,
    num_rows: Tensor | None = None,
) -> Forwarded:
    n, node_ranks = len(link_rows), len(starts)
    ids = Ids.in_rows(link_rows, ids_at, topk, num_rows)
    keys = Keys(
        node_ranks, 0, len(local_of_rank) * experts_per_rank, experts_per_rank, local_of_rank
    )
    counts = count(ids, keys)
    out = Forwarded(counts.new_empty(n), counts.new_empty(n, node_ranks))
    launch(
        number_links, (ids.num_blocks, keys.tiles), *out, starts, counts, link_rows, ids.first, token_at // 4,
        ids.stride, n, num_rows, topk, ids.rows_per_block, node_ranks, keys.num_experts, experts_per_rank,
        local_of_rank, ROWS=ROWS, KEYS=KEYS,
    )  # fmt: skip
    return out


@jit
def forward_rows(
    window, window_stride, link_rows, link_stride, width, rows, node_ranks, starts, local,
    BYTES: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    source = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + source * node_ranks + local)
    if row >= 0:
        to_row = (row - tl.load(starts + local)).to(tl.int64)
        copy_tile(
            items_at(window, BYTES) + to_row * window_stride * UNIT,
            items_at(link_rows, BYTES) + source * link_stride * UNIT,
            1, width, tl.program_id(1), UNIT, BLOCK,
        )  # fmt: skip


def forward_triton(
    window: Tensor, link_rows: Tensor, rows: Tensor, starts: Tensor, *, local: int
) -> None:
    items = Items.of(link_rows.shape[1], 1, window, link_rows)
    launch(
        forward_rows, (len(link_rows), items.tiles), window, items.stride(window), link_rows, items.stride(link_rows),
        items.width, rows, rows.stride(0), starts, local, BYTES=items.bytes, UNIT=items.unit, BLOCK=items.block,
    )  # fmt: skip
