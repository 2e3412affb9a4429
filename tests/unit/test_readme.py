"""The README's example works as pasted, and its commands and variables exist."""

import re
import subprocess
import sys
from pathlib import Path

from moe_comm import alias
from moe_comm.config import VARIABLES

README = Path(__file__).parents[2] / "README.md"


def test_example_runs_as_pasted(tmp_path):
    text = README.read_text()
    example = tmp_path / "this_file.py"
    example.write_text(re.search(r"```python\n(.*?)```", text, re.S)[1])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(example),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank (\d):", done.stdout)) == ["0", "1"]


def test_variables_exist():
    for name in re.findall(r"MOE_COMM_[A-Z_]+", README.read_text()):
        assert name in VARIABLES or name == alias.VARIABLE, name
