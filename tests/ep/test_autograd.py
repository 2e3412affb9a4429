"""Gradients: ops and plain Functions against one process with all experts; opcheck, gradcheck, compile."""

import pytest
import torch
from cases import make_case
from torch.utils.checkpoint import checkpoint

import moe_comm

R, E, K, H = 4, 7, 3, 16
OPTIONS = {"hidden": H, "topk": K, "num_experts": E, "ranks_per_node": 2, "dtype": torch.float64}


def inputs(seed=0, tokens=(5, 0, 9, 3)):
    case = make_case(
        R, seed=seed, tokens=list(tokens), hidden=H, topk=K, num_experts=E, dtype=torch.float64
    )
    g = torch.Generator().manual_seed(seed + 1)
    leaves = []
    for r in range(R):
        x = case.xs[r].clone().requires_grad_()
        w = case.weights[r].clone().requires_grad_()
        b = torch.randn(case.xs[r].shape, generator=g, dtype=torch.float64).requires_grad_()
        leaves.append((x, w, b))
    matrices = torch.randn(E, H, H, generator=g, dtype=torch.float64)
    return case, leaves, matrices


def experts(d, layout, rank, matrices, num_ranks=R):
    """Each expert is a matrix; layout "rank" adds its experts here, weighted."""
    L = -(-E // num_ranks)
    own = matrices[rank * L : rank * L + L]
    if layout == "padded":
        return torch.einsum("lth,lhg->ltg", d.x, own) if len(own) else d.x
    if layout == "expert":
        return torch.einsum(
            "th,thg->tg", d.x, matrices[(d.topk_idx.clamp(min=0) + rank * L).clamp(max=E - 1)]
        )
    out = torch.zeros_like(d.x)
    for k in range(K):
        ids = d.topk_idx[:, k]
        row = torch.einsum(
            "th,thg->tg", d.x, matrices[(ids.clamp(min=0) + rank * L).clamp(max=E - 1)]
        )
        out = out + row * (d.topk_weights[:, k : k + 1].double() * (ids >= 0).unsqueeze(1))
    return out


def by_ops(buffer, x, idx, w, b, layout, rank, matrices):
    capacity = 64 if layout == "padded" else None
    d = moe_comm.dispatch(buffer, x, idx, w, num_experts=E, layout=layout, capacity=capacity)
    y = experts(d, layout, rank, matrices, buffer.num_ranks)
    return moe_comm.combine(
        buffer, y, d.handle, weights=None if layout == "rank" else d.topk_weights, bias=b
    )


def by_functions(buffer, x, idx, w, b, layout, rank, matrices):
    rx, ridx, rw, *handle = moe_comm.DispatchFunction.apply(
        buffer, x, idx, w, E, layout, 1, 64 if layout == "padded" else 0
    )
    y = experts(moe_comm.Dispatched(rx, ridx, rw, handle[6], None), layout, rank, matrices)
    return moe_comm.CombineFunction.apply(buffer, y, None if layout == "rank" else rw, b, *handle)


def dense(x, idx, w, b, matrices):
    out = b
    for k in range(K):
        row = torch.einsum("th,thg->tg", x, matrices[idx[:, k].clamp(min=0)])
        out = out + row * (w[:, k : k + 1].double() * (idx[:, k] >= 0).unsqueeze(1))
    return out


def check(run_threads, model, layout, hops):
    case, leaves, matrices = inputs()
    wanted = []
    for r in range(R):
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves[r]]
        out = dense(copies[0], case.idx[r], copies[1], copies[2], matrices)
        (out**2).sum().backward()
        wanted.append((out.detach(), *(leaf.grad for leaf in copies)))

    def body(buffer, rank):
        x, w, b = leaves[rank]
        for _ in range(2):
            x.grad = w.grad = b.grad = None
            out = model(buffer, x, case.idx[rank], w, b, layout, rank, matrices)
            (out**2).sum().backward()
            for got, want in zip((out.detach(), x.grad, w.grad, b.grad), wanted[rank]):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                x.grad, wanted[rank][1], rtol=1e-6, atol=1e-6
            )  # weights are float32

    run_threads(body, R, hops=hops, **OPTIONS)


