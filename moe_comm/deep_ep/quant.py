"""The casts of moe_comm.kernels.quant for rows in any number of dimensions: FP8 with scales, UE8M0, LogFMT-10."""

import torch
from torch import Tensor

from ..kernels import for_device
from ..kernels.quant import pack_ue8m0, unpack_ue8m0

__all__ = ["cast_from_fp8", "cast_to_fp8", "pack_ue8m0", "through_logfmt", "unpack_ue8m0"]


def cast_to_fp8(
    x: Tensor, *, round_scale: bool = False, use_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """`x` [..., H] → float8_e4m3fn [..., H] and scales: float32 [..., ceil(H / 128)], powers of two with `round_scale`;
    with `use_ue8m0` packed as int32 [..., ceil(H / 512)]."""
    form = "ue8m0" if use_ue8m0 else "power_of_two" if round_scale else "float32"
    rows, scales = for_device(x.device).cast_to_fp8(_as_rows(x), form=form)
    return rows.view(x.shape), scales.view(*x.shape[:-1], scales.shape[-1])


def cast_from_fp8(x: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The inverse: `x` [..., H] float8_e4m3fn, `scales` of either dtype. float32 products, rounded."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for_device(x.device).cast_from_fp8(_as_rows(out), _as_rows(x), _as_rows(scales))
    return out


def through_logfmt(x: Tensor) -> Tensor:
    """What `x` [..., H] is after LogFMT-10 and back; its dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for_device(x.device).through_logfmt(_as_rows(out), _as_rows(x))
    return out


def _as_rows(x: Tensor) -> Tensor:
    """[T, H]; a view where `x` is contiguous."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
