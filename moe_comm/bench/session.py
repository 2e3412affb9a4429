"""What runs in every rank: makes the methods of each case, checks them, measures them, hands rank 0's records on."""

import argparse
import dataclasses
import functools
import importlib.util
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import moe_comm
from moe_comm import _engine

from . import launch
from .floor import CopyFloor
from .launch import FOLDER, GroupRanks, World
from .methods import DeepEp, GlooProgram, Method, MoeComm, MpiAlltoallv, Setting
from .protocol import BenchError, Case, Pace, machine, measure, record

FABRIC = "fabric:tcp;ofi_rxm"
GLOO_COPIES = 4.5  # of its T x K rows that the program holds at once
WINDOW_BYTES = 512 << 20  # of a Buffer, at most (moe_comm/config.py)
MEMORY_SHARE = 0.8  # of what is available; methods are alive at the same time

Message = dict[str, Any]  # of rank 0 to whoever reports: progress, a note, records


@dataclasses.dataclass(frozen=True)
class Factory:
    """A method that could be measured. `make` raises BenchError where it cannot run; `need`: bytes in every rank."""

    name: str
    layout: str
    make: Callable[[], Method]
    need: int

    def __str__(self) -> str:
        return f"{self.name} {self.layout}"


@dataclasses.dataclass
class Session:
    """The ranks of one run, and what they can measure."""

    options: argparse.Namespace
    world: World
    ranks: GroupRanks
    group: moe_comm.EPGroup
    hosts: int
    say: Callable[[Message], None]

    @property
    def launcher(self) -> str:
        """Who started the ranks, for the record: "self" if no MPI was needed for it."""
        return "self" if FOLDER in os.environ and not self.world.has_mpi else self.world.launcher

    @functools.cached_property
    def transports(self) -> list[tuple[str, int]]:
        """(name, ranks per node)."""
        names = self.options.transports or (["shm", FABRIC] if self.hosts == 1 else ["auto"])
        if self.world.has_mpi and FOLDER in os.environ:
            names = [name for name in names if not name.startswith("fabric:")]
        half = self.options.ranks_per_node or max(1, self.ranks.num_ranks // 2)
        pretend = self.hosts == 1 and self.ranks.num_ranks % half == 0
        return [(n, half if pretend and n.startswith("fabric:") else 0) for n in names]

    def factories(self, case: Case, setting: Setting) -> list["Factory"]:
        """Everything asked for."""
        o = self.options
        made: list[Factory] = []
        once = int(case.rows_per_rank * case.row_bytes)  # one row for each (token, rank)
        copies = case.tokens * case.topk * case.row_bytes
        for name, per_node in self.transports if "moe_comm" in o.methods else []:
            for layout in o.layouts:
                if layout == "rank" or name == "shm" or o.layouts == ["expert"]:
                    method = functools.partial(MoeComm, setting, name, per_node, layout)
                    need = min(4 * once, WINDOW_BYTES) + 3 * (once if layout == "rank" else copies)
                    make = functools.partial(self._with, name, method)
                    made.append(Factory(f"moe_comm {name}", layout, make, need))
        if "gloo" in o.methods:
            gloo = functools.partial(GlooProgram, setting)
            made.append(Factory("gloo", "rank", gloo, int(GLOO_COPIES * copies)))
        if "mpi" in o.methods:
            mpi = functools.partial(self._mpi, setting)
            made.append(Factory("mpi", "rank", mpi, 3 * once))
        if "floor" in o.methods:
            for layout in o.layouts:
                floor = functools.partial(self._floor, setting, layout)
                need = 3 * once if layout == "rank" else 2 * once + copies
                made.append(Factory("floor", layout, floor, need))
        if "deep_ep" in o.methods:
            made.append(
                Factory("deep_ep", "rank", functools.partial(self._deep_ep, setting), 3 * once)
            )
        return made

    def fitting(self, made: list["Factory"]) -> list["Factory"]:
        """Those that memory holds at the same time, by layout "rank" and the floor first. Collective."""
        available = 0
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                available = int(line.split()[1]) * 1024
        local_ranks = -(-self.ranks.num_ranks // self.hosts)
        left = min(self.ranks.gather(int(MEMORY_SHARE * available / local_ranks)))
        fit = []
        for factory in sorted(made, key=lambda f: (f.layout == "expert", f.name != "floor")):
            if factory.need <= left:
                left -= factory.need
                fit.append(factory)
            else:
                self.say(
                    {
                        "note": f"left out: {factory}: needs {factory.need / 1e9:.1f} GB more memory "
                        "in every rank"
                    }
                )
        return [factory for factory in made if factory in fit]

    def _with(self, transport: str, make: Callable[[], Method]) -> Method:
        missing = {t["name"]: t["reason"] for t in _engine.transports() if not t["available"]}
        known = [t["name"] for t in _engine.transports()]
        if transport != "auto" and (transport in missing or transport not in known):
            raise BenchError(missing.get(transport) or "this engine has no such transport")
        return make()

    def _mpi(self, setting: Setting) -> Method:
        if not self.world.has_mpi:
            raise BenchError(
                "these ranks were not started by mpiexec (needs mpi4py and mpich; see --mpi)"
            )
        if self.options.mpi == "never" or (self.options.mpi == "auto" and not self._core_each()):
            raise BenchError("more ranks than cores, and MPI spins while it waits (--mpi always)")
        return MpiAlltoallv(setting)

    def _core_each(self) -> bool:
        return self.ranks.num_ranks <= machine()["cores"] * self.hosts

    def _floor(self, setting: Setting, layout: str) -> Method:
        if self.hosts > 1:
            raise BenchError("it copies inside one host")
        return CopyFloor(setting, layout)

    def _deep_ep(self, setting: Setting) -> Method:
        found = sys.modules.get("deep_ep") or importlib.util.find_spec("deep_ep")
        if found is None or not torch.cuda.is_available():
            raise BenchError("not installed" if found is None else "needs GPUs")
        return DeepEp(setting)

    def build(self, case: Case) -> list[Method]:
        """All methods that run here, checked against the reference. Collective."""
        setting = Setting.make(case, self.ranks.rank, self.group)
        methods: list[Method] = []
        for factory in self.fitting(self.factories(case, setting)):
            method, reason = None, None
            try:
                method = factory.make()
            except (BenchError, moe_comm.MoeCommError, OSError) as error:
                reason = str(error) or type(error).__name__
            reasons = [r for r in self.ranks.gather(reason) if r is not None]
            if reasons:
                self.say({"note": f"left out: {factory}: {reasons[0]}"})
            if method is not None and not reasons:
                method.check()
                methods.append(method)
        return methods

    def run_case(self, case: Case, tick: Callable[[int, int], None]) -> list[dict[str, Any]]:
        methods = self.build(case)
        try:
            loops = [
                loop
                for method in methods
                for loop in method.loops()
                if set(loop.names) & set(self.options.operations)
            ]
            bursts, done = len(loops) * self.options.rounds, iter(range(1, 1 << 30))
            pace = Pace(self.options.rounds, self.options.burst_ms / 1e3)
            times = measure(loops, pace, self.ranks, lambda: tick(next(done), bursts))
        finally:
            for method in methods:
                method.close()
            moe_comm.empty_cache()
        facts = {method.label: method.facts for method in methods}
        records = []
        for (label, operation), taken in times.items():
            if operation not in self.options.operations:
                continue
            figures = taken.summary()
            num_bytes = case.payload_bytes(operation)
            records.append(
                record("dispatch_combine", {
                    "label": label, "operation": operation, "ranks": case.num_ranks, "tokens": case.tokens,
                    "hidden": case.hidden, "experts": case.experts, "topk": case.topk, "routing": case.routing,
                    "dtype": str(case.dtype).removeprefix("torch."), **figures, "rounds": self.options.rounds,
                    "payload_bytes": num_bytes, "gb_per_s": round(num_bytes / figures["median_us"] / 1e3, 4),
                    "checked": True, "torch_threads": 1, "hosts": self.hosts, "launcher": self.launcher,
                } | facts[label])
            )  # fmt: skip
        return records

    def run(self) -> None:
        o = self.options
        cases = [
            Case(self.ranks.num_ranks, tokens, shape[0], shape[1], shape[2], routing)
            for shape in o.shapes
            for routing in o.routing
            for tokens in o.tokens
        ]
        for n, case in enumerate(cases):

            def tick(done: int, total: int, n: int = n, case: Case = case) -> None:
                self.say({"done": (n + done / max(1, total)) / len(cases), "text": str(case)})

            tick(0, 1)
            self.say({"records": self.run_case(case, tick)})


def run_rank(options: argparse.Namespace, world: World, say: Callable[[Message], None]) -> None:
    torch.set_num_threads(1)
    if world.has_mpi and importlib.util.find_spec("mpi4py"):
        importlib.import_module(
            "mpi4py.MPI"
        )  # before the engine loads a libfabric that MPI could not use
    launch.init_process_group(world, options.rendezvous)
    try:
        ranks = GroupRanks()
        hosts = len(set(ranks.gather(socket.gethostname())))
        Session(options, world, ranks, moe_comm.EPGroup.of(None), hosts, say).run()
        ranks.barrier()
    finally:
        dist.destroy_process_group()
