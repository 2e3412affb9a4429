"""Casts of rows by groups of 128 channels: FP8 e4m3 with scales, and LogFMT-10 there and back.

What is stored with FP8 rows is the scale that casts them *back*: float32 as it is (`float32`), rounded up to a power of
two (`power_of_two`), or the exponent bytes of such powers, four groups in one int32, the first in the lowest (`ue8m0`).

The kernels' casts are integers and float32, so that they mean the same on a device without FP8 (below sm_89) and in the
interpreter, whose own cast does not round as hardware does. Where hardware has the cast, it is used.
*Source*: the arithmetic of DeepEP's low-latency kernels. LogFMT is theirs in kind (sign, 9 bits of a log scale between
the least and the largest magnitude of a group, rounding in the linear domain); its codes never travel here, so its bits
are ours.
"""

import torch
from torch import Tensor

from .language import Items, jit, launch, rounded_to, tl, to_float, up

GROUP = 128
FP8_MAX = 448.0
LEAST_AMAX = 1e-4
FORMS = ("float32", "power_of_two", "ue8m0")
LOGFMT_LEVELS = 2**9 - 1  # code 0 is zero
LOGFMT_OCTAVES = 32.0  # smaller magnitudes count as this far below the largest
GROUPS = 8  # of one program; a multiple of four


def groups_of(x: Tensor) -> Tensor:
    """[T, H] → float32 [T, S, 128], S = ⌈H/128⌉, zeros behind H."""
    return torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))


