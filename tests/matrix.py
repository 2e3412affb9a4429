"""The matrix: what each fault led to, for each backend, hops and phase. Printed at the end of a run."""

import collections

import pytest

COLUMNS = ("shm node", "shm rank", "fabric:tcp node", "fabric:tcp rank", "verbs node", "verbs rank")


class Matrix:
    """`matrix(fault, phase, column, result)`: one cell, of a test that passes."""

    def __init__(self, properties):
        self._properties = properties

    def __call__(self, fault: str, phase: str, column: str, result: str) -> None:
        self._properties.append(("cell", (fault, phase, column, result)))


@pytest.fixture
def matrix(request):
    return Matrix(request.node.user_properties)


def pytest_terminal_summary(terminalreporter):
    cells: dict[tuple[str, str], dict[str, str]] = collections.defaultdict(dict)
    for report in terminalreporter.getreports("passed"):
        for name, cell in report.user_properties:
            if name == "cell" and report.when == "call":
                fault, phase, column, result = cell
                cells[fault, phase][column] = result
    if not cells:
        return
    write = terminalreporter.write_line
    terminalreporter.section("faults: what the ranks that are left were told, after at most")
    columns = [c for c in COLUMNS if any(c in row for row in cells.values())]
    columns += sorted({c for row in cells.values() for c in row} - set(columns))
    table = [("fault", "phase", *columns)]
    table += [(*key, *(row.get(c, "") for c in columns)) for key, row in cells.items()]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        write("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    for report in terminalreporter.getreports("failed"):
        if any(f"tests/{name}/" in report.nodeid for name in ("faults", "soft_roce")):
            write(f"FAILED  {report.nodeid}")
