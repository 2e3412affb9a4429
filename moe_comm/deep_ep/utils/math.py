"""Casts and measures that DeepEP's users take from it."""

import torch
from torch import Tensor

from ...kernels.quant import FP8_MAX, LEAST_AMAX, groups_of, pack_ue8m0, power_of_two_above
from ..quant import cast_from_fp8


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def align(a: int, b: int) -> int:
    """`a` rounded up to a multiple of `b`."""
    return ceil_div(a, b) * b


def calc_diff(x: Tensor, y: Tensor) -> float:
    """1 − 2·Σ(x+1)(y+1) / Σ((x+1)² + (y+1)²) in float64: 0 for equal tensors."""
    x, y = x.double() + 1, y.double() + 1
    return (1 - 2 * (x * y).sum() / (x * x + y * y).sum()).item()


def per_token_cast_to_fp8(x: Tensor, round_scale: bool = False, use_ue8m0: bool = False) -> tuple:
    """`x` [T, H] → (float8_e4m3fn [T, H], scales [T, ceil(H / 128)] float32, or int32 [T, ceil(H / 512)] packed).

    scale = amax / 448, amax at least 1e-4 (the low-latency kernel's differs in its last bit: `quant.cast_to_fp8`).
    """
    groups = groups_of(x)
    amax = groups.abs().amax(dim=-1).clamp_min(LEAST_AMAX)
    scales, factors = amax / FP8_MAX, FP8_MAX / amax
    if round_scale or use_ue8m0:
        scales = power_of_two_above(scales)
        factors = 1 / scales
    scaled = (groups * factors[..., None]).clamp(-FP8_MAX, FP8_MAX)
    rows = scaled.flatten(-2)[..., : x.shape[-1]].to(torch.float8_e4m3fn)
    return rows, (pack_ue8m0(scales) if use_ue8m0 else scales)


def per_token_cast_back(x_fp8: Tensor, x_scales: Tensor) -> Tensor:
    """bfloat16 [T, H] of rows [T, H] float8_e4m3fn and scales [T, S] float32, or [T, S / 4] packed int32."""
    return cast_from_fp8(x_fp8, x_scales)
