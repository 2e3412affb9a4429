"""EventHandle and EventOverlap: when the results of an async call may be used.

On the CPU work is done when a call returns, so a wait returns at once; an `EventHandle` exists so that one program runs
on CPU and GPU. Where CUDA is initialised in this process, an EventHandle records an event on the current stream.

DeepEP hands out the one class here and the other there; everything in this package that takes an event takes both, a
`torch.cuda.Event`, or None (`wait_for_event`). *Source*: DeepEP's names and signatures of all generations.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..arguments import wrong
from ..event import Event


class EventHandle:
    """Everything that this thread (its current stream, if there is one) was given up to now."""

    def __init__(self) -> None:
        self._recorded: Any = None
        if torch.cuda.is_initialized():
            self._recorded = torch.cuda.Event()
            self._recorded.record(torch.cuda.current_stream())

    def _record(self, recorded: Any) -> None:
        self._recorded = recorded

    def current_stream_wait(self) -> None:
        """Orders the current stream behind it. Does not block; without CUDA, nothing is left to wait for."""
        if self._recorded is not None:
            self._recorded.wait()


class EventOverlap:
    """An EventHandle, or None, with a context manager: `with event: …` waits when the block ends.

    Args:
        event: what to wait for; None where the call was not async.
        extra_tensors: kept alive as long as this object is.

    `event` may be read and written. `hook_after_wait` is run once, after the next wait.
    """

    def __init__(
        self, event: EventHandle | None = None, extra_tensors: tuple | None = None
    ) -> None:
        self.event: Any = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], Any] | None = None
        self._release = False

    def _record(self, recorded: Any) -> None:
        if self.event is not None:
            self.event._record(recorded)

    def register_hook_after_wait(self, fn: Callable[[], Any]) -> None:
        """Runs `fn` after the next wait. Raises: ArgumentError if there is one already."""
        if self.hook_after_wait is not None:
            raise wrong("fn", "none registered yet", self.hook_after_wait)
        self.hook_after_wait = fn

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Orders the current stream behind the event; then runs the hook; drops the event if `release_handle`.

        Raises: ArgumentError if `event` is None.
        """
        if self.event is None:
            raise wrong("event", "that of an async call", None)
        wait_for_event(self.event, "event")
        hook, self.hook_after_wait = self.hook_after_wait, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = None

    def __call__(self, release_handle: bool = False) -> "EventOverlap":
        """`with event(release_handle=True): …`. Its end waits."""
        self._release = release_handle
        return self

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(self, *_: object) -> None:
        if self.event is not None:
            self.current_stream_wait(self._release)
        self._release = False


def wait_for_event(event: Any, name: str = "previous_event") -> None:
    """Orders the current stream behind an EventOverlap, an EventHandle, a `torch.cuda.Event`, ours, or None.

    Raises: ArgumentError for anything else. Does not block.
    """
    if isinstance(event, EventOverlap):
        event = event.event
    if event is None:
        return
    if isinstance(event, (EventHandle, Event)):
        event.current_stream_wait()
    elif isinstance(event, torch.cuda.Event):
        torch.cuda.current_stream().wait_event(event)
    else:
        raise wrong(name, "an EventOverlap, an EventHandle, a torch.cuda.Event or None", event)
