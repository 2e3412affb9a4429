"""megatron-core 0.16.1 itself: MoELayer with the flex dispatcher "deepep" over moe_comm, bit-equal to one process.

    pip install --no-deps megatron-core==0.16.1

What it needs on a machine without CUDA is set in the rank processes of this test, nowhere else.
"""

import importlib.util
import sys
import warnings

import pytest
import torch
from deep_ep_oracle import open_gloo

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core 0.16.1 (pip, --no-deps)", allow_module_level=True)

HIDDEN, EXPERTS, SEQ_LEN, BATCH = 64, 8, 6, 2
TOPK = (2, 4)


def pretend_deep_ep():
    import moe_comm.deep_ep

    ours = moe_comm.deep_ep.__name__
    for name in [n for n in sys.modules if n == ours or n.startswith(ours + ".")]:
        sys.modules["deep_ep" + name.removeprefix(ours)] = sys.modules[name]


def make_layer(rank, num_ranks, topk):
    """MoELayer whose experts have the same weights however many ranks hold them."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe import fused_a2a, moe_utils
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert fused_a2a.HAVE_DEEP_EP
    moe_utils.te_general_gemm = None  # a name that it looks up without TransformerEngine
    dispatcher = {"moe_token_dispatcher_type": "allgather"}
    if num_ranks > 1:
        dispatcher = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, num_moe_experts=EXPERTS, moe_router_topk=topk,
        moe_router_dtype="fp32", moe_grouped_gemm=False, use_cpu_initialization=True, add_bias_linear=False,
        moe_router_load_balancing_type="none", expert_model_parallel_size=num_ranks, **dispatcher,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    layer = MoELayer(config, spec.submodules.mlp.submodules)
    layer.set_layer_number(1)
    g = torch.Generator().manual_seed(3)
    local = layer.experts.local_experts
    weights = [
        [torch.randn(p.shape, generator=g) * 0.1 for p in local[0].parameters()]
        for _ in range(EXPERTS)
    ]
    with torch.no_grad():
        for i, expert in enumerate(local):
            for parameter, weight in zip(
                expert.parameters(), weights[rank * len(local) + i], strict=True
            ):
                parameter.copy_(weight)
        layer.router.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=g))
    return layer


def inputs_of(ranks):
    return torch.cat(
        [
            torch.randn(SEQ_LEN, BATCH, HIDDEN, generator=torch.Generator().manual_seed(r))
            for r in ranks
        ]
    )


def run_layers(rank, group, num_ranks, store, counts):
    """{(top-k, n): (output, gradient of the input)}; one process does the tokens of n ranks, for n in `counts`."""
    warnings.simplefilter("ignore")
    torch.cuda.current_device = lambda: torch.device("cpu")  # where it puts the router
    pretend_deep_ep()
    open_gloo(rank, num_ranks, store)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(expert_model_parallel_size=num_ranks)
    results = {}
    for topk in TOPK:
        layer = make_layer(rank, num_ranks, topk)
        for n in counts:
            x = inputs_of([rank] if num_ranks > 1 else range(n)).requires_grad_()
            for _ in range(2):  # the second time with the buffer of the first
                x.grad = None
                out, _ = layer(x)
                out.square().sum().backward()
            results[topk, n] = (out.detach().numpy(), x.grad.numpy())
    return results


@pytest.mark.timeout(400)
def test_moe_layer(run_ranks, tmp_path, monkeypatch):
    """Top-k 2: bit for bit; above, sums of three or more have another order."""
    (alone,) = run_ranks(run_layers, 1, 1, str(tmp_path / "gloo1"), (2, 4), timeout_s=120)
    monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", "2")
    for size in (2, 4):
        store = str(tmp_path / f"gloo{size}")
        results = run_ranks(run_layers, size, size, store, (size,), timeout_s=120)
        for rank, result in enumerate(results):
            mine = slice(rank * SEQ_LEN, (rank + 1) * SEQ_LEN)
            for topk in TOPK:
                for got, one in zip(result[topk, size], alone[topk, size], strict=True):
                    difference = abs(got - one[mine]).max() / abs(one).max()
                    assert difference <= (0 if topk == 2 else 2e-6)
