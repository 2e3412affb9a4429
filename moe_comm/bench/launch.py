"""Who starts the ranks: this program itself on one host, or torchrun, srun or mpirun on any number of hosts.

A rank finds out by its environment which one it is (`find_world`), and meets the others through a torch Store
(`init_process_group`). Where nobody started ranks, `RankProcesses` starts them: by mpiexec if mpi4py and mpiexec
work, so that MPI can be measured in the same processes, else one by one.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .protocol import BenchError, Ranks

FOLDER = (
    "MOE_COMM_BENCH_FOLDER"  # set for ranks that this program started: where they meet and report
)
VARIABLES = {  # by launcher: those that hold a process's rank and how many there are
    "torchrun": ("RANK", "WORLD_SIZE"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpich": ("PMI_RANK", "PMI_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
}
STORE_TIMEOUT = timedelta(seconds=300)


@dataclasses.dataclass(frozen=True)
class World:
    """This process is `rank` of `num_ranks`, started by `launcher`."""

    rank: int
    num_ranks: int
    launcher: str

    @property
    def has_mpi(self) -> bool:
        return self.launcher in ("openmpi", "mpich")


def find_world(env: Mapping[str, str]) -> World | None:
    """None: nobody started ranks, or only one. An sbatch script is no rank, only what srun starts there."""
    for launcher, (rank, size) in VARIABLES.items():
        if rank in env and int(env.get(size, "1")) > 1:
            return World(int(env[rank]), int(env[size]), launcher)
    return None


# --- a rank ----------------------------------------------------------------------------------------


def init_process_group(world: World, rendezvous: str | None) -> None:
    """Makes the default group (gloo). Raises BenchError where the ranks have no way to find each other."""
    folder = os.environ.get(FOLDER)
    if folder:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        where = f"file://{folder}/store"
    elif rendezvous:
        where = rendezvous if "://" in rendezvous else f"tcp://{rendezvous}"
    elif "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        where = "env://"
    elif world.has_mpi:
        where = _by_mpi(world)
    elif world.launcher == "slurm":
        port = 20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000
        where = f"tcp://{first_host(os.environ['SLURM_STEP_NODELIST'])}:{port}"
    else:
        raise BenchError("set MASTER_ADDR and MASTER_PORT, or pass --rendezvous HOST:PORT")
    dist.init_process_group(
        "gloo",
        init_method=where,
        rank=world.rank,
        world_size=world.num_ranks,
        timeout=STORE_TIMEOUT,
    )


def _by_mpi(world: World) -> str:
    try:
        from mpi4py import MPI
    except ImportError:
        raise BenchError(
            "mpirun without mpi4py: pip install mpi4py, or pass --rendezvous HOST:PORT"
        ) from None
    where = None
    if world.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            where = f"tcp://{socket.gethostname()}:{probe.getsockname()[1]}"
    return MPI.COMM_WORLD.bcast(where, 0)


def first_host(nodelist: str) -> str:
    """`node[07-09,12],other` → `node07`."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\])?([^,]*)", nodelist)
    assert match is not None
    return "".join(part or "" for part in match.groups())


class GroupRanks(Ranks):
    """The default process group."""

    def __init__(self) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()

    def barrier(self) -> None:
        dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values


# --- ranks that we start ---------------------------------------------------------------------------


def find_mpiexec() -> tuple[str | None, str]:
    """(path, why not): an mpiexec under which mpi4py works. Tries it."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        return None, "no mpiexec (pip install mpi4py mpich)"
    program = "from mpi4py import MPI; print(MPI.COMM_WORLD.size)"
    try:
        done = subprocess.run(
            [mpiexec, "-n", "2", sys.executable, "-c", program],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{mpiexec}: {error}"
    if "".join(done.stdout.split()) != "22":  # two ranks print at once: lines may mix
        lines = (done.stderr or done.stdout).strip().splitlines()
        return None, f"{mpiexec} with mpi4py: {lines[-1] if lines else 'no output'}"
    return mpiexec, ""


class RankProcesses:
    """`moe-comm bench` with the same arguments in R processes, which report into `folder`. A context
    manager: at its end, however it comes, the processes are gone."""

    def __init__(self, arguments: list[str], num_ranks: int, folder: Path, mpiexec: str | None):
        command = [sys.executable, "-m", "moe_comm.bench", *arguments]
        env = {**os.environ, FOLDER: str(folder), "OMP_NUM_THREADS": "1"}
        if mpiexec:
            started = [([mpiexec, "-n", str(num_ranks), *command], env)]
        else:
            ranks = [{"RANK": str(r), "WORLD_SIZE": str(num_ranks)} for r in range(num_ranks)]
            started = [(command, env | rank) for rank in ranks]
        self._lines = folder / "lines"
        self._lines.touch()
        self._processes = [
            subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL) for command, env in started
        ]

    def messages(self) -> Iterator[dict[str, Any]]:
        """What rank 0 reports, until all ended. Raises BenchError if one failed."""
        with open(self._lines, encoding="utf-8") as file:
            rest = ""
            while True:
                codes = [process.poll() for process in self._processes]
                *lines, rest = (rest + file.read()).split("\n")
                yield from map(json.loads, lines)
                failed = [code for code in codes if code]
                if failed:
                    raise BenchError(f"a rank ended with status {failed[0]}; its output is above")
                if all(code == 0 for code in codes):
                    return
                time.sleep(0.1)

    def __enter__(self) -> "RankProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            if process.poll() is None:
                process.kill()
                process.wait()
