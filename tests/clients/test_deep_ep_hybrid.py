"""deep_ep.HybridEPBuffer in real processes over gloo: maps, permuted rows and static shapes against plain torch."""

import pytest
import torch
from deep_ep_oracle import make_case, open_gloo, same

import moe_comm
from moe_comm import deep_ep, reference
from moe_comm.deep_ep.hybrid_ep_buffer import indices_to_map

WORLDS = [(2, 0), (4, 0), (4, 2)]  # ranks, ranks per pretended node
HIDDEN, EXPERTS = 64, 12


@pytest.fixture(params=WORLDS, ids=lambda w: f"{w[0]} ranks, nodes of {w[1] or w[0]}")
def world(request, run_ranks, monkeypatch, tmp_path):
    num_ranks, ranks_per_node = request.param
    if ranks_per_node:
        monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", str(ranks_per_node))
    node_of = [r // (ranks_per_node or num_ranks) for r in range(num_ranks)]
    return lambda fn: run_ranks(fn, num_ranks, num_ranks, str(tmp_path / "gloo"), node_of)


class Routing:
    """A map and its probabilities on all ranks, and the same as top-k ids in the order of experts."""

    def __init__(self, num_ranks, seed=0, dtype=torch.bfloat16, num_experts=EXPERTS):
        g = torch.Generator().manual_seed(seed)
        tokens = [9, 0, 17, 4][:num_ranks]
        self.num_experts = num_experts
        self.xs = [torch.randn(t, HIDDEN, generator=g).to(dtype) for t in tokens]
        self.maps = [
            torch.rand(t, num_experts, generator=g) < 0.1 * (r + 1) for r, t in enumerate(tokens)
        ]
        self.probs = [torch.rand(m.shape, generator=g) * m for m in self.maps]
        most = max(int(m.sum(1).max()) for m in self.maps if len(m))  # differs from rank to rank
        self.idx = [
            torch.where(m, torch.arange(num_experts), 99).sort(1).values[:, :most]
            for m in self.maps
        ]
        self.idx = [torch.where(i == 99, -1, i) for i in self.idx]
        self.weights = [
            torch.where(i < 0, 0, p.gather(1, i.clamp(min=0))) for i, p in zip(self.idx, self.probs)
        ]

    def expected(self, layout, alignment=1, scales=None, xs=None):
        return reference.dispatch(
            xs or self.xs,
            self.idx,
            self.weights,
            self.num_experts,
            layout,
            alignment,
            scales=scales,
        )

    def dense(self, columns, rank):
        """[T, E] of `columns` [T, K]."""
        out = torch.zeros(self.maps[rank].shape)
        for t, ids in enumerate(self.idx[rank].tolist()):
            for k, e in enumerate(ids):
                if e >= 0:
                    out[t, e] = columns[t, k]
        return out


def open_buffer(rank, num_ranks, store, **more):
    group = open_gloo(rank, num_ranks, store)
    sizes = {
        "hidden_dim": HIDDEN,
        "max_num_of_tokens_per_rank": 16,
        "num_local_experts": EXPERTS // num_ranks,
    }
    return deep_ep.HybridEPBuffer(group=group, **sizes, **more)


def random_like(rows, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=g).to(x.dtype) for x in rows]


