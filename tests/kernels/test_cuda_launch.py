"""Launching the CUDA kernels (kernels/fused.py): arguments as the compilers see them; each step against its twin.

Without a GPU the launcher's structs go to the same kernels as host code (fused_host.cpp); tests marked gpu launch them.
"""

import ctypes
import os
import re
import shlex
import subprocess

import pytest
import simulated_exchange
import test_kernels_exchange as exchange
import torch
from test_kernels import FLOATS, bits, lanes_of, make_terms, random_bytes, random_topk

from moe_comm.kernels import CUDA, TORCH, cuda, for_device, fused
from moe_comm.layout import DTYPE_CODES, RowFormat

CXX = shlex.split(os.environ.get("CXX") or "g++")
STRUCTS = {
    "DeviceRing": fused.DeviceRing, "dispatch::Arguments": fused.Send, "receive::Forward": fused.Forward,
    "receive::Release": fused.Release, "receive::Unpack": fused.Unpack, "combine::Arguments": fused.Combine,
    "combine::Group": fused.Group, "headers::Begin": fused.Begin, "headers::Write": fused.Write,
    "headers::LeaveOut": fused.LeaveOut,
    "headers::Check": fused.Check, "headers::Collect": fused.Collect, "relay::Arguments": fused.PassOn,
}  # fmt: skip


# --- the arguments -------------------------------------------------------------------------------


