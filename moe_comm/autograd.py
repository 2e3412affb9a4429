"""Differentiable dispatch and combine: `torch.library` ops with fake kernels, and plain autograd Functions.

The backward of a dispatch is a combine, the backward of a combine a dispatch with the cached handle; so a backward is
collective, too, and runs in the same order on all ranks as long as they built the same graph. Gradients reach x,
topk_weights, y, weights and bias.

A rank whose experts got no token, or whose user skipped them, must still take part in the backward of its dispatch.
Therefore the handle carries an **anchor**: a scalar that depends on the dispatch and that combine takes as an input, so
that whoever differentiates through the combine reaches the dispatch, whatever lies between.

At an op's boundary the Buffer is its name, and the handle a list of tensors (torch.library takes no dataclass), on the
CPU but for the anchor. Exact layouts return unbacked sizes under torch.compile and torch.export, the padded one fixed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .buffer import Buffer, buffer_named
from .dispatch import Dispatched
from .errors import ArgumentError
from .handle import Handle

ANCHOR = 8  # index behind Handle.to_tensors() in the list that crosses an op's boundary


def _empty(value: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(0, dtype=dtype) if value is None else value


# --- what both forms do ----------------------------------------------------------------------------


def _dispatch(
    buffer: Buffer, x: Tensor, topk_idx: Tensor, topk_weights: Tensor | None, num_experts: int, layout: str,
    alignment: int, capacity: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    d = buffer.dispatch(
        x, topk_idx, topk_weights, num_experts=num_experts, layout=layout, alignment=alignment,
        capacity=capacity if capacity > 0 else None,
    )  # fmt: skip
    anchor = x.new_zeros(())
    return (
        d.x,
        _empty(d.topk_idx, x, torch.int64),
        _empty(d.topk_weights, x, torch.float32),
        [*d.handle.to_tensors(), anchor],
    )


def _dispatch_backward(
    buffer: Buffer, handle: Handle, like: Tensor, grad_x: Tensor | None, grad_weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if grad_x is None:  # nothing came back to the received rows: the peers still expect us
        grad_x = like.new_zeros((*handle.place_shape, like.shape[-1]))
    if grad_weights is None:
        return buffer.combine(grad_x.contiguous(), handle), None
    return buffer.combine(grad_x.contiguous(), handle, topk_weights=grad_weights.contiguous())


def _combine_backward(
    rows: Tensor, y: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`rows`: the output's gradient, dispatched to where y's rows were."""
    if weights is None:
        return rows, None
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    grad_y = (rows.to(wide) * weights.to(wide).unsqueeze(-1)).to(y.dtype)
    grad_weights = (rows.to(wide) * y.to(wide)).sum(-1).to(torch.float32)
    return grad_y, grad_weights


# --- ops -------------------------------------------------------------------------------------------


