"""Every .cu compiled by nvcc and by NVRTC, the compiler that ships, for all architectures; the cache; the wheel."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import moe_comm._engine
from moe_comm.kernels import cuda

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a"]
# Of one thread. Recorded 2026-11-21 (nvcc 13.0, most of three architectures): push 18, arm 20, wait 12, dispatch 52,
# sums 71 to 99, headers 24 to 48. More is a decision, not an accident.
MAX_REGISTERS = {
    "moe_comm_push": 24, "moe_comm_arm": 24, "moe_comm_wait": 16, "moe_comm_dispatch_send": 56,
    "moe_comm_dispatch_forward": 48, "moe_comm_dispatch_unpack": 48,
    "moe_comm_begin": 32, "moe_comm_leave_out": 32,
    "moe_comm_write_headers": 40, "moe_comm_check_headers": 56, "moe_comm_collect": 32,
    "moe_comm_pass_on": 48,
    **{f"moe_comm_combine_send_{dtype}": 104 for dtype in ("bf16", "f16", "f32", "f64")},
}  # fmt: skip


@pytest.fixture(scope="module")
def nvrtc():
    try:
        return cuda._nvrtc()
    except ImportError as error:
        pytest.skip(str(error))


def nvcc(*arguments):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc: the CUDA toolkit is not installed")
    command = ["nvcc", "-std=c++20", "-Werror", "all-warnings", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_there_is_something_to_compile():
    assert (
        cuda.sources() == sorted(p.stem for p in (ROOT / "kernels").glob("*.cu")) and cuda.sources()
    )


def check_resources(log):
    """What ptxas says of each kernel: nothing spilled, registers within the recorded numbers."""
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
        r"loads.*?Used (\d+) registers", log, re.DOTALL,
    )  # fmt: skip
    assert found, log
    for kernel, *numbers in found:
        stack, stores, loads, registers = map(int, numbers)
        assert (stack, stores, loads) == (0, 0, 0), f"{kernel}: {log}"
        assert registers <= MAX_REGISTERS[kernel], f"{kernel}: {registers} registers"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", cuda.sources())
def test_nvcc(name, arch, tmp_path):
    """Without a warning, without a spilled register, within the recorded numbers."""
    text = nvcc(
        f"-arch={arch}",
        "-cubin",
        "-Xptxas",
        "-v",
        cuda.HERE / f"{name}.cu",
        "-o",
        tmp_path / "cubin",
    )
    check_resources(text)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", cuda.sources())
def test_nvrtc(nvrtc, name, arch):
    code, log = cuda.compile_source(name, arch)
    assert code[:4] == b"\x7fELF" and log.strip("\0\n ") == ""
    source = (cuda.HERE / f"{name}.cu").read_text()
    kernels = set(re.findall(r"\bmoe_comm_\w+", source))
    assert len(kernels) >= source.count("__global__") > 0
    for kernel in kernels:
        assert kernel.encode() in code and kernel in MAX_REGISTERS


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", cuda.sources())
def test_resources_of_what_ships(nvrtc, name, arch, monkeypatch):
    monkeypatch.setattr(cuda, "OPTIONS", (*cuda.OPTIONS, "--ptxas-options=-v"))
    check_resources(cuda.compile_source(name, arch)[1])


def test_a_command_is_one_16_byte_store(tmp_path):  # H2
    nvcc("-arch=sm_90a", "-ptx", cuda.HERE / "ring.cu", "-o", tmp_path / "ptx")
    push = (tmp_path / "ptx").read_text().split(".entry moe_comm_push")[1].split(".entry")[0]
    assert push.count("st.relaxed.sys.v2.u64") == 1 and "fence.acq_rel.sys" in push
    assert not re.search(r"ld\.global\.nc", push), (
        "words that the host writes: never the read-only path"
    )


@pytest.mark.parametrize("name", [n for n in cuda.sources() if n != "ring"])
def test_rows_are_moved_by_16_byte_accesses(name, tmp_path):
    nvcc("-arch=sm_90a", "-ptx", cuda.HERE / f"{name}.cu", "-o", tmp_path / "ptx")
    ptx = (tmp_path / "ptx").read_text()
    assert re.search(r"ld(\.global)?\.v4\.", ptx) and re.search(r"st(\.global)?\.v4\.", ptx)
    assert not re.search(r"ld\.global\.nc", ptx), (
        "H6: windows are not read through the read-only path"
    )


def test_headers_stand_alone(tmp_path):
    for header in sorted(cuda.HERE.glob("*.cuh")):
        source = tmp_path / f"{header.stem}.cu"
        source.write_text(f'#include "{header.name}"\n#include "{header.name}"\n')
        nvcc("-arch=sm_80", f"-I{cuda.HERE}", "-cubin", source, "-o", tmp_path / "cubin")


# --- the cache -----------------------------------------------------------------------------------


def test_the_cache(nvrtc, tmp_path, monkeypatch):
    code = cuda.cubin("ring", "sm_80", cache=tmp_path / "some" / "where")
    (path,) = (tmp_path / "some" / "where").iterdir()
    assert path.name.startswith("ring-sm_80-") and path.read_bytes() == code
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "compile_source", None)  # not called again
        assert cuda.cubin("ring", "sm_80", cache=path.parent) == code

    cuda.cubin("ring", "sm_90a", cache=path.parent)
    assert len(list(path.parent.iterdir())) == 2, "by architecture"
    here = tmp_path / "kernels"
    shutil.copytree(cuda.HERE, here, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "csrc").mkdir()
    abi = (cuda.HERE / "../csrc/abi.hpp").read_text()
    (tmp_path / "csrc" / "abi.hpp").write_text(abi + "\n// changed\n")
    monkeypatch.setattr(cuda, "HERE", here)
    cuda.cubin("ring", "sm_80", cache=path.parent)
    assert len(list(path.parent.iterdir())) == 3, "by source, also of what it includes"


def test_a_cache_that_cannot_be_written_is_not_used(nvrtc, tmp_path):
    (tmp_path / "file").write_text("")
    assert cuda.cubin("ring", "sm_80", cache=tmp_path / "file" / "below")[:4] == b"\x7fELF"


def test_errors(nvrtc, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"name: expected one of .*dispatch, headers, ring, got 'rings'"
    ):
        cuda.cubin("rings", "sm_80", cache=tmp_path)
    with pytest.raises(ValueError, match="expected a device of sm_80 or newer, got sm_75"):
        cuda.architecture((7, 5))
    assert [cuda.architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0))] == [
        "sm_80",
        "sm_89",
        "sm_90a",
        "sm_100a",
    ]
    (tmp_path / "bad.cu").write_text("__global__ void f() { undeclared(); }\n")
    monkeypatch.setattr(cuda, "HERE", tmp_path)
    with pytest.raises(
        RuntimeError, match=r'bad.cu for sm_80: (.|\n)*identifier "undeclared" is undefined'
    ):
        cuda.cubin("bad", "sm_80", cache=tmp_path)


# --- what is installed ---------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_an_installed_wheel_compiles_its_sources(nvrtc, tmp_path):
    """Outside the checkout, in an empty venv: every source and header travels. The engine is the one built here."""
    source = tmp_path / "source"
    for name in ("moe_comm", "kernels", "csrc"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    (tmp_path / "distutils.cfg").write_text(f"[build]\nbuild_lib={tmp_path}/lib\n")
    setup = [sys.executable, "setup.py", "-q"]
    environment = {**os.environ, "DIST_EXTRA_CONFIG": str(tmp_path / "distutils.cfg")}

    def call(*command, cwd=source, env=environment):
        done = subprocess.run(
            [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call(*setup, "build_py")
    shutil.copy(moe_comm._engine.__file__, tmp_path / "lib" / "moe_comm")
    call(*setup, "bdist_wheel", "--skip-build", "-d", tmp_path)
    (wheel,) = tmp_path.glob("moe_comm-*.whl")
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "lib")

    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    call(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        site,
        wheel,
        cwd=tmp_path,
    )
    cupy = Path(nvrtc.__file__).parents[3]  # cupy_backends/cuda/libs/nvrtc.so
    paths = [
        site,
        cupy,
        sysconfig.get_paths()["purelib"],
    ]  # torch; as a plain path, without its .pth files
    code = (
        "import moe_comm.kernels as k; from moe_comm.kernels import cuda\n"
        f"assert k.__file__.startswith({str(site)!r}), k.__file__\n"
        "for name in cuda.sources():\n"
        "    assert cuda.cubin(name, 'sm_90a')[:4] == b'\\x7fELF'\n"
        "print(*cuda.sources())\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    environment.pop("PYTHONSAFEPATH", None)
    printed = call(tmp_path / "venv" / "bin" / "python", "-c", code, cwd=tmp_path, env=environment)
    assert printed.split() == cuda.sources()
    assert len(list((tmp_path / "moe_comm").glob("*.cubin"))) == len(cuda.sources())
