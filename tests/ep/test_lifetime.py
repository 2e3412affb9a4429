"""A process that ends, and one that is forked: what was sent arrives, and nobody is disturbed."""

import gc
import multiprocessing.util
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from cases import dispatch, make_case
from torch.utils.data import DataLoader

import moe_comm

OPTIONS = {"hidden": 64, "topk": 3, "num_experts": 8, "timeout_s": 30}


def _case(size):
    return make_case(size, tokens=[6] * size, topk=3, num_experts=8)


_kept: list = []  # alive until the process ends


def _keep_proxy_busy(engine, num_bytes=1 << 28):
    """Begins half a second of copying on the proxy's thread, of this process's memory to itself."""
    memory = torch.ones(2 * num_bytes, dtype=torch.uint8)
    region = engine.register(memory.data_ptr(), 2 * num_bytes)
    peer = engine.connect(engine.address)
    engine.wait_ready(peer, 10)
    there = engine.describe(region)
    writes = [(peer, region, 0, num_bytes, there, num_bytes, -1)] * 8
    threading.Thread(target=engine.write, args=(writes,), daemon=True).start()
    time.sleep(0.1)
    return memory


def _returns_at_once(rank, group):
    """Rank 0 has all it waits for before it sends, sends by a busy proxy, and ends."""
    buffer = moe_comm.Buffer(group, ranks_per_node=1, **OPTIONS)
    case = _case(group.num_ranks)
    got = dispatch(buffer, case, rank)
    if rank == 0:
        time.sleep(0.5)
        _kept.extend((buffer, _keep_proxy_busy(buffer.engine)))
    return tuple(buffer.combine(got.x, got.handle).shape)


def test_process_that_ends_without_close(run_ranks):
    """What its last call sent still arrives: in a child of multiprocessing too, where atexit is never called."""
    results = run_ranks(_returns_at_once, 2)
    assert results == [(6, 64)] * 2


def _mapped():
    """[(first, end, what)] of this process."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            addresses, *_, what = line.rstrip("\n").split(maxsplit=5) + [""] * (
                len(line.split()) < 6
            )
            first, end = (int(a, 16) for a in addresses.split("-"))
            yield first, end, what


def _whose_addresses_stay(rank, group, says_goodbye):
    """NOTE [late writes]: what a peer that was given up had on its way finds nothing else at those addresses."""
    buffer = moe_comm.Buffer(
        group,
        ranks_per_node=1,
        transport="fabric:tcp;ofi_rxm",
        window_bytes=16 << 20,
        **OPTIONS | {"timeout_s": 2},
    )
    dispatch(buffer, _case(2), rank)
    group.gather(None)
    if rank == 1:
        if not says_goodbye:
            os._exit(0)
        buffer.close()
        group.store.wait(["done"])
        return
    with pytest.raises((moe_comm.PeerLost, moe_comm.PeerTimeout)):
        dispatch(buffer, _case(2), rank)
    ((first, last),) = [(a, b) for a, b, what in _mapped() if "moe_comm:windows" in what]
    buffer.close()
    del buffer
    gc.collect()
    for _ in range(20):  # what is mapped next must not come to lie there
        _kept.append(torch.empty(last - first, dtype=torch.uint8))
    inside = [(a, b, what) for a, b, what in _mapped() if a < last and first < b]
    covered = sum(min(b, last) - max(a, first) for a, b, _ in inside)
    assert not any("moe_comm" in what for _, _, what in inside)
    reused = any(first < t.data_ptr() + t.numel() and t.data_ptr() < last for t in _kept)
    if says_goodbye:  # the addresses were given back
        assert covered < last - first or reused
    else:
        assert covered == last - first and not reused
    group.store.set("done", "1")


@pytest.mark.parametrize("says_goodbye", [False, True])
def test_addresses_of_windows_after_a_peer(run_ranks, says_goodbye):
    run_ranks(_whose_addresses_stay, 2, says_goodbye, may_die=[] if says_goodbye else [1])


def _forks(rank, group):
    """Its children neither can use what is open, nor touch it, however they end."""
    buffer = moe_comm.Buffer(group, ranks_per_node=1, **OPTIONS)
    engine = moe_comm.TransferEngine("shm")
    case = _case(group.num_ranks)
    before = dispatch(buffer, case, rank)
    children = []
    for way in ("close", "forget"):
        child = os.fork()
        if child == 0:
            try:
                with pytest.raises(moe_comm.ClosedError, match="was forked from"):
                    dispatch(buffer, case, rank)
                with pytest.raises(moe_comm.ClosedError):
                    engine.register(torch.zeros(16))
                if way == "close":
                    buffer.close()
                    engine.close()
                else:
                    del buffer, engine, before
                    multiprocessing.util._exit_function()  # what the end of a child calls
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    group.gather(None)
    again = dispatch(buffer, case, rank)
    assert torch.equal(again.x, before.x)
    buffer.combine(again.x, again.handle)
    engine.close()


def test_forked_children_touch_nothing(run_ranks):
    run_ranks(_forks, 2, timeout_s=40)


FORKS_AND_ENDS = """
import os, sys, tempfile, torch, torch.distributed as dist, moe_comm
group = moe_comm.EPGroup.from_store(dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1), 0, 1)
buffer = moe_comm.Buffer(group, hidden=64, topk=1, num_experts=2)
x, experts = torch.ones(3, 64, dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.int64)
child = os.fork()
if child == 0:
    sys.exit(0)  # all the way through the interpreter's end
assert os.waitpid(child, 0)[1] == 0
assert buffer.dispatch(x, experts, torch.ones(3, 1), num_experts=2).x.shape == (3, 64)
"""


def test_forked_child_that_ends_as_python_does():
    done = subprocess.run(
        [sys.executable, "-c", FORKS_AND_ENDS], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")


def _loads_data(rank, group):
    """As a training loop: workers that are forked after the Buffer was made, and go between two steps."""
    multiprocessing.current_process()._config["daemon"] = False  # or it may not have children
    buffer = moe_comm.Buffer(group, ranks_per_node=1, **OPTIONS)
    case = _case(group.num_ranks)
    for _ in range(2):
        for _batch in DataLoader(list(range(8)), num_workers=2, multiprocessing_context="fork"):
            got = dispatch(buffer, case, rank)
            buffer.combine(got.x, got.handle)
    return buffer.stats()["dispatches"]


def test_data_loader_workers(run_ranks):
    assert run_ranks(_loads_data, 2) == [16, 16]
