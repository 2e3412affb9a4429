"""lanes: where the terms of a combine lie whose sums go by the lanes of topk_idx, from numbers only a device knows.

A *copy* is a (token, expert) pair. Copies that travel one by one lie in their window by (token, lane), so both sides
number them by a prefix sum: `copy_offsets` where they are sent, `lane_numbers` at their source. Sums of ranks count
where the last lane of that rank is. `lane_offsets` makes addresses of those numbers once windows are known;
`source_ranges` says of received copies, by expert, which rows are whose. One launch each, or two.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .language import jit, launch, tl, up

ROWS = 64  # of one step of a program
NO_TOKEN = 2**31 - 1


class Lanes(NamedTuple):
    """`numbers` [T, K] int32: of the row or copy in its owner's window, −1: none; `error` [3] int32 as route's: not 0
    if topk_idx is not the one that lane_rows was made from, the first such token (else NO_TOKEN), 0."""

    numbers: Tensor
    error: Tensor


class Copies(NamedTuple):
    """`offsets` [n · K] int64: of the copies of source s, `counts[s]` of them from `firsts[s]` on; `counts`, `firsts`
    [R] int32. Anything lies between them."""

    offsets: Tensor
    counts: Tensor
    firsts: Tensor


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


# --- twins ---------------------------------------------------------------------------------------


def lane_numbers_torch(
    topk_idx: Tensor, lane_rows: Tensor, *, experts_per_rank: int, num_experts: int, each_copy: bool
) -> Lanes:
    """`topk_idx` [T, K] int64 of this rank's tokens, `lane_rows` [T, R] int32 of their dispatch: a lane is a rank."""
    rows = lane_rows.long()
    valid = (topk_idx >= 0) & (topk_idx < num_experts)
    owner = torch.where(valid, topk_idx // experts_per_rank, 0)
    mine = torch.where(valid, rows.gather(1, owner), -1)  # of an absent rank: -1
    hits = rows.new_zeros((*topk_idx.shape, rows.shape[1]))
    hits.scatter_(2, owner[..., None], (mine >= 0).long()[..., None])
    missed = ((rows >= 0) & (hits.sum(1) == 0)).any(1) | (valid != (topk_idx != -1)).any(1)
    if each_copy:
        before = hits.view(-1, rows.shape[1]).cumsum(0).view(hits.shape) - hits
        mine = torch.where(mine >= 0, before.gather(2, owner[..., None])[..., 0], -1)
    else:
        later = hits.flip(1).cumsum(1).flip(1) - hits
        mine = torch.where(later.gather(2, owner[..., None])[..., 0] == 0, mine, -1)
    tokens = torch.arange(len(topk_idx), device=topk_idx.device)
    first = torch.where(missed, tokens, NO_TOKEN)
    first = torch.cat([first, first.new_full((1,), NO_TOKEN)]).min()
    error = torch.stack([(first < NO_TOKEN).long(), first, first * 0])
    return Lanes(mine.int(), error.int())


def copy_offsets_torch(
    positions: Tensor, rows: Tensor, starts: Tensor, *, row_bytes: int
) -> Copies:
    """`positions` [n, K] int32: the place of each received copy, −1: none; `rows`, `starts` [R] int32: how many rows of
    each source, and the first. Places are `row_bytes` apart."""
    topk = positions.shape[1]
    flat = positions.reshape(-1).long()
    before = torch.cat([flat.new_zeros(1), (flat >= 0).cumsum(0)])
    first, behind = before[starts.long() * topk], before[(starts + rows).long() * topk]
    firsts = starts.long() * topk
    source = torch.searchsorted(firsts, torch.arange(len(flat), device=flat.device), right=True) - 1
    inside = torch.arange(len(flat), device=flat.device) < ((starts + rows).long() * topk)[source]
    to = firsts[source] + before[:-1] - first[source]
    to = torch.where((flat >= 0) & inside, to, len(flat))
    offsets = flat.new_full((len(flat) + 1,), -1).scatter_(0, to, flat * row_bytes)
    return Copies(offsets[:-1], (behind - first).int(), firsts.int())


def lane_offsets_torch(
    topk_idx: Tensor, numbers: Tensor, rows: Tensor, windows: Tensor, *, experts_per_rank: int, row_bytes: int
) -> Tensor:  # fmt: skip
    """[T, K] int64 byte offsets, or −1: of number `numbers` in the window of its owner, `windows` [R] int64, which
    holds `rows` [R] int32."""
    owner = torch.where(numbers >= 0, topk_idx // experts_per_rank, 0)
    there = (numbers >= 0) & (numbers < rows[owner])
    return torch.where(there, windows[owner] + numbers.long() * row_bytes, -1)


def source_ranges_torch(ranges: Tensor, sums: Tensor, copies: Tensor) -> None:
    """Of `copies` [R, L] int32: `ranges` [L, R] int64, (first row << 32) + rows of each source; `sums` [L] int32."""
    counts = copies.t().long()
    ranges.copy_(((counts.cumsum(1) - counts) << 32) + counts)
    sums.copy_(counts.sum(1))


# --- Triton --------------------------------------------------------------------------------------


@jit
def number_lanes(
    numbers, worst_of, idx, idx_stride, lane_rows, rows_stride, num_tokens, topk, experts_per_rank, num_experts,
    no_token, EACH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The lanes of one rank; the first program also writes those of none."""
    rank = tl.program_id(0)
    lanes = tl.arange(0, LANES)[None, :]
    seen = tl.full((), 0, tl.int32)
    worst = tl.full((), 0, tl.int32) + no_token
    for first in range(0, num_tokens, ROWS):
        tokens = first + tl.arange(0, ROWS)
        real = tokens < num_tokens
        mask = real[:, None] & (lanes < topk)
        at = tokens.to(tl.int64)[:, None]
        ids = tl.load(idx + at * idx_stride + lanes, mask=mask, other=-1)
        valid = (ids >= 0) & (ids < num_experts)
        mine = tl.where(valid, ids // experts_per_rank, 0) == rank
        row = tl.load(lane_rows + tokens.to(tl.int64) * rows_stride + rank, mask=real, other=-1)
        there = valid & mine & (row >= 0)[:, None]
        one = there.to(tl.int32)
        of_token = tl.sum(one, axis=1)
        if EACH:
            before = tl.cumsum(of_token, axis=0) - of_token + seen
            number = before[:, None] + tl.cumsum(one, axis=1) - one
            seen += tl.sum(of_token, axis=0)
        else:
            last = tl.max(tl.where(there, lanes, -1), axis=1)
            number = tl.where(lanes == last[:, None], row[:, None], -1)
        stray = tl.max((valid != (ids != -1)).to(tl.int32), axis=1)
        missed = ((row >= 0) & (of_token == 0)) | (stray > 0)
        worst = tl.minimum(worst, tl.min(tl.where(missed & real, tokens, no_token), axis=0))
        tl.store(numbers + at * topk + lanes, tl.where(there, number, -1), mask=mask & mine)
    tl.store(worst_of + rank, worst)


@jit
def first_error(error, worst_of, num_ranks, no_token, RANKS: tl.constexpr):
    rank = tl.arange(0, RANKS)
    worst = tl.min(tl.load(worst_of + rank, mask=rank < num_ranks, other=no_token), axis=0)
    tl.store(error, (worst < no_token).to(tl.int32))
    tl.store(error + 1, worst)
    tl.store(error + 2, 0)


def lane_numbers_triton(
    topk_idx: Tensor, lane_rows: Tensor, *, experts_per_rank: int, num_experts: int, each_copy: bool
) -> Lanes:
    topk_idx = topk_idx if topk_idx.stride(1) == 1 else topk_idx.contiguous()
    lane_rows = lane_rows if lane_rows.stride(1) == 1 else lane_rows.contiguous()
    numbers = lane_rows.new_empty(topk_idx.shape)
    num_ranks = lane_rows.shape[1]
    worst_of, error = lane_rows.new_empty(num_ranks), lane_rows.new_empty(3)
    launch(
        number_lanes, (num_ranks,), numbers, worst_of, topk_idx, topk_idx.stride(0), lane_rows,
        lane_rows.stride(0), *topk_idx.shape, experts_per_rank, num_experts, NO_TOKEN, EACH=each_copy, ROWS=ROWS,
        LANES=_power_of_two(topk_idx.shape[1]),
    )  # fmt: skip
    launch(first_error, (1,), error, worst_of, num_ranks, NO_TOKEN, RANKS=_power_of_two(num_ranks))
    return Lanes(numbers, error)


@jit
def number_copies(
    offsets, counts, firsts, positions, stride, rows, starts, topk, row_bytes, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The copies of one source."""
    source = tl.program_id(0)
    lanes = tl.arange(0, LANES)[None, :]
    first, num_rows = tl.load(starts + source), tl.load(rows + source)
    seen = tl.full((), 0, tl.int32)
    out = offsets + first.to(tl.int64) * topk
    for i in range(0, num_rows, ROWS):
        row = i + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (lanes < topk)
        at = (first + row).to(tl.int64)[:, None] * stride + lanes
        place = tl.load(positions + at, mask=mask, other=-1)
        one = (place >= 0).to(tl.int32)
        of_row = tl.sum(one, axis=1)
        before = tl.cumsum(of_row, axis=0) - of_row + seen
        number = before[:, None] + tl.cumsum(one, axis=1) - one
        tl.store(out + number, place.to(tl.int64) * row_bytes, mask=place >= 0)
        seen += tl.sum(of_row, axis=0)
    tl.store(counts + source, seen)
    tl.store(firsts + source, first * topk)


def copy_offsets_triton(
    positions: Tensor, rows: Tensor, starts: Tensor, *, row_bytes: int
) -> Copies:
    positions = positions if positions.stride(1) == 1 else positions.contiguous()
    topk = positions.shape[1]
    out = Copies(
        torch.empty(positions.numel(), dtype=torch.int64, device=positions.device),
        torch.empty_like(rows),
        torch.empty_like(rows),
    )
    launch(
        number_copies, (len(rows),), *out, positions, positions.stride(0), rows, starts, topk, row_bytes, ROWS=ROWS,
        LANES=_power_of_two(topk),
    )  # fmt: skip
    return out


@jit
def offsets_of_lanes(
    out, idx, idx_stride, numbers, rows, windows, topk, num_values, experts_per_rank, row_bytes, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_values
    number = tl.load(numbers + at, mask=mask, other=-1)
    some = mask & (number >= 0)
    token = (at // topk).to(tl.int64)
    owner = tl.load(idx + token * idx_stride + at % topk, mask=some, other=0) // experts_per_rank
    there = some & (number < tl.load(rows + owner, mask=some, other=0))
    offset = tl.load(windows + owner, mask=there, other=0) + number.to(tl.int64) * row_bytes
    tl.store(out + at, tl.where(there, offset, -1), mask=mask)


def lane_offsets_triton(
    topk_idx: Tensor, numbers: Tensor, rows: Tensor, windows: Tensor, *, experts_per_rank: int, row_bytes: int
) -> Tensor:  # fmt: skip
    topk_idx = topk_idx if topk_idx.stride(1) == 1 else topk_idx.contiguous()
    out = torch.empty(topk_idx.shape, dtype=torch.int64, device=topk_idx.device)
    launch(
        offsets_of_lanes, (up(out.numel(), 512),), out, topk_idx, topk_idx.stride(0), numbers.contiguous(), rows,
        windows, topk_idx.shape[1], out.numel(), experts_per_rank, row_bytes, BLOCK=512,
    )  # fmt: skip
    return out


@jit
def ranges_of_sources(ranges, sums, copies, stride, num_sources, SOURCES: tl.constexpr):
    expert = tl.program_id(0)
    source = tl.arange(0, SOURCES)
    mask = source < num_sources
    count = tl.load(copies + source * stride + expert, mask=mask, other=0)
    first = (tl.cumsum(count, axis=0) - count).to(tl.int64)
    at = expert * num_sources + source
    tl.store(ranges + at, (first << 32) + count.to(tl.int64), mask=mask)
    tl.store(sums + expert, tl.sum(count, axis=0))


def source_ranges_triton(ranges: Tensor, sums: Tensor, copies: Tensor) -> None:
    copies = copies if copies.stride(1) == 1 else copies.contiguous()
    num_sources, num_experts = copies.shape
    launch(
        ranges_of_sources, (num_experts,), ranges, sums, copies, copies.stride(0), num_sources,
        SOURCES=_power_of_two(num_sources),
    )  # fmt: skip
