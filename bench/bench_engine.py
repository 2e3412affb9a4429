"""What does one write with an immediate cost, and how close is the engine to what the transport itself can do?

    python bench/bench_engine.py [--quick] [--transports shm fabric:tcp fabric:shm] [--json results.jsonl]

**Methods**, from the bottom up; two processes on this host, 8 B to 32 MiB:

- floor      fabric_floor.cpp, a loop of libfabric calls and nothing else; for shm a memcpy into a shared segment
- floor+fd   the same loop over a completion queue that a thread could sleep on, as the engine's must be (tcp only)
- transport  engine_pingpong.cpp: `Transport::post_write` and `poll`, the backend without its proxy thread
- ring       the way of the exchange: command ring, proxy thread, counter word (at least 16 B)
- user       the way of TransferEngine without Python: `Proxy::submit`, `take_immediates`
- python     `moe_comm.TransferEngine`: write, expect().wait()
- cost       the backend again, for what it costs the proxy's thread and not for how long the network takes

**Protocol.** Each round starts every method once, in turn; figures are medians over the rounds, of p99 the largest.
latency: ping-pong, half a round trip. bandwidth: 16 writes in flight, each with an immediate, until all ended locally;
payload only, 10^9 bytes/s. cost: 16 B with an immediate to 1, 8 and 64 connections in turn, 32 at once, the doorbell
with the last; nanoseconds of the posting thread for each write in post_write, and in the polls that found something for
each completion. commands: how many a second one thread pushes and the proxy takes. turnaround: from push() until the
sent counter says that the bytes may be reused, one command at a time. idle: CPU time of a process with a connected
engine that has nothing to do, over 2 s.

**Traps.** floor and transport spin on both sides and need a core each; ring, user and python have a second thread, the
proxy, which steps aside while the first waits (csrc/proxy.hpp, NOTE [turns]): on a machine that does more, waits are
long enough for both to sleep, and what is measured then is how they wake each other. Up
to 1 MiB bandwidth is the cache's, not memory's. fabric_floor and fabric:tcp use --interface (lo): both take
the same way.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import moe_comm
from moe_comm import _engine
from moe_comm.bench.compile import compile_cpp
from moe_comm.bench.protocol import BenchError, machine, record, write_json_lines
from moe_comm.bench.report import duration, progress_bar

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
LAYERS = ("floor", "floor+fd", "transport", "ring", "user", "python", "cost")
MAX_BYTES = 32 << 20
SIZES = (8, 4096, 65536, 1 << 20, 4 << 20, MAX_BYTES)
DEPTH = 16
SECRET, IMM = 42, 7
RUN_LIMIT_S = 300

MEDIANS = (
    "p50_us", "gb_per_s", "writes_per_s", "cpu_percent", "post_ns", "completion_ns", "commands_per_s",
)  # fmt: skip
MAXIMA = ("p99_us", "post_p99_ns")

Figure = dict[str, Any]


# --- python: two ends of one connection ------------------------------------------------------------


class PythonEnd:
    """One process. `first` measures."""

    def __init__(self, wire: Connection, transport: str, interface: str | None, first: bool):
        self.first = first
        self.engine = moe_comm.TransferEngine(transport, interface=interface, secret=SECRET)
        self.memory = self.engine.empty(MAX_BYTES, dtype=_uint8())
        self.region = self.engine.register(self.memory)
        wire.send((self.engine.address, self.region.descriptor))
        address, self.target = wire.recv()
        self.peer = self.engine.connect(address)
        wire.send(None)
        wire.recv()

    def write(self, num_bytes: int) -> Any:
        return self.engine.write(self.peer, self.region, self.target, num_bytes=num_bytes, imm=IMM)

    def latency(self, num_bytes: int, rounds: int) -> Figure | None:
        half = []
        for _ in range(rounds):
            start = time.perf_counter()
            if self.first:
                self.write(num_bytes)
            self.engine.expect(IMM).wait()
            if not self.first:
                self.write(num_bytes)
            half.append((time.perf_counter() - start) / 2 * 1e6)
        half = sorted(half[rounds // 10 :])
        p50, p99 = half[len(half) // 2], half[len(half) * 99 // 100]
        return {
            "what": "latency",
            "bytes": num_bytes,
            "p50_us": p50,
            "p99_us": p99,
            "iterations": len(half),
        }

    def bandwidth(self, num_bytes: int, count: int) -> Figure | None:
        if not self.first:
            self.engine.expect(IMM, count).wait()
            self.write(8).wait()
            return None
        transfers: list[Any] = []
        start = time.perf_counter()
        for i in range(count):
            if i >= DEPTH:
                transfers[i - DEPTH].wait()
            transfers.append(self.write(num_bytes))
        for transfer in transfers[-DEPTH:]:
            transfer.wait()
        seconds = time.perf_counter() - start
        self.engine.expect(IMM).wait()
        gb_per_s = num_bytes * count / seconds / 1e9
        return {
            "what": "bandwidth",
            "bytes": num_bytes,
            "gb_per_s": gb_per_s,
            "writes_per_s": count / seconds,
        }


def _uint8() -> Any:
    import torch

    return torch.uint8


def python_layer(
    wire: Connection, transport: str, interface: str, seconds: float, first: bool
) -> None:
    """Body of both processes; the first prints its figures as JSON lines."""
    end = PythonEnd(wire, transport, None if interface == "-" else interface, first)
    figures = [
        *(end.latency(size, max(20, int(seconds * min(5000, 2e9 / size)))) for size in SIZES),
        *(
            end.bandwidth(size, max(DEPTH, int(seconds * min(5000, 2e9 / size))))
            for size in SIZES[1:]
        ),
    ]
    wire.send(None)
    wire.recv()
    end.engine.close()
    for figure in figures if first else []:
        print(json.dumps(figure), flush=True)


def python_main(transport: str, interface: str, seconds: float) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(
        target=python_layer, args=(theirs, transport, interface, seconds, False)
    )
    other.start()
    theirs.close()  # if the other dies, recv here ends
    python_layer(ours, transport, interface, seconds, True)
    other.join(10)


# --- running all of them ---------------------------------------------------------------------------


def commands(transport: str, interface: str, seconds: float) -> dict[str, list[str]]:
    """By layer. Compiles what is needed. Raises BenchError."""
    fabric = next(t for t in _engine.transports() if t["name"] == "fabric:shm")
    have_fabric = "compiled without" not in fabric["reason"]
    sources = [
        HERE / "engine_pingpong.cpp",
        *(
            CSRC / f"{name}.cpp"
            for name in (
                *("engine", "proxy", "proxy_calls", "proxy_rings", "mapped_ring"),
                *("memory", "topology"),
            )
        ),
    ]
    sources += sorted((CSRC / "backends").glob("*.cpp"))
    flags = ["-O3", "-std=c++20", f"-I{CSRC}", f"-DMOE_COMM_HAVE_FABRIC={int(have_fabric)}"]
    program = str(compile_cpp(sources, flags, ["-ldl", "-lpthread"], sorted(CSRC.rglob("*.hpp"))))
    layers = {
        layer: [program, transport, interface, layer, str(seconds)]
        for layer in ("transport", "ring", "user", "cost")
    }
    if transport == "shm":
        layers["floor"] = [program, transport, interface, "memcpy", str(seconds)]
    elif transport.startswith("fabric:"):  # verbs has none
        built = compile_cpp([HERE / "fabric_floor.cpp"], ["-O2", "-std=c++20"], ["-lfabric"])
        layers["floor"] = [str(built), transport.removeprefix("fabric:"), interface]
        if transport.startswith("fabric:tcp"):
            layers["floor+fd"] = [*layers["floor"], "fd"]
    python = [sys.executable, __file__, "--python-layer", transport, interface, str(seconds)]
    return {**layers, "python": python}


def run(command: list[str]) -> list[Figure]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=RUN_LIMIT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{Path(command[0]).name} took more than {RUN_LIMIT_S} s") from None
    if done.returncode:
        raise BenchError(
            f"{Path(command[0]).name} {' '.join(command[1:4])}: {done.stderr.strip()[-400:]}"
        )
    return [json.loads(line) for line in done.stdout.splitlines()]


def merge(rounds: Sequence[Figure]) -> Figure:
    """One figure of those of all rounds: medians, of p99 the largest."""
    merged: Figure = {}
    for name, value in rounds[0].items():
        values = [figure[name] for figure in rounds]
        if name in MEDIANS:
            merged[name] = round(statistics.median(values), 3)
        elif name == "iterations":
            merged[name] = sum(values)
        else:
            merged[name] = round(max(values), 3) if name in MAXIMA else value
    return merged


def measure(
    options: argparse.Namespace, show: Callable[[float, str], None]
) -> tuple[list[Figure], list[str]]:
    """Records, and what was left out."""
    available = {t["name"]: t for t in _engine.transports()}
    notes, plans = [], []
    for transport in options.transports:
        if not available.get(transport, {"available": False})["available"]:
            notes.append(
                f"left out: {transport}: {available.get(transport, {}).get('reason', 'unknown')}"
            )
            continue
        show(0, f"compiling for {transport}")
        interface = options.interface if ":tcp" in transport else "-"
        if transport in ("verbs", "fabric:efa"):
            interface = options.device
        try:
            found = commands(transport, interface, options.seconds)
        except BenchError as error:
            notes.append(f"left out: {transport}: {error}")
            continue
        plans += [(transport, layer, found[layer]) for layer in options.layers if layer in found]
    figures: dict[tuple[str, str], list[list[Figure]]] = {}
    for turn in range(options.rounds):
        for i, (transport, layer, command) in enumerate(plans):
            show((turn + i / len(plans)) / options.rounds, f"{transport} {layer}")
            try:
                figures.setdefault((transport, layer), []).append(run(command))
            except BenchError as error:
                notes.append(f"failed: {transport} {layer}: {error}")
    records = []
    for (transport, layer), rounds in figures.items():
        for same in zip(*rounds):
            merged = merge(same) | {"transport": transport, "layer": layer, "rounds": len(rounds)}
            records.append(record("engine", merged))
    return records, notes


# --- tables ----------------------------------------------------------------------------------------


def table(records: Sequence[Figure], transport: str, what: str) -> Table:
    here = {
        (r["layer"], r["bytes"]): r
        for r in records
        if r["transport"] == transport and r["what"] == what
    }
    layers = [layer for layer in LAYERS if any(layer == key[0] for key in here)]
    unit = "median / p99 of half a round trip" if what == "latency" else "GB/s"
    made = Table("bytes", title=f"{transport}: {what}, {unit}", title_justify="left")
    for layer in layers:
        made.add_column(layer, justify="right")
    for size in sorted({size for _, size in here}):
        cells = [here.get((layer, size)) for layer in layers]
        made.add_row(
            f"{size:,}",
            *(
                "" if c is None else f"{c['gb_per_s']:.2f}" if what == "bandwidth"
                else f"{duration_us(c['p50_us'])} / {duration_us(c['p99_us'])}"
                for c in cells
            ),
        )  # fmt: skip
    return made


def cost_table(records: Sequence[Figure]) -> Table:
    """What the proxy's thread pays, for each transport."""
    made = Table(
        "transport", "post, ns, 1 / 8 / 64 peers", "completion, ns", "commands/s", "push to sent",
        title="Proxy: 16 B with an immediate; push to sent: median / p99", title_justify="left",
    )  # fmt: skip
    for transport in dict.fromkeys(r["transport"] for r in records):
        here = [r for r in records if r["transport"] == transport]
        cost = sorted((r for r in here if r["what"] == "cost"), key=lambda r: r["peers"])
        ring = {r["what"]: r for r in here if r["layer"] == "ring"}
        taken, turn = ring.get("commands"), ring.get("turnaround")
        made.add_row(
            transport,
            " / ".join(f"{r['post_ns']:.0f}" for r in cost),
            " / ".join(f"{r['completion_ns']:.0f}" for r in cost),
            f"{taken['commands_per_s']:,.0f}" if taken else "",
            f"{duration_us(turn['p50_us'])} / {duration_us(turn['p99_us'])}" if turn else "",
        )
    return made


