"""The backends of the matrix; which rows are slow; and, over NICs, that no rank leaves a queue pair behind."""

import time
from pathlib import Path

import pytest
from job import rdma_objects
from rows import BACKENDS, why_not

HERE = Path(__file__).resolve().parent

DEFAULT = {
    "shm node dispatch",
    "shm rank combine",
    "fabric:tcp rank dispatch",
    "fabric:tcp node combine",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Without `slow`: each fault over each backend, with each hops and each phase, but not all of them together."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if item.path.parent != HERE or not {"backend", "hops"} <= set(params):
            continue
        row = f"{params['backend']} {params['hops']} {params.get('phase', '')}".strip()
        default = row in DEFAULT
        if item.name.startswith("test_stopped"):
            default = default and "node" in row
        if "phase" not in params:
            default = params["hops"] == "rank" or item.name.startswith("test_nobody")
        if not default:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=BACKENDS)
def backend(request):
    if reason := why_not(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return "fabric:tcp;ofi_rxm" if request.param == "fabric:tcp" else request.param


@pytest.fixture(autouse=True)
def no_queue_pair_is_left(request):
    """Over verbs: not even of a rank that was killed."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if not params.get("backend", "").startswith("verbs"):
        yield
        return
    before = len(rdma_objects("qp"))
    yield
    deadline = time.monotonic() + 10
    while len(now := rdma_objects("qp")) != before:
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
