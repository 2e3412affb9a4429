"""The exception tree. Defined in csrc/bindings.cpp, because the engine raises most of them.

- `MoeCommError` (RuntimeError): base.
  - `ArgumentError` (ValueError): a wrong argument of this rank. Names it, what was expected, what was found. If it was
    found inside a collective call, this rank took part with zero tokens, and the others raise `PeerError`.
  - `PeerError`: another rank's argument was wrong; carries its text. The call is over everywhere, the next works.
    - `MismatchError`: ranks passed different parameters (num_experts, hidden size, dtype, another dispatch, …).
  - `PeerTimeout` (TimeoutError): a peer that lives did not come before the deadline. The Buffer is spent.
  - `PeerLost` (ConnectionError): a peer died, closed, or gave up (then the text says on whom). The Buffer is spent.
  - `TransportError`: a call of the network or of the system failed: call, errno, device, peer. Also a header that is
    not what anybody wrote; then the Buffer is spent.
  - `ClosedError`: used after `close()`.
"""

from ._engine import (
    ArgumentError,
    ClosedError,
    MismatchError,
    MoeCommError,
    PeerError,
    PeerLost,
    PeerTimeout,
    TransportError,
)

__all__ = [
    "ArgumentError",
    "ClosedError",
    "MismatchError",
    "MoeCommError",
    "PeerError",
    "PeerLost",
    "PeerTimeout",
    "TransportError",
]
