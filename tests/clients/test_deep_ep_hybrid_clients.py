"""Real frameworks that import deep_ep, unchanged, on moe_comm: Megatron-core's MoE layer and torchtitan's dispatchers.

Both are installed with --no-deps (megatron-core==0.16.1; torchtitan==0.3.0 spmd_types==0.2.3 tyro triton); what their
code expects of CUDA is replaced in the test's process.
"""

import importlib.util
import sys

import pytest
import torch
import torch.distributed as dist
from deep_ep_oracle import open_gloo, same

import moe_comm

HIDDEN, EXPERTS = 64, 8
TOKENS = [
    8,
    16,
    8,
    12,
]  # of fewer than 8 rows, a matmul of the router may be rounded otherwise than of all


def found(*modules):
    return all(importlib.util.find_spec(module) for module in modules)


def close_to(got, want, bound=2e-6):
    return bool((got - want).abs().max() <= bound * want.abs().max())


# --- Megatron-core -------------------------------------------------------------------------------

needs_megatron = pytest.mark.skipif(
    not found("megatron"), reason="needs pip install --no-deps megatron-core==0.16.1"
)


def megatron_layer(backend, num_ranks, topk):
    """A MoELayer whose weights depend on the expert only. `backend` None: one process, without deep_ep."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_layer import MoELayer

    how = {"moe_token_dispatcher_type": "allgather"}
    if backend:
        how = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, ffn_hidden_size=32, moe_ffn_hidden_size=32,
        num_moe_experts=EXPERTS, moe_router_topk=topk, expert_model_parallel_size=num_ranks,
        moe_router_dtype="fp32", moe_router_load_balancing_type="none", moe_grouped_gemm=False,
        add_bias_linear=False, use_cpu_initialization=True, **how,
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    layer = MoELayer(config, spec.submodules)
    layer.set_layer_number(1)
    first = 0 if num_ranks == 1 else dist.get_rank() * EXPERTS // num_ranks
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            parts = name.split(".")
            seed = first + int(parts[2]) if parts[0] == "experts" else 99
            g = torch.Generator().manual_seed(10 * seed + (parts[-2] == "linear_fc2"))
            weight.copy_(torch.randn(weight.shape, generator=g) * 0.2)
    return layer


def megatron_run(rank, group, num_ranks, store, backends):
    """{(backend, topk): [(out, grad of x)] of two micro-batches, backward in reverse} of this rank's tokens; for one
    rank, of all."""
    open_gloo(rank, num_ranks, store)
    if num_ranks > 1:
        moe_comm.install_as_deep_ep()
    torch.cuda.current_device = lambda: torch.device("cpu")  # the router moves its weight there
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
    parallel_state.initialize_model_parallel(expert_model_parallel_size=num_ranks)
    results = {}
    for backend in backends:
        for topk in (2, 3):
            layer = megatron_layer(backend, num_ranks, topk)
            if backend == "hybridep":
                import megatron.core.transformer.moe.fused_a2a as fused

                assert type(layer.token_dispatcher._comm_manager).__name__ == "_HybridEPManager"
            batches = []
            for seed in range(2):
                g = torch.Generator().manual_seed(seed)
                x = torch.randn(sum(TOKENS), 1, HIDDEN, generator=g)
                up = torch.randn(x.shape, generator=g)
                if num_ranks > 1:
                    tokens = TOKENS if num_ranks == 4 else [sum(TOKENS[:2]), sum(TOKENS[2:])]
                    x, up = x.split(tokens)[rank].clone(), up.split(tokens)[rank]
                x.requires_grad_()
                out, _ = layer(x)
                batches.append((x, out, up))
            for _, out, up in reversed(batches):
                (out * up).sum().backward()
            results[backend, topk] = [
                (out.detach().numpy(), x.grad.numpy()) for x, out, _ in batches
            ]
    if num_ranks > 1:
        used = sys.modules["deep_ep"]
        assert used is moe_comm.deep_ep and isinstance(fused._hybrid_ep_buffer, used.HybridEPBuffer)
    return results


@needs_megatron
@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_megatron(run_ranks, tmp_path, num_ranks):
    (alone,) = run_ranks(megatron_run, 1, 1, str(tmp_path / "one"), [None], timeout_s=140)
    split = run_ranks(
        megatron_run,
        num_ranks,
        num_ranks,
        str(tmp_path / "gloo"),
        ["deepep", "hybridep"],
        timeout_s=140,
    )
    for backend in ("deepep", "hybridep"):
        for topk in (2, 3):
            for batch in range(2):
                for what in range(2):
                    got = torch.cat(
                        [torch.from_numpy(r[backend, topk][batch][what]) for r in split]
                    )
                    want = torch.from_numpy(alone[None, topk][batch][what])
                    assert same(got, want) if topk == 2 else close_to(got, want), (
                        backend,
                        topk,
                        what,
                    )


# --- torchtitan ----------------------------------------------------------------------------------

needs_torchtitan = pytest.mark.skipif(
    not found("torchtitan", "triton"),
    reason="needs pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro triton",
)


def experts(rows, counts, first):
    """Expert e of each group of rows: something that differs, row by row."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), counts.long()) + first
    scale = torch.ones(len(rows)).index_add(0, torch.arange(len(ids)), ids.float())[:, None]
    return torch.tanh(rows * scale) * scale


