"""A whole exchange made of nothing but the steps of kernels/: R ranks in one process, no engine, nobody waits.

Each rank's window segment is a tensor laid out by WindowLayout, a link is a copy of bytes between two segments, and the
steps run in an order in which ranks could run them. This is the shape of the path on a device: what a device adds is
who waits for whom.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moe_comm._engine import HEADER_BYTES
from moe_comm.group import Topology
from moe_comm.kernels import TORCH as step
from moe_comm.layout import RowFormat, WindowLayout, counts_bytes


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


@dataclasses.dataclass
class Inputs:
    """One dispatch: a tensor of each rank."""

    xs: list
    scales: list | None
    idx: list
    weights: list
    num_experts: int
    layout: str = "rank"
    alignment: int = 1
    capacity: int | None = None

    @property
    def topk(self):
        return self.idx[0].shape[1]

    def row_format(self):
        x, scales = self.xs[0], self.scales and self.scales[0]
        scale_bytes = scales.shape[1] * scales.element_size() if self.scales else 0
        return RowFormat.of_dispatch(
            x.shape[1] * x.element_size(), scale_bytes, self.topk, weights=True
        )


@dataclasses.dataclass
class SimulatedHandle:
    """One rank's, by the names of moe_comm's Handle; `received` and `next_places` are its progress as a reader."""

    routed: Any
    totals: list
    recv_tokens: Tensor
    positions: Tensor
    forward_tokens: list  # [N] int32 [rows of that node's rail peer]
    forward_rows: list  # [N] int32 [rows, G]
    next_places: list  # [R] int32 [L]
    received: list  # [R]


class Ranks:
    """All ranks' segments. Rank r sees the topology `at[r]`. Every byte of a window starts as garbage."""

    def __init__(self, nodes, hops, row_bytes, capacity, num_experts):
        num_ranks = sum(len(node) for node in nodes)
        self.at = [Topology.from_nodes(r, nodes) for r in range(num_ranks)]
        t = self.at[0]
        self.all, self.hops = range(num_ranks), hops
        self.num_nodes, self.node_ranks = t.num_nodes, t.node_ranks
        self.layout = WindowLayout.for_rows(
            num_ranks, t.num_nodes, hops, capacity=capacity, row_bytes=row_bytes, num_experts=num_experts
        )  # fmt: skip
        self.offsets = self.layout.offsets()
        garbage = torch.full((self.offsets["segment"],), 0xA5, dtype=torch.uint8)
        self.segments = [garbage.clone() for _ in self.all]
        self.num_experts, self.experts_per_rank = num_experts, -(-num_experts // num_ranks)
        self.counts = counts_bytes(num_experts, num_ranks, t.node_ranks, by_node=hops == "node")
        self.num_rows = {}  # what headers say: (rank, offset of a window) -> rows

    def owned(self, rank):
        return max(0, min(self.experts_per_rank, self.num_experts - rank * self.experts_per_rank))

    def lanes(self, rank):
        """lane_of_rank [R] and D, as csrc/exchange.cpp numbers lanes."""
        t = self.at[rank]
        if self.hops == "rank":
            return int32(list(self.all)), len(self.all)
        lanes = [
            t.local_of[r] if t.is_local(r) else self.node_ranks + t.node_of[r] for r in self.all
        ]
        return int32(lanes), self.node_ranks + self.num_nodes

    def of_node(self, rank, node):
        """The ranks of a node, by local index; `rank` only says who asks."""
        return self.at[rank].rank_of[node * self.node_ranks : (node + 1) * self.node_ranks]

    # --- windows, by their offset in a rank's segment

    def slot(self, index, epoch):
        return self.offsets["slots"] + self.layout.stride * (2 * index + epoch % 2)

    def link_window(self, reader, node, epoch):
        """In `reader`'s segment: what its rail peer on `node` writes."""
        index = node - (node > self.at[reader].node)
        return self.offsets["links"] + self.layout.stride * (2 * index + epoch % 2)

    def links(self, rank, epoch):
        """(peer, its lane, my send region, its window) of every peer that rank writes by the network."""
        t, out = self.at[rank], []
        remote = [r for r in self.all if not t.is_local(r)]
        for r in remote:
            node = t.node_of[r]
            if self.hops == "rank":
                lane, index, window = r, remote.index(r), self.slot(rank, epoch)
            elif t.local_of[r] == t.local_of[rank]:
                lane, index = self.node_ranks + node, node - (node > t.node)
                window = self.link_window(r, t.node, epoch)
            else:
                continue
            send = self.offsets["sends"] + self.layout.stride * (2 * index + epoch % 2)
            out.append((r, lane, send, window))
        return out

    def rows(self, rank, offset, row_bytes, counts, num_rows=None):
        """The first `num_rows` (default: all C) rows of the window at `offset`: a [n, row_bytes] view."""
        capacity = self.layout.capacity_for(row_bytes, counts)
        rows = self.segments[rank][offset + HEADER_BYTES + counts :][: capacity * row_bytes]
        return rows.view(capacity, row_bytes)[: capacity if num_rows is None else num_rows]

    def send(self, rank, send, peer, window, num_rows):
        """The link: the bytes of a send region appear in the peer's window. The region is garbage again."""
        stride = self.layout.stride
        self.segments[peer][window : window + stride] = self.segments[rank][send : send + stride]
        self.segments[rank][send : send + stride] = 0xEE
        self.num_rows[peer, window] = num_rows


class Dispatch:
    """All ranks' side of one dispatch: lists of `handles` and of outputs: `x`, `scales`, `ids`, `weights`, `counts`."""

    def __init__(self, ranks: Ranks, inputs: Inputs, first_epoch: int):
        self.ranks, self.inputs, self.format = ranks, inputs, inputs.row_format()
        self.capacity = ranks.layout.capacity_for(self.format.row_bytes, ranks.counts)
        self.routed = []
        for r in ranks.all:
            lane_of_rank, num_lanes = ranks.lanes(r)
            self.routed.append(
                step.route(
                    inputs.idx[r], lane_of_rank, num_experts=inputs.num_experts, num_ranks=len(ranks.all),
                    num_lanes=num_lanes, capacity=self.capacity,
                )
            )  # fmt: skip
            assert not self.routed[r].error.any()
        self.handles, self.counts = [], []
        self.x, self.scales, self.ids, self.weights = [], [], [], []
        for r in ranks.all:
            self._allocate(r)
        self.num_rounds = max(len(routed.round_starts) - 1 for routed in self.routed)
        for round_idx in range(self.num_rounds):
            for r in ranks.all:
                self._pack(r, round_idx, first_epoch + round_idx)
            for r in ranks.all:
                if ranks.hops == "node":
                    self._forward(r, first_epoch + round_idx)
            for r in ranks.all:
                self._unpack(r, first_epoch + round_idx)
        assert all(handle.received == handle.totals for handle in self.handles)

    def _allocate(self, rank):
        """Outputs and places, from what the first headers say."""
        ranks, inputs, topk = self.ranks, self.inputs, self.inputs.topk
        num_local, expand = ranks.owned(rank), inputs.layout != "rank"
        copies = torch.stack([routed.expert_counts for routed in self.routed])
        copies = copies.view(len(ranks.all), len(ranks.all), -1)[:, rank, :num_local]
        totals = [int(routed.rank_counts[rank]) for routed in self.routed]
        first_places, sizes = step.first_places(
            copies, alignment=inputs.alignment, capacity=inputs.capacity
        )
        num_rows = sum(totals)
        places = int(sizes.sum()) if expand else num_rows
        G, N = ranks.node_ranks, ranks.num_nodes
        self.handles.append(
            SimulatedHandle(
                self.routed[rank], totals, int32([-9]).repeat(num_rows), int32([-9]).repeat(num_rows, topk),
                [int32([])] * N, [int32([]).view(0, G)] * N, list(first_places), [0] * len(ranks.all),
            )
        )  # fmt: skip
        self.x.append(inputs.xs[0].new_zeros((places, inputs.xs[0].shape[1])))
        self.scales.append(
            inputs.scales and inputs.scales[0].new_zeros((places, inputs.scales[0].shape[1]))
        )
        self.ids.append(torch.full((places,) if expand else (places, topk), -1))
        self.weights.append(torch.zeros(self.ids[rank].shape))
        self.counts.append(copies.sum(0))

    def _pack(self, rank, round_idx, epoch):
        ranks, inputs, f, routed = self.ranks, self.inputs, self.format, self.routed[rank]
        last_round = len(routed.round_starts) - 1  # of this rank; what follows are empty rounds
        both = (round_idx, round_idx + 1)
        starts, following = (routed.round_starts[min(i, last_round)] for i in both)
        first, last = (min(i * self.capacity, len(inputs.xs[rank])) for i in both)

        def pack(owner, offset, lane):
            step.pack(
                ranks.rows(owner, offset, f.row_bytes, ranks.counts), inputs.xs[rank], routed.lane_rows, starts,
                scales=inputs.scales and inputs.scales[rank], topk_idx=inputs.idx[rank],
                topk_weights=inputs.weights[rank], lane=lane, first_token=first, last_token=last,
                scales_at=f.scales_at, token_at=f.token_at, ids_at=f.ids_at, weights_at=f.weights_at,
            )  # fmt: skip
            ranks.num_rows[owner, offset] = int(following[lane] - starts[lane])

        for peer, lane, send, window in ranks.links(rank, epoch):
            pack(rank, send, lane)
            ranks.send(rank, send, peer, window, ranks.num_rows[rank, send])
        for peer in ranks.all:
            if ranks.at[rank].is_local(peer):
                pack(peer, ranks.slot(rank, epoch), int(ranks.lanes(rank)[0][peer]))

    def _forward(self, rank, epoch):
        ranks, f, handle, t = self.ranks, self.format, self.handles[rank], self.ranks.at[rank]
        here = ranks.of_node(rank, t.node)
        local_of_rank = int32([t.local_of[r] if t.is_local(r) else -1 for r in ranks.all])
        for node in range(ranks.num_nodes):
            if node == t.node:
                continue
            source = ranks.of_node(rank, node)[t.local_of[rank]]
            window = ranks.link_window(rank, node, epoch)
            num_rows = ranks.num_rows[rank, window]
            link_rows = ranks.rows(rank, window, f.row_bytes, ranks.counts, num_rows)
            starts = (handle.forward_rows[node] >= 0).sum(0, dtype=torch.int32)
            tokens, rows = step.forward_tables(
                link_rows, local_of_rank, starts, experts_per_rank=ranks.experts_per_rank, topk=f.topk,
                token_at=f.token_at, ids_at=f.ids_at,
            )  # fmt: skip
            for g, reader in enumerate(here):
                slot = ranks.slot(source, epoch)
                target = ranks.rows(reader, slot, f.row_bytes, ranks.counts)
                step.forward(target, link_rows, rows, starts, local=g)
                ranks.num_rows[reader, slot] = int((rows[:, g] >= 0).sum())
            handle.forward_tokens[node] = torch.cat([handle.forward_tokens[node], tokens])
            handle.forward_rows[node] = torch.cat([handle.forward_rows[node], rows])

    def _unpack(self, rank, epoch):
        ranks, f, handle = self.ranks, self.format, self.handles[rank]
        for source in reversed(ranks.all):  # any order will do
            slot = ranks.slot(source, epoch)
            rows = ranks.rows(rank, slot, f.row_bytes, ranks.counts, ranks.num_rows[rank, slot])
            placed = step.places(
                rows, handle.next_places[source], first_expert=rank * ranks.experts_per_rank, topk=f.topk,
                token_at=f.token_at, ids_at=f.ids_at, weights_at=f.weights_at,
            )  # fmt: skip
            handle.next_places[source] = placed.next_places
            first = sum(handle.totals[:source]) + handle.received[source]
            last = first + len(rows)
            handle.received[source] += len(rows)
            handle.recv_tokens[first:last] = placed.tokens
            handle.positions[first:last] = placed.positions
            positions = placed.positions
            if self.inputs.layout == "rank":
                positions = torch.arange(first, last, dtype=torch.int32)[:, None]
            scales = self.scales[rank]
            step.unpack(self.x[rank], rows, positions, out_scales=scales, scales_at=f.scales_at)
            step.unpack_lanes(self.ids[rank], placed.ids, positions)
            step.unpack_lanes(self.weights[rank], placed.weights, positions)


class Combine:
    """All ranks' side of one combine: `x` [T, H] and `columns` [T, K], a list each.

    `ys` [P, H], `weights` (or None) and `columns` by place, or, for the columns of layout "rank", [P, K].
    """

    def __init__(self, dispatch: Dispatch, ys, weights, columns, bias, first_epoch: int):
        self.ranks, self.inputs, self.handles = dispatch.ranks, dispatch.inputs, dispatch.handles
        self.ys, self.y_weights, self.y_columns, self.bias = ys, weights, columns, bias
        self.dtype, topk = ys[0].dtype, self.inputs.topk
        payload_bytes = ys[0].shape[1] * ys[0].element_size()
        self.format = RowFormat.of_combine(payload_bytes, topk, columns=True)
        self.capacity = C = self.ranks.layout.capacity_for(self.format.row_bytes, 0)
        self.starts = [step.round_starts(h.routed.lane_rows, capacity=C) for h in self.handles]
        self.x = [torch.full_like(x, 7) for x in self.inputs.xs]
        self.columns = [torch.full((len(x), topk), 7.0) for x in self.inputs.xs]
        self.num_rounds = max(len(starts) - 1 for starts in self.starts)
        for round_idx in range(self.num_rounds):
            for r in self.ranks.all:
                self._store(r, round_idx, first_epoch + round_idx)
            for r in self.ranks.all:
                if self.ranks.hops == "node":
                    self._forward(r, round_idx, first_epoch + round_idx)
            for r in self.ranks.all:
                self._sum(r, round_idx, first_epoch + round_idx)

    def _rows_of_round(self, tokens, round_idx):
        """Ascending source tokens: which of them are this round's."""
        first_and_last = int32([round_idx, round_idx + 1]) * self.capacity
        return torch.searchsorted(tokens.contiguous(), first_and_last).tolist()

    def _parts(self, rows):
        """Payload [n, H] and columns [n, K] of rows, views."""
        f = self.format
        columns = rows[:, f.weights_at : f.weights_at + 4 * f.topk]
        return rows[:, : f.payload_bytes].view(self.dtype), columns.view(torch.float32)

    def _add(self, out, rank, offsets, bias=None, **inner):
        """out: payload and columns. Rows in rank's segment; columns take no bias."""
        step.reduce(out[0], self.ranks.segments[rank], offsets, bias=bias, **inner)
        columns = torch.where(offsets >= 0, offsets + self.format.weights_at, -1)
        step.reduce(out[1], self.ranks.segments[rank], columns, **inner)

    def _write_results(self, rank, source, round_idx, reader, offset):
        """Level 0: rank's results for one round of `source`'s tokens, into the window at `offset` of `reader`."""
        handle, y, f = self.handles[rank], self.ys[rank], self.format
        first, end = sum(handle.totals[:source]), sum(handle.totals[: source + 1])
        of_round = self._rows_of_round(handle.recv_tokens[first:end], round_idx)
        begin, end = (first + i for i in of_round)
        by_place = self.inputs.layout != "rank"
        positions = handle.positions[begin:end]
        if not by_place:
            positions = torch.arange(begin, end, dtype=torch.int32)[:, None]
        payload, columns = self._parts(self.ranks.rows(reader, offset, f.row_bytes, 0, end - begin))
        zeros = int32([0] * positions.shape[1])
        offsets = step.row_offsets(positions, zeros, zeros.long(), row_bytes=f.payload_bytes)
        weights = None
        if self.y_weights is not None:
            weights = step.lane_columns(self.y_weights[rank], positions)
        step.reduce(payload, y.view(torch.uint8).flatten(), offsets, weights=weights)
        mine = self.y_columns[rank]
        columns.copy_(step.lane_columns(mine, positions) if by_place else mine[begin:end])
        self.ranks.num_rows[reader, offset] = end - begin

    def _store(self, rank, round_idx, epoch):
        ranks, t = self.ranks, self.ranks.at[rank]
        nodes = range(ranks.num_nodes)
        if ranks.hops == "rank":
            nodes = [t.node]
            for peer, _, send, window in ranks.links(rank, epoch):
                self._write_results(rank, peer, round_idx, rank, send)
                ranks.send(rank, send, peer, window, ranks.num_rows[rank, send])
        for node in nodes:  # to the rank of my node that is the source, or its forwarder
            slot = ranks.slot(ranks.of_node(rank, node)[t.local_of[rank]], epoch)
            for source, reader in zip(ranks.of_node(rank, node), ranks.of_node(rank, t.node)):
                self._write_results(rank, source, round_idx, reader, slot)

    def _forward(self, rank, round_idx, epoch):
        """Level 1: my node's results for each rail peer's tokens."""
        ranks, f, handle = self.ranks, self.format, self.handles[rank]
        for peer, lane, send, window in ranks.links(rank, epoch):
            node = lane - ranks.node_ranks
            rows = handle.forward_rows[node]
            begin, end = self._rows_of_round(handle.forward_tokens[node], round_idx)
            starts = (rows[:begin] >= 0).sum(0, dtype=torch.int32)
            slots = torch.tensor([ranks.slot(r, epoch) for r in ranks.of_node(rank, node)])
            slots += HEADER_BYTES
            offsets = step.row_offsets(rows[begin:end], starts, slots, row_bytes=f.row_bytes)
            out = ranks.rows(rank, send, f.row_bytes, 0, end - begin)
            self._add(self._parts(out), rank, offsets)
            ranks.send(rank, send, peer, window, end - begin)

    def _sum(self, rank, round_idx, epoch):
        """Level 2 over the nodes, with level 1 of the own node inside; or one sum over the ranks."""
        ranks, t, G = self.ranks, self.ranks.at[rank], self.ranks.node_ranks
        num_tokens = len(self.x[rank])
        first, last = (min(i * self.capacity, num_tokens) for i in (round_idx, round_idx + 1))
        starts = self.starts[rank][min(round_idx, len(self.starts[rank]) - 1)]
        inner = {}
        if ranks.hops == "rank":
            terms = [(r, ranks.slot(r, epoch)) for r in ranks.all]
        else:
            terms = [(G + n, ranks.link_window(rank, n, epoch)) for n in range(ranks.num_nodes)]
            own = [(g, ranks.slot(r, epoch)) for g, r in enumerate(ranks.of_node(rank, t.node))]
            terms[t.node : t.node + 1] = own
            inner = {"inner_first": t.node, "inner_last": t.node + G}
        lanes, windows = (torch.tensor(part) for part in zip(*terms))
        rows = self.handles[rank].routed.lane_rows[first:last, lanes]
        windows += HEADER_BYTES
        row_bytes = self.format.row_bytes
        offsets = step.row_offsets(rows, starts[lanes], windows, row_bytes=row_bytes)
        out = self.x[rank][first:last], self.columns[rank][first:last]
        self._add(out, rank, offsets, bias=self.bias[rank][first:last], **inner)
