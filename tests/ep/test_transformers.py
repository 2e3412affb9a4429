"""transformers models with their experts behind moe_comm, against the same model in one process.

Starting a rank costs seconds (torch, transformers), so each spawn checks many cases; a failure names its case.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers.distributed.expert_parallel", reason="needs transformers >= 5.23")

from transformer_models import (
    BOUND,
    SEQ_LEN,
    build,
    check_fsdp,
    check_gradients,
    check_model,
    error,
    loss_and_logits,
    mesh_of,
    of_each,
)

import moe_comm.integrations.transformers as ep  # after the check above

LAYOUTS = ("expert", "rank")
ONE_NODE = pytest.mark.plain("no link between nodes that could reorder anything")


def check_models(mesh: Any, num_ranks: int) -> None:
    batches = of_each(num_ranks)
    options = {"ranks_per_node": 2, "window_bytes": 8 << 20}
    for name in ("Qwen3Moe", "Mixtral"):
        for layout in LAYOUTS:
            check_model(
                f"{name} {layout}", [build(name), build(name)], mesh, layout, batches, **options
            )
    assert len(ep.buffers()) == 1, "one Buffer for all layers and models of a group"
    with pytest.raises(ValueError, match="already split"):
        ep.parallelize(ep.parallelize(build("Mixtral"), mesh["ep"], mesh["tp"]), mesh["ep"])

    models = [build("Qwen3Moe"), build("Qwen3Moe")]
    models[1].gradient_checkpointing_enable()
    check_model("checkpointing", models, mesh, "expert", batches, **options)

    # The eager experts of GptOss have no class for "another rank's": they never see one.
    for name, layout in (("GptOss", "expert"), ("GptOss", "rank"), ("Qwen3Moe", "rank")):
        models = [build(name), build(name)]
        for model in models:
            model.set_experts_implementation("eager")
        check_model(f"{name} eager", models, mesh, layout, batches, **options)

    # Router weights have float32 precision in one process, too: rounding is far below the bound.
    models = [build("Qwen3Moe").double(), build("Qwen3Moe").double()]
    for model in models:
        model.set_experts_implementation("eager")
    check_model("float64", models, mesh, "expert", batches, per_tensor=True, **options)


def check_ranks_without_rows(mesh: Any, num_ranks: int) -> None:
    """The experts of one layer called by hand: ranks without tokens, ranks whose experts nobody chose."""
    rank = dist.get_rank()
    for layout in LAYOUTS:
        alone, split = build("Qwen3Moe"), build("Qwen3Moe")
        ep.parallelize(split, mesh["ep"], layout=layout, window_bytes=8 << 20)
        for num_tokens, chosen in (
            ([0] * num_ranks, 8),
            ([5] + [0] * (num_ranks - 1), 3),
            ([3] * num_ranks, 3),
        ):
            case = f"{layout}, tokens {num_tokens}, experts 0…{chosen - 1}"
            random = torch.Generator().manual_seed(2)
            x = torch.randn(sum(num_tokens), 64, generator=random)
            idx = torch.rand(sum(num_tokens), chosen, generator=random).argsort(1)[:, :3]
            weights = torch.rand(sum(num_tokens), 3, generator=random)
            grad = torch.randn(x.shape, generator=random)
            mine = slice(sum(num_tokens[:rank]), sum(num_tokens[: rank + 1]))
            results = []
            for model, part in ((alone, slice(None)), (split, mine)):
                model.zero_grad()
                inputs = [t[part].clone().requires_grad_() for t in (x, weights)]
                if len(x) or model is split:
                    out = model.model.layers[0].mlp.experts(inputs[0], idx[part], inputs[1])
                    out.backward(grad[part])
                    grads = ep.full_gradients(model)
                    results.append(([out.detach(), inputs[0].grad, inputs[1].grad], grads))
            got, got_grads = results[-1]
            assert got_grads, f"{case}: a rank without rows has to stay in the graph"
            if not len(x):
                assert all(not grad.any() for grad in got_grads.values()), case
                continue
            expected, expected_grads = results[0]
            for ours, theirs in zip(got, expected):
                if len(ours):
                    assert error(ours, theirs[mine]) <= BOUND, case
            for name, ours in got_grads.items():
                assert error(ours, expected_grads[name]) <= BOUND, f"{case}: {name}"


def check_bfloat16(mesh: Any) -> None:
    """No further from float32 than the plain model in bfloat16 is."""
    exact, plain, split = build("Qwen3Moe"), build("Qwen3Moe"), build("Qwen3Moe")
    plain, split = plain.bfloat16(), split.bfloat16()
    ep.parallelize(split, mesh["ep"], window_bytes=8 << 20)
    tokens = torch.randint(64, (2, SEQ_LEN), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, usual, got = (m(tokens).logits.float() for m in (exact, plain, split))
    assert error(got, expected) <= 1.5 * error(usual, expected)


def check_shared_batch() -> None:
    """tp_mesh: all four ranks share the experts, ranks 0 and 1 hold one batch, ranks 2 and 3 another."""
    ep_mesh, dense = mesh_of((4,), "ep"), mesh_of((2, 2), "dp", "tp")
    alone, split = build("Qwen3Moe"), build("Qwen3Moe")
    ep.parallelize(split, ep_mesh, dense["tp"], ranks_per_node=2, window_bytes=8 << 20)
    random = torch.Generator().manual_seed(4)
    tokens = torch.randint(64, (2, SEQ_LEN + 2), generator=random)  # an odd number of tokens
    batch = dist.get_rank() // 2
    mine, num_targets = slice(batch, batch + 1), 2 * (SEQ_LEN + 1)
    loss, logits = loss_and_logits(alone, tokens, num_targets)
    loss.backward()
    my_loss, my_logits = loss_and_logits(split, tokens[mine], num_targets)
    my_loss.backward()
    ep.all_reduce_gradients(split, dense["dp"])
    assert error(my_logits, logits[mine]) <= BOUND
    check_gradients("shared batch", alone, split)


def all_checks(rank: int, group: Any, store: str, num_ranks: int) -> None:
    # A process group beside `group`: DeviceMesh wants torch.distributed.
    found = dist.FileStore(store, num_ranks)
    dist.init_process_group("gloo", store=found, rank=rank, world_size=num_ranks)
    mesh = mesh_of((num_ranks, 1), "ep", "tp")
    check_models(mesh, num_ranks)
    ep.close()
    assert ep.buffers() == []
    check_ranks_without_rows(mesh, num_ranks)
    ep.close()
    if num_ranks == 2:
        check_fsdp("Qwen3Moe", "expert", num_ranks)
        # Two layers, forward and backward.
        assert [buffer.stats()["dispatches"] for buffer in ep.buffers()] == [2 * 2]
        check_bfloat16(mesh)
    else:
        check_shared_batch()
    ep.close()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=ONE_NODE), 4])
def test_models_equal_one_process(run_ranks: Any, tmp_path: Any, num_ranks: int) -> None:
    run_ranks(all_checks, num_ranks, str(tmp_path / "mesh"), num_ranks, timeout_s=110)


@ONE_NODE
def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="layout: expected one of 'expert', 'rank', got 'padded'"):
        ep.configure(layout="padded")
    with pytest.raises(TypeError, match=r"hop: expected an option of moe_comm.Buffer \(max_tokens"):
        ep.configure(hop="node")


@ONE_NODE
def test_a_model_without_experts_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    with pytest.raises(ValueError, match="LlamaForCausalLM has no ep_plan rule"):
        ep.parallelize(LlamaForCausalLM(LlamaConfig(intermediate_size=16, **sizes)), None)