def titan_run(rank, group, num_ranks, store):
    open_gloo(rank, num_ranks, store)
    moe_comm.install_as_deep_ep()
    import torch._library.opaque_object as opaque

    if not hasattr(opaque, "CustomClassBase"):  # what it is called in this version of torch
        opaque.CustomClassBase = opaque.OpaqueBase
    from torch.distributed.device_mesh import init_device_mesh
    from torchtitan.distributed.deepep import deepep, hybridep
    from torchtitan.models.common.token_dispatcher import (
        DeepEPTokenDispatcher,
        HybridEPTokenDispatcher,
        LocalTokenDispatcher,
    )

    torch.library.impl("deepep::dispatch", "CPU", deepep._dispatch_op_impl)
    torch.library.impl("deepep::combine", "CPU", deepep._combine_op_impl)
    for name in ("_dispatch_impl", "_combine_impl", "_dispatch_bwd_impl", "_combine_bwd_impl"):
        op = getattr(hybridep, name)
        op.register_kernel("cpu", op._init_fn)
    mesh = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("ep",))
    sizes = {"num_experts": EXPERTS, "top_k": 2}
    room = {"hidden_dim": HIDDEN, "num_max_tokens_per_rank": 16}
    local = LocalTokenDispatcher(LocalTokenDispatcher.Config(**sizes))
    tested = {
        "deepep": DeepEPTokenDispatcher(DeepEPTokenDispatcher.Config(**sizes, **room)),
        "deepep expanded": DeepEPTokenDispatcher(
            DeepEPTokenDispatcher.Config(**sizes, **room, cudagraphable=True)
        ),
        "hybridep": HybridEPTokenDispatcher(HybridEPTokenDispatcher.Config(**sizes, **room)),
        "hybridep, static": HybridEPTokenDispatcher(
            HybridEPTokenDispatcher.Config(
                **sizes, **room, pad_multiple=8, non_blocking_capacity_factor=1.0
            )
        ),
    }

    def layer(dispatcher, x, scores, ids, first):
        counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
        rows, counts, metadata = dispatcher.dispatch(x, scores, ids, counts)
        return dispatcher.combine(experts(rows, counts, first), metadata, x)

    for name, dispatcher in tested.items():
        dispatcher.wire_meshes(ep_mesh=mesh)
        for seed in range(2):
            g = torch.Generator().manual_seed(10 * rank + seed)
            ids = torch.rand(12, EXPERTS, generator=g).argsort(1)[:, :2].contiguous()
            inputs = torch.randn(12, HIDDEN, generator=g), torch.rand(12, 2, generator=g) + 0.1
            up = torch.randn(12, HIDDEN, generator=g)
            results = []
            for which, first in ((local, 0), (dispatcher, rank * EXPERTS // num_ranks)):
                x, scores = (t.clone().requires_grad_() for t in inputs)
                with torch.set_grad_enabled(name != "deepep expanded"):
                    out = layer(which, x, scores, ids, first)
                if out.requires_grad:
                    (out * up).sum().backward()
                results.append((out.detach(), x.grad, scores.grad))
            for got, want in zip(*reversed(results)):
                assert (got is None) == (want is None) == (
                    name == "deepep expanded"
                ) or got is not None
                if want is not None:
                    exact = same(got, want)
                    assert exact or (want is results[0][2] and close_to(got, want)), name
    used = sys.modules["deep_ep"]
    assert isinstance(deepep._buffer, used.ElasticBuffer)
    assert isinstance(hybridep._buffer, used.HybridEPBuffer)


@needs_torchtitan
@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_torchtitan(run_ranks, tmp_path, num_ranks):
    run_ranks(titan_run, num_ranks, num_ranks, str(tmp_path / "gloo"), timeout_s=200)
