"""CUDA sources to machine code, at run time: NVRTC by way of CuPy, kept on disk by source and architecture.

    kernels/NAME.cu + what it includes ─NVRTC→ cubin ─→ ~/.cache/moe_comm/NAME-HASH.cubin

So installing needs no CUDA toolkit, and a program compiles each kernel once per machine. A file in the cache is named
by a hash of everything it was made of, so it is never stale; it appears by a rename, so ranks may compile at once.
Compiling needs no device. *Source*: ours.
"""

import functools
import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OPTIONS = (
    "--std=c++20",
)  # no --restrict: it would let windows be read through the read-only path (H6)


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for: "sm_90a" for (9, 0). Raises ValueError below (8, 0)."""
    if capability < (8, 0):
        raise ValueError(
            f"capability: expected a device of sm_80 or newer, got sm_{capability[0]}{capability[1]}"
        )
    specific = "a" if capability >= (9, 0) else ""
    return f"sm_{capability[0]}{capability[1]}{specific}"


def sources() -> list[str]:
    """Names of the .cu files that there are."""
    return sorted(path.stem for path in HERE.glob("*.cu"))


def cubin(name: str, arch: str, *, cache: Path | None = None) -> bytes:
    """Machine code of kernels/`name`.cu for `arch`, from the cache or compiled now.

    `cache`: a directory; by default moe_comm in XDG_CACHE_HOME (~/.cache). One that cannot be written is not used.
    Raises ImportError without CuPy or NVRTC; ValueError for a name that is not in `sources()`; RuntimeError with the
    compiler's log.
    """
    if name not in sources():
        raise ValueError(f"name: expected one of {', '.join(sources())}, got {name!r}")
    directory = cache or default_cache()
    key = repr((arch, OPTIONS, _nvrtc_version(), [(n, t) for n, t in sorted(_files(name).items())]))
    path = directory / f"{name}-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        code, _ = compile_source(name, arch)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:
        pass  # a read-only home: compiled again next time
    return code


def compile_source(name: str, arch: str) -> tuple[bytes, str]:
    """(cubin, the compiler's log) of kernels/`name`.cu. No cache; errors as in `cubin`."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(
        (HERE / f"{name}.cu").read_text(), str(HERE / f"{name}.cu"), (), ()
    )
    try:
        options = (*OPTIONS, f"--gpu-architecture={arch}", f"--include-path={HERE}")
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"{name}.cu for {arch}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_comm"


@functools.cache
def _nvrtc() -> Any:
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            "CUDA kernels are compiled at run time: expected CuPy and NVRTC to be installed "
            f"(pip install moe_comm[cuda13], or [cuda12]): {error}"
        ) from error
    return nvrtc


@functools.cache
def _nvrtc_version() -> tuple[int, int]:
    version: tuple[int, int] = _nvrtc().getVersion()
    return version


def _files(name: str) -> dict[str, str]:
    """name.cu and what it includes with quotes, and so on: text by path from here."""
    found: dict[str, str] = {}
    todo = [f"{name}.cu"]
    while todo:
        path = todo.pop()
        if path not in found:
            found[path] = (HERE / path).read_text()
            included = re.findall(r'^\s*#include "([^"]+)"', found[path], re.MULTILINE)
            todo += [os.path.join(os.path.dirname(path), i) for i in included]
    return found
