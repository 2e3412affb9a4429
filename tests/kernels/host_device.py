"""A pretended GPU: kernels' sources run by threads of the host (fused_host.cpp), in the order of their launches."""

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

from moe_comm.kernels import fused
from moe_comm.layout import DTYPE_CODES

STREAM_WAIT_S = 60.0
BLOCKS, THREADS = 3, 2
ONE_BLOCK = ("moe_comm_begin", "moe_comm_leave_out", "moe_comm_check_headers")
NAMES = {
    "moe_comm_dispatch_send": "dispatch_send", "moe_comm_dispatch_forward": "forward",
    "moe_comm_dispatch_unpack": "unpack",
}  # fmt: skip


SOURCE = Path(__file__).parent / "fused_host.cpp"
CXX = shlex.split(os.environ.get("CXX") or "g++")
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-pthread", "-shared", "-fPIC"),
    *("-Wall", "-Wextra", "-Werror"),
]


def build(directory) -> str:
    """The fused kernels as host code."""
    path = Path(directory) / "fused_host.so"
    done = subprocess.run(
        [*CXX, *FLAGS, str(SOURCE), "-o", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return str(path)


def run_on_host(library_path):
    """Launches of kernels and stream waits are made here, by who asks for them, from now on."""
    library = ctypes.CDLL(library_path)
    library.stream_wait.restype = ctypes.c_bool
    u64 = ctypes.c_uint64
    dtypes = {name: DTYPE_CODES[dtype] for dtype, name in fused.DTYPES.items()}

    def run(kernel, arguments, num_blocks, num_threads, device):
        first = ctypes.byref(arguments[0])
        if kernel == "moe_comm_push":
            library.push(first, *arguments[1:], u64(num_blocks))
        elif kernel == "moe_comm_arm":
            library.arm(first, *arguments[1:])
        elif kernel.startswith("moe_comm_combine_send_"):
            code = dtypes[kernel.rsplit("_", 1)[1]]
            library.combine_send(first, u64(code), u64(BLOCKS), u64(THREADS))
        elif kernel in ONE_BLOCK:
            assert num_blocks == 1
            getattr(library, kernel.removeprefix("moe_comm_"))(first)
        else:
            name = NAMES.get(kernel, kernel.removeprefix("moe_comm_"))
            getattr(library, name)(first, u64(BLOCKS), u64(THREADS))

    def stream_wait(address, least, device):
        assert least == 1
        assert library.stream_wait(ctypes.c_void_p(address), ctypes.c_double(STREAM_WAIT_S)), (
            "an armed wait never ended"
        )

    fused.run, fused.stream_wait = run, stream_wait
