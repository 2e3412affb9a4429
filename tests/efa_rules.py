"""Builds tests/cpp/efa_rules.cpp: a libfabric that allows what EFA allows."""

import hashlib
import os
import shlex
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "cpp/efa_rules.cpp"
HEADER = SOURCE.with_suffix(".hpp")
COMPILE_S = 120


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def has_fabric_headers() -> bool:
    """libfabric's headers, 1.17 or newer: what setup.py asks too."""
    program = """#include <rdma/fabric.h>
        static_assert(FI_MAJOR_VERSION * 1000 + FI_MINOR_VERSION >= 1017);"""
    command = [*compiler(), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0


def build(folder: Path) -> Path:
    """The shared library; compiled once for a state of its source."""
    command = [*compiler(), "-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-shared", "-fPIC"]
    digest = hashlib.sha256(" ".join(command).encode() + SOURCE.read_bytes() + HEADER.read_bytes())
    library = folder / digest.hexdigest()[:16] / "libefa_rules.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        new = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [*command, str(SOURCE), "-o", str(new), "-ldl"],
            capture_output=True, text=True, timeout=COMPILE_S,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
        new.rename(library)
    return library


def sysfs_with_nics(folder: Path, *names: str) -> str:
    """A host with these EFA NICs, all beside each other."""
    for i, name in enumerate(names):
        device = folder / f"devices/pci0000:00/0000:00:{i + 1:02x}.0"
        port = device / "infiniband" / name / "ports/1"
        port.mkdir(parents=True)
        for file, text in {"state": "4: ACTIVE", "rate": "100 Gb/sec (4X EDR)"}.items():
            (port / file).write_text(text + "\n")
        (folder / "bus/pci/drivers/efa").mkdir(parents=True, exist_ok=True)
        (device / "driver").symlink_to(folder / "bus/pci/drivers/efa")
        (device / "infiniband" / name / "device").symlink_to(device)
        (folder / "class/infiniband").mkdir(parents=True, exist_ok=True)
        (folder / "class/infiniband" / name).symlink_to(device / "infiniband" / name)
    return str(folder)
