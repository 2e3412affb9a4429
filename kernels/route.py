"""route: from `topk_idx` to the row of each token in each lane.

A **lane** is a window that takes rows of this rank: with hops="rank" one per rank; with hops="node"
one per rank of the own node and one per remote node (its rail peer's link window). `lane_of_rank`
says which lane a row for a rank takes, so that both kinds of hops are one kernel.

Rows of a lane are numbered in token order, over the whole call, by prefix sums: no atomic decides
an order, so every device and every run give the same numbers. A round takes a range of tokens; its
window starts at the lane's row number `round_starts[round]`, from which the row inside the window
follows without another scan.

A token without experts, and with them every token beyond the real T of a fixed-size call, is a row
of −1 in `topk_idx`: it has no row anywhere.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .language import jit, launch, load_number, tl, up
from .scan import KEYS, ROWS, Ids, count_block, number_block, rows_before

ERROR_NONE, ERROR_RANGE, ERROR_TWICE = 0, 1, 2


class Routed(NamedTuple):
    """Where the tokens of one call go. All int32.

    `lane_rows` [T, D]: the token's row in each lane, or −1. `round_starts` [n + 1, D]: rows of each
    lane before each round, and, last, all of them. `rank_counts` [R]: rows that each rank will
    receive. `expert_counts` [R·L]: (token, expert) copies by global expert. `error` [3]: what is
    wrong with `topk_idx` first (ERROR_…), its token and its entry; the other tables mean nothing
    then.
    """

    lane_rows: Tensor
    round_starts: Tensor
    rank_counts: Tensor
    expert_counts: Tensor
    error: Tensor

    @property
    def lane_counts(self) -> Tensor:
        """[D] rows in each lane, all rounds."""
        return self.round_starts[-1]


def route_torch(
    topk_idx: Tensor,
    lane_of_rank: Tensor,
    *,
    num_experts: int,
    num_ranks: int,
    num_lanes: int,
    capacity: int,
    num_tokens: Tensor | None = None,
) -> Routed:
    """`topk_idx` [T, K] int64 (−1: none), `lane_of_rank` [R] int32, C tokens in a round.

    `num_tokens`: NOTE [numbers on the device]; tokens from it on have no expert.
    """
    if num_tokens is not None:
        real = torch.arange(len(topk_idx), device=topk_idx.device) < num_tokens
        topk_idx = torch.where(real[:, None], topk_idx, -1)
    experts_per_rank = -(-num_experts // num_ranks)
    valid = (topk_idx >= 0) & (topk_idx < num_experts)
    owner = torch.where(valid, topk_idx // experts_per_rank, num_ranks)  # R: nobody
    to_rank = _hits(owner, num_ranks)
    none = lane_of_rank.new_full((1,), num_lanes)
    to_lane = _hits(torch.cat([lane_of_rank, none]).long()[owner], num_lanes)
    rows = to_lane.cumsum(0, dtype=torch.int32) - 1
    lane_rows = torch.where(to_lane, rows, -1)
    copies = torch.bincount(topk_idx[valid], minlength=num_ranks * experts_per_rank)
    return Routed(
        lane_rows,
        round_starts_torch(lane_rows, capacity=capacity),
        to_rank.sum(0, dtype=torch.int32),
        copies[: num_ranks * experts_per_rank].int(),
        _first_error(topk_idx, valid)
        if len(topk_idx)
        else topk_idx.new_zeros(3, dtype=torch.int32),
    )


@jit
def route_count(
    counts, errors, topk_idx, stride, num_tokens, limit, topk, tokens_per_block,
    num_experts, experts_per_rank, lane_of_rank, num_lanes, num_ranks, lane_tiles, rank_tiles, expert_tiles,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """First half: `counts` [B, D], [B, R] and [B, R·L], one behind the other; `errors` [B] int64."""
    block, tile, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    column = tl.arange(0, KEYS)
    limit = load_number(limit, num_tokens)
    if tile < lane_tiles:
        count_block(
            counts, topk_idx, stride, block, tokens_per_block, limit, topk, tile * KEYS + column, num_lanes,
            0, num_experts, experts_per_rank, lane_of_rank, ROWS, KEYS,
        )  # fmt: skip
    elif tile < lane_tiles + rank_tiles:
        count_block(
            counts + blocks * num_lanes, topk_idx, stride, block, tokens_per_block, limit, topk,
            (tile - lane_tiles) * KEYS + column, num_ranks, 0, num_experts, experts_per_rank, None, ROWS, KEYS,
        )  # fmt: skip
    elif tile < lane_tiles + rank_tiles + expert_tiles:
        count_block(
            counts + blocks * (num_lanes + num_ranks), topk_idx, stride, block, tokens_per_block, limit, topk,
            (tile - lane_tiles - rank_tiles) * KEYS + column, num_ranks * experts_per_rank,
            0, num_experts, 1, None, ROWS, KEYS,
        )  # fmt: skip
    else:
        best = tl.full([ROWS], 1 << 62, tl.int64)
        for first in range(block * tokens_per_block, (block + 1) * tokens_per_block, ROWS):
            tokens = first + tl.arange(0, ROWS)
            best = tl.minimum(
                best, first_error(topk_idx, stride, tokens, limit, topk, num_experts, ROWS)
            )
        tl.store(errors + block, tl.min(best, axis=0))


@jit
def first_error(topk_idx, stride, tokens, num_tokens, topk, num_experts, ROWS: tl.constexpr):
    """[ROWS] int64: (token · K + entry) · 4 + ERROR_… of each token's first error, or a larger number."""
    mask = tokens < num_tokens
    at = topk_idx + tokens.to(tl.int64) * stride
    best = tl.full([ROWS], 1 << 62, tl.int64)
    for k in range(topk):
        expert = tl.load(at + k, mask=mask, other=-1)
        error = ((expert < -1) | (expert >= num_experts)).to(tl.int32)
        for j in range(k):
            same = tl.load(at + j, mask=mask, other=-1) == expert
            error = tl.where(same & (expert >= 0) & (error == 0), 2, error)
        found = (tokens.to(tl.int64) * topk + k) * 4 + error
        best = tl.minimum(best, tl.where(error > 0, found, 1 << 62))
    return best


