"""What the tests of TransferEngine share: the fixtures `transport` and `engines`, peers, and looks at this process.

Fixtures are imported by name and not by a conftest.py: a second module of that name would hide the first.
"""

import contextlib
import os
import threading

import pytest
import torch

from moe_comm import TransferEngine, _engine

SECRET = 0x5EC7E7
LOST_S = 2.0  # until a killed peer is an error


def why_not(name: str) -> str:
    """Why a transport cannot be used here, or an empty string."""
    for report in _engine.transports():
        if report["name"] == name:
            return "" if report["available"] else report["reason"]
    return f"{name} was not built in"


def open_engine(transport: str, **options) -> TransferEngine:
    if transport.startswith("fabric:tcp"):
        options.setdefault("interface", "lo")
    return TransferEngine(transport, **{"secret": SECRET, "timeout_s": 10.0, **options})


@pytest.fixture(params=["shm", "fabric:tcp;ofi_rxm"])
def transport(request) -> str:
    reason = why_not(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def engines(transport):
    """`engines(n)`: n engines of this process, closed afterwards."""
    with contextlib.ExitStack() as stack:
        yield lambda n, **options: [
            stack.enter_context(open_engine(transport, name=f"engine {i}", **options))
            for i in range(n)
        ]


def join(*members: TransferEngine):
    """peers[i][j]: engine j as engine i sees it."""
    return [[None if a is b else a.connect(b.address) for b in members] for a in members]


def noise(num_bytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def own_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm") as comm:
            names.append(comm.read().strip())
    return [name for name in names if name.startswith("moe_comm")]


def meet(members: list[TransferEngine]) -> None:
    threads = [threading.Thread(target=lambda m=m: m.barrier(m.peers)) for m in members[1:]]
    for thread in threads:
        thread.start()
    members[0].barrier(members[0].peers)
    for thread in threads:
        thread.join()
