"""Triton's kernels on CPU tensors: TRITON_INTERPRET must be set before they are first imported."""

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
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


SOURCE = Path(__file__).parent / "fused_host.cpp"
CXX = shlex.split(os.environ.get("CXX") or "g++")
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-pthread", "-shared", "-fPIC"),
    *("-Wall", "-Wextra", "-Werror"),
]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The fused kernels as host code."""
    if not shutil.which(CXX[0]):
        pytest.skip(f"no {CXX[0]}")
    path = tmp_path_factory.mktemp("fused") / "fused_host.so"
    done = subprocess.run(
        [*CXX, *FLAGS, str(SOURCE), "-o", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))
