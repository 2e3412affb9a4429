"""Where a Buffer's windows lie if kernels are this rank: in memory of its device, or of the host.

    this rank ────────── a rank of its node ─────────── a rank of another node
    cuMemAlloc ─handle─→ cuIpcOpenMemHandle: stores
               ─dmabuf─→ its own NIC ←───────────────── writes

libfabric (EFA) is told the device, FI_HMEM, and asks for the dmabuf itself.

Device memory is where rows are read fastest; host memory ("host-staged", pinned and mapped) is what every GPU and every
transport reach. Control words stay in the segment, in host memory: what a host must write and a GPU must see.

MOE_COMM_WINDOWS=auto takes device memory where every rank of the Buffer can: for all windows; else for those that ranks
of a node write, and host memory for those of the network; else for none. The log says who cannot, and why. "device":
all, or an error; "host": none.

NOTE [H5] The proxy sees a completion and sets the word that a stream waits for; the rows it tells of were written to
device memory by a NIC, another way through the machine. Nothing orders the two but what the device promises:
CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING of OWNER or more says that rows need no flush to be seen by kernels
of that device, once the host saw the completion. Where a device promises less, windows that a network writes lie in
host memory, so that no proxy needs a CUDA context to flush.

NOTE [last user] A device's memory must not be freed while another process maps it. A rank unmaps its peers' windows
before it says goodbye, and keeps its own until those of its node have said it, or ended (`keep_until_unused`).

*Source*: ours. No line that asks the driver ran on hardware (2026-11-22); tests run them against a driver made of host
memory, and whole exchanges with windows in memory apart (tests/kernels/apart.py).
"""

import contextlib
import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from . import _engine
from .arguments import wrong
from .errors import MoeCommError, TransportError
from .group import EPGroup
from .layout import WindowLayout
from .memory import dmabuf_of, in_context

_log = logging.getLogger(__name__)

UNUSED_S, NAP_S = 1.0, 1e-3  # how long a close waits for the others', and between looks
AUTO, HOST, DEVICE = PLACES = ("auto", "host", "device")

_WRITES_ORDERING, _ORDERED_FOR_OWNER = (
    118,
    100,
)  # CU_DEVICE_ATTRIBUTE_…, CU_GPU_DIRECT_RDMA_WRITES_…
_CAN_MAP_HOST_MEMORY, _HOST_REGISTER_SUPPORTED, _STREAM_MEM_OPS, _DMA_BUF_SUPPORTED = (
    19,
    99,
    122,
    124,
)
_LAZY_ENABLE_PEER_ACCESS = 1  # CU_IPC_MEM_…
_GRANULE = 2 << 20  # what the driver allocates in; a dmabuf needs whole pages


class _IpcHandle(ctypes.Structure):  # CUipcMemHandle
    _fields_ = (("reserved", ctypes.c_char * 64),)


