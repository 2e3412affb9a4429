"""Memory of results: torch tensors over blocks that the engine keeps for the next call (csrc/host_pool.hpp).

A result is an ordinary tensor that its caller owns for as long as he likes; its block returns to the pool when the last
over it is gone. Used and kept together never exceed what was once in use at a time; `empty_cache` empties it.

Calls with CUDA tensors have their results made elsewhere, by `allocated_by` (staging.py).
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import _engine

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
