"""The plug-ins of vLLM and sglang: found in this package's metadata, called as they do, effective only when asked."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ("vllm.general_plugins", "sglang.srt.plugins")

# What both frameworks do in each process: load all, then call them; and then ask for deep_ep in their ways.
LOAD = """
import importlib.metadata, importlib.util, os, sys

def plugins_called(value):
    os.environ["MOE_COMM_AS_DEEP_EP"] = value
    plugins = {e.name: e.load() for e in importlib.metadata.entry_points(group=GROUP)}
    assert sorted(plugins) == ["moe_comm_as_deep_ep"]
    for plugin in list(plugins.values()) * 2:  # more than once in one process
        assert plugin() is None
"""
ASKED = """
for value in "0", "":
    plugins_called(value)
    assert not importlib.util.find_spec("deep_ep")
plugins_called("1")
assert importlib.util.find_spec("deep_ep")
"""
REFUSED = """
plugins_called("1")
try:
    import deep_ep
except ImportError as error:
    assert f"deep_ep: expected none beside moe_comm, found {os.getcwd()}" in str(error)
else:
    raise AssertionError("another deep_ep was hidden in silence")
plugins_called("override")
"""
USE = {
    "vllm.general_plugins": "import deep_ep as d; d.Buffer, d.Config, d.EventOverlap, d.ElasticBuffer",
    "sglang.srt.plugins": "from deep_ep import Buffer, Config, ElasticBuffer",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A directory with what a wheel holds: this package, and what is said of it."""
    place = tmp_path_factory.mktemp("installed")
    (place / "moe_comm").mkdir()
    for part in (*(ROOT / "moe_comm").iterdir(), ROOT / "kernels"):
        (place / "moe_comm" / part.name).symlink_to(part)
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(place)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return place


@pytest.mark.parametrize("group", GROUPS)
def test_plugin(installed, tmp_path, group):
    """Without site (-S), as after `pip install --target`: no .pth file is read."""
    path = os.pathsep.join(map(str, [installed, tmp_path, sysconfig.get_path("purelib")]))
    for code in (ASKED, REFUSED):
        code = LOAD.replace("GROUP", repr(group)) + code + USE[group]
        command = [sys.executable, "-S", "-c", code]
        env = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (tmp_path / "deep_ep.py").write_text("")  # another one, for the second