def power_of_two_above(x: Tensor) -> Tensor:
    """2^⌈log2 x⌉ of positive normal float32, exactly; 1 where it is not finite."""
    bits = (x.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    return torch.where(x.isfinite(), bits.view(torch.float32), 1.0)


def pack_ue8m0(scales: Tensor) -> Tensor:
    """Powers of two, float32 [T, S] → int32 [T, ⌈S/4⌉]; groups behind S are 0."""
    exponents = torch.nn.functional.pad(scales.view(torch.int32) >> 23, (0, -scales.shape[-1] % 4))
    return (exponents.unflatten(-1, (-1, 4)) << _byte_shifts(scales)).sum(-1, dtype=torch.int32)


def unpack_ue8m0(packed: Tensor, num_groups: int) -> Tensor:
    """int32 [T, ⌈S/4⌉] → float32 [T, S]."""
    exponents = (packed[..., None] >> _byte_shifts(packed)) & 0xFF
    return (exponents.flatten(-2)[..., :num_groups] << 23).view(torch.float32)


def _byte_shifts(like: Tensor) -> Tensor:
    return torch.arange(0, 32, 8, dtype=torch.int32, device=like.device)


def form_index(form: str) -> int:
    """Its place in FORMS. Raises ValueError for another name."""
    if form not in FORMS:
        raise ValueError(f"form: expected {', '.join(FORMS[:-1])} or {FORMS[-1]}, got {form!r}")
    return FORMS.index(form)


def cast_to_fp8_torch(x: Tensor, *, form: str = "float32") -> tuple[Tensor, Tensor]:
    """`x` [T, H] → float8_e4m3fn [T, H] and scales: float32 [T, S], or int32 [T, ⌈S/4⌉] for "ue8m0".

    A group's amax is at least 1e-4; scale = amax · (1/448), or the power of two at or above that (1 if a value is not
    finite). Values saturate. Raises ValueError for a `form` that is not in FORMS.
    """
    form_index(form)
    groups = groups_of(x)
    amax = groups.abs().amax(dim=-1).clamp_min(LEAST_AMAX)
    scales = amax * torch.tensor(1 / FP8_MAX, dtype=torch.float32, device=x.device)
    if form == "float32":
        factors = amax.reciprocal() * FP8_MAX
    else:
        scales = power_of_two_above(scales)
        factors = scales.reciprocal()
    scaled = (groups * factors[..., None]).clamp(-FP8_MAX, FP8_MAX)
    if form == "ue8m0":
        scales = pack_ue8m0(scales)
    return scaled.flatten(-2)[..., : x.shape[-1]].to(torch.float8_e4m3fn), scales


def cast_from_fp8_torch(out: Tensor, x: Tensor, scales: Tensor) -> None:
    """The inverse, into `out` [T, H] of any float dtype: float32 products, rounded. `scales` of any form."""
    groups = groups_of(x)
    if scales.dtype == torch.int32:
        scales = unpack_ue8m0(scales, groups.shape[-2])
    out.copy_((groups * scales[..., None]).flatten(-2)[..., : x.shape[-1]])


def through_logfmt_torch(out: Tensor, x: Tensor) -> None:
    """`out` [T, H]: what `x`, of the same dtype, is after LogFMT-10 and back.

    A group is cast where its magnitudes are below 1 and differ; others pass as they are. Zero stays zero, the least (at
    most 32 octaves down) and the largest magnitude stay what they are but for the rounding of `x`'s dtype. Bits depend
    on a device's log2 and exp2.
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
    out.copy_(torch.where(cast, decoded, groups).flatten(-2)[..., : x.shape[-1]])


# --- the codec -----------------------------------------------------------------------------------


def casts_in_hardware(device: torch.device) -> bool:
    """Whether the device casts float32 to e4m3 by itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@jit
def encode_e4m3(x, HARDWARE: tl.constexpr):
    """uint8: to nearest, ties to even, finite values saturate, NaN is 0x7f."""
    if HARDWARE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # below 2^-6: float32 has steps of 2^-9 at 2^14, so adding rounds
        small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
        code = tl.where(magnitude < (121 << 23), small - 0x46800000, tl.minimum(normal, 0x7E))
        code = tl.where(magnitude > 0x7F800000, 0x7F, code)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@jit
def decode_e4m3(code):
    """float32 of uint8 codes, exactly."""
    code = code.to(tl.int32)
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    bits = value.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)
    return tl.where(magnitude == 0x7F, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@jit
def load_groups(x, item_stride, hidden, first_group, UNIT: tl.constexpr, GROUPS: tl.constexpr):
    """float32 [GROUPS, 128] of one row, zeros behind it; and its items, and which of them there are."""
    groups = first_group + tl.arange(0, GROUPS)
    items = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = items < hidden
    if UNIT > 1:
        values = tl.load(x + items, mask=mask, other=0.0)
    else:
        values = tl.load(x + items.to(tl.int64) * item_stride, mask=mask, other=0.0)
    return to_float(values).to(tl.float32), items, mask


@jit
def cast_groups(
    codes, scales, x, item_stride, hidden, tile,
    UNIT: tl.constexpr, GROUPS: tl.constexpr, FORM: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One tile of one row to its `codes` [H] uint8 and its `scales`, 32-bit words."""
    values, items, mask = load_groups(x, item_stride, hidden, tile * GROUPS, UNIT, GROUPS)
    # in integers: the order of magnitudes, with NaN above all
    amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    amax = tl.maximum(amax, 0x38D1B717).to(tl.float32, bitcast=True)  # 1e-4
    scale = amax * 0.0022321429569274187  # float32(1 / 448)
    num_groups = (hidden + 127) // 128
    groups = tile * GROUPS + tl.arange(0, GROUPS)
    if FORM == 0:
        factor = tl.div_rn(1.0, amax) * 448.0
        word = scale.to(tl.int32, bitcast=True)
        tl.store(scales + groups, word, mask=groups < num_groups)
    else:
        word = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        word = tl.where(amax < float("inf"), word, 0x3F800000)
        factor = tl.div_rn(1.0, word.to(tl.float32, bitcast=True))
        if FORM == 1:
            tl.store(scales + groups, word, mask=groups < num_groups)
        else:
            exponents = tl.where(groups < num_groups, word >> 23, 0).reshape([GROUPS // 4, 4])
            packed = tl.sum(exponents << (tl.arange(0, 4) * 8)[None, :], axis=1)
            words = tile * (GROUPS // 4) + tl.arange(0, GROUPS // 4)
            tl.store(scales + words, packed, mask=words * 4 < num_groups)
    tl.store(codes + items, encode_e4m3(values * factor[:, None], HARDWARE), mask=mask)


# --- whole tensors -------------------------------------------------------------------------------


@jit
def cast_rows(
    codes, codes_stride, scales, scales_stride, x, x_stride, x_item_stride, hidden,
    UNIT: tl.constexpr, GROUPS: tl.constexpr, FORM: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cast_groups(
        codes + row * codes_stride * UNIT, scales + row * scales_stride, x + row * x_stride * UNIT, x_item_stride,
        hidden * UNIT, tl.program_id(1), UNIT, GROUPS, FORM, HARDWARE,
    )  # fmt: skip


def unit_of(*tensors: Tensor) -> int:
    """Items of 16 bytes of the first tensor, if all rows begin and end at multiples of that; else 1."""
    width, item = tensors[0].shape[1], tensors[0].element_size()
    return 16 // item if Items.of(width * item, item, *tensors).unit > 1 else 1


def cast_to_fp8_triton(x: Tensor, *, form: str = "float32") -> tuple[Tensor, Tensor]:
    num_rows, hidden = x.shape
    num_groups = up(hidden, GROUP)
    codes = torch.empty((num_rows, hidden), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(
        (num_rows, up(num_groups, 4) if form == "ue8m0" else num_groups), dtype=torch.int32, device=x.device
    )  # fmt: skip
    unit = unit_of(x)
    launch(
        cast_rows, (num_rows, up(num_groups, GROUPS)), codes.view(torch.uint8), hidden // unit, scales,
        scales.stride(0), x, x.stride(0) // unit, x.stride(1), hidden // unit, UNIT=unit, GROUPS=GROUPS,
        FORM=form_index(form), HARDWARE=casts_in_hardware(x.device), enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scales if form == "ue8m0" else scales.view(torch.float32)


@jit
def uncast_rows(
    out, out_stride, out_item_stride, x, x_stride, scales, scales_stride, scales_item_stride, hidden,
    UNIT: tl.constexpr, GROUPS: tl.constexpr, UE8M0: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    items = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = items < hidden * UNIT
    real = groups * 128 < hidden * UNIT
    values = decode_e4m3(tl.load(x + row * x_stride * UNIT + items, mask=mask, other=0))
    scales += row * scales_stride
    if UE8M0:
        word = tl.load(scales + groups // 4 * scales_item_stride, mask=real, other=0)
        scale = (((word >> (groups % 4 * 8)) & 0xFF) << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.load(scales + groups * scales_item_stride, mask=real, other=0.0)
    rounded = rounded_to(values * scale[:, None], out.dtype.element_ty)
    if UNIT > 1:
        tl.store(out + row * out_stride * UNIT + items, rounded, mask=mask)
    else:
        tl.store(out + row * out_stride + items.to(tl.int64) * out_item_stride, rounded, mask=mask)


def cast_from_fp8_triton(out: Tensor, x: Tensor, scales: Tensor) -> None:
    codes = x.view(torch.uint8)
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    unit = unit_of(out, codes) if codes.shape[1] % 16 == 0 else 1
    launch(
        uncast_rows, (len(out), up(out.shape[1], GROUP * GROUPS)), out, out.stride(0) // unit, out.stride(1), codes,
        codes.stride(0) // unit, scales, *scales.stride(), out.shape[1] // unit, UNIT=unit, GROUPS=GROUPS,
        UE8M0=scales.dtype == torch.int32, enable_fp_fusion=False,
    )  # fmt: skip


@jit
def logfmt_rows(
    out, out_stride, out_item_stride, x, x_stride, x_item_stride, hidden, UNIT: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    values, items, mask = load_groups(
        x + row * x_stride * UNIT, x_item_stride, hidden * UNIT, tl.program_id(1) * GROUPS, UNIT, GROUPS
    )  # fmt: skip
    bits = values.to(tl.int32, bitcast=True)
    magnitude_bits = bits & 0x7FFFFFFF
    magnitude = magnitude_bits.to(tl.float32, bitcast=True)
    largest_bits = tl.max(magnitude_bits, axis=1)  # NaN above all
    least_bits = tl.min(tl.where(magnitude_bits == 0, 0x7F800000, magnitude_bits), axis=1)
    cast = (largest_bits < 0x3F800000) & (largest_bits != least_bits) & (least_bits < 0x7F800000)
    high = tl.log2(largest_bits.to(tl.float32, bitcast=True))
    low = tl.maximum(tl.log2(least_bits.to(tl.float32, bitcast=True)), high - 32.0)
    cast = cast & (low < high)
    step = tl.div_rn(high - low, tl.full([GROUPS], 510.0, tl.float32))
    step = tl.where(cast, step, 1.0)[:, None]
    low = low[:, None]
    below = tl.floor(tl.div_rn(tl.log2(magnitude) - low, tl.broadcast_to(step, [GROUPS, 128])))
    below = tl.minimum(tl.maximum(below, 0.0), 509.0)
    lower, upper = tl.exp2(low + below * step), tl.exp2(low + (below + 1.0) * step)
    nearest = tl.where(magnitude - lower <= upper - magnitude, lower, upper)
    nearest = tl.where(magnitude_bits == 0, 0.0, nearest)
    decoded = nearest.to(tl.int32, bitcast=True) | (bits & -0x80000000)
    result = tl.where(cast[:, None], decoded, bits).to(tl.float32, bitcast=True)
    result = rounded_to(result, out.dtype.element_ty)
    if UNIT > 1:
        tl.store(out + row * out_stride * UNIT + items, result, mask=mask)
    else:
        tl.store(out + row * out_stride + items.to(tl.int64) * out_item_stride, result, mask=mask)


def through_logfmt_triton(out: Tensor, x: Tensor) -> None:
    unit = unit_of(x, out)
    launch(
        logfmt_rows, (len(x), up(x.shape[1], GROUP * GROUPS)), out, out.stride(0) // unit, out.stride(1), x,
        x.stride(0) // unit, x.stride(1), x.shape[1] // unit, UNIT=unit, GROUPS=GROUPS, enable_fp_fusion=False,
    )  # fmt: skip
