"""Sums in the order of a token's lanes, and copies that are added at the source, against the reference bit for bit."""

import pytest
import torch
from cases import dispatch, expected, make_case, same

import moe_comm
from moe_comm import reference

OPTIONS = {"hidden": 64, "topk": 5, "num_experts": 12}
NODES = [("rank", 1), ("rank", 2), ("node", 4)]  # one level: hops="rank", or one node
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _random_like(rows, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=g).to(x.dtype) for x in rows]


def _check(run_threads, case, hops, ranks_per_node, *, bias=False, options=None, **how):
    want = expected(case)
    ys = _random_like(want.x, 7)
    biases = _random_like(case.xs, 8) if bias else None
    weights = case.weights if how.pop("weighted", False) else None
    back = reference.combine_by_lane(
        ys, want.bookkeeping, case.idx, case.num_experts, biases, source_weights=weights, **how
    )

    def body(buffer, rank):
        for _ in range(3):
            got = dispatch(buffer, case, rank)
            y = buffer.combine(
                ys[rank], got.handle, topk_idx=case.idx[rank], bias=biases[rank] if bias else None,
                source_weights=weights[rank] if weights else None, **how,
            )  # fmt: skip
            assert same(y, back[rank])
        return buffer.stats()["rounds"]

    sizes = {**OPTIONS, "ranks_per_node": ranks_per_node, "hops": hops, **(options or {})}
    return run_threads(body, 4, **sizes)


def _case(**more):
    return make_case(
        4, **{"tokens": [9, 0, 17, 4], "topk": 5, "num_experts": 12, "layout": "padded", **more}
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hops, ranks_per_node", NODES)
@pytest.mark.parametrize("weighted", [False, True])
def test_each_copy(run_threads, hops, ranks_per_node, dtype, weighted):
    case = _case(dtype=dtype)
    _check(run_threads, case, hops, ranks_per_node, each_copy=True, weighted=weighted)


@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
@pytest.mark.parametrize("hops, ranks_per_node", NODES)
def test_lane_order(run_threads, hops, ranks_per_node, layout):
    case = _case(layout=layout, none=0.05, dtype=torch.float32)  # whose bits show an order
    _check(run_threads, case, hops, ranks_per_node)


def test_lane_order_differs_from_rank_order():
    """Or the tests above would say nothing: some token's ranks stand in another order in its lanes."""
    case = _case(none=0.0, dtype=torch.float32)
    want = expected(case)
    ys = _random_like(want.x, 7)
    by_lane = reference.combine_by_lane(ys, want.bookkeeping, case.idx, case.num_experts)
    by_rank = reference.combine(ys, want.bookkeeping, hops="rank").x
    assert any(not torch.equal(a, b) for a, b in zip(by_lane, by_rank, strict=True))
    each = reference.combine_by_lane(
        ys,
        want.bookkeeping,
        case.idx,
        case.num_experts,
        each_copy=True,
        source_weights=case.weights,
    )
    weighted = [w.float() for w in want.topk_weights]
    plain = reference.combine(ys, want.bookkeeping, weights=weighted, hops="rank").x
    assert any(not torch.equal(a, b) for a, b in zip(each, plain, strict=True))


@pytest.mark.parametrize("each_copy", [False, True])
def test_bias(run_threads, each_copy):
    _check(run_threads, _case(layout="expert"), "rank", 2, bias=True, each_copy=each_copy)


@pytest.mark.parametrize("each_copy", [False, True])
def test_rounds(run_threads, each_copy):
    """Windows of a few rows: several rounds, more of them where each copy is a row."""
    rounds = _check(
        run_threads, _case(tokens=[40, 0, 7, 25]), "rank", 2, each_copy=each_copy,
        options={"window_bytes": 20_000},
    )  # fmt: skip
    assert min(rounds) > (30 if each_copy else 20)


@pytest.mark.parametrize("routing", ["hot", "none"])
def test_skew(run_threads, routing):
    _check(run_threads, _case(routing=routing), "rank", 2, each_copy=True, weighted=True)


def _wrong(buffer, got, case, rank, y, **more):
    with pytest.raises((moe_comm.ArgumentError, moe_comm.PeerError)) as caught:
        buffer.combine(y, got.handle, **more)
    return str(caught.value)


def test_wrong_input(run_threads):
    case = _case()
    other = [torch.where(i < 0, -1, (i + 3) % 12) for i in case.idx]

    def body(buffer, rank):
        got = dispatch(buffer, case, rank)
        said = [
            _wrong(buffer, got, case, rank, got.x, topk_idx=other[rank]),
            _wrong(buffer, got, case, rank, got.x, topk_idx=case.idx[rank][:, :2]),
            _wrong(buffer, got, case, rank, got.x, each_copy=True),
            _wrong(buffer, got, case, rank, got.x, topk_idx=case.idx[rank], source_weights=case.weights[rank]),
            _wrong(buffer, got, case, rank, got.x, topk_idx=case.idx[rank], each_copy=rank == 2),
        ]  # fmt: skip
        buffer.combine(got.x, got.handle, topk_idx=case.idx[rank])  # goes on
        return said

    results = run_threads(body, 4, hops="rank", ranks_per_node=2, **OPTIONS)
    for rank, (ids, shape, alone, weights, mixed) in enumerate(results):
        if case.idx[rank].numel():
            assert "topk_idx: expected that of the handle's dispatch" in ids
        assert "topk_idx: expected int64" in shape
        assert "topk_idx: expected the dispatch's" in alone
        assert "source_weights: expected None without each_copy" in weights
        assert "disagrees in" in mixed


def test_between_nodes_it_is_refused(run_threads):
    case = _case()

    def body(buffer, rank):
        got = dispatch(buffer, case, rank)
        return _wrong(buffer, got, case, rank, got.x, topk_idx=case.idx[rank])

    for said in run_threads(body, 4, hops="node", ranks_per_node=2, **OPTIONS):
        assert 'topk_idx: expected None with hops="node" between nodes' in said
