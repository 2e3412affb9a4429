"""torchtitan 0.3.0 with moe_comm's token dispatcher, put in by its own override mechanism: bit-equal to its local one.

pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro docstring_parser shtab typeguard triton
"""

import importlib.util

import pytest
import torch
from deep_ep_oracle import open_gloo, same

if not all(importlib.util.find_spec(name) for name in ("torchtitan", "triton")):
    pytest.skip("needs torchtitan 0.3.0 and triton (pip, --no-deps)", allow_module_level=True)

HIDDEN, EXPERTS = 64, 8
TARGET = "moe_comm.integrations.torchtitan.moe_comm_override"
TOKENS = [12, 0, 5, 20]


def prepare():
    import torch._library.opaque_object as opaque

    if not hasattr(opaque, "CustomClassBase"):  # what it is called in this version of torch
        opaque.CustomClassBase = opaque.OpaqueBase


def dispatchers_of(config):
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    return [found for _, found, _, _ in config.traverse(LocalTokenDispatcher.Config)]


def check_override():
    """A whole model's configuration: every backend's dispatchers are replaced, with the kwargs of the entry."""
    from torchtitan.config import OverrideConfig
    from torchtitan.config.override import apply_overrides
    from torchtitan.models.qwen3 import model_registry

    import moe_comm.integrations.torchtitan as ep

    for backend in ("standard", "deepep", "hybridep"):
        model = model_registry("debugmodel_moe", moe_comm_backend=backend).model
        before = dispatchers_of(model)
        assert before and not any(isinstance(c, ep.MoeCommTokenDispatcher.Config) for c in before)
        kwargs = {"layout": "rank", "hops": "rank"} if backend == "deepep" else {}
        imports = [(TARGET, kwargs)] if kwargs else [TARGET]
        lines = apply_overrides(OverrideConfig(imports=imports), model)
        after = dispatchers_of(model)
        assert len(lines) == len(after) == len(before)
        for old, new in zip(before, after, strict=True):
            assert type(new) is ep.MoeCommTokenDispatcher.Config
            assert (new.num_experts, new.top_k) == (old.num_experts, old.top_k)
            assert new.layout == kwargs.get("layout", "expert")
            assert new.buffer_options == ({"hops": "rank"} if kwargs else {})
            new.to_dict()  # what torchtitan logs and saves
    return after[0]


def check_refused(config):
    import dataclasses

    import moe_comm.integrations.torchtitan as ep

    with pytest.raises(ValueError, match="layout: expected one of 'expert', 'rank', got 'padded'"):
        dataclasses.replace(config, layout="padded").build()
    with pytest.raises(TypeError, match=r"hop: expected an option of moe_comm.Buffer \(max_tokens"):
        dataclasses.replace(config, buffer_options={"hop": "rank"}).build()
    with pytest.raises(ValueError, match='pad_multiple: expected None with layout="rank", got 8'):
        dataclasses.replace(config, layout="rank", pad_multiple=8).build()
    with pytest.raises(ValueError, match="pad_multiple: expected None without EP, got 8"):
        dataclasses.replace(config, pad_multiple=8).build().wire_meshes(ep_mesh=None)
    assert ep.buffers() == []


