"""What is open in this process: closed when the process ends, of no use in a fork of it.

An ending process closes what it forgot to, so that what its last calls sent still arrives. `atexit` is not enough for
that: a child of multiprocessing (torch.multiprocessing.spawn, too) ends without it and runs multiprocessing's own
finalizers instead. A forked process (a DataLoader's worker) has neither the threads nor a place among the ranks:
there everything counts as closed, and nothing that ends in it may touch what its parent shares with the peers.
"""

import contextlib
import multiprocessing.util
import os
import weakref
from typing import Protocol

from . import _engine
from .errors import MoeCommError


class Closable(Protocol):
    """Of Buffer and TransferEngine."""

    def close(self) -> None:
        """Drains and ends it."""

    def leave_to_parent(self) -> list[object]:
        """In a fork: counts as closed from now on. Returns the native objects that must never be destroyed here."""


_open: "weakref.WeakSet[Closable]" = weakref.WeakSet()


def opened(thing: Closable) -> None:
    """Remembers it until it is gone."""
    _open.add(thing)


def _close_all() -> None:
    for thing in list(_open):
        with contextlib.suppress(MoeCommError):
            thing.close()


def _leave_all_to_parent() -> None:
    for thing in list(_open):
        for native in thing.leave_to_parent():
            _engine.never_destroy(native)
    _open.clear()


def _close_at_end(*_: object) -> None:
    # Runs at an ordinary exit as well: multiprocessing.util is registered with atexit.
    multiprocessing.util.Finalize(None, _close_all, exitpriority=100)


_close_at_end()
multiprocessing.util.register_after_fork(_close_all, _close_at_end)  # no finalizer outlives a fork
os.register_at_fork(after_in_child=_leave_all_to_parent)
