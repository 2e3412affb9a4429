"""The Buffers of one integration: one per (group, options), made at the first forward that needs it.

All layers of a model share it: its windows are the memory, and nothing in it belongs to a layer.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

import moe_comm

# Arguments of Buffer that follow from the model; everything else in its signature is an option here.
_FROM_MODEL = ("self", "group", "hidden", "topk", "num_experts", "dtype")

Options = tuple[tuple[str, Any], ...]  # (name, value), sorted: a key


def checked(options: dict[str, Any]) -> Options:
    """Options of `moe_comm.Buffer` as a key. *Raises* TypeError, naming those there are, if one is unknown."""
    known = [
        name
        for name in inspect.signature(moe_comm.Buffer.__init__).parameters
        if name not in _FROM_MODEL
    ]
    for name in options:
        if name not in known:
            raise TypeError(f"{name}: expected an option of moe_comm.Buffer ({', '.join(known)})")
    return tuple(sorted(options.items()))


class Buffers:
    """What `of` has made and `close` has not closed yet, oldest first."""

    def __init__(self) -> None:
        # The key holds the process group itself: group names are reused after destroy_process_group, objects are not.
        self._made: dict[tuple[Any, Options], moe_comm.Buffer] = {}

    def of(
        self,
        group: Any,
        options: Options,
        *,
        hidden: int,
        topk: int,
        num_experts: int,
        dtype: torch.dtype,
    ) -> moe_comm.Buffer:
        """The Buffer of this group with these options; made on first use, which is collective, for these sizes."""
        key = (group, options)
        if key not in self._made:
            self._made[key] = moe_comm.Buffer(
                group,
                hidden=hidden,
                topk=topk,
                num_experts=num_experts,
                dtype=dtype,
                **dict(options),
            )
        return self._made[key]

    def all(self) -> list[moe_comm.Buffer]:
        return list(self._made.values())

    def close(self) -> None:
        """Close all of them and forget them. Collective."""
        while self._made:
            _, buffer = self._made.popitem()
            buffer.close()
