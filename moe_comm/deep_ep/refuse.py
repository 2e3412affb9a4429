"""Wrong input that this package finds before moe_comm does: the rank takes part with no tokens, so that no peer waits.

A collective call of `moe_comm.Buffer` does that for what it checks itself; `or_refuse` does it for what stands before.
"""

import contextlib
from collections.abc import Iterator

from ..buffer import Buffer
from ..combine import CombineRequest, PendingCombine
from ..dispatch import COMBINE, DispatchRequest, PendingDispatch

_NO_DISPATCH = DispatchRequest(None, None, None, 0, "rank", 1, None, None, None, False)
_NO_COMBINE = CombineRequest(
    None, None, None, None, None, None, None, False, None, None, False  # type: ignore[arg-type]
)  # fmt: skip


@contextlib.contextmanager
def or_refuse(buffer: Buffer, kind: int) -> Iterator[None]:
    """Around what comes before one DISPATCH or COMBINE of `buffer`, the exchange itself not included.

    An error inside goes to the peers, who raise PeerError with its text; here it is raised as ArgumentError.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as e:
        _take_part(buffer, kind, str(e) or type(e).__name__)


def _take_part(buffer: Buffer, kind: int, text: str) -> None:
    """One exchange without tokens and with `text` in its header. Raises ArgumentError with it."""

    def refused(
        buffer: Buffer, request: DispatchRequest | CombineRequest
    ) -> PendingDispatch | PendingCombine:
        pending: PendingDispatch | PendingCombine
        if isinstance(request, CombineRequest):
            pending = PendingCombine(buffer, request)
        else:
            pending = PendingDispatch(buffer, request)
        pending.refuse(text)
        return pending

    if kind == COMBINE:
        buffer._run(refused, _NO_COMBINE, "combines", None)  # type: ignore[arg-type]
    else:
        buffer._run(refused, _NO_DISPATCH, "dispatches", None)  # type: ignore[arg-type]
