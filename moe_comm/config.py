"""Every MOE_COMM_* variable, with its unit and default. Read when a Buffer or an engine is made, never at import.

An argument of the constructor wins over the variable, the variable over the default.
"""

import dataclasses
import os
from typing import Any

from .errors import ArgumentError

VARIABLES: dict[str, tuple[type, Any, str]] = {
    "MOE_COMM_TRANSPORT": (
        str,
        "auto",
        "what carries rows between nodes: auto, shm, fabric:<libfabric provider>, verbs, verbs:<device>",
    ),
    "MOE_COMM_INTERFACE": (
        str,
        "",
        "interface, device or source address of the transport; empty: over tcp an address that the other hosts reach, "
        "else the transport's own choice. verbs: a device, settings, or "
        "both, as in mlx5_0,gid=3,traffic_class=106: port, gid (index), mtu (bytes, at most), pkey (index), sl, "
        "traffic_class, timeout (4.096 us * 2^n, 14), retries (7), rnr_timer (code, 12), relaxed (ordering, 1)",
    ),
    "MOE_COMM_LIBFABRIC": (
        str,
        "libfabric.so.1",
        "the libfabric that fabric:* opens, a file: AWS's is /opt/amazon/efa/lib/libfabric.so.1; read by the engine",
    ),
    "MOE_COMM_KERNELS": (
        str,
        "",
        "device code: torch, triton or cuda; empty: Triton for CUDA tensors, torch for others (moe_comm.kernels)",
    ),
    "MOE_COMM_DEVICE": (
        str,
        "",
        "cuda: Buffers whose calls are kernels, those of deep_ep, too, on tensors of that GPU; empty: CPU tensors, and "
        "CUDA tensors by copies",
    ),
    "MOE_COMM_WINDOWS": (
        str,
        "auto",
        "where windows of such Buffers lie: device (its memory), host (pinned, mapped), or auto: device if every rank "
        "can (moe_comm.window_memory)",
    ),
    "MOE_COMM_NUM_SMS": (
        int,
        0,
        "how many SMs the kernels of a call of such Buffers take, at most; 0: all",
    ),
    "MOE_COMM_RANKS_PER_NODE": (
        int,
        0,
        "pretend nodes of this many consecutive ranks; 0: ask the machines",
    ),
    "MOE_COMM_WINDOW_BYTES": (int, 512 * 10**6, "bytes of receive and send windows of one Buffer"),
    "MOE_COMM_TIMEOUT_S": (float, 300.0, "seconds until a live but late peer is an error"),
    "MOE_COMM_SILENCE_S": (float, 30.0, "seconds without heartbeat until a peer is lost"),
    "MOE_COMM_SHARD_BYTES": (
        int,
        0,
        "split messages into writes of this size; 0: only where they must be",
    ),
    "MOE_COMM_SYSFS": (
        str,
        "/sys",
        "tests: where the engine looks for GPUs and NICs",
    ),
    "MOE_COMM_CHAOS_SEED": (
        int,
        0,
        "tests: a seed makes the transport delay and reorder everything",
    ),
    "MOE_COMM_FIRST_EPOCH": (
        int,
        2,
        "tests: number of a Buffer's first exchange, even, at least 2",
    ),
}


def read(name: str, given: Any = None) -> Any:
    """The value of one variable: `given` if not None, else the environment's, else the default.

    Raises: ArgumentError if the environment holds something that is no number where one is expected.
    """
    kind, default, _ = VARIABLES[name]
    if given is not None:
        return given
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return kind(text)
    except ValueError:
        raise ArgumentError(f"{name}: expected {kind.__name__}, got {text!r}") from None


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of one Buffer, resolved."""

    transport: str
    interface: str
    ranks_per_node: int
    window_bytes: int
    timeout_s: float
    silence_s: float
    shard_bytes: int
    chaos_seed: int
    first_epoch: int
    device: str
    windows: str
    num_sms: int

    @classmethod
    def resolve(cls, **given: Any) -> "Config":
        """Fields by their name; None or absent: environment, then default."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{n: read(f"MOE_COMM_{n.upper()}", given.get(n)) for n in names})
