"""Registered memory and its descriptor: what a peer must hold to write there.

A descriptor is bytes: magic, the engine's identity, and what the transport needs (csrc/engine.cpp). It may travel by
any means and be used any number of times. It is a right to write, but no admission: the connection asks for the secret.
"""

import ctypes
import functools
import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _engine
from .arguments import describe
from .arguments import expect as require
from .errors import ArgumentError
from .memory import dmabuf_of

if TYPE_CHECKING:
    from .engine import TransferEngine

_HEAD = struct.Struct("<4sQ")  # magic, engine id
_BODY = struct.Struct("<3Q")  # base, bytes, key; more words may follow
_MAGIC = b"mcR1"


class Region:
    """Memory of this process that peers may write to, and that writes are read from. Made by `TransferEngine.register`.

    The engine holds the memory until `close()` of the region or of the engine; dropping this object changes nothing.
    """

    def __init__(self, engine: "TransferEngine", memory: object, address: int, num_bytes: int):
        self.engine = engine
        self.num_bytes = num_bytes
        if isinstance(memory, Tensor) and memory.is_cuda:
            with dmabuf_of(address, num_bytes, memory.device) as found:
                self._number = engine.native.register(address, num_bytes, *found)
        else:
            self._number = engine.native.register(address, num_bytes)
        self._memory: object | None = memory
        self._descriptor = pack_descriptor(engine.id, engine.native.describe(self._number))

    @property
    def descriptor(self) -> bytes:
        """For peers: what they pass to `write`."""
        return self._descriptor

    @property
    def closed(self) -> bool:
        return self._memory is None

    @property
    def number(self) -> int:
        """The engine's own. Raises: ArgumentError after close()."""
        if self._memory is None:
            raise ArgumentError("region: expected an open region, got a closed one")
        return self._number

    @property
    def memory(self) -> object:
        """What was registered, or None after close()."""
        return self._memory

    def close(self) -> None:
        """Withdraws the registration and lets go of the memory once writes from it have ended. Twice is fine.

        Peers must have stopped writing to it: no transport promises that a write under way is turned away, and over
        "shm" a descriptor of ordinary memory (not of `TransferEngine.empty`) stays good for as long as a peer is
        connected.
        """
        if self._memory is not None:
            self.engine.forget(self, self._number)
            self._memory = None

    def __enter__(self) -> "Region":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Region({self.num_bytes} bytes{', closed' if self.closed else ''})"


def locate(memory: Any) -> tuple[object, int, int]:
    """(what to keep alive, address, bytes) of a tensor or of anything with a writable buffer.

    Raises: ArgumentError for another device, holes, read-only or empty memory, or another type.
    """
    keep: object
    if isinstance(memory, Tensor):
        place = memory.device.type
        require(
            place in ("cpu", "cuda"), "memory", "a tensor on the CPU or a GPU", describe(memory)
        )
        dense = memory.layout == torch.strided and memory.is_contiguous()
        require(dense, "memory", "a contiguous tensor", f"strides {_strides(memory)}")
        address, num_bytes, keep = memory.data_ptr(), memory.numel() * memory.element_size(), memory
    else:
        try:
            view = memoryview(memory)
        except TypeError:
            raise ArgumentError(
                f"memory: expected a tensor or a buffer, got {type(memory).__name__}"
            ) from None
        require(
            not view.readonly, "memory", "writable memory", f"read-only {type(memory).__name__}"
        )
        require(view.c_contiguous, "memory", "contiguous memory", f"strides {view.strides}")
        num_bytes, keep = view.nbytes, (memory, view)
        address = ctypes.addressof(ctypes.c_char.from_buffer(view)) if num_bytes else 0
    require(num_bytes > 0, "memory", "at least 1 byte", 0)
    return keep, address, num_bytes


def _strides(tensor: Tensor) -> object:
    return tensor.stride() if tensor.layout == torch.strided else tensor.layout


def shared_tensor(shape: Any, dtype: torch.dtype) -> Tensor:
    """A zeroed tensor over a shared segment, which lives as long as the tensor or a view of it.

    Raises: ArgumentError for a shape with negative sizes; TransportError if there is no memory.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    good = all(isinstance(size, int) and size >= 0 for size in shape)
    require(good, "shape", "sizes >= 0", shape)
    require(isinstance(dtype, torch.dtype), "dtype", "a torch.dtype", describe(dtype))
    num_items = 1
    for size in shape:
        num_items *= size
    if num_items == 0:
        return torch.empty(shape, dtype=dtype)
    num_bytes = num_items * dtype.itemsize
    flat = torch.frombuffer(_engine.SharedBuffer(num_bytes), dtype=torch.uint8, count=num_bytes)
    return flat.view(dtype).view(shape)


def pack_descriptor(engine_id: int, native: bytes) -> bytes:
    return _HEAD.pack(_MAGIC, engine_id) + native


def parse_descriptor(descriptor: object) -> tuple[int, int, bytes]:
    """(engine id, bytes of the region, what the transport needs). Raises: ArgumentError."""
    if not isinstance(descriptor, bytes):
        raise ArgumentError(f"descriptor: expected bytes, got {type(descriptor).__name__}")
    return _parse(descriptor)


@functools.lru_cache(maxsize=4096)
def _parse(descriptor: bytes) -> tuple[int, int, bytes]:
    good = len(descriptor) >= _HEAD.size + _BODY.size and descriptor.startswith(_MAGIC)
    require(good, "descriptor", "a region's descriptor", f"{len(descriptor)} other bytes")
    native = descriptor[_HEAD.size :]
    return _HEAD.unpack_from(descriptor)[1], _BODY.unpack_from(native)[1], native
