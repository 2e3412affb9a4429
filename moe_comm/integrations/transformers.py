"""Hugging Face transformers (>= 5.0): a model's experts reached through moe_comm, by the public registries.

From 5.23, transformers hands an `EPImplementation` the tokens of one experts module with their global expert ids and
weights, and a function that runs this rank's experts. Before, a function registered in `ALL_EXPERTS_FUNCTIONS` is
called in place of the experts' own forward; `parallelize` splits the parameters itself then.
Either way that becomes one dispatch, the experts, one combine.
- One Buffer per group (and options), made at the first forward and shared by all layers: its windows are the memory.
- layout "expert" (default): one row per (token, local expert), no padding; the experts run with unit weights and
  the combine multiplies in fp32 before it sums, so bf16 results are rounded once less than in the plain model.
- layout "rank": one row per (token, rank), fewer bytes; each rank repeats a row for its experts and adds their results,
  in fp32, and the combine adds the ranks. So no experts function sees a lane of another rank: only from 5.23 on is
  there a sentinel for one, and GptOss with eager experts rejects it.
- A rank that receives no row runs one dummy row, so every rank has the same graph and FSDP reduces the same things.
Expert gradients come back summed over all tokens of the group; the others are the caller's (`all_reduce_gradients`).
Expert parameters are DTensors and the rest is not: optimizers need `foreach=False` (torch fuses no such mixture).

FSDP2 for the rest: from 5.23 on by `DistributedConfig(fsdp_size=…, ep_size=…, ep_implementation="moe_comm")`. Before,
by hand after `parallelize`, the experts left out, and their gradients made the means that the others are:

    experts = {p for p in model.parameters() if isinstance(p, DTensor)}
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, ignored_params=experts)
    for p in experts:
        p.register_hook(lambda grad: grad / mesh.size())
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import moe_comm
from moe_comm.integrations.buffers import Buffers, Options, checked

try:
    from transformers.distributed.expert_parallel import (
        EPImplementation,
        EPImplementationInterface,
        apply_expert_parallelism,
    )
except ImportError:
    EPImplementation = object  # 5.0 to 5.22
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "moe_comm.integrations.transformers needs transformers >= 5.0, better >= 5.23 "
            f"(pip install 'transformers>=5.23'): {error}"
        ) from error

HAS_EP = EPImplementation is not object
NAME = "moe_comm"
LAYOUTS = ("expert", "rank")
_BUCKET_BYTES = 32 << 20  # gradients reduced at once: enough to hide latency, small beside a model


@dataclass(frozen=True)
class _Options:
    """What `configure` and `parallelize` set."""

    layout: str = "expert"
    buffer: Options = ()

    def with_changes(self, layout: str | None, buffer_options: dict[str, Any]) -> _Options:
        if layout is not None and layout not in LAYOUTS:
            raise ValueError(
                f"layout: expected one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}"
            )
        buffer = checked({**dict(self.buffer), **buffer_options})
        return replace(self, layout=layout or self.layout, buffer=buffer)


_options = _Options()
_buffers = Buffers()


def register() -> None:
    """Make `ep_implementation="moe_comm"` known to transformers (before 5.23, the experts implementation of that name).
    May be called any number of times."""
    if HAS_EP:
        EPImplementationInterface.register(NAME, MoeCommEP)
    else:
        ALL_EXPERTS_FUNCTIONS.register(NAME, _registered_forward)


def configure(*, layout: str | None = None, **buffer_options: Any) -> None:
    """Set the defaults for models parallelised from now on, e.g. by `from_pretrained(distributed_config=...)`.

    layout: "expert" (one row per token and local expert) or "rank" (one row per token and rank).
    buffer_options: any option of `moe_comm.Buffer` that does not follow from the model, such as `window_bytes`,
    `max_tokens`, `hops`, `transport`, `ranks_per_node`, `timeout_s`. The same on every rank.
    *Raises* ValueError, TypeError: unknown layout or option.
    """
    global _options
    _options = _options.with_changes(layout, buffer_options)


def buffers() -> list[moe_comm.Buffer]:
    """The Buffers in use, oldest first (for `stats()`)."""
    return _buffers.all()


def close() -> None:
    """Close every Buffer made here and forget it. Collective; call it before `destroy_process_group`."""
    _buffers.close()


def parallelize(
    model: Any,
    ep_mesh: DeviceMesh,
    tp_mesh: DeviceMesh | None = None,
    *,
    layout: str | None = None,
    **buffer_options: Any,
) -> Any:
    """Split `model`'s experts over `ep_mesh` and reach them through moe_comm. Changes the model and returns it.

    model: a transformers PreTrainedModel. ep_mesh: one-dimensional; its ranks share the experts. tp_mesh: the ranks
    that hold the same batch; without it every rank has its own, and every process of the job must call this (it makes
    a process group). Every rank must hold the same weights beforehand (same seed or same checkpoint); rank i keeps the
    i-th E/R experts of each layer as DTensors. layout, buffer_options: as in `configure`, for this model only.
    *Raises* ValueError: no experts to split, already split, or E not a multiple of R.
    """
    register()
    plan, experts = _experts_of(model)
    if not experts:
        wanted = "ep_plan rule 'ep_dispatch_experts'" if HAS_EP else "experts module"
        raise ValueError(f"{type(model).__name__} has no {wanted}: no experts to split")
    if any(getattr(module, "_is_hooked", False) for module in experts):
        raise ValueError(
            f"{type(model).__name__}: its experts are already split; build the model anew"
        )
    if tp_mesh is None:
        tp_mesh = init_device_mesh(
            ep_mesh.device_type, (dist.get_world_size(), 1), mesh_dim_names=("all", "tp")
        )["tp"]
    with _options_set_to(_options.with_changes(layout, buffer_options)):
        if HAS_EP:
            return apply_expert_parallelism(model, ep_mesh, tp_mesh, plan, ep_implementation=NAME)
        return _split_experts(model, experts, ep_mesh, tp_mesh)


@contextlib.contextmanager
def _options_set_to(options: _Options) -> Iterator[None]:
    """Instances read the options when they are built; transformers builds them with no argument of ours."""
    global _options
    before, _options = _options, options
    try:
        yield
    finally:
        _options = before


class _Exchange:
    """The experts of one layer: dispatch, `experts_forward` with local expert ids, combine. See `MoeCommEP`."""

    def __init__(
        self, experts_forward: Any, num_local_experts: int, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh
    ):
        self.experts_forward = experts_forward
        self.num_local_experts, self.ep_mesh, self.tp_mesh = num_local_experts, ep_mesh, tp_mesh
        self.options = _options
        self.num_experts = num_local_experts * ep_mesh.size()

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        shape = hidden_states.shape
        if self.tp_mesh.size() > 1:
            # These ranks hold the same tokens: each sends its share, so that no expert computes a token twice.
            hidden_states, top_k_index, top_k_weights = (
                DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
                .redistribute(self.tp_mesh, [Shard(0)])
                .to_local()
                for tensor in (hidden_states, top_k_index, top_k_weights)
            )
        output = self._exchange(
            hidden_states.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous()
        )
        if self.tp_mesh.size() > 1:
            output = DTensor.from_local(
                output.contiguous(), self.tp_mesh, [Shard(0)], shape=shape, stride=(shape[1], 1)
            ).full_tensor()
        return output

    def _exchange(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """Dispatch, this rank's experts, combine."""
        buffer = self._buffer(x, topk_idx)
        received = moe_comm.dispatch(
            buffer,
            x,
            topk_idx.to(torch.int64),
            topk_weights.float(),  # a differentiable cast; exact for every dtype a router uses
            num_experts=self.num_experts,
            layout=self.options.layout,
        )
        local_idx: Any = received.topk_idx
        if self.options.layout == "expert":
            y = self._run(received.x, local_idx)
            return moe_comm.combine(buffer, y, received.handle, weights=received.topk_weights)
        row, lane = (local_idx >= 0).nonzero(as_tuple=True)
        y = self._run(received.x[row], local_idx[row, lane])
        exact = torch.promote_types(y.dtype, torch.float32)
        weights: Any = received.topk_weights
        total = torch.zeros(received.x.shape, dtype=exact, device=y.device)
        total = total.index_add(0, row, y.to(exact) * weights[row, lane, None])
        return moe_comm.combine(buffer, total.to(y.dtype), received.handle)

    def _run(self, rows: torch.Tensor, local_idx: torch.Tensor) -> torch.Tensor:
        """One expert for each row, unweighted; on a dummy row of zeros if there are none."""
        if len(rows):
            ones = rows.new_ones(len(rows), 1)
            return self.experts_forward(rows, local_idx[:, None], ones).to(rows.dtype)
        # The sum of no rows is a row of zeros that still depends on them: without it, this rank's backward would miss
        # an exchange that the others make.
        dummy = rows.sum(dim=0, keepdim=True)
        out = self.experts_forward(dummy, local_idx.new_zeros(1, 1), rows.new_ones(1, 1))
        return out[:0].to(rows.dtype)

    def _buffer(self, x: torch.Tensor, topk_idx: torch.Tensor) -> moe_comm.Buffer:
        """The Buffer of my group; made on first use, which is collective, with that layer's shape in mind."""
        return _buffers.of(
            self.ep_mesh.get_group(),
            self.options.buffer,
            hidden=x.shape[1],
            topk=topk_idx.shape[1],
            num_experts=self.num_experts,
            dtype=x.dtype,
        )


