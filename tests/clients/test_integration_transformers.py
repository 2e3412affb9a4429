"""Six models of transformers >= 5.23 with their experts behind moe_comm, and of 5.0 and 5.22, without EP of their own.

    pip install --no-deps --target build/transformers-VERSION transformers==VERSION …      (the two old ones)

Starting a rank costs seconds, so each group of processes runs all cases; a failure names its case.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformer_models import (
    BOUND,
    MODELS,
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

OPTIONS = {"ranks_per_node": 2, "window_bytes": 8 << 20}
OLD = {
    version: Path(__file__).parents[2] / f"build/transformers-{version}"
    for version in ("5.0.0", "5.22.2")
}


def start(rank, num_ranks, store):
    found = dist.FileStore(store, num_ranks)
    dist.init_process_group("gloo", store=found, rank=rank, world_size=num_ranks)
    return mesh_of((num_ranks, 1), "ep", "tp")


def check_two_batches(mesh, num_ranks, layouts):
    """One layer's experts: two micro-batches forward, then both backward in either order, one rank without tokens."""
    import moe_comm.integrations.transformers as ep

    rank = dist.get_rank()
    num_tokens = [7, 0, 3, 12][:num_ranks]
    mine = slice(sum(num_tokens[:rank]), sum(num_tokens[: rank + 1]))
    g = torch.Generator().manual_seed(2)
    batches = [
        (
            torch.randn(sum(num_tokens), 64, generator=g),
            torch.rand(sum(num_tokens), 8, generator=g).argsort(1)[:, :3],
            torch.rand(sum(num_tokens), 3, generator=g),
            torch.randn(sum(num_tokens), 64, generator=g),
        )
        for _ in range(2)
    ]

    def run(model, part, order):
        """[out, gradients of x and weights] of each batch, and the parameters' gradients."""
        model.zero_grad()
        run_experts = model.model.layers[1].mlp.experts
        outs, inputs = [], []
        for x, idx, weights, _ in batches:
            inputs.append([t[part].clone().requires_grad_() for t in (x, weights)])
            outs.append(run_experts(inputs[-1][0], idx[part], inputs[-1][1]))
        for i in order:
            outs[i].backward(batches[i][3][part])
        results = [
            [out.detach(), *(t.grad for t in i)] for out, i in zip(outs, inputs, strict=True)
        ]
        return results, ep.full_gradients(model)

    for layout in layouts:
        alone, split = build("Qwen3Moe"), build("Qwen3Moe")
        ep.parallelize(split, mesh["ep"], mesh["tp"], layout=layout, **OPTIONS)
        for order in ((0, 1), (1, 0)):
            case = f"{layout}, {order}"
            (want, want_grads), (got, grads) = (
                run(alone, slice(None), order),
                run(split, mine, order),
            )
            for ours, theirs in zip(got, want, strict=True):
                for mine_, all_ in zip(ours, theirs, strict=True):
                    assert not len(mine_) or error(mine_, all_[mine]) <= BOUND, case
            assert grads, case
            for name, grad in grads.items():
                assert error(grad, want_grads[name]) <= BOUND, f"{case}: {name}"


def check_new(rank, group, num_ranks, store):
    mesh = start(rank, num_ranks, store)
    import moe_comm.integrations.transformers as ep

    batches = of_each(num_ranks)
    for name in MODELS:
        for layout in ("expert", "rank"):
            models = [build(name), build(name)]
            check_model(f"{name} {layout}", models, mesh, layout, batches, **OPTIONS)
    check_two_batches(mesh, num_ranks, ("expert", "rank"))
    ep.close()
    for name in MODELS if num_ranks == 2 else MODELS[:2]:
        for layout in ("expert", "rank"):
            check_fsdp(name, layout, num_ranks)
    ep.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_models(run_ranks, tmp_path, num_ranks):
    pytest.importorskip(
        "transformers.distributed.expert_parallel", reason="needs transformers >= 5.23"
    )
    run_ranks(check_new, num_ranks, num_ranks, str(tmp_path / "store"), timeout_s=280)


