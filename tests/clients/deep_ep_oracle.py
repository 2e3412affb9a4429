"""What DeepEP's legacy Buffer returns, in plain torch: inputs of all ranks in, outputs of all ranks out."""

import dataclasses

import torch
import torch.distributed as dist

from moe_comm import reference


def open_gloo(rank, num_ranks, store):
    """torch.distributed, as clients have it. `store`: a path that no other test uses."""
    found = dist.FileStore(store, num_ranks)
    dist.init_process_group("gloo", store=found, rank=rank, world_size=num_ranks)
    return dist.group.WORLD


@dataclasses.dataclass
class Case:
    """Inputs of all ranks."""

    xs: list
    idx: list
    weights: list
    num_experts: int

    @property
    def num_ranks(self):
        return len(self.xs)

    @property
    def experts_per_rank(self):
        return -(-self.num_experts // self.num_ranks)

    def owned(self, rank):
        first = rank * self.experts_per_rank
        return range(first, max(first, min(first + self.experts_per_rank, self.num_experts)))


def make_case(tokens, *, seed=0, hidden=64, topk=3, num_experts=8, dtype=torch.bfloat16, none=0.15):
    g = torch.Generator().manual_seed(seed)
    xs, idx, weights = [], [], []
    for t in tokens:
        xs.append(torch.randn(t, hidden, generator=g).to(dtype))
        ids = torch.rand(t, num_experts, generator=g).argsort(1)[:, :topk]
        idx.append(torch.where(torch.rand(ids.shape, generator=g) < none, -1, ids))
        idx[-1][3:4] = -1  # a token of nobody
        weights.append(torch.rand(t, topk, generator=g))
    return Case(xs, idx, weights, num_experts)


def dispatched(case, scales=None):
    return reference.dispatch(case.xs, case.idx, case.weights, case.num_experts, scales=scales)


def same(a, b):
    """Bit for bit, also for dtypes that torch.equal does not know."""
    if a.dtype.itemsize == 1:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def layout(case, rank, node_of):
    """The four results of get_dispatch_layout, token by token."""
    num_ranks, num_nodes = case.num_ranks, max(node_of) + 1
    in_rank = torch.zeros(len(case.idx[rank]), num_ranks, dtype=torch.bool)
    per_node = torch.zeros(num_nodes, dtype=torch.int32)
    per_expert = torch.zeros(case.num_experts, dtype=torch.int32)
    for t, ids in enumerate(case.idx[rank].tolist()):
        nodes = set()
        for e in ids:
            if e >= 0:
                per_expert[e] += 1
                in_rank[t, e // case.experts_per_rank] = True
                nodes.add(node_of[e // case.experts_per_rank])
        for n in nodes:
            per_node[n] += 1
    return in_rank.sum(0).int(), per_node if num_nodes > 1 else None, per_expert, in_rank


def combined(ys, book, rank, node_of, start=None, round_nodes=True):
    """float32 [T, H] of `rank` before its last rounding: `start`, then ranks ascending.

    Between nodes: first the ranks of each node, rounded to the rows' dtype with `round_nodes`, then the nodes.
    """
    first = sum(book.num_tokens[:rank])
    num_tokens, hidden = book.num_tokens[rank], ys[0].shape[1]

    def rows_of(r):
        copies = book.copies[r]
        mine = (copies.token >= first) & (copies.token < first + num_tokens)
        dense = torch.zeros(num_tokens, hidden)
        dense[copies.token[mine] - first] = ys[r][copies.row[mine]].float()
        return dense

    total = torch.zeros(num_tokens, hidden) if start is None else start.clone()
    if max(node_of) == 0:
        for r in range(len(ys)):
            total += rows_of(r)
        return total
    for node in range(max(node_of) + 1):
        node_sum = torch.zeros(num_tokens, hidden)
        for r in range(len(ys)):
            if node_of[r] == node:
                node_sum += rows_of(r)
        total += node_sum.to(ys[0].dtype).float() if round_nodes else node_sum
    return total


def padded_rows(case, rank, num_places, rows=None):
    """Low-latency results of `rank`, copy by copy: a list per local expert of (source rank, source token, row)."""
    out = []
    for e in case.owned(rank):
        found = []
        for source, ids in enumerate(case.idx):
            for t in (ids == e).any(1).nonzero()[:, 0].tolist():
                found.append((source, t, (rows or case.xs)[source][t]))
        assert len(found) <= num_places
        out.append(found)
    return out


def weighted_sum(case, rank, ys, places):
    """float32 FMA chain in top-k order: `ys` [rank] [L, P, H], `places` {(e, source, token): place}. Rounded once."""
    out = torch.zeros(len(case.xs[rank]), ys[0].shape[2])
    for t, ids in enumerate(case.idx[rank].tolist()):
        total = torch.zeros(ys[0].shape[2])
        for k, e in enumerate(ids):
            if e >= 0:
                owner = e // case.experts_per_rank
                row = ys[owner][e - case.owned(owner)[0], places[e, rank, t]]
                product = row.double() * case.weights[rank][t, k].double()  # exact
                total = (total.double() + product).float()
        out[t] = total
    return out.to(ys[0].dtype)
