"""forward: rows that came by a link, on to the ranks of the own node that hold one of their experts.

Two steps: `forward_tables` reads the ids of a round's link rows and numbers the rows of each local
rank in link order; `forward` copies the rows. A cached dispatch has the tables already. The tables
are the forwarder's part of the handle: a combine finds in them which rows of which rank to add.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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
) -> Forwarded:
    """Number the rows of each local rank, from `starts` [G] int32 on: those of earlier rounds.

    `link_rows` [n, row_bytes] uint8: the rows of one round of one link. `local_of_rank` [R] int32:
    a rank's index in this node, −1 for ranks of other nodes.
    """
    num_ranks, node_ranks = local_of_rank.shape[0], starts.shape[0]
    ids = int32_part(link_rows, ids_at, topk).long()
    owner = torch.where(ids >= 0, ids // experts_per_rank, num_ranks)
    # index G collects what is not for this node
    local = torch.where(local_of_rank < 0, node_ranks, local_of_rank).long()
    local = torch.cat([local, local.new_full((1,), node_ranks)])
    hits = torch.zeros((len(ids), node_ranks + 1), dtype=torch.bool, device=ids.device)
    hits = hits.scatter_(1, local[owner], True)[:, :node_ranks]
    rows = hits.cumsum(0, dtype=torch.int32) - 1 + starts
    return Forwarded(
        int32_part(link_rows, token_at, 1)[:, 0],
        torch.where(hits, rows, -1),
    )


def forward_torch(
    window: Tensor, link_rows: Tensor, rows: Tensor, starts: Tensor, *, local: int
) -> None:
    """Copy the link rows for local rank `local` into its `window` [C, row_bytes] uint8.

    `link_rows` [n, row_bytes] uint8, `rows` [n, G] and `starts` [G] int32 as in `forward_tables`.
    """
    index = (rows[:, local] >= 0).nonzero()[:, 0]
    window[(rows[index, local] - starts[local]).long()] = link_rows[index]
