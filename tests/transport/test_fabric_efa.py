"""TransferEngine over fabric:efa by EFA's rules (tests/cpp/efa_rules.cpp): doorbells, and several NICs as one."""

import re
import threading

import pytest
import torch
from engines import join, noise, open_engine

from moe_comm import TransferEngine
from moe_comm.writes import Write


@pytest.fixture
def counts(tmp_path, monkeypatch, efa_rules):
    """`counts()`: what the endpoints closed so far counted, one dict each."""
    file = tmp_path / "counts"
    monkeypatch.setenv("MOE_COMM_LIBFABRIC", efa_rules)
    monkeypatch.setenv("EFA_RULES_COUNTS", str(file))

    def read() -> list[dict[str, int]]:
        lines = file.read_text().splitlines()
        return [{k: int(v) for k, v in re.findall(r"(\w+) (\d+)", line)} for line in lines]

    return read


def close(*members: TransferEngine) -> None:
    """At once: each drains while the others still answer."""
    threads = [threading.Thread(target=m.close) for m in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("refuse", [0, 4])
def test_one_doorbell_for_writes_that_come_together(counts, monkeypatch, refuse) -> None:
    """512 pages to two peers at once: the NIC is told once for many of them, also when it refuses some."""
    monkeypatch.setenv("EFA_RULES_REFUSE", str(refuse))
    num_pages, page = 256, 64
    members = [open_engine("fabric:efa", name=f"engine {i}") for i in range(3)]
    peers = join(*members)[0][1:]
    source = noise(num_pages * page)
    local = members[0].register(source)
    targets = [m.empty(num_pages * page, torch.uint8) for m in members[1:]]
    descriptors = [m.register(t).descriptor for m, t in zip(members[1:], targets)]
    entries = [
        Write(peer, local, descriptor, i * page, i * page, page)
        for i in range(num_pages)
        for peer, descriptor in zip(peers, descriptors)
    ]
    members[0].scatter(entries).wait()
    assert all(torch.equal(t, source) for t in targets)
    close(*members)
    writer = max(counts(), key=lambda c: c["writes"])
    assert writer["writes"] >= len(entries)
    share = 2 if refuse else 8  # a refusal ends a chain, and rings
    assert writer["doorbells"] <= writer["writes"] / share, writer
