"""Memory of results: torch tensors over blocks that the engine keeps for the next call (csrc/host_pool.hpp).

A result is an ordinary tensor that its caller owns for as long as he likes; its block returns to the pool when the last
over it is gone. Used and kept together never exceed what was once in use at a time; `empty_cache` empties it.

Calls with CUDA tensors have their results made elsewhere, by `allocated_by` (staging.py).

Memory of the engine that a GPU reads and writes itself is pinned by `Pinned`; windows may lie on the device instead
(window_memory.py).
"""

import contextlib
import ctypes
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import _engine
from .errors import TransportError

_thread = threading.local()

LEAST_BYTES = 1 << 16  # below, torch's allocator has it at hand

kept_bytes = _engine.kept_host_bytes
"""Bytes that wait for the next result."""

empty_cache = _engine.release_kept_host_memory
"""Gives the memory that waits for later results back to the system. Living tensors are not touched."""


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor of undefined contents. Raises MemoryError or RuntimeError where there is no memory."""
    new = getattr(_thread, "new", None)
    if new is not None:
        made: Tensor = new(shape, dtype)
        return made
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(_engine.HostBlock(num_bytes), dtype=dtype).view(shape)


@contextlib.contextmanager
def allocated_by(new: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> Iterator[None]:
    """Inside, `new_tensor` of this thread is `new`."""
    before = getattr(_thread, "new", None)
    _thread.new = new
    try:
        yield
    finally:
        _thread.new = before


# --- memory that a GPU reaches -------------------------------------------------------------------

_REGISTER_PORTABLE, _REGISTER_MAPPED = 1, 2  # CU_MEMHOSTREGISTER_*
_RANGE_AS_DMA_BUF = 1  # CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD


@contextlib.contextmanager
def in_context(device: torch.device) -> Iterator[None]:
    """The device is the current one, and has a context."""
    with torch.cuda.device(device):
        torch.empty(1, device=device)
        yield


class Pinned:
    """Whole pages of host memory, mapped for a device; on the CPU just the memory. Released with this object.

    The caller keeps the memory until then. Raises RuntimeError where the driver refuses.
    """

    def __init__(self, address: int, num_bytes: int, device: torch.device):
        self._address, self._device, self._mapped = address, device, False
        self._base = address  # as the device sees it
        if device.type != "cuda":
            return
        from .kernels import fused  # device code is loaded where there is a device

        base = fused.WORD()
        with in_context(device):
            fused.driver().call(
                "cuMemHostRegister_v2", fused.WORD(address), fused.WORD(num_bytes),
                _REGISTER_PORTABLE | _REGISTER_MAPPED,
            )  # fmt: skip
            self._mapped = True
            fused.driver().call(
                "cuMemHostGetDevicePointer_v2", ctypes.byref(base), fused.WORD(address), 0
            )
        self._base = base.value

    def on_device(self, address: int) -> int:
        """An address in this memory, as the device sees it."""
        return address - self._address + self._base

    def __del__(self) -> None:
        if self._mapped:
            from .kernels import fused

            with contextlib.suppress(RuntimeError), in_context(self._device):
                fused.driver().call("cuMemHostUnregister", fused.WORD(self._address))


@contextlib.contextmanager
def dmabuf_of(address: int, num_bytes: int, device: torch.device) -> Iterator[tuple[int, int, int]]:
    """(a descriptor of a dmabuf, offset of the first byte in it, the device's number) of memory of a CUDA device, as
    NICs take it.

    What took it keeps it; the descriptor is closed here. Raises: TransportError where the driver refuses. Never ran on
    hardware (2026-11-22).
    """
    from .kernels import fused

    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    size = -(-(address + num_bytes - first) // mmap.PAGESIZE) * mmap.PAGESIZE
    descriptor = ctypes.c_int(-1)
    try:
        with in_context(device):
            fused.driver().call(
                "cuMemGetHandleForAddressRange", ctypes.byref(descriptor), fused.WORD(first),
                ctypes.c_size_t(size), _RANGE_AS_DMA_BUF, fused.WORD(0),
            )  # fmt: skip
    except (ImportError, RuntimeError) as error:
        raise TransportError(
            f"memory: {device} exports no dmabuf ({error}): register pinned host memory instead"
        ) from None
    try:
        yield descriptor.value, address - first, device.index or 0
    finally:
        os.close(descriptor.value)
