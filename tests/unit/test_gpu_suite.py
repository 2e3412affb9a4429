"""bench/gpu_suite.py without a GPU: a step that hangs, fails or lacks something costs its own result only."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parents[2] / "bench" / "gpu_suite.py"


@pytest.fixture
def suite(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_suite", SUITE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(
        module, "links", lambda: tmp_path
    )  # other tests may use those of the checkout
    return module.Suite(tmp_path, dry=True)


def test_steps(suite):
    hangs = "import subprocess, time; print(1, flush=True); subprocess.run(['sleep', '60'])"
    suite.step("good", [sys.executable, "-c", "print('{\"us\": 5}')"], 30, "torch", is_json=True)
    suite.step("bad", [sys.executable, "-c", "raise SystemExit(3)"], 30)
    suite.step("no JSON", [sys.executable, "-c", "print(1, 2)"], 30, is_json=True)
    suite.step("hangs", [sys.executable, "-c", hangs], 1)
    suite.step("lacks", ["true"], 30, "no-such-tool")
    suite.step("not there", ["/no/such/program"], 30)
    steps = json.loads(suite.path.read_text())["steps"]
    assert steps["good"]["ok"] and steps["good"]["result"] == {"us": 5}
    assert {name: step["why"] for name, step in steps.items() if not step["ok"]} == {
        "bad": "exit code 3", "no JSON": "printed no JSON", "hangs": "over its limit of 1 s",
        "lacks": "not run: no no-such-tool", "not there": "[Errno 2] No such file or directory: '/no/such/program'",
    }  # fmt: skip
    assert steps["hangs"]["seconds"] < 20 and steps["lacks"]["ok"] is None
    assert json.loads(suite.path.read_text())["dry_run"]


def test_no_time_left(suite, monkeypatch):
    suite.start -= 10_000
    assert suite.step("late", ["true"], 30)["why"] == "not run: no time left"


def test_a_figure_in_a_dry_run(suite):
    command = [sys.executable, str(SUITE.with_name("gpu_figures.py")), "ring", "--dry-run"]
    suite.environment = dict(os.environ)
    got = suite.step("figures ring", command, 60, is_json=True)
    result = got["result"]
    assert result["not measured"] == "needs a GPU"
    assert result["probes"].startswith(("sm_80: ", "not compiled: "))  # as NVRTC is there or not
    assert result["engine"]["failed"] == 0


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_whole_calls_in_a_dry_run(suite):
    command = [sys.executable, str(SUITE.with_name("gpu_figures.py")), "calls", "--dry-run"]
    suite.environment = dict(os.environ)
    result = suite.step("figures calls", command, 90, is_json=True)["result"]
    assert len(result) == 8 and all(f["median_us"] > 0 for f in result.values())
