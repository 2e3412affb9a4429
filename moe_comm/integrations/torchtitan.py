"""torchtitan (>= 0.3): expert-parallel token dispatchers through moe_comm, by its own extension point.

    --override.imports moe_comm.integrations.torchtitan.moe_comm_override

or in code `OverrideConfig(imports=[("moe_comm.integrations.torchtitan.moe_comm_override", {"layout": "rank"})])`:
every expert-parallel dispatcher of the model, whatever `moe_comm_backend` it was made for ("standard", "deepep",
"hybridep", "minimal_async_ep"), becomes `MoeCommTokenDispatcher`. No `deep_ep` is needed, nothing is patched.
- layout "expert" (default): one row per (token, local expert) arrives in the experts' order; combine multiplies by the
  scores in fp32 before it sums, so bf16 results are rounded once less than by torchtitan's own dispatchers.
- layout "rank": one row per (token, rank) arrives and is copied for each of its experts here; their weighted sum is
  rounded to the rows' dtype before it travels. The same bytes on the wire.
- In fp32 with top-k 2 both are bit for bit what torchtitan's local dispatcher computes; above, sums go by rank.
- Dispatch and combine run again when a checkpointed block is recomputed (torchtitan keeps a list of its own of ops
  whose results are saved): in the same order on all ranks, and with the same result.
- Both wait on the CPU for the number of rows, so CUDA graphs need `--training.disable_cuda_graphs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import moe_comm
from moe_comm.integrations.buffers import Buffers, checked

try:
    from torchtitan.config import override
    from torchtitan.config.override import derive
    from torchtitan.models.common.token_dispatcher import (
        BaseEPTokenDispatcher,
        LocalTokenDispatcher,
    )
except ImportError as error:
    raise ImportError(
        f"moe_comm.integrations.torchtitan needs torchtitan >= 0.3 (pip install torchtitan): {error}"
    ) from error

LAYOUTS = ("expert", "rank")

_buffers = Buffers()


def buffers() -> list[moe_comm.Buffer]:
    """The Buffers in use, oldest first (for `stats()`)."""
    return _buffers.all()


def close() -> None:
    """Close every Buffer made here and forget it. Collective; call it before `destroy_process_group`."""
    _buffers.close()


@dataclass(frozen=True)
class _Sent:
    """What combine needs of its dispatch. The last two only with layout "rank": of each of the P copies."""

    handle: Any
    weights: Any  # [P] fp32
    num_rows: int = 0
    row: Any = None  # [P] int64: the received row it was made of


class MoeCommTokenDispatcher(BaseEPTokenDispatcher):
    """Token dispatcher for EP > 1 (without an EP mesh: torchtitan's local one). T may differ between ranks, or be 0.

    All layers and models of a group with the same options share one Buffer, made by the first dispatch.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseEPTokenDispatcher.Config):
        layout: str = "expert"
        # Rows of each expert are padded with zeros to a multiple of it, for quantized grouped GEMMs; counted as rows.
        pad_multiple: int | None = None
        # Options of moe_comm.Buffer that do not follow from the model; the same on every rank.
        buffer_options: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config):
        super().__init__(config)
        if config.layout not in LAYOUTS:
            raise ValueError(
                f"layout: expected one of {', '.join(map(repr, LAYOUTS))}, got {config.layout!r}"
            )
        if config.pad_multiple is not None and config.layout != "expert":
            raise ValueError(
                f'pad_multiple: expected None with layout="rank", got {config.pad_multiple}'
            )
        self.layout, self.pad_multiple = config.layout, config.pad_multiple
        self.options = checked(config.buffer_options)

    def wire_meshes(self, *, ep_mesh: Any) -> None:
        """ep_mesh: one-dimensional, or None. *Raises* ValueError: padding wanted, and no mesh."""
        if ep_mesh is None and self.pad_multiple is not None:
            raise ValueError(f"pad_multiple: expected None without EP, got {self.pad_multiple}")
        super().wire_meshes(ep_mesh=ep_mesh)

    def dispatch(
        self,
        x_TD: torch.Tensor,
        topk_scores_TK: torch.Tensor,
        topk_expert_ids_TK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """[T, D] -> ([P, D] grouped by local expert, rows per local expert [L] int64, what combine needs)."""
        if self.ep_mesh is None:
            return LocalTokenDispatcher.dispatch(
                self, x_TD, topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E
            )
        align = self.pad_multiple or 1
        received = moe_comm.dispatch(
            self._buffer(x_TD),
            x_TD.contiguous(),
            topk_expert_ids_TK.to(torch.int64).contiguous(),
            topk_scores_TK.float().contiguous(),
            num_experts=self.num_experts,
            layout=self.layout,
            alignment=align,
        )
        counts, weights = received.tokens_per_expert, received.topk_weights
        if self.layout == "expert":
            counts = (counts + align - 1) // align * align
            return received.x, counts, _Sent(received.handle, weights)
        # Copies by (expert, row): rows are in order, and sorting keeps it.
        idx: Any = received.topk_idx
        taken = idx.masked_fill(idx < 0, len(counts)).flatten().argsort(stable=True)
        taken = taken[: int((idx >= 0).sum())]
        row = taken // idx.shape[1]
        sent = _Sent(received.handle, weights.flatten()[taken], len(idx), row)  # type: ignore[union-attr]
        return received.x[row], counts, sent

    def combine(
        self, routed_output_RD: torch.Tensor, metadata: Any, x_TD: torch.Tensor
    ) -> torch.Tensor:
        """[P, D] of the experts, not weighted -> [T, D], weighted and summed."""
        if self.ep_mesh is None:
            return LocalTokenDispatcher.combine(self, routed_output_RD, metadata, x_TD)
        y, sent = routed_output_RD, metadata
        buffer = self._buffer(y)
        if self.layout == "expert":
            return moe_comm.combine(buffer, y, sent.handle, weights=sent.weights)
        weighted = (y.float() * sent.weights[:, None]).to(y.dtype)
        rows = y.new_zeros(sent.num_rows, y.shape[1]).index_add(0, sent.row, weighted)
        return moe_comm.combine(buffer, rows, sent.handle)

    def _buffer(self, rows: torch.Tensor) -> moe_comm.Buffer:
        mesh: Any = self.ep_mesh
        return _buffers.of(
            mesh.get_group(),
            self.options,
            hidden=rows.shape[1],
            topk=self.top_k,
            num_experts=self.num_experts,
            dtype=rows.dtype,
        )


@override(
    target=BaseEPTokenDispatcher.Config,
    description="Expert-parallel dispatch and combine through moe_comm.",
)
def moe_comm_override(
    cfg: BaseEPTokenDispatcher.Config, *, layout: str = "expert", **buffer_options: Any
) -> MoeCommTokenDispatcher.Config:
    """For `--override.imports`, optionally with `='{"layout": "rank", "hops": "rank"}'`.

    buffer_options: any option of `moe_comm.Buffer` that does not follow from the model.
    """
    return derive(cfg, MoeCommTokenDispatcher.Config, layout=layout, buffer_options=buffer_options)
