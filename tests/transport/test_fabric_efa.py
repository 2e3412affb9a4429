"""TransferEngine over fabric:efa by EFA's rules (tests/cpp/efa_rules.cpp): doorbells, and several NICs as one."""

import re
import threading

import pytest
import torch
from efa_rules import sysfs_with_nics
from engines import join, noise, open_engine

from moe_comm import ArgumentError, TransferEngine
from moe_comm.writes import Write


@pytest.fixture
def counts(tmp_path, monkeypatch, efa_rules):
    """`counts()`: what the endpoints closed so far counted, one dict each."""
    file = tmp_path / "counts"
    monkeypatch.setenv("MOE_COMM_LIBFABRIC", efa_rules)
    monkeypatch.setenv("EFA_RULES_COUNTS", str(file))

    def read() -> list[dict[str, int]]:
        lines = file.read_text().splitlines() if file.exists() else []
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
    """The NIC is told once for many of them, also when it refuses some. How many depends on when the proxy's turns
    fall, so the best of several times counts."""
    monkeypatch.setenv("EFA_RULES_REFUSE", str(refuse))
    share = 2 if refuse else 8  # a refusal ends a chain, and rings
    seen = []
    while len(seen) < 10 and not any(w["doorbells"] <= w["writes"] / share for w in seen):
        seen.append(pages_to_two_peers(counts))
    assert any(w["doorbells"] <= w["writes"] / share for w in seen), seen


def pages_to_two_peers(counts) -> dict[str, int]:
    """What the endpoint counted that wrote 512 pages at once."""
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
    before = len(counts())
    close(*members)
    writer = max(counts()[before:], key=lambda c: c["writes"])
    assert writer["writes"] >= len(entries)
    return writer


NICS = ("rdmap0s6", "rdmap1s6", "rdmap2s6")


@pytest.mark.parametrize("by", ["transport", "interface", "default"])
def test_several_nics_carry_parts_of_one_write(counts, monkeypatch, tmp_path, by) -> None:
    """Named in the transport or as the interface, or found in sysfs; each NIC takes its share."""
    monkeypatch.setenv("EFA_RULES_NICS", ",".join(NICS))
    monkeypatch.setenv("EFA_RULES_REFUSE", "0")  # a write that one NIC refuses goes to the next
    monkeypatch.setenv("MOE_COMM_SYSFS", sysfs_with_nics(tmp_path / "sys", *NICS))
    names = "+".join(NICS)
    transport = f"fabric:efa:{names}" if by == "transport" else "fabric:efa"
    interface = names if by == "interface" else ""
    a, b = (
        open_engine(transport, interface=interface, name=f"engine {i}") for i in range(2)
    )  # fmt: skip
    assert a.native.transport == "+".join(f"fabric:efa@{name}-rdm" for name in NICS)
    peer = join(a, b)[0][1]
    source = noise(30 * 1000)
    target = b.empty(30 * 1000, torch.uint8)
    local, descriptor = a.register(source), b.register(target).descriptor
    a.scatter([
        Write(peer, local, descriptor, i * 1000, i * 1000, 1000, imm=5) for i in range(30)
    ]).wait()  # fmt: skip
    b.expect(5, 30).wait()
    assert torch.equal(target, source)
    close(a, b)
    writers = sorted(c["writes"] for c in counts())[-3:]
    assert min(writers) >= 10, writers


def test_a_nic_that_is_not_there(counts, monkeypatch) -> None:
    monkeypatch.setenv("EFA_RULES_NICS", ",".join(NICS))
    with pytest.raises(ArgumentError, match=r"expected one of rdmap0s6-rdm, .* got rdmap9s9"):
        open_engine("fabric:efa:rdmap0s6+rdmap9s9")
