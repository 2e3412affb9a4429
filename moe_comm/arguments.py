"""Wrong arguments: how they are found and how they are named. Nothing is formatted unless something is wrong."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, float32

from .errors import ArgumentError
from .handle import Handle

if TYPE_CHECKING:
    from .buffer import Buffer

CPU = torch.device("cpu")


class Found(str):
    """What was found, said in words where a value would not tell."""


def describe(value: object) -> str:
    """`int32 (8, 4)` for a tensor; the value of a number, a text or None; else the type."""
    if isinstance(value, Found):
        return str(value)
    if isinstance(value, Tensor):
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{place}"
    return repr(value) if isinstance(value, (int, float, str)) else type(value).__name__


def wrong(argument: str, expected: str, found: object) -> ArgumentError:
    """`topk_idx: expected int64 [T, K], got int32 (8, 4)`."""
    return ArgumentError(f"{argument}: expected {expected}, got {describe(found)}")


def device_named(name: str) -> torch.device:
    """Raises ArgumentError for one that has no kernels."""
    if not name:
        return CPU
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise wrong("device", "cuda or cuda:N", name) from error
    if name == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def expect(condition: bool, argument: str, expected: str, found: object) -> None:
    """Raises `wrong` unless the condition holds; where a call per argument is not too dear."""
    if not condition:
        raise ArgumentError(f"{argument}: expected {expected}, got {found}")


def place(where: torch.device) -> str:
    """`on the CPU`, `on cuda:0`."""
    return "on the CPU" if where == CPU else f"on {where}"


def check_rows(name: str, value: Any, shape: str = "[T, H]", where: torch.device = CPU) -> Tensor:
    """A matrix of rows that can be moved: there, 2-D, dense rows of a multiple of 16 bytes, an address of items."""
    if not (isinstance(value, Tensor)):
        raise wrong(name, f"a tensor {shape}", value)
    if value.device != where:
        raise wrong(name, "a CPU or CUDA tensor" if where == CPU else f"a tensor on {where}", value)
    if not (value.dim() == 2):
        raise wrong(name, shape, value)
    row_bytes = value.shape[1] * value.element_size()
    if not (row_bytes > 0 and row_bytes % 16 == 0):
        raise wrong(name, "rows of a multiple of 16 bytes", value)
    if not (value.shape[0] == 0 or value.stride(1) == 1):
        raise wrong(name, "rows that are contiguous", Found(f"strides {value.stride()}"))
    return value.detach() if value.requires_grad else value


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices of rows share bytes, or rows of one lie between those of the other."""

    def span(t: Tensor) -> tuple[int, int]:
        rows = max(0, (t.shape[0] - 1) * t.stride(0) + t.shape[1]) if t.shape[0] else 0
        return t.data_ptr(), t.data_ptr() + rows * t.element_size()

    (a_from, a_to), (b_from, b_to) = span(a), span(b)
    return a_from < b_to and b_from < a_to


def check_floats(
    name: str, value: Any, shape: tuple[int, ...], where: torch.device = CPU
) -> Tensor:
    """A float32 tensor of this shape, there, contiguous in the answer."""
    if not (
        isinstance(value, Tensor)
        and value.dtype is float32
        and value.device == where
        and value.shape == shape
    ):
        raise wrong(name, f"float32 {tuple(shape)} {place(where)}", value)
    return (value.detach() if value.requires_grad else value).contiguous()


def check_handle(buffer: "Buffer", handle: Any) -> None:
    """Raises ArgumentError unless the handle is one of this group, rank and path, and complete."""
    if not (isinstance(handle, Handle)):
        raise wrong("handle", "a Handle of Buffer.dispatch", handle)
    if not (handle.complete):
        raise wrong(
            "handle", "a dispatch that was received", Found("one whose hook was not called yet")
        )
    if not (handle.group_key == buffer.group_key):
        raise wrong("handle", "one of this group", Found("one of another group"))
    if not (handle.generation == buffer.generation):
        raise wrong(
            "handle",
            f"one of generation {buffer.generation}",
            Found(f"one of generation {handle.generation}: recovery ends the handles before it"),
        )
    if not (handle.rank == buffer.rank):
        raise wrong("handle", f"one of rank {buffer.rank}", Found(f"one of rank {handle.rank}"))
    if (handle.told.numel() > 0) != (buffer.kernels is not None):
        raise wrong(
            "handle",
            "one of a Buffer with the same device",
            Found("one of another: what their handles hold differs"),
        )
    if not (handle.hops == buffer.hops):
        raise wrong(
            "handle", f"hops={buffer.hops!r}, as this Buffer", Found(f"hops={handle.hops!r}")
        )
