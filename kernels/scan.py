"""Numbering by prefix sums, the heart of route, forward_tables and places. No atomic decides an order.

Each id of a row has a **key** (a lane, a rank, an expert) or none, and a row counts once for each of its keys. Rows are
dealt to at most MAX_BLOCKS blocks of consecutive rows; one kernel counts the rows of each block by key, the next adds
up the blocks before its own and numbers its rows. Two launches whatever the number of rows, linear work.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .language import jit, launch, load_number, tl, up

ROWS = 32  # of one step of a block
KEYS = 32  # of one program
MAX_BLOCKS = 128


class Ids(NamedTuple):
    """Where the ids of n rows are: integer [n, topk] at `first`, `stride` items apart from row to row."""

    pointer: Tensor
    first: int
    stride: int
    num_rows: int
    topk: int
    limit: Tensor | None  # NOTE [numbers on the device]

    @classmethod
    def in_rows(cls, rows: Tensor, at: int, topk: int, limit: Tensor | None) -> "Ids":
        """int32 at byte `at` of rows [n, row_bytes] uint8."""
        return cls(rows, at // 4, rows.stride(0) // 4, rows.shape[0], topk, limit)

    @property
    def rows_per_block(self) -> int:
        return ROWS * max(1, up(self.num_rows, ROWS * MAX_BLOCKS))

    @property
    def num_blocks(self) -> int:
        return up(self.num_rows, self.rows_per_block)


class Keys(NamedTuple):
    """id → (id − first_expert) // experts_per_key → table, if there is one → key < num_keys, or none."""

    num_keys: int
    first_expert: int
    num_experts: int
    experts_per_key: int
    table: Tensor | None = None

    @property
    def tiles(self) -> int:
        return up(self.num_keys, KEYS)


@jit
def ids_at(pointer, WORDS: tl.constexpr):
    """Ids in the bytes of rows (WORDS) are int32, those in a tensor have its dtype."""
    if WORDS:
        return pointer.to(tl.pointer_type(tl.int32))
    else:
        return pointer


@jit
def key_of(ids, valid, first_expert, num_experts, experts_per_key, table):
    """int32 key of each id, or −1."""
    ids = ids - first_expert
    valid = valid & (ids >= 0) & (ids < num_experts)
    key = (
        tl.where(valid, ids, 0).to(tl.int32) // experts_per_key
    )  # a 64-bit division would be a call
    if table is not None:
        key = tl.load(table + key, mask=valid, other=-1)
    return tl.where(valid, key, -1)


@jit
def hits_of(
    ids, stride, rows, num_rows, topk, columns,
    first_expert, num_experts, experts_per_key, table,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """[ROWS, KEYS] int32: 1 where the row has an id of that key."""
    hits = tl.zeros([ROWS, KEYS], dtype=tl.int32)
    at = ids + rows.to(tl.int64) * stride
    for k in range(topk):
        id = tl.load(at + k, mask=rows < num_rows, other=-1)
        key = key_of(id, rows < num_rows, first_expert, num_experts, experts_per_key, table)
        hits = hits | (key[:, None] == columns[None, :]).to(tl.int32)
    return hits


@jit
def count_block(
    counts, ids, stride, block, rows_per_block, num_rows, topk, columns, num_keys,
    first_expert, num_experts, experts_per_key, table,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`counts` [blocks, num_keys]: rows of this block by key."""
    total = tl.zeros([KEYS], dtype=tl.int32)
    for first in range(block * rows_per_block, (block + 1) * rows_per_block, ROWS):
        rows = first + tl.arange(0, ROWS)
        hits = hits_of(
            ids, stride, rows, num_rows, topk, columns, first_expert, num_experts, experts_per_key, table, ROWS, KEYS
        )  # fmt: skip
        total += tl.sum(hits, axis=0)
    tl.store(counts + block * num_keys + columns, total, mask=columns < num_keys)


@jit
def rows_before(counts, num_blocks, columns, num_keys, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """[KEYS]: the sum of `counts` over the first `num_blocks` blocks."""
    total = tl.zeros([KEYS], dtype=tl.int32)
    for first in range(0, num_blocks, ROWS):
        blocks = first + tl.arange(0, ROWS)
        mask = (blocks[:, None] < num_blocks) & (columns[None, :] < num_keys)
        part = tl.load(counts + blocks[:, None] * num_keys + columns[None, :], mask=mask, other=0)
        total += tl.sum(part, axis=0)
    return total


@jit
def count_keys(
    counts, ids, first_id, stride, num_rows, limit, topk, rows_per_block, num_keys,
    first_expert, num_experts, experts_per_key, table,
    WORDS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    count_block(
        counts, ids_at(ids, WORDS) + first_id, stride, tl.program_id(0), rows_per_block,
        load_number(limit, num_rows), topk, columns, num_keys,
        first_expert, num_experts, experts_per_key, table, ROWS, KEYS,
    )  # fmt: skip


def count(ids: Ids, keys: Keys) -> Tensor:
    """[blocks, num_keys] int32: rows by block and key. `ids` are in rows."""
    counts = torch.empty(
        (ids.num_blocks, keys.num_keys), dtype=torch.int32, device=ids.pointer.device
    )
    launch(
        count_keys, (ids.num_blocks, keys.tiles), counts, ids.pointer, ids.first, ids.stride, ids.num_rows, ids.limit,
        ids.topk, ids.rows_per_block, keys.num_keys, keys.first_expert, keys.num_experts, keys.experts_per_key,
        keys.table, WORDS=True, ROWS=ROWS, KEYS=KEYS,
    )  # fmt: skip
    return counts


@jit
def number_block(
    out, starts, round_starts, counts, ids, stride, block, rows_per_block, num_rows, limit, topk, capacity, columns,
    num_keys, first_expert, num_experts, experts_per_key, table,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`out` [n, num_keys] int32: numbers of this block's rows from `starts` on, −1 for others.

    `round_starts` [rounds + 1, num_keys], or None: how many rows are before each `capacity` rows.
    """
    mask = columns < num_keys
    seen = rows_before(counts, block, columns, num_keys, ROWS, KEYS)
    if starts is not None:
        seen += tl.load(starts + columns, mask=mask, other=0)
    for first in range(block * rows_per_block, (block + 1) * rows_per_block, ROWS):
        rows = first + tl.arange(0, ROWS)
        hits = hits_of(
            ids, stride, rows, limit, topk, columns, first_expert, num_experts, experts_per_key, table, ROWS, KEYS
        )  # fmt: skip
        before = tl.cumsum(hits, axis=0) - hits + seen[None, :]
        at = rows.to(tl.int64)[:, None] * num_keys + columns[None, :]
        inside = (rows < num_rows)[:, None] & mask[None, :]
        tl.store(out + at, tl.where(hits > 0, before, -1), mask=inside)
        if round_starts is not None:
            at = (rows // capacity)[:, None] * num_keys + columns[None, :]
            tl.store(round_starts + at, before, mask=inside & (rows % capacity == 0)[:, None])
        seen += tl.sum(hits, axis=0)
    if round_starts is not None:  # noqa: SIM102  (this one is decided when compiling)
        if block == tl.num_programs(0) - 1:
            last = (num_rows + capacity - 1) // capacity
            tl.store(round_starts + last * num_keys + columns, seen, mask=mask)