@jit
def route_number(
    lane_rows, round_starts, rank_counts, expert_counts, error, counts, errors,
    topk_idx, stride, num_tokens, limit, topk, tokens_per_block, capacity,
    num_experts, experts_per_rank, lane_of_rank, num_lanes, num_ranks, lane_tiles, rank_tiles, expert_tiles,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Second half: every block numbers its tokens; the first one also adds up what is only counted."""
    block, tile, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    column = tl.arange(0, KEYS)
    if tile < lane_tiles:
        number_block(
            lane_rows, None, round_starts, counts, topk_idx, stride, block, tokens_per_block, num_tokens,
            load_number(limit, num_tokens), topk, capacity, tile * KEYS + column, num_lanes,
            0, num_experts, experts_per_rank, lane_of_rank, ROWS, KEYS,
        )  # fmt: skip
    elif block == 0:
        if tile < lane_tiles + rank_tiles:
            columns = (tile - lane_tiles) * KEYS + column
            total = rows_before(counts + blocks * num_lanes, blocks, columns, num_ranks, ROWS, KEYS)
            tl.store(rank_counts + columns, total, mask=columns < num_ranks)
        elif tile < lane_tiles + rank_tiles + expert_tiles:
            columns = (tile - lane_tiles - rank_tiles) * KEYS + column
            num_copies = num_ranks * experts_per_rank
            counts += blocks * (num_lanes + num_ranks)
            total = rows_before(counts, blocks, columns, num_copies, ROWS, KEYS)
            tl.store(expert_counts + columns, total, mask=columns < num_copies)
        else:
            first = tl.full([ROWS], 1 << 62, tl.int64)
            for some in range(0, blocks, ROWS):
                rows = some + tl.arange(0, ROWS)
                found = tl.load(errors + rows, mask=rows < blocks, other=1 << 62)
                first = tl.minimum(first, found)
            found = tl.min(first, axis=0)
            none = found == 1 << 62
            at = (found >> 2).to(tl.int32)  # a 64-bit division would be a call
            tl.store(error, tl.where(none, 0, found & 3).to(tl.int32))
            tl.store(error + 1, tl.where(none, 0, at // topk))
            tl.store(error + 2, tl.where(none, 0, at % topk))


def route_triton(
    topk_idx: Tensor,
    lane_of_rank: Tensor,
    *,
    num_experts: int,
    num_ranks: int,
    num_lanes: int,
    capacity: int,
    num_tokens: Tensor | None = None,
) -> Routed:
    topk_idx = topk_idx if topk_idx.stride(1) == 1 else topk_idx.contiguous()
    num_rows, topk = topk_idx.shape
    ids = Ids(topk_idx, 0, topk_idx.stride(0), num_rows, topk, num_tokens)
    per_rank = up(num_experts, num_ranks)
    num_rounds = max(1, up(num_rows, capacity))

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        make = torch.empty if num_rows else torch.zeros
        return make(shape, dtype=dtype, device=topk_idx.device)

    out = Routed(
        empty(num_rows, num_lanes),
        empty(num_rounds + 1, num_lanes),
        empty(num_ranks),
        empty(num_ranks * per_rank),
        empty(3),
    )
    counts = empty(ids.num_blocks * (num_lanes + num_ranks + num_ranks * per_rank))
    errors = empty(ids.num_blocks, dtype=torch.int64)
    tiles = [up(n, KEYS) for n in (num_lanes, num_ranks, num_ranks * per_rank)]
    grid = ids.num_blocks, sum(tiles) + 1
    launch(
        route_count, grid, counts, errors, topk_idx, ids.stride, num_rows, num_tokens, topk, ids.rows_per_block,
        num_experts, per_rank, lane_of_rank, num_lanes, num_ranks, *tiles, ROWS=ROWS, KEYS=KEYS,
    )  # fmt: skip
    launch(
        route_number, grid, *out, counts, errors, topk_idx, ids.stride, num_rows, num_tokens, topk, ids.rows_per_block,
        capacity, num_experts, per_rank, lane_of_rank, num_lanes, num_ranks, *tiles, ROWS=ROWS, KEYS=KEYS,
    )  # fmt: skip
    return out


def round_starts_torch(lane_rows: Tensor, *, capacity: int) -> Tensor:
    """Rows of each lane before each round of C tokens: [n + 1, D] int32, n = max(1, ⌈T/C⌉).

    By itself for combines and cached dispatches, which know `lane_rows` and have a C of their own.
    """
    num_tokens, num_lanes = lane_rows.shape
    before = (lane_rows >= 0).cumsum(0, dtype=torch.int32)
    before = torch.cat([before.new_zeros((1, num_lanes)), before])  # [T + 1, D]
    num_rounds = max(1, -(-num_tokens // capacity))
    first = torch.arange(num_rounds + 1, device=lane_rows.device) * capacity
    return before[first.clamp(max=num_tokens)]


@jit
def count_rounds(
    round_starts, lane_rows, stride, num_tokens, capacity, num_lanes, ROWS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """The rows of round r in each lane, where round r + 1 will have its start."""
    round_idx = tl.program_id(0)
    columns = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    total = tl.zeros([KEYS], dtype=tl.int32)
    last = tl.minimum(num_tokens, (round_idx + 1) * capacity)
    for first in range(round_idx * capacity, last, ROWS):
        tokens = first + tl.arange(0, ROWS)
        mask = (tokens < last)[:, None] & (columns < num_lanes)[None, :]
        at = tokens.to(tl.int64)[:, None] * stride + columns[None, :]
        total += tl.sum((tl.load(lane_rows + at, mask=mask, other=-1) >= 0).to(tl.int32), axis=0)
    tl.store(round_starts + (round_idx + 1) * num_lanes + columns, total, mask=columns < num_lanes)


@jit
def add_rounds(round_starts, num_rounds, num_lanes, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Counts to starts, in place."""
    columns = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    seen = tl.zeros([KEYS], dtype=tl.int32)
    for first in range(0, num_rounds + 1, ROWS):
        rounds = first + tl.arange(0, ROWS)
        at = round_starts + rounds[:, None] * num_lanes + columns[None, :]
        mask = (rounds <= num_rounds)[:, None] & (columns < num_lanes)[None, :]
        counts = tl.load(at, mask=mask & (rounds > 0)[:, None], other=0)
        tl.store(at, tl.cumsum(counts, axis=0) + seen[None, :], mask=mask)
        seen += tl.sum(counts, axis=0)


def round_starts_triton(lane_rows: Tensor, *, capacity: int) -> Tensor:
    lane_rows = lane_rows if lane_rows.stride(1) == 1 else lane_rows.contiguous()
    num_tokens, num_lanes = lane_rows.shape
    rounds, tiles = max(1, up(num_tokens, capacity)), up(num_lanes, KEYS)
    out = torch.empty((rounds + 1, num_lanes), dtype=torch.int32, device=lane_rows.device)
    launch(
        count_rounds, (rounds, tiles), out, lane_rows, lane_rows.stride(0), num_tokens, capacity, num_lanes,
        ROWS=ROWS, KEYS=KEYS,
    )  # fmt: skip
    launch(add_rounds, (tiles,), out, rounds, num_lanes, ROWS=ROWS, KEYS=KEYS)
    return out


def _hits(index: Tensor, num: int) -> Tensor:
    """[T, num] bool: whether `index` [T, K] names it at least once; `num` itself means nothing."""
    hits = torch.zeros((index.shape[0], num + 1), dtype=torch.bool, device=index.device)
    return hits.scatter_(1, index, True)[:, :num]


def _first_error(topk_idx: Tensor, valid: Tensor) -> Tensor:
    """The first entry, by token and then by k, that is out of range or names an expert again."""
    num_topk = topk_idx.shape[1]
    out_of_range = ~valid & (topk_idx != -1)
    same = topk_idx[:, :, None] == topk_idx[:, None, :]
    twice = same.tril(-1).any(2) & valid
    kind = torch.where(out_of_range, ERROR_RANGE, torch.where(twice, ERROR_TWICE, ERROR_NONE))
    kind = kind.flatten()
    at = (kind != ERROR_NONE).int().argmax()  # the first maximum; entry 0 if all is well
    token = torch.div(at, num_topk, rounding_mode="floor")
    return torch.stack([kind[at], token, at - token * num_topk]).int()