def test_structs_are_the_headers(tmp_path):
    """Names, order, offsets and sizes, by the compiler that reads the same headers."""
    lines = [
        "#include <cstddef>",
        '#include "combine.cuh"',
        '#include "headers.cuh"',
        '#include "receive.cuh"',
        '#include "relay.cuh"',
        "using namespace moe_comm;",
    ]
    for name, struct in STRUCTS.items():
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(struct)});")
        for field, kind in struct._fields_:
            at = getattr(struct, field).offset
            lines.append(f"static_assert(offsetof({name}, {field}) == {at});")
            lines.append(f"static_assert(sizeof({name}::{field}) == {ctypes.sizeof(kind)});")
    source = tmp_path / "structs.cpp"
    source.write_text("\n".join(lines) + "\n")
    command = [*CXX, "-std=c++20", "-fsyntax-only", f"-I{cuda.HERE}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def parameters(name):
    """{kernel: [(alignment, bytes), …]} of a .cu, as NVRTC's PTX lists them."""
    nvrtc = cuda._nvrtc()
    program = nvrtc.createProgram((cuda.HERE / f"{name}.cu").read_text(), f"{name}.cu", (), ())
    nvrtc.compileProgram(
        program, (*cuda.OPTIONS, "--gpu-architecture=compute_90", f"--include-path={cuda.HERE}")
    )
    ptx = nvrtc.getPTX(program)
    ptx = ptx if isinstance(ptx, str) else ptx.decode()
    nvrtc.destroyProgram(program)
    found = {}
    for kernel, text in re.findall(r"\.entry (\w+)\((.*?)\)", ptx, re.DOTALL):
        found[kernel] = []
        for line in text.strip().splitlines():
            whole = re.search(r"\.param \.align (\d+) \.b8 \w+\[(\d+)\]", line)
            plain = re.search(r"\.param \.[usb](\d+)", line)
            assert whole or plain, line
            size = int(plain[1]) // 8 if plain else int(whole[2])
            found[kernel].append((size if plain else int(whole[1]), size))
    return found


def test_arguments_are_the_kernels():
    """Their number, order and sizes, by the compiler that ships."""
    try:
        found = {kernel: p for name in cuda.sources() for kernel, p in parameters(name).items()}
    except ImportError as error:
        pytest.skip(str(error))
    assert found.keys() == fused.KERNELS.keys()
    for kernel, (source, types) in fused.KERNELS.items():
        assert source in cuda.sources()
        assert found[kernel] == [(ctypes.alignment(t), ctypes.sizeof(t)) for t in types], kernel


def test_wrong_arguments():
    def launch(kernel, *arguments):
        fused.launch(kernel, *arguments, device=torch.device("cpu"))

    with pytest.raises(TypeError, match="moe_comm_push: expected 3 arguments, got 1"):
        launch("moe_comm_push", fused.DeviceRing())
    with pytest.raises(
        TypeError, match="moe_comm_dispatch_send: argument 0: expected Send, got Forward"
    ):
        launch("moe_comm_dispatch_send", fused.Forward())
    with pytest.raises(TypeError, match="argument 1: expected c_ulong, got DeviceRing"):
        launch("moe_comm_push", fused.DeviceRing(), fused.DeviceRing(), 0)
    with pytest.raises(TypeError, match="Send: has no rows"):
        fused.Send(rows=1)
    with pytest.raises(
        ValueError, match="moe_comm_wait: expected CUDA tensors, got tensors on cpu"
    ):
        launch("moe_comm_wait", 0, 0, 0, 0, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver():
    with pytest.raises(ImportError, match="expected an NVIDIA driver"):
        fused.driver()


def test_forced(monkeypatch):
    monkeypatch.setenv("MOE_COMM_KERNELS", "cuda")
    assert for_device("cuda") is CUDA and CUDA.pack is fused.pack_cuda


# --- the steps -----------------------------------------------------------------------------------


class Steps:
    """Where CUDA's steps run here: `device`, and how often each kernel was launched."""

    def __init__(self, device):
        self.device, self.launched = torch.device(device), []

    def put(self, tensor):
        return None if tensor is None else tensor.to(self.device)


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def steps(request, library, monkeypatch):
    made = Steps("cpu" if request.param == "host" else "cuda")
    real = fused.run
    calls = {"moe_comm_dispatch_send": library.dispatch_send, "moe_comm_dispatch_forward": library.forward,
             "moe_comm_dispatch_unpack": library.unpack}  # fmt: skip

    def run(kernel, arguments, num_blocks, num_threads, device):
        made.launched.append(kernel)
        if made.device.type == "cuda":
            real(kernel, arguments, num_blocks, num_threads, device)
            torch.cuda.synchronize()
            return
        at = ctypes.byref(arguments[0])
        if kernel in calls:
            calls[kernel](at, ctypes.c_uint64(3), ctypes.c_uint64(2))
        else:
            dtype = {v: k for k, v in fused.DTYPES.items()}[kernel.rsplit("_", 1)[1]]
            library.combine_send(
                at, ctypes.c_uint64(DTYPE_CODES[dtype]), ctypes.c_uint64(3), ctypes.c_uint64(2)
            )

    monkeypatch.setattr(fused, "run", run)
    return made


@pytest.mark.parametrize("with_scales, cached", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("strided", [False, True])
def test_pack(steps, with_scales, cached, strided):
    num_tokens, hidden, topk, num_experts, capacity = 37, 40, 3, 16, 20
    x = random_bytes(num_tokens, 4 * hidden, seed=1).view(torch.int16)
    x = x[:, :hidden] if strided else x[:, :hidden].contiguous()
    scales = random_bytes(num_tokens, 4 * 5, seed=2).view(torch.float32).t().contiguous().t()
    idx, weights = random_topk(num_tokens, topk, num_experts), torch.rand(num_tokens, topk)
    f = RowFormat.of_dispatch(2 * hidden, 20 * with_scales, topk, weights=not cached, cached=cached)
    lane_of_rank, num_lanes = lanes_of(8, 2, node=1)
    routed = TORCH.route(
        idx, torch.tensor(lane_of_rank, dtype=torch.int32), num_experts=num_experts, num_ranks=8, num_lanes=num_lanes,
        capacity=capacity,
    )  # fmt: skip
    put = steps.put
    for round_idx, lane in ((0, 0), (1, 4)):
        last = min(num_tokens, (round_idx + 1) * capacity)
        options = {
            "lane": lane, "first_token": round_idx * capacity, "last_token": last,
            "scales_at": f.scales_at, "token_at": f.token_at, "ids_at": f.ids_at, "weights_at": f.weights_at,
        }  # fmt: skip
        inputs = {
            "scales": scales if with_scales else None, "topk_idx": None if cached else idx,
            "topk_weights": None if cached else weights,
        }  # fmt: skip
        want = torch.full((capacity, f.row_bytes), 0xA5, dtype=torch.uint8)
        got = put(want.clone())
        starts = routed.round_starts[round_idx]
        TORCH.pack(want, x, routed.lane_rows, starts, **inputs, **options)
        moved = {name: put(value) for name, value in inputs.items()}
        if with_scales:
            moved["scales"] = put(scales.t().contiguous()).t()
        there = put(torch.cat([x, x], 1))[:, :hidden] if strided else put(x)
        CUDA.pack(
            got,
            there,
            put(routed.lane_rows),
            put(routed.round_starts)[round_idx],
            **moved,
            **options,
        )
        assert torch.equal(got.cpu(), want)
    assert steps.launched == ["moe_comm_dispatch_send"] * 2
    assert not fused.scratch(steps.device)[:3].any(), "zero after each launch"


def test_forward(steps):
    n, node_ranks, row_bytes = 29, 3, 112
    link = random_bytes(n, row_bytes, seed=4)
    hits = torch.rand(n, node_ranks, generator=torch.Generator().manual_seed(2)) < 0.6
    starts = torch.tensor([5, 0, 40], dtype=torch.int32)
    rows = torch.where(hits, hits.cumsum(0, dtype=torch.int32) - 1 + starts, -1)
    for local in range(node_ranks):
        want = torch.full((n, row_bytes), 0xA5, dtype=torch.uint8)
        got = steps.put(want.clone())
        TORCH.forward(want, link, rows, starts, local=local)
        CUDA.forward(got, steps.put(link), steps.put(rows), steps.put(starts), local=local)
        assert torch.equal(got.cpu(), want)
    assert steps.launched == ["moe_comm_dispatch_forward"] * node_ranks


@pytest.mark.parametrize("num_positions", [1, 4])
@pytest.mark.parametrize("scale_bytes", [0, 20])
def test_unpack(steps, num_positions, scale_bytes):
    f = RowFormat.of_dispatch(80, scale_bytes, 2, weights=True)
    rows = random_bytes(17, f.row_bytes, seed=6)
    places = torch.randperm(90, generator=torch.Generator().manual_seed(1)).int()
    positions = places[: 17 * num_positions].view(17, num_positions)
    positions = torch.where(positions % 4 == 0, -1, positions)
    x = torch.full((90, 40), -3, dtype=torch.int16)
    scales = torch.ones(90, scale_bytes, dtype=torch.uint8) if scale_bytes else None
    want = x.clone(), None if scales is None else scales.clone()
    got = steps.put(x.clone()), steps.put(scales)
    TORCH.unpack(want[0], rows, positions, out_scales=want[1], scales_at=f.scales_at)
    CUDA.unpack(
        got[0], steps.put(rows), steps.put(positions), out_scales=got[1], scales_at=f.scales_at
    )
    assert torch.equal(got[0].cpu(), want[0])
    assert scales is None or torch.equal(got[1].cpu(), want[1])
    assert steps.launched == ["moe_comm_dispatch_unpack"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "weighted, biased, inner", [(0, 0, (0, 0)), (1, 0, (0, 3)), (1, 1, (3, 5))]
)
@pytest.mark.parametrize("limit", [None, 9, 50])
def test_reduce(steps, dtype, weighted, biased, inner, limit):
    num_rows, width, num_terms = 21, 24, 5
    memory, offsets = make_terms(dtype, num_rows, width, num_terms, seed=3)
    offsets[2:4] = -1
    options = {
        "weights": torch.rand(num_rows, num_terms) if weighted else None,
        "bias": torch.randn(num_rows, width).to(dtype) if biased else None,
        "num_tokens": None if limit is None else torch.tensor([limit], dtype=torch.int32),
    }
    want = torch.full((num_rows, width), 7, dtype=dtype)
    got = steps.put(want.clone())
    sums = {"inner_first": inner[0], "inner_last": inner[1]}
    TORCH.reduce(want, memory, offsets, **options, **sums)
    moved = {name: steps.put(value) for name, value in options.items()}
    CUDA.reduce(got, steps.put(memory), steps.put(offsets), **moved, **sums)
    assert torch.equal(bits(got.cpu()), bits(want))
    assert steps.launched == [f"moe_comm_combine_send_{fused.DTYPES[dtype]}"]


@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
def test_whole_exchange(steps, monkeypatch, layout):
    """Every rank's steps by CUDA's kernels, against reference.py; on a GPU, with its tensors."""
    if steps.device.type == "cuda":
        pytest.skip("the simulated exchange holds its windows in host memory")
    monkeypatch.setattr(simulated_exchange, "step", CUDA)
    more = {"rank": {}, "expert": {"alignment": 4}, "padded": {"capacity": 30}}[layout]
    inputs = exchange.make_inputs([5, 0, 7, 2], layout=layout, **more)
    assert (
        exchange.round_trip(exchange.NODES["2 x 2 interleaved"], "node", inputs, capacity=4)[0] == 2
    )
    assert len(set(steps.launched)) == 4, "pack, forward, unpack and reduce"


@pytest.mark.gpu
def test_ring_kernels():
    """Many blocks push into pinned memory: every command once, each with both laps' bits; a wait sees its word."""
    num_slots, num_pushes = 256, 200
    slots = torch.zeros(num_slots, 2, dtype=torch.int64, pin_memory=True)
    words = torch.zeros(4, dtype=torch.int64, pin_memory=True)  # taken, abort word, counter
    device = torch.device("cuda", torch.cuda.current_device())
    tickets = torch.zeros(2, dtype=torch.int64, device=device)
    ring = fused.DeviceRing(
        slots=slots.data_ptr(), reserved=tickets.data_ptr(), taken_seen=tickets[1:].data_ptr(), taken=words.data_ptr(),
        abort_word=words[1:].data_ptr(), num_slots=num_slots, timeout_ns=10**8,
    )  # fmt: skip
    transfers = torch.zeros(num_pushes, 5, dtype=torch.int64)  # channel and epoch are 32 bits each
    transfers[:, 0] = torch.arange(num_pushes) | (7 << 32)
    transfers[:, 3] = 256
    status = torch.full((num_pushes,), 9, dtype=torch.int32, device=device)
    moved = transfers[:, :4].contiguous().to(device)
    fused.launch("moe_comm_push", ring, moved, status, device=device, num_blocks=num_pushes)
    torch.cuda.synchronize()
    assert not status.any()
    first = slots[:num_pushes, 0]
    assert (first < 0).all() and (slots[:num_pushes, 1] < 0).all(), (
        "the lap bit of the first lap is 1"
    )
    assert sorted(((first >> 48) & 0x7FFF).tolist()) == list(range(num_pushes))
    more = torch.full((num_pushes,), 9, dtype=torch.int32, device=device)
    fused.launch("moe_comm_push", ring, moved, more, device=device, num_blocks=num_pushes)
    torch.cuda.synchronize()
    assert (more == 1).sum() == 2 * num_pushes - num_slots, (
        "no room, nobody takes: bounded, kWaitTimeout"
    )
    words[2] = 5
    seen = torch.full((2,), 9, dtype=torch.int32, device=device)
    for at, target in enumerate((5, 6)):
        fused.launch(
            "moe_comm_wait", words[2:], target, words[1:], 10**7, seen[at:], device=device, num_blocks=1
        )  # fmt: skip
    torch.cuda.synchronize()
    assert seen.tolist() == [0, 1], "kWaitOk, kWaitTimeout; the context lives"


@pytest.mark.gpu
def test_tables_of_a_captured_graph_stay():
    """However many others are made after it."""
    device = torch.device("cuda", torch.cuda.current_device())
    values, out = tuple(range(16)), torch.zeros(16, dtype=torch.int64, device=device)
    fused.table(values, torch.int64, device)  # nothing is copied in a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(fused.table(values, torch.int64, device))
    for n in range(2000):
        fused.table((n + 100,) * 16, torch.int64, device)
    graph.replay()
    assert out.tolist() == list(values)
