"""Casts of rows by groups of 128 channels: FP8 with scales, UE8M0 packing, LogFMT-10. Plain torch, any device.

What is stored with FP8 rows is the scale that casts them *back*. `round_scale` makes it a power of two, which UE8M0
keeps as its exponent byte, four groups in one int32, the first group in the lowest byte.

*Source*: the arithmetic of DeepEP's low-latency kernels. LogFMT is theirs in kind (sign, 9 bits of a log scale between
the least and the largest magnitude of a group, rounding in the linear domain); its codes never travel here, so its bits
are ours.
"""

import torch
from torch import Tensor

GROUP = 128
FP8_MAX = 448.0
LEAST_AMAX = 1e-4
LOGFMT_LEVELS = 2**9 - 1  # code 0 is zero
LOGFMT_OCTAVES = 32.0  # smaller magnitudes count as this far below the largest


def groups_of(x: Tensor) -> Tensor:
    """[..., H] → float32 [..., S, 128], S = ceil(H / 128), zeros behind H."""
    hidden = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -hidden % GROUP))
    return padded.unflatten(-1, (-1, GROUP))


def _ungroup(groups: Tensor, hidden: int) -> Tensor:
    return groups.flatten(-2)[..., :hidden]


def power_of_two_above(x: Tensor) -> Tensor:
    """2^ceil(log2(x)) for positive normal float32 `x`, exactly."""
    mantissa, exponent = torch.frexp(x)  # mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(x), torch.where(mantissa == 0.5, exponent - 1, exponent))


def cast_to_fp8(x: Tensor, *, round_scale: bool = False) -> tuple[Tensor, Tensor]:
    """`x` [..., H] → (float8_e4m3fn [..., H], scales float32 [..., S]), as DeepEP's low-latency kernel does it.

    A group's amax is at least 1e-4; scale = amax · (1/448), a power of two at least that with `round_scale`. Saturates.
    """
    groups = groups_of(x)
    amax = groups.abs().amax(dim=-1).clamp_min(LEAST_AMAX)
    scales = amax * torch.tensor(1 / FP8_MAX, dtype=torch.float32)
    if round_scale:
        scales = power_of_two_above(scales)
        factors = 1 / scales
    else:
        factors = FP8_MAX / amax
    scaled = (groups * factors[..., None]).clamp(-FP8_MAX, FP8_MAX)
    return _ungroup(scaled, x.shape[-1]).to(torch.float8_e4m3fn), scales


def cast_from_fp8(x: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The inverse: `x` [..., H] float8_e4m3fn, `scales` [..., S] float32 or packed int32. float32 products, rounded."""
    groups = groups_of(x)
    if scales.dtype == torch.int32:
        scales = unpack_ue8m0(scales, groups.shape[-2])
    return _ungroup(groups * scales[..., None], x.shape[-1]).to(dtype)


def pack_ue8m0(scales: Tensor) -> Tensor:
    """Powers of two, float32 [..., S] → int32 [..., ceil(S / 4)]; groups behind S are 0."""
    exponents = scales.view(torch.int32) >> 23
    padded = torch.nn.functional.pad(exponents, (0, -scales.shape[-1] % 4))
    return (padded.unflatten(-1, (-1, 4)) << _byte_shifts(scales)).sum(-1, dtype=torch.int32)


def unpack_ue8m0(packed: Tensor, num_groups: int) -> Tensor:
    """int32 [..., ceil(S / 4)] → float32 [..., S]."""
    exponents = (packed[..., None] >> _byte_shifts(packed)) & 0xFF
    return (exponents.flatten(-2)[..., :num_groups] << 23).view(torch.float32)


def _byte_shifts(like: Tensor) -> Tensor:
    return torch.arange(0, 32, 8, dtype=torch.int32, device=like.device)


def through_logfmt(x: Tensor) -> Tensor:
    """What `x` [..., H] is after LogFMT-10 and back; its dtype.

    A group is cast where its magnitudes are below 1 and differ; others pass as they are. Zero stays zero, the least
    (at most 32 octaves down) and the largest magnitude stay what they are but for the rounding of `x`'s dtype.
    """
    groups = groups_of(x)
    magnitude = groups.abs()
    largest = magnitude.amax(dim=-1, keepdim=True)
    least = magnitude.masked_fill(magnitude == 0, torch.inf).amin(dim=-1, keepdim=True)
    high = torch.log2(largest)
    low = torch.maximum(torch.log2(least), high - LOGFMT_OCTAVES)
    step = (high - low) / (LOGFMT_LEVELS - 1)
    below = ((torch.log2(magnitude) - low) / step).floor().clamp(0, LOGFMT_LEVELS - 2)
    lower, upper = torch.exp2(low + below * step), torch.exp2(low + (below + 1) * step)
    nearest = torch.where(magnitude - lower <= upper - magnitude, lower, upper)
    decoded = torch.where(magnitude == 0, magnitude, nearest).copysign(groups)
    cast = (high < 0) & (low < high) & largest.isfinite()
    return _ungroup(torch.where(cast, decoded, groups), x.shape[-1]).to(x.dtype)
