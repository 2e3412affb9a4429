"""Small random transformers models and what compares one split over ranks with one in a single process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

BOUND = 2e-6  # float32: largest difference / largest value
SEQ_LEN = 12
MODELS = ("Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss", "Olmoe", "Glm4Moe")
GROUPED = {  # the first layer is dense; experts are chosen group by group; one expert sees every token
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 48,
}


def build(name: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    import transformers

    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    own = {
        "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48},
        "Mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
        "GptOss": {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention"] * 2,
        },
        "Olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
        "DeepseekV3": {
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "head_dim": 8,
            "num_key_value_heads": 4,
            **GROUPED,
        },
        "Glm4Moe": GROUPED,
    }[name]
    config = getattr(transformers, name + "Config")(**{**sizes, **own})
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    return getattr(transformers, name + "ForCausalLM")(config)


def mesh_of(shape: tuple[int, ...], *names: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def loss_and_logits(
    model: torch.nn.Module, tokens: torch.Tensor, num_targets: int
) -> tuple[Any, Any]:
    logits = model(tokens[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    return loss / num_targets, logits


def error(got: torch.Tensor, expected: torch.Tensor, largest: float | None = None) -> float:
    assert got.shape == expected.shape and bool(got.isfinite().all())
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max()) / (largest or float(expected.abs().max()))


def check_model(
    case: str,
    models: list[torch.nn.Module],
    mesh: Any,
    layout: str,
    batches: list[slice],
    per_tensor: bool = False,
    **options: Any,
) -> None:
    """Logits and every gradient after a forward and backward: the first model with all tokens in this process, the
    second split over the ranks, each with its batch. per_tensor: each gradient against its own largest value."""
    import moe_comm.integrations.transformers as ep

    alone, split = models
    ep.parallelize(split, mesh["ep"], mesh["tp"], layout=layout, **options)
    num_sequences = batches[-1].stop
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(64, (num_sequences, SEQ_LEN + 1), generator=random)
    mine = batches[dist.get_rank()]

    loss, logits = loss_and_logits(alone, tokens, num_sequences * SEQ_LEN)
    loss.backward()
    my_loss, my_logits = loss_and_logits(split, tokens[mine], num_sequences * SEQ_LEN)
    my_loss.backward()
    ep.all_reduce_gradients(split, mesh["ep"])

    assert error(my_logits, logits[mine]) <= BOUND, case
    expected, got = ep.full_gradients(alone), ep.full_gradients(split)
    assert expected.keys() == got.keys(), case
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        assert error(got[name], grad, None if per_tensor else largest) <= BOUND, f"{case}: {name}"


def of_each(num_ranks: int) -> list[slice]:
    """A batch for each rank, of 1, 2, 1, 2 … sequences."""
    ends = torch.tensor([1 + rank % 2 for rank in range(num_ranks)]).cumsum(0).tolist()
    return [slice(end - 1 - rank % 2, end) for rank, end in enumerate(ends)]


def check_gradients(case: str, alone: torch.nn.Module, split: torch.nn.Module) -> None:
    import moe_comm.integrations.transformers as ep

    largest = max(float(p.grad.abs().max()) for p in alone.parameters())
    got = ep.full_gradients(split)
    for name, p in alone.named_parameters():
        assert error(got[name], p.grad, largest) <= BOUND, f"{case}: {name}"


def check_fsdp(name: str, layout: str, num_ranks: int) -> None:
    """Named in a DistributedConfig, with FSDP for the rest: what from_pretrained does (it also wants accelerate)."""
    from torch.distributed.tensor import DTensor
    from transformers.distributed import DistributedConfig
    from transformers.distributed.utils import initialize_distributed_mesh

    import moe_comm.integrations.transformers as ep

    case = f"FSDP, {name}, {layout}"
    ep.register()
    ep.register()
    ep.configure(layout=layout, window_bytes=8 << 20)
    how = DistributedConfig(fsdp_size=num_ranks, ep_size=num_ranks, ep_implementation="moe_comm")
    alone, split = build(name), build(name)
    split = split.maybe_distribute_model(split, how, initialize_distributed_mesh(how)[1])
    num_sequences = 2 * num_ranks
    random = torch.Generator().manual_seed(3)
    tokens = torch.randint(64, (num_sequences, SEQ_LEN + 1), generator=random)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    loss, logits = loss_and_logits(alone, tokens, num_sequences * SEQ_LEN)
    loss.backward()
    # FSDP takes the mean over the ranks, so the loss is the mean over this rank's targets.
    my_loss, my_logits = loss_and_logits(split, tokens[mine], 2 * SEQ_LEN)
    my_loss.backward()
    assert error(my_logits, logits[mine]) <= BOUND, case
    assert all(isinstance(p, DTensor) for p in split.parameters()), case
    check_gradients(case, alone, split)
