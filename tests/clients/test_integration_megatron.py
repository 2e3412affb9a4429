"""megatron-core 0.16.1 with moe_comm's own token dispatcher, and GPTModel over both: bit-equal to one process.

    pip install --no-deps megatron-core==0.16.1

What it needs on a machine without CUDA is set in the rank processes of this test, nowhere else. Starting a rank costs
seconds, so each group of processes runs all cases; a failure names its case.
"""

import contextlib
import importlib.util
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from deep_ep_oracle import open_gloo

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core 0.16.1 (pip, --no-deps)", allow_module_level=True)

HIDDEN, EXPERTS = 64, 8
SEQ_LEN, VOCABULARY = 8, 64
# Of fewer than 8 rows, a matmul of the router may be rounded otherwise than of all: tokens in multiples of 8, or none.
TOKENS = {"all": [8, 16, 8, 24], "one without": [16, 0, 8, 32]}
BOUND = 2e-6  # where sums have another order: largest difference / largest value


def prepare():
    import torch._dynamo

    torch._dynamo.config.disable = True  # it compiles a dozen small functions, for a minute
    """What Megatron takes from CUDA on the way."""
    warnings.simplefilter("ignore")
    torch.cuda.current_device = lambda: torch.device("cpu")
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # a name that it looks up without TransformerEngine
    random.CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()


def config_of(num_ranks, backend, topk, **changes):
    """backend None: a dispatcher that runs anywhere and needs no deep_ep."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    how = {"moe_token_dispatcher_type": "allgather"}
    if backend:
        how = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}
    sizes = {
        "num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": 4, "ffn_hidden_size": 32,
        "moe_ffn_hidden_size": 32, "num_moe_experts": EXPERTS, "moe_router_topk": topk, "moe_router_dtype": "fp32",
        "moe_grouped_gemm": False, "use_cpu_initialization": True, "add_bias_linear": False,
        "moe_router_load_balancing_type": "none", "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "expert_model_parallel_size": num_ranks,
    }  # fmt: skip
    return TransformerConfig(**{**sizes, **how, **changes})


def set_weights(model, rank):
    """Every parameter from its name and, for an expert, its global number: the same however many ranks there are."""
    per_rank = {
        name.split("local_experts.")[0]: len(module.local_experts)
        for name, module in model.named_modules()
        if hasattr(module, "local_experts")
    }
    for name, weight in model.named_parameters():
        head, split, tail = name.partition("local_experts.")
        if split:
            number, _, tail = tail.partition(".")
            local = next(n for key, n in per_rank.items() if head.startswith(key))
            tail = f"{int(number) + rank * local}.{tail}"
        seed = int.from_bytes((head + split + tail).encode(), "big") % (2**31)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            scale, start = (0.1, 1.0) if "norm" in name else (0.2, 0.0)
            weight.copy_(start + scale * torch.randn(weight.shape, generator=g))


def spec_of():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)


def make_layer(num_ranks, backend, topk, **changes):
    from megatron.core.transformer.moe.moe_layer import MoELayer

    layer = MoELayer(
        config_of(num_ranks, backend, topk, **changes), spec_of().submodules.mlp.submodules
    )
    layer.set_layer_number(1)
    set_weights(layer, dist.get_rank() if num_ranks > 1 else 0)
    return layer


def make_gpt(num_ranks, backend, topk):
    from megatron.core.models.gpt.gpt_model import GPTModel

    model = GPTModel(
        config_of(num_ranks, backend, topk), spec_of(), vocab_size=VOCABULARY, max_sequence_length=SEQ_LEN
    )  # fmt: skip
    set_weights(model, dist.get_rank() if num_ranks > 1 else 0)
    return model


def rows_of(num_tokens, seed):
    """[T, 1, H] of each rank: what goes in, and the gradient that comes back."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(num_tokens), 1, HIDDEN, generator=g)
    return x.split(num_tokens), torch.randn(x.shape, generator=g).split(num_tokens)


def numbers(*tensors):
    return [t.detach().numpy() for t in tensors]


# --- one layer -----------------------------------------------------------------------------------


class WholeLayer:
    """One micro-batch through the layer as a model calls it."""

    def __init__(self, layer, x):
        self.x = x.clone().requires_grad_()
        self.out, _ = layer(self.x)

    def backward(self, up):
        self.out.backward(up)


