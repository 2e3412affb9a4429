"""The examples that need a framework, as their first lines say: alone, and under torchrun with four ranks."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.timeout(200)
@pytest.mark.parametrize("launcher", [[], TORCHRUN])
def test_megatron_layer(launcher):
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("needs megatron-core 0.16.1 (pip, --no-deps)")
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / "04_megatron_layer.py")],
        env={**os.environ, "TORCH_COMPILE_DISABLE": "1", "MOE_COMM_RANKS_PER_NODE": "2"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert len(losses) == 10 and losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.75 * losses[0]
    inside, between = map(
        int, re.search(r"sent (\d+) rows inside its node and (\d+)", done.stdout).groups()
    )
    assert inside and bool(between) == bool(launcher)  # four ranks are two nodes
