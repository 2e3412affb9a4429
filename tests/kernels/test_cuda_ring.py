"""kernels/ring.cuh as host code (ring_host.cpp): by threads, also under the thread sanitizer, and in every order."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "ring_host.cpp"
CXX = shlex.split(os.environ.get("CXX") or "g++")
pytestmark = pytest.mark.timeout(300)  # on a busy machine; each program gets 110 s
FLAGS = ["-std=c++20", "-O1", "-g1", "-pthread", "-Wall", "-Wextra", "-Werror"]


def build(directory, *flags):
    program = directory / "ring_host"
    done = subprocess.run(
        [*CXX, *FLAGS, *flags, str(SOURCE), "-o", str(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return program


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not shutil.which(CXX[0]):
        pytest.skip(f"no {CXX[0]}")
    return build(tmp_path_factory.mktemp("ring"))


@pytest.mark.parametrize("case", ["waits", "threads"])
def test_host_threads(program, case):
    run(program, case)


def test_every_order_of_two_producers_and_the_consumer(program):
    lines = run(program, "interleavings").splitlines()
    assert len(lines) == 8
    states = [int(line.split(": ")[1].split()[0]) for line in lines]
    assert min(states) > 100 and max(states) > 10_000, states


def test_threads_under_the_thread_sanitizer(program, tmp_path):
    probe = tmp_path / "probe.cpp"
    probe.write_text("#include <thread>\nint main() { std::thread([] {}).join(); }\n")
    flags = ["-fsanitize=thread", "-Wno-tsan"]
    for before in ([], ["setarch", os.uname().machine, "-R"]):
        done = subprocess.run([*CXX, *FLAGS, *flags, str(probe), "-o", str(tmp_path / "probe")])
        if done.returncode:
            pytest.skip(f"{CXX[0]} lacks the thread sanitizer's runtime")
        if subprocess.run([*before, str(tmp_path / "probe")], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("the thread sanitizer's runtime does not start here")
    run(*before, build(tmp_path, *flags), "threads")
