"""Looking for transports and opening one changes no signal handler of the process: libraries behind libfabric would."""

import subprocess
import sys

import pytest
from rows import why_not

LOOKS_AND_OPENS = """
import re
from moe_comm import _engine

def caught():
    mask = int(re.search(r"SigCgt:\\s+(\\w+)", open("/proc/self/status").read())[1], 16)
    return {n + 1 for n in range(31) if mask >> n & 1}

before = caught()
_engine.transports()
engine = _engine.Engine(transport="fabric:tcp;ofi_rxm")
assert caught() == before, (before, caught())
engine.stop()
"""


def test_handlers_stay():
    if why := why_not("fabric:tcp"):
        pytest.skip(f"fabric:tcp: {why}")
    done = subprocess.run([sys.executable, "-c", LOOKS_AND_OPENS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
