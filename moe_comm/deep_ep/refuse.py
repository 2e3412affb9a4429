"""Wrong input that this package finds before moe_comm does: the rank takes part with no tokens, so that no peer waits.

A collective call of `moe_comm.Buffer` does that for what it checks itself; `or_refuse` does it for what stands before.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from ..buffer import Buffer
from ..combine import CombineRequest, PendingCombine
from ..dispatch import COMBINE, DispatchRequest, PendingDispatch
from ..errors import ArgumentError, PeerError
from ..group import EPGroup

WRONG = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)
"""What wrong arguments raise here, or in torch."""

_NO_DISPATCH: Any = DispatchRequest(None, None, None, 0, "rank", 1, None, None, None, False)
_NO_COMBINE: Any = CombineRequest(
    None, None, None, None, None, None, None, False, None, None, False  # type: ignore[arg-type]
)  # fmt: skip


@contextlib.contextmanager
def or_refuse(buffer: Buffer, kind: int) -> Iterator[None]:
    """Around what comes before one DISPATCH or COMBINE of `buffer`, the exchange itself not included.

    An error inside goes to the peers, who raise PeerError with its text; here it is raised as ArgumentError.
    """
    try:
        yield
    except WRONG as error:
        text = str(error) or type(error).__name__
        take_part(buffer, kind, text)
        raise ArgumentError(text) from None


@contextlib.contextmanager
def or_tell(group: EPGroup) -> Iterator[None]:
    """Around the checks of a constructor, before there is a Buffer: an error inside raises on all ranks, as above."""
    error = None
    try:
        yield
    except WRONG as caught:
        error = ArgumentError(str(caught) or type(caught).__name__)
    told = group.gather(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, text in enumerate(told):
        if text is not None:
            raise PeerError(f"rank {rank} raised: {text}")


def take_part(buffer: Buffer, kind: int, text: str) -> PeerError | None:
    """One exchange without tokens and with `text` in its header. Returns what a peer refused it for, if one did, too.

    Raises: PeerTimeout, PeerLost.
    """
    made: list[PendingDispatch | PendingCombine] = []

    def refused(buffer: Buffer, request: Any) -> PendingDispatch | PendingCombine:
        pending = buffer._calls()[kind == COMBINE](buffer, request)
        pending.refuse(text)
        made.append(pending)
        return pending

    request, counter = _NO_DISPATCH, "dispatches"
    if kind == COMBINE:
        request, counter = _NO_COMBINE, "combines"
    with contextlib.suppress(ArgumentError):
        buffer._run(refused, request, counter, None)
    try:
        made[0].call.raise_failure()
    except PeerError as error:
        return error
    return None
