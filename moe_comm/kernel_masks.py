"""Masks: calls by kernels that go on without the ranks that are lost or late (`mask_lost`).

    a wait that gives a rank up (csrc/proxy_rings.cpp), or Buffer.mask ─mask words of the host→ leave_out (headers.cuh)
    leave_out ─nulls for what the call's block had of that rank→ every kernel behind it

A wait masks whom it cannot wait for, instead of failing, and ends well. The next kernel of the call reads all masks
once and takes the ranks' windows, words and links out of the call's addresses, so all kernels up to the next wait are
of one mind, however many calls are under way. A rank that is left out while it receives counts as no tokens and no
results; a dispatch is named by its epoch, since ranks may know of different sources. Memory of a rank that died stays
mapped here, and nobody touches it once the rank is masked.
*Source*: ours, as the CPU's exchange does it (csrc/exchange.hpp: mask_or).
"""

from collections.abc import Callable
from typing import Any

import torch

from .kernels import fused


class Masks:
    """Of one KernelExchange whose ranks are lanes.

    Args:
        address: where the mask words [R] are, as the device sees them.
        view: what `native.open_view` said.
        first: the number of the first word in a call's block that is neither a table's nor a kernel's.
        constant: makes a tensor on the device.
    """

    def __init__(
        self,
        address: int,
        num_ranks: int,
        view: dict[str, Any],
        first: int,
        constant: Callable[[list[int], torch.dtype], torch.Tensor],
    ):
        self._address, self._num_ranks, self._first = address, num_ranks, first
        linked = [rank for rank in view["links"] for _ in range(4)]
        everyone, near = list(range(num_ranks)), view["local"]
        ranks = {
            "out": everyone,
            "in": everyone,
            "links": linked,
            "commits": near,
            "releases": near,
        }
        self._owners = constant(
            [rank for name, _, _ in view["tables"] for rank in ranks[name]], torch.int32
        )

    def leave_out(self, block: torch.Tensor) -> fused.LeaveOut:
        """What the kernel takes, for a call's block."""
        return fused.LeaveOut(
            masks=self._address, num_ranks=self._num_ranks, seen=block[self._first :].data_ptr(),
            owners=self._owners.data_ptr(), num_words=len(self._owners), words=block[1:].data_ptr(),
        )  # fmt: skip
