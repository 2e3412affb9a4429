"""EPHandle: what `ElasticBuffer.dispatch` returns for combine and for repeating the dispatch."""

import dataclasses

import torch
from torch import Tensor

from ..arguments import Found, wrong
from .routes import Routes


@dataclasses.dataclass(eq=False)
class EPHandle:
    """DeepEP's attributes. R ranks, L local experts, M tokens per rank at most, T tokens here, N rows received, one per
    (token, rank), N_e copies, alignment gaps included. Tensors int32 unless said otherwise.

    - `topk_idx` [T, K] int64: the routing, a copy unless do_handle_copy=False.
    - `num_recv_tokens_per_expert_list` [L]: counts rounded up to `expert_alignment`; empty without CPU sync.
    - `psum_num_recv_tokens_per_scaleup_rank` [R]: rows from ranks 0…i; the last is N.
    - `psum_num_recv_tokens_per_expert` [L]: sums of rounded counts up to expert i; expanded, where its copies end (the
      rounded counts of those before it, and its own count).
    - `num_unaligned_recv_tokens_per_expert` [L]: counts; None unless expanded.
    - `recv_src_metadata` [N, 2 + K]: source rank · M + source token; the row's last lane with an expert here, where
      combine adds it; the place of each lane's copy if expanded, else −1. Rows past N are −1. It may be replaced
      by one whose rows (and places) are in another order: combine then takes rows in that order.
    - `dst_buffer_slot_idx` [T, K]: number of the token among those this rank sends to the owner of that expert, or −1.
    - `token_metadata_at_forward`, `channel_linked_list`: None, as in DeepEP without a second level.
    - `num_recv_tokens`, `num_expanded_tokens`: rows of the outputs: N and N_e, or the worst case without CPU sync.

    It holds no memory of the Buffer, and may be used in any order, and after its Buffer was replaced.
    """

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: Tensor
    psum_num_recv_tokens_per_expert: Tensor
    num_unaligned_recv_tokens_per_expert: Tensor | None
    recv_src_metadata: Tensor
    dst_buffer_slot_idx: Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    token_metadata_at_forward: Tensor | None
    channel_linked_list: Tensor | None
    _routes: Routes = dataclasses.field(repr=False)
    _metadata: tuple[Tensor, int] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if (
            self.recv_src_metadata.is_inference()
        ):  # such a tensor does not count what is written to it
            with torch.inference_mode(False):
                self.recv_src_metadata = self.recv_src_metadata.clone()
        self._metadata = (self.recv_src_metadata, self.recv_src_metadata._version)

    @classmethod
    def of(
        cls,
        routes: Routes,
        topk_idx: Tensor,
        *,
        do_expand: bool,
        alignment: int,
        max_tokens: int,
        num_sms: int,
        is_synced: bool,
    ) -> "EPHandle":
        """Of one dispatch. `max_tokens`: M; without CPU sync it sizes the outputs."""
        inner, counts = routes.compact, routes.tokens_per_expert
        num_ranks = len(inner.totals)
        aligned = (counts + alignment - 1) // alignment * alignment
        psum = aligned.cumsum(0)
        if do_expand:
            psum = psum - aligned + counts
        num_rows, num_places = routes.num_rows, routes.num_places
        if not is_synced:
            num_local = len(counts)
            copies = num_ranks * max_tokens * min(inner.topk, num_local)
            num_rows = num_ranks * max_tokens
            num_places = _up(copies + (alignment - 1) * num_local, alignment)
        return cls(
            do_expand=do_expand,
            num_experts=inner.num_experts,
            expert_alignment=alignment,
            num_max_tokens_per_rank=max_tokens,
            num_sms=num_sms,
            topk_idx=topk_idx,
            num_recv_tokens_per_expert_list=aligned.tolist() if is_synced else [],
            psum_num_recv_tokens_per_scaleup_rank=torch.tensor(inner.totals)
            .cumsum(0)
            .int()
            .to(counts.device),
            psum_num_recv_tokens_per_expert=psum.int(),
            num_unaligned_recv_tokens_per_expert=counts.int() if do_expand else None,
            recv_src_metadata=_metadata_of(routes, max_tokens, do_expand, num_rows),
            dst_buffer_slot_idx=_slots_of(routes, topk_idx, num_ranks),
            num_recv_tokens=num_rows,
            num_expanded_tokens=num_places,
            token_metadata_at_forward=None,
            channel_linked_list=None,
            _routes=routes,
        )

    def num_rows(self, expand: bool) -> int:
        """Rows of a dispatch's outputs in this layout."""
        return self.num_expanded_tokens if expand else self.num_recv_tokens

    def reordered(self) -> tuple[Tensor | None, Tensor | None]:
        """(order, positions) if `recv_src_metadata` was replaced or written to: `order` [N], the row that stands for
        each row of ours; `positions` [N, K], places of copies, expanded only. (None, None) if it was not.

        Raises: ArgumentError unless its first column names the rows of this dispatch.
        """
        given = self.recv_src_metadata
        if given is self._metadata[0] and given._version == self._metadata[1]:
            return None, None
        routes = self._routes
        ours = _sources(routes, self.num_max_tokens_per_rank)
        shape = (routes.num_rows, 2 + routes.compact.topk)
        if not (isinstance(given, Tensor) and given.dim() == 2 and given.shape[1] == shape[1]):
            raise wrong("handle.recv_src_metadata", f"int32 {shape}", given)
        sources, order = given[: shape[0], 0].long().sort(stable=True)
        if not torch.equal(sources, ours):
            raise wrong(
                "handle.recv_src_metadata",
                "the rows of its dispatch in some order",
                Found("other source tokens"),
            )
        return order, given[order, 2:].int().contiguous() if self.do_expand else None


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _sources(routes: Routes, max_tokens: int) -> Tensor:
    """[N] int64: source rank · M + source token, ascending."""
    totals = torch.tensor(routes.compact.totals)
    rank = torch.repeat_interleave(torch.arange(len(totals)), totals)
    tokens = routes.compact.recv_tokens.long()
    return rank.to(tokens.device) * max_tokens + tokens


def _metadata_of(routes: Routes, max_tokens: int, expand: bool, num_rows: int) -> Tensor:
    topk, where = routes.compact.topk, routes.topk_idx.device
    found = torch.full((num_rows, 2 + topk), -1, dtype=torch.int32, device=where)
    lanes = torch.where(routes.topk_idx >= 0, torch.arange(topk, device=where), -1)
    found[: routes.num_rows, 0] = _sources(routes, max_tokens).int()
    found[: routes.num_rows, 1] = lanes.max(1).values.int()
    if expand:
        found[: routes.num_rows, 2:] = routes.expanded.positions
    return found


def _slots_of(routes: Routes, topk_idx: Tensor, num_ranks: int) -> Tensor:
    sent = routes.compact.lane_rows >= 0  # [T, R]: hops="rank" has a lane for each rank
    rows = sent.cumsum(0) - 1  # over all rounds
    idx = topk_idx.long()
    owner = idx.clamp(min=0) // -(-routes.compact.num_experts // num_ranks)
    return torch.where(idx >= 0, rows.gather(1, owner), -1).int()