def check_fsdp_by_hand(case, name, mesh, layout):
    """As the head of the integration says for versions before 5.23."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    import moe_comm.integrations.transformers as ep

    alone, model = build(name), build(name)
    ep.parallelize(model, mesh, layout=layout, **OPTIONS)
    experts = {p for p in model.parameters() if isinstance(p, DTensor)}
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, ignored_params=experts)
    for p in experts:
        p.register_hook(lambda grad: grad / mesh.size())

    tokens = torch.randint(
        64, (2 * mesh.size(), SEQ_LEN + 1), generator=torch.Generator().manual_seed(3)
    )
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    loss, logits = loss_and_logits(alone, tokens, len(tokens) * SEQ_LEN)
    loss.backward()
    my_loss, my_logits = loss_and_logits(model, tokens[mine], 2 * SEQ_LEN)
    my_loss.backward()
    assert error(my_logits, logits[mine]) <= BOUND, case
    assert all(isinstance(p, DTensor) for p in model.parameters()), case
    check_gradients(case, alone, model)


def check_old(rank, group, num_ranks, store, version):
    sys.path.insert(0, str(OLD[version]))
    import transformers

    assert transformers.__version__ == version
    mesh = start(rank, num_ranks, store)
    import moe_comm.integrations.transformers as ep

    batches = of_each(num_ranks)
    for name in MODELS:
        for layout in ("expert", "rank"):
            models = [build(name), build(name)]
            check_model(f"{version} {name} {layout}", models, mesh, layout, batches, **OPTIONS)
        with pytest.raises(ValueError, match=f"{name}ForCausalLM: its experts are already split"):
            ep.parallelize(models[1], mesh["ep"], mesh["tp"])
    models = [build("Qwen3Moe"), build("Qwen3Moe")]
    models[1].gradient_checkpointing_enable()
    check_model(f"{version} checkpointing", models, mesh, "expert", batches, **OPTIONS)
    for layout in ("expert", "rank"):
        models = [build("GptOss"), build("GptOss")]
        for model in models:
            model.set_experts_implementation("eager")
        check_model(f"{version} eager {layout}", models, mesh, layout, batches, **OPTIONS)
    assert len(ep.buffers()) == 1, "one Buffer for all layers and models of a group"
    check_two_batches(mesh, num_ranks, ("expert", "rank"))
    for name in MODELS:
        for layout in ("expert", "rank"):
            check_fsdp_by_hand(f"{version} {name} {layout}", name, mesh["ep"], layout)
    shared = build("Mixtral")
    split = type(shared)(shared.config)
    split.load_state_dict(shared.state_dict())
    models = [build("Mixtral"), split]
    check_model(f"{version} one configuration", models, mesh, "expert", batches, **OPTIONS)
    with pytest.raises(
        ValueError, match='expected another than "moe_comm" for experts that are not'
    ):
        shared(torch.zeros(1, 4, dtype=torch.int64))
    ep.parallelize(shared, mesh["ep"], mesh["tp"], **OPTIONS)
    shared(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=f"num_experts: expected a multiple of {num_ranks} ranks, got 7"
    ):
        ep.parallelize(build("Mixtral", num_local_experts=7), mesh["ep"], mesh["tp"])
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts module"):
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "vocab_size": 8,
        }
        config = transformers.LlamaConfig(intermediate_size=16, **sizes)
        ep.parallelize(transformers.LlamaForCausalLM(config), mesh["ep"], mesh["tp"])
    ep.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("version, num_ranks", [("5.0.0", 2), ("5.22.2", 4)])
def test_models_of_old_versions(run_ranks, tmp_path, num_ranks, version):
    if not OLD[version].exists():
        pytest.skip(f"needs transformers {version} in {OLD[version]} (pip, --no-deps)")
    run_ranks(check_old, num_ranks, num_ranks, str(tmp_path / "store"), version, timeout_s=280)
