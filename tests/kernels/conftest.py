"""Triton's kernels on CPU tensors: TRITON_INTERPRET must be set before they are first imported."""

import ctypes
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(
    str(Path(__file__).resolve().parents[1] / "unit")
)  # simulated_exchange, test_kernels


ON_A_GPU = {"transport": "shm", "first": 2, "seed": 1}
"""Of ranks that share a GPU one of each kind, as starting them takes seconds; host threads have them all."""
ONE_LAYOUT = {
    "test_kernel_rounds": {"layout": "expert"},
    "test_kernel_masks": {"layout": "padded"},
}


def pytest_collection_modifyitems(items):
    def is_run(item):
        params = getattr(item, "callspec", None) and item.callspec.params
        if not params or item.path.parent != HERE or not item.get_closest_marker("gpu"):
            return True
        kept = ON_A_GPU | ONE_LAYOUT.get(item.path.stem, {})
        return all(params.get(name, value) == value for name, value in kept.items())

    items[:] = filter(is_run, items)


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
