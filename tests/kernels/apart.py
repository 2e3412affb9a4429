"""Windows in the memory of a pretended GPU: window_memory.py's own code over a driver made of host memory
(pretended_driver.cpp), whose memory host threads that run kernels reach as a GPU's would."""

import contextlib
import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import host_device
import torch

from moe_comm import memory, window_memory
from moe_comm.kernels import fused

LIBRARY = "MOE_COMM_TEST_DRIVER"
SOURCE = Path(__file__).parent / "pretended_driver.cpp"


def build(directory, *flags) -> str:
    path = Path(directory) / "pretended_driver.so"
    done = subprocess.run(
        [*host_device.CXX, *host_device.FLAGS, *flags, str(SOURCE), "-o", str(path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return str(path)


class Driver(fused.Driver):
    """The pretended one."""

    def __init__(self, path):
        self._library, self._functions = ctypes.CDLL(path), {}

    def __getattr__(self, name):  # pretend_…
        return getattr(self._library, name)


class OnHost(window_memory.CudaMemory):
    """The network reaches it as what it is."""

    @contextlib.contextmanager
    def exported(self):
        with super().exported() as (dmabuf, offset, device):
            assert dmabuf >= 0 and offset == device == 0
            yield -1, 0, 0


def use_driver(path) -> Driver:
    """Whoever asks libcuda asks the pretended driver, from now on; there is one device."""
    driver = Driver(path)
    fused.driver = lambda: driver
    memory.in_context = lambda device: contextlib.nullcontext()
    window_memory.in_context = memory.in_context
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda device=None: None
    return driver


def install():
    """Windows of Buffers whose kernels are threads of the host lie there, from now on."""
    path = os.environ.get(LIBRARY)
    if path is None:
        path = os.environ[LIBRARY] = build(tempfile.mkdtemp(prefix="moe_comm_kernels_"))
    use_driver(path)
    window_memory.KINDS["cpu"] = OnHost
