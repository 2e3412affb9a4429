"""Triton's kernels on CPU tensors: TRITON_INTERPRET must be set before they are first imported."""

import ctypes
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(
    str(Path(__file__).resolve().parents[1] / "unit")
)  # simulated_exchange, test_kernels


@pytest.fixture(autouse=True)
def need_triton(request):
    if request.node.path.name.startswith("test_triton") and not importlib.util.find_spec("triton"):
        pytest.skip("Triton is not installed (make test-kernels installs it)")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The fused kernels as host code."""
    import host_device  # and kernels with it: Triton's mode is set

    if not shutil.which(host_device.CXX[0]):
        pytest.skip(f"no {host_device.CXX[0]}")
    return ctypes.CDLL(host_device.build(tmp_path_factory.mktemp("fused")))
