"""Megatron-core (>= 0.16): MoE layers whose tokens travel through moe_comm; no `deep_ep` is needed.

    import moe_comm.integrations.megatron as expert_parallel
    expert_parallel.install()       # before the model is built with --moe-token-dispatcher-type flex
    expert_parallel.install(model)  # or: the layers of a model that exists, whatever dispatcher they have

Megatron's flex dispatcher maps tensor and expert parallelism to one group (TPxEP) and leaves the rest to a manager.
Ours, `MoeCommManager`, makes of each layer one dispatch with layout "expert" and one plain combine: rows arrive grouped
by local expert, so that nothing is permuted before the experts or after them (Megatron's manager for DeepEP builds
multi-hot maps and permutes rows twice). The experts multiply by the probabilities, as always in Megatron.
- Which experts a token goes to is read from the routing map, lanes ascending by expert; a token with fewer than K
  (dropped ones) is fine, so is a rank with no tokens, and different numbers of tokens per rank.
- Sums: a rank's own copies in ascending order of experts, then ranks, in fp32. With top-k 2 that is bit for bit what
  one process computes.
- The handle carries no anchor (autograd.py): Megatron's overlapped schedule runs the backward of combine, experts and
  dispatch as pieces of their own, cut by `detach`, and Megatron's experts keep rows connected even if there are none.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

import moe_comm
from moe_comm.autograd import ANCHOR, OpHandle
from moe_comm.integrations.buffers import Buffers, Options, checked

try:
    from megatron.core.transformer.moe import moe_layer
    from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization
    from megatron.core.transformer.moe.token_dispatcher import (
        MoEFlexTokenDispatcher,
        MoETokenDispatcher,
        _DispatchManager,
    )
except ImportError as error:
    raise ImportError(
        "moe_comm.integrations.megatron needs megatron-core >= 0.16 (pip install megatron-core): "
        f"{error}"
    ) from error

_buffers = Buffers()
_options: Options = ()


def install(model: Any = None, **buffer_options: Any) -> Any:
    """Make MoE layers use moe_comm. Changes `model` and returns it; without one, every flex layer built from now on.

    model: a module, or a list of them (Megatron's model chunks); each of its MoELayers gets a new token dispatcher. A
    layer keeps its experts: its configuration must have split them (expert_model_parallel_size). None: layers that are
    built later with moe_token_dispatcher_type="flex", whatever moe_flex_dispatcher_backend says.
    buffer_options: any option of `moe_comm.Buffer` that does not follow from the model, such as `window_bytes`,
    `hops`, `transport`, `ranks_per_node`, `timeout_s`. The same on every rank.
    *Raises* TypeError: unknown option. ValueError: no MoELayer in `model`, or one whose configuration asks for what
    the flex dispatcher cannot do.
    """
    global _options
    options = checked(buffer_options)
    if model is None:
        _options = options
        moe_layer.MoEFlexTokenDispatcher = MoeCommTokenDispatcher
        return None
    chunks = model if isinstance(model, (list, tuple)) else [model]
    layers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, moe_layer.MoELayer)]
    if not layers:
        raise ValueError("model: expected at least one MoELayer, found none")
    made = []
    for layer in layers:
        old = layer.token_dispatcher
        groups = SimpleNamespace(ep=old.ep_group, expt_tp=old.tp_group, tp_ep=old.tp_ep_group)
        made.append(
            MoeCommTokenDispatcher(
                layer.num_local_experts, layer.local_expert_indices, layer.config, groups, options
            )
        )
    for layer, dispatcher in zip(layers, made):
        layer.token_dispatcher = dispatcher
    return model


def buffers() -> list[moe_comm.Buffer]:
    """The Buffers in use, oldest first (for `stats()`)."""
    return _buffers.all()


def close() -> None:
    """Close every Buffer made here and forget it. Collective; call it before `destroy_process_group`."""
    _buffers.close()


class MoeCommTokenDispatcher(MoEFlexTokenDispatcher):
    """Megatron's flex dispatcher with `MoeCommManager`; a group of one rank is fine, too."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: Any,
        pg_collection: Any = None,
        options: Options | None = None,
    ):
        # Not the flex dispatcher's own: it would make one of Megatron's managers, which want deep_ep.
        MoETokenDispatcher.__init__(self, config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        for name in ("moe_pad_expert_input_to_capacity", "moe_shared_expert_overlap"):
            if getattr(config, name, False):
                raise ValueError(f"{name}: expected False with moe_comm's dispatcher, got True")
        self._comm_manager = MoeCommManager(
            self.tp_ep_group,
            num_local_experts,
            self.tp_size * config.moe_router_topk,
            self.tp_size * config.num_moe_experts,
            config,
            _options if options is None else options,
        )
        self.cudagraph_attrs = ["_comm_manager.token_probs", "_comm_manager.token_indices"]


class MoeCommManager(_DispatchManager):
    """Dispatch and combine of one layer. Built with the layer; the Buffer is made by the first forward, collectively.

    E counts each expert once per tensor-parallel rank that holds a part of it, K likewise, as Megatron's flex
    dispatcher does. Between calls it holds what Megatron's schedules look at: `token_probs` [T, K] fp32,
    `token_indices` [T, K] int64 (-1: none), `dispatched_probs` [P] and `tokens_per_expert` [L] int64.
    """

    def __init__(
        self,
        group: Any,
        num_local_experts: int,
        router_topk: int,
        num_experts: int,
        config: Any,
        options: Options = (),
    ):
        self.group = group
        self.num_local_experts, self.router_topk = num_local_experts, router_topk
        self.num_experts, self.config, self.options = num_experts, config, options
        self.token_probs: Any = None
        self.token_indices: Any = None
        self.dispatched_probs: Any = None
        self.tokens_per_expert: Any = None
        self.handle: Any = None

    def setup_metadata(self, routing_map: torch.Tensor, probs: torch.Tensor) -> None:
        """routing_map: bool, probs: floating, both of T * E elements; at most K experts for a token (Megatron's
        routers keep to it). Compiled by Megatron, so nothing here may look at a value."""
        num_tokens = routing_map.shape[0]
        chosen = routing_map.reshape(num_tokens, self.num_experts).bool()
        everyone = torch.arange(self.num_experts, device=chosen.device)
        lanes = torch.where(chosen, everyone, self.num_experts)
        lanes = lanes.topk(self.router_topk, dim=1, largest=False, sorted=True).values
        none = lanes == self.num_experts
        picked = probs.reshape(num_tokens, self.num_experts).gather(1, lanes.masked_fill(none, 0))
        self.token_indices = lanes.masked_fill(none, -1)
        self.token_probs = picked.float().masked_fill(none, 0.0)

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> torch.Tensor:
        """hidden_states [T, H] -> [P, H], grouped by local expert. Blocks; the last two arguments mean nothing."""
        align = 1
        if self.config.fp8 or self.config.fp4:  # each expert's rows: a multiple of its GEMM's tile
            align = get_align_size_for_quantization(self.config)
        received = moe_comm.dispatch(
            self._buffer(hidden_states),
            hidden_states.contiguous(),
            self.token_indices,
            self.token_probs,
            num_experts=self.num_experts,
            layout="expert",
            alignment=align,
        )
        handle: Any = received.handle
        self.handle = OpHandle(handle.tensors[:ANCHOR])
        self.dispatched_probs = received.topk_weights
        self.tokens_per_expert = (received.tokens_per_expert + align - 1) // align * align
        return received.x

    def combine(
        self,
        hidden_states: torch.Tensor,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> torch.Tensor:
        """hidden_states [P, H], weighted by the experts -> [T, H], summed. Blocks."""
        handle, self.handle = self.handle, None
        return moe_comm.combine(self._buffer(hidden_states), hidden_states, handle)

    def get_permuted_hidden_states_by_experts(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """They are in order; probabilities [P] in the router's dtype if that is fp64."""
        probs = self.dispatched_probs
        return hidden_states, probs.double() if self.config.moe_router_dtype == "fp64" else probs

    def get_restored_hidden_states_by_experts(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As they are: combine reads the experts' order."""
        return hidden_states

    def get_number_of_tokens_per_expert(self) -> torch.Tensor:
        """[L] int64, padding included."""
        return self.tokens_per_expert

    def _buffer(self, rows: torch.Tensor) -> moe_comm.Buffer:
        return _buffers.of(
            self.group,
            self.options,
            hidden=rows.shape[1],
            topk=self.router_topk,
            num_experts=self.num_experts,
            dtype=rows.dtype,
        )