class InPieces:
    """As Megatron's overlapped schedule does: each stage cut off from the one before, and its backward a call of its
    own. The router is a plain one: Megatron's takes no batch without tokens."""

    def __init__(self, layer, x):
        self.x = x.clone().requires_grad_()
        self.stages = []
        dispatcher = layer.token_dispatcher
        manager = getattr(dispatcher, "_comm_manager", SimpleNamespace())
        topk = layer.config.moe_router_topk
        probs = (self.x.flatten(0, 1) @ layer.router.weight.t()).softmax(-1)
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(
            1, probs.topk(topk).indices, True
        )
        tokens, probs = self.cut(
            *dispatcher.dispatch_preprocess(self.x, chosen, probs.masked_fill(~chosen, 0))
        )
        manager.token_probs = probs
        rows, row_probs = self.cut(*dispatcher.token_dispatch(tokens, probs))
        manager.dispatched_probs = row_probs
        rows, counts, row_probs = dispatcher.dispatch_postprocess(rows, row_probs)
        (rows,) = self.cut(dispatcher.combine_preprocess(layer.experts(rows, counts, row_probs)[0]))
        self.out = dispatcher.combine_postprocess(dispatcher.token_combine(rows))

    def cut(self, *tensors):
        again = [t.detach().requires_grad_() for t in tensors]
        self.stages.append((tensors, again))
        return again

    def backward(self, up):
        self.out.backward(up)
        for tensors, again in reversed(self.stages):
            torch.autograd.backward(tensors, [t.grad for t in again])


class AllAtOnce(InPieces):
    """The same, not cut."""

    def cut(self, *tensors):
        return tensors


FORMS = {"whole": WholeLayer, "pieces": InPieces, "at once": AllAtOnce}


def two_batches(layer, rank, num_ranks, tokens, in_order, form):
    """Two micro-batches forward, then both backward: [out, grad of x] of each. A rank alone does all tokens."""
    batches, ups_back = [], []
    for seed in range(2):
        xs, ups = rows_of(tokens, seed)
        batches.append(form(layer, xs[rank] if num_ranks > 1 else torch.cat(xs)))
        ups_back.append(ups[rank] if num_ranks > 1 else torch.cat(ups))
    for i in (0, 1) if in_order else (1, 0):
        batches[i].backward(ups_back[i])
    return [numbers(batch.out, batch.x.grad) for batch in batches]


LAYER_CASES = [  # name, tokens, top-k, backward in order, form, form in one process
    ("whole, top-k 2", "all", 2, False, "whole", "whole"),
    ("whole, top-k 3", "all", 3, True, "whole", "whole"),
    ("a rank without tokens", "one without", 2, True, "at once", "at once"),
    ("a rank without tokens, reverse order", "one without", 2, False, "at once", "at once"),
    ("in pieces", "one without", 2, False, "pieces", "at once"),
]


def run_layers(rank, num_ranks, make, counts):
    """{(case, n): ([out, grad of x] of two batches, gradients by parameter)}."""
    layers, results = {}, {}
    for n in counts:
        for name, tokens, topk, in_order, form, form_alone in LAYER_CASES:
            if topk not in layers:
                layers[topk] = make(topk)
            layers[topk].zero_grad()
            used = FORMS[form if num_ranks > 1 else form_alone]
            got = two_batches(layers[topk], rank, num_ranks, TOKENS[tokens][:n], in_order, used)
            grads = {n: p.grad.numpy().copy() for n, p in layers[topk].named_parameters()}
            results[name, n] = got, grads
    return results


# --- a whole model -------------------------------------------------------------------------------


def run_gpt(rank, num_ranks, counts, model):
    """{n: (losses of each token, their gradients by parameter)}: one sequence for each of n ranks."""
    results = {}
    for n in counts:
        g = torch.Generator().manual_seed(n)
        tokens = torch.randint(VOCABULARY, (n, SEQ_LEN + 1), generator=g)
        mine = tokens[rank : rank + 1] if num_ranks > 1 else tokens
        positions = torch.arange(SEQ_LEN).expand(len(mine), -1)
        model.zero_grad()
        ahead = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)[None, None]
        losses = model(mine[:, :-1], positions, ahead, labels=mine[:, 1:])
        losses.sum().backward()
        for name, p in model.named_parameters():
            if num_ranks > 1 and "experts" not in name:
                dist.all_reduce(p.grad)
        results[n] = (
            losses.detach().numpy(),
            {n: p.grad.numpy().copy() for n, p in model.named_parameters()},
        )
    return results


# --- in the processes ----------------------------------------------------------------------------


