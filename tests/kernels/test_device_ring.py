"""DeviceRing: commands and armed waits, by kernels as threads of the host, and on a GPU where there is one."""

import pytest
import torch
from host_device import run_on_host
from test_kernels import random_bytes

from moe_comm import ArgumentError, ClosedError, PeerTimeout, TransferEngine
from moe_comm.kernels import fused

# --- a ring and its waits ------------------------------------------------------------------------


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, library, monkeypatch):
    if request.param == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr(fused, "run", fused.run)
    monkeypatch.setattr(fused, "stream_wait", fused.stream_wait)
    run_on_host(library._name)
    return torch.device("cpu")


class Unpacked:
    """A kernel behind an armed wait: did it run?"""

    def __init__(self, ring, word):
        self.rows = random_bytes(3, 48, seed=1).to(ring.device)
        self.out = torch.zeros(3, 16, dtype=torch.int16, device=ring.device)
        self.tables = [
            torch.tensor(values, dtype=dtype, device=ring.device)
            for values, dtype in (
                ([self.rows.data_ptr()], torch.int64),
                ([3], torch.int32),
                ([0], torch.int32),
            )
        ]
        self.words = torch.zeros(2, dtype=torch.int64, device=ring.device)  # arrived, epoch
        window, count, start = self.tables
        release = fused.Release(
            arrived=self.words.data_ptr(),
            epoch=self.words[1:].data_ptr(),
            waited=ring.status_address(word),
        )
        arguments = fused.Unpack(
            windows=window.data_ptr(), num_sources=1, num_rows=count.data_ptr(), starts=start.data_ptr(), row_bytes=48,
            payload_bytes=32, out_x=self.out.data_ptr(), release=release,
        )  # fmt: skip
        fused.launch("moe_comm_dispatch_unpack", arguments, device=ring.device)

    def ran(self):
        got, want = self.out.view(torch.uint8).cpu(), self.rows[:, :32].cpu()
        assert torch.equal(got, want) or not got.any()
        return torch.equal(got, want)


def test_stream_waits(device):
    """A wait that ends well, one that its source is late for, and those that come after it."""
    came = torch.zeros(2, dtype=torch.int64)
    with (
        TransferEngine("shm") as engine,
        engine.device_ring(device, num_words=4, timeout_s=5.0) as ring,
    ):
        late = engine.native.open_wait(
            "dispatch", "rank 0", [(came.data_ptr(), -1, "rank 1 (node 1)", 0)], []
        )
        assert ring.status(0) is None
        came[1] = 7
        behind = []
        for word, epoch in enumerate((7, 9, 7)):
            ring.arm(late, epoch, word, timeout_s=0.3)
            ring.stream_wait(word)
            behind.append(Unpacked(ring, word))
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert [ring.status(word) for word in range(4)] == ["ok", "timeout", "aborted", "aborted"]
        assert [b.ran() for b in behind] == [True, False, False]
        for _ in range(2):
            with pytest.raises(PeerTimeout) as caught:
                ring.raise_fault()
        assert str(caught.value) == (
            "dispatch epoch 9, rank 0 waited 0.3 s for rank 1 (node 1): not complete; 0 of 0 other sources complete"
        )
        engine.check()
        stats = ring.stats()
        assert (stats["armed"], stats["ended"], stats["failed"]) == (2, 2, 1)


def test_the_end_of_a_ring(device):
    with TransferEngine("shm") as engine:
        with pytest.raises(ArgumentError, match=r"num_slots: expected a power of two, .* got 3"):
            engine.device_ring(device, num_slots=3)
        ring, other = (engine.device_ring(device, num_words=2, timeout_s=5.0) for _ in range(2))
        with pytest.raises(ArgumentError, match="word: expected 0 to 1, got 2"):
            ring.status_address(2)
        came = torch.zeros(2, dtype=torch.int64)
        sources = [(came.data_ptr(), -1, "rank 1", 0)]
        never = engine.native.open_wait("dispatch", "rank 0", sources, [])
        ring.arm(never, 4)
        ring.close()
        ring.close()
        ring.stream_wait()
        ring.arm(never, 4, 1)
        ring.stream_wait(1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert [ring.status(w) for w in (0, 1)] == ["aborted"] * 2
        with pytest.raises(ClosedError, match="the ring was closed"):
            ring.raise_fault()
        other.raise_fault()
    with pytest.raises(ClosedError, match="the engine is closed"):
        other.raise_fault()
    with pytest.raises(ClosedError):
        engine.device_ring(device)
