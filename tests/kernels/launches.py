"""Every Triton kernel compiled for devices that are not here: prints one JSON line for each kernel and architecture.

    python tests/kernels/launches.py CACHE_DIRECTORY [80 90 100]

Steps are called with CPU tensors of the shapes of a real model while launches are recorded, not run; each distinct
launch is then compiled as the real one would be, with the same argument types and alignments.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from moe_comm.kernels import TRITON, pack, quant

RECORDED: dict = {}  # (kernel, its signature, constants, attributes, options)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {
    torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.float16: "*fp16",
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
}  # fmt: skip


def record(kernel, *args, grid, warmup, **options):
    values = dict(zip(kernel.arg_names, args)) | options
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            number = value.data_ptr()
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            number = value
        if number % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    assert set(values) <= set(OPTIONS), f"{kernel.__name__}: {values}"
    key = kernel.__name__, repr((signature, constants, attributes, values))
    RECORDED.setdefault(key, (kernel, signature, constants, attributes, values))


def call_steps(steps, hidden, dtype):
    """One call of each step as rank 1 of 4 in 2 nodes; `hidden` that is no multiple of 16 bytes takes items' paths."""
    T, K, E, R, G, D = 64, 8, 64, 4, 2, 4

    def int32(*shape):
        return torch.zeros(shape, dtype=torch.int32)

    number, payload = int32(1), hidden * dtype.itemsize
    row_bytes = (payload + 4 * 56 + 4 + 8 * K + 15) // 16 * 16
    at = {"token_at": row_bytes - 4 - 8 * K, "ids_at": row_bytes - 8 * K}
    rows = torch.zeros(T, row_bytes, dtype=torch.uint8)
    idx, weights = torch.zeros(T, K, dtype=torch.int64), torch.zeros(T, K)
    x = torch.zeros(T, hidden, dtype=dtype)
    scales = torch.zeros(56, T).t()
    steps.route(
        idx, int32(R), num_experts=E, num_ranks=R, num_lanes=D, capacity=16, num_tokens=number
    )
    steps.round_starts(int32(T, D), capacity=16)
    steps.pack(
        rows, x, int32(T, D), int32(D), scales=scales, topk_idx=idx, topk_weights=weights, lane=1, first_token=0,
        last_token=T, scales_at=payload, weights_at=row_bytes - 4 * K, **at,
    )  # fmt: skip
    steps.forward_tables(
        rows, int32(R), int32(G), experts_per_rank=16, topk=K, num_rows=number, **at
    )
    steps.forward(rows, rows, int32(T, G), int32(G), local=1)
    placed = steps.places(
        rows,
        int32(16),
        first_expert=16,
        topk=K,
        weights_at=row_bytes - 4 * K,
        num_rows=number,
        **at,
    )
    steps.unpack(x, rows, placed.positions, out_scales=torch.zeros(T, 56), scales_at=payload)
    steps.unpack_lanes(torch.zeros(T), placed.weights, placed.positions)
    steps.unpack_lanes(torch.zeros(T, K, dtype=torch.int64), placed.ids, int32(T, 1))
    offsets = steps.row_offsets(
        int32(T, 5), int32(5), torch.zeros(5, dtype=torch.int64), row_bytes=64
    )
    memory = torch.zeros(4096, dtype=torch.uint8)
    steps.reduce(x, memory, offsets, weights=torch.zeros(T, 5), num_tokens=number)
    steps.reduce(x, memory, offsets, bias=x, inner_first=2, inner_last=4)
    steps.lane_columns(torch.zeros(T), placed.positions)
    for each_copy in (True, False):
        lanes = steps.lane_numbers(
            idx, int32(T, R), experts_per_rank=16, num_experts=E, each_copy=each_copy
        )
    windows = torch.zeros(R, dtype=torch.int64)
    steps.lane_offsets(
        idx, lanes.numbers, int32(R), windows, experts_per_rank=16, row_bytes=row_bytes
    )
    steps.copy_offsets(placed.positions, int32(R), int32(R), row_bytes=row_bytes)
    steps.source_ranges(torch.zeros(16, R, dtype=torch.int64), int32(16), int32(R, 16))
    steps.through_logfmt(x, x)
    for hardware in (True, False):
        quant.casts_in_hardware = pack.casts_in_hardware = lambda device: hardware  # noqa: B023
        for form in quant.FORMS:
            codes, scales = steps.cast_to_fp8(x, form=form)
        steps.cast_from_fp8(x, codes, scales)
        if payload % 16 == 0:
            steps.pack(
                rows, x, int32(T, D), int32(D), topk_idx=idx, lane=1, first_token=0, last_token=T,
                scales_at=hidden, cast="ue8m0", **at,
            )  # fmt: skip


def resources(cubin: bytes, triton) -> dict:
    """{"registers": …, "spilled": bytes of local memory, "shared": bytes}."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def main() -> None:
    os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.runtime.jit.JITFunction.run = record
    call_steps(TRITON, 7168, torch.bfloat16)
    call_steps(TRITON, 20, torch.bfloat16)
    for kernel, signature, constants, attributes, options in RECORDED.values():
        for arch in map(int, sys.argv[2:] or (80, 90, 100)):
            named = {kernel.arg_names[k[0]]: v for k, v in constants.items()}
            if named.get("HARDWARE") and arch < 89:
                continue
            source = ASTSource(kernel, signature, constants, attributes)
            done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            ptx = done.asm["ptx"]
            print(
                json.dumps(
                    {
                        "kernel": kernel.__name__,
                        "arch": arch,
                        "unit": named.get("UNIT"),
                        "hardware": named.get("HARDWARE"),
                        "fp8_casts": len(re.findall(r"cvt\.[.\w]*e4m3x2", ptx)),
                        "vector_loads": len(re.findall(r"ld\.global[.\w:]*\.v[248]\.", ptx)),
                        "vector_stores": len(re.findall(r"st\.global[.\w:]*\.v[248]\.", ptx)),
                        "read_only_loads": len(re.findall(r"ld\.global[.\w:]*\.nc", ptx)),
                        "fused": len(re.findall(r"\bfma\.", ptx)),
                        "atomics": len(re.findall(r"\b(atom|red)\.", ptx)),
                    }
                    | resources(done.asm["cubin"], triton)
                )
            )  # fmt: skip


if __name__ == "__main__":
    main()
