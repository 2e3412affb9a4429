"""`moe-comm bench` runs by itself, checks its methods, and writes JSON lines with the right keys; its parts alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_comm.bench import launch, parse, protocol, report

KEYS = {
    "bench", "label", "method", "backend", "layout", "operation", "ranks", "tokens", "hidden", "experts", "topk",
    "routing", "dtype", "median_us", "p10_us", "p50_us", "p90_us", "p99_us", "cpu_us", "iterations", "rounds",
    "payload_bytes", "gb_per_s", "checked", "torch_threads", "hosts", "launcher", "commit", "date", "device", "cpu",
    "cpu_mhz", "cores", "kernel", "versions", "command", "load_1m",
}  # fmt: skip


def test_two_ranks_shm_and_gloo(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    arguments = [
        *("--ranks", "2", "--tokens", "8", "--shapes", "64,8,2", "--methods", "moe_comm", "gloo"),
        *("--transports", "shm", "--layouts", "rank", "--rounds", "1", "--burst-ms", "0"),
        *("--mpi", "never"),
    ]
    command = [sys.executable, "-m", "moe_comm.bench", *arguments, "--json", str(out)]
    launched = {name for pair in launch.VARIABLES.values() for name in pair} | {launch.FOLDER}
    env = {name: value for name, value in os.environ.items() if name not in launched}
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=env)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(r.keys() >= KEYS for r in records)
    measured = {(r["method"], r["operation"]) for r in records}
    whole = {"dispatch", "combine", "both"}
    assert {operation for method, operation in measured if method == "gloo"} == whole
    assert {operation for method, operation in measured if method == "moe_comm"} == set(
        report.OPERATIONS
    )
    for r in records:
        assert r["checked"] and 0 < r["p10_us"] <= r["median_us"] <= r["p99_us"]
        assert r["gb_per_s"] == pytest.approx(r["payload_bytes"] / r["median_us"] / 1e3, abs=1e-4)
        assert "--json" in r["command"]
    assert "gloo" in done.stdout and "T 8" in done.stdout


@pytest.mark.parametrize("routing", sorted(protocol.ROUTINGS))
def test_routing_is_the_same_in_every_run_and_legal(routing: str) -> None:
    case = protocol.Case(4, 100, 64, 32, 4, routing)
    for rank, (topk_idx, topk_weights) in enumerate(case.routes):
        again = protocol.ROUTINGS[routing](case, rank)
        assert torch.equal(again[0], topk_idx) and torch.equal(again[1], topk_weights)
        assert topk_idx.shape == topk_weights.shape == (100, 4) and topk_idx.dtype == torch.int64
        assert all(len(set(row)) == 4 for row in topk_idx.tolist())
        assert 0 <= int(topk_idx.min()) <= int(topk_idx.max()) < 32
    assert not torch.equal(case.routes[0][0], case.routes[1][0])
    owners = [{expert // 8 for expert in row} for idx, _ in case.routes for row in idx.tolist()]
    assert case.rows_per_rank == sum(map(len, owners)) / 4
    assert case.payload_bytes("both") == 2 * case.payload_bytes("dispatch")


def test_skewed_routing_has_hot_experts() -> None:
    case = protocol.Case(1, 4096, 8, 32, 4, "skewed")
    counts = torch.bincount(case.routes[0][0].flatten(), minlength=32)
    assert 2.5 < float(counts.max() / counts.float().mean()) < 6


def test_percentiles_are_taken_of_the_slowest_rank() -> None:
    class Two(protocol.Ranks):
        num_ranks = 2

        def gather(self, value):  # the other rank needs a second more for each iteration
            return (
                [value, (value[0] + 1.0, value[1])] if isinstance(value, tuple) else [value, value]
            )

    loop = protocol.Loop("x", ("op",), (lambda: None,))
    times = protocol.measure([loop], protocol.Pace(rounds=2, burst_s=0, least=3), Two())["x", "op"]
    assert len(times.seconds) == 6 and 1.0 <= times.summary()["p10_us"] / 1e6 < 1.1
    assert np.all(times.seconds > 1)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (1, 4, "torchrun")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"PMI_RANK": "3", "PMI_SIZE": "8"}, (3, 8, "mpich")),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, (2, 3, "openmpi")),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_STEP_NUM_TASKS": "6"}, (5, 6, "slurm")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, None),  # an sbatch script, not started by srun
    ],
)
def test_launchers_are_recognised(env, expected) -> None:
    world = launch.find_world(env)
    assert world == (None if expected is None else launch.World(*expected))


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[07-09,12],x", "gpu07"),
        ("n[3,5]", "n3"),
        ("r1-n[01-02]-ib", "r1-n01-ib"),
    ],
)
def test_first_host_of_a_slurm_nodelist(nodelist: str, first: str) -> None:
    assert launch.first_host(nodelist) == first


def test_goals_compare_within_one_run() -> None:
    goal = report.GOALS[0]
    common = {"routing": "uniform", **goal.where}
    gloo = {**common, "label": "gloo", "launcher": "self", "median_us": 20_000.0}
    ours = {**common, "label": report.SHM, "launcher": "mpich", "median_us": 2_000.0}
    assert goal.ratio([gloo, ours]) is None
    assert (
        goal.ratio([gloo, ours | {"launcher": "self"}]) == 10
        and goal.reached(10)
        and not goal.reached(7)
    )


def test_options() -> None:
    assert parse(["--transports", "fabric:tcp"]).transports == ["fabric:tcp;ofi_rxm"]
    assert parse(["--quick"]).tokens == [128, 1024]
    with pytest.raises(SystemExit):
        parse(["--shapes", "100,4,8"])
