"""Launching the CUDA kernels of *.cu: their arguments as ctypes, and the steps that they can take one by one.

    cubin (cuda.py) ─libcuda→ function;  a step's tensors ─→ one struct ─→ cuLaunchKernel on the current stream

A fused kernel does for all lanes at once what the steps of `Kernels` do one by one, and tells the peers. Called as a
single step (`MOE_COMM_KERNELS=cuda`), it has one lane, no link, and a word of its own to tell. The structs are the
headers' to the byte: tests compare names, order and sizes with what the compilers make of them.

Tables of a few numbers (addresses of windows, lanes) are kept on the device by value, so a call that repeats copies
nothing, and can be captured in a graph once it was made. Rows whose bytes are no multiple of 16 go Triton's way.
*Source*: ours.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from . import cuda
from .forward import forward_triton
from .pack import pack_triton
from .reduce import reduce_triton
from .unpack import unpack_triton

WORD = ctypes.c_uint64
DTYPES = {
    torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64"
}  # fmt: skip
MAX_THREADS = {"dispatch": 512, "combine": 256, "headers": 128}  # __launch_bounds__


class Struct(ctypes.Structure):
    """Members are addresses, numbers, and at the end perhaps another struct."""

    def __init__(self, *values: Any, **members: Any) -> None:
        known = {name for name, _ in self._fields_}  # type: ignore[misc]
        if not members.keys() <= known:
            raise TypeError(
                f"{type(self).__name__}: has no {', '.join(sorted(members.keys() - known))}"
            )
        super().__init__(*values, **members)


def _words(names: str) -> list[tuple[str, Any]]:
    return [(name, WORD) for name in names.split()]


class DeviceRing(Struct):  # csrc/abi.hpp
    _fields_ = _words("slots reserved taken_seen taken abort_word num_slots timeout_ns")


class Send(Struct):  # dispatch.cuh: Arguments
    _fields_ = [
        *_words(
            "x x_stride payload_bytes scales scale_token_stride scale_stride scale_item num_scales topk_idx "
            "topk_weights topk lane_rows starts num_lanes first_token last_token scales_at token_at ids_at weights_at "
            "row_bytes windows head_bytes link_head_bytes lanes num_links num_local links commits epoch arrived status"
        ),
        ("ring", DeviceRing),
        *_words("waited error"),
    ]


class Release(Struct):  # receive.cuh
    _fields_ = [
        *_words("words num_words links num_links epoch arrived status"),
        ("ring", DeviceRing),
        ("waited", WORD),
    ]


class Forward(Struct):  # receive.cuh
    _fields_ = [
        *_words(
            "sources num_links head_bytes num_rows row_bytes table table_rows node_ranks starts windows to_head_bytes"
        ),
        ("release", Release),
    ]


class Unpack(Struct):  # receive.cuh
    _fields_ = [
        *_words(
            "windows num_sources head_bytes num_rows starts row_bytes payload_bytes positions num_positions out_x "
            "out_scales scales_at scale_bytes"
        ),
        ("release", Release),
    ]


class Group(Struct):  # combine.cuh
    _fields_ = _words("out out_stride first_row num_rows")


class Combine(Struct):  # combine.cuh: Arguments
    _fields_ = [
        *_words(
            "memory offsets weights bias bias_stride num_terms inner_first inner_last payload_bytes groups num_links "
            "num_local links head_bytes row_bytes commits epoch arrived status"
        ),
        ("ring", DeviceRing),
        *_words(
            "waited releases num_releases release_links num_release_links columns num_columns columns_at out_columns"
        ),
        ("whole", Group),
        ("fused", WORD),
    ]


class Begin(Struct):  # headers.cuh
    _fields_ = [
        *_words("next tables num_words call"),
        ("ring", DeviceRing),
        *_words("wait word_idx timeout_ms word"),
    ]


class Write(Struct):  # headers.cuh
    _fields_ = _words(
        "epoch like error topk_idx topk staged windows lanes num_lanes rows counts num_counts counts_bytes "
        "identity groups starts row_bytes tokens max_tokens waited"
    )


class LeaveOut(Struct):  # headers.cuh
    _fields_ = _words("masks num_ranks seen owners num_words words")


class Check(Struct):  # headers.cuh
    _fields_ = _words(
        "epoch like identity identity_is_epoch windows num_sources capacity expected num_counts counts_bytes error "
        "told told_epoch rows starts tokens verdicts copies waited times wait_ns num_times"
    )


class Collect(Struct):  # headers.cuh
    _fields_ = _words(
        "windows num_sources head_bytes row_bytes rows starts part_at part_bytes out out_stride"
    )


class PassOn(Struct):  # relay.cuh: Arguments
    _fields_ = _words(
        "epoch waited rounds sources verdicts damaged outs_per_source sources_per_out own identity tokens num_counts "
        "counts_bytes rows staged windows num_outs groups row_bytes table_rows"
    )


KERNELS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "moe_comm_push": ("ring", (DeviceRing, WORD, WORD)),
    "moe_comm_arm": ("ring", (DeviceRing, *(ctypes.c_uint32,) * 2, WORD, WORD, ctypes.c_uint32, WORD, WORD)),
    "moe_comm_wait": ("ring", (WORD,) * 5),
    "moe_comm_begin": ("headers", (Begin,)),
    "moe_comm_leave_out": ("headers", (LeaveOut,)),
    "moe_comm_write_headers": ("headers", (Write,)),
    "moe_comm_check_headers": ("headers", (Check,)),
    "moe_comm_collect": ("headers", (Collect,)),
    "moe_comm_pass_on": ("headers", (PassOn,)),
    "moe_comm_dispatch_send": ("dispatch", (Send,)),
    "moe_comm_dispatch_forward": ("dispatch", (Forward,)),
    "moe_comm_dispatch_unpack": ("dispatch", (Unpack,)),
    **{f"moe_comm_combine_send_{dtype}": ("combine", (Combine,)) for dtype in DTYPES.values()},
}  # fmt: skip
"""By kernel: the .cu it is in, and the types of its arguments."""


# --- the driver ----------------------------------------------------------------------------------


class Driver:
    """libcuda, asked for at the first launch. Torch has made the context."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise ImportError(f"CUDA kernels: expected an NVIDIA driver: {error}") from error
        self._functions: dict[tuple[str, int], ctypes.c_void_p] = {}

    def call(self, name: str, *arguments: Any) -> None:
        """Raises RuntimeError with the driver's text."""
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            reason = (text.value or b"unknown error").decode()
            raise RuntimeError(f"{name}: error {code}: {reason}")

    def function(self, kernel: str, device: int) -> ctypes.c_void_p:
        """The kernel, loaded on the current device, which is `device`."""
        found = self._functions.get((kernel, device))
        if found is None:
            arch = cuda.architecture(torch.cuda.get_device_capability(device))
            code = cuda.cubin(KERNELS[kernel][0], arch)
            module, found = ctypes.c_void_p(), ctypes.c_void_p()
            self.call("cuModuleLoadData", ctypes.byref(module), code)
            self.call("cuModuleGetFunction", ctypes.byref(found), module, kernel.encode())
            self._functions[kernel, device] = found
        return found

    def attribute(self, number: int, device: int) -> int:
        """A CU_DEVICE_ATTRIBUTE."""
        value = ctypes.c_int()
        self.call(
            "cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), ctypes.c_int(device)
        )
        return value.value

    def stream_wait(self, address: int, least: int, device: int) -> None:
        """The current stream of the current device, which is `device`, waits for a word >= `least`."""
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        self.call("cuStreamWaitValue64_v2", stream, WORD(address), WORD(least), ctypes.c_uint(0))

    def launch(
        self,
        kernel: str,
        arguments: tuple[Any, ...],
        num_blocks: int,
        num_threads: int,
        device: int,
    ) -> None:
        """On the current stream of the current device, which is `device`. Does not wait."""
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        self.call(
            "cuLaunchKernel", self.function(kernel, device), *map(ctypes.c_uint, (num_blocks, 1, 1)),
            *map(ctypes.c_uint, (num_threads, 1, 1)), ctypes.c_uint(0), stream, addresses, None,
        )  # fmt: skip


