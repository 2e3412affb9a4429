"""moe_comm moves Mixture-of-Experts tokens between ranks, over any network. See README.md.

Importing it touches no GPU, no NIC and no environment variable.
"""

from . import errors, reference
from .alias import install_as_deep_ep
from .autograd import CombineFunction, DispatchFunction, combine, dispatch
from .buffer import Buffer
from .dispatch import Dispatched
from .engine import TransferEngine
from .errors import (
    ArgumentError,
    ClosedError,
    MismatchError,
    MoeCommError,
    PeerError,
    PeerLost,
    PeerTimeout,
    TransportError,
)
from .event import Event, Hook
from .group import EPGroup
from .handle import Handle
from .memory import empty_cache

__version__ = "0.1.0"

__all__ = [
    "Buffer",
    "Dispatched",
    "EPGroup",
    "Event",
    "Handle",
    "Hook",
    "TransferEngine",
    "combine",
    "dispatch",
    "empty_cache",
    "install_as_deep_ep",
    "CombineFunction",
    "DispatchFunction",
    "ArgumentError",
    "ClosedError",
    "MismatchError",
    "MoeCommError",
    "PeerError",
    "PeerLost",
    "PeerTimeout",
    "TransportError",
    "errors",
    "reference",
]
