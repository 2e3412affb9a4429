"""Triton's kernels on CPU tensors: TRITON_INTERPRET must be set before they are first imported."""

import importlib.util
import os
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
