"""Memory of results: torch tensors over blocks that the engine keeps for the next call (csrc/host_pool.hpp).

A result is an ordinary tensor that its caller owns for as long as he likes; its block returns to the pool when the last
over it is gone. Used and kept together never exceed what was once in use at a time; `empty_cache` empties it.
"""

import math

import torch
from torch import Tensor

from . import _engine

LEAST_BYTES = 1 << 16  # below, torch's allocator has it at hand

kept_bytes = _engine.kept_host_bytes
"""Bytes that wait for the next result."""

empty_cache = _engine.release_kept_host_memory
"""Gives the memory that waits for later results back to the system. Living tensors are not touched."""


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor of undefined contents. Raises MemoryError or RuntimeError where there is no memory."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(_engine.HostBlock(num_bytes), dtype=dtype).view(shape)
