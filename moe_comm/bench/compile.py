"""C++ that only a benchmark needs, compiled when it runs and kept for the next time."""

import hashlib
import os
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .protocol import BenchError


def compile_cpp(
    sources: Sequence[Path],
    flags: Sequence[str],
    link: Sequence[str] = (),
    headers: Sequence[Path] = (),
) -> Path:
    """A program or library of `sources`, named by their contents: in XDG_CACHE_HOME/moe_comm, else ~/.cache/moe_comm.

    Raises: BenchError with the compiler's words, or if a source is missing (a wheel does not hold all of them).
    """
    for source in sources:
        if not source.exists():
            raise BenchError(f"its source {source.name} is only in the repository")
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    common = [repr((compiler, *flags)).encode(), *(header.read_bytes() for header in headers)]

    def key(*parts: bytes) -> str:
        return hashlib.sha256(b"\0".join([*common, *parts])).hexdigest()[:16]

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_comm"
    home.mkdir(parents=True, exist_ok=True)
    contents = [source.read_bytes() for source in sources]
    whole = home / f"{sources[0].stem}-{key(*contents, repr(link).encode())}"
    if whole.exists():
        return whole

    def make(target: Path, arguments: list[str]) -> Path:
        if not target.exists():
            draft = target.with_suffix(f".{os.getpid()}")
            _run([*compiler, *flags, *arguments, "-o", str(draft)])
            draft.rename(target)
        return target

    def make_object(source: Path, content: bytes) -> Path:
        return make(home / f"{source.stem}-{key(content)}.o", ["-c", str(source)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(make_object, sources, contents)]
    return make(whole, [*objects, *link])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BenchError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise BenchError(f"{' '.join(command[-4:])}: {done.stderr.strip()[-600:]}")
