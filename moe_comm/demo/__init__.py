"""`moe-comm demo`: train a small MoE model over several processes, and compare it with one process.

Each rank is a process of its own; by default four of them play two nodes of two ranks. All build the same randomly
initialised Qwen3-MoE (float32) and train it on text that ships with Python: data-parallel but for the experts, which
are expert-parallel. This process trains the same model alone on the whole batch. At each step the loss, the logits of
every rank and every gradient are compared; the largest error has to stay below BOUND, which is rounding. Two things
keep it a comparison of the same thing:
- Each step starts from the same weights, bit for bit: this process computes its own gradients, compares them, and then
  steps with those of the ranks. (Left alone, float32 training doubles its rounding errors every few steps.)
- A token goes to different experts if two of them score the same but for rounding. That is no error; `Alone.next_batch`
  passes over such a batch, judged by the single process before a rank has seen it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .alone import Alone, Step
from .job import HIDDEN, NUM_EXPERTS, SEQ_LEN, SEQS_PER_RANK, TOPK, Job, load_text, quieten
from .ranks import DemoError, Ranks
from .report import BOUND, KIND_BOUND, bytes_table, kinds_table, rows_between_nodes, steps_table

START_DEADLINE_S = 120.0
STEP_DEADLINE_S = 1.25  # per layer and step; a tenth of it is usual


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with these arguments (default: the command line's). Returns 0 (PASS) or 1 (FAIL)."""
    args = _parse(argv)
    console = Console()
    try:
        import transformers.distributed.expert_parallel  # noqa: F401
    except ImportError as error:
        console.print(
            f"[red]The demo needs transformers >= 5.23:[/] pip install 'transformers>=5.23'"
            f"\n{escape(str(error))}"
        )
        return 1
    deadline_s = START_DEADLINE_S + STEP_DEADLINE_S * args.steps * args.layers
    with tempfile.TemporaryDirectory(prefix="moe_comm-demo-") as folder:
        job = Job(
            args.ranks, args.ranks_per_node, args.steps, args.layers, args.layout, f"{folder}/store"
        )
        try:
            return _run(job, Path(folder), deadline_s, console)
        except DemoError as error:
            console.print(_verdict(False, escape(str(error))), highlight=False, soft_wrap=True)
            return 1
        except KeyboardInterrupt:
            return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="moe-comm demo", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--ranks", type=int, default=4, help=f"processes; a divisor of {NUM_EXPERTS} (default 4)"
    )
    parser.add_argument(
        "--ranks-per-node", type=int, default=2, help="pretend nodes of so many ranks (default 2)"
    )
    parser.add_argument("--steps", type=int, default=10, help="training steps (default 10)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (default 4)")
    parser.add_argument(
        "--layout",
        choices=("expert", "rank"),
        default="expert",
        help="how ranks receive tokens (default expert)",
    )
    args = parser.parse_args(argv)
    if args.ranks < 1 or NUM_EXPERTS % args.ranks:
        parser.error(f"--ranks: expected a divisor of {NUM_EXPERTS}, got {args.ranks}")
    if args.ranks_per_node < 1 or args.ranks % args.ranks_per_node:
        parser.error(
            f"--ranks-per-node: expected a divisor of {args.ranks}, got {args.ranks_per_node}"
        )
    if args.steps < 1 or args.layers < 1:
        parser.error("--steps, --layers: expected at least 1")
    return args


def _run(job: Job, folder: Path, deadline_s: float, console: Console) -> int:
    from moe_comm.bench import small_table

    quieten()
    nodes = job.ranks // job.ranks_per_node
    console.print(
        f"[bold]moe_comm demo[/]: {job.ranks} processes as {nodes} node(s) of {job.ranks_per_node} rank(s), "
        f"and one process alone"
    )
    with Ranks(job, folder, deadline_s) as ranks:
        source, text = load_text()
        alone = Alone(job, text)
        console.print(
            f"Qwen3-MoE, random weights, float32: {job.layers} layers, {NUM_EXPERTS} experts "
            f"(top-{TOPK}), hidden {HIDDEN}, {alone.num_parameters / 1e6:.1f} M parameters\n"
            f"text: Python's {source}, {job.ranks * SEQS_PER_RANK} x {SEQ_LEN} bytes a step"
        )
        steps = _train(job, ranks, alone, console)
        stats = ranks.receive("stats")
        total = {key: sum(rank[key] for rank in stats) for key in stats[0]}
    passed = _show(steps, alone, total, console)
    small_table()
    return 0 if passed else 1


def _show(steps: list[Step], alone: Alone, total: dict[str, int], console: Console) -> bool:
    """The tables, and whether everything is as it should be."""
    worst = max(step.worst for step in steps)
    kinds = {
        kind: max((step.kinds[kind] for step in steps), key=lambda g: g[1] / g[0])
        for kind in steps[0].kinds
    }
    worst_kind = max(difference / gradient for gradient, difference in kinds.values())
    _, demanded = rows_between_nodes(alone.routes)
    equal, exact = worst <= BOUND and worst_kind <= KIND_BOUND, total["rows_link"] == demanded
    console.print(steps_table(steps))
    console.print(kinds_table(kinds))
    console.print(
        _verdict(equal, f"largest error {worst:.1e}, of one kind {worst_kind:.1e}") + "\n"
    )
    console.print(bytes_table(alone.routes, total))
    rows = f"{total['rows_link']:,} rows between nodes, {demanded:,} demanded by the routing"
    console.print(_verdict(exact, rows) + "\n")
    return equal and exact


def _verdict(passed: bool, what: str) -> str:
    return f"{'[green bold]PASS[/]' if passed else '[red bold]FAIL[/]'}: {what}"


def _train(job: Job, ranks: Ranks, alone: Alone, console: Console) -> list[Step]:
    """Both trainings, step by step, side by side."""
    steps: list[Step] = []
    text = TextColumn("{task.description}")
    with Progress(
        text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("starting the ranks", total=job.steps)
        ranks.receive("ready")
        for _ in range(job.steps):
            ranks.send(alone.next_batch().numpy())
            alone.backward()
            steps.append(alone.compare_and_step(ranks.receive("step")))
            progress.update(task, advance=1, description=f"training, loss {steps[-1].loss:.3f}")
    return steps
