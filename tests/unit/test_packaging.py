"""What is shipped, what an import may touch, and who may know whom (no arrow turns back)."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = ("*.py", "*.pyi", "*.cpp", "*.hpp", "*.cu", "*.cuh")
MAX_LINES = 600


def files(*directories: str, patterns: tuple[str, ...] = CODE) -> list[Path]:
    return sorted(p for d in directories for pattern in patterns for p in (ROOT / d).rglob(pattern))


def run_python(*args: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    command = [sys.executable, *args]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# --- what is shipped -----------------------------------------------------------------------------


# How device code finds the ABI, installed or editable.
FIND_ABI = "(pathlib.Path(moe_comm.kernels.__file__).parent / '../csrc/abi.hpp').exists()"


def expected_files() -> set[str]:
    device_code = {f"moe_comm/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.*")}
    return device_code | {"moe_comm/__init__.py", "moe_comm/csrc/abi.hpp"}


def test_python_and_device_code_are_packaged(tmp_path: Path) -> None:
    run_python(
        *("setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)),
        *("build_py", "--build-lib", str(tmp_path / "lib")),
        cwd=ROOT,
    )
    shipped = {str(p.relative_to(tmp_path / "lib")) for p in (tmp_path / "lib").rglob("*.*")}
    assert expected_files() <= shipped
    assert {p for p in shipped if p.startswith("moe_comm/csrc/")} == {"moe_comm/csrc/abi.hpp"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_works_away_from_the_repository(tmp_path: Path) -> None:
    for name in ("moe_comm", "kernels", "csrc"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "src" / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "src")
    options = ("--no-deps", "--no-build-isolation", "--no-index")
    run_python("-m", "pip", "wheel", *options, "-w", ".", "./src", cwd=tmp_path)
    (wheel,) = tmp_path.glob("moe_comm-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected_files() <= names
    assert any(re.fullmatch(r"moe_comm/_engine\.[^/]*\.so", name) for name in names)
    assert not any(name.startswith(("kernels/", "csrc/", "tests/")) for name in names)

    run_python("-m", "pip", "install", *options, "--target", "site", str(wheel), cwd=tmp_path)
    code = (
        "import moe_comm, moe_comm.kernels, moe_comm._engine, pathlib\n"
        "assert moe_comm.__file__.startswith({site!r}), moe_comm.__file__\n"
        "assert moe_comm.kernels.__file__.startswith({site!r}), moe_comm.kernels.__file__\n"
        "assert {abi}\n"
    ).format(site=str(tmp_path / "site"), abi=FIND_ABI)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run_python("-c", code, cwd=tmp_path, env=env)


def test_device_code_is_found_in_this_installation() -> None:
    code = f"import moe_comm.kernels, pathlib\nassert {FIND_ABI}\n"
    for directory in (ROOT, Path("/")):
        run_python("-c", code, cwd=directory)


def test_lint_versions_are_the_same_in_pre_commit() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for requirement in project["optional-dependencies"]["lint"]:
        name, version = requirement.split("==")
        assert re.search(rf"{name}.*(\n *rev:)? v?{re.escape(version)}\b", hooks), requirement


# --- what an import touches ----------------------------------------------------------------------

IMPORT_CODE = """
import os, sys, torch
before = set(sys.modules)
asked = []
class Spy(type(os.environ)):
    def __getitem__(self, key):
        asked.append(key)
        return super().__getitem__(key)
os.environ.__class__ = Spy
import moe_comm
assert "MOE_COMM_PROBE" not in os.environ and asked.pop() == "MOE_COMM_PROBE"  # the spy works
assert not [key for key in asked if key.startswith("MOE_COMM_")], asked
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not loaded & {"triton", "cupy", "cuda", "pynvml", "transformers", "mpi4py"}, loaded
assert not torch.cuda.is_initialized()
libraries = open("/proc/self/maps").read()
assert "libfabric" not in libraries and "libibverbs" not in libraries
"""


def test_import_touches_no_device_and_no_setting() -> None:
    run_python("-c", IMPORT_CODE, cwd=ROOT)


def test_doctor_runs_without_the_engine() -> None:
    code = (
        "import sys, runpy; sys.modules['moe_comm._engine'] = None\n"
        "runpy.run_path('moe_comm/doctor.py', run_name='__main__')\n"
    )
    assert '"the engine is not built"' in run_python("-c", code, "--json", cwd=ROOT)
    assert "pip install -e" in run_python("-c", code, cwd=ROOT)


def test_doctor_reports_shared_memory_as_usable() -> None:
    report = json.loads(run_python("-m", "moe_comm.cli", "doctor", "--json", cwd=ROOT))
    transports = {entry["name"]: entry for entry in report["transports"]}
    assert transports["shm"]["available"]
    assert all(entry["reason"] for entry in transports.values() if not entry["available"])


# --- who knows whom ------------------------------------------------------------------------------


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def imports(path: Path) -> list[str]:
    """Full names of the modules a Python file imports; relative ones start with a dot."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return names


def test_engine_knows_neither_torch_nor_cuda() -> None:
    forbidden = re.compile(r"(torch|ATen|c10|cuda|cuda_runtime\w*|nccl|nvml|triton)(/|\.|$)")
    for path in files("csrc"):
        for include in includes(path):
            assert not forbidden.match(include), f"{path}: {include}"


def test_python_is_known_to_the_bindings_only() -> None:
    for path in files("csrc"):
        if not path.name.startswith("bindings"):
            assert not [i for i in includes(path) if i.startswith(("pybind11", "Python.h"))], path


def test_abi_includes_no_header_of_the_engine() -> None:
    assert set(includes(ROOT / "csrc" / "abi.hpp")) <= {"cstddef", "cstdint"}


def test_kernels_know_the_abi_and_nothing_of_the_package() -> None:
    for path in files("kernels", patterns=("*.py",)):
        for name in imports(path):
            inside = name == "moe_comm.kernels" or name.startswith("moe_comm.kernels.")
            assert inside or not re.match(r"moe_comm\b|\.\.", name), f"{path}: {name}"
    headers_of_engine = {p.name for p in files("csrc", patterns=("*.hpp",))} - {"abi.hpp"}
    for path in files("kernels", patterns=("*.cu", "*.cuh")):
        for include in includes(path):
            assert Path(include).name not in headers_of_engine, f"{path}: {include}"


def test_kernels_are_imported_by_their_full_name() -> None:
    for path in files("moe_comm", "kernels", "tests", "bench", "examples", patterns=("*.py",)):
        for name in imports(path):
            assert not re.match(r"kernels\b", name), f"{path}: {name}"


def test_no_file_needs_a_table_of_contents() -> None:
    for path in files("moe_comm", "kernels", "csrc", "tests", "bench", "examples"):
        num_lines = len(path.read_text().splitlines())
        assert num_lines <= MAX_LINES, f"{path}: {num_lines} lines, the limit is {MAX_LINES}"
