"""Watcher: a 64-bit word that somebody bumps (a kernel, a peer, another thread) and the host reacts to.

The word only says *that* and *how far*: whoever waits sees the newest value, intermediate ones may be missed. Nothing
is sent, nobody is rung: the watching side polls, in C++ and without the GIL: it spins, yields, then naps 20 µs to 1 ms.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _engine
from .arguments import describe
from .arguments import expect as require
from .errors import ArgumentError, ClosedError, PeerTimeout
from .region import locate, shared_tensor

if TYPE_CHECKING:
    from .engine import TransferEngine

Callback = Callable[[int, int], bool | None]


class Watcher:
    """Made by `TransferEngine.watcher`. The word is `tensor`, [1] int64, seen as unsigned; it starts at 0 unless given.

    Whoever bumps the word does it after the data it speaks of are visible to this host's CPUs, by a store of 8 bytes
    (on a GPU: a system-scope release into host memory; here: `watcher.tensor += 1`).
    """

    def __init__(self, engine: "TransferEngine", word: Tensor | None):
        self._engine = engine
        if word is None:
            word = shared_tensor((1,), torch.int64)
        good = isinstance(word, Tensor) and word.dtype == torch.int64 and word.numel() == 1
        require(good, "word", "int64 [1]", describe(word))
        _, self.address, _ = locate(word)
        require(self.address % 8 == 0, "word", "memory aligned to 8 bytes", hex(self.address))
        self.tensor = word
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._error: BaseException | None = None

    @property
    def value(self) -> int:
        """The word now, 0 to 2^64 - 1."""
        return _engine.wait_word(self.address, 0, 0.0)

    def wait(self, old: int, timeout_s: float | None = None) -> int:
        """Blocks until the word differs from `old`; returns it.

        Raises: PeerTimeout after `timeout_s`; ClosedError; what the callback raised, if there is one and it did.
        """
        deadline = self._engine.deadline(timeout_s)
        while (new := _engine.wait_word(self.address, old, deadline.slice)) == old:
            self._raise_error()
            if self._stop.is_set():
                raise ClosedError("watcher was closed")
            self._engine.check()
            if deadline.over:
                raise PeerTimeout(f"watcher: the word stayed {old} for {deadline.seconds:.1f} s")
        return new

    def watch(self, callback: Callback, *, old: int = 0) -> None:
        """Calls `callback(old, new)` in a thread of its own whenever the word differs from what it saw last.

        `old`: what counts as seen already. The callback returns False to end the watching (None goes on); while it runs
        no other call is made, and later bumps are seen together. What it raises ends the watching and is raised by the
        next `wait()` or `close()`. Raises: ArgumentError if there is a callback already.
        """
        if not callable(callback):
            raise ArgumentError(f"callback: expected a callable, got {type(callback).__name__}")
        if self._stop.is_set():
            raise ClosedError("watcher was closed")
        if self._thread is not None:
            raise ArgumentError("callback: expected one per watcher, got a second")
        self._thread = threading.Thread(
            target=self._run, args=(callback, old), name="moe_comm:watcher", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Ends the watching and waits for a callback that is running. Raises what the callback raised, once."""
        self._stop.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._engine.forget_watcher(self)
        self._raise_error()

    def _run(self, callback: Callback, old: int) -> None:
        try:
            while not self._stop.is_set():
                new = _engine.wait_word(self.address, old, 0.05)
                if new == old:
                    continue
                if callback(old, new) is False:
                    return
                old = new
        except BaseException as error:  # kept, not swallowed: see close()
            self._error = error

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
