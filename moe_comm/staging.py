"""CUDA tensors at the edge of every public call: staged through pinned host memory ("host-staged by copy").

    x on the GPU ─copy on the caller's current stream, event→ pinned host ─┐
    results on the GPU ←copy on the caller's current stream─ pinned host ←─┴─ the exchange of CPU tensors, as it is

- The first argument's device (x, y, topk_idx) is the call's; every other tensor must be there, too. Handles are not
  touched: their tables live on the host. What is wrong takes the place of the first argument, so that the call refuses
  it as it refuses any other wrong argument: this rank still takes part, and the others raise PeerError.
- The copy to the host is waited for by asking its event, until the call's deadline; nothing synchronises a device.
- Results are made in pinned memory (memory.py) and copied without blocking; torch's allocator of pinned memory keeps a
  block until the event of the last such copy passed. They may be used on the current stream at once.
- Bytes are moved, never computed with: results are bit-identical to those of CPU tensors.

Costs two copies over PCIe and a wait of the host for each call, and cannot be captured in a CUDA graph; a Buffer with
device="cuda" has kernels read and write the windows themselves instead (kernel_exchange.py). Not yet measured on
hardware (2026-11-21). *Source*: ours.
"""

import contextlib
import dataclasses
import functools
import inspect
import logging
import time
import types
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from . import memory
from .arguments import Found, describe
from .dispatch import Dispatched
from .event import Hook

_log = logging.getLogger(__name__)

SPIN_S, NAP_S = 200e-6, 50e-6  # how long a copy's event is asked without a pause, and the pause


class Copies(Protocol):
    """What a kind of device must do: copies to and from the host, in order on its current stream, and events."""

    def new_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that the device can copy to and from by itself, kept until its last copy is over."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """Host memory of the same shape and order of strides; its contents are there after an event."""

    def new_device(self, host: Tensor, device: torch.device) -> Tensor:
        """Device memory of the same shape and strides, contents undefined."""

    def to_device(self, host: Tensor, target: Tensor) -> None:
        """Starts a copy. `host` may be dropped at once, but not written to."""

    def event(self, device: torch.device) -> Any:
        """Recorded on the current stream. `query()`: everything before it is done; `wait()`: orders the stream."""

    def refuses(self, device: torch.device) -> str:
        """Why nothing can be copied just now; empty if it can."""


class CudaCopies:
    """`Copies` of torch's CUDA devices (AMD's have the same names)."""

    def new_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        if host.stride() != tensor.stride():  # rows with gaps: made dense where the memory is fast
            tensor = torch.empty_like(tensor).copy_(tensor)
        return host.copy_(tensor, non_blocking=True)

    def new_device(self, host: Tensor, device: torch.device) -> Tensor:
        return torch.empty_like(host, device=device)

    def to_device(self, host: Tensor, target: Tensor) -> None:
        if not host.is_pinned():
            host = torch.empty_like(host, pin_memory=True).copy_(host)
        target.copy_(host, non_blocking=True)

    def event(self, device: torch.device) -> Any:
        recorded = torch.cuda.Event()
        recorded.record(torch.cuda.current_stream(device))
        return recorded

    def refuses(self, device: torch.device) -> str:
        with torch.cuda.device(device):
            capturing = torch.cuda.is_current_stream_capturing()
        return "its stream is captured for a CUDA graph" if capturing else ""


DEVICES: dict[str, Copies] = {"cuda": CudaCopies()}
"""By `torch.device.type`: the devices whose tensors are staged."""


def device_of(value: Any) -> torch.device | None:
    """The device that a first argument, or the first of a pair, must be staged from; None: it need not."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, Tensor) or value.is_cpu or value.device.type not in DEVICES:
        return None
    return value.device


_said: dict[str, object] = {}


def say_mode(kind: str) -> None:
    """One line in the log, once for a kind of device, whichever thread comes first."""
    mine = object()
    if _said.setdefault(kind, mine) is mine:
        _log.info("%s tensors are host-staged by copy: a Buffer's windows are in host memory", kind)


def new_on(device: torch.device, host: Tensor) -> Tensor:
    """Memory of a staged device, of this shape, contents undefined."""
    return DEVICES[device.type].new_device(host, device)


