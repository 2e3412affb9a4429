"""A MoE layer of Megatron-core, its experts split over ranks by moe_comm, trained for a few steps. No DeepEP, no CUDA.

pip install --no-deps megatron-core==0.16.1
python examples/04_megatron_layer.py                                  # starts two CPU ranks by itself
torchrun --nproc-per-node 4 examples/04_megatron_layer.py             # one host
torchrun --nnodes 2 --nproc-per-node 4 --rdzv-endpoint HOST:29500 …   # the same on several
"""

import contextlib
import os
import tempfile

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer

import moe_comm.integrations.megatron as expert_parallel

HIDDEN, EXPERTS, TOKENS = 64, 8, 256

if not torch.cuda.is_available():  # what Megatron-core takes for granted
    torch.cuda.current_device = lambda: torch.device("cpu")
    CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()
    moe_utils.te_general_gemm = None


def train() -> None:
    torch.set_num_threads(1)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=num_ranks)

    # The line that matters: layers built from now on with the flex dispatcher reach their experts through moe_comm.
    expert_parallel.install()

    torch.manual_seed(0)  # every rank starts from the same router
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, moe_ffn_hidden_size=128, num_moe_experts=EXPERTS,
        moe_router_topk=2, moe_router_dtype="fp32", moe_router_load_balancing_type="none", moe_grouped_gemm=False,
        add_bias_linear=False, use_cpu_initialization=True, expert_model_parallel_size=num_ranks,
        moe_token_dispatcher_type="flex",
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    layer = MoELayer(config, spec.submodules)
    layer.set_layer_number(1)

    # What to learn: a map that is another one in each quarter of the space. Every rank has tokens of its own.
    maps = torch.randn(4, HIDDEN, HIDDEN) / HIDDEN**0.5
    torch.manual_seed(1 + rank)  # from here on, ranks differ: in their experts and in their tokens
    for weight in layer.experts.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    x = torch.randn(TOKENS, 1, HIDDEN)
    quarter = (x[..., 0] > 0).long() + 2 * (x[..., 1] > 0).long()
    target = torch.einsum("tbh,tbhk->tbk", x, maps[quarter])

    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    for step in range(10):
        optimizer.zero_grad()
        out, _ = layer(x)  # [tokens, 1, hidden]
        loss = (out - target).square().mean()
        (loss / num_ranks).backward()  # collective; experts get the gradients of all ranks' tokens
        dist.all_reduce(layer.router.weight.grad)  # the router is everybody's
        optimizer.step()
        dist.all_reduce(mean := loss.detach() / num_ranks)
        if rank == 0:
            print(f"step {step + 1:2}  loss {mean.item():.4f}", flush=True)

    stats = expert_parallel.buffers()[0].stats()
    if rank == 0:
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
