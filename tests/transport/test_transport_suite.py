"""tests/cpp/transport_*.cpp, each of its cases over each backend of this machine.

The program is compiled once for a state of its sources (kept in pytest's cache directory) and is told nothing but
BACKEND and CASE, so a failure is repeated with `.pytest_cache/d/transport_suite/*/transport_suite fabric:tcp sizes`
(efa-rules: `MOE_COMM_LIBFABRIC=$(ls .pytest_cache/d/efa_rules/*/*.so) … fabric:efa sizes`).
"""

import dataclasses
import hashlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from efa_rules import compiler, has_fabric_headers

ROOT = Path(__file__).resolve().parents[2]
SUITE = sorted((ROOT / "tests/cpp").glob("transport_*.cpp"))
# With a NIC: MOE_COMM_TEST_BACKENDS="verbs:mlx5_0 fabric:efa".
MORE_BACKENDS = os.environ.get("MOE_COMM_TEST_BACKENDS", "").split()
# efa-rules: fabric:efa, over a libfabric that allows what EFA allows (tests/cpp/efa_rules.cpp).
BACKENDS = ("shm", "fabric:tcp", "fabric:shm", "efa-rules", *MORE_BACKENDS)
CASES = [c for p in SUITE for c in re.findall(r'^    \{"(\w+)", \d', p.read_text(), re.MULTILINE)]
COMPILE_S, CASE_S = 280, 110

# Seconds of compiling are in the first test; the longest case waits 10 s for an answer that never comes.
pytestmark = pytest.mark.timeout(COMPILE_S + CASE_S + 10)


def sources_and_headers() -> tuple[list[Path], list[Path]]:
    sources = [*SUITE, ROOT / "csrc/memory.cpp", *sorted((ROOT / "csrc/backends").glob("*.cpp"))]
    headers = [*sorted((ROOT / "csrc").rglob("*.hpp")), *sorted((ROOT / "tests/cpp").glob("*.hpp"))]
    return sources, headers


@pytest.fixture(scope="session")
def suite(request) -> Path:
    """The compiled program."""
    sources, headers = sources_and_headers()
    flags = [
        "-std=c++20",
        "-O1",
        "-g1",
        "-Wall",
        "-Wextra",
        f"-I{ROOT}/csrc",
        f"-I{ROOT}/tests/cpp",
    ]
    flags.append(f"-DMOE_COMM_HAVE_FABRIC={int(has_fabric_headers())}")
    digest = hashlib.sha256(" ".join([*compiler(), *flags]).encode())
    for path in (*sources, *headers):
        digest.update(path.read_bytes())
    folder = request.config.cache.mkdir("transport_suite") / digest.hexdigest()[:16]
    program = folder / "transport_suite"
    if not program.exists():
        folder.mkdir(exist_ok=True)
        command = [
            *compiler(),
            *flags,
            *map(str, sources),
            "-o",
            f"{program}.new",
            "-ldl",
            "-pthread",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
        Path(f"{program}.new").rename(program)
    return program


@dataclasses.dataclass
class Backend:
    name: str  # as the program knows it
    program: Path
    environment: dict[str, str]

    def run(self, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.program, self.name, *arguments],
            env=os.environ | self.environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request, suite) -> Backend:
    """A backend that opens here; skips with the engine's own words otherwise."""
    found = Backend(request.param, suite, {})
    if request.param == "efa-rules":
        library = request.getfixturevalue("efa_rules")
        found = Backend("fabric:efa", suite, {"MOE_COMM_LIBFABRIC": library})
    done = found.run("--probe", timeout=60)
    if done.returncode == 3 and request.param not in ("shm", *MORE_BACKENDS):
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return found


@pytest.mark.parametrize("case", CASES)
def test_case(backend, case):
    done = backend.run(case, timeout=CASE_S)
    print(done.stdout)
    assert done.returncode == 0, done.stderr + done.stdout


def test_cases_were_found():
    assert {"sizes", "killed_peer"} <= set(CASES) and len(CASES) == len(set(CASES))
