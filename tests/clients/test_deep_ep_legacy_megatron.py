"""Megatron-core's use of deep_ep.Buffer, keyword for keyword, and its gradients against one process."""

import pytest
import torch
from deep_ep_oracle import dispatched, make_case, open_gloo

from moe_comm import reference
from moe_comm.deep_ep import Buffer
from moe_comm.deep_ep.utils import EventHandle, EventOverlap

WORLDS = [(2, 0), (4, 2)]  # ranks, ranks per pretended node


@pytest.fixture(params=WORLDS, ids=lambda w: f"{w[0]} ranks, nodes of {w[1] or w[0]}")
def world(request, run_ranks, monkeypatch, tmp_path):
    num_ranks, ranks_per_node = request.param
    if ranks_per_node:
        monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", str(ranks_per_node))
    node_of = [r // (ranks_per_node or num_ranks) for r in range(num_ranks)]

    def run(fn, *args, **more):
        return run_ranks(fn, num_ranks, num_ranks, str(tmp_path / "gloo"), node_of, *args, **more)

    return run


class Megatron:
    """fused_a2a.py: one buffer for the process, made again when a layer needs more."""

    buffer = None

    @classmethod
    def get_buffer(cls, group, hidden_bytes):
        num_nvl_bytes, num_rdma_bytes = 0, 0
        for config in (
            Buffer.get_dispatch_config(group.size()),
            Buffer.get_combine_config(group.size()),
        ):
            num_nvl_bytes = max(
                config.get_nvl_buffer_size_hint(hidden_bytes, group.size()), num_nvl_bytes
            )
            num_rdma_bytes = max(
                config.get_rdma_buffer_size_hint(hidden_bytes, group.size()), num_rdma_bytes
            )
        buffer = cls.buffer
        if (
            buffer is None
            or buffer.group != group
            or buffer.num_nvl_bytes < num_nvl_bytes
            or buffer.num_rdma_bytes < num_rdma_bytes
        ):
            cls.buffer = Buffer(group, num_nvl_bytes, num_rdma_bytes)
        return cls.buffer


def hidden_bytes_of(x):
    return x.size(1) * max(x.element_size(), 2)


class MegatronDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token_indices, token_probs, num_experts, group, async_finish, allocate):
        previous_event = EventOverlap(EventHandle()) if async_finish else None
        buffer = Megatron.get_buffer(group, hidden_bytes_of(x))
        per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
            token_indices,
            num_experts,
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate,
        )
        recv_x, recv_idx, recv_probs, counts, handle, after = buffer.dispatch(
            x,
            topk_idx=token_indices,
            topk_weights=token_probs,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate,
        )
        if async_finish:
            after.current_stream_wait()
        ctx.group, ctx.handle, ctx.form = group, handle, (async_finish, allocate)
        return recv_x, recv_idx, recv_probs, torch.tensor(counts), handle

    @staticmethod
    def backward(ctx, grad, grad_idx, grad_probs, grad_counts, grad_handle):
        async_finish, allocate = ctx.form
        buffer = Megatron.get_buffer(ctx.group, hidden_bytes_of(grad))
        previous_event = EventOverlap(EventHandle()) if async_finish else None
        grad_x, grad_probs, after = buffer.combine(
            grad.contiguous(),
            ctx.handle,
            topk_weights=grad_probs.float(),
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate,
        )
        if async_finish:
            after.current_stream_wait()
        return grad_x, None, grad_probs, None, None, None, None


class MegatronCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, handle, async_finish, allocate):
        previous_event = EventOverlap(EventHandle()) if async_finish else None
        buffer = Megatron.get_buffer(group, hidden_bytes_of(x))
        y, _, after = buffer.combine(
            x,
            handle=handle,
            async_finish=async_finish,
            previous_event=previous_event,
            allocate_on_comm_stream=allocate,
        )
        if async_finish:
            after.current_stream_wait()
        ctx.handle, ctx.group, ctx.form = handle, group, (async_finish, allocate)
        return y

    @staticmethod
    def backward(ctx, grad):
        async_finish, allocate = ctx.form
        previous_event = EventOverlap(EventHandle()) if async_finish else None
        buffer = Megatron.get_buffer(ctx.group, hidden_bytes_of(grad))
        grad_x, _, _, _, _, after = buffer.dispatch(
            grad.contiguous(),
            handle=ctx.handle,
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate,
        )
        if async_finish:
            after.current_stream_wait()
        return grad_x, None, None, None, None


def experts_of(rows, local_idx, probs, first_expert):
    """Each row times a number for each of its experts here, by its weights; differentiable."""
    scale = torch.where(local_idx >= 0, local_idx + first_expert + 1, 0).to(rows.dtype)
    return rows * (scale * probs).sum(-1, keepdim=True)


def check_megatron(rank, group, num_ranks, store, node_of):
    process_group = open_gloo(rank, num_ranks, store)
    Buffer.set_num_sms(20)
    for async_finish, allocate in ((True, True), (False, False)):
        Megatron.buffer = None
        tokens = [6, 0, 11, 3][:num_ranks]
        cases = [
            make_case(
                tokens, seed=s, topk=2, num_experts=2 * num_ranks, dtype=torch.float32, hidden=hidden
            )
            for s, hidden in ((0, 64), (1, 128))  # the second layer asks for a larger buffer
        ]  # fmt: skip
        outs, inputs = [], []
        for case in cases:
            x = case.xs[rank].clone().requires_grad_()
            probs = case.weights[rank].clone().requires_grad_()
            rows, idx, recv_probs, counts, handle = MegatronDispatch.apply(
                x, case.idx[rank], probs, case.num_experts, process_group, async_finish, allocate
            )
            want = dispatched(case)
            assert torch.equal(counts, want.tokens_per_expert[rank])
            y = experts_of(rows, idx, recv_probs, rank * 2)
            outs.append(MegatronCombine.apply(y, process_group, handle, async_finish, allocate))
            inputs.append((x, probs))
        for i in (0, 1) if async_finish else (1, 0):  # micro-batches go back in any order
            outs[i].square().sum().backward()
        for case, out, (x, probs) in zip(cases, outs, inputs, strict=True):
            check_against_one_process(case, rank, out, x, probs)


def check_against_one_process(case, rank, out, x, probs):
    xs = [t.clone().requires_grad_() for t in case.xs]
    weights = [t.clone().requires_grad_() for t in case.weights]
    sent = reference.dispatch(xs, case.idx, weights, case.num_experts)
    ys = [
        experts_of(rows, idx, w, r * case.experts_per_rank)
        for r, (rows, idx, w) in enumerate(
            zip(sent.x, sent.topk_idx, sent.topk_weights, strict=True)
        )
    ]
    want = reference.combine(ys, sent.bookkeeping).x
    sum(t.square().sum() for t in want).backward()
    torch.testing.assert_close(out, want[rank], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(x.grad, xs[rank].grad, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(probs.grad, weights[rank].grad, rtol=2e-6, atol=2e-5)


def test_megatron(world):
    world(check_megatron)
