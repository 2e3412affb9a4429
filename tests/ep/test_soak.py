"""Many iterations, many ranks, counters about to wrap: no stale value, ever."""

import pytest
import torch
from cases import same

from moe_comm import reference


@pytest.mark.parametrize("hops", ["node", "rank"])
def test_thousand_iterations(run_threads, hops):
    """T changes from call to call, 0 on some ranks, skewed routing, rounds now and then. Every row is checked.

    x holds (iteration, rank, token); so a row of an earlier iteration, of another rank, or a missing one is seen.
    """
    num_experts, topk, hidden, steps = 6, 2, 32, 500  # two hops: 1000 in all

    def body(buffer, rank):
        g = torch.Generator().manual_seed(77)
        for step in range(steps):
            tokens = torch.randint(0, 9, (4,), generator=g) * (torch.rand(4, generator=g) > 0.25)
            if step % 50 == 0:
                tokens[step // 50 % 4] = 60  # rounds
            skew = torch.rand(num_experts, generator=g) ** 4 + 0.01
            xs, idx = [], []
            for r, t in enumerate(tokens.tolist()):
                base = torch.tensor([step, r, 0], dtype=torch.float32)
                x = base.repeat(t, 1)
                x[:, 2] = torch.arange(t)
                xs.append(torch.nn.functional.pad(x, (0, hidden - 3)))
                score = torch.rand(t, num_experts, generator=g) ** (1 / skew)
                idx.append(score.argsort(1, descending=True)[:, :topk])
            got = buffer.dispatch(xs[rank], idx[rank], num_experts=num_experts)
            owned = range(rank * 2, min(num_experts, rank * 2 + 2))
            rows = (
                [x[((i >= owned.start) & (i < owned.stop)).any(1)] for x, i in zip(xs, idx)]
                if len(owned)
                else [xs[0][:0]]
            )
            assert torch.equal(got.x, torch.cat(rows)), f"step {step}"
            y = buffer.combine(got.x, got.handle)
            ranks_hit = torch.stack([(idx[rank] // 2 == r).any(1) for r in range(4)], 1).sum(
                1, keepdim=True
            )
            assert torch.equal(y, xs[rank] * ranks_hit), f"step {step}"

    run_threads(body, 4, timeout_s=110, hops=hops, ranks_per_node=2, hidden=32, topk=2, num_experts=6,
                dtype=torch.float32, window_bytes=32 * 1024)  # fmt: skip


@pytest.mark.plain("64 proxies that poll without rest on two cores take minutes")
def test_sixty_four_ranks_of_kimi_k2(run_threads):
    """E 384, K 8, H 7168 on 64 ranks as 8 nodes of 8, in one process, a few tokens each, C of 2 rows."""
    num_ranks, num_experts, topk, hidden = 64, 384, 8, 7168
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 5, (num_ranks,), generator=g).tolist()
    xs = [torch.randn(t, hidden, generator=g).bfloat16() for t in tokens]
    idx = [torch.rand(t, num_experts, generator=g).argsort(1)[:, :topk] for t in tokens]
    ws = [torch.rand(t, topk, generator=g) for t in tokens]
    want = reference.dispatch(xs, idx, ws, num_experts)
    back = reference.combine(want.x, want.bookkeeping, node_of=[r // 8 for r in range(num_ranks)])

    def body(buffer, rank):
        for _ in range(2):
            got = buffer.dispatch(xs[rank], idx[rank], ws[rank], num_experts=num_experts)
            assert torch.equal(got.x, want.x[rank]) and torch.equal(
                got.topk_idx, want.topk_idx[rank]
            )
            assert same(buffer.combine(got.x, got.handle), back.x[rank])
        return buffer.layout.capacity

    capacity = run_threads(
        body, num_ranks, timeout_s=110, ranks_per_node=8, window_bytes=5_000_000, hidden=hidden, topk=topk,
        num_experts=num_experts,
    )  # fmt: skip
    assert capacity[0] <= 4  # rounds were needed


def test_large_t(run_threads):
    """T = 100 000 on one rank, next to nothing on the other; many rounds."""

    def body(buffer, rank):
        t = (100_000, 3)[rank]
        x = torch.arange(t, dtype=torch.float32).view(-1, 1).repeat(1, 4)
        idx = torch.stack([torch.arange(t) % 4, (torch.arange(t) + 1) % 4], 1)
        got = buffer.dispatch(x, idx, num_experts=4)
        y = buffer.combine(got.x, got.handle)
        hit = torch.stack([(idx // 2 == r).any(1) for r in range(2)], 1).sum(1, keepdim=True)
        assert torch.equal(y, x * hit)
        assert got.x.shape[0] >= int((idx // 2 == rank).any(1).sum())

    run_threads(body, 2, timeout_s=100, ranks_per_node=1, window_bytes=1 << 20, hidden=4, topk=2, num_experts=4,
                dtype=torch.float32)  # fmt: skip


@pytest.mark.parametrize("first", [2, 62, 2**16 - 4, 2**31 - 2, 2**32 - 2, 2**62])
def test_epochs_near_their_wrap(run_threads, monkeypatch, first):
    """6 bits of the epoch travel, 16 stand in a command: neither wrap is seen."""
    monkeypatch.setenv("MOE_COMM_FIRST_EPOCH", str(first))

    def body(buffer, rank):
        for step in range(5):
            x = torch.full((3, 8), float(step + rank))
            got = buffer.dispatch(x, torch.tensor([[0, 3], [1, 2], [3, -1]]), num_experts=4)
            y = buffer.combine(got.x, got.handle)
            assert torch.equal(y[0], 2 * x[0])
            assert torch.equal(y[2], x[2])

    run_threads(body, 4, ranks_per_node=2, hidden=8, topk=2, num_experts=4, dtype=torch.float32)