def duration_us(us: float) -> str:
    return f"{us:.1f} µs" if us < 100 else duration(us)


def goals_table(records: Sequence[Figure]) -> Table:
    """Nothing is asserted: machines differ."""
    by = {(r["transport"], r["layer"], r["what"], r["bytes"]): r for r in records}
    made = Table(
        "transport", "ratio or share", "measured", "goal", "", title="Goals", title_justify="left"
    )

    def judge(transport: str, text: str, value: float, bound: float, least: bool) -> None:
        good = value >= bound if least else value <= bound
        verdict = "[green]reached[/]" if good else "[red]missed[/]"
        made.add_row(transport, text, f"{value:.2f}", f"{'≥' if least else '≤'} {bound:g}", verdict)

    for transport in dict.fromkeys(r["transport"] for r in records):
        floor = by.get((transport, "floor", "bandwidth", 1 << 20))
        floor_latency = by.get((transport, "floor", "latency", 8))
        for layer in ("transport", "ring", "user"):
            own = by.get((transport, layer, "bandwidth", 1 << 20))
            if own and floor:
                judge(
                    transport,
                    f"{layer} / floor, 1 MiB bandwidth",
                    own["gb_per_s"] / floor["gb_per_s"],
                    0.9,
                    True,
                )
            smallest = 16 if layer == "ring" else 8
            own = by.get((transport, layer, "latency", smallest))
            if own and floor_latency:
                ratio = own["p50_us"] / floor_latency["p50_us"]
                judge(transport, f"{layer} / floor, {smallest} B latency", ratio, 1.3, False)
        own, floor = (by.get((transport, name, "latency", 8)) for name in ("transport", "floor+fd"))
        if own and floor:
            ratio = own["p50_us"] / floor["p50_us"]
            judge(transport, "transport / floor+fd, 8 B latency", ratio, 1.3, False)
        idle = by.get((transport, "ring", "idle", 0))
        if idle:
            judge(transport, "idle proxy, % of a core", idle["cpu_percent"], 1.0, False)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument(
        "--transports", nargs="+", default=["shm", "fabric:tcp", "fabric:shm"], metavar="NAME"
    )
    p.add_argument(
        "--layers", nargs="+", choices=LAYERS, default=LAYERS, metavar="NAME", help=f"of {LAYERS}"
    )
    p.add_argument(
        "--interface",
        default="lo",
        help="of tcp, for floor and engine alike (lo; - for their own choice)",
    )
    p.add_argument(
        "--device",
        default="-",
        help="of verbs and fabric:efa, for the engine (-: their own choice)",
    )
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument(
        "--seconds",
        type=float,
        default=0.5,
        help="about how long each figure of a round takes (0.5)",
    )
    p.add_argument("--quick", action="store_true", help="2 rounds of short figures")
    p.add_argument("--json", type=Path, metavar="FILE", help="append one JSON line for each figure")
    p.add_argument(
        "--python-layer",
        nargs=3,
        metavar=("TRANSPORT", "INTERFACE", "SECONDS"),
        help=argparse.SUPPRESS,
    )
    options = p.parse_args(argv)
    if options.python_layer:
        transport, interface, seconds = options.python_layer
        python_main(transport, interface, float(seconds))
        return 0
    if options.quick:
        options.rounds, options.seconds = 2, 0.1
    options.transports = [
        "fabric:tcp;ofi_rxm" if t == "fabric:tcp" else t for t in options.transports
    ]
    console = Console()
    with progress_bar("bench_engine") as show:
        records, notes = measure(options, show)
    for transport in dict.fromkeys(r["transport"] for r in records):
        for what in ("latency", "bandwidth"):
            console.print(table(records, transport, what))
    if any(r["what"] in ("cost", "commands") for r in records):
        console.print(cost_table(records))
    if records:
        console.print(goals_table(records))
    for note in notes:
        console.print(note, markup=False, highlight=False, style="dim")
    console.print(
        f"{machine()['cpu']}, {machine()['cores']} cores; commit {machine()['commit']}", style="dim"
    )
    if options.json:
        write_json_lines(options.json, records)
    return 0 if records else 1


if __name__ == "__main__":
    sys.exit(main())
