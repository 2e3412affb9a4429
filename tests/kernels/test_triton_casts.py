"""The casts of quant.py: Triton's (interpreted) against their twins, the twins against deep_ep/quant.py, to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import bits
from test_triton_steps import checked, seeds

from moe_comm.deep_ep import quant as deep_ep
from moe_comm.kernels import TORCH, TRITON, quant
from moe_comm.kernels.language import jit, launch, tl
from moe_comm.layout import RowFormat

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = [8, 128, 129, 136, 512, 1024, 1152, 2100]


def rows_of(num_rows, hidden, dtype, seed, special=True):
    """Groups of very different sizes, some of zeros, some with a NaN, a tie or a subnormal."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, hidden, generator=g)
    x *= 10.0 ** torch.randint(-9, 4, (num_rows, 1), generator=g)
    x[torch.rand(x.shape, generator=g) < 0.1] = 0
    if special and num_rows:
        x[0] = 0
        x[-1, ::7] = 1.0625  # a tie if the scale is a power of two
        x[-1, seed % hidden] = torch.nan if seed % 3 else 448.0
    return x.to(dtype)


def same_values(a, b):
    """To the bit, but for the bits of NaNs."""
    assert a.dtype == b.dtype and a.shape == b.shape
    nan = b.float().isnan()
    assert torch.equal(a.float().isnan(), nan)
    assert torch.equal(bits(a)[~nan], bits(b)[~nan])


@checked
@given(
    num_rows=st.integers(0, 5),
    hidden=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(FLOATS),
    seed=seeds,
)
def test_casts(num_rows, hidden, dtype, seed):
    x = rows_of(num_rows, hidden, dtype, seed)
    wide = torch.zeros(num_rows, 2 * hidden, dtype=dtype)
    wide[:, ::2] = x
    for form in quant.FORMS:
        want = TORCH.cast_to_fp8(x, form=form)
        codes, scales = deep_ep.cast_to_fp8(x, round_scale=form != "float32")
        same_values(want[0], codes)
        assert torch.equal(
            bits(want[1]), bits(deep_ep.pack_ue8m0(scales) if form == "ue8m0" else scales)
        )
        for strided in (x, wide[:, ::2]):
            got = TRITON.cast_to_fp8(strided, form=form)
            same_values(got[0], want[0])
            if form == "ue8m0":
                assert torch.equal(got[1], want[1])
            else:
                same_values(got[1], want[1])

        for strided in (want[1], want[1].t().contiguous().t()):
            back, twin = torch.empty_like(x), torch.empty_like(x)
            TORCH.cast_from_fp8(twin, want[0], strided)
            same_values(twin, deep_ep.cast_from_fp8(want[0], want[1], dtype))
            TRITON.cast_from_fp8(back, want[0], strided)
            same_values(back, twin)


@jit
def encode(codes, x, num, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(codes + at, quant.encode_e4m3(tl.load(x + at, mask=at < num), False), mask=at < num)


@jit
def decode(x, codes, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, quant.decode_e4m3(tl.load(codes + at)))


def test_the_codec_is_torchs_cast():
    """Every code; every code's neighbours and midpoints, one float32 to each side; every bfloat16."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    decoded = torch.empty(256)
    launch(decode, (1,), decoded, codes, BLOCK=256)
    same_values(decoded, values)

    finite = values[~values.isnan()].sort().values
    ties = (finite[1:] + finite[:-1]) / 2
    exact = torch.cat(
        [
            finite,
            ties,
            torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float(),
        ]
    )
    up, down = (torch.nextafter(exact, torch.tensor(to)) for to in (torch.inf, -torch.inf))
    x = torch.cat([exact, up, down])
    got = torch.empty(len(x), dtype=torch.uint8)
    launch(encode, (-(-len(x) // 4096),), got, x, len(x), BLOCK=4096)
    same_values(got.view(torch.float8_e4m3fn), x.clamp(-448, 448).to(torch.float8_e4m3fn))


@checked
@given(
    hidden=st.sampled_from([128, 512, 1280]),
    dtype=st.sampled_from(FLOATS),
    form=st.sampled_from(quant.FORMS),
    seed=seeds,
)
def test_pack_casts(hidden, dtype, form, seed):
    num_tokens, topk, capacity = 9, 3, 4
    x = rows_of(num_tokens, hidden, dtype, seed, special=False)
    idx, weights = torch.arange(topk).repeat(num_tokens, 1), torch.rand(num_tokens, topk)
    groups = -(-hidden // 128)
    f = RowFormat.of_dispatch(
        hidden, 4 * (-(-groups // 4) if form == "ue8m0" else groups), topk, weights=True
    )
    lane_rows = torch.tensor(
        [[-1 if t % 3 == 1 else t - (t + 1) // 3] * 2 for t in range(num_tokens)], dtype=torch.int32
    )
    starts = TORCH.round_starts(lane_rows, capacity=capacity)
    for round_idx in (0, 1):
        windows = [torch.full((capacity, f.row_bytes), 0xA5, dtype=torch.uint8) for _ in range(2)]
        for kernels, window in zip((TORCH, TRITON), windows):
            kernels.pack(
                window, x, lane_rows, starts[round_idx], topk_idx=idx, topk_weights=weights, lane=1,
                first_token=round_idx * capacity, last_token=(round_idx + 1) * capacity, scales_at=f.scales_at,
                token_at=f.token_at, ids_at=f.ids_at, weights_at=f.weights_at, cast=form,
            )  # fmt: skip
        assert torch.equal(*windows)


@checked
@given(
    num_rows=st.integers(0, 4),
    hidden=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(FLOATS),
    seed=seeds,
)
def test_logfmt(num_rows, hidden, dtype, seed):
    """Equal to the twin, but for values in the middle between two levels, which log2 and exp2 may put to either."""
    x = rows_of(num_rows, hidden, dtype, seed)
    want, got = torch.empty_like(x), torch.empty_like(x)
    TORCH.through_logfmt(want, x)
    same_values(want, deep_ep.through_logfmt(x))
    TRITON.through_logfmt(got, x)
    a, b = got.float(), want.float()
    nan = b.isnan()
    assert torch.equal(a.isnan(), nan) and torch.equal(a.signbit()[~nan], b.signbit()[~nan])
    assert torch.equal((a == 0) & ~nan, (b == 0) & ~nan)
    a, b = a[~nan].double(), b[~nan].double()
    ulp = torch.finfo(dtype).eps * b.abs() + torch.finfo(dtype).smallest_normal
    far = (a - b).abs() > ulp + 1e-5 * b.abs()
    assert far.sum() <= 1e-3 * far.numel() + 1, "only ties may differ"
    step = 2 ** (32 / 510) - 1  # of the coarsest level, relative
    assert ((a - b).abs() <= step * b.abs() + ulp).all()


def test_wrong_forms_are_errors():
    with pytest.raises(
        ValueError, match="form: expected float32, power_of_two or ue8m0, got 'fp4'"
    ):
        TORCH.cast_to_fp8(torch.zeros(1, 128), form="fp4")
    with pytest.raises(
        ValueError, match="form: expected float32, power_of_two or ue8m0, got 'fp4'"
    ):
        TRITON.cast_to_fp8(torch.zeros(1, 128), form="fp4")
