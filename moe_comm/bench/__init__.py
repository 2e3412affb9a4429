"""`moe-comm bench`: what do dispatch and combine take, next to other ways to move the same tokens?

    moe-comm bench                          on this host: starts 2 and then 4 ranks itself
    torchrun --nproc-per-node 8 -m moe_comm.bench …     srun -n 64 moe-comm bench …     mpirun -n 64 moe-comm bench …

**Methods** (methods.py, floor.py): moe_comm over shared memory and over fabric:tcp between two pretend nodes of the
same host; the `all_to_all_single` program over gloo; MPI's Alltoallv of packed rows; a C++ loop that copies the same
rows; DeepEP where it is installed and there are GPUs. **Protocol**: protocol.py.

**Traps.** More ranks than cores: every figure then holds the scheduler's part, so compare within one run only. MPICH
spins while it waits, so MPI is measured only where every rank has a core, unless asked for. It brings a libfabric of
its own, and a process can hold only one: ranks started here measure MPI in a run of its own, next to moe_comm over
shared memory. `load_1m` in each record says what else the machine did. MPI, gloo, fabric:tcp over loopback and shared
memory are different wires: they bracket each other.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from . import launch, report
from .floor import compile_floor
from .launch import FOLDER, RankProcesses
from .protocol import ROUTINGS, BenchError, machine, write_json_lines
from .session import FABRIC, Message, run_rank

METHODS = ("moe_comm", "gloo", "mpi", "floor", "deep_ep")
SHAPES = ("2048,32,4", "7168,256,8")
TOKENS = (1, 128, 1024, 4096)


# --- options ---------------------------------------------------------------------------------------


def _shape(text: str) -> tuple[int, int, int]:
    hidden, experts, topk = map(int, text.split(","))
    if not 0 < topk <= experts or hidden < 8 or hidden % 8:
        raise ValueError(text)
    return hidden, experts, topk


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="moe-comm bench", description=(__doc__ or "").partition("\n")[0]
    )
    add = functools.partial(p.add_argument, metavar="N")
    add(
        "--ranks",
        type=int,
        nargs="+",
        default=[2, 4],
        help="processes to start here, one run each (2 4)",
    )
    add("--tokens", type=int, nargs="+", help=f"tokens per rank {TOKENS}")
    add(
        "--shapes", type=_shape, nargs="+", metavar="H,E,K", help=f"hidden, experts, top-k {SHAPES}"
    )
    add(
        "--routing",
        choices=ROUTINGS,
        nargs="+",
        default=["uniform"],
        metavar="NAME",
        help="uniform, skewed",
    )
    add(
        "--methods",
        choices=METHODS,
        nargs="+",
        default=METHODS,
        metavar="NAME",
        help=f"of {METHODS}",
    )
    add(
        "--transports",
        nargs="+",
        metavar="NAME",
        help=f"of moe_comm (one host: shm {FABRIC}; several: auto)",
    )
    add(
        "--layouts",
        choices=("rank", "expert"),
        nargs="+",
        metavar="NAME",
        help="rank expert (default both)",
    )
    add("--operations", choices=report.OPERATIONS, nargs="+", default=report.OPERATIONS, metavar="NAME",
        help=f"of {report.OPERATIONS}")  # fmt: skip
    add(
        "--ranks-per-node",
        type=int,
        default=0,
        help="pretend nodes for fabrics on one host (half of the ranks)",
    )
    add("--rounds", type=int, default=5, help="bursts of every method (5)")
    add("--burst-ms", type=float, default=150, help="about how long a burst takes (150)")
    add("--mpi", choices=("auto", "always", "never"), default="auto", metavar="WHEN",
        help="start ranks by mpiexec and measure MPI: auto (where every rank has a core), always, never")  # fmt: skip
    p.add_argument(
        "--quick", action="store_true", help="two sizes, one shape, one layout, short bursts"
    )
    add("--json", type=Path, metavar="FILE", help="append one JSON line for each figure")
    add("--plot", type=Path, metavar="FILE", help="write a picture (needs matplotlib)")
    add(
        "--rendezvous",
        metavar="WHERE",
        help="HOST:PORT or file:///path where ranks meet (default: the launcher's)",
    )
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser()
    o = p.parse_args(argv)
    o.tokens = o.tokens or ([128, 1024] if o.quick else list(TOKENS))
    o.shapes = o.shapes or [_shape(s) for s in SHAPES[: 1 if o.quick else None]]
    o.layouts = o.layouts or (["rank"] if o.quick else ["rank", "expert"])
    if o.quick:
        o.rounds, o.burst_ms = min(o.rounds, 3), min(o.burst_ms, 60)
    if o.transports:
        o.transports = [FABRIC if name == "fabric:tcp" else name for name in o.transports]
    if min(*o.ranks, o.rounds, 1) < 1 or min(o.tokens) < 1:
        p.error("--ranks, --rounds, --tokens: expected at least 1")
    return o


# --- who reports -----------------------------------------------------------------------------------


class Collector:
    """Takes rank 0's messages: shows progress, keeps records, writes them to --json as they come."""

    def __init__(self, options: argparse.Namespace, show: Callable[[float, str], None]):
        self.options, self._show = options, show
        self.records: list[dict[str, Any]] = []
        self.notes: dict[str, None] = {}

    def __call__(self, message: Message) -> None:
        if "note" in message:
            self.notes[message["note"]] = None
        if "done" in message:
            self._show(message["done"], message["text"])
        if "records" in message:
            records = [r | {"command": machine()["command"]} for r in message["records"]]
            self.records += records
            if self.options.json:
                write_json_lines(self.options.json, records)

    def print(self, console: Console, *, goals: bool = True) -> None:
        for table in report.tables(self.records):
            console.print(table)
        extra = (
            (report.ratio_table(self.records), report.goals_table(self.records)) if goals else ()
        )
        for table in filter(None, extra):
            console.print(table)
        for note in self.notes:
            console.print(note, markup=False, highlight=False, style="dim")
        if goals:
            facts = machine()
            console.print(
                f"{facts['cpu']}, {facts['cores']} cores, load {os.getloadavg()[0]:.1f}; torch "
                f"{facts['versions'].get('torch')}, one thread per rank; commit {facts['commit']}",
                style="dim", highlight=False,
            )  # fmt: skip
            if self.options.plot:
                console.print(report.plot(self.records, self.options.plot))


