"""WindowLayout and RowFormat: the only list of regions, offsets and bytes. Both sides of every copy compute from here.

One shared segment per rank and Buffer; windows may lie in memory of their own instead, of a device (window_memory.py):
all of them, or those that the network does not touch. All offsets and strides are multiples of 64:

    doorbell · own heartbeat · heartbeats[R] · commits[2][R + N] · releases[2][R] · sents[2][R]      control words
    slots[…][2]      receive windows, in two banks, that ranks of the node write: one for each rank of the group
                     (hops="node"), or of the node (hops="rank")
    far_slots[R - G][2]  hops="rank": receive windows that the other ranks write by the network
    links[N - 1][2]  hops="node": windows that the rail peers write by the network
    sends[…][2]      where rows for the network are packed: N - 1 (hops="node") or R - G (hops="rank")

A window is: header (256 B) · counts (first dispatch only) · C rows. C, the source tokens of one round, follows from the
call's row and the window's stride; row formats differ from call to call, the windows do not.

Memory for C rows of `row_bytes`: 2·(R + 2(N-1))·C·row for hops="node", 2·(2R - G)·C·row for hops="rank"
(`window_bytes`; headers and control words come on top, `total_bytes`).
"""

import dataclasses
import functools

import torch

from ._engine import HEADER_BYTES, ROW_ALIGNMENT
from .errors import ArgumentError

DTYPE_CODES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3, torch.float64: 4}
"""Codes of dtypes that combine can add; every other one is moved as bytes (code 0 + item size · 16)."""

_ALIGN = 64


@functools.cache
def dtype_code(dtype: torch.dtype) -> int:
    """Agreed between ranks in every header. Distinguishes all dtypes; the low 4 bits are what csrc adds in."""
    code = DTYPE_CODES.get(dtype)
    if code is not None:
        return code
    return (
        16 * (1 + sorted(str(d) for d in _BYTE_DTYPES).index(str(dtype)))
        if dtype in _BYTE_DTYPES
        else 0
    )


_BYTE_DTYPES = [
    getattr(torch, name)
    for name in (
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
        "int8", "uint8", "int16", "int32", "int64",
    )
    if hasattr(torch, name)
]  # fmt: skip


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """Bytes of one row: payload · scales · source token (int32) · ids (int32 [K]) · weights or columns (fp32 [K])."""

    payload_bytes: int
    scale_bytes: int
    scales_at: int
    token_at: int
    ids_at: int
    weights_at: int  # 0: none
    topk: int
    row_bytes: int

    @classmethod
    @functools.lru_cache(256)
    def of_dispatch(
        cls, payload_bytes: int, scale_bytes: int, topk: int, *, weights: bool, cached: bool = False
    ) -> "RowFormat":
        """A cached dispatch carries neither token nor ids: its places are known from the handle."""
        at = payload_bytes
        scales_at, at = at, at + _up(scale_bytes, 4)
        if cached:
            return cls(payload_bytes, scale_bytes, scales_at, 0, 0, 0, topk, _up(at, ROW_ALIGNMENT))
        token_at, ids_at, at = at, at + 4, at + 4 + 4 * topk
        weights_at, at = (at, at + 4 * topk) if weights else (0, at)
        return cls(
            payload_bytes, scale_bytes, scales_at, token_at, ids_at, weights_at, topk, _up(at, ROW_ALIGNMENT)
        )  # fmt: skip

    @classmethod
    @functools.lru_cache(256)
    def of_combine(cls, payload_bytes: int, topk: int, *, columns: bool) -> "RowFormat":
        at = payload_bytes
        weights_at, at = (at, at + 4 * topk) if columns else (0, at)
        return cls(payload_bytes, 0, 0, 0, 0, weights_at, topk, _up(at, ROW_ALIGNMENT))


