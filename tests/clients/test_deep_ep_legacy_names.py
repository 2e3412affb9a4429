"""Names, events, Config and casts of the legacy half; one process. Signatures: test_deep_ep_names.py."""

import importlib
import json
import math
import struct
import subprocess
import sys

import pytest
import torch
from deep_ep_record import CONFIG

from moe_comm import ArgumentError, deep_ep
from moe_comm.deep_ep import quant
from moe_comm.deep_ep.utils.math import (
    align,
    calc_diff,
    per_token_cast_back,
    per_token_cast_to_fp8,
)
from moe_comm.kernels.quant import groups_of as groups_of_rows
from moe_comm.kernels.quant import power_of_two_above

# --- names ---------------------------------------------------------------------------------------


def test_names():
    assert deep_ep.topk_idx_t is torch.int64
    assert deep_ep.Buffer.num_sms == 20 and deep_ep.__version__
    for module, names in {
        "utils": "EventHandle EventOverlap check_nvlink_connections",
        "utils.event": "EventHandle EventOverlap",
        "utils.envs": "check_nvlink_connections",
        "utils.math": "per_token_cast_to_fp8 per_token_cast_back calc_diff align ceil_div",
        "buffer": "Buffer Config EventOverlap",
        "buffers.legacy": "Buffer",
        "legacy": "Buffer",
    }.items():
        found = importlib.import_module(f"moe_comm.deep_ep.{module}")
        for name in names.split():
            assert hasattr(found, name), f"{module}.{name}"
            if hasattr(deep_ep, name):
                assert getattr(found, name) is getattr(deep_ep, name)
    assert deep_ep.utils.check_nvlink_connections(None) is None


def test_an_import_changes_nothing():
    code = (
        "import os, sys; before = dict(os.environ); import moe_comm.deep_ep; import torch; "
        "print(before == dict(os.environ), torch.cuda.is_initialized(), 'mpi4py' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


# --- events --------------------------------------------------------------------------------------


def test_events():
    event = deep_ep.EventOverlap(deep_ep.EventHandle(), extra_tensors=(torch.zeros(1),))
    event.current_stream_wait()
    with event as entered:
        assert entered is event
    seen = []
    event.register_hook_after_wait(lambda: seen.append(1))
    with pytest.raises(ArgumentError, match="fn: expected none"):
        event.register_hook_after_wait(lambda: None)
    event.current_stream_wait()
    event.current_stream_wait()
    assert seen == [1]
    with event(release_handle=True) as entered:
        assert entered is event and event.event is not None
    assert event.event is None
    with pytest.raises(ArgumentError, match="event: expected"):
        event.current_stream_wait()
    with event:  # nothing to wait for
        pass
    event.event = deep_ep.EventHandle()  # clients write it
    event.current_stream_wait(release_handle=True)
    assert event.event is None
    deep_ep.EventHandle().current_stream_wait()
    assert deep_ep.Buffer.capture().event is not None


def test_any_event_is_waited_for():
    from moe_comm import Event
    from moe_comm.deep_ep.events import wait_for_event

    waited = []

    class Handle(deep_ep.EventHandle):
        def current_stream_wait(self):
            waited.append(self)

    handle = Handle()
    for event in (handle, deep_ep.EventOverlap(handle)):
        wait_for_event(event)
    assert waited == [handle, handle]
    for event in (None, deep_ep.EventOverlap(None), Event()):
        wait_for_event(event)
    with pytest.raises(ArgumentError, match="previous_event: expected"):
        wait_for_event(3)


# --- Config --------------------------------------------------------------------------------------


def test_config():
    names = [p.split("=")[0] for p in CONFIG.split()]
    from_json = deep_ep.Config(
        **json.loads(json.dumps(dict(zip(names, [24, 8, 288, 8, 128], strict=True))))
    )
    positional = deep_ep.Config(24, 8, 288, 8, 128)
    for ranks in (1, 2, 7, 8):
        assert positional.get_nvl_buffer_size_hint(14336, ranks) > 0
        assert positional.get_rdma_buffer_size_hint(14336, ranks) == 0
    for ranks in (9, 16, 160, 1000):
        for method in ("get_nvl_buffer_size_hint", "get_rdma_buffer_size_hint"):
            hint = getattr(positional, method)(14336, ranks)
            assert hint > 0 and hint % 128 == 0
            assert hint == getattr(from_json, method)(hidden_bytes=14336, num_ranks=ranks)
    more = deep_ep.Config(24, 8, 288, 8, 136)
    uneven = deep_ep.Config(24, 8, 288, 8, 129)  # rounded up to a multiple of what is sent
    assert more.get_rdma_buffer_size_hint(256, 16) == uneven.get_rdma_buffer_size_hint(256, 16)
    for wrong, name in (
        ((-1,), "num_sms"),
        ((20, 0), "num_max_nvl_chunked_send_tokens"),
        ((20, 6, 6), "num_max_nvl_chunked_recv_tokens"),
        ((20, 6, 256, 0), "num_max_rdma_chunked_send_tokens"),
        ((20, 6, 256, 6, 6), "num_max_rdma_chunked_recv_tokens"),
    ):
        with pytest.raises(ArgumentError, match=f"{name}: expected"):
            deep_ep.Config(*wrong)


def test_static_methods():
    Buffer = deep_ep.Buffer
    try:
        Buffer.set_num_sms(24)
        assert Buffer.num_sms == 24
        with pytest.raises(ArgumentError, match="new_num_sms: expected an even"):
            Buffer.set_num_sms(23)
    finally:
        Buffer.set_num_sms(20)
    for ranks in (1, 2, 3, 6, 160, 1024):
        for config in (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)):
            assert isinstance(config, deep_ep.Config)
    with pytest.raises(ArgumentError, match="num_ranks: expected"):
        Buffer.get_dispatch_config(0)
    assert Buffer.is_sm90_compiled() is True
    small = Buffer.get_low_latency_rdma_size_hint(128, 2048, 8, 64)
    assert (
        0
        < small
        < Buffer.get_low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank=128, hidden=7168, num_ranks=8, num_experts=64
        )
    )
    a, b = torch.zeros(1), torch.ones(1)
    assert Buffer._unpack_bias(a) == (a, None) and Buffer._unpack_bias((a, b)) == (a, b)
    assert Buffer._unpack_bias(None) == (None, None) == Buffer._unpack_bias(3)


