"""How fast are the kernels on this GPU, against what it can copy? One figure for each call: prints one JSON line.

    python bench/gpu_figures.py copy|rows|small|ring|sweep|staged|calls|check [--dry-run]  (by bench/gpu_suite.py)

**Routing** is shaped as EP8's: R = 8, E = 256, K = 8, uniform, H = 7168 bf16, one node; T as said.
**Bytes** are payload, each input read once and each output written once, whatever a kernel really reads. The roof is a
device-to-device copy of as many bytes as a GPU's caches never hold, read and written, in the same process.
**Time.** rows, sweep: CUDA events around one call each, inputs rotated so that they are larger than L2, 40 calls,
median. small: every call of a rotation captured in one graph, 40 replays, divided; at T = 1 all fits in L2. ring: in
the kernel, by the SM's clock. staged, calls: host call to the end of the stream. torch's way: `argsort`,
`index_select`, `index_add_`, same inputs.
**Traps.** pack of torch and Triton is called once for each lane, the fused one once; both fill the same windows.
--dry-run: tiny shapes on the CPU with the torch twins (calls: kernels as host code), to see that this program runs;
its times mean nothing.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import moe_comm
from moe_comm import deep_ep
from moe_comm.kernels import CUDA, TORCH, TRITON, cuda, fused
from moe_comm.layout import RowFormat

HERE = Path(__file__).resolve().parent
RANKS, EXPERTS, TOPK = 8, 256, 8
REPEATS = 40


class Device:
    """The GPU; or, in a dry run, the CPU with tiny shapes."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda:0")
        self.hidden = 64 if dry else 7168
        self.repeats = 3 if dry else REPEATS
        self.steps = {"torch": TORCH} if dry else {"triton": TRITON, "cuda": CUDA}

    def tokens(self, number: int) -> int:
        return min(number, 16) if self.dry else number

    def times_us(self, calls) -> list[float]:
        """Of `repeats` calls, in turn; each twice before."""
        for call in [*calls, *calls]:
            call()
        if self.dry:
            times = []
            for i in range(self.repeats):
                start = time.perf_counter()
                calls[i % len(calls)]()
                times.append(1e6 * (time.perf_counter() - start))
            return times
        pairs = []
        for i in range(self.repeats):
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            calls[i % len(calls)]()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in pairs]

    def graph_us(self, calls) -> list[float]:
        """Of one call, each of `repeats` replays of a graph of all."""
        if self.dry:
            return self.times_us(calls)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in [*calls, *calls]:
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        return [t / len(calls) for t in self.times_us([graph.replay])]