def experts(rows, counts, first):
    """Expert e of each group of rows: something that differs, row by row."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), counts.long()) + first
    scale = (ids + 1).to(rows.dtype)[:, None]
    return torch.tanh(rows * scale) * scale


class Batch:
    """One micro-batch of a layer."""

    def __init__(self, dispatcher, x, scores, ids, first, recompute=False):
        self.x, self.scores = x.clone().requires_grad_(), scores.clone().requires_grad_()
        self.ids, self.dispatcher, self.first = ids, dispatcher, first
        if recompute:
            self.out = torch.utils.checkpoint.checkpoint(
                self.layer, self.x, self.scores, use_reentrant=False
            )
        else:
            self.out = self.layer(self.x, self.scores)

    def layer(self, x, scores):
        counts = torch.bincount(self.ids.flatten(), minlength=EXPERTS)
        rows, counts, metadata = self.dispatcher.dispatch(x, scores, self.ids, counts)
        assert int(counts.sum()) == len(rows)
        return self.dispatcher.combine(experts(rows, counts, self.first), metadata, x)

    def results(self):
        return self.out.detach(), self.x.grad, self.scores.grad


def inputs_of(rank, seed, topk, dtype, num_tokens):
    g = torch.Generator().manual_seed(100 * rank + seed)
    ids = torch.rand(num_tokens, EXPERTS, generator=g).argsort(1)[:, :topk].contiguous()
    x, up = (torch.randn(num_tokens, HIDDEN, generator=g).to(dtype) for _ in range(2))
    return x, torch.rand(num_tokens, topk, generator=g) + 0.1, ids, up


def close_to(got, want, bound):
    return got.shape == want.shape and bool((got - want).abs().max() <= bound * want.abs().max())


def check_dispatchers(rank, num_ranks, mesh):
    """Two micro-batches, backward in both orders, one rank without tokens, plain and recomputed."""
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    import moe_comm.integrations.torchtitan as ep

    first = rank * EXPERTS // num_ranks
    for topk, layout, pad, dtype, order, recompute in (
        (2, "expert", None, torch.float32, (0, 1), False),
        (2, "rank", None, torch.float32, (1, 0), False),
        (2, "expert", 8, torch.float32, (1, 0), True),
        (2, "rank", None, torch.float32, (0, 1), True),
        (3, "expert", None, torch.float32, (0, 1), False),
        (3, "rank", None, torch.float32, (0, 1), False),
        (2, "expert", None, torch.bfloat16, (0, 1), False),
        (2, "rank", None, torch.bfloat16, (0, 1), False),
    ):
        case = f"top-k {topk}, {layout}, {pad}, {dtype}, {order}, {recompute}"
        sizes = {"num_experts": EXPERTS, "top_k": topk}
        local = LocalTokenDispatcher(LocalTokenDispatcher.Config(**sizes))
        options = {"window_bytes": 8 << 20}
        config = ep.MoeCommTokenDispatcher.Config(
            **sizes, layout=layout, pad_multiple=pad, buffer_options=options
        )
        ours = config.build()
        ours.wire_meshes(ep_mesh=mesh)
        made = [inputs_of(rank, seed, topk, dtype, TOKENS[rank]) for seed in range(2)]
        wanted = [Batch(local, *inputs[:3], 0) for inputs in made]
        got = [Batch(ours, *inputs[:3], first, recompute) for inputs in made]
        for i in order:
            for batches in (wanted, got):
                batches[i].out.backward(made[i][3])
        for one, other in zip(got, wanted, strict=True):
            for name, ours_, theirs in zip(
                ("out", "x", "scores"), one.results(), other.results(), strict=True
            ):
                exact = topk == 2 and dtype == torch.float32
                bound = 2e-6 if dtype == torch.float32 else 2e-2
                if exact or not theirs.numel():
                    assert same(ours_, theirs), f"{case}: {name}"
                else:
                    assert close_to(ours_, theirs, bound), f"{case}: {name}"
    assert len(ep.buffers()) == 1, "one Buffer for all dispatchers of a group"


def check_padding(rank, num_ranks, mesh):
    import moe_comm.integrations.torchtitan as ep

    config = ep.MoeCommTokenDispatcher.Config(
        num_experts=EXPERTS, top_k=2, pad_multiple=8, buffer_options={"window_bytes": 8 << 20}
    )
    dispatcher = config.build()
    dispatcher.wire_meshes(ep_mesh=mesh)
    all_inputs = [inputs_of(r, 0, 2, torch.float32, TOKENS[r]) for r in range(num_ranks)]
    x, scores, ids, _ = all_inputs[rank]
    rows, counts, _ = dispatcher.dispatch(x, scores, ids, None)
    local = EXPERTS // num_ranks
    for e, part in enumerate(rows.split(counts.tolist())):
        wanted = torch.cat([x[(ids == rank * local + e).any(1)] for x, _, ids, _ in all_inputs])
        assert len(part) % 8 == 0 and len(part) - len(wanted) < 8
        assert same(part[: len(wanted)], wanted) and not part[len(wanted) :].any()


def check_routed_experts(rank, num_ranks, mesh, config):
    """torchtitan's own experts between dispatch and combine, in bf16 as they compute: EP against one process."""
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    import moe_comm.integrations.torchtitan as ep

    local = EXPERTS // num_ranks
    g = torch.Generator().manual_seed(9)
    weights = {
        name: torch.randn(EXPERTS, 64, 64, generator=g) * 0.1
        for name in ("w1_EFD", "w2_EDF", "w3_EFD")
    }
    options = {"window_bytes": 8 << 20}
    whole = LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=2)
    split = ep.MoeCommTokenDispatcher.Config(num_experts=EXPERTS, top_k=2, buffer_options=options)
    results = []
    for dispatcher, mine in (
        (whole, slice(None)),
        (split, slice(rank * local, (rank + 1) * local)),
    ):
        num_experts = len(range(EXPERTS)[mine])
        inner = GroupedExperts.Config(dim=64, hidden_dim=64, num_experts=num_experts)
        layer = RoutedExperts.Config(inner_experts=inner, token_dispatcher=dispatcher).build()
        if dispatcher is split:
            layer.token_dispatcher.wire_meshes(ep_mesh=mesh)
        with torch.no_grad():
            for name, p in layer.inner_experts.named_parameters():
                p.copy_(weights[name][mine])
        x, scores, ids, up = inputs_of(rank, 3, 2, torch.float32, 16)
        x.requires_grad_()
        counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
        out = layer(x[None], scores[None], ids[None], counts)
        out.backward(up[None])
        results.append((out.detach(), x.grad))
    for ours, theirs in zip(*results[::-1], strict=True):
        assert close_to(ours, theirs, 1e-2)


def run_titan(rank, group, num_ranks, store):
    open_gloo(rank, num_ranks, store)
    prepare()
    from torch.distributed.device_mesh import init_device_mesh

    import moe_comm.integrations.torchtitan as ep

    mesh = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("ep",))
    config = check_override()
    check_refused(config)
    check_dispatchers(rank, num_ranks, mesh)
    check_padding(rank, num_ranks, mesh)
    check_routed_experts(rank, num_ranks, mesh, config)
    ep.close()
    assert ep.buffers() == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_torchtitan(run_ranks, tmp_path, monkeypatch, num_ranks):
    monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", "2")
    run_ranks(run_titan, num_ranks, num_ranks, str(tmp_path / "gloo"), timeout_s=200)
