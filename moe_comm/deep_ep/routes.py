"""One dispatch in both of its layouts: what `ElasticBuffer` and `HybridEPBuffer` keep of it.

`moe_comm`'s handle belongs to one layout. DeepEP repeats a dispatch in the layout of the call's arguments, and with new
weights; for that the received local ids are kept, and the other layout's places follow from them.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_rows, wrong
from ..buffer import Buffer
from ..dispatch import Dispatched, no_rows
from ..handle import Handle


@dataclasses.dataclass(frozen=True)
class Routes:
    """What this rank received in one dispatch: N rows, one per (token, rank), and the places of their copies.

    `topk_idx` [N, K] int64: local expert, −1 elsewhere. `tokens_per_expert` [L] int64: copies. `compact` and `expanded`
    are `moe_comm` handles of layouts "rank" and "expert"; `expanded.positions` [N, K] int32 is each copy's place.
    """

    compact: Handle
    expanded: Handle
    topk_idx: Tensor

    @classmethod
    def of(cls, got: Dispatched, alignment: int) -> "Routes":
        """Of a dispatch with layout "rank" or "expert"; groups of the expanded layout are multiples of `alignment`."""
        handle = got.handle
        assert got.topk_idx is not None
        if handle.layout == "expert":
            return cls(_compact(handle), handle, _ids_of(handle.positions, got.topk_idx))
        positions, num_places = places_of(got.topk_idx, handle.tokens_per_expert, alignment)
        return cls(handle, _expanded(handle, positions, num_places), got.topk_idx)

    @property
    def num_rows(self) -> int:
        return len(self.topk_idx)

    @property
    def num_places(self) -> int:
        return self.expanded.num_places

    @property
    def tokens_per_expert(self) -> Tensor:
        return self.compact.tokens_per_expert

    def handle(self, expand: bool) -> Handle:
        return self.expanded if expand else self.compact

    def dispatch_again(
        self, buffer: Buffer, x: Any, weights: Tensor | None, expand: bool
    ) -> tuple[Any, Tensor | None]:
        """The same rows of another x, a tensor or a pair (payload, scales); `weights` float32 [T, K] travel along.

        Returns x, and the weights that came: [N, K], 0 where `topk_idx` is −1; expanded, [P], 0 in the gaps.
        """
        layout = "expert" if expand else "rank"
        sent, num_scales, scale_dtype = x, 0, None
        if weights is not None:  # they travel as scales do
            extra = weights.detach().float().contiguous().view(torch.int32)
            if isinstance(x, (tuple, list)):
                payload, scales = x
                num_scales, scale_dtype = scales.shape[1], scales.dtype
                extra = torch.cat([scales.contiguous().view(torch.int32), extra], 1)
                sent = (payload, extra)
            else:
                sent = (x, extra)
        got = buffer.dispatch(sent, handle=self.handle(expand), layout=layout).x
        if weights is None:
            return got, None
        rows, extra = got
        lanes = extra[:, num_scales:].contiguous().view(torch.float32)
        if scale_dtype is not None:
            rows = (rows, extra[:, :num_scales].contiguous().view(scale_dtype))
        if not expand:
            return rows, torch.where(self.topk_idx >= 0, lanes, 0.0)
        row, lane = (self.expanded.positions >= 0).nonzero(as_tuple=True)
        place = self.expanded.positions[row, lane].long()
        placed = lanes.new_zeros(self.num_places)
        placed[place] = lanes[place, lane]
        return rows, placed


def check_again(x: Any, weights: Any, handle: Handle) -> None:
    """Raises ArgumentError unless `dispatch_again` can send these."""
    shape = (handle.num_tokens, handle.topk)
    check_rows(
        "x", x[0] if isinstance(x, (tuple, list)) and x else x, where=handle.lane_rows.device
    )
    if weights is None:
        return
    if not (isinstance(weights, Tensor) and weights.is_floating_point() and weights.shape == shape):
        raise wrong("topk_weights", f"float32 {shape}", weights)
    if isinstance(x, (tuple, list)):
        scales = x[1] if len(x) == 2 else None
        if not (
            isinstance(scales, Tensor)
            and scales.dim() == 2
            and scales.element_size() == 4
            and len(scales) == handle.num_tokens
        ):
            raise wrong("x[1]", f"scales [{handle.num_tokens}, S] of 4-byte items", scales)


def places_of(ids: Tensor, counts: Tensor, alignment: int) -> tuple[Tensor, int]:
    """Place of each copy, grouped by local expert, groups rounded up to `alignment`: int32 [N, K] (−1), and their sum.

    `ids` [N, K] local experts or −1; `counts` [L]. Inside a group the order is that of the rows.
    """
    sizes = (counts + alignment - 1) // alignment * alignment
    row, lane = (ids >= 0).nonzero(as_tuple=True)
    expert = ids[row, lane]
    order = torch.argsort(expert, stable=True)
    expert = expert[order]
    starts = sizes.cumsum(0) - sizes - (counts.cumsum(0) - counts)
    positions = torch.full(ids.shape, -1, dtype=torch.int32, device=ids.device)
    numbers = torch.arange(len(expert), device=ids.device)
    positions[row[order], lane[order]] = (starts[expert] + numbers).int()
    return positions, int(sizes.sum())


def _ids_of(positions: Tensor, expert_of_place: Tensor) -> Tensor:
    if not len(expert_of_place):
        return torch.full(positions.shape, -1, dtype=torch.int64, device=positions.device)
    return torch.where(positions >= 0, expert_of_place[positions.clamp(min=0).long()], -1)


def _compact(handle: Handle) -> Handle:
    rows = handle.num_recv_rows
    none = no_rows(handle.topk, handle.positions.device)
    return dataclasses.replace(
        handle, layout="rank", num_places=rows, place_shape=(rows,), positions=none
    )


def _expanded(handle: Handle, positions: Tensor, num_places: int) -> Handle:
    return dataclasses.replace(
        handle,
        layout="expert",
        num_places=num_places,
        place_shape=(num_places,),
        positions=positions,
    )