def figure(times: list[float], num_bytes: int = 0) -> dict:
    ordered = sorted(times)
    found = {
        "median_us": statistics.median(times), "p10_us": ordered[len(times) // 10],
        "p99_us": ordered[min(len(times) - 1, len(times) * 99 // 100)], "calls": len(times),
    }  # fmt: skip
    if num_bytes:
        found |= {"bytes": num_bytes, "gb_s": num_bytes / 1e3 / found["median_us"]}
    return found


class Inputs:
    """One rank's view of an exchange: what it packs, receives and sums."""

    def __init__(self, on: Device, num_tokens: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.on, self.T = on, on.tokens(num_tokens)
        T, H, device = self.T, on.hidden, on.device
        self.x = torch.randn(T, H, generator=g, dtype=torch.float32).bfloat16().to(device)
        idx = torch.rand(T, EXPERTS, generator=g).topk(TOPK, dim=1).indices
        weights = torch.rand(T, TOPK, generator=g)
        self.lane_of_rank = torch.arange(RANKS, dtype=torch.int32, device=device)
        self.format = RowFormat.of_dispatch(2 * H, 0, TOPK, weights=True)
        routed = TORCH.route(
            idx, torch.arange(RANKS, dtype=torch.int32), num_experts=EXPERTS, num_ranks=RANKS, num_lanes=RANKS,
            capacity=T,
        )  # fmt: skip
        self.num_rows = int(routed.lane_counts.sum())
        self.idx, self.weights = idx.to(device), weights.to(device)
        self.lane_rows, self.starts = routed.lane_rows.to(device), routed.round_starts.to(device)
        self.windows = torch.zeros(
            RANKS, T, self.format.row_bytes, dtype=torch.uint8, device=device
        )
        # Bytes below 64: no infinity, no NaN.
        # Rows that the ranks send to rank 0 look like what rank 0 sends to all: the same number on average.
        token, rank = (routed.lane_rows >= 0).nonzero(as_tuple=True)
        self.rows = torch.randint(
            0, 64, (self.num_rows, self.format.row_bytes), dtype=torch.uint8, device=device
        )
        owner = idx // (EXPERTS // RANKS)
        copies = (
            owner[token] == rank[:, None]
        )  # [rows, K]: a copy for each of the token's experts there
        expert = torch.where(copies, idx[token] % (EXPERTS // RANKS), EXPERTS)
        order = expert.flatten().argsort(stable=True)[: int(copies.sum())]
        positions = torch.full((copies.numel(),), -1, dtype=torch.int32)
        positions[order] = torch.arange(len(order), dtype=torch.int32)
        self.num_copies = len(order)
        self.positions = positions.view(copies.shape).to(device)
        self.out = torch.empty(self.num_copies, H, dtype=torch.bfloat16, device=device)
        offsets = torch.full((T, RANKS), -1, dtype=torch.int64)
        offsets[token, rank] = torch.arange(self.num_rows) * self.format.row_bytes
        self.offsets = offsets.to(device)
        self.combined = torch.empty(T, H, dtype=torch.bfloat16, device=device)
        self.token, self.dest = token.to(device), rank.to(device)
        self.copy_row = (order // TOPK).to(device)
        self.row_bytes = 2 * H

    # Bytes of payload, each input read once, each output written once.
    def bytes_of(self, step: str) -> int:
        n, row = self.num_rows, self.row_bytes
        return {
            "pack": self.T * row + n * row, "pack fp8": self.T * row + n * row // 2,
            "unpack": n * row + self.num_copies * row, "reduce": n * row + self.T * row,
        }[step]  # fmt: skip

    def route(self, steps):
        return steps.route(
            self.idx, self.lane_of_rank, num_experts=EXPERTS, num_ranks=RANKS, num_lanes=RANKS, capacity=self.T
        )  # fmt: skip

    def pack(self, steps, cast=None) -> None:
        f = self.format
        scales_at = self.on.hidden if cast else f.scales_at
        for lane in range(RANKS):
            steps.pack(
                self.windows[lane], self.x, self.lane_rows, self.starts[0], topk_idx=self.idx,
                topk_weights=self.weights, lane=lane, first_token=0, last_token=self.T, scales_at=scales_at,
                token_at=f.token_at, ids_at=f.ids_at, weights_at=f.weights_at, cast=cast,
            )  # fmt: skip

    def pack_fused(self, num_blocks=None) -> None:
        """All lanes by one kernel: each token is read once."""
        f, device, words = self.format, self.x.device, fused.scratch(self.x.device)
        addresses = tuple(self.windows[lane].data_ptr() for lane in range(RANKS))
        arguments = fused.Send(
            x=self.x.data_ptr(), x_stride=self.row_bytes, payload_bytes=self.row_bytes, topk_idx=self.idx.data_ptr(),
            topk_weights=self.weights.data_ptr(), topk=TOPK, lane_rows=self.lane_rows.data_ptr(),
            starts=self.starts.data_ptr(), num_lanes=RANKS, first_token=0, last_token=self.T, scales_at=f.scales_at,
            token_at=f.token_at, ids_at=f.ids_at, weights_at=f.weights_at, row_bytes=f.row_bytes,
            windows=fused.table(addresses, torch.int64, device).data_ptr(),
            lanes=fused.table(tuple(range(RANKS)), torch.int32, device).data_ptr(), num_local=RANKS,
            commits=fused.table((words[3:].data_ptr(),) * RANKS, torch.int64, device).data_ptr(),
            epoch=words[4:].data_ptr(), arrived=words.data_ptr(), status=words[2:].data_ptr(),
        )  # fmt: skip
        fused.launch(
            "moe_comm_dispatch_send", arguments, device=device, num_blocks=num_blocks,
            num_threads=fused.threads_for("dispatch", self.row_bytes),
        )  # fmt: skip

    def unpack(self, steps) -> None:
        steps.unpack(self.out, self.rows, self.positions)

    def reduce(self, steps) -> None:
        steps.reduce(self.combined, self.rows.view(-1), self.offsets)

    # The same with torch.
    def torch_pack(self):
        order = self.dest.argsort(stable=True)
        return self.x.index_select(0, self.token.index_select(0, order))

    def torch_unpack(self):
        payload = self.rows[:, : self.row_bytes].view(torch.bfloat16)
        return payload.index_select(0, self.copy_row)

    def torch_reduce(self):
        payload = self.rows[:, : self.row_bytes].view(torch.bfloat16).float()
        sums = torch.zeros(self.T, self.on.hidden, device=self.x.device)
        return sums.index_add_(0, self.token, payload).bfloat16()


def rotation(on: Device, num_tokens: int) -> list[Inputs]:
    """So many that their x and rows are larger than any L2: 200 MB at least, and three."""
    first = Inputs(on, num_tokens, 0)
    each = first.x.nbytes + first.rows.nbytes
    count = 2 if on.dry else max(3, min(24, -(-200_000_000 // each)))
    return [first, *(Inputs(on, num_tokens, seed) for seed in range(1, count))]


def copy_figure(on: Device) -> dict:
    size = 1 << 12 if on.dry else 1 << 29
    pairs = [
        [torch.empty(size, dtype=torch.uint8, device=on.device) for _ in range(2)] for _ in range(2)
    ]
    return figure(on.times_us([lambda a=a, b=b: b.copy_(a) for a, b in pairs]), 2 * size)


def rows(on: Device) -> dict:
    """T = 4096: bytes/s of each kernel and its share of the copy's; how much faster than torch's way."""
    found: dict = {"copy": copy_figure(on)}
    inputs = rotation(on, 4096)
    ways = {"torch way": {
        "pack": [i.torch_pack for i in inputs], "unpack": [i.torch_unpack for i in inputs],
        "reduce": [i.torch_reduce for i in inputs],
    }}  # fmt: skip
    for name, steps in on.steps.items():
        ways[name] = {
            step: [lambda i=i, s=steps, m=step: getattr(i, m)(s) for i in inputs]
            for step in ("pack", "unpack", "reduce")
        }
        if name != "cuda":
            ways[name]["pack fp8"] = [lambda i=i, s=steps: i.pack(s, "ue8m0") for i in inputs]
    if not on.dry:
        ways["cuda"]["pack"] = [i.pack_fused for i in inputs]
    for way, steps in ways.items():
        for step, calls in steps.items():
            got = figure(on.times_us(calls), inputs[0].bytes_of(step))
            got["of_copy"] = got["gb_s"] / found["copy"]["gb_s"]
            found[f"{step}, {way}"] = got
    add_ratios(found)
    return found


def add_ratios(found: dict) -> None:
    for name, got in found.items():
        base = found.get(f"{name.split(', ')[0]}, torch way")
        if base and isinstance(got, dict) and not name.endswith("torch way"):
            got["times_torch"] = base["median_us"] / got["median_us"]


def small(on: Device) -> dict:
    """T = 128 and 1, in CUDA graphs: microseconds of one step."""
    found: dict = {}
    for num_tokens in (128, 1):
        inputs = rotation(on, num_tokens)
        part: dict = {}
        part["pack, torch way"] = figure(on.graph_us([i.torch_pack for i in inputs]))
        part["unpack, torch way"] = figure(on.graph_us([i.torch_unpack for i in inputs]))
        part["reduce, torch way"] = figure(on.graph_us([i.torch_reduce for i in inputs]))
        for name, steps in on.steps.items():

            def pack(i, steps=steps, fast=name == "cuda"):
                i.pack_fused() if fast else i.pack(steps)

            def all_four(i, steps=steps, pack=pack):
                i.route(steps)
                pack(i)
                i.unpack(steps)
                i.reduce(steps)

            calls = {
                "route": lambda i, s=steps: i.route(s), "pack": pack, "unpack": lambda i, s=steps: i.unpack(s),
                "reduce": lambda i, s=steps: i.reduce(s), "all four": all_four,
            }  # fmt: skip
            for step, call in calls.items():
                got = on.graph_us([lambda i=i, call=call: call(i) for i in inputs])
                part[f"{step}, {name}"] = figure(got)
        add_ratios(part)
        found[f"T={num_tokens}"] = part
    return found


def sweep(on: Device) -> dict:
    """The fused pack's bytes/s against its number of SMs (one block on each)."""
    if on.dry:
        return {"not measured": "needs a GPU"}
    inputs = rotation(on, 4096)
    most = torch.cuda.get_device_properties(0).multi_processor_count
    found: dict = {"copy": copy_figure(on)}
    for count in sorted({*(4, 8, 16, 24, 32, 48, 64, 96), most, 2 * most}):
        calls = [lambda i=i, n=count: i.pack_fused(n) for i in inputs]
        found[f"blocks={count}"] = figure(on.times_us(calls), inputs[0].bytes_of("pack"))
    return found


WORD, NUMBER = fused.WORD, ctypes.c_uint32
PROBES = {
    "moe_comm_round_trip": (fused.DeviceRing, NUMBER, *(WORD,) * 5),
    "moe_comm_push_many": (fused.DeviceRing, NUMBER, WORD, WORD),
    "moe_comm_arm_at": (fused.DeviceRing, NUMBER, NUMBER, *(WORD,) * 3),
    "moe_comm_stamp": (WORD,) * 3,
}  # of ring_probe.cu


def compile_probes(arch: str) -> bytes:
    nvrtc = cuda._nvrtc()
    source = (HERE / "ring_probe.cu").read_text()
    program = nvrtc.createProgram(source, "ring_probe.cu", (), ())
    options = (*cuda.OPTIONS, f"--gpu-architecture={arch}", f"--include-path={cuda.HERE}")
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    code: bytes = nvrtc.getCUBIN(program)
    return code


def load_probes() -> None:
    driver, module = fused.driver(), ctypes.c_void_p()
    code = compile_probes(cuda.architecture(torch.cuda.get_device_capability(0)))
    driver.call("cuModuleLoadData", ctypes.byref(module), code)
    for kernel, types in PROBES.items():
        function = ctypes.c_void_p()
        driver.call("cuModuleGetFunction", ctypes.byref(function), module, kernel.encode())
        fused.KERNELS[kernel] = "", types
        driver._functions[kernel, 0] = function


class Probe:
    """An engine with a ring of this device, a wait for nothing, and a channel whose commands come to nothing."""

    def __init__(self, device: torch.device) -> None:
        self.engine = moe_comm.TransferEngine("shm")
        native = self.engine.native
        self.ring = self.engine.device_ring(device, timeout_s=5.0)
        self.wait = native.open_wait("probe", "rank 0", [], [])
        memory = self.engine.empty(4096, torch.uint8)
        region = native.register(memory.data_ptr(), memory.nbytes)
        peer = native.connect(native.address)
        self.channel = native.open_channel(peer, region, native.describe(region), 0)
        native.close_channel(self.channel)

    def close(self) -> dict[str, int]:
        self.ring.raise_fault()
        stats = self.ring.stats()
        self.ring.close()
        self.engine.close()
        return stats


def ring(on: Device) -> dict:
    """A kernel's question, the proxy's answer, by a DeviceRing of a TransferEngine over shm.

    round trip: armed, taken, ended and seen, all in one kernel. commands: of 64 blocks, each taken and dropped.
    armed wait: from the push to the start of the kernel behind the stream wait, by the GPU's clock of nanoseconds.
    """
    if on.dry:
        return {
            "not measured": "needs a GPU",
            "probes": probes_compile(),
            "engine": Probe(on.device).close(),
        }
    torch.zeros(1, device="cuda")
    load_probes()
    found: dict = {}
    count, blocks = 2000, 64
    clocks, span = (torch.zeros(n, dtype=torch.int64, device="cuda") for n in (count, 2))
    status = torch.zeros(1, dtype=torch.int32, device="cuda")

    def launch(kernel, *arguments, num_blocks=1):
        fused.launch(kernel, *arguments, device=on.device, num_blocks=num_blocks)

    def settle(what: str) -> None:
        torch.cuda.synchronize()
        assert int(status) == 0, f"{what}: wait status {int(status)}"

    probe = Probe(on.device)
    struct, wait, word = probe.ring.struct, probe.wait, probe.ring.word_address
    launch("moe_comm_round_trip", struct, wait, word(), count, clocks, span, status)
    settle("round trip")
    scale = int(span[0]) / int(span[1]) / 1e3
    found["round trip"] = figure([scale * c for c in clocks[100:].tolist()])
    found["round trip"]["p50_us"] = found["round trip"]["median_us"]

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    launch("moe_comm_push_many", struct, probe.channel, count, status, num_blocks=blocks)
    end.record()
    settle("commands")
    found["commands"] = {
        "per_s": 1e3 * blocks * count / begin.elapsed_time(end), "blocks": blocks,
    }  # fmt: skip

    repeats, stamps = 200, torch.zeros(200, 2, dtype=torch.int64, device="cuda")
    for i in range(repeats):
        launch("moe_comm_arm_at", struct, wait, 1, word(1), stamps[i], status)
        probe.ring.stream_wait(1)
        launch("moe_comm_stamp", word(1), stamps[i, 1:], status)
    settle("armed wait")
    times = [1e-3 * int(t) for t in (stamps[20:, 1] - stamps[20:, 0]).tolist()]
    found["armed wait"] = figure(times)
    found["armed wait"]["without the round trip"] = (
        found["armed wait"]["median_us"] - found["round trip"]["median_us"]
    )
    found["proxy"] = probe.close()
    return found


def probes_compile() -> str:
    try:
        sizes = {arch: len(compile_probes(arch)) for arch in ("sm_80", "sm_90a", "sm_100a")}
    except ImportError as error:
        return f"not compiled: {error}"
    return ", ".join(f"{arch}: {size} bytes" for arch, size in sizes.items())


def staged(on: Device) -> dict:
    """moe_comm.Buffer, four ranks as threads of one process on one GPU: host call to the end of the last copy."""
    num_ranks, found = 4, {}
    groups = moe_comm.EPGroup.threads(num_ranks)
    for num_tokens in (128, 4096):
        T, times = on.tokens(num_tokens), []
        gate = threading.Barrier(num_ranks)

        def body(rank, T=T, times=times, gate=gate):
            g = torch.Generator().manual_seed(rank)
            x = torch.randn(T, on.hidden, generator=g).bfloat16().to(on.device)
            idx = torch.rand(T, EXPERTS, generator=g).topk(TOPK, dim=1).indices.to(on.device)
            with moe_comm.Buffer(groups[rank], hidden=on.hidden) as buffer:
                for at in range(3 if on.dry else 13):
                    gate.wait(60)
                    start = time.perf_counter()
                    d = buffer.dispatch(x, idx, num_experts=EXPERTS)
                    y = buffer.combine(d.x, d.handle)
                    if not on.dry:
                        torch.cuda.current_stream().synchronize()
                    if at >= 2 and rank == 0:
                        times.append(1e6 * (time.perf_counter() - start))
                    assert y.device == x.device

        threads = [threading.Thread(target=body, args=(r,)) for r in range(num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        found[f"dispatch + combine, T={T}, 4 ranks"] = figure(times)
    return found


def calls(on: Device) -> dict:
    """A moe_comm.Buffer of kernels, alone on the GPU: what one rank launches for a dispatch and a combine.

    eager: host call to the end of the stream, exact sizes. graph: one replay of both, layout "padded", or DeepEP's
    low-latency pair with FP8 (no experts between the two).
    """
    found: dict = {}
    if on.dry:  # as host code
        sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/kernels"))
        import host_device

        host_device.run_on_host(host_device.build(tempfile.mkdtemp()))
    for num_tokens in (1, 128, 4096):
        T = on.tokens(num_tokens)
        g = torch.Generator().manual_seed(T)
        x = torch.randn(T, on.hidden, generator=g).bfloat16().to(on.device)
        idx = torch.rand(T, EXPERTS, generator=g).topk(TOPK, dim=1).indices.to(on.device)
        weights = torch.rand(T, TOPK, generator=g).to(on.device)
        for windows in ("auto",) if on.dry else ("device", "host"):
            try:
                found |= calls_of(on, x, idx, weights, windows, captured=num_tokens <= 128)
            except moe_comm.TransportError as error:  # no memory of the device
                found[f"windows={windows}, T={T}"] = {"missing": str(error)}
        if num_tokens <= 128:
            found |= low_latency(on, T, x, weights)
    return found


def calls_of(
    on: Device,
    x: torch.Tensor,
    idx: torch.Tensor,
    weights: torch.Tensor,
    windows: str,
    captured: bool,
) -> dict:
    """Of one Buffer. `captured`: also layout "padded", which has EXPERTS * T rows, as a graph."""
    found, T = {}, len(x)
    window_bytes = 8 * max(T, 64) * (on.hidden * 2 + 1024)
    with moe_comm.Buffer(
        moe_comm.EPGroup.threads(1)[0], hidden=on.hidden, topk=TOPK, num_experts=EXPERTS, max_tokens=T,
        device=on.device, window_bytes=window_bytes, windows=windows,
    ) as buffer:  # fmt: skip

        def both(layout):
            d = buffer.dispatch(x, idx, weights, num_experts=EXPERTS, layout=layout)
            weighted = None if layout == "rank" else d.topk_weights
            return buffer.combine(d.x, d.handle, weights=weighted)

        where = f"T={T}, windows={buffer.windows}"
        for layout in ("rank", "expert"):
            times = []
            for _ in range(3 if on.dry else 35):
                start = time.perf_counter()
                both(layout)
                if not on.dry:
                    torch.cuda.synchronize()
                times.append(1e6 * (time.perf_counter() - start))
            found[f"eager {layout}, {where}"] = figure(times[2:])
        if captured:
            both("padded")  # makes what is kept
            found[f"graph padded, {where}"] = figure(on.graph_us([lambda: both("padded")]))
    return found


def low_latency(on: Device, T: int, x: torch.Tensor, weights: torch.Tensor) -> dict:
    """Of deep_ep.Buffer. What experts would return lies there."""
    experts = EXPERTS // RANKS  # a rank's share
    idx = torch.stack([torch.randperm(experts)[:TOPK] for _ in range(T)]).to(on.device)
    results = torch.zeros(experts, T, on.hidden, dtype=torch.bfloat16, device=on.device)
    os.environ["MOE_COMM_DEVICE"] = str(on.device)
    buffer = deep_ep.Buffer(
        moe_comm.EPGroup.threads(1)[0], low_latency_mode=True, explicitly_destroy=True
    )

    def pair():
        *_, handle, _, hook = buffer.low_latency_dispatch(x, idx, T, experts, return_recv_hook=True)
        hook()
        _, _, hook = buffer.low_latency_combine(
            results, idx, weights, handle, return_recv_hook=True
        )
        hook()

    try:
        pair()  # makes the windows
        return {f"graph low latency, T={T}": figure(on.graph_us([pair]))}
    finally:
        buffer.destroy()
        del os.environ["MOE_COMM_DEVICE"]


def check(on: Device) -> dict:
    """Every fused kernel once, against its twin: what compute-sanitizer runs."""
    i = Inputs(on, 64, 0)
    steps = on.steps.get("cuda", TORCH)
    want = i.windows.clone()
    saved, i.windows = i.windows, want
    i.pack(TORCH)
    i.windows = saved
    i.pack(steps) if on.dry else i.pack_fused()
    assert torch.equal(i.windows, want)
    i.unpack(steps)
    i.reduce(steps)
    expected = torch.empty_like(i.combined)
    TORCH.reduce(expected, i.rows.view(-1), i.offsets)
    assert torch.equal(i.combined.view(torch.int16), expected.view(torch.int16))
    return {"ok": True}


FIGURES = {
    "copy": copy_figure, "rows": rows, "small": small, "ring": ring, "sweep": sweep, "staged": staged, "calls": calls,
    "check": check,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    print(json.dumps(FIGURES[options.figure](Device(options.dry_run))))


if __name__ == "__main__":
    main()
