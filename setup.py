"""Builds moe_comm._engine from csrc/*.cpp and csrc/backends/*.cpp. Metadata is in pyproject.toml.

CUDA code is compiled at run time, and libfabric and libibverbs are opened at run time (dlopen), so a
C++20 compiler is all this needs. Headers decide which backends are compiled; a backend without
headers is left out, with one line saying so.

Beside the packages lies moe_comm_as_deep_ep.pth, which python reads when it starts: it looks at one environment
variable, and only if that asks makes `import deep_ep` find this package (moe_comm/alias.py).

Rebuilds are incremental: objects stay in build/engine-*, `-MMD` files tell which are stale.
"""

import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

os.chdir(Path(__file__).resolve().parent)
MIN_FABRIC = (1, 17)


def compiler(*arguments: str, source: str) -> subprocess.CompletedProcess[str]:
    """Runs the C++ compiler on `source`. Without one, fails like one that fails."""
    cxx = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")
    flags = shlex.split(os.environ.get("CPPFLAGS", "") + " " + os.environ.get("CFLAGS", ""))
    command = [cxx[0], *flags, *arguments, "-x", "c++", "-"]
    try:
        return subprocess.run(command, input=source, capture_output=True, text=True)
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", f"{cxx[0]}: {error.strerror}")


def verbs_headers() -> tuple[bool, str]:
    """(usable, why or why not): rdma-core 28 or newer knows relaxed ordering."""
    source = "#include <infiniband/verbs.h>\nint flag = IBV_ACCESS_RELAXED_ORDERING;\n"
    if compiler("-fsyntax-only", source=source).returncode:
        return (
            False,
            "no infiniband/verbs.h of rdma-core 28 or newer (apt-get install libibverbs-dev)",
        )
    return True, "libibverbs headers"


def fabric_headers() -> tuple[bool, str]:
    """(usable, why or why not): asks the preprocessor for the version in <rdma/fabric.h>."""
    probe = compiler("-E", "-dM", source="#include <rdma/fabric.h>\n")
    major = re.search(r"#define FI_MAJOR_VERSION (\d+)", probe.stdout)
    minor = re.search(r"#define FI_MINOR_VERSION (\d+)", probe.stdout)
    if probe.returncode or not (major and minor):
        return False, "no rdma/fabric.h (apt-get install libfabric-dev)"
    version = (int(major[1]), int(minor[1]))
    if version < MIN_FABRIC:
        return False, "libfabric headers {}.{} are older than {}.{}".format(*version, *MIN_FABRIC)
    return True, "libfabric headers {}.{}".format(*version)


def is_stale(obj: str, src: str) -> bool:
    """True unless `obj` is newer than this file, its source and the headers read last time."""
    depfile = Path(obj).with_suffix(".d")
    if not depfile.exists():
        return True
    files = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    built = os.stat(obj).st_mtime
    try:
        return any(os.stat(f).st_mtime > built for f in [__file__, src, *files])
    except FileNotFoundError:  # a header is gone
        return True


class BuildPackages(build_py):
    """Adds the .pth: to what is installed in site-packages, be it the packages or, editable, the way to them."""

    def run(self) -> None:
        super().run()
        directory = self.build_lib
        if self.editable_mode:
            directory = self.distribution.get_command_obj("install").install_lib
        self.mkpath(directory)
        self.copy_file("moe_comm/as_deep_ep.pth", f"{directory}/moe_comm_as_deep_ep.pth")

    def get_outputs(self, include_bytecode: int = 1) -> list[str]:
        extra = [] if self.editable_mode else [f"{self.build_lib}/moe_comm_as_deep_ep.pth"]
        return [*super().get_outputs(include_bytecode), *extra]


class BuildEngine(build_ext):
    """Keeps the objects of each configuration; editable installs would use a temporary directory."""

    def finalize_options(self) -> None:
        super().finalize_options()
        backends = "-".join(name for name, (usable, _) in backends_found.items() if usable)
        self.build_temp = f"build/engine-{backends or 'shm'}-{sys.implementation.cache_tag}"


backends_found = {"fabric": fabric_headers(), "verbs": verbs_headers()}
parts = ["shm"]
for name, (usable, reason) in backends_found.items():
    parts.append(f"{name} ({reason})" if usable else f"no {name}: {reason}")
print(f"moe_comm: backends: {', '.join(parts)}", flush=True)

engine = Pybind11Extension(
    "moe_comm._engine",
    sources=sorted(str(p) for d in ("csrc", "csrc/backends") for p in Path(d).glob("*.cpp")),
    depends=sorted(str(p) for p in Path("csrc").rglob("*.hpp")),
    include_dirs=["csrc"],
    cxx_std=20,
    define_macros=[
        (f"MOE_COMM_HAVE_{name.upper()}", str(int(usable)))
        for name, (usable, _) in backends_found.items()
    ],
    # Sums are specified bit for bit: no fused multiply-add that depends on the CPU.
    extra_compile_args=[
        *("-O3", "-g1", "-fvisibility=hidden", "-ffp-contract=off", "-MMD"),
        # g++ 12 sees ghosts in string + string (bug 105651).
        *("-Wall", "-Wextra", "-Wno-restrict"),
        # A newer compiler's new warning is our problem, not a user's.
        *(["-Werror"] if os.environ.get("CI") else []),
    ],
    libraries=["dl", "pthread"],
)

try:
    multiprocessing.Lock()
    num_jobs = 0  # one per CPU
except OSError:  # ParallelCompile needs a writable /dev/shm, a bare chroot may have none
    num_jobs = 1
ParallelCompile("MOE_COMM_BUILD_JOBS", default=num_jobs, needs_recompile=is_stale).install()
setup(
    packages=[
        *find_packages(include=["moe_comm", "moe_comm.*"]),
        "moe_comm.kernels",  # kernels/
        "moe_comm.csrc",  # abi.hpp
    ],
    ext_modules=[engine],
    cmdclass={"build_py": BuildPackages, "build_ext": BuildEngine},
)