@functools.cache
def driver() -> Driver:
    """One for the process. Raises ImportError without libcuda."""
    return Driver()


def run(
    kernel: str, arguments: tuple[Any, ...], num_blocks: int, num_threads: int, device: torch.device
) -> None:
    """Launches on a CUDA device. Tests put host code here."""
    if device.type != "cuda":
        raise ValueError(f"{kernel}: expected CUDA tensors, got tensors on {device}")
    with torch.cuda.device(device):
        driver().launch(kernel, arguments, num_blocks, num_threads, torch.cuda.current_device())


def stream_wait(address: int, least: int, device: torch.device) -> None:
    """The current stream of a CUDA device waits for a word, without an SM. Tests put host code here."""
    if device.type != "cuda":
        raise ValueError(f"stream_wait: expected a CUDA device, got {device}")
    with torch.cuda.device(device):
        driver().stream_wait(address, least, torch.cuda.current_device())


def launch(
    kernel: str,
    *arguments: Any,
    device: torch.device,
    num_threads: int = 32,
    num_blocks: int | None = None,
) -> None:
    """Launches `kernel` with a struct, numbers and tensors (their addresses), as its types say. Does not wait.

    `num_blocks`: how many SMs it takes, at most; default two blocks for each. Raises TypeError for arguments that are
    not the kernel's, ImportError or RuntimeError where it cannot run.
    """
    types = KERNELS[kernel][1]
    if len(arguments) != len(types):
        raise TypeError(f"{kernel}: expected {len(types)} arguments, got {len(arguments)}")
    packed = []
    for at, (value, kind) in enumerate(zip(arguments, types, strict=True)):
        if isinstance(value, Tensor):
            value = value.data_ptr()
        if issubclass(kind, Struct) != isinstance(value, Struct) or (
            isinstance(value, Struct) and type(value) is not kind
        ):
            raise TypeError(
                f"{kernel}: argument {at}: expected {kind.__name__}, got {type(value).__name__}"
            )
        packed.append(value if isinstance(value, Struct) else kind(value))
    if num_blocks is None:
        num_blocks = default_blocks(device)
    run(kernel, tuple(packed), num_blocks, num_threads, device)


