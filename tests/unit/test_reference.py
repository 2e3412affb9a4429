"""The reference against one token at a time in plain python loops, and against closed forms."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_comm import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
LAYOUTS = ["rank", "expert", "padded"]


@dataclass
class Case:
    """Inputs of all ranks."""

    xs: list[Tensor]
    topk_idx: list[Tensor]
    topk_weights: list[Tensor]
    scales: list[Tensor]
    num_experts: int
    node_of: list[int]

    @property
    def num_ranks(self) -> int:
        return len(self.xs)

    def owner(self, expert: int) -> int:
        return expert // -(-self.num_experts // self.num_ranks)

    def experts_of(self, rank: int) -> list[int]:
        return [e for e in range(self.num_experts) if self.owner(e) == rank]

    def dispatch(self, layout, alignment=1, capacity=None) -> reference.ReferenceDispatched:
        return reference.dispatch(
            self.xs,
            self.topk_idx,
            self.topk_weights,
            self.num_experts,
            layout,
            alignment,
            capacity,
            self.scales,
        )


def make_case(num_tokens, num_experts, num_topk, routing="any", dtype=torch.float32, seed=0):
    """Random rows, distinct experts per token, and about a fifth of the lanes −1."""
    gen = torch.Generator().manual_seed(seed)
    case = Case([], [], [], [], num_experts, [])
    for t in num_tokens:
        scores = torch.rand(t, num_experts, generator=gen)
        if routing == "hot":
            scores[:, num_experts // 2] = 2
        idx = scores.topk(num_topk, dim=1).indices
        if routing == "any":
            idx = torch.where(torch.rand(t, num_topk, generator=gen) < 0.2, -1, idx)
        elif routing == "none":
            idx = torch.full_like(idx, -1)
        case.xs.append(torch.randn(t, 3, generator=gen, dtype=torch.float64).to(dtype))
        case.topk_idx.append(idx)
        case.topk_weights.append(torch.rand(t, num_topk, generator=gen))
        case.scales.append(torch.randn(t, 2, generator=gen))
        case.node_of.append(int(torch.randint(len(num_tokens), (), generator=gen)))
    return case


@st.composite
def cases(draw):
    num_experts = draw(st.integers(1, 9))
    return make_case(
        num_tokens=draw(st.lists(st.integers(0, 5), min_size=1, max_size=5)),
        num_experts=num_experts,
        num_topk=draw(st.integers(1, min(4, num_experts))),
        routing=draw(st.sampled_from(["any", "full", "hot", "none"])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 1000)),
    )


def naive_rows(case: Case, rank: int, layout: str, alignment: int, capacity: int) -> list:
    """(source, token, local experts of the row, lanes of the row) per row, or None for padding."""
    first = min(case.experts_of(rank), default=0)
    per_rank, per_expert = [], {e: [] for e in case.experts_of(rank)}
    for source in range(case.num_ranks):
        for token, experts in enumerate(case.topk_idx[source].tolist()):
            mine = {k: e - first for k, e in enumerate(experts) if e >= 0 and case.owner(e) == rank}
            if mine:
                per_rank.append((source, token, mine))
            for k, local in mine.items():
                per_expert[first + local].append((source, token, {k: local}))
    if layout == "rank":
        return per_rank
    rows = []
    for group in per_expert.values():
        size = -(-len(group) // alignment) * alignment if layout == "expert" else capacity
        rows += group + [None] * (size - len(group))
    return rows


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(LAYOUTS), st.integers(1, 4))
def test_dispatch_is_the_naive_loop(case, layout, alignment):
    capacity = sum(len(x) for x in case.xs) + 1
    got = case.dispatch(layout, alignment, capacity)
    num_topk = case.topk_idx[0].shape[1]
    for rank in range(case.num_ranks):
        rows = naive_rows(case, rank, layout, alignment, capacity)
        lead = (len(case.experts_of(rank)), capacity) if layout == "padded" else (len(rows),)
        lanes = (num_topk,) if layout == "rank" else ()
        x = torch.zeros(len(rows), 3, dtype=case.xs[0].dtype)
        scales = torch.zeros(len(rows), 2)
        idx = torch.full((len(rows), *lanes), -1, dtype=torch.int64)
        weights = torch.zeros(len(rows), *lanes)
        count = torch.zeros(len(case.experts_of(rank)), dtype=torch.int64)
        for i, row in enumerate(rows):
            if row is None:
                continue
            source, token, mine = row
            x[i], scales[i] = case.xs[source][token], case.scales[source][token]
            for k, local in mine.items():
                at = (i, k) if layout == "rank" else (i,)
                idx[at], weights[at] = local, case.topk_weights[source][token, k]
                count[local] += 1
        assert torch.equal(got.x[rank], x.view(*lead, 3))
        assert got.x[rank].dtype == x.dtype
        assert torch.equal(got.scales[rank], scales.view(*lead, 2))
        assert torch.equal(got.topk_weights[rank], weights.view(*lead, *lanes))
        assert torch.equal(got.tokens_per_expert[rank], count)
        if layout == "padded":
            assert got.topk_idx is None
        else:
            assert torch.equal(got.topk_idx[rank], idx)


def fold(terms: list[Tensor], start: Tensor | None = None) -> Tensor | None:
    """Add `terms` from left to right, beginning with `start` or else with the first of them."""
    for term in terms:
        start = term if start is None else start + term
    return start


def naive_combine(case, ys, layout, weights, bias, hops, source, token):
    """One token's result: every sum written out."""
    wire = ys[0].dtype
    exact = torch.float64 if wire == torch.float64 else torch.float32
    by_rank = {}
    for rank in range(case.num_ranks):
        flat = ys[rank].reshape(-1, 3)
        rows = naive_rows(case, rank, layout, 1, ys[rank].shape[1])
        copies = []
        for i, row in enumerate(rows):
            if row is not None and row[:2] == (source, token):
                scale = 1 if weights is None else weights[rank].reshape(-1)[i].to(exact)
                copies.append((min(row[2]), flat[i].to(exact) * scale))
        copies.sort(key=lambda copy: copy[0])
        if copies:
            by_rank[rank] = fold([row for _, row in copies]).to(wire).to(exact)
    start = None if bias is None else bias[source][token].to(exact)
    if hops == "rank":
        terms = list(by_rank.values())
    else:
        by_node = {}
        for rank, row in by_rank.items():
            by_node.setdefault(case.node_of[rank], []).append(row)
        order = sorted(by_node, key=case.node_of.index)
        terms = [fold(by_node[node]).to(wire).to(exact) for node in order]
    total = fold(terms, start)
    return torch.zeros(3, dtype=wire) if total is None else total.to(wire)


