"""pack: the rows of one round, for one lane, into its window (H1 follows: the commit).

A row is payload · scales · source token · top-k ids · weights, at offsets that both sides compute
(moe_comm/layout.py: RowFormat). Bytes between the parts and behind the last row stay as they are.
"""

import torch
from torch import Tensor

from .language import INTEGERS, Items, as_integers, items_at, jit, launch, tl, up
from .quant import GROUPS, cast_groups, cast_to_fp8_torch, casts_in_hardware, form_index


def row_bytes_of(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [n] of `values` [T, S], of any dtype and strides, as [n, S·itemsize] uint8.

    Moved as integers: not every dtype can be indexed on every device, and no NaN may change.
    """
    integers = values.view(INTEGERS[values.element_size()])
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
    cast: str | None = None,
) -> None:
    """Write the rows of the tokens [first_token, last_token) that have one in `lane`.

    `window` [C, row_bytes] uint8, rows dense; `x` [T, H]; `scales` [T, S]; both of any dtype, strides
    respected. `lane_rows` [T, D] and `starts` [D] (one row of `round_starts`) come from route.
    `topk_idx` [T, K] int64: None in a cached dispatch, whose rows carry neither token nor ids.
    `topk_weights` [T, K] float32 or None. The number of rows is the difference to the next starts.
    `cast`: one of quant.FORMS; then the payload is float8_e4m3fn [H], and its scales are made here.
    """
    if cast is not None:
        x, scales = cast_to_fp8_torch(x, form=cast)
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


@jit
def copy_tile(to, source, source_stride, width, tile, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of a row of `width` units. Items are next to each other in `to`, and in `source` too if UNIT > 1."""
    items = tile * BLOCK + tl.arange(0, BLOCK)
    mask = items < width * UNIT
    if UNIT > 1:
        values = tl.load(source + items, mask=mask)
    else:
        values = tl.load(source + items.to(tl.int64) * source_stride, mask=mask)
    tl.store(to + items, values, mask=mask)


@jit
def pack_rows(
    window, window_stride, x, x_stride, x_item_stride, width, lane_rows, lane_rows_stride, starts, lane, first_token,
    scales, scales_stride, scales_item_stride, num_scales, scales_at,
    topk_idx, topk_idx_stride, topk_weights, topk_weights_stride, topk, token_at, ids_at, weights_at,
    BYTES: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, SCALE_BYTES: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """One tile of one token's payload; the first tile's program also writes what follows the payload."""
    token = first_token + tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    row = tl.load(lane_rows + token * lane_rows_stride + lane)
    if row >= 0:
        to_row = (row - tl.load(starts + lane)).to(tl.int64)
        copy_tile(
            items_at(window, BYTES) + to_row * window_stride * UNIT,
            items_at(x, BYTES) + token * x_stride * UNIT,
            x_item_stride, width, tile, UNIT, BLOCK,
        )  # fmt: skip
        if tile == 0:
            if scales is not None:
                to = items_at(window, SCALE_BYTES) + to_row * (
                    window_stride * UNIT * BYTES // SCALE_BYTES
                )
                to += scales_at // SCALE_BYTES
                for some in range(0, num_scales, SMALL):
                    items = some + tl.arange(0, SMALL)
                    mask = items < num_scales
                    from_ = scales + token * scales_stride + items.to(tl.int64) * scales_item_stride
                    tl.store(to + items, tl.load(from_, mask=mask), mask=mask)
            write_ids(
                items_at(window, 4) + to_row * (window_stride * UNIT * BYTES // 4), token,
                topk_idx, topk_idx_stride, topk_weights, topk_weights_stride, topk, token_at, ids_at, weights_at, SMALL,
            )  # fmt: skip


@jit
def write_ids(
    words, token, topk_idx, topk_idx_stride, topk_weights, topk_weights_stride, topk, token_at, ids_at, weights_at,
    SMALL: tl.constexpr,
):  # fmt: skip
    """Source token, ids and weights, to the int32 `words` of a row."""
    if topk_idx is not None:
        tl.store(words + token_at // 4, token.to(tl.int32))
        for some in range(0, topk, SMALL):
            items = some + tl.arange(0, SMALL)
            mask = items < topk
            ids = tl.load(topk_idx + token * topk_idx_stride + items, mask=mask)
            tl.store(words + ids_at // 4 + items, ids.to(tl.int32), mask=mask)
            if topk_weights is not None:
                weights = tl.load(topk_weights + token * topk_weights_stride + items, mask=mask)
                tl.store(words + weights_at // 4 + items, weights, mask=mask)


@jit
def pack_casts(
    window, window_stride, x, x_stride, x_item_stride, hidden, lane_rows, lane_rows_stride, starts, lane, first_token,
    scales_at, topk_idx, topk_idx_stride, topk_weights, topk_weights_stride, topk, token_at, ids_at, weights_at,
    UNIT: tl.constexpr, GROUPS: tl.constexpr, FORM: tl.constexpr, HARDWARE: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """`pack_rows` with a cast of GROUPS groups on the way. `window_stride` in bytes / 16, `hidden` in units."""
    token = first_token + tl.program_id(0).to(tl.int64)
    row = tl.load(lane_rows + token * lane_rows_stride + lane)
    if row >= 0:
        to = window + (row - tl.load(starts + lane)).to(tl.int64) * window_stride * 16
        cast_groups(
            to, items_at(to + scales_at, 4), x + token * x_stride * UNIT, x_item_stride, hidden * UNIT,
            tl.program_id(1), UNIT, GROUPS, FORM, HARDWARE,
        )  # fmt: skip
        if tl.program_id(1) == 0:
            write_ids(
                items_at(to, 4), token, topk_idx, topk_idx_stride, topk_weights, topk_weights_stride, topk,
                token_at, ids_at, weights_at, SMALL,
            )  # fmt: skip


def pack_triton(
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
    cast: str | None = None,
) -> None:
    if topk_idx is None:
        topk_weights = None
    topk_idx, topk_weights = (
        t if t is None else as_integers(t if t.stride(1) == 1 else t.contiguous())
        for t in (topk_idx, topk_weights)
    )
    ids = (
        topk_idx, 0 if topk_idx is None else topk_idx.stride(0),
        topk_weights, 0 if topk_weights is None else topk_weights.stride(0),
        0 if topk_idx is None else topk_idx.shape[1], token_at, ids_at, weights_at,
    )  # fmt: skip
    tokens = last_token - first_token
    if cast is not None:
        hidden, unit = x.shape[1], Items.of(x.shape[1] * x.element_size(), x.element_size(), x).unit
        unit = 16 // x.element_size() if unit > 1 else 1
        launch(
            pack_casts, (tokens, up(hidden, 128 * GROUPS)), window, window.stride(0) // 16, x, x.stride(0) // unit,
            x.stride(1), hidden // unit, lane_rows, lane_rows.stride(0), starts, lane, first_token, scales_at, *ids,
            UNIT=unit, GROUPS=GROUPS, FORM=form_index(cast), HARDWARE=casts_in_hardware(x.device), SMALL=64,
            enable_fp_fusion=False,
        )  # fmt: skip
        return
    items = Items.of(x.shape[1] * x.element_size(), x.element_size(), x, window)
    scale_bytes = 4 if scales is None else scales.element_size()
    scales = None if scales is None else as_integers(scales)
    launch(
        pack_rows, (tokens, items.tiles), window, items.stride(window), as_integers(x), items.stride(x),
        items.item_stride(x), items.width, lane_rows, lane_rows.stride(0), starts, lane, first_token,
        scales, *((0, 0, 0) if scales is None else (*scales.stride(), scales.shape[1])), scales_at, *ids,
        BYTES=items.bytes, UNIT=items.unit, BLOCK=items.block, SCALE_BYTES=scale_bytes, SMALL=64,
    )  # fmt: skip
