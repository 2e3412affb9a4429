"""Every Triton kernel compiled for sm_80, sm_90 and sm_100 (no device needed): that it compiles, and what it became."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "launches.py"
ARCHITECTURES = [80, 90, 100]
MOVES_ROWS = {
    "pack_rows", "pack_casts", "forward_rows", "unpack_rows", "reduce_rows", "cast_rows", "uncast_rows", "logfmt_rows",
}  # fmt: skip
pytestmark = pytest.mark.timeout(400)  # the first one compiles
MAX_REGISTERS = 128  # of 255: four CTAs of 128 threads on an SM, whatever else they need


@pytest.fixture(scope="module")
def compiled(request):
    """[{kernel, arch, unit, …}], the lines of launches.py. Its results are kept in pytest's cache."""
    pytest.importorskip("triton", reason="Triton is not installed (make test-kernels installs it)")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cache = request.config.cache.mkdir("triton")
    command = [sys.executable, str(SCRIPT), str(cache), *map(str, ARCHITECTURES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_architecture(compiled):
    names = {entry["kernel"] for entry in compiled}
    assert names >= MOVES_ROWS | {
        "route_count", "route_number", "count_rounds", "add_rounds", "count_keys", "number_links", "place_copies",
        "scatter_lanes", "offsets_of", "gather_columns",
    }  # fmt: skip
    for name in names:
        arches = {entry["arch"] for entry in compiled if entry["kernel"] == name}
        assert arches == set(ARCHITECTURES), name


def test_registers_are_bounded_and_what_moves_rows_spills_nothing(compiled):
    for entry in compiled:
        # ptxas for sm_100 keeps three scalars of route_count in memory, read once per program
        most = 0 if entry["kernel"] in MOVES_ROWS else 32
        assert entry["registers"] <= MAX_REGISTERS and entry["spilled"] <= most, entry


def test_rows_are_moved_by_16_byte_accesses(compiled):
    moved = [e for e in compiled if e["kernel"] in MOVES_ROWS and (e["unit"] or 0) > 1]
    assert {e["kernel"] for e in moved} == MOVES_ROWS
    for entry in moved:
        assert entry["vector_loads"] and entry["vector_stores"], entry


def test_windows_are_not_read_through_the_read_only_path(compiled):  # H6
    assert not any(entry["read_only_loads"] for entry in compiled)


def test_sums_are_not_fused_and_nothing_is_ordered_by_atomics(compiled):
    for entry in compiled:
        assert not entry["atomics"], entry
        if entry["kernel"] == "reduce_rows":
            assert not entry["fused"], entry


def test_casts_use_hardware_where_there_is_one(compiled):
    for entry in compiled:
        if entry["kernel"] in ("pack_casts", "cast_rows"):
            assert bool(entry["fp8_casts"]) == entry["hardware"], entry
    assert {e["arch"] for e in compiled if e["hardware"]} == {90, 100}
    assert {e["arch"] for e in compiled if e["hardware"] is False} == {80, 90, 100}