def _runs_here(
    options: argparse.Namespace, say: Collector
) -> list[tuple[int, list[str], str | None]]:
    """(ranks, methods, mpiexec) of each run to start; says what is left out."""
    others = [name for name in options.methods if name != "mpi"]
    with_mpi = [name for name in ("moe_comm", "floor", "mpi") if name in options.methods]
    runs: list[tuple[int, list[str], str | None]] = []
    if "floor" in others:
        try:
            compile_floor()  # once, and not by all ranks at the same time
        except BenchError as error:
            say({"note": f"left out: floor: {error}"})
            others.remove("floor")
            with_mpi.remove("floor")
    mpiexec, reason = None, "--mpi never"
    if "mpi" in options.methods and options.mpi != "never":
        mpiexec, reason = launch.find_mpiexec()
    for num_ranks in options.ranks:
        if others:
            runs.append((num_ranks, others, None))
        if "mpi" not in options.methods:
            continue
        if mpiexec and options.mpi == "auto" and num_ranks > machine()["cores"]:
            reason = f"{num_ranks} ranks on {machine()['cores']} cores, and it spins while it waits (--mpi always)"
        elif mpiexec:
            runs.append((num_ranks, with_mpi, mpiexec))
            continue
        say({"note": f"left out: mpi: {reason}"})
    return runs


def _start_here(options: argparse.Namespace, arguments: list[str], say: Collector) -> None:
    """No launcher: starts ranks on this host, one run after the other."""
    runs = _runs_here(options, say)
    for n, (num_ranks, methods, mpiexec) in enumerate(runs):
        chosen = [*arguments, "--methods", *methods]  # the last one counts
        with tempfile.TemporaryDirectory(prefix="moe_comm-bench-") as folder:
            with RankProcesses(chosen, num_ranks, Path(folder), mpiexec) as processes:
                for message in processes.messages():
                    if "done" in message:
                        message["done"] = (n + message["done"]) / len(runs)
                    say(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark with these arguments (default: the command line's). Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    world = launch.find_world(os.environ)
    console = Console()
    if world is not None and FOLDER in os.environ:
        with open(Path(os.environ[FOLDER]) / "lines", "a", encoding="utf-8", buffering=1) as lines:
            first = world.rank == 0
            run_rank(
                options,
                world,
                (lambda m: print(json.dumps(m), file=lines)) if first else (lambda m: None),
            )
        return 0
    try:
        if world is not None and world.rank > 0:
            run_rank(options, world, lambda message: None)
            return 0
        with report.progress_bar("moe-comm bench") as show:
            collector = Collector(options, show)
            if world is not None:
                run_rank(options, world, collector)
            else:
                _start_here(options, arguments, collector)
    except BenchError as error:
        Console(stderr=True).print(f"[red bold]error[/]: {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    collector.print(console)
    return 0


def small_table() -> None:
    """A first impression in well under a minute: 4 ranks here, moe_comm and gloo. Prints a table; used by the demo."""
    arguments = [
        "--ranks", "4", "--quick", "--mpi", "never", "--methods", "moe_comm", "gloo",
        "--operations", "dispatch", "combine", "both",
    ]  # fmt: skip
    with report.progress_bar("measuring") as show:
        collector = Collector(parse(arguments), show)
        try:
            _start_here(collector.options, arguments, collector)
        except BenchError as error:
            collector.notes[f"no table: {error}"] = None
    collector.print(Console(), goals=False)
