"""The tables of the demo."""

from __future__ import annotations

from rich.table import Table

from .alone import Routes, Step
from .job import HIDDEN

BOUND = 2e-6  # error / largest value, float32: measured 2e-7 to 1e-6
KIND_BOUND = 1e-5  # a kind of parameters by itself, some of whose gradients are small sums of large terms: up to 2.2e-6


def steps_table(steps: list[Step]) -> Table:
    table = Table("step", "loss: 1 process", "loss: ranks", "logits: error", "gradients: error", "")
    table.title, table.title_justify = "The same training, twice", "left"
    table.caption = f"error: largest difference / largest value; bound {BOUND:.0e}"
    table.caption_justify = "left"
    for number, step in enumerate(steps, 1):
        table.add_row(
            str(number),
            f"{step.loss:.6f}",
            f"{step.loss_ranks:.6f}",
            f"{step.logits_error:.1e}",
            f"{step.gradient_error:.1e}",
            "[green]ok" if step.worst <= BOUND else "[red]OFF",
        )
    return table


def kinds_table(worst: dict[str, tuple[float, float]]) -> Table:
    table = Table(
        "gradients of", "largest gradient", "largest difference", "error", title="Every gradient"
    )
    table.title_justify = table.caption_justify = "left"
    table.caption = f"the worst step of each kind; bound {KIND_BOUND:.0e}"
    for kind, (gradient, difference) in worst.items():
        table.add_row(kind, f"{gradient:.1e}", f"{difference:.1e}", f"{difference / gradient:.1e}")
    return table


def rows_between_nodes(routes: Routes) -> tuple[int, int]:
    """What the routers' choices demand for the whole training: one row per (token, expert), per (token, node)."""
    exchanges = (
        4  # per layer and step: dispatch and combine, forward and backward, on the same routes
    )
    return exchanges * routes.pairs_away, exchanges * routes.token_nodes_away


def bytes_table(routes: Routes, stats: dict[str, int]) -> Table:
    """Rows and payload bytes of the whole training, all ranks together, against one row per (token, expert)."""
    table = Table(
        "", "rows", "MB", title="Where the bytes went", title_justify="left", caption_justify="left"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    per_expert, _ = rows_between_nodes(routes)
    for what, rows, num_bytes in (
        ("between nodes, if one row per (token, expert)", per_expert, per_expert * HIDDEN * 4),
        ("between nodes, sent: one row per (token, node)", stats["rows_link"], stats["bytes_link"]),
        ("inside the nodes, in shared memory", stats["rows_local"], stats["bytes_local"]),
    ):
        table.add_row(what, f"{rows:,}", f"{num_bytes / 1e6:.1f}")
    table.caption = (
        f"payload of all ranks: {stats['dispatches']} dispatches, {stats['combines']} combines (backward too), "
        f"{stats['writes']} writes between nodes"
    )
    if stats["bytes_link"]:
        table.caption += (
            f"; {per_expert * HIDDEN * 4 / stats['bytes_link']:.2f} x fewer bytes between nodes"
        )
    return table
