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
) -> Routed:
    """`topk_idx` [T, K] int64 (−1: none), `lane_of_rank` [R] int32, C tokens in a round."""
    num_tokens = topk_idx.shape[0]
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
        _first_error(topk_idx, valid) if num_tokens else topk_idx.new_zeros(3, dtype=torch.int32),
    )


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