def start(rank, num_ranks, store, deep_ep=False):
    open_gloo(rank, num_ranks, store)
    if deep_ep:
        import moe_comm

        moe_comm.install_as_deep_ep()
    prepare()
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import fused_a2a

    assert deep_ep == fused_a2a.HAVE_DEEP_EP == fused_a2a.HAVE_HYBRIDEP

    parallel_state.initialize_model_parallel(expert_model_parallel_size=num_ranks)


def run_alone(rank, group, store, counts):
    start(rank, 1, store)
    layers = run_layers(rank, 1, lambda topk: make_layer(1, None, topk), counts)
    return layers, {k: run_gpt(rank, 1, counts, make_gpt(1, None, k)) for k in (2, 3)}


def check_compiled():
    """Megatron compiles what prepares a dispatch."""
    import torch._dynamo

    import moe_comm.integrations.megatron as ep

    manager = ep.MoeCommManager(dist.group.WORLD, 4, 3, EXPERTS, config_of(2, None, 3))
    probs = torch.rand(5, EXPERTS, generator=torch.Generator().manual_seed(0))
    chosen = probs >= torch.tensor([2, 0.3, 0.5, 0.7, 0.9])[:, None]

    def prepared(chosen, probs):
        manager.setup_metadata(chosen, probs)
        return manager.token_indices, manager.token_probs

    chosen &= chosen.cumsum(1) <= 3
    plain = prepared(chosen, probs)
    torch._dynamo.config.disable = False
    compiled = torch.compile(prepared, backend="aot_eager", fullgraph=True)(chosen, probs)
    torch._dynamo.config.disable = True
    for got, want in zip(compiled, plain, strict=True):
        assert torch.equal(got, want)
    idx, weights = plain
    assert idx[0].tolist() == [-1] * 3 and not weights[0].any()
    for t in range(5):
        want = chosen[t].nonzero()[:, 0].tolist()
        assert idx[t].tolist() == want + [-1] * (3 - len(want))
        assert weights[t, : len(want)].tolist() == probs[t, want].tolist()


def check_refused(num_ranks):
    import moe_comm.integrations.megatron as ep

    with pytest.raises(TypeError, match=r"hop: expected an option of moe_comm.Buffer \(max_tokens"):
        ep.install(hop="node")
    with pytest.raises(ValueError, match="model: expected at least one MoELayer, found none"):
        ep.install(torch.nn.Linear(2, 2))
    padded = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    layer = make_layer(num_ranks, None, 2, **padded)
    with pytest.raises(ValueError, match="moe_pad_expert_input_to_capacity: expected False"):
        ep.install(layer)


