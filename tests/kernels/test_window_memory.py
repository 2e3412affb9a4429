"""Where windows of kernels lie: a device's memory, through a driver made of host memory; who cannot, and what then."""

import gc
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import apart
import pytest
import torch
from host_device import run_on_host
from test_kernel_buffer import at_home, moved

import moe_comm
from moe_comm import (
    ArgumentError,
    PeerError,
    TransportError,
    memory,
    window_memory,
)
from moe_comm.deep_ep.refuse import take_part
from moe_comm.dispatch import DISPATCH
from moe_comm.kernels import fused

sys.path.append(str(Path(__file__).resolve().parents[1] / "ep"))
from cases import check_dispatched, dispatch, expected, make_case, same

SIZES = {"hidden": 64, "topk": 3, "num_experts": 8, "max_tokens": 10, "timeout_s": 10}
ORDERING = 118


@pytest.fixture(scope="module")
def driver_path(tmp_path_factory):
    return apart.build(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def libraries(library, driver_path):
    return library._name, driver_path


def start(libraries, kind=apart.OnHost):
    kernels, driver = libraries
    run_on_host(kernels)
    window_memory.KINDS["cpu"] = kind
    return apart.use_driver(driver)


def two_calls(buffer, rank, num_ranks):
    case = make_case(num_ranks, layout="expert", seed=3, tokens=9)
    want = expected(case)
    got = dispatch(buffer, case, rank)
    check_dispatched(got, want, rank)
    assert same(buffer.dispatch(case.xs[rank] * 2, handle=got.handle, layout="expert").x, got.x * 2)


# --- exchanges -----------------------------------------------------------------------------------


def _apart(rank, group, libraries, options, by_network, kind=None):
    """`by_network`: the network reaches the device's memory; None: as what it is."""
    if kind is not None and by_network:
        os.environ["EFA_RULES_HMEM"] = "1"  # what libfabric is made for
    driver = start(libraries, kind or (apart.OnHost if by_network else window_memory.CudaMemory))
    asked = "device" if by_network else "auto"
    buffer = moe_comm.Buffer(group, device="cpu", windows=asked, **options, **SIZES)
    assert buffer.windows == ("device" if by_network else "device in a node")
    at = buffer.layout.offsets("all" if by_network else "near")
    segment = -(-at["segment"] // 4096) * 4096
    assert buffer.native.segment[3] == segment, "in the segment lies only what must"
    assert at["apart"] <= buffer.window_memory.num_bytes
    near = [r for r in range(group.num_ranks) if r != rank and buffer.topology.is_local(r)]
    assert (driver.pretend_allocated(), driver.pretend_opened()) == (1, len(near))
    two_calls(buffer, rank, group.num_ranks)
    x, idx = torch.zeros(4, 64, dtype=torch.bfloat16), torch.full((4, 3), -1)
    with pytest.raises(ArgumentError if rank == 0 else PeerError, match="topk_idx"):
        buffer.dispatch(x, idx + 100 * (rank == 0), num_experts=8)
    # All refuse: each learns from headers in windows that it was not alone.
    with mock.patch.object(buffer.window_memory, "read", wraps=buffer.window_memory.read) as read:
        another = str(take_part(buffer, DISPATCH, f"rank {rank} will not"))
    assert read.call_count >= 1 + len(near), "the host reads no window by itself"
    del read
    assert group.num_ranks == 1 or " will not" in another
    two_calls(buffer, rank, group.num_ranks)
    buffer.close()
    assert driver.pretend_opened() == 0, "unmapped before the others may free it"
    end = time.monotonic() + 5
    while window_memory._kept and time.monotonic() < end:
        window_memory.drop_unused()
    del buffer
    gc.collect()
    assert driver.pretend_allocated() == 0
    return at["apart"]


@pytest.mark.parametrize("num_ranks, nodes, hops, by_network", [
    (1, 0, "rank", True), (3, 0, "node", True), *(
        (num_ranks, nodes, hops, by_network) for by_network in (True, False)
        for num_ranks, nodes, hops in ((2, 1, "rank"), (4, 2, "node"), (4, 2, "rank"))
    )
])  # fmt: skip
def test_windows_lie_in_a_devices_memory_and_nothing_of_it_is_left(
    run_ranks, libraries, num_ranks, nodes, hops, by_network
):
    """Of all windows; or, as the transport takes no dmabuf, of those of a node."""
    options = {"hops": hops, "ranks_per_node": nodes, "transport": "shm"}
    assert len(set(run_ranks(_apart, num_ranks, libraries, options, by_network))) == 1


@pytest.mark.parametrize("takes", [True, False])
@pytest.mark.parametrize("hops", ["node", "rank"])
def test_windows_of_an_efa_nic(run_ranks, libraries, efa_rules, monkeypatch, hops, takes):
    """libfabric takes a GPU's memory where it has FI_HMEM; else windows of the network lie in host memory."""
    monkeypatch.setenv("MOE_COMM_LIBFABRIC", efa_rules)
    options = {"hops": hops, "ranks_per_node": 2, "transport": "fabric:efa"}
    run_ranks(_apart, 4, libraries, options, takes, window_memory.CudaMemory)


def _peers_close_first(rank, group, libraries):
    """Rank 0 goes on having the others' windows mapped."""
    driver = start(libraries)
    buffer = moe_comm.Buffer(group, device="cpu", **SIZES)
    two_calls(buffer, rank, 2)
    if rank == 1:
        buffer.close()
        del buffer
        gc.collect()
        assert driver.pretend_allocated() == 1, "freed while rank 0 maps it"
        group.gather("closed here")
        group.gather("closed there")
        window_memory.drop_unused()
        gc.collect()
    else:
        group.gather("closed there")
        buffer.close()
        del buffer
        gc.collect()
        group.gather("closed here")
    assert driver.pretend_allocated() == 0


def test_memory_is_kept_while_a_peer_maps_it(run_ranks, libraries):
    run_ranks(_peers_close_first, 2, libraries)


def _on_gpu(rank, group):
    with moe_comm.Buffer(group, device="cuda", windows="device", **SIZES) as buffer:
        case = make_case(2, layout="expert", seed=3, tokens=9)
        for _ in range(3):
            check_dispatched(
                at_home(dispatch(buffer, moved(case, "cuda"), rank)), expected(case), rank
            )
        return buffer.windows


@pytest.mark.gpu
def test_windows_in_the_memory_of_this_gpu(run_ranks):
    """Ranks that share it, by CUDA IPC."""
    assert run_ranks(_on_gpu, 2) == ["device"] * 2


# --- who cannot ----------------------------------------------------------------------------------


def _refused(rank, group, libraries, broken, options, left):
    """Rank 1's device refuses one thing, `left` is what the Buffer has. Returns the error of asking for it."""
    driver = start(libraries)
    if rank == 1:
        call, ordering = broken
        driver.pretend_refuse(call.encode())
        driver.pretend_attribute(ORDERING, ordering)
    with moe_comm.Buffer(group, device="cpu", **options, **SIZES) as buffer:
        assert buffer.windows == left
        assert (driver.pretend_allocated(), driver.pretend_opened()) == (left != "host", 0)
        two_calls(buffer, rank, group.num_ranks)
    del buffer
    gc.collect()
    with pytest.raises(TransportError) as error:
        moe_comm.Buffer(group, device="cpu", windows="device", **options, **SIZES)
    assert (driver.pretend_allocated(), driver.pretend_opened()) == (0, 0)
    driver.pretend_refuse(b"")
    driver.pretend_attribute(ORDERING, 100)
    with moe_comm.Buffer(group, device="cpu", **options, **SIZES) as buffer:
        assert buffer.windows == "device"
        two_calls(buffer, rank, group.num_ranks)
    return str(error.value)


NEAR, FAR = {"transport": "shm"}, {"transport": "shm", "ranks_per_node": 1}
CANNOT = {
    "allocate": ("cuMemAlloc_v2", 100, NEAR, "cuMemAlloc_v2: error 1: invalid argument"),
    "name": ("cuIpcGetMemHandle", 100, NEAR, "cuIpcGetMemHandle: error 1"),
    "map": ("cuIpcOpenMemHandle_v2", 100, NEAR, "cuIpcOpenMemHandle_v2: error 1"),
    "export": ("cuMemGetHandleForAddressRange", 100, FAR, "exports no dmabuf"),
    "order": (
        "",
        0,
        FAR,
        "does not order a NIC's writes for its kernels: attribute 118 is 0, expected at least 100",
    ),
}


@pytest.mark.parametrize("what", CANNOT)
def test_a_rank_that_cannot(run_ranks, libraries, what):
    *broken, options, text = CANNOT[what]
    left = "device in a node" if what in ("export", "order") else "host"
    for error in run_ranks(_refused, 2, libraries, broken, options, left):
        assert "rank 1: " in error and text in error, error


def _host_asked_for(rank, group, libraries):
    driver = start(libraries)
    with moe_comm.Buffer(group, device="cpu", windows="host", **SIZES) as buffer:
        assert buffer.windows == "host" and driver.pretend_allocated() == 0
    with pytest.raises(ArgumentError, match="windows: expected one of"):
        moe_comm.Buffer(group, device="cpu", windows="gpu", **SIZES)
    with pytest.raises(ArgumentError, match="windows: expected None without a device"):
        moe_comm.Buffer(group, windows="device", **SIZES)
    os.environ["MOE_COMM_WINDOWS"] = "host"
    with moe_comm.Buffer(group, device="cpu", **SIZES) as buffer:
        assert buffer.windows == "host"
    os.environ["MOE_COMM_WINDOWS"] = "device"
    with moe_comm.Buffer(group, **SIZES) as buffer:  # said for those that have kernels
        assert buffer.windows == "host"
    with pytest.raises(moe_comm.MismatchError, match="windows"):
        moe_comm.Buffer(group, device="cpu", windows=("auto", "host")[rank], **SIZES)


def test_what_is_asked_for(run_ranks, libraries):
    run_ranks(_host_asked_for, 2, libraries)


# --- the driver's calls --------------------------------------------------------------------------


@pytest.fixture
def driver(driver_path, monkeypatch):
    for module, name in ((fused, "driver"), (memory, "in_context"), (window_memory, "in_context")):
        monkeypatch.setattr(module, name, getattr(module, name))
    for name in ("current_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))
    return apart.use_driver(driver_path)


DEVICE = torch.device("cuda:0")


def test_the_calls_are_those_of_the_drivers_header(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc: the CUDA toolkit is not installed")
    command = [
        "nvcc",
        "-std=c++20",
        "-DCUDA_H",
        "-Xcompiler=-Wall,-Werror",
        "-c",
        apart.SOURCE,
        "-o",
        tmp_path / "o",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_memory_of_a_device_is_zeroed_whole_and_freed(driver):
    made = window_memory.CudaMemory(DEVICE, 5 << 20, linked=True)
    assert made.num_bytes == 6 << 20 and made.spans == [(made.address, 6 << 20)]
    assert made.read(made.address, 8192) == bytes(8192)
    with made.exported() as (dmabuf, offset, device):
        assert offset == device == 0 and os.fstat(dmabuf).st_size == 6 << 20
    with pytest.raises(OSError):
        os.fstat(dmabuf)  # who took it keeps it
    assert driver.pretend_allocated() == 1
    assert made.map_peer(made.name) == made.address and driver.pretend_opened() == 0  # its own
    with pytest.raises(RuntimeError, match="cuMemcpyDtoH_v2: error 1: invalid argument"):
        made.read(made.address + made.num_bytes, 16)
    del made
    assert driver.pretend_allocated() == 0


def test_host_memory_is_pinned_as_whole_pages(driver):
    pages = moe_comm.region.shared_tensor(8192, torch.uint8)
    pinned = memory.Pinned(pages.data_ptr(), 8192, DEVICE)
    assert pinned.on_device(pages.data_ptr() + 72) == pages.data_ptr() + 72
    assert driver.pretend_registered() == 1
    with pytest.raises(RuntimeError, match="cuMemHostRegister_v2: error 1"):
        memory.Pinned(pages.data_ptr(), 8192, DEVICE)
    assert driver.pretend_registered() == 1
    del pinned
    assert driver.pretend_registered() == 0


@pytest.mark.parametrize("broken, kind, why", [
    ({}, "device memory", "between nodes where the NIC takes a dmabuf, else host-staged"),
    ({124: 0}, "device memory in a node, host-staged between nodes", "the device exports no dmabuf"),
    ({118: 0}, "device memory in a node, host-staged between nodes", "does not order a NIC's writes"),
    ({122: 0}, "device memory", "streams cannot wait for 64-bit words"),
    ({99: 0}, "host memory", "cannot map memory of the host"),
])  # fmt: skip
def test_what_doctor_says(driver, monkeypatch, broken, kind, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for number, value in broken.items():
        driver.pretend_attribute(number, value)
    try:
        found, text = window_memory.window_memory()
    finally:
        for number in broken:
            driver.pretend_attribute(number, 100 if number == ORDERING else 1)
    assert found == kind and why in text
