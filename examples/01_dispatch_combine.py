"""One dispatch and one combine: tokens go to the ranks of their experts, weighted sums of results come back.

python examples/01_dispatch_combine.py                                 # starts four CPU ranks by itself
torchrun --nproc-per-node 4 examples/01_dispatch_combine.py            # one host
torchrun --nnodes 2 --nproc-per-node 4 --rdzv-endpoint HOST:29500 …    # the same on several
"""

import os
import tempfile

import torch
import torch.distributed as dist

import moe_comm

HIDDEN, NUM_EXPERTS, TOPK = 64, 16, 4


def main() -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    buffer = moe_comm.Buffer(hidden=HIDDEN, topk=TOPK, num_experts=NUM_EXPERTS)

    # Ranks may have different numbers of tokens, or none.
    torch.manual_seed(rank)
    x = torch.randn(3 * rank, HIDDEN)
    topk_weights, topk_idx = torch.randn(len(x), NUM_EXPERTS).softmax(-1).topk(TOPK)

    # layout="expert": one row for each (token, local expert), grouped by local expert.
    d = buffer.dispatch(x, topk_idx, topk_weights, num_experts=NUM_EXPERTS, layout="expert")

    # Expert e multiplies by e + 1. Rank r owns the experts from r * per_rank on.
    per_rank = -(-NUM_EXPERTS // num_ranks)
    y = d.x * (rank * per_rank + d.topk_idx + 1)[:, None]

    # Rows return to their source, which gets the sum of them, each times its weight.
    out = buffer.combine(y, d.handle, weights=d.topk_weights)

    # The same without any communication.
    want = x * (topk_weights * (topk_idx + 1)).sum(-1, keepdim=True)
    torch.testing.assert_close(out, want)
    print(
        f"rank {rank}: {len(x)} tokens out, {len(d.x)} rows in, {d.tokens_per_expert.tolist()} by expert",
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
