"""What kernels found wrong, in words: this rank's routing, then the peers' headers (KernelExchange.raise_told)."""

import torch
from torch import Tensor

from . import _engine
from .errors import ArgumentError
from .kernel_exchange import KernelExchange
from .kernel_told import Told
from .kernels.route import ERROR_RANGE

LANES_TEXT = "topk_idx: expected that of the handle's dispatch, got other ids for token %t"


def route_texts(num_experts: int) -> tuple[str, str]:
    """By what route finds wrong; the expert, the token and the entry come for %e, %t and %k (headers.cuh)."""
    return (
        f"topk_idx: expected expert ids in [0, {num_experts}) or -1, got %e at [%t, %k]",
        "topk_idx: expected different experts for one token, got expert %e twice at token %t",
    )


def wrong_routing(error: list[int], num_experts: int, idx: Tensor) -> str:
    """What route found wrong, in words; empty: nothing."""
    found, token, entry = error
    if not found:
        return ""
    text = route_texts(num_experts)[found - ERROR_RANGE]
    for letter, number in (("e", int(idx[token, entry])), ("t", token), ("k", entry)):
        text = text.replace(f"%{letter}", str(number))
    return text


def judge_combine(exchange: KernelExchange, found: _engine.CallFormat, told: Told) -> None:
    """Raises what is wrong with this rank's lanes, else with the others' headers."""
    error, token = told.words[4:6].tolist()
    if error and not told.words[0]:
        raise ArgumentError(LANES_TEXT.replace("%t", str(token)))
    exchange.raise_told(told, found, belongs=True, ranks=exchange.sum_ranks)


def judge_dispatch(
    exchange: KernelExchange,
    found: _engine.CallFormat,
    num_experts: int,
    idx: Tensor | None,
    told: Told,
) -> None:
    """Raises what is wrong with this rank's topk_idx, else with the others' headers."""
    if idx is not None and not told.words[0]:
        text = wrong_routing(told.words[4:7].tolist(), num_experts, idx)
        if text:
            raise ArgumentError(text)
    exchange.raise_told(told, found, belongs=idx is None, ranks=range(exchange.num_ranks))


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device, or of the host's allocator, which has no type for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in str(error)
