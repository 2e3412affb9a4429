"""What people see: tables, goals, progress, a plot. Records are the JSON lines of protocol.py."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

Record = dict[str, Any]
OPERATIONS = (
    "dispatch", "combine", "both", "dispatch_send", "dispatch_receive", "combine_send",
    "combine_receive",
)  # fmt: skip


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[float, str], None]]:
    """A bar on stderr while the context lasts: call with (done of 1, text)."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=1)

        def show(done: float, text: str) -> None:
            bar.update(task, completed=done, description=text)

        yield show


def duration(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.0f} µs"
    return f"{microseconds / 1e3:.{1 if microseconds > 1e4 else 2}f} ms"


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """One table for each number of ranks, shape and routing: median and p99 by method, operation and T."""
    shapes = list(dict.fromkeys(_shape(r) for r in records))
    for shape in shapes:
        here = [r for r in records if _shape(r) == shape]
        tokens = sorted({r["tokens"] for r in here})
        ranks, hidden, experts, topk, routing, launcher = shape
        table = Table(
            title=f"{ranks} ranks ({launcher}), hidden {hidden}, top-{topk} of {experts} experts, {routing} routing: "
            "median / p99 of the slowest rank",
            title_justify="left",
        )
        for name in ("operation", "method"):
            table.add_column(name)
        for t in tokens:
            table.add_column(f"T {t}", justify="right")
        for operation in OPERATIONS:
            rows = [r for r in here if r["operation"] == operation]
            for label in dict.fromkeys(r["label"] for r in rows):
                cells = {r["tokens"]: r for r in rows if r["label"] == label}
                table.add_row(
                    operation, label, *(_cell(cells[t]) if t in cells else "" for t in tokens)
                )
            if rows:
                table.add_section()
        yield table


def _shape(r: Record) -> tuple[Any, ...]:
    return r["ranks"], r["hidden"], r["experts"], r["topk"], r["routing"], r["launcher"]


def _cell(r: Record) -> str:
    return f"{duration(r['median_us'])} / {duration(r['p99_us'])}"


# --- ratios and goals ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Goal:
    """The median of `over` divided by that of `under`, measured in one run with these values."""

    text: str
    over: str
    under: str
    bound: float
    least: bool  # the ratio should be at least `bound`, else at most
    where: dict[str, Any]

    def ratio(self, records: Sequence[Record]) -> float | None:
        wanted = {"routing": "uniform", **self.where}
        here = [r for r in records if all(r[key] == value for key, value in wanted.items())]
        medians = {(r["launcher"], r["label"]): r["median_us"] for r in here}
        for launcher, label in medians:
            if label == self.over and (launcher, self.under) in medians:
                return medians[launcher, label] / medians[launcher, self.under]
        return None

    def reached(self, ratio: float) -> bool:
        return ratio >= self.bound if self.least else ratio <= self.bound


SHM, NODES = "moe_comm shm", "moe_comm fabric:tcp 2 nodes"
_FOUR = {"operation": "both", "ranks": 4, "hidden": 2048, "topk": 4}
GOALS = (
    *(
        Goal(f"gloo / {SHM}, 4 ranks, H 2048, T {tokens}", "gloo", SHM, bound, True, _FOUR | {"tokens": tokens})
        for tokens, bound in ((128, 8.0), (1024, 6.0))
    ),
    *(
        Goal(f"{SHM} / floor, 4 ranks, H 2048, T {tokens}", SHM, "floor", 2.5, False, _FOUR | {"tokens": tokens})
        for tokens in (128, 1024)
    ),
    *(
        Goal(f"gloo / {NODES}, 4 ranks, H 2048, T {tokens}", "gloo", NODES, 1.5, True, _FOUR | {"tokens": tokens})
        for tokens in (128, 1024)
    ),
    Goal(
        f"dispatch alone, {SHM} / mpi Alltoallv, 2 ranks, H 7168, T 128", SHM, "mpi", 1.5, False,
        {"operation": "dispatch", "ranks": 2, "hidden": 7168, "tokens": 128},
    ),
)  # fmt: skip


def goals_table(records: Sequence[Record]) -> Table | None:
    """Which goals this run can judge, and how they stand. Nothing is asserted: machines differ."""
    table = Table(
        "ratio of medians, dispatch + combine",
        "measured",
        "goal",
        "",
        title="Goals",
        title_justify="left",
    )
    judged = [(goal, ratio) for goal in GOALS if (ratio := goal.ratio(records)) is not None]
    for goal, ratio in judged:
        verdict = "[green]reached[/]" if goal.reached(ratio) else "[red]missed[/]"
        sign = "≥" if goal.least else "≤"
        table.add_row(goal.text, f"{ratio:.2f}", f"{sign} {goal.bound:g}", verdict)
    return table if judged else None


def ratio_table(records: Sequence[Record]) -> Table | None:
    """Every method's median over that of moe_comm on shared memory, same layout, dispatch + combine."""
    both = [r for r in records if r["operation"] == "both"]
    table = Table("ranks", "H", "routing", "method", title_justify="left")
    table.title = f"dispatch + combine: how many times the median of {SHM} (of {SHM} expert where the name says so)"
    tokens = sorted({r["tokens"] for r in both})
    for t in tokens:
        table.add_column(f"T {t}", justify="right")
    for shape in dict.fromkeys(_shape(r) for r in both):
        here = {(r["label"], r["tokens"]): r["median_us"] for r in both if _shape(r) == shape}
        for label in dict.fromkeys(label for label, _ in here if label != SHM):
            base = SHM + (
                " expert" if label.endswith(" expert") and label != f"{SHM} expert" else ""
            )
            cells = [
                f"{here[label, t] / here[base, t]:.2f}"
                if {(label, t), (base, t)} <= here.keys()
                else ""
                for t in tokens
            ]
            if any(cells):
                table.add_row(str(shape[0]), str(shape[1]), shape[4], label, *cells)
    return table if table.row_count else None


def plot(records: Sequence[Record], path: Path) -> str:
    """Medians of dispatch + combine over T, one panel for each number of ranks and shape. Returns what became of it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no plot: matplotlib is not installed"
    both = [r for r in records if r["operation"] == "both"]
    if not both:
        return "no plot: nothing measured dispatch + combine"
    shapes = list(dict.fromkeys(_shape(r) for r in both))
    figure, axes = plt.subplots(1, len(shapes), figsize=(5 * len(shapes), 4), squeeze=False)
    for axis, shape in zip(axes[0], shapes):
        here = [r for r in both if _shape(r) == shape]
        for label in dict.fromkeys(r["label"] for r in here):
            points = sorted((r["tokens"], r) for r in here if r["label"] == label)
            x = [t for t, _ in points]
            axis.loglog(x, [r["median_us"] for _, r in points], "o-", label=label)
            axis.fill_between(
                x, [r["p10_us"] for _, r in points], [r["p90_us"] for _, r in points], alpha=0.15
            )
        axis.set_title(
            f"{shape[0]} ranks, H {shape[1]}, top-{shape[3]} of {shape[2]}, {shape[4]}", fontsize=9
        )
        axis.set_xlabel("tokens per rank")
        axis.set_ylabel("dispatch + combine, µs (p10 to p90)")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return f"plot: {path}"
