"""Inputs for exchange tests: random, seeded, with all that has hurt others; and the check against the reference."""

import dataclasses

import torch

from moe_comm import reference


@dataclasses.dataclass
class Case:
    """One call's inputs on all ranks."""

    xs: list
    idx: list
    weights: list
    num_experts: int
    layout: str = "rank"
    alignment: int = 1
    capacity: int | None = None
    scales: list | None = None


def make_case(
    num_ranks, *, seed=0, hidden=64, topk=3, num_experts=7, tokens=None, dtype=torch.bfloat16, layout="rank",
    alignment=1, routing="uniform", none=0.15, scales=None,
):  # fmt: skip
    """`tokens`: T of each rank, or the largest T. `routing`: uniform, hot (one expert gets all), none (all -1)."""
    g = torch.Generator().manual_seed(seed)
    if tokens is None or isinstance(tokens, int):
        top = 12 if tokens is None else tokens
        tokens = [int(torch.randint(0, top + 1, (), generator=g)) for _ in range(num_ranks)]
    topk = min(topk, num_experts)
    xs, idx, weights, all_scales = [], [], [], []
    for t in tokens:
        x = torch.randn(t, hidden, generator=g)
        xs.append(x.to(dtype))
        ids = torch.rand(t, num_experts, generator=g).argsort(1)[:, :topk]
        if routing == "hot":
            ids = torch.full((t, topk), -1)
            ids[:, topk // 2] = num_experts - 1
        ids = torch.where(torch.rand(ids.shape, generator=g) < none, -1, ids)
        if routing == "none":
            ids = torch.full_like(ids, -1)
        idx.append(ids)
        weights.append(torch.rand(t, topk, generator=g))
        if scales == "column-major":  # strides (1, T): as kernels make them
            all_scales.append(torch.rand(hidden // 32, t, generator=g).t())
        elif scales:
            all_scales.append(torch.rand(t, hidden // 32, generator=g))
    capacity = max(1, max(tokens)) * num_ranks if layout == "padded" else None
    return Case(
        xs, idx, weights, num_experts, layout, alignment, capacity, all_scales if scales else None
    )


def expected(case):
    return reference.dispatch(
        case.xs, case.idx, case.weights, case.num_experts, case.layout, alignment=case.alignment,
        capacity=case.capacity, scales=case.scales,
    )  # fmt: skip


def dispatch(buffer, case, rank, **more):
    x = case.xs[rank] if case.scales is None else (case.xs[rank], case.scales[rank])
    return buffer.dispatch(
        x, case.idx[rank], case.weights[rank], num_experts=case.num_experts, layout=case.layout,
        alignment=case.alignment, capacity=case.capacity, **more,
    )  # fmt: skip


def same(a, b):
    """Bit for bit, also for dtypes that torch.equal does not know."""
    if a.dtype.itemsize == 1:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return a.dtype == b.dtype and torch.equal(a, b)


def check_dispatched(got, want, rank):
    """Every field equal, bit for bit."""
    x, scales = got.x if isinstance(got.x, tuple) else (got.x, None)
    assert x.shape == want.x[rank].shape
    assert same(x, want.x[rank])
    if want.scales is not None:
        assert torch.equal(scales, want.scales[rank])
    assert torch.equal(got.tokens_per_expert, want.tokens_per_expert[rank])
    if want.topk_idx is not None:
        assert torch.equal(got.topk_idx, want.topk_idx[rank])
    if want.topk_weights is not None:
        assert torch.equal(got.topk_weights, want.topk_weights[rank])


def node_list(num_ranks, ranks_per_node):
    return [r // ranks_per_node for r in range(num_ranks)]
