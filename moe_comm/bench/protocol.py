"""How moe_comm is measured: what every benchmark of this repository does alike.

- **Interleaved.** A round runs one burst of every method, in an order that rotates; what disturbs the machine for a
  while disturbs all of them. Numbers are over the iterations of all rounds.
- **Bursts.** A burst starts behind a barrier with iterations that do not count, and then runs without barriers: each
  operation needs every rank, so ranks keep step by themselves, and the skew of a barrier is not part of any figure.
- **From call to usable result**, in Python, on the caller's clock: allocation and argument checks are in.
- **Maximum over ranks** of every single iteration first, percentiles of those maxima then. `cpu_us` is what one
  iteration cost a rank in CPU time, mean over ranks: it hardly changes when the machine is busy with something else.
- **Correct first.** Each method's result is compared with `moe_comm.reference` at the measured shape before its clock
  runs.
- **Bytes** are the case's, not the method's: rows (token, rank holding one of its experts) x H x item size, payload
  only, mean over the ranks; 10^9 bytes/s. Combine carries the same rows back; "both" counts them twice.
- One torch thread in every rank, for every method. Seeds are fixed: two runs see the same tokens and the same routes.

Every figure is one JSON line with what is needed to judge it: commit, machine, load, versions, command.
"""

import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SEED = 20240229
PERCENTILES = (10, 50, 90, 99)
WARM_ITERATIONS = 2  # of every burst, not counted
MAX_ITERATIONS = 500  # of every burst


class BenchError(Exception):
    """A method whose result is wrong, a rank that died, options that do not fit."""


