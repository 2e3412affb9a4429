"""Events and hooks: what the async forms of dispatch and combine return.

A **hook** (`async_op="hook"`) is called to receive: the call itself only sent. An **event** (`async_op="event"`) says
when the results may be used; on the CPU the work is done when the call returns, so `wait()` returns at once. With CUDA
tensors it is one of the stream that was current when the call, or the hook, returned.
"""

from collections.abc import Callable
from typing import Any


class Event:
    """Completion of an async dispatch or combine."""

    def __init__(self) -> None:
        self._recorded: Any = None  # a device's event

    def _record(self, recorded: Any) -> None:
        """From now on this is `recorded`, an event of a device."""
        self._recorded = recorded

    def wait(self) -> None:
        """Returns when the results may be used by this thread (GPU: orders the current stream behind them)."""
        if self._recorded is not None:
            self._recorded.wait()

    current_stream_wait = wait

    def query(self) -> bool:
        """True when the results may be used without waiting."""
        return self._recorded is None or bool(self._recorded.query())


class Hook:
    """Receives a sent exchange. Call it once, or more often: later calls do nothing.

    Raises what the exchange raised (PeerError, PeerTimeout, …); the results may be used after it returned.
    """

    result: Any = None  # what the call would have returned; set by the hook

    def __init__(self, receive: Callable[[], None]):
        self._receive: Callable[[], None] | None = receive

    @property
    def done(self) -> bool:
        return self._receive is None

    def __call__(self) -> None:
        receive, self._receive = self._receive, None
        if receive is not None:
            receive()
