"""Device code: the steps of an exchange that touch rows. Imports nothing from moe_comm.

    topk_idx ─route→ row in each lane ─pack→ window ═link═> window ─forward→ windows of the node ─unpack→ recv_x
    y ─reduce→ window (own copies) ─reduce→ window (ranks of a node) ═link═> window ─reduce→ combined x

Every step is a function of tensors and ints that writes where it is told: it waits for nothing and knows no epoch, no
header and no peer. Its torch twin, `<step>_torch`, says what it means, to the bit, and runs on any device; beside it
stands the same step in Triton, `<step>_triton`; pack, forward, unpack and reduce are also made by the fused kernels of
*.cu (fused.py), called one by one. `for_device` chooses: the twins for CPU tensors, Triton for CUDA tensors, or what
MOE_COMM_KERNELS (torch, triton or cuda) says. (An exchange of CPU tensors runs the C++ loops of
csrc/rows.hpp instead, because its forwarder must not need the interpreter; tests compare the two.)
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import fused
from .forward import (
    Forwarded,
    forward_tables_torch,
    forward_tables_triton,
    forward_torch,
    forward_triton,
)
from .lanes import (
    Copies,
    Lanes,
    copy_offsets_torch,
    copy_offsets_triton,
    lane_numbers_torch,
    lane_numbers_triton,
    lane_offsets_torch,
    lane_offsets_triton,
    source_ranges_torch,
    source_ranges_triton,
)
from .pack import pack_torch, pack_triton
from .quant import (
    cast_from_fp8_torch,
    cast_from_fp8_triton,
    cast_to_fp8_torch,
    cast_to_fp8_triton,
    through_logfmt_torch,
    through_logfmt_triton,
)
from .reduce import (
    lane_columns_torch,
    lane_columns_triton,
    reduce_torch,
    reduce_triton,
    row_offsets_torch,
    row_offsets_triton,
)
from .route import (
    Routed,
    round_starts_torch,
    round_starts_triton,
    route_torch,
    route_triton,
)
from .unpack import (
    Placed,
    first_places_torch,
    places_torch,
    places_triton,
    unpack_lanes_torch,
    unpack_lanes_triton,
    unpack_torch,
    unpack_triton,
)


class Kernels(NamedTuple):
    """One implementation of every step, in the order of their use, and of the casts. Signatures are the twins'."""

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
    lane_numbers: Callable[..., Lanes]
    lane_offsets: Callable[..., Tensor]
    copy_offsets: Callable[..., Copies]
    source_ranges: Callable[..., None]
    cast_to_fp8: Callable[..., tuple[Tensor, Tensor]]
    cast_from_fp8: Callable[..., None]
    through_logfmt: Callable[..., None]


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
    lane_numbers=lane_numbers_torch,
    lane_offsets=lane_offsets_torch,
    copy_offsets=copy_offsets_torch,
    source_ranges=source_ranges_torch,
    cast_to_fp8=cast_to_fp8_torch,
    cast_from_fp8=cast_from_fp8_torch,
    through_logfmt=through_logfmt_torch,
)

TRITON = Kernels(
    name="triton",
    route=route_triton,
    round_starts=round_starts_triton,
    pack=pack_triton,
    forward_tables=forward_tables_triton,
    forward=forward_triton,
    first_places=first_places_torch,  # a few numbers
    places=places_triton,
    unpack=unpack_triton,
    unpack_lanes=unpack_lanes_triton,
    row_offsets=row_offsets_triton,
    reduce=reduce_triton,
    lane_columns=lane_columns_triton,
    lane_numbers=lane_numbers_triton,
    lane_offsets=lane_offsets_triton,
    copy_offsets=copy_offsets_triton,
    source_ranges=source_ranges_triton,
    cast_to_fp8=cast_to_fp8_triton,
    cast_from_fp8=cast_from_fp8_triton,
    through_logfmt=through_logfmt_triton,
)

CUDA = TRITON._replace(
    name="cuda",
    pack=fused.pack_cuda,
    forward=fused.forward_cuda,
    unpack=fused.unpack_cuda,
    reduce=fused.reduce_cuda,
)

_BY_NAME = {"torch": TORCH, "triton": TRITON, "cuda": CUDA}


def for_device(device: torch.device | str) -> Kernels:
    """The steps for tensors on this device; MOE_COMM_KERNELS (torch, triton or cuda) forces.

    Raises: NotImplementedError, naming what is missing, for a device without kernels; ValueError for another value of
    MOE_COMM_KERNELS.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"device: expected cpu or cuda, got {device}: moe_comm has no kernels for it"
        )
    forced = os.environ.get("MOE_COMM_KERNELS")
    if forced:
        if forced not in _BY_NAME:
            raise ValueError(f"MOE_COMM_KERNELS: expected {' or '.join(_BY_NAME)}, got {forced!r}")
        return _BY_NAME[forced]
    return TORCH if kind == "cpu" else TRITON


__all__ = [
    "Kernels", "CUDA", "TORCH", "TRITON", "for_device", "Copies", "Forwarded", "Lanes", "Placed", "Routed",
]  # fmt: skip