@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
@pytest.mark.parametrize("hops", ["node", "rank"])
@pytest.mark.parametrize("model", [by_ops, by_functions])
def test_gradients(run_threads, model, hops, layout):
    check(run_threads, model, layout, hops)


def test_rank_that_skips_its_experts_stays_in_the_graph(run_threads):
    """Rank 1 returns zeros without looking at its rows: its dispatch still takes part in the backward."""
    case, leaves, matrices = inputs()

    def body(buffer, rank):
        x, w, _ = leaves[rank]
        d = moe_comm.dispatch(buffer, x, case.idx[rank], w, num_experts=E)
        y = torch.zeros_like(d.x) if rank == 1 else experts(d, "rank", rank, matrices)
        moe_comm.combine(buffer, y, d.handle).sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape

    run_threads(body, R, **OPTIONS)


def test_gradcheck(run_threads):
    """fp64, numerically: every rank perturbs its inputs in turn, the others run the same calls along."""
    case, leaves, matrices = inputs(tokens=(2, 0, 1, 2))

    def body(buffer, rank):
        def both(x, w):
            d = moe_comm.dispatch(buffer, x, case.idx[rank], w, num_experts=E, layout="expert")
            y = experts(d, "expert", rank, matrices)
            return moe_comm.combine(buffer, y, d.handle, weights=d.topk_weights)

        x, w, _ = leaves[rank]
        # x: linear, so one central difference per entry is exact but for rounding. Same number of calls on all ranks.
        eps = 2.0**-10
        rows, worst = 2, 0.0
        seeds = [torch.randn(case.xs[r].shape, dtype=torch.float64) for r in range(R)]
        out = both(x, w)
        (out * seeds[rank][: out.shape[0]]).sum().backward()
        for turn in range(R):
            for row in range(rows):
                for column in range(0, H, 5):
                    values = []
                    for sign in (1, -1):
                        moved = x.detach().clone()
                        if turn == rank and row < moved.shape[0]:
                            moved[row, column] += sign * eps
                        values.append((both(moved, w.detach()) * seeds[rank]).sum())
                    if turn == rank and row < x.shape[0]:
                        numeric = (values[0] - values[1]) / (2 * eps)
                        worst = max(worst, float((numeric - x.grad[row, column]).abs()))
                for k in range(K):
                    values = []
                    for sign in (1, -1):
                        moved = w.detach().clone()
                        if turn == rank and row < moved.shape[0]:
                            moved[row, k] += sign * eps
                        values.append((both(x.detach(), moved) * seeds[rank]).sum())
                    if turn == rank and row < x.shape[0]:
                        numeric = (values[0] - values[1]) / (2 * eps)
                        worst = max(
                            worst, float((numeric - w.grad[row, k]).abs()) / 100
                        )  # float32 weights
        assert worst < 1e-6, worst

    run_threads(body, R, timeout_s=100, **OPTIONS)


def test_torch_gradcheck_on_one_rank(run_threads):
    """torch.autograd.gradcheck itself, where it needs no partner."""
    case, leaves, matrices = inputs(tokens=(4, 0, 0, 0))

    def body(buffer, rank):
        x, _, b = leaves[0]
        w = case.weights[0]

        def both(x, b):
            d = moe_comm.dispatch(buffer, x, case.idx[0], w, num_experts=E, layout="expert")
            y = torch.einsum("th,thg->tg", d.x, matrices[d.topk_idx])
            return moe_comm.combine(buffer, y, d.handle, weights=d.topk_weights, bias=b)

        assert torch.autograd.gradcheck(both, (x, b))

    run_threads(body, 1, hidden=H, topk=K, num_experts=E, dtype=torch.float64)


@pytest.mark.plain("one rank: no network")
@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
def test_opcheck(run_threads, layout):
    case, leaves, _ = inputs(tokens=(4, 0, 0, 0))

    def body(buffer, rank):
        x, w, b = leaves[0]
        capacity = 64 if layout == "padded" else 0
        args = (buffer.name, x, case.idx[0], w, E, layout, 1, capacity)
        torch.library.opcheck(torch.ops.moe_comm.dispatch.default, args)
        out, _, weights, handle = torch.ops.moe_comm.dispatch(*args)
        y = out.detach().clone().requires_grad_()
        weights = None if layout == "rank" else weights.detach().clone().requires_grad_()
        handle = [t.detach() for t in handle]
        torch.library.opcheck(
            torch.ops.moe_comm.combine.default, (buffer.name, y, handle, weights, b)
        )
        torch.library.opcheck(
            torch.ops.moe_comm.dispatch_again.default,
            (buffer.name, x.detach(), handle, list(y.shape)),
        )
        columns = torch.ones(y.shape[:-1] if layout != "rank" else (y.shape[0], K))
        torch.library.opcheck(
            torch.ops.moe_comm.combine_columns.default, (buffer.name, y.detach(), handle, columns)
        )

    run_threads(body, 1, hidden=H, topk=K, num_experts=E, dtype=torch.float64)