class MoeCommEP(EPImplementation):
    """The experts of one layer. Built by transformers, once per experts module, when the plan is applied.

    Called with hidden_states [T, H], top_k_index [T, K] (global expert ids, -1: none), top_k_weights [T, K];
    returns [T, H], weighted and summed, differentiable in hidden_states, top_k_weights and the experts' parameters.
    T may differ between ranks and may be 0. Blocks the CPU like any other layer.
    """

    def __init__(self, experts: torch.nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.exchange = _Exchange(self.experts_forward, self.num_local_experts, ep_mesh, tp_mesh)

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return self.exchange(hidden_states, top_k_index, top_k_weights)


# --- transformers 5.0 to 5.22 --------------------------------------------------------------------


def _experts_of(model: Any) -> tuple[Any, list[Any]]:
    """(expanded plan, experts modules). Before 5.23 an experts module is what takes an experts implementation."""
    if HAS_EP:
        plan = model._expand_parallel_plan(dict(model.ep_plan or {}))
        names = [name for name, style in plan.items() if style == "ep_dispatch_experts"]
        return plan, [model.get_submodule(name) for name in names]
    marks = {"is_transposed", "has_bias", "num_experts"}  # set by its decorator, or always there
    return None, [m for m in model.modules() if marks <= vars(m).keys() and m._parameters]


def _split_experts(model: Any, experts: list[Any], ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> Any:
    """What `apply_expert_parallelism` does from 5.23 on: parameters as DTensors, and the forward replaced."""
    num_ranks = ep_mesh.size()
    for module in experts:
        if module.num_experts % num_ranks:
            raise ValueError(
                f"num_experts: expected a multiple of {num_ranks} ranks, got {module.num_experts}"
            )
    chosen = [module.config._experts_implementation for module in experts]
    for module, implementation in zip(experts, chosen):
        forward: Any = type(module).forward.__wrapped__
        if implementation not in (None, "eager"):
            # Our own name: another model was split that has this configuration, too.
            usual = "grouped_mm" if implementation == NAME else implementation
            forward = ALL_EXPERTS_FUNCTIONS[usual]
        for name, p in list(module._parameters.items()):
            shared = distribute_tensor(p.detach(), ep_mesh, [Shard(0)], src_data_rank=None)
            module._parameters[name] = torch.nn.Parameter(shared, requires_grad=p.requires_grad)
        num_local = module.num_experts // num_ranks
        run = functools.partial(forward, _LocalExperts(module, num_local))
        module._moe_comm_exchange = _Exchange(run, num_local, ep_mesh, tp_mesh)
        module._is_hooked = True
        module.config._experts_implementation = NAME
    return model


class _LocalExperts:
    """An experts module as its forward sees it on this rank: local parameters, local number of experts."""

    def __init__(self, module: torch.nn.Module, num_experts: int):
        self._module, self.num_experts = module, num_experts

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to_local() if isinstance(value, DTensor) else value


def _registered_forward(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """In place of the forward of an experts module whose configuration says "moe_comm"."""
    exchange = getattr(experts, "_moe_comm_exchange", None)
    if exchange is None:
        raise ValueError(
            f'experts_implementation: expected another than "{NAME}" for experts that are not split; '
            "call moe_comm.integrations.transformers.parallelize(model, mesh)"
        )
    if top_k_weights.shape != top_k_index.shape:  # [T, E]: some routers return all of them
        top_k_weights = top_k_weights.gather(1, top_k_index)
    return exchange(hidden_states, top_k_index, top_k_weights)


# --- gradients -----------------------------------------------------------------------------------


def all_reduce_gradients(model: torch.nn.Module, mesh: DeviceMesh, *, mean: bool = False) -> None:
    """Sum the gradients of every parameter that is not split over the ranks of `mesh`. Collective, blocks.

    For plain data parallelism beside expert parallelism; FSDP does this by itself. Expert gradients (DTensors) already
    hold the sum over every rank's tokens. With `mean`, all gradients, the experts' too, are divided by the ranks:
    use it when each rank's loss is a mean over its own batch, and not when it is divided by the global token count.
    A parameter that has a gradient on some ranks only counts as zero on the others.
    """
    group = mesh.get_group()
    whole = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    has_grad = torch.tensor(
        [p.grad is not None for p in whole], dtype=torch.int32, device=mesh.device_type
    )
    dist.all_reduce(has_grad, dist.ReduceOp.MAX, group=group)
    used = [p for p, flag in zip(whole, has_grad.tolist(), strict=True) if flag]
    for p in used:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in used if p.grad is not None]):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat, group=group)
        for grad, total in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(total.view_as(grad))
    if mean:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.div_(mesh.size())


def _buckets(grads: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one dtype, up to _BUCKET_BYTES together."""
    bucket: list[torch.Tensor] = []
    for grad in grads:
        num_bytes = sum(g.nbytes for g in bucket) + grad.nbytes
        if bucket and (grad.dtype != bucket[0].dtype or num_bytes > _BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket


def full_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every gradient by parameter name, whole: experts are gathered from all ranks. Collective; for checks."""
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