def up(value, multiple):
    return -(-value // multiple) * multiple


def check_permuted(rank, group, num_ranks, store, node_of):
    buffer = open_buffer(rank, num_ranks, store)
    for seed, (dtype, pad, num_experts) in enumerate(
        [(torch.bfloat16, None, EXPERTS), (torch.float32, 8, EXPERTS), (torch.bfloat16, 4, 7)]
    ):
        r = Routing(num_ranks, seed, dtype, num_experts)
        want = r.expected("expert", pad or 1)
        counts = want.tokens_per_expert[rank]
        rows = len(want.x[rank])
        by_map = {"routing_map": r.maps[rank], "probs": r.probs[rank]}
        by_ids = {
            "topk_idx": r.idx[rank],
            "topk_weights": r.weights[rank],
            "num_of_experts": num_experts,
        }
        for routing in (by_map, by_ids):
            for limit in (None, rows, rows + 5, torch.tensor(rows + 3)):
                for non_blocking in (False, limit is not None):
                    x, probs, scales, padded, handle = buffer.dispatch_with_permute(
                        hidden=r.xs[rank], scaling_factor=None, pad_multiple=pad,
                        num_permuted_tokens=limit, non_blocking=non_blocking, **routing,
                    )  # fmt: skip
                    assert len(x) == len(probs) == (rows if limit is None else int(limit))
                    assert same(x[:rows], want.x[rank]) and not x[rows:].any()
                    assert same(probs[:rows], want.topk_weights[rank]) and not probs[rows:].any()
                    assert scales is None and padded.dtype == torch.int64
                    assert padded.tolist() == [up(c, pad or 1) for c in counts.tolist()]
                    assert len(handle) == 11 and isinstance(handle, tuple) and not handle[-1].item()
                    assert same(handle.tokens_per_expert, counts)
                    ys = random_like(want.x, 5)
                    y = torch.zeros(x.shape, dtype=dtype)
                    y[:rows] = ys[rank]
                    back = reference.combine(
                        ys, want.bookkeeping, node_of=node_of, topk_weights=want.topk_weights
                    )
                    out, nothing = buffer.combine_with_unpermute(
                        hidden=y, handle=handle, pad_multiple=pad
                    )
                    assert nothing is None and same(out, back.x[rank])
                    out, dense = buffer.combine_with_unpermute(hidden=y, probs=probs, handle=handle)
                    assert same(out, back.x[rank])
                    assert same(dense, r.dense(back.topk_weights[rank], rank))
                    assert same(dense, r.probs[rank])
                    other = random_like(r.xs, 6)
                    again = r.expected("expert", pad or 1, xs=other)
                    new = {} if routing is by_ids else {"probs": r.probs[rank] * 2}
                    x, probs, _, counted, _ = buffer.dispatch_with_permute(
                        hidden=other[rank], scaling_factor=None, handle=handle, pad_multiple=pad,
                        num_permuted_tokens=limit, **new,
                    )  # fmt: skip
                    assert same(x[:rows], again.x[rank]) and len(x) == len(y)
                    assert same(counted, padded)
                    if new:
                        assert same(probs[:rows], want.topk_weights[rank] * 2)
                    else:
                        assert probs is None


def test_permuted(world):
    world(check_permuted)


def check_overflow(rank, group, num_ranks, store, node_of):
    buffer = open_buffer(rank, num_ranks, store)
    r = Routing(num_ranks, 3)
    want = r.expected("expert", 4)
    rows = [len(x) for x in want.x]
    limits = [n // 2 for n in rows]
    call = {
        "hidden": r.xs[rank],
        "routing_map": r.maps[rank],
        "probs": r.probs[rank],
        "pad_multiple": 4,
    }
    x, probs, _, padded, handle = buffer.dispatch_with_permute(
        **call, num_permuted_tokens=limits[rank], non_blocking=True
    )
    assert handle[-1].item() == (limits[rank] < rows[rank]) == 1
    assert same(x, want.x[rank][: limits[rank]]) and same(
        probs, want.topk_weights[rank][: limits[rank]]
    )
    assert int(padded.sum()) == limits[rank]
    ys = random_like(want.x, 5)
    kept = [torch.where(torch.arange(n)[:, None] < limits[i], ys[i], 0) for i, n in enumerate(rows)]
    back = reference.combine(kept, want.bookkeeping, node_of=node_of)
    out, _ = buffer.combine_with_unpermute(hidden=ys[rank][: limits[rank]], handle=handle)
    assert same(out, back.x[rank])
    x, *_ = buffer.dispatch_with_permute(
        hidden=r.xs[rank], handle=handle, num_permuted_tokens=limits[rank]
    )
    assert same(x, want.x[rank][: limits[rank]])
    with pytest.raises(
        moe_comm.ArgumentError,
        match=f"num_permuted_tokens: expected at least the {rows[rank]} rows",
    ):
        buffer.dispatch_with_permute(**call, num_permuted_tokens=limits[rank])
    assert len(buffer.dispatch_with_permute(**call)[0]) == rows[rank]


def test_rows_beyond_a_static_shape(world):
    world(check_overflow)


def check_as_they_came(rank, group, num_ranks, store, node_of):
    buffer = open_buffer(rank, num_ranks, store)
    g = torch.Generator().manual_seed(9)
    for seed, num_experts in enumerate((EXPERTS, 7)):
        r = Routing(num_ranks, seed, num_experts=num_experts)
        scales = [torch.rand(len(x), 2, generator=g) for x in r.xs]
        want = r.expected("rank", scales=scales)
        wide = r.expected("expert", scales=scales)
        routing = {"routing_map": r.maps[rank], "probs": r.probs[rank]}
        x, probs, sf, handle = buffer.dispatch(r.xs[rank], scales[rank], **routing)
        assert same(x, want.x[rank]) and same(sf, want.scales[rank])
        assert len(handle) == 7 and handle.num_dispatched_tokens_tensor.item() == len(x)
        ids = want.topk_idx[rank]
        first = min(rank * -(-num_experts // num_ranks), num_experts)
        dense = torch.zeros(len(x), num_experts)
        local = torch.zeros(len(x), len(want.tokens_per_expert[rank]), dtype=torch.bool)
        for row, (lanes, weights) in enumerate(zip(ids.tolist(), want.topk_weights[rank].tolist())):
            for e, w in zip(lanes, weights):
                if e >= 0:
                    dense[row, first + e], local[row, e] = w, True
        assert same(probs, dense) and same(handle.local_expert_routing_map, local)
        ys = random_like(want.x, 5)
        back = reference.combine(ys, want.bookkeeping, node_of=node_of)
        out, nothing = buffer.combine(ys[rank], handle=handle)
        assert nothing is None and same(out, back.x[rank])
        out, dense = buffer.combine(ys[rank], probs, handle)
        assert same(out, back.x[rank]) and same(dense, r.probs[rank])
        x, probs, sf, _ = buffer.dispatch(
            r.xs[rank], scales[rank], handle=handle, probs=r.probs[rank] + 1
        )
        assert same(x, want.x[rank]) and same(sf, want.scales[rank])
        here = torch.zeros(len(x), num_experts, dtype=torch.bool)
        here[:, first : first + local.shape[1]] = local
        assert same(
            probs[here],
            torch.cat([w[i >= 0] for w, i in zip(want.topk_weights[rank], ids)]) + 1
            if len(x)
            else probs[here],
        )
        assert not probs[~here].any()
        # the handle of one form serves the other
        x, _, sf, _, _ = buffer.dispatch_with_permute(
            hidden=r.xs[rank], scaling_factor=scales[rank], handle=handle
        )
        assert same(x, wide.x[rank]) and same(sf, wide.scales[rank])


def test_as_they_came(world):
    world(check_as_they_came)


def check_errors(rank, group, num_ranks, store, node_of):
    buffer = open_buffer(rank, num_ranks, store, load_cached_kernels=True, use_shared_buffer=True)
    r = Routing(num_ranks)
    x, routing = r.xs[rank], {"routing_map": r.maps[rank], "probs": r.probs[rank]}
    errors = (moe_comm.ArgumentError, moe_comm.PeerError)

    def fails(match, **more):
        with pytest.raises(errors, match=match):
            buffer.dispatch_with_permute(**{"hidden": x, **routing, **more})

    fails("routing_map: expected it or topk_idx", routing_map=None)
    fails("num_permuted_tokens: expected an int", non_blocking=True)
    fails("handle: expected one of HybridEPBuffer", handle=(1, 2))
    fails("routing_map: expected bool", num_of_experts=EXPERTS + 1)
    fails(
        "probs: expected float32", probs=r.probs[rank][:, :3] if rank == 0 else r.probs[rank]
    )  # one rank alone
    fails("hidden: expected a tensor", hidden=None)
    handle = buffer.dispatch_with_permute(hidden=x, pad_multiple=4, **routing)[-1]
    fails("pad_multiple: expected 4", handle=handle, pad_multiple=8)
    with pytest.raises(errors, match="hidden: expected "):
        buffer.combine_with_unpermute(
            hidden=torch.zeros(1 + handle.config.num_rows(True), HIDDEN), handle=handle
        )
    config = buffer.configurer.buffer_config
    assert (config.hidden_dim, config.num_of_experts_per_rank) == (HIDDEN, EXPERTS // num_ranks)
    assert config.max_num_of_tokens_per_rank == (32 if len(x) > 16 else 16)
    assert (
        buffer.update_template_config(num_of_tokens_per_rank=100).max_num_of_tokens_per_rank == 112
    )
    assert buffer.group is torch.distributed.group.WORLD
    # nothing but no tokens: a layer that no token reaches
    empty = torch.zeros(0, HIDDEN, dtype=torch.bfloat16)
    none = torch.zeros(0, EXPERTS, dtype=torch.bool)
    got, probs, _, counts, handle = buffer.dispatch_with_permute(
        hidden=empty, routing_map=none, probs=none.float()
    )
    assert len(got) == len(probs) == int(counts.sum()) == 0
    out, dense = buffer.combine_with_unpermute(hidden=got, probs=probs, handle=handle)
    assert out.shape == (0, HIDDEN) and dense.shape == (0, EXPERTS)


def test_wrong_input(world):
    world(check_errors)


def test_indices_to_map():
    case = make_case([9], num_experts=EXPERTS)
    routing_map, probs = indices_to_map(case.idx[0], case.weights[0], 9, EXPERTS)
    assert routing_map.dtype == torch.bool and probs.dtype == torch.float32
    for t in range(9):
        for e in range(EXPERTS):
            lanes = (case.idx[0][t] == e).nonzero()[:, 0]
            assert bool(routing_map[t, e]) == (len(lanes) == 1)
            assert probs[t, e] == (case.weights[0][t, lanes[0]] if len(lanes) else 0)
    with pytest.raises(ValueError, match="topk_weights: expected"):
        indices_to_map(case.idx[0], case.weights[0][:, :1], 9, EXPERTS)