@settings(max_examples=150, deadline=None)
@given(
    case=cases(),
    layout=st.sampled_from(LAYOUTS),
    hops=st.sampled_from(["node", "rank"]),
    with_bias=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_combine_is_the_naive_loop(case, layout, hops, with_bias, weighted, seed):
    sent = case.dispatch(layout, capacity=sum(len(x) for x in case.xs) + 1)
    gen = torch.Generator().manual_seed(seed)
    ys = [torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x.dtype) for x in sent.x]
    bias = [torch.randn(x.shape, generator=gen) for x in case.xs] if with_bias else None
    weights = sent.topk_weights if weighted and layout != "rank" else None
    got = reference.combine(ys, sent.bookkeeping, weights, bias, case.node_of, hops)
    for source, x in enumerate(case.xs):
        assert got.x[source].shape == x.shape
        for token in range(len(x)):
            want = naive_combine(case, ys, layout, weights, bias, hops, source, token)
            assert torch.equal(got.x[source][token], want)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(LAYOUTS), st.sampled_from(["node", "rank"]))
def test_columns_come_back_to_their_lanes(case, layout, hops):
    sent = case.dispatch(layout, capacity=sum(len(x) for x in case.xs))
    got = reference.combine(
        sent.x, sent.bookkeeping, None, None, case.node_of, hops, sent.topk_weights
    )
    for idx, weights, column in zip(
        case.topk_idx, case.topk_weights, got.topk_weights, strict=True
    ):
        assert column.dtype == torch.float32
        assert torch.equal(column, torch.where(idx >= 0, weights, 0))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_closed_forms(case):
    """Numbers of rows and copies, and what comes back when every rank returns what it got."""
    by_rank, by_expert = case.dispatch("rank"), case.dispatch("expert", alignment=4)
    all_idx = torch.cat(case.topk_idx)
    experts = torch.bincount(all_idx[all_idx >= 0], minlength=case.num_experts)
    per_rank = -(-case.num_experts // case.num_ranks)
    owners = torch.where(all_idx >= 0, all_idx // per_rank, -1)
    num_owners = torch.tensor([len({r for r in row if r >= 0}) for row in owners.tolist()])
    for rank in range(case.num_ranks):
        count = experts[rank * per_rank : (rank + 1) * per_rank]
        assert torch.equal(by_rank.tokens_per_expert[rank], count)
        assert torch.equal(by_expert.tokens_per_expert[rank], count)
        assert len(by_rank.x[rank]) == int((owners == rank).any(dim=1).sum())
        assert len(by_expert.x[rank]) == int(((count + 3) // 4 * 4).sum())
    ones = [torch.ones_like(x) for x in by_rank.x]
    back = torch.cat(reference.combine(ones, by_rank.bookkeeping, node_of=case.node_of).x)
    assert torch.equal(back[:, 0], num_owners.to(back.dtype))
    ones = [torch.ones_like(x) for x in by_expert.x]
    back = torch.cat(reference.combine(ones, by_expert.bookkeeping, hops="rank").x)
    assert torch.equal(back[:, 0], (all_idx >= 0).sum(dim=1).to(back.dtype))


def test_one_hot_expert_takes_every_token():
    case = make_case([3, 0, 4, 2], num_experts=6, num_topk=2, routing="hot")
    sent = case.dispatch("expert")
    assert sent.tokens_per_expert[1].tolist()[1] == 9  # expert 3 is local expert 1 of rank 1
    assert len(case.dispatch("rank").x[1]) == 9


def test_ranks_without_experts_take_part():
    """E = 5 over 4 ranks: ⌈5/4⌉ = 2 experts each, so rank 2 owns one and rank 3 none."""
    case = make_case([2, 2, 2, 2], num_experts=5, num_topk=3, routing="full")
    for layout in LAYOUTS:
        sent = case.dispatch(layout, capacity=8)
        assert [len(count) for count in sent.tokens_per_expert] == [2, 2, 1, 0]
        assert sent.x[3].numel() == 0
        assert [len(x) for x in reference.combine(sent.x, sent.bookkeeping).x] == [2, 2, 2, 2]


def test_rows_of_fp8_travel_unchanged():
    case = make_case([3, 5], num_experts=4, num_topk=2, routing="full")
    case.xs = [x.to(torch.float8_e4m3fn) for x in case.xs]
    for layout in LAYOUTS:
        sent = case.dispatch(layout, capacity=8)
        assert sent.x[0].dtype == torch.float8_e4m3fn
    first = case.dispatch("rank").bookkeeping.copies[1].token
    rows = torch.cat(case.xs)[first].view(torch.uint8)
    assert torch.equal(case.dispatch("rank").x[1].view(torch.uint8), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_single_term_keeps_its_bits(dtype, layout):
    """−0.0 stays −0.0 when nothing is added to it; +0.0 is what a token without rows gets."""
    xs = [torch.tensor([[-0.0, 1.0], [-0.0, 2.0]], dtype=dtype), torch.empty(0, 2, dtype=dtype)]
    idx = [torch.tensor([[3, -1], [-1, -1]]), torch.empty(0, 2, dtype=torch.int64)]
    sent = reference.dispatch(xs, idx, None, 4, layout, capacity=2)
    assert sent.topk_weights is None
    for hops in ("node", "rank"):
        back = reference.combine(sent.x, sent.bookkeeping, hops=hops, node_of=[0, 1]).x
        assert torch.equal(torch.signbit(back[0]), torch.tensor([[True, False], [False, False]]))
        assert torch.equal(back[0][:, 1], torch.tensor([1.0, 0.0], dtype=dtype))


def test_levels_round_and_their_order_is_seen():
    """bf16 has 8 significant bits: 256 + 1 rounds to 256, so where the sum is cut matters."""
    xs = [torch.ones(1, 1, dtype=torch.bfloat16)] + [torch.empty(0, 1, dtype=torch.bfloat16)] * 3
    idx = [torch.tensor([[0, 1, 2, 3]])] + [torch.empty(0, 4, dtype=torch.int64)] * 3
    sent = reference.dispatch(xs, idx, None, 4)
    ys = [torch.full((1, 1), v, dtype=torch.bfloat16) for v in (256.0, 1.0, 1.0, 1.0)]
    results = {
        (hops, *node_of): reference.combine(ys, sent.bookkeeping, hops=hops, node_of=node_of).x[0]
        for hops, node_of in [("rank", [0] * 4), ("node", [0, 0, 1, 1]), ("node", [1, 0, 0, 0])]
    }
    assert [float(r) for r in results.values()] == [260.0, 258.0, 260.0]  # 259 is a tie: even
    bias = [torch.full((len(x), 1), -256.0) for x in xs]
    assert float(reference.combine(ys, sent.bookkeeping, None, bias, hops="rank").x[0]) == 3.0
    out = reference.combine(ys, sent.bookkeeping, hops="rank", out_dtype=torch.float32).x[0]
    assert out.dtype == torch.float32
    assert float(out) == 259.0


def test_wrong_arguments_say_what_was_expected():
    case = make_case([4, 4], num_experts=2, num_topk=1, routing="hot")
    with pytest.raises(ValueError, match="capacity: expected a number"):
        case.dispatch("padded")
    with pytest.raises(ValueError, match="capacity: expected at least 8, got 7"):
        case.dispatch("padded", capacity=7)
    sent = case.dispatch("rank")
    with pytest.raises(ValueError, match="weights: expected None"):
        reference.combine(sent.x, sent.bookkeeping, sent.topk_weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_of_dispatch_is_combine(layout):
    case = make_case([3, 0, 2], num_experts=5, num_topk=2, dtype=torch.float64)
    xs = [x.requires_grad_() for x in case.xs]
    sent = case.dispatch(layout, capacity=5)
    grads = [torch.randn_like(x) for x in sent.x]
    torch.autograd.backward(sent.x, grads)
    want = reference.combine(grads, sent.bookkeeping, hops="rank").x
    for x, expected in zip(xs, want, strict=True):
        torch.testing.assert_close(x.grad, expected)


def test_weighted_combine_is_differentiable():
    case = make_case([3, 1], num_experts=3, num_topk=2, dtype=torch.float64)
    sent = case.dispatch("expert")
    ys = [x.detach().requires_grad_() for x in sent.x]
    weights = [w.double().requires_grad_() for w in sent.topk_weights]

    def run(*args):
        return tuple(reference.combine(args[:2], sent.bookkeeping, args[2:]).x)

    assert torch.autograd.gradcheck(run, (*ys, *weights))


def test_64_ranks():
    case = make_case([32] * 64, num_experts=256, num_topk=8, routing="full", dtype=torch.bfloat16)
    case.node_of = [r // 8 for r in range(64)]
    sent = case.dispatch("rank")
    back = reference.combine(sent.x, sent.bookkeeping, node_of=case.node_of).x
    assert sum(len(x) for x in sent.x) >= sum(len(x) for x in back)
