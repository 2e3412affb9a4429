"""A program that says `import deep_ep`, on moe_comm. It needs no change but where it named CUDA:

    -    dist.init_process_group("nccl")
    +    dist.init_process_group("gloo")
    -    torch.set_default_device(torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    +    torch.set_default_device("cpu")
    -    buffer = deep_ep.Buffer(dist.group.WORLD, int(1e9), int(1e9), low_latency_mode=True, num_qps_per_rank=24)
    +    buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_mode=True)

python -m moe_comm.as_deep_ep examples/06_moving_from_deep_ep.py                              # starts four CPU ranks
torchrun --nproc-per-node 4 -m moe_comm.as_deep_ep examples/06_moving_from_deep_ep.py

The last of the three changes is not needed: sizes are taken, and tune nothing. A program may as well say
`from moe_comm import deep_ep`. What is the same and what differs: moe_comm/deep_ep/README.md.
"""

import os
import tempfile

import deep_ep
import torch
import torch.distributed as dist

HIDDEN, NUM_EXPERTS, TOPK, MAX_TOKENS = 512, 16, 4, 32


def main() -> None:
    torch.set_default_device("cpu")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_mode=True)
    torch.manual_seed(rank)
    x = torch.randn(MAX_TOKENS - rank, HIDDEN).bfloat16()
    topk_weights, topk_idx = torch.randn(len(x), NUM_EXPERTS).softmax(-1).topk(TOPK)
    topk_idx = topk_idx.to(deep_ep.topk_idx_t)
    first, num_local = rank * (NUM_EXPERTS // num_ranks), NUM_EXPERTS // num_ranks
    scale = torch.arange(1, NUM_EXPERTS + 1) / 16  # what expert e does: multiply by it

    # Normal mode: a row for each (token, rank); weights are applied by who computes, combine only adds.
    num_per_rank, num_per_node, num_per_expert, in_rank, _ = buffer.get_dispatch_layout(
        topk_idx, NUM_EXPERTS
    )
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
        x, topk_idx=topk_idx, topk_weights=topk_weights, num_tokens_per_rank=num_per_rank,
        num_tokens_per_rdma_rank=num_per_node, is_token_in_rank=in_rank, num_tokens_per_expert=num_per_expert,
        async_finish=True,
    )  # fmt: skip
    event.current_stream_wait()
    factors = torch.where(
        recv_idx >= 0, recv_weights * scale[first + recv_idx.clamp(min=0)], 0
    ).sum(1, keepdim=True)
    out, _, _ = buffer.combine((recv_x * factors).bfloat16(), handle)

    # Low-latency mode: a padded row for each (token, expert); combine multiplies by the weights.
    packed, counts_ll, handle, _, hook = buffer.low_latency_dispatch(
        x, topk_idx, MAX_TOKENS, NUM_EXPERTS, use_fp8=False, return_recv_hook=True
    )  # fmt: skip
    hook()
    results = (packed * scale[first : first + num_local, None, None]).bfloat16()
    out_ll, _, hook = buffer.low_latency_combine(
        results, topk_idx, topk_weights, handle, return_recv_hook=True
    )
    hook()

    want = x.float() * (topk_weights * scale[topk_idx]).sum(-1, keepdim=True)
    for got in (out, out_ll):
        torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)
    assert sum(counts) == int(counts_ll.sum()) == int((recv_idx >= 0).sum())
    print(
        f"rank {rank} of {num_ranks}: both modes as in plain torch, by {deep_ep.__name__}",
        flush=True,
    )


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