# --- casts ---------------------------------------------------------------------------------------


def float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def exponent_byte(value):
    return struct.unpack("I", struct.pack("f", value))[0] >> 23


ROWS = torch.randn(5, 400, generator=torch.Generator().manual_seed(0)) * 10 ** torch.tensor(
    [[-9.0], [-3.0], [0.0], [3.0], [30.0]]
)


def groups(row):
    return [row[i : i + 128] for i in range(0, len(row), 128)]


@pytest.mark.parametrize("round_scale", [False, True])
def test_cast_to_fp8(round_scale):
    """Group by group in Python's numbers."""
    x = ROWS.bfloat16()
    x[2, 128:256] = 0
    got, scales = quant.cast_to_fp8(x, round_scale=round_scale)
    assert got.dtype == torch.float8_e4m3fn and scales.shape == (5, 4)
    for t in range(5):
        for g, part in enumerate(groups(x[t])):
            amax = float32(max(float(part.float().abs().max()), 1e-4))
            scale = float32(amax * float32(1 / 448))
            factor = float32(448 / amax)
            if round_scale:
                scale = 2.0 ** math.ceil(math.log2(scale))
                factor = 1 / scale
            assert float(scales[t, g]) == scale
            want = (part.float() * factor).clamp(-448, 448).to(torch.float8_e4m3fn)
            mine = got[t, g * 128 : g * 128 + 128]
            assert torch.equal(mine.view(torch.uint8), want.view(torch.uint8))
    back = quant.cast_from_fp8(got, scales)
    assert back.dtype == torch.bfloat16 and bool(back.isfinite().all())
    assert bool((back[2, 128:256] == 0).all())


def test_round_scale_of_exact_powers():
    """A scale that is a power of two stays; the next number above goes up."""
    for power in (-20, -1, 0, 5, 60):
        exact = torch.tensor(2.0**power)
        x = torch.stack([exact, torch.nextafter(exact, torch.tensor(math.inf)), 1.5 * exact])
        double = 2.0 ** (power + 1)
        assert power_of_two_above(x).tolist() == [2.0**power, double, double]