@functools.cache
def default_blocks(device: torch.device) -> int:
    """Two for each SM."""
    if device.type != "cuda":
        return 4
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def threads_for(kind: str, payload_bytes: int) -> int:
    """One for each 16 bytes of a row, in whole warps, at most the kernel's bound."""
    return max(32, min(MAX_THREADS[kind], -(-payload_bytes // 512) * 32))


# --- small tables --------------------------------------------------------------------------------


_of_graphs: dict[int, Tensor] = {}  # what captured graphs read, for good


@functools.lru_cache(maxsize=1024)
def _table(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(device)


def table(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """These numbers on the device; nobody writes to them. They stay until the current stream has read them."""
    found = _table(values, dtype, device)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            _of_graphs[found.data_ptr()] = found
        else:
            found.record_stream(torch.cuda.current_stream(device))
    return found


@functools.cache
def _scratch_of(device: torch.device, _stream: int) -> Tensor:
    return torch.zeros(5, dtype=torch.int64, device=device)


def scratch(device: torch.device) -> Tensor:
    """Words of a stream: two counters of arrived blocks and a status, zero between launches; a word to tell; a zero."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _scratch_of(device, stream)


def fits(*numbers: int) -> bool:
    """Whether addresses, strides and sizes are multiples of 16 bytes."""
    return all(number % 16 == 0 for number in numbers)


def _row_bytes(rows: Tensor) -> int:
    return rows.stride(0) * rows.element_size()


def _dense(tensor: Tensor | None, name: str) -> int:
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a dense tensor, got strides {tensor.stride()}")
    return tensor.data_ptr()


def _nobody(words: Tensor) -> Release:
    """To be told."""
    return Release(
        epoch=words[4:].data_ptr(), arrived=words.data_ptr(), status=words[2:].data_ptr()
    )


# --- the steps -----------------------------------------------------------------------------------


def pack_cuda(
    window: Tensor,
    x: Tensor,
    lane_rows: Tensor,
    starts: Tensor,
    *,
    scales: Tensor | None = None,
    topk_idx: Tensor | None = None,
    topk_weights: Tensor | None = None,
    lane: int,
    first_token: int,
    last_token: int,
    scales_at: int = 0,
    token_at: int = 0,
    ids_at: int = 0,
    weights_at: int = 0,
    cast: str | None = None,
) -> None:
    payload = x.shape[1] * x.element_size()
    if (
        cast is not None
        or x.stride(1) != 1
        or not fits(payload, x.data_ptr(), _row_bytes(x), window.data_ptr(), window.stride(0))
    ):
        pack_triton(
            window, x, lane_rows, starts, scales=scales, topk_idx=topk_idx, topk_weights=topk_weights, lane=lane,
            first_token=first_token, last_token=last_token, scales_at=scales_at, token_at=token_at, ids_at=ids_at,
            weights_at=weights_at, cast=cast,
        )  # fmt: skip
        return
    if first_token >= last_token:
        return
    device, words = x.device, scratch(x.device)
    num_lanes = lane_rows.shape[1]
    item = 0 if scales is None else scales.element_size()
    windows = tuple(window.data_ptr() if i == lane else 0 for i in range(num_lanes))
    arguments = Send(
        x=x.data_ptr(), x_stride=_row_bytes(x), payload_bytes=payload,
        scales=0 if scales is None else scales.data_ptr(),
        scale_token_stride=0 if scales is None else scales.stride(0) * item,
        scale_stride=0 if scales is None else scales.stride(1) * item,
        scale_item=item, num_scales=0 if scales is None else scales.shape[1],
        topk_idx=_dense(topk_idx, "topk_idx"), topk_weights=_dense(topk_weights, "topk_weights"),
        topk=0 if topk_idx is None else topk_idx.shape[1], lane_rows=_dense(lane_rows, "lane_rows"),
        starts=_dense(starts, "starts"), num_lanes=num_lanes, first_token=first_token, last_token=last_token,
        scales_at=scales_at, token_at=token_at, ids_at=ids_at, weights_at=weights_at, row_bytes=window.stride(0),
        windows=table(windows, torch.int64, device).data_ptr(),
        lanes=table((lane,), torch.int32, device).data_ptr(), num_local=1,
        commits=table((words[3:].data_ptr(),), torch.int64, device).data_ptr(),
        epoch=words[4:].data_ptr(), arrived=words.data_ptr(), status=words[2:].data_ptr(),
    )  # fmt: skip
    threads = threads_for("dispatch", payload)
    launch("moe_comm_dispatch_send", arguments, device=device, num_threads=threads)


def forward_cuda(
    window: Tensor, link_rows: Tensor, rows: Tensor, starts: Tensor, *, local: int
) -> None:
    row_bytes = link_rows.shape[1]
    if not fits(row_bytes, link_rows.data_ptr(), window.data_ptr()) or not (
        link_rows.is_contiguous() and window.stride(0) == row_bytes
    ):
        forward_triton(window, link_rows, rows, starts, local=local)
        return
    if not len(link_rows):
        return
    device, words = link_rows.device, scratch(link_rows.device)
    column = rows[:, local].contiguous()  # a fused call takes all of them
    windows = table((window.data_ptr(), link_rows.data_ptr()), torch.int64, device)
    arguments = Forward(
        num_links=1, num_rows=table((len(link_rows),), torch.int32, device).data_ptr(), row_bytes=row_bytes,
        table=column.data_ptr(), table_rows=len(column), node_ranks=1, starts=starts[local:].data_ptr(),
        windows=windows.data_ptr(), release=_nobody(words), sources=windows[1:].data_ptr(),
    )  # fmt: skip
    threads = threads_for("dispatch", row_bytes)
    launch("moe_comm_dispatch_forward", arguments, device=device, num_threads=threads)


def unpack_cuda(
    out_x: Tensor,
    rows: Tensor,
    positions: Tensor,
    *,
    out_scales: Tensor | None = None,
    scales_at: int = 0,
) -> None:
    payload = out_x.shape[1] * out_x.element_size()
    if not fits(payload, out_x.data_ptr(), rows.data_ptr(), rows.stride(0)):
        unpack_triton(out_x, rows, positions, out_scales=out_scales, scales_at=scales_at)
        return
    if not len(rows):
        return
    device, words = rows.device, scratch(rows.device)
    scale_bytes = 0 if out_scales is None else out_scales.shape[1] * out_scales.element_size()
    numbers = table((len(rows), 0), torch.int32, device)
    arguments = Unpack(
        windows=table((rows.data_ptr(),), torch.int64, device).data_ptr(), num_sources=1,
        num_rows=numbers.data_ptr(), starts=numbers[1:].data_ptr(), row_bytes=rows.stride(0), payload_bytes=payload,
        positions=_dense(positions, "positions"), num_positions=positions.shape[1], out_x=_dense(out_x, "out_x"),
        out_scales=_dense(out_scales, "out_scales") if scale_bytes else 0, scales_at=scales_at,
        scale_bytes=scale_bytes, release=_nobody(words),
    )  # fmt: skip
    threads = threads_for("dispatch", payload)
    launch("moe_comm_dispatch_unpack", arguments, device=device, num_threads=threads)


def reduce_cuda(
    out: Tensor,
    memory: Tensor,
    offsets: Tensor,
    *,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    inner_first: int = 0,
    inner_last: int = 0,
    num_tokens: Tensor | None = None,
) -> None:
    payload = out.shape[1] * out.element_size()
    bias_at, bias_stride = (0, 0) if bias is None else (bias.data_ptr(), _row_bytes(bias))
    strides = payload, out.data_ptr(), _row_bytes(out), memory.data_ptr(), bias_at, bias_stride
    if not fits(*strides) or out.stride(1) != 1 or (bias is not None and bias.stride(1) != 1):
        reduce_triton(
            out, memory, offsets, weights=weights, bias=bias, inner_first=inner_first, inner_last=inner_last,
            num_tokens=num_tokens,
        )  # fmt: skip
        return
    if not len(out):
        return
    device, words = out.device, scratch(out.device)
    groups = None
    if num_tokens is not None:
        real = num_tokens.clamp(max=len(out)).long().view(1)
        groups = torch.cat((table((out.data_ptr(), _row_bytes(out), 0), torch.int64, device), real))
    arguments = Combine(
        memory=memory.data_ptr(), offsets=_dense(offsets, "offsets"), weights=_dense(weights, "weights"),
        bias=bias_at, bias_stride=bias_stride, num_terms=offsets.shape[1], inner_first=inner_first,
        inner_last=max(inner_first, inner_last), payload_bytes=payload, groups=_dense(groups, "groups"), num_local=1,
        epoch=words[4:].data_ptr(), arrived=words.data_ptr(), status=words[2:].data_ptr(),
        whole=Group(out=out.data_ptr(), out_stride=_row_bytes(out), num_rows=len(out)),
    )  # fmt: skip
    kernel, threads = f"moe_comm_combine_send_{DTYPES[out.dtype]}", threads_for("combine", payload)
    launch(kernel, arguments, device=device, num_threads=threads)