class CudaMemory:
    """Memory of one CUDA device, zeroed. `linked`: a NIC writes to it. Freed with this object.

    Raises: RuntimeError where the driver refuses, or the device promises too little (NOTE [H5]).
    """

    def __init__(self, device: torch.device, num_bytes: int, linked: bool):
        from .kernels import fused

        self.address = 0
        self._device, self._driver = device, fused.driver()
        self._mapped: list[int] = []
        self.num_bytes = -(-num_bytes // _GRANULE) * _GRANULE
        self.spans: list[tuple[int, int]] = []
        try:
            with in_context(device):
                handle = self._allocate(linked)
        except RuntimeError:
            self.free()
            raise
        self.name = os.getpid(), self.address, handle
        self.spans.append((self.address, self.num_bytes))

    def _allocate(self, linked: bool) -> bytes:
        """Returns its handle."""
        from .kernels import fused

        address, handle = fused.WORD(), _IpcHandle()
        size, call = ctypes.c_size_t(self.num_bytes), self._driver.call
        if linked:
            promised = self._driver.attribute(_WRITES_ORDERING, torch.cuda.current_device())
            if promised < _ORDERED_FOR_OWNER:
                raise RuntimeError(
                    f"{self._device} does not order a NIC's writes for its kernels: attribute {_WRITES_ORDERING} is "
                    f"{promised}, expected at least {_ORDERED_FOR_OWNER}"
                )
        call("cuMemAlloc_v2", ctypes.byref(address), size)
        self.address = address.value
        call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), size)
        call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        torch.cuda.synchronize(self._device)
        return bytes(handle)

    def map_peer(self, name: tuple[int, int, bytes]) -> int:
        """Where a peer's memory lies in this process."""
        from .kernels import fused

        process, there, handle = name
        if process == os.getpid():  # a handle opens in other processes only
            self.spans.append((there, self.num_bytes))
            return there
        address = fused.WORD()
        with in_context(self._device):
            self._driver.call(
                "cuIpcOpenMemHandle_v2", ctypes.byref(address), _IpcHandle.from_buffer_copy(handle),
                ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS),
            )  # fmt: skip
        self._mapped.append(address.value)
        self.spans.append((address.value, self.num_bytes))
        return address.value

    def unmap_peers(self) -> None:
        """Nothing that this process launched uses them any more."""
        from .kernels import fused

        del self.spans[1:]
        while self._mapped:
            with contextlib.suppress(RuntimeError), in_context(self._device):
                self._driver.call("cuIpcCloseMemHandle", fused.WORD(self._mapped.pop()))

    @contextlib.contextmanager
    def exported(self) -> Iterator[tuple[int, int, int]]:
        """(dmabuf, offset, device), as a NIC takes it; the descriptor is closed here."""
        with dmabuf_of(self.address, self.num_bytes, self._device) as found:
            yield found

    def read(self, address: int, num_bytes: int) -> bytes:
        """Copies to the host, at once."""
        from .kernels import fused

        host = ctypes.create_string_buffer(num_bytes)
        with in_context(self._device):
            self._driver.call(
                "cuMemcpyDtoH_v2", host, fused.WORD(address), ctypes.c_size_t(num_bytes)
            )
        return host.raw

    def free(self) -> None:
        """At once: nobody has it mapped. NOTE [last user]"""
        if not self.address:
            return
        from .kernels import fused

        self.unmap_peers()
        address, self.address = self.address, 0
        with contextlib.suppress(RuntimeError), in_context(self._device):
            self._driver.call("cuMemFree_v2", fused.WORD(address))

    def __del__(self) -> None:
        if not sys.is_finalizing():  # else the driver frees what is left
            self.free()


KINDS: dict[str, Callable[[torch.device, int, bool], Any]] = {"cuda": CudaMemory}
"""By `torch.device.type`: devices that have memory for windows. Tests add the host's."""


def open_window_memory(
    group: EPGroup,
    asked: str,
    device: torch.device,
    layout: WindowLayout,
    engine: _engine.Engine,
    near: Iterable[int],
) -> tuple[Any, dict[int, int], str]:
    """(memory, where each rank of `near` has its own, which windows lie there), or (None, {}, ""). Collective.

    `near`: other ranks of this node; the windows are "all", or "near" (WindowLayout.offsets). Raises: TransportError
    if "device" was asked for and a rank cannot; ArgumentError for what is no place.
    """
    if asked not in PLACES:
        raise wrong("windows", f"one of {PLACES}", asked)
    if asked == HOST or (asked == AUTO and device.type not in KINDS):
        return None, {}, ""
    drop_unused()
    linked = layout.num_nodes > 1
    for apart in ("all", "near") if linked and asked == AUTO else ("all",):
        num_bytes = layout.offsets(apart)["apart"]
        made, places, why = _attempt(
            group, device, num_bytes, engine, linked and apart == "all", near
        )
        if made is not None:
            return made, places, apart
        if asked == DEVICE:
            raise TransportError(f"windows: expected device memory on every rank: {why}")
        whose = "windows of the network" if linked and apart == "all" else "windows"
        _log.info("%s lie in host memory: %s", whose, why)
    return None, {}, ""


