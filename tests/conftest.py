"""Fixtures: ranks as processes (`run_ranks`) and ranks as threads (`run_threads`).

Processes come from a fork server that has torch and moe_comm imported, so a group of four costs 0.1 s, not 10.
"""

import multiprocessing
import os
import threading
import time
import traceback
from multiprocessing.connection import wait as wait_for

import efa_rules as shim
import pytest
import through
import torch
from matrix import matrix, pytest_terminal_summary  # noqa: F401
from rank_process import rank_main

import moe_comm

# MOE_COMM_TEST_START=fork: where importing torch a second time takes a minute.
_context = multiprocessing.get_context(os.environ.get("MOE_COMM_TEST_START", "forkserver"))
_context.set_forkserver_preload(
    ["torch", "torch.distributed", "pytest", "hypothesis", "moe_comm", "moe_comm.deep_ep"]
)


def pytest_addoption(parser):
    parser.addoption(
        "--through", choices=through.KINDS, help="tests/ep: move tensors of public calls to this device and back"
    )  # fmt: skip


def pytest_configure(config):
    kind = config.getoption("--through")
    if kind:
        os.environ[through.VARIABLE] = kind  # for the ranks' processes
        through.install(kind)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(f"no GPU that torch {torch.__version__} can use")


class RanksFailed(AssertionError):
    pass


@pytest.fixture
def run_ranks(tmp_path):
    """`run_ranks(fn, n, *args, timeout_s=60, may_die=())`: the results of fn(rank, group, *args) in n processes.

    fn is a module-level function. At the first failure, or at the deadline, the rest are killed, and every rank's
    traceback is in the error. Ranks in `may_die` may end without a result (None).
    """
    started = []
    counter = iter(range(1000))

    def run(fn, num_ranks, *args, timeout_s=60, may_die=()):
        store_path = str(tmp_path / f"store{next(counter)}")
        environment = {k: v for k, v in os.environ.items() if k.startswith("MOE_COMM_")}
        pipes, processes = [], []
        for rank in range(num_ranks):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=rank_main,
                args=(fn, rank, num_ranks, store_path, theirs, environment, args),
                daemon=True,
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        started.extend(processes)
        results, errors = [None] * num_ranks, {}
        open_pipes = dict(zip(pipes, range(num_ranks)))
        slowness = float(os.environ.get("MOE_COMM_TEST_SLOWNESS", "1"))
        deadline = time.monotonic() + timeout_s * slowness
        grace = None
        while open_pipes and time.monotonic() < (grace or deadline):
            for pipe in wait_for(list(open_pipes), timeout=0.2):
                rank = open_pipes.pop(pipe)
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    processes[rank].join(5)
                    if rank not in may_die:
                        errors[rank] = (
                            f"ended without a result, exit code {processes[rank].exitcode}"
                        )
                    continue
                if kind == "ok":
                    results[rank] = value
                else:
                    errors[rank] = value
            if errors and grace is None:
                grace = min(
                    deadline, time.monotonic() + 5 * slowness
                )  # the others may say why, too
        for rank in open_pipes.values():
            errors[rank] = "did not end: killed"
        if errors:
            for process in processes:
                process.kill()
            text = "\n".join(f"--- rank {rank}\n{errors[rank]}" for rank in sorted(errors))
            raise RanksFailed(text)
        for process in processes:
            process.join(10)
            assert process.exitcode is not None, "a rank gave its result but does not end"
        return results

    run.processes = started
    yield run
    for process in started:
        if process.is_alive():
            process.kill()
        process.join(5)


@pytest.fixture
def run_threads():
    """`run_threads(fn, n, timeout_s=60, **options)`: fn(buffer, rank) in n threads, one Buffer each."""

    def run(fn, num_ranks, timeout_s=60, **options):
        groups = moe_comm.EPGroup.threads(num_ranks)
        results, errors = [None] * num_ranks, {}

        def body(rank):
            try:
                with moe_comm.Buffer(groups[rank], **{"timeout_s": 20.0, **options}) as buffer:
                    results[rank] = fn(buffer, rank)
            except BaseException:
                errors[rank] = traceback.format_exc()

        threads = [threading.Thread(target=body, args=(r,), daemon=True) for r in range(num_ranks)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout_s
        for rank, thread in enumerate(threads):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                errors.setdefault(rank, "did not end")
        if errors:
            raise RanksFailed("\n".join(f"--- rank {r}\n{errors[r]}" for r in sorted(errors)))
        return results

    return run


@pytest.fixture(scope="session")
def efa_rules(request) -> str:
    """The library that MOE_COMM_LIBFABRIC names to have EFA's rules over tcp (tests/cpp/efa_rules.cpp)."""
    if not shim.has_fabric_headers():
        pytest.skip("no headers of libfabric, 1.17 or newer")
    return str(shim.build(request.config.cache.mkdir("efa_rules")))


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Every test: nothing of ours stays in /dev/shm."""
    before = set(os.listdir("/dev/shm"))
    yield
    left = [name for name in set(os.listdir("/dev/shm")) - before if "moe" in name]
    assert not left, f"left in /dev/shm: {left}"
