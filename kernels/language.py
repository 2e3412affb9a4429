"""What the kernels need of Triton, with or without Triton installed.

Without it the twins work all the same, and a kernel says what is missing when it is launched. With TRITON_INTERPRET=1
set before the first import, kernels run on CPU tensors: that is how they are tested.

NOTE [16-byte accesses] The compiler uses 16-byte loads and stores where it can prove alignment. So kernels that move
rows take widths and strides in **units** of UNIT items and multiply inside: four int32 if all rows begin and end at
multiples of 16 bytes, else one item of the tensors' own size. `Items` decides. `BLOCK` items are one program's share.

NOTE [numbers on the device] `num_tokens` and `num_rows`, where a step takes them, are int32 tensors of one element:
only so many rows of its inputs count, so that a graph can be replayed with another number. Grids follow the shapes.
"""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError as error:
    missing = str(error)

    class tl:  # type: ignore[no-redef]
        constexpr = None

    class jit:  # type: ignore[no-redef]
        """A kernel that cannot run here."""

        def __init__(self, fn: Any) -> None:
            self.__name__ = fn.__name__

        def __getitem__(self, grid: Any) -> Any:
            raise ImportError(f"{self.__name__}: expected Triton to be installed: {missing}")


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BLOCK_BYTES = 4096  # of one row, moved by one program: two 16-byte accesses for each of 128 threads


def up(value: int, multiple: int) -> int:
    """How many multiples it takes to hold `value`."""
    return -(-value // multiple)


def as_integers(t: Tensor) -> Tensor:
    """The same tensor with integers of its item size: Triton does not know every dtype, and no NaN may change."""
    return t.view(INTEGERS[t.element_size()])


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel` on the device of its first CUDA tensor (others may be pinned); nothing for an empty grid."""
    if 0 in grid:
        return
    device = next((a.device for a in args if isinstance(a, Tensor) and a.is_cuda), None)
    with torch.cuda.device(device) if device else contextlib.nullcontext():
        kernel[grid](*args, **options)


class Items(NamedTuple):
    """NOTE [16-byte accesses]. `width` of a row in units."""

    bytes: int
    unit: int
    width: int

    @classmethod
    def of(cls, width_bytes: int, item_bytes: int, *tensors: Tensor) -> "Items":
        """For rows of `width_bytes`, which are the rows of all `tensors` [n, …] (or lie in them)."""
        aligned = width_bytes % 16 == 0 and all(
            (t.stride(-1) == 1 or t.shape[-1] == 1)
            and (t.dim() == 1 or t.stride(0) * t.element_size() % 16 == 0)
            and t.data_ptr() % 16 == 0
            for t in tensors
        )
        if aligned:
            return cls(4, 4, width_bytes // 16)
        return cls(item_bytes, 1, width_bytes // item_bytes)

    def stride(self, t: Tensor) -> int:
        """From row to row of `t`, in units."""
        return t.stride(0) * t.element_size() // (self.bytes * self.unit)

    def item_stride(self, t: Tensor) -> int:
        """From item to item in a row of `t`; 1 for bytes that hold items."""
        return t.stride(1) if self.unit == 1 and t.element_size() == self.bytes else 1

    @property
    def block(self) -> int:
        return BLOCK_BYTES // self.bytes

    @property
    def tiles(self) -> int:
        """Programs for one row; at least one."""
        return max(1, up(self.width * self.unit, self.block))


@jit
def items_at(pointer, BYTES: tl.constexpr):
    """The pointer, to integers of so many bytes."""
    if BYTES == 1:
        return pointer.to(tl.pointer_type(tl.uint8))
    elif BYTES == 2:
        return pointer.to(tl.pointer_type(tl.int16))
    elif BYTES == 4:
        return pointer.to(tl.pointer_type(tl.int32))
    else:
        return pointer.to(tl.pointer_type(tl.int64))


@jit
def load_number(pointer, otherwise):
    """NOTE [numbers on the device]: at most `otherwise`."""
    if pointer is None:
        return otherwise
    else:
        return tl.minimum(tl.load(pointer), otherwise)


@jit
def to_float(values):
    """float32 of any float dtype; float64 stays. bfloat16 by its bits, like its rounding."""
    if values.dtype == tl.bfloat16:
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    elif values.dtype == tl.float64:
        return values
    else:
        return values.to(tl.float32)


@jit
def rounded_to(values, dtype: tl.constexpr):
    """To nearest, ties to even. bfloat16 in integers: Triton's interpreter truncates, and one cast is one meaning."""
    if dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(nan, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(dtype)