def _attempt(
    group: EPGroup,
    device: torch.device,
    num_bytes: int,
    engine: _engine.Engine,
    linked: bool,
    near: Iterable[int],
) -> tuple[Any, dict[int, int], str]:
    """(memory, where each rank of `near` has its own, ""), or (None, {}, who cannot, and why). Collective."""
    made: Any = None
    places: dict[int, int] = {}
    why = ""
    try:
        made = _make(device, num_bytes, engine, linked)
    except (ImportError, RuntimeError, MoeCommError) as error:
        why = str(error)
    answers = group.gather((why, None if made is None else made.name))
    why = _who_cannot(answers)
    if not why:
        try:
            places = {r: made.map_peer(answers[r][1]) for r in near}
        except (RuntimeError, OSError) as error:
            why = str(error)
        why = _who_cannot(group.gather((why, None)))
        if not why:
            return made, places, ""
        made.unmap_peers()
        group.gather(None)  # NOTE [last user]
    if made is not None:
        made.free()
    return None, {}, why


def _make(device: torch.device, num_bytes: int, engine: _engine.Engine, linked: bool) -> Any:
    kind = KINDS.get(device.type)
    if kind is None:
        raise RuntimeError(f"{device} has no memory for windows")
    made = kind(device, num_bytes, linked)
    if linked:  # whether the NIC takes it is known once it took it
        try:
            with made.exported() as dmabuf:
                engine.forget(engine.register(made.address, made.num_bytes, *dmabuf))
        except (RuntimeError, MoeCommError):
            made.free()
            raise
    return made


def _who_cannot(answers: list[Any]) -> str:
    for rank, answer in enumerate(answers):
        if answer is not None and answer[0]:
            return f"rank {rank}: {answer[0]}"
    return ""


# --- the end -------------------------------------------------------------------------------------

_kept: list[tuple[_engine.Exchange, list[int]]] = []
_lock = threading.Lock()  # ranks may be threads


def keep_until_unused(native: _engine.Exchange, near: Iterable[int], timeout_s: float) -> None:
    """Of a closed exchange: its windows live until no rank of `near` can have them mapped, NOTE [last user].

    Ranks close their Buffers at about the same time, so it waits for them a while: then the memory is free when the
    last Buffer of a process was closed. Else a later open or close looks again.
    """
    entry = native, list(near)
    with _lock:
        _kept.append(entry)
    end = time.monotonic() + min(timeout_s, UNUSED_S)
    drop_unused()
    while entry in _kept and time.monotonic() < end:
        time.sleep(NAP_S)
        drop_unused()


def _leave_to_parent() -> None:
    global _lock
    _lock = threading.Lock()  # a thread of the parent may hold the old one
    for native, _ in _kept:
        _engine.never_destroy(native)
    _kept.clear()


os.register_at_fork(after_in_child=_leave_to_parent)  # lifetime.py


def drop_unused() -> None:
    """Looks which of those that are kept are unused by now."""
    with _lock:
        unused = [entry for entry in _kept if all(entry[0].lost[r] for r in entry[1])]
        _kept[:] = [entry for entry in _kept if entry not in unused]
    del unused  # here they are destroyed


# --- what there is -------------------------------------------------------------------------------


def window_memory() -> tuple[str, str]:
    """(what memory a GPU's windows would have here, why)."""
    if not torch.cuda.is_available():
        return "host memory", f"torch {torch.__version__} sees no CUDA device"
    from .kernels import fused

    try:
        asked = (
            _CAN_MAP_HOST_MEMORY, _HOST_REGISTER_SUPPORTED, _STREAM_MEM_OPS, _DMA_BUF_SUPPORTED, _WRITES_ORDERING
        )  # fmt: skip
        maps, registers, waits, dmabuf, ordering = (fused.driver().attribute(a, 0) for a in asked)
    except (ImportError, RuntimeError) as error:
        return "host memory", str(error)
    if not (maps and registers):
        return "host memory", "the device cannot map memory of the host"
    why = "control words: the device maps and pins memory of the host"
    if not waits:
        why += "; streams cannot wait for 64-bit words"
    if not dmabuf:
        return (
            "device memory in a node, host-staged between nodes",
            f"{why}; the device exports no dmabuf",
        )
    if ordering < _ORDERED_FOR_OWNER:
        return (
            "device memory in a node, host-staged between nodes",
            f"{why}; the device does not order a NIC's writes for its kernels",
        )
    return "device memory", f"{why}; between nodes where the NIC takes a dmabuf, else host-staged"
