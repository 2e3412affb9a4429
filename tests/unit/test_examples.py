"""Each example runs on four CPU ranks, and its own check holds."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import moe_comm

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = [
    "01_dispatch_combine",
    "02_moe_layer",
    "03_transformers_ep",
    "05_decode_overlap",
    "06_moving_from_deep_ep",
]
OURS = [name for name in NAMES if name != "03_transformers_ep"]


def run_main(rank, group, name, store):
    """As under a launcher: torch.distributed is there, then the example's own function."""
    if name.startswith("06"):
        moe_comm.install_as_deep_ep()
    dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=rank, world_size=4)
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["example"] = module
    spec.loader.exec_module(module)
    (module.train if name.startswith("03") else module.main)()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_runs(run_ranks, monkeypatch, tmp_path, name):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    if name.startswith("03"):
        pytest.importorskip("transformers", minversion="5.23")
    run_ranks(run_main, 4, name, str(tmp_path / "gloo"))


def test_runs_between_nodes(run_ranks, monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", "2")
    run_ranks(run_main, 4, "02_moe_layer", str(tmp_path / "gloo"))


def run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", ["itself", "torchrun"])
def test_from_the_shell(launcher):
    """One stands for all: what follows `main` is the same text in each."""
    program = ["-m", "moe_comm.as_deep_ep", EXAMPLES / "06_moving_from_deep_ep.py"]
    if launcher == "torchrun":
        program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 4, *program]
    said = run(*program)
    assert sorted(re.findall(r"rank (\d) of 4: both modes as in plain torch", said)) == list("0123")
    assert "by moe_comm.deep_ep" in said
    tails = {
        (EXAMPLES / f"{name}.py").read_text().partition("\ndef one_of_four")[2] for name in OURS
    }
    assert len(tails) == 1 and "torch.multiprocessing.spawn" in tails.pop()


def test_what_they_say_of_themselves():
    moving = (EXAMPLES / "06_moving_from_deep_ep.py").read_text()
    head, program = moving.split('"""\n', 1)
    changes = re.findall(r"^    ([-+])    (.*)$", head, re.M)
    assert [sign for sign, _ in changes] == ["-", "+"] * 3
    for sign, line in changes:
        assert (re.search(rf"^ *{re.escape(line)}$", program, re.M) is not None) == (sign == "+")
    assert "\nimport deep_ep\n" in program
    layer = (EXAMPLES / "02_moe_layer.py").read_text()
    body = re.search(r"# --- the layer -+\n(.*?)# --- the check", layer, re.S)[1].strip()
    assert len(body.splitlines()) <= 40
    for name in NAMES:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert text.count(f"examples/{name}.py") >= 2, "it says how to run it"
