"""A Hugging Face MoE model, its experts split over ranks by moe_comm, trained for a few steps.

python examples/03_transformers_ep.py                                 # starts two CPU ranks by itself
torchrun --nproc-per-node 4 examples/03_transformers_ep.py            # one host
torchrun --nnodes 2 --nproc-per-node 4 --rdzv-endpoint HOST:29500 …   # the same on several
"""

import os
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_comm.integrations.transformers as expert_parallel

TEXT = b"A token goes to the ranks that hold its experts, and the sum of their answers comes back. "


def train() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # every rank starts from the same weights
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=16, num_experts_per_tok=4,
        initializer_range=0.06,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)

    # The two lines that matter: a mesh of all ranks, and experts that live on one of them each.
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))["ep"]
    expert_parallel.parallelize(model, mesh)

    # foreach=False: expert parameters are DTensors, the others are not, and torch's fused loops take no mixture.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    text = torch.frombuffer(bytearray(TEXT * 2), dtype=torch.uint8).long()
    start = 7 * dist.get_rank()  # each rank reads its own part
    tokens = torch.stack([text[start + i : start + i + 64] for i in (0, 20)])
    for step in range(10):
        optimizer.zero_grad()
        loss = model(
            tokens, labels=tokens, use_cache=False
        ).loss  # the mean over this rank's tokens
        loss.backward()
        expert_parallel.all_reduce_gradients(model, mesh, mean=True)
        optimizer.step()
        dist.all_reduce(mean := loss.detach() / mesh.size())
        if dist.get_rank() == 0:
            print(f"step {step + 1:2}  loss {mean.item():.4f}", flush=True)

    stats = expert_parallel.buffers()[0].stats()
    if dist.get_rank() == 0:
        inside, between = stats["rows_local"], stats["rows_link"]
        print(f"rank 0 sent {inside} rows inside its node and {between} to others")
    expert_parallel.close()


def one_of_two(rank: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    train()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("gloo")
        train()
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(one_of_two, (os.path.join(folder, "store"),), nprocs=2)