@torch.library.custom_op("moe_comm::dispatch", mutates_args=())
def _dispatch_op(
    buffer: str, x: Tensor, topk_idx: Tensor, topk_weights: Tensor | None, num_experts: int, layout: str,
    alignment: int, capacity: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return _dispatch(
        buffer_named(buffer), x, topk_idx, topk_weights, num_experts, layout, alignment, capacity
    )


@torch.library.custom_op("moe_comm::combine", mutates_args=())
def _combine_op(
    buffer: str, y: Tensor, handle: Sequence[Tensor], weights: Tensor | None, bias: Tensor | None
) -> Tensor:
    made = Handle.from_tensors(list(handle))
    return buffer_named(buffer).combine(y.contiguous(), made, weights=weights, bias=bias)


@torch.library.custom_op("moe_comm::dispatch_again", mutates_args=())
def _dispatch_again_op(
    buffer: str, x: Tensor, handle: Sequence[Tensor], shape: Sequence[int]
) -> Tensor:
    made = Handle.from_tensors(list(handle))
    return buffer_named(buffer).dispatch(x.contiguous(), handle=made, layout=made.layout).x


@torch.library.custom_op("moe_comm::combine_columns", mutates_args=())
def _combine_columns_op(
    buffer: str, y: Tensor, handle: Sequence[Tensor], topk_weights: Tensor
) -> tuple[Tensor, Tensor]:
    made = Handle.from_tensors(list(handle))
    return buffer_named(buffer).combine(
        y.contiguous(), made, topk_weights=topk_weights.contiguous()
    )


@_dispatch_op.register_fake
def _(
    buffer: str, x: Tensor, topk_idx: Tensor, topk_weights: Tensor | None, num_experts: int, layout: str,
    alignment: int, capacity: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    made = buffer_named(buffer)
    context = torch.library.get_ctx()
    num_ranks, topk = made.num_ranks, topk_idx.shape[1]
    slots = -(-num_experts // num_ranks)
    owned = max(0, min(slots, num_experts - made.rank * slots))
    rows = context.new_dynamic_size()
    int32, nodes = torch.int32, made.topology.num_nodes
    in_rounds = made.kernels is not None and made.kernels.in_rounds
    told: Any = 0 if made.kernels is None else made.kernels.handle_words(slots)
    if in_rounds:
        told = context.new_dynamic_size()
    shape: tuple[Any, ...]
    idx_shape: tuple[Any, ...]
    if layout == "rank":
        shape, idx_shape = (rows,), (rows, topk)
    elif layout == "expert":
        places = context.new_dynamic_size()
        shape = idx_shape = (places,)
    else:
        shape = (owned, made.padded_capacity(capacity if capacity > 0 else None))
        idx_shape = (0,)
    weights_shape: tuple[Any, ...] = (0,)
    if topk_weights is not None:
        weights_shape = (rows, topk) if layout == "rank" else shape
    by_node = nodes > 1 and made.hops == "node"
    passed = passed_on = context.new_dynamic_size() if by_node and made.kernels is None else 0
    if in_rounds:
        passed, passed_on = context.new_dynamic_size(), context.new_dynamic_size() if by_node else 0
    elif by_node and made.kernels is not None:
        passed = passed_on = (nodes - 1) * (made.max_tokens or 0)
    meta = Handle.num_numbers(len(shape), num_ranks, nodes)

    def table(*shape: Any, dtype: torch.dtype = int32) -> Tensor:
        return x.new_empty(shape, dtype=dtype, device=made.device)

    handle = [
        x.new_empty(meta, dtype=torch.int64, device="cpu"),
        table(x.shape[0], (made.kernels or made.native).num_lanes),
        table(rows),
        table(0 if layout == "rank" else rows, topk),
        table(passed),
        table(passed_on, made.topology.node_ranks),
        table(owned, dtype=torch.int64),
        table(told, dtype=torch.int64),
        x.new_empty(()),
    ]
    return (
        x.new_empty((*shape, x.shape[1])),
        x.new_empty(idx_shape, dtype=torch.int64),
        x.new_empty(weights_shape, dtype=torch.float32),
        handle,
    )


@_combine_op.register_fake
def _(
    buffer: str, y: Tensor, handle: Sequence[Tensor], weights: Tensor | None, bias: Tensor | None
) -> Tensor:
    return y.new_empty((handle[1].shape[0], y.shape[-1]))


@_dispatch_again_op.register_fake
def _(buffer: str, x: Tensor, handle: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    return x.new_empty(tuple(shape))


@_combine_columns_op.register_fake
def _(
    buffer: str, y: Tensor, handle: Sequence[Tensor], topk_weights: Tensor
) -> tuple[Tensor, Tensor]:
    tokens = handle[1].shape[0]
    topk = handle[3].shape[1]
    return y.new_empty((tokens, y.shape[-1])), topk_weights.new_empty((tokens, topk))


def _dispatch_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    buffer, x, *_ = inputs
    ctx.buffer, ctx.like = buffer, (x.dtype, x.device)
    ctx.shape, ctx.weights_shape = output[0].shape, output[2].shape
    ctx.save_for_backward(*output[3][:ANCHOR])
    ctx.set_materialize_grads(False)


def _dispatch_op_backward(
    ctx: Any, grad_x: Tensor | None, _idx: Any, grad_weights: Tensor | None, grad_handle: Any
) -> tuple:
    handle, (dtype, device) = list(ctx.saved_tensors), ctx.like
    if grad_x is None:
        grad_x = torch.zeros(ctx.shape, dtype=dtype, device=device)
    if ctx.needs_input_grad[3]:  # decided alike on every rank, whoever looked at its weights
        if grad_weights is None:
            grad_weights = torch.zeros(ctx.weights_shape, device=device)
        back, back_weights = torch.ops.moe_comm.combine_columns(
            ctx.buffer, grad_x, handle, grad_weights
        )
    else:
        back, back_weights = (
            torch.ops.moe_comm.combine(ctx.buffer, grad_x, handle, None, None),
            None,
        )
    return None, back, None, back_weights, None, None, None, None


_dispatch_op.register_autograd(_dispatch_op_backward, setup_context=_dispatch_setup)


def _combine_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    buffer, y, handle, weights, bias = inputs
    ctx.buffer, ctx.has_bias, ctx.has_anchor = buffer, bias is not None, len(handle) > ANCHOR
    ctx.shape = y.shape
    saved = [*handle[:ANCHOR]] + ([y, weights] if weights is not None else [])
    ctx.save_for_backward(*saved)


def _combine_op_backward(ctx: Any, grad: Tensor) -> tuple:
    saved = (
        ctx.saved_tensors
    )  # once: checkpointing recomputes at the first look and refuses a second
    handle, rest = list(saved[:ANCHOR]), saved[ANCHOR:]
    rows = torch.ops.moe_comm.dispatch_again(ctx.buffer, grad, handle, ctx.shape)
    y, weights = rest if rest else (rows, None)
    grad_y, grad_weights = _combine_backward(rows, y, weights)
    grad_handle: list[Tensor | None] = [None] * ANCHOR
    if ctx.has_anchor:
        grad_handle.append(grad.new_zeros(()))
    return None, grad_y, grad_handle, grad_weights, grad if ctx.has_bias else None


_combine_op.register_autograd(_combine_op_backward, setup_context=_combine_setup)


# --- the public functions --------------------------------------------------------------------------


class OpHandle(Handle):
    """A handle as it comes out of `moe_comm.dispatch`: a list of tensors, read only when somebody looks inside.

    Under torch.compile nobody does; the list just travels from op to op.
    """

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "tensors":
            raise AttributeError(name)
        self.__dict__.update(vars(Handle.from_tensors(self.tensors[:ANCHOR])))
        return self.__dict__[name]


def dispatch(
    buffer: Buffer, x: Tensor, topk_idx: Tensor, topk_weights: Tensor | None = None, *, num_experts: int,
    layout: str = "rank", alignment: int = 1, capacity: int | None = None,
) -> Dispatched:  # fmt: skip
    """`Buffer.dispatch`, differentiable in x and topk_weights; works under torch.compile and torch.export.

    Its backward is a collective combine: every rank must run it, and does if it differentiates through the `combine` of
    this dispatch. x must require grad on all ranks or on none. Arguments, results and errors: `Buffer.dispatch`.
    """
    out, idx, weights, tensors = torch.ops.moe_comm.dispatch(
        buffer.name, x, topk_idx, topk_weights, num_experts, layout, alignment, capacity or 0
    )
    handle = OpHandle(tensors)
    return Dispatched(
        out,
        None if layout == "padded" else idx,
        None if topk_weights is None else weights,
        tensors[6].to(x.device),
        handle,
    )


def combine(
    buffer: Buffer, y: Tensor, handle: Handle, *, weights: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`Buffer.combine`, differentiable in y, weights and bias; works under torch.compile and torch.export.

    Its backward is a collective dispatch of the gradient with the same routing.
    """
    tensors = handle.tensors if isinstance(handle, OpHandle) else handle.to_tensors()
    return torch.ops.moe_comm.combine(buffer.name, y, tensors, weights, bias)


class DispatchFunction(torch.autograd.Function):
    """`dispatch` as a plain autograd Function, for programs that do not compile: no op, no name, no copies.

    `apply(buffer, x, topk_idx, topk_weights, num_experts, layout, alignment, capacity)` returns
    (x, topk_idx or empty, topk_weights or empty, *handle tensors); pass the latter to `CombineFunction`.
    """

    @staticmethod
    def forward(
        ctx: Any, buffer: Buffer, x: Tensor, topk_idx: Tensor, topk_weights: Tensor | None, num_experts: int,
        layout: str = "rank", alignment: int = 1, capacity: int = 0,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        out, idx, weights, handle = _dispatch(
            buffer, x, topk_idx, topk_weights, num_experts, layout, alignment, capacity
        )
        ctx.buffer, ctx.like = buffer, (x.shape[1], x.dtype, x.device)
        ctx.weights_shape = weights.shape
        ctx.save_for_backward(*handle[:ANCHOR])
        ctx.mark_non_differentiable(idx, *handle[:ANCHOR])
        ctx.set_materialize_grads(False)
        return out, idx, weights, *handle

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        handle = Handle.from_tensors(list(ctx.saved_tensors))
        hidden, dtype, device = ctx.like
        like = torch.empty((0, hidden), dtype=dtype, device=device)
        wanted = grads[2]
        if not ctx.needs_input_grad[3]:
            wanted = None
        elif wanted is None:
            wanted = torch.zeros(ctx.weights_shape, device=device)
        result = _dispatch_backward(ctx.buffer, handle, like, grads[0], wanted)
        back, back_weights = result if isinstance(result, tuple) else (result, None)
        return None, back, None, back_weights, None, None, None, None


class CombineFunction(torch.autograd.Function):
    """`combine` as a plain autograd Function.

    `apply(buffer, y, weights or None, bias or None, *handle tensors)` returns [T, H].
    """

    @staticmethod
    def forward(
        ctx: Any, buffer: Buffer, y: Tensor, weights: Tensor | None, bias: Tensor | None, *handle: Tensor
    ) -> Tensor:  # fmt: skip
        if len(handle) < ANCHOR:
            raise ArgumentError(f"handle: expected {ANCHOR + 1} tensors, got {len(handle)}")
        ctx.buffer, ctx.has_bias, ctx.num_handle = buffer, bias is not None, len(handle)
        ctx.save_for_backward(*handle[:ANCHOR], *([y, weights] if weights is not None else []))
        made = Handle.from_tensors(list(handle[:ANCHOR]))
        return buffer.combine(y.contiguous(), made, weights=weights, bias=bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        saved = ctx.saved_tensors
        handle = Handle.from_tensors(list(saved[:ANCHOR]))
        rows = ctx.buffer.dispatch(grad.contiguous(), handle=handle, layout=handle.layout).x
        y, weights = saved[ANCHOR:] or (rows, None)
        grad_y, grad_weights = _combine_backward(rows, y, weights)
        anchors = [None] * ANCHOR + [grad.new_zeros(()) for _ in range(ctx.num_handle - ANCHOR)]
        return None, grad_y, grad_weights, grad if ctx.has_bias else None, *anchors