# --- what is measured ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: R ranks with T tokens each, H hidden, E experts, top-K, how tokens choose experts."""

    num_ranks: int
    tokens: int
    hidden: int
    experts: int
    topk: int
    routing: str = "uniform"
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return (
            f"{self.num_ranks} ranks, T {self.tokens}, H {self.hidden}, E {self.experts}, "
            f"K {self.topk}, {self.routing}"
        )

    @property
    def local_experts(self) -> int:
        return -(-self.experts // self.num_ranks)

    @functools.cached_property
    def routes(self) -> list[tuple[Tensor, Tensor]]:
        """Of every rank: topk_idx [T, K] int64 and topk_weights [T, K] float32."""
        return [ROUTINGS[self.routing](self, rank) for rank in range(self.num_ranks)]

    @functools.cached_property
    def rows_per_rank(self) -> float:
        """(token, rank) pairs, mean over the sources; a rank's own rows included."""
        pairs = 0
        for topk_idx, _ in self.routes:
            owners = (topk_idx // self.local_experts).sort(1).values
            pairs += int((owners[:, 1:] != owners[:, :-1]).sum()) + len(owners)
        return pairs / self.num_ranks

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize

    def payload_bytes(self, operation: str) -> int:
        """Bytes that one rank sends on average in this operation."""
        return round(self.rows_per_rank * self.row_bytes) * (2 if operation == "both" else 1)

    def tokens_of(self, rank: int) -> Tensor:
        """x [T, H] of one rank."""
        return torch.randn(
            self.tokens, self.hidden, generator=_generator(rank, "x"), dtype=torch.float32
        ).to(self.dtype)


def _generator(rank: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + 1000 * rank + sum(purpose.encode()))


def uniform(case: Case, rank: int) -> tuple[Tensor, Tensor]:
    """Every set of K experts is as likely as any other, for each token by itself."""
    scores = torch.rand(case.tokens, case.experts, generator=_generator(rank, "route"))
    chosen = scores.topk(case.topk, dim=1)
    return chosen.indices, chosen.values.softmax(1)


def skewed(case: Case, rank: int) -> tuple[Tensor, Tensor]:
    """Like trained routers: popularity falls as a power law (the same experts are hot on all ranks), and neighbouring
    tokens, here 32 at a time, like similar experts. The hottest of 32 experts gets about 4 times its share."""
    everywhere = torch.Generator().manual_seed(SEED)
    order = torch.randperm(case.experts, generator=everywhere)
    popularity = -0.7 * torch.log(order.float() + 1)
    own = _generator(rank, "route")
    topics = torch.randn(-(-case.tokens // 32), case.experts, generator=own)
    topic = topics.repeat_interleave(32, dim=0)[: case.tokens]
    noise = -torch.log(-torch.log(torch.rand(case.tokens, case.experts, generator=own) + 1e-9))
    chosen = (popularity + 0.7 * topic + noise).topk(case.topk, dim=1)
    return chosen.indices, chosen.values.softmax(1)


ROUTINGS: dict[str, Callable[[Case, int], tuple[Tensor, Tensor]]] = {
    "uniform": uniform,
    "skewed": skewed,
}


# --- the clock -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loop:
    """One iteration: `parts` in order, each timed; `names` of the parts, or a single name for their sum."""

    label: str  # the method's
    names: tuple[str, ...]
    parts: tuple[Callable[[], Any], ...]


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long to measure: `rounds` bursts of about `burst_s` seconds each, at least `least` iterations."""

    rounds: int = 5
    burst_s: float = 0.15
    least: int = 2


class Ranks:
    """What the clock needs of the other ranks. Of one process by default."""

    rank, num_ranks = 0, 1

    def barrier(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value]


@dataclasses.dataclass(frozen=True)
class Times:
    """Of one operation of one method."""

    seconds: np.ndarray  # [iterations] maximum over ranks
    cpu_s: float | None  # of one iteration, all threads of a rank, mean over ranks; None for a half

    def summary(self) -> dict[str, Any]:
        """Microseconds, and over how many iterations."""
        values = np.percentile(self.seconds, PERCENTILES) * 1e6
        return {
            "median_us": round(float(np.median(self.seconds)) * 1e6, 2),
            **{f"p{p}_us": round(float(v), 2) for p, v in zip(PERCENTILES, values)},
            "cpu_us": None if self.cpu_s is None else round(self.cpu_s * 1e6, 2),
            "iterations": len(self.seconds),
        }


def measure(
    loops: Sequence[Loop], pace: Pace, ranks: Ranks, tick: Callable[[], None] = lambda: None
) -> dict[tuple[str, str], Times]:
    """By (label, name). Collective. `tick` is called after every burst."""
    counts = []
    for loop in loops:
        _burst(loop, 1)  # pages touched, connections made
        seconds = max(ranks.gather(float(_burst(loop, 1)[0].sum())))
        counts.append(min(MAX_ITERATIONS, max(pace.least, int(pace.burst_s / max(seconds, 1e-9)))))
    gc.collect()
    gc.freeze()
    bursts: list[list[tuple[np.ndarray, float]]] = [[] for _ in loops]
    for turn in range(pace.rounds):
        for at in range(len(loops)):
            i = (at + turn) % len(loops)
            ranks.barrier()
            if counts[i] > pace.least:
                _burst(loops[i], WARM_ITERATIONS)
            bursts[i].append(_burst(loops[i], counts[i]))
            tick()
    gc.unfreeze()
    times = {}
    for loop, made in zip(loops, bursts):
        own = np.concatenate([seconds for seconds, _ in made]), sum(cpu for _, cpu in made)
        gathered = ranks.gather(own)
        worst = np.stack([seconds for seconds, _ in gathered]).max(0)  # [iterations, names]
        cpu_s = sum(cpu for _, cpu in gathered) / len(gathered) / len(worst)
        for n, name in enumerate(loop.names):
            times[loop.label, name] = Times(worst[:, n], cpu_s if len(loop.names) == 1 else None)
    return times


def _burst(loop: Loop, iterations: int) -> tuple[np.ndarray, float]:
    """Seconds [iterations, names], and of CPU time in all."""
    clock = time.perf_counter
    out = np.empty((iterations, len(loop.parts) + 1))
    cpu = time.process_time()
    for row in out:
        row[0] = clock()
        for n, part in enumerate(loop.parts):
            part()
            row[n + 1] = clock()
    cpu = time.process_time() - cpu
    if len(loop.names) == len(loop.parts):
        return np.diff(out, axis=1), cpu
    return out[:, -1:] - out[:, :1], cpu


# --- the record ------------------------------------------------------------------------------------


def _run(*command: str) -> str:
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    fields = {"model name": platform.machine(), "cpu MHz": "0"}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    except OSError:
        pass
    return {"cpu": fields["model name"], "cpu_mhz": round(float(fields["cpu MHz"]))}


@functools.cache
def machine() -> dict[str, Any]:
    """What does not change while a benchmark runs: commit, host, versions, command line."""
    commit = _run("git", "rev-parse", "--short=12", "HEAD")
    if commit and _run(
        "git", "status", "--porcelain", "--untracked-files=no", "--", ":!bench/results"
    ):
        commit += "-dirty"
    packages = ("moe_comm", "torch", "numpy", "mpi4py", "mpich", "deep_ep")
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "commit": commit or None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": "cpu",
        **_cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "versions": {"python": platform.python_version()}
        | {p: v for p in packages if (v := _version(p))},
        "command": shlex.join(command),
    }


def record(bench: str, values: dict[str, Any]) -> dict[str, Any]:
    """One figure with everything needed to judge it. `load_1m`: processes that wanted a core in the last minute."""
    return {"bench": bench, **values, "load_1m": round(os.getloadavg()[0], 2), **machine()}


def write_json_lines(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Appends to the file."""
    with open(path, "a", encoding="utf-8") as file:
        for one in records:
            file.write(json.dumps(one, ensure_ascii=False) + "\n")
