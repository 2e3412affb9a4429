"""A Mixture-of-Experts layer in 40 lines, its experts split over the ranks, with gradients.

python examples/02_moe_layer.py                                 # starts four CPU ranks by itself
torchrun --nproc-per-node 4 examples/02_moe_layer.py            # one host
torchrun --nnodes 2 --nproc-per-node 4 --rdzv-endpoint HOST:29500 …    # the same on several

It compares output and all gradients with the same layer in plain torch, all experts on one rank.
"""

import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import silu

import moe_comm

HIDDEN, INNER, NUM_EXPERTS, TOPK = 64, 128, 8, 2


# --- the layer ---------------------------------------------------------------------------------------


class MoELayer(nn.Module):
    """Top-k of softmax scores, SwiGLU experts. Holds the experts of this rank: the others hold the rest."""

    def __init__(self, hidden: int, inner: int, num_experts: int, topk: int):
        super().__init__()
        self.num_experts, self.topk = num_experts, topk
        self.num_local = num_experts // dist.get_world_size()
        self.router = nn.Linear(hidden, num_experts, bias=False)
        self.up = nn.Parameter(torch.empty(self.num_local, hidden, 2 * inner))
        self.down = nn.Parameter(torch.empty(self.num_local, inner, hidden))
        self.buffer = moe_comm.Buffer(
            hidden=hidden, topk=topk, num_experts=num_experts, dtype=torch.float32
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` [T, hidden], any T."""
        scores, topk_idx = self.router(x).softmax(-1).topk(self.topk)
        d = moe_comm.dispatch(
            self.buffer, x, topk_idx, scores, num_experts=self.num_experts, layout="expert"
        )  # fmt: skip
        rows = d.x.split(d.tokens_per_expert.tolist())
        y = torch.cat([expert(r, self.up[e], self.down[e]) for e, r in enumerate(rows)])
        return moe_comm.combine(self.buffer, y, d.handle, weights=d.topk_weights)


def expert(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, value = (x @ up).chunk(2, dim=-1)
    return (silu(gate) * value) @ down


# --- the check ---------------------------------------------------------------------------------------


def plain(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same with all experts here, token by token."""
    scores, topk_idx = (x @ router.t()).softmax(-1).topk(TOPK)
    rows = []
    for t in range(len(x)):
        rows.append(
            sum(
                scores[t, k] * expert(x[t], up[e], down[e])
                for k, e in enumerate(topk_idx[t].tolist())
            )
        )
    return torch.stack(rows)


def main() -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights on every rank, of which each layer keeps its part
    layer = MoELayer(HIDDEN, INNER, NUM_EXPERTS, TOPK)
    up = torch.randn(NUM_EXPERTS, HIDDEN, 2 * INNER) / 8
    down = torch.randn(NUM_EXPERTS, INNER, HIDDEN) / 8
    mine = slice(rank * layer.num_local, (rank + 1) * layer.num_local)
    with torch.no_grad():
        layer.up.copy_(up[mine])
        layer.down.copy_(down[mine])

    torch.manual_seed(100 + rank)
    x = torch.randn(5 + rank, HIDDEN, requires_grad=True)
    out = layer(x)
    (out * torch.arange(HIDDEN)).sum().backward()  # collective, too

    whole = [t.detach().clone().requires_grad_() for t in (x, layer.router.weight, up, down)]
    want = plain(*whole)
    (want * torch.arange(HIDDEN)).sum().backward()
    for weights in whole[2:]:
        dist.all_reduce(weights.grad)  # an expert's gradient has contributions of all ranks' tokens
    got = [x.grad, layer.router.weight.grad, layer.up.grad, layer.down.grad]
    wanted = [whole[0].grad, whole[1].grad, whole[2].grad[mine], whole[3].grad[mine]]
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    error = max(
        float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, wanted, strict=True)
    )
    print(
        f"rank {rank} of {num_ranks}: output and 4 gradients as in plain torch, largest error {error:.1e}",
        flush=True,
    )
    layer.buffer.close()


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
