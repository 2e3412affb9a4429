"""Device code: the steps of an exchange that touch rows. Imports nothing from moe_comm.

    topk_idx ─route→ row in each lane ─pack→ window ═link═> window ─forward→ windows of the node ─unpack→ recv_x
    y ─reduce→ window (own copies) ─reduce→ window (ranks of a node) ═link═> window ─reduce→ combined x

Every step is a function of tensors and ints that writes where it is told: it waits for nothing and knows no epoch, no
header and no peer. Its torch twin, `<step>_torch`, says what it means, to the bit. `for_device` chooses: today the
twins for CPU tensors and nothing for others. (An exchange of CPU tensors runs the C++ loops of csrc/rows.hpp instead,
because its forwarder must not need the interpreter; tests compare the two.)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .forward import Forwarded, forward_tables_torch, forward_torch
from .pack import pack_torch
from .reduce import lane_columns_torch, reduce_torch, row_offsets_torch
from .route import Routed, round_starts_torch, route_torch
from .unpack import Placed, first_places_torch, places_torch, unpack_lanes_torch, unpack_torch


class Kernels(NamedTuple):
    """One implementation of every step, in the order of their use. Signatures are the twins'."""

    name: str
    route: Callable[..., Routed]
    round_starts: Callable[..., Tensor]
    pack: Callable[..., None]
    forward_tables: Callable[..., Forwarded]
    forward: Callable[..., None]
    first_places: Callable[..., tuple[Tensor, Tensor]]
    places: Callable[..., Placed]
    unpack: Callable[..., None]
    unpack_lanes: Callable[..., None]
    row_offsets: Callable[..., Tensor]
    reduce: Callable[..., None]
    lane_columns: Callable[..., Tensor]


TORCH = Kernels(
    name="torch",
    route=route_torch,
    round_starts=round_starts_torch,
    pack=pack_torch,
    forward_tables=forward_tables_torch,
    forward=forward_torch,
    first_places=first_places_torch,
    places=places_torch,
    unpack=unpack_torch,
    unpack_lanes=unpack_lanes_torch,
    row_offsets=row_offsets_torch,
    reduce=reduce_torch,
    lane_columns=lane_columns_torch,
)


def for_device(device: torch.device | str) -> Kernels:
    """The steps for tensors on this device.

    Raises: NotImplementedError, naming what is missing, for a device without kernels.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return TORCH
    missing = "its Triton and CUDA kernels are" if kind == "cuda" else "kernels for it are"
    raise NotImplementedError(
        f"device: expected cpu, got {device}: {missing} not part of this version of moe_comm"
    )


__all__ = ["Kernels", "TORCH", "for_device", "Forwarded", "Placed", "Routed"]