@pytest.mark.parametrize("num_groups", [4, 8, 5, 1])
def test_ue8m0(num_groups):
    """The lowest group in the lowest byte; scales on both sides of 1, where the top byte changes sign; any strides."""
    g = torch.Generator().manual_seed(1)
    scales = 2.0 ** torch.randint(-100, 100, (7, num_groups), generator=g).float()
    for given in (scales, scales.t().contiguous().t()):
        packed = quant.pack_ue8m0(given)
        assert packed.dtype == torch.int32 and packed.shape == (7, -(-num_groups // 4))
        for t in range(7):
            for i in range(num_groups):
                byte = (int(packed[t, i // 4]) >> (8 * (i % 4))) & 0xFF
                assert byte == exponent_byte(float(scales[t, i]))
        for stored in (packed, packed.t().contiguous().t()):
            assert torch.equal(quant.unpack_ue8m0(stored, num_groups), scales)


def test_math():
    x = ROWS[:4].bfloat16()
    rows, scales = per_token_cast_to_fp8(x)
    amax = groups_of_rows(x).abs().amax(-1).clamp_min(1e-4)
    assert torch.equal(scales, amax / 448)
    assert calc_diff(per_token_cast_back(rows, scales)[3:], x[3:]) < 1e-3
    rows, packed = per_token_cast_to_fp8(x, use_ue8m0=True)
    assert packed.dtype == torch.int32 and packed.shape == (4, 1)
    assert torch.equal(
        per_token_cast_back(rows, packed),
        per_token_cast_back(rows, quant.unpack_ue8m0(packed, 4)),
    )
    assert calc_diff(x, x) == 0 and calc_diff(x, -x) > 1e-3
    assert (align(7, 4), align(8, 4)) == (8, 8)


def test_logfmt():
    g = torch.Generator().manual_seed(2)
    x = (torch.randn(6, 256, generator=g) * 0.1).clamp(-0.99, 0.99).bfloat16()
    x[0, ::2] = 0  # zero has a code of its own
    x[1, :128] = 3 * x[1, :128] + 5  # a group that reaches 1 passes as it is
    x[2, :128] = 0.25  # nothing to spread
    x[4, 5], x[5, 5] = 1.0, 1.5  # the first that reach 1
    x[3, 0] = 1e-30  # far below the largest: 32 octaves is all there is
    got = quant.through_logfmt(x)
    assert got.dtype == x.dtype and got.shape == x.shape
    assert torch.equal(got[1, :128], x[1, :128]) and torch.equal(got[2, :128], x[2, :128])
    assert torch.equal(got[4:, :128], x[4:, :128])
    assert bool((got[0, ::2] == 0).all()) and not torch.equal(got, x)
    assert torch.equal(got.sign()[1:], x.sign()[1:])
    for t in range(6):
        for part, back in zip(groups(x[t].double()), groups(got[t].double()), strict=True):
            used = part.abs()[part != 0]
            if used.max() >= 1 or used.min() == used.max():
                continue
            high = math.log2(used.max())
            low = max(math.log2(used.min()), high - 32)
            levels = 2 ** (low + (high - low) / 510 * torch.arange(511).double())
            for value, after in zip(part.tolist(), back.tolist(), strict=True):
                if value == 0:
                    continue
                nearest = (levels - abs(value)).abs().min()
                assert abs(abs(after) - abs(value)) <= nearest + abs(after) * 2**-8  # bfloat16
    assert float(got[0].max()) == float(x[0].max())  # the largest stays


def test_logfmt_rounds_in_the_linear_domain():
    """Between two levels the arithmetic mean decides, not the geometric one: dense values, coarse levels."""
    x = torch.exp2(torch.linspace(-31, -0.5, 1 << 14, dtype=torch.float64)).float()
    x = x.view(128, 128).t().contiguous()  # each group spans 30 octaves
    got = quant.through_logfmt(x).double()
    for t in range(0, 128, 16):
        low, high = x[t].double().min().log2(), x[t].double().max().log2()
        levels = torch.exp2(low + (high - low) / 510 * torch.arange(511).double())
        nearest = (levels[:, None] - x[t].double()).abs().min(0).values
        error = (got[t] - x[t].double()).abs()
        assert bool((error <= nearest + x[t].double() * 1e-5).all())


def test_logfmt_passes_what_is_not_finite():
    x = torch.tensor([[math.inf, 0.5] + [0.1] * 126, [math.nan, 0.5] + [0.1] * 126])
    got = quant.through_logfmt(x)
    assert torch.equal(got[0], x[0]) and bool(got[1, 0].isnan())