def check_dropped_and_aligned(rank, num_ranks):
    """Experts of bounded capacity drop tokens; experts in FP8 want groups of whole tiles: what reaches them."""
    import moe_comm.integrations.megatron as ep

    xs, _ = rows_of(TOKENS["one without"][:num_ranks], 7)
    g = torch.Generator().manual_seed(8)
    probs = [torch.rand(len(x), EXPERTS, generator=g) for x in xs]
    chosen = [p >= 0.8 for p in probs]  # any number of experts, also none
    chosen = [c & (c.cumsum(1) <= 3) for c in chosen]
    layer = make_layer(num_ranks, None, 3)
    for fp8, tile in ((None, 1), ("hybrid", 16)):
        layer.config.fp8 = fp8  # only now: the layer was built for a machine without it
        dispatcher = ep.install(layer, window_bytes=8 << 20).token_dispatcher
        tokens, p = dispatcher.dispatch_preprocess(xs[rank], chosen[rank], probs[rank])
        rows, counts, row_probs = dispatcher.dispatch_postprocess(
            *dispatcher.token_dispatch(tokens, p)
        )
        at, local = 0, EXPERTS // num_ranks
        for i in range(local):
            e = rank * local + i
            wanted = torch.cat([x.flatten(0, 1)[c[:, e]] for x, c in zip(xs, chosen)])
            weights = torch.cat([p[c[:, e], e] for p, c in zip(probs, chosen)])
            assert int(counts[i]) == -(-len(wanted) // tile) * tile
            assert torch.equal(rows[at : at + len(wanted)], wanted)
            assert torch.equal(row_probs[at : at + len(wanted)], weights)
            end = at + int(counts[i])
            assert (
                not rows[at + len(wanted) : end].any()
                and not row_probs[at + len(wanted) : end].any()
            )
            at = end
        assert at == len(rows) == len(row_probs)
        out = dispatcher.combine_postprocess(dispatcher.token_combine(rows))
        number = chosen[rank].sum(1)[:, None, None]
        torch.testing.assert_close(out, xs[rank] * number, rtol=BOUND, atol=BOUND)


def run_split(rank, group, num_ranks, store):
    """{case: results} of our dispatcher in its two forms."""
    start(rank, num_ranks, store)
    import moe_comm.integrations.megatron as ep

    counts, layers, models = (num_ranks,), {}, {}
    converted = lambda topk: ep.install(make_layer(num_ranks, None, topk), window_bytes=8 << 20)  # noqa: E731
    layers["install(model)"] = run_layers(rank, num_ranks, converted, counts)
    assert len(ep.buffers()) == 1, "one Buffer for all layers of a group"
    ep.close()
    assert ep.buffers() == []
    ep.install(window_bytes=8 << 20)
    for backend in ("deepep", "hybridep"):
        make = lambda topk, backend=backend: make_layer(num_ranks, backend, topk)  # noqa: E731
        layers[f"install(), {backend}"] = run_layers(rank, num_ranks, make, counts)
    for k in (2, 3):
        models["install()", k] = run_gpt(rank, num_ranks, counts, make_gpt(num_ranks, "deepep", k))
    check_refused(num_ranks)
    check_dropped_and_aligned(rank, num_ranks)
    if num_ranks == 2:
        check_compiled()
    ep.close()
    return layers, models


def run_deep_ep(rank, group, num_ranks, store):
    """The same through Megatron's own managers, which import deep_ep."""
    start(rank, num_ranks, store, deep_ep=True)
    counts, layers, models = (num_ranks,), {}, {}
    for backend in ("deepep", "hybridep"):
        make = lambda topk, backend=backend: make_layer(num_ranks, backend, topk)  # noqa: E731
        layers[backend] = run_layers(rank, num_ranks, make, counts)
        for k in (2, 3):
            model = make_gpt(num_ranks, backend, k)
            models[backend, k] = run_gpt(rank, num_ranks, counts, model)
    return layers, models


@pytest.fixture(scope="module")
def alone_results():
    return {}


def close_to(got, want, exact):
    difference = abs(got - want).max() / abs(want).max() if want.size else 0.0
    return got.shape == want.shape and difference <= (0 if exact else BOUND)


def expert_of(name, rank, num_ranks):
    """A parameter's name in one process."""
    head, split, tail = name.partition("local_experts.")
    if not split:
        return name
    number, _, tail = tail.partition(".")
    return f"{head}{split}{int(number) + rank * EXPERTS // num_ranks}.{tail}"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("run", [run_split, run_deep_ep])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_megatron(run_ranks, tmp_path, monkeypatch, alone_results, num_ranks, run):
    """Top-k 2: bit for bit; above, sums of three or more have another order."""
    if not alone_results:
        (alone_results["all"],) = run_ranks(
            run_alone, 1, str(tmp_path / "one"), (2, 4), timeout_s=180
        )
    monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", "2")
    results = run_ranks(run, num_ranks, num_ranks, str(tmp_path / "gloo"), timeout_s=180)
    alone_layers, alone_models = alone_results["all"]
    for rank, (layers, models) in enumerate(results):
        for how, cases in layers.items():
            for name, tokens, topk, *_ in LAYER_CASES:
                first = sum(TOKENS[tokens][:rank])
                mine = slice(first, first + TOKENS[tokens][rank])
                (got, grads), (want, want_grads) = (
                    results[name, num_ranks] for results in (cases, alone_layers)
                )
                for batch in range(2):
                    for ours, theirs in zip(got[batch], want[batch], strict=True):
                        assert close_to(ours, theirs[mine], topk == 2), f"{how}, {name}"
                for parameter, grad in grads.items():
                    if "experts" in parameter:
                        same = want_grads[expert_of(parameter, rank, num_ranks)]
                        assert close_to(grad, same, False), f"{how}, {name}: {parameter}"
        for (how, topk), by_count in models.items():
            losses, grads = by_count[num_ranks]
            want, want_grads = alone_models[topk][num_ranks]
            assert close_to(losses, want[rank : rank + 1], topk == 2), f"{how}, GPTModel"
            largest = max(abs(grad).max() for grad in want_grads.values())
            for parameter, grad in grads.items():
                same = want_grads[expert_of(parameter, rank, num_ranks)]
                assert abs(grad - same).max() <= BOUND * largest, f"{how}, GPTModel: {parameter}"
