"""The C++ tests beside this file, under the thread sanitizer and under the address and undefined-behaviour sanitizers.

Objects and programs are kept in pytest's cache, named by a hash of everything they are made of: a rerun only runs.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"

ENGINE = [
    *("proxy.cpp", "proxy_calls.cpp", "proxy_rings.cpp", "mapped_ring.cpp"),
    *("memory.cpp", "backends/shm.cpp", "backends/chaos.cpp"),
]
PROGRAMS = {
    **dict.fromkeys(("proxy", "peers", "device_ring"), ENGINE),
    "rows": ["rows.cpp"],
    "ring": [],
    "counter": [],
}
SANITIZERS = {
    # -Wtsan: it does not see fences. Our words order what is behind them by acquire and release.
    "thread": ["-fsanitize=thread", "-Wno-tsan", "-Wno-unknown-warning-option"],
    "address": [
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        "-fno-sanitize=null,object-size,vptr",  # slow to compile; the address sanitizer sees most of it
    ],
}
FLAGS = [
    *("-std=c++20", "-Og", "-g1", "-ffp-contract=off", "-pthread"),
    *("-Wall", "-Wextra", "-Werror", f"-I{CSRC}"),
]
CXX = shlex.split(os.environ.get("CXX") or "g++")
OPTIONS = {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
ENVIRONMENT = {**os.environ, **OPTIONS}
RUN_TIMEOUT = 150  # seconds; each case has its own watchdog

pytestmark = pytest.mark.timeout(400)  # the first one compiles


def run(command, **options):
    to_text = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run([str(c) for c in command], **to_text, **options)


def sources_of(path, found=None):
    """`path` and all it includes with quotes."""
    found = {} if found is None else found
    if path not in found:
        found[path] = path.read_bytes()
        for name in re.findall(rb'^\s*#include "([^"]+)"', found[path], re.MULTILINE):
            for directory in (path.parent, CSRC):
                if (directory / name.decode()).exists():
                    sources_of((directory / name.decode()).resolve(), found)
                    break
    return found


class Builder:
    """Compiles in the background, as many at a time as there are cores."""

    def __init__(self, directory):
        self.directory = directory
        self.version = run([*CXX, "--version"]).stdout
        self.pool = ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0))))
        self.jobs = {}

    def _make(self, name, key, command):
        """The file `name`, made by `command` (its path is appended) unless it is there under the same key."""
        key = repr((self.version, CXX, FLAGS, key, command)).encode()
        target = self.directory / f"{name}-{hashlib.sha256(key).hexdigest()[:16]}"
        if not target.exists():
            for old in self.directory.glob(f"{name}-*"):
                old.unlink(missing_ok=True)
            temporary = self.directory / f"{os.getpid()}-{name}"
            command = [*CXX, *FLAGS, *command, "-o", temporary]
            done = run(command)
            if done.returncode:
                raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stdout}")
            temporary.rename(target)
        return target

    def _object(self, source, sanitizer):
        key = sorted((str(p), hashlib.sha256(b).hexdigest()) for p, b in sources_of(source).items())
        name = f"{sanitizer}-{source.parent.name}-{source.stem}.o"
        return self._make(name, key, [*SANITIZERS[sanitizer], "-c", source])

    def objects(self, name, sanitizer):
        jobs = []
        for source in [HERE / f"test_{name}.cpp", *(CSRC / s for s in PROGRAMS[name])]:
            if (source, sanitizer) not in self.jobs:
                self.jobs[source, sanitizer] = self.pool.submit(self._object, source, sanitizer)
            jobs.append(self.jobs[source, sanitizer])
        return jobs

    def program(self, name, sanitizer):
        objects = [job.result() for job in self.objects(name, sanitizer)]
        return self._make(f"{sanitizer}-{name}", None, [*SANITIZERS[sanitizer], *objects])


@pytest.fixture(scope="module")
def builder(request):
    if not shutil.which(CXX[0]):
        pytest.skip(f"no {CXX[0]}")
    builder = Builder(request.config.cache.mkdir("sanitized"))
    yield builder
    builder.pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def prefix(builder, tmp_path_factory):
    """For each sanitizer: what must stand before a program's command, or why it cannot be used."""
    directory = tmp_path_factory.mktemp("probe")
    source = directory / "probe.cpp"
    source.write_text("#include <thread>\nint main() { std::thread([] {}).join(); }\n")

    def probe(sanitizer):
        program = directory / sanitizer
        done = run([*CXX, *FLAGS, *SANITIZERS[sanitizer], source, "-o", program])
        if done.returncode:
            return f"{CXX[0]} lacks the runtime of the {sanitizer} sanitizer: {done.stdout.strip()[-300:]}"
        # Where the kernel randomises more address bits than an older runtime knows, that one does not start.
        for before in ([], ["setarch", platform.machine(), "-R"]):
            done = run([*before, program], env=ENVIRONMENT)
            if done.returncode == 0:
                return before
        return f"the runtime of the {sanitizer} sanitizer does not start here: {done.stdout.strip()[-300:]}"

    found = {sanitizer: probe(sanitizer) for sanitizer in SANITIZERS}
    for name in PROGRAMS:  # begin with all of them: while one test runs, the next ones compile
        for sanitizer, before in found.items():
            if isinstance(before, list):
                builder.objects(name, sanitizer)
    return found


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_sanitized(name, sanitizer, builder, prefix):
    if isinstance(prefix[sanitizer], str):
        pytest.skip(prefix[sanitizer])
    try:
        program = builder.program(name, sanitizer)
    except RuntimeError as error:
        pytest.fail(str(error), pytrace=False)
    try:
        done = run([*prefix[sanitizer], program], env=ENVIRONMENT, timeout=RUN_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode()
        pytest.fail(f"did not end in {RUN_TIMEOUT} s\n{output}", pytrace=False)
    if done.returncode:
        pytest.fail(f"exit status {done.returncode}\n{done.stdout[-20000:]}", pytrace=False)