def _compiled(rank, group, layout):
    case, leaves, matrices = inputs()
    with moe_comm.Buffer(group, **{**OPTIONS, "ranks_per_node": 1}, timeout_s=100) as buffer:
        x, w, b = leaves[rank]

        def model(x, w, b):
            return by_ops(buffer, x, case.idx[rank], w, b, layout, rank, matrices)

        eager = model(x, w, b)
        (eager**2).sum().backward()
        want = [t.grad.clone() for t in (x, w, b)]
        x.grad = w.grad = b.grad = None
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = compiled(x, w, b)
        (out**2).sum().backward()
        torch.testing.assert_close(out, eager)
        for got, wanted in zip((x.grad, w.grad, b.grad), want):
            torch.testing.assert_close(got, wanted)


@pytest.mark.plain("compiling takes most of its time")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
def test_compile_fullgraph(run_ranks, layout):
    run_ranks(_compiled, 2, layout, timeout_s=280)


def _exported(rank, group):
    with moe_comm.Buffer(group, **{**OPTIONS, "ranks_per_node": 1}, timeout_s=100) as buffer:

        class Layer(torch.nn.Module):
            def forward(self, x, idx, w):
                d = moe_comm.dispatch(
                    buffer, x, idx, w, num_experts=E, layout="padded", capacity=64
                )
                return moe_comm.combine(buffer, d.x * 2, d.handle, weights=d.topk_weights)

        case, _, _ = inputs(tokens=(4, 3, 2, 5))
        args = (case.xs[rank], case.idx[rank], case.weights[rank])
        program = torch.export.export(Layer(), args)
        assert any("moe_comm.dispatch" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(*args), Layer()(*args))


@pytest.mark.plain("tracing takes most of its time")
@pytest.mark.timeout(300)
def test_export(run_ranks):
    run_ranks(_exported, 2, timeout_s=280)


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_activation_checkpointing(run_threads, layout):
    """The forward runs again during the backward: one dispatch and one combine more, the same on every rank."""
    case, leaves, matrices = inputs()

    def body(buffer, rank):
        x, w, b = leaves[rank]
        grads = []
        for again in (False, True):
            x.grad = w.grad = b.grad = None
            args = (buffer, x, case.idx[rank], w, b, layout, rank, matrices)
            out = checkpoint(by_ops, *args, use_reentrant=False) if again else by_ops(*args)
            (out**2).sum().backward()
            grads.append([t.grad.clone() for t in (x, w, b)])
        for one, two in zip(*grads):
            assert torch.equal(one, two)

    run_threads(body, R, **OPTIONS)


def test_two_micro_batches_backward_in_either_order(run_threads):
    case_a, leaves_a, matrices = inputs(0)
    case_b, leaves_b, _ = inputs(5, tokens=(0, 4, 2, 0))

    def body(buffer, rank):
        for order in (1, -1):
            outs = []
            for case, leaves in ((case_a, leaves_a), (case_b, leaves_b)):
                x, w, b = leaves[rank]
                x.grad = w.grad = b.grad = None
                outs.append(by_ops(buffer, x, case.idx[rank], w, b, "expert", rank, matrices))
            for out in outs[::order]:
                (out**2).sum().backward()
            for case, leaves in ((case_a, leaves_a), (case_b, leaves_b)):
                x, w, b = (t.detach().clone().requires_grad_() for t in leaves[rank])
                (dense(x, case.idx[rank], w, b, matrices) ** 2).sum().backward()
                torch.testing.assert_close(leaves[rank][0].grad, x.grad, rtol=1e-6, atol=1e-6)

    run_threads(body, R, **OPTIONS)
