"""Handle: what a combine, or a cached dispatch, needs from the dispatch it belongs to. Plain tensors and numbers.

Self-contained: any number may be alive, in any order, across micro-batches, also after their Buffer was replaced by
another one of the same group. Rows are counted over the whole call, not per round, so that a combine with another row
size (and so another C) finds its own rounds: those of the source tokens.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("rank", "expert", "padded")
HOPS = ("node", "rank")


@dataclasses.dataclass
class Handle:
    """Made by `Buffer.dispatch`; opaque to users. All tensors int32 on the Buffer's device unless said otherwise.

    Numbers that a device has not told the host are 0: `number`, `tokens_of` and `totals`.

    A handle of a hooked dispatch is complete once the hook was called; using it earlier is an error.
    """

    group_key: int  # of the EPGroup: a handle of another group is refused
    # Names the dispatch: a digest of all ranks' routing (kernels: of the first round's), the same on all ranks.
    number: int
    rank: int
    hops: str
    layout: str
    num_experts: int
    topk: int
    num_tokens: int  # T of this rank
    num_places: int  # rows of y: received rows, or places in the expert layout, or L * capacity
    place_shape: tuple[int, ...]  # y's shape without H
    tokens_of: tuple[int, ...]  # [R] T of every rank
    totals: tuple[int, ...]  # [R] rows received from each rank
    forward_counts: tuple[int, ...]  # [N] rows forwarded for each node's rail peer
    lane_rows: Tensor  # [T, D] row in each lane, or -1 (lanes: csrc/exchange.hpp)
    recv_tokens: Tensor  # [rows] source token, by (source rank, source token)
    positions: Tensor  # [rows, K] place in y of each copy, or -1; [0, K] for layout="rank"
    forward_tokens: Tensor  # [sum of forward_counts]
    forward_rows: Tensor  # [sum of forward_counts, G]
    tokens_per_expert: Tensor  # [L] int64
    told: Tensor  # int64: what kernels know of the sources (kernels/headers.cuh: Told and tables); else empty
    generation: int = 0  # of the Buffer: a recovery ends the handles before it
    chunk: int = 0  # of kernels: no rank had more tokens in a round (kernel_rounds.py)
    complete: bool = True
    parts: Any = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )  # likewise: once they were made

    @property
    def num_recv_rows(self) -> int:
        """Rows received: one for each (token, this rank); on a device whose host knows no number, room for them."""
        return len(self.recv_tokens)

    def to_tensors(self) -> list[Tensor]:
        """For `torch.library` and `save_for_backward`: a list of tensors that `from_tensors` reads. No two are the
        same, as an op may not return one tensor twice; empty tables are shared otherwise."""
        numbers = [
            self.group_key, self.number, self.rank, HOPS.index(self.hops), LAYOUTS.index(self.layout),
            self.num_experts, self.topk, self.num_tokens, self.num_places, self.generation, self.chunk,
            len(self.place_shape), *self.place_shape,
            len(self.tokens_of), *self.tokens_of, len(self.totals), *self.totals,
            len(self.forward_counts), *self.forward_counts,
        ]  # fmt: skip
        tables = (
            self.lane_rows, self.recv_tokens, self.positions, self.forward_tokens, self.forward_rows,
            self.tokens_per_expert, self.told,
        )  # fmt: skip
        own = [table if table.numel() else table.new_empty(table.shape) for table in tables]
        return [torch.tensor(numbers, dtype=torch.int64), *own]

    @staticmethod
    def num_numbers(place_dims: int, num_ranks: int, num_nodes: int) -> int:
        """The length of the first of `to_tensors`: eleven numbers, then four lists, each with its length."""
        return 11 + 1 + place_dims + 2 * (1 + num_ranks) + 1 + num_nodes

    @classmethod
    def from_tensors(cls, tensors: list[Tensor]) -> "Handle":
        numbers = tensors[0].tolist()
        fields, at = numbers[:11], 11
        lists = []
        for _ in range(4):
            length = numbers[at]
            lists.append(tuple(numbers[at + 1 : at + 1 + length]))
            at += 1 + length
        (
            group_key,
            number,
            rank,
            hops,
            layout,
            num_experts,
            topk,
            num_tokens,
            num_places,
            generation,
            chunk,
        ) = fields
        place_shape, tokens_of, totals, forward_counts = lists
        lane_rows, recv_tokens, positions, forward_tokens, forward_rows, counts, told = tensors[1:8]
        return cls(
            group_key, number, rank, HOPS[hops], LAYOUTS[layout], num_experts, topk, num_tokens, num_places,
            place_shape, tokens_of, totals, forward_counts, lane_rows, recv_tokens, positions,
            forward_tokens, forward_rows, counts, told, generation, chunk,
        )  # fmt: skip
