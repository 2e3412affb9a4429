"""pack: the rows of one round, for one lane, into its window (H1 follows: the commit).

A row is payload · scales · source token · top-k ids · weights, at offsets that both sides compute
(moe_comm/layout.py: RowFormat). Bytes between the parts and behind the last row stay as they are.
"""

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_bytes_of(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [n] of `values` [T, S], of any dtype and strides, as [n, S·itemsize] uint8.

    Moved as integers: not every dtype can be indexed on every device, and no NaN may change.
    """
    integers = values.view(_INTEGERS[values.element_size()])
    return integers[index].contiguous().view(torch.uint8)


def pack_torch(
    window: Tensor,
    x: Tensor,
    lane_rows: Tensor,
    starts: Tensor,
    *,
    scales: Tensor | None = None,
    topk_idx: Tensor | None = None,
    topk_weights: Tensor | None = None,
    lane: int,
    first_token: int,
    last_token: int,
    scales_at: int = 0,
    token_at: int = 0,
    ids_at: int = 0,
    weights_at: int = 0,
) -> None:
    """Write the rows of the tokens [first_token, last_token) that have one in `lane`.

    `window` [C, row_bytes] uint8, rows dense; `x` [T, H]; `scales` [T, S]; both of any dtype, strides
    respected. `lane_rows` [T, D] and `starts` [D] (one row of `round_starts`) come from route.
    `topk_idx` [T, K] int64: None in a cached dispatch, whose rows carry neither token nor ids.
    `topk_weights` [T, K] float32 or None. The number of rows is the difference to the next starts.
    """
    rows = lane_rows[first_token:last_token, lane]
    token = (rows >= 0).nonzero()[:, 0]
    at = (rows[token] - starts[lane]).long()
    token = token + first_token

    def put(offset: int, values: Tensor) -> None:
        window[:, offset : offset + values.shape[1]][at] = values

    put(0, row_bytes_of(x, token))
    if scales is not None:
        put(scales_at, row_bytes_of(scales, token))
    if topk_idx is None:
        return
    put(token_at, token.int()[:, None].view(torch.uint8))
    put(ids_at, topk_idx[token].int().view(torch.uint8))
    if topk_weights is not None:
        put(weights_at, row_bytes_of(topk_weights, token))
