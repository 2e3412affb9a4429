"""A decode loop: few tokens, two micro-batches, and a hook for each call, so that one computes while the other travels.

python examples/05_decode_overlap.py                                   # starts four CPU ranks by itself
torchrun --nproc-per-node 4 examples/05_decode_overlap.py              # one host
torchrun --nnodes 2 --nproc-per-node 4 --rdzv-endpoint HOST:29500 …    # the same on several

A call with async_op="hook" only sends; rows travel while this thread does something else; the hook receives.
hops="rank" links every pair of ranks directly, and layout="padded" gives tensors of one shape whatever the routing.
"""

import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor

import moe_comm

HIDDEN, NUM_EXPERTS, TOPK, MAX_TOKENS, STEPS = 64, 8, 2, 8, 5


class Model:
    """One layer: "attention" (any computation on this rank's tokens), then experts. The same weights on every rank."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.attention = torch.randn(HIDDEN, HIDDEN, generator=g) / 8
        self.router = torch.randn(HIDDEN, NUM_EXPERTS, generator=g)
        self.experts = torch.randn(NUM_EXPERTS, HIDDEN, HIDDEN, generator=g) / 8

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x, topk_idx, topk_weights)"""
        x = torch.tanh(x @ self.attention)
        weights, idx = (x @ self.router).softmax(-1).topk(TOPK)
        return x, idx, weights


def decode(model: Model, buffer: moe_comm.Buffer, batches: list[Tensor]) -> list[Tensor]:
    """STEPS steps of two micro-batches [T, H]. At most two calls are un-hooked at any time."""
    per_rank = NUM_EXPERTS // buffer.num_ranks
    mine = model.experts[buffer.rank * per_rank :][:per_rank]
    a, b = batches
    for _ in range(STEPS):
        a, idx, weights = model.attend(a)
        there_a = send(buffer, a, idx, weights)
        b, idx, weights = model.attend(b)  # while a travels
        there_b = send(buffer, b, idx, weights)
        back_a = compute(buffer, there_a, mine)  # while b travels
        back_b = compute(buffer, there_b, mine)  # while a returns
        back_a()
        a = a + back_a.result
        back_b()
        b = b + back_b.result
    return [a, b]


def send(buffer: moe_comm.Buffer, x: Tensor, idx: Tensor, weights: Tensor) -> moe_comm.Hook:
    return buffer.dispatch(
        x, idx, weights, num_experts=NUM_EXPERTS, layout="padded", async_op="hook"
    )  # fmt: skip


def compute(buffer: moe_comm.Buffer, hook: moe_comm.Hook, experts: Tensor) -> moe_comm.Hook:
    """Receives one micro-batch, lets the experts work, and sends the results back."""
    hook()
    d = hook.result
    y = torch.bmm(
        d.x, experts
    ).relu()  # [L, R * MAX_TOKENS, H]; rows behind tokens_per_expert are zeros
    return buffer.combine(y, d.handle, weights=d.topk_weights, async_op="hook")


def plain(model: Model, x: Tensor) -> Tensor:
    """The same steps with all experts here."""
    for _ in range(STEPS):
        x, idx, weights = model.attend(x)
        every = torch.einsum("th,ehi->tei", x, model.experts).relu()
        picked = every.gather(1, idx[:, :, None].expand(-1, -1, HIDDEN))
        x = x + (weights[:, :, None] * picked).sum(1)
    return x


def main() -> None:
    rank, model = dist.get_rank(), Model()
    buffer = moe_comm.Buffer(
        hidden=HIDDEN, topk=TOPK, num_experts=NUM_EXPERTS, dtype=torch.float32, max_tokens=MAX_TOKENS, hops="rank"
    )  # fmt: skip
    torch.manual_seed(rank)
    batches = [
        torch.randn(tokens, HIDDEN) for tokens in (MAX_TOKENS, rank)
    ]  # rank 0 idles in the second one
    with torch.no_grad():
        got = decode(model, buffer, batches)
        torch.testing.assert_close(got, [plain(model, x) for x in batches], rtol=1e-4, atol=1e-4)
    calls = buffer.stats()["dispatches"]
    print(
        f"rank {rank}: {STEPS} steps of 2 micro-batches as in plain torch, {calls} dispatches",
        flush=True,
    )
    buffer.close()


def one_of_four(rank: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=rank, world_size=4)
    main()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("gloo")
        main()
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(one_of_four, (os.path.join(folder, "store"),), nprocs=4)