@functools.lru_cache(256)
def counts_bytes(num_experts: int, num_ranks: int, node_ranks: int, *, by_node: bool) -> int:
    """Bytes between a fresh dispatch's header and rows: uint32 [G, 1 + L] in a link window, [L] in a slot.

    The larger of the two, so that one C holds for both.
    """
    local_experts = -(-num_experts // num_ranks)
    words = node_ranks * (1 + local_experts) if by_node else local_experts
    return _up(4 * words, ROW_ALIGNMENT)


@dataclasses.dataclass(frozen=True)
class WindowLayout:
    """Offsets (bytes) into a rank's window segment; the same on all ranks of a Buffer."""

    num_ranks: int
    num_nodes: int
    node_ranks: int
    hops: str
    stride: int  # bytes of one window, header and counts included
    capacity: int  # C rows of `row_bytes`, what the stride was made for
    row_bytes: int

    @classmethod
    def for_rows(
        cls,
        num_ranks: int,
        num_nodes: int,
        hops: str,
        *,
        capacity: int,
        row_bytes: int,
        num_experts: int,
    ) -> "WindowLayout":
        """Windows of exactly `capacity` rows of `row_bytes`."""
        node_ranks = num_ranks // num_nodes
        counts = counts_bytes(num_experts, num_ranks, node_ranks, by_node=hops == "node")
        stride = _up(HEADER_BYTES + counts + capacity * row_bytes, _ALIGN)
        return cls(num_ranks, num_nodes, node_ranks, hops, stride, capacity, row_bytes)

    @classmethod
    def for_budget(
        cls,
        num_ranks: int,
        num_nodes: int,
        hops: str,
        *,
        window_bytes: int,
        row_bytes: int,
        num_experts: int,
    ) -> "WindowLayout":
        """The largest C whose windows take at most `window_bytes`; at least one row."""
        probe = cls(num_ranks, num_nodes, num_ranks // num_nodes, hops, 0, 1, 1)
        capacity = max(1, window_bytes // (probe.num_windows * row_bytes))
        return cls.for_rows(
            num_ranks,
            num_nodes,
            hops,
            capacity=capacity,
            row_bytes=row_bytes,
            num_experts=num_experts,
        )

    @property
    def num_windows(self) -> int:
        """Windows of one rank, both banks: slots, link windows and send regions."""
        if self.hops == "node":
            return 2 * (self.num_ranks + 2 * (self.num_nodes - 1))
        return 2 * (2 * self.num_ranks - self.node_ranks)

    @property
    def window_bytes(self) -> int:
        """Bytes of rows in all windows: the formula at the head of this file."""
        return self.num_windows * self.capacity * self.row_bytes

    def capacity_for(self, row_bytes: int, counts: int) -> int:
        """C for a call with such rows and so many bytes of counts; raises ArgumentError if not one row fits."""
        capacity = (self.stride - HEADER_BYTES - counts) // row_bytes
        if capacity < 1:
            raise ArgumentError(
                f"window_bytes: expected windows that hold a row of {row_bytes} bytes with {counts} bytes of counts, "
                f"got {self.stride} bytes each: make the Buffer with such a hidden size, or with more window_bytes"
            )
        return capacity

    def offsets(self, apart: str = "") -> dict[str, int]:
        """What csrc/exchange.hpp calls WindowOffsets; `segment` and `apart`: bytes of the two memories.

        apart: which windows are in memory of their own, there from 0 on: "", "near" (those of the node), or "all".
        """
        R, N, G = self.num_ranks, self.num_nodes, self.node_ranks
        by_node = self.hops == "node"
        beats = 128
        commits = _up(beats + 16 * R, _ALIGN)
        releases = _up(commits + 8 * 2 * (R + N), _ALIGN)
        sents = _up(releases + 8 * 2 * R, _ALIGN)
        masks = _up(sents + 8 * 2 * R, _ALIGN)
        told = _up(masks + 8 * R, _ALIGN)
        control = _up(told + 8 * R, 4096)
        slots = 0 if apart else control
        near_end = slots + 2 * (R if by_node else G) * self.stride
        far_slots = control if apart == "near" else near_end
        links = far_slots + 2 * (0 if by_node else R - G) * self.stride
        sends = links + 2 * (N - 1 if by_node else 0) * self.stride
        end = sends + 2 * (N - 1 if by_node else R - G) * self.stride
        return {
            "beats": beats, "commits": commits, "releases": releases, "sents": sents, "masks": masks, "told": told,
            "slots": slots, "far_slots": far_slots, "links": links, "sends": sends, "stride": self.stride,
            "segment": control if apart == "all" else end, "apart": {"": 0, "near": near_end, "all": end}[apart],
        }  # fmt: skip

    @property
    def total_bytes(self) -> int:
        return self.offsets()["segment"]