def staged(
    first: str,
    *,
    fills: tuple[str, ...] = (),
    updates: tuple[str, ...] = (),
    keeps: tuple[int, ...] = (),
    either: tuple[str, ...] = (),
    order: Callable[[Any], None] | None = None,
    where: Callable[[Any], Any] = lambda self: getattr(self, "device", None),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Lets a method of an object with a `runtime` (a Buffer) or `timeouts` take CUDA tensors.

    first: its first argument's name. fills, updates: tensors it writes; `updates` are read, too. keeps: which of a
    tuple of results stay on the host. either: arguments that may be on the host as well. order: orders the current
    stream behind an argument called previous_event…. where: the device whose tensors the method takes as they are.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            device = device_of(args[0] if args else kwargs.get(first))
            if device is None or device == where(self):
                return method(self, *args, **kwargs)
            say_mode(device.type)
            bound = signature.bind(self, *args, **kwargs)
            stage = _Stage(device)
            try:
                stage.take_all(self, bound.arguments, first, fills, updates, either, order)
            except _Refused as problem:
                bound.arguments[first] = Found(f"one on {device}, but {problem}")
            with memory.allocated_by(stage.copies.new_host):
                result = method(*bound.args, **bound.kwargs)
            return stage.give(result, keeps)

        return call

    return decorate


class _Refused(Exception):
    """Why a call's tensors cannot be staged."""


class _Stage:
    """The device's side of one call."""

    def __init__(self, device: torch.device):
        self.device, self.copies = device, DEVICES[device.type]
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}  # (host, device) of what is written

    # --- to the host -------------------------------------------------------------------------------

    def take_all(
        self,
        owner: Any,
        arguments: dict[str, Any],
        first: str,
        fills: tuple[str, ...],
        updates: tuple[str, ...],
        either: tuple[str, ...],
        order: Callable[[Any], None] | None,
    ) -> None:
        """Puts host tensors in the place of the device's, and waits for their bytes."""
        problem = self.copies.refuses(self.device)
        if problem:
            raise _Refused(problem)
        names = [n for n in list(arguments)[1:] if n != "handle"]
        for name in names:
            if order is not None and name.startswith("previous_event"):
                with contextlib.suppress(ValueError):  # the method says what is wrong with it
                    order(arguments[name])
        try:
            for name in names:
                value = arguments[name]
                if name in either and isinstance(value, Tensor) and value.is_cpu:
                    continue
                host = arguments[name] = self._take(name, value, copied=name not in fills)
                if name in fills + updates:
                    self._pair(host, value)
            self._wait(_limit_s(owner, arguments))
        except (RuntimeError, TypeError, ValueError) as error:  # the device's own errors, too
            raise _Refused(f"{self.device} failed: {error}") from error

    def _pair(self, host: Any, value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for near, far in zip(host, value, strict=True):
                self._pair(near, far)
        elif isinstance(value, Tensor):
            self.pairs[id(host)] = (host, value)

    def _take(self, name: str, value: Any, copied: bool) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._take(f"{name}[{i}]", v, copied) for i, v in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        if value.device != self.device:
            place = " on the CPU" if value.is_cpu else ""
            raise _Refused(f"{name} is {describe(value)}{place}")
        if not copied:
            return self.copies.new_host(tuple(value.shape), value.dtype)
        return self.copies.to_host(value.detach())

    def _wait(self, limit_s: float) -> None:
        copied, start = self.copies.event(self.device), time.monotonic()
        while not copied.query():
            waited = time.monotonic() - start
            if waited > limit_s:
                raise _Refused(f"its stream did not come to this call within {limit_s:g} s")
            time.sleep(NAP_S if waited > SPIN_S else 0)

    # --- back to the device ------------------------------------------------------------------------

    def give(self, result: Any, keeps: tuple[int, ...] = ()) -> Any:
        """The result with the device's tensors in the place of the host's; copies are started, or left to its hook."""
        if isinstance(result, Hook):
            return self._hook_of(result)
        hooks: list[Callable[[], None]] = []
        events: list[Any] = []
        given = self._give(result, keeps, hooks, events)
        if not hooks:
            self._copy_back()
        for event in events:
            event._record(self.copies.event(self.device))
        return given

    def _give(self, value: Any, keeps: tuple[int, ...], hooks: list, events: list) -> Any:
        if isinstance(value, Tensor):
            pair = self.pairs.get(id(value))
            if pair is None:
                pair = value, self.copies.new_device(value, self.device)
                self.pairs[id(value)] = pair
            return pair[1]
        if isinstance(value, (tuple, list)):
            return type(value)(
                v if i in keeps else self._give(v, (), hooks, events) for i, v in enumerate(value)
            )
        if isinstance(value, Dispatched):
            fields = ("x", "topk_idx", "topk_weights", "tokens_per_expert")
            moved = {f: self._give(getattr(value, f), (), hooks, events) for f in fields}
            return dataclasses.replace(value, **moved)
        if isinstance(value, types.FunctionType):  # deep_ep's hooks
            hooks.append(value)
            return self._receiver(value)
        if hasattr(value, "_record"):
            events.append(value)
        return value

    def _copy_back(self) -> None:
        for host, target in self.pairs.values():
            if host.numel():
                self.copies.to_device(host, target)

    def _receiver(self, receive: Callable[[], None]) -> Callable[[], None]:
        """A hook that also copies what it received; later calls do nothing."""
        todo = [receive]

        def receive_and_copy() -> None:
            if not todo:
                return
            with memory.allocated_by(self.copies.new_host):
                todo.pop()()
            self._copy_back()

        return receive_and_copy

    def _hook_of(self, inner: Hook) -> Hook:
        def receive() -> None:
            with memory.allocated_by(self.copies.new_host):
                inner()
            outer.result, inner.result = self.give(inner.result), None

        outer = Hook(receive)
        return outer


def _limit_s(owner: Any, arguments: dict[str, Any]) -> float:
    """The call's deadline, as its Buffer has it."""
    buffer = owner if hasattr(owner, "timeouts") else owner.runtime
    limit: float = 1.0 if buffer is None else buffer.timeouts(arguments.get("timeout_s"))[0]
    return limit
