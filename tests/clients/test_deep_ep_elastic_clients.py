"""The calls that frameworks make of ElasticBuffer, word by word: keyword forms, unpacking, attributes, autograd."""

import weakref

import pytest
import torch
from deep_ep_oracle import dispatched, make_case, open_gloo, same

from moe_comm import deep_ep, reference

WORLDS = [(2, 0), (4, 2)]  # ranks, ranks per pretended node
HIDDEN, TOPK, EXPERTS, M = 64, 3, 8, 32


@pytest.fixture(params=WORLDS, ids=lambda w: f"{w[0]} ranks, nodes of {w[1] or w[0]}")
def world(request, run_ranks, monkeypatch, tmp_path):
    num_ranks, ranks_per_node = request.param
    if ranks_per_node:
        monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", str(ranks_per_node))
    return lambda fn: run_ranks(fn, num_ranks, num_ranks, str(tmp_path / "gloo"))


def case_of(num_ranks, seed=0, **more):
    return make_case([9, 0, 17, 4][:num_ranks], seed=seed, topk=TOPK, num_experts=EXPERTS, **more)


def by_expert(case, alignment=1):
    return reference.dispatch(case.xs, case.idx, case.weights, EXPERTS, "expert", alignment)


def summed(ys, case, want, rank, each_copy=False):
    return reference.combine_by_lane(ys, want.bookkeeping, case.idx, EXPERTS, each_copy=each_copy)[
        rank
    ]


def random_like(rows, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=g).to(x.dtype) for x in rows]


# --- Megatron-core (dev) and NeMo: a pair of autograd functions, event handles, replayed handles ----


class Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, idx, weights, buffer, before):
        previous = buffer.capture() if before else None
        recv_x, recv_idx, recv_weights, handle, event = buffer.dispatch(
            x, topk_idx=idx, topk_weights=weights, num_experts=EXPERTS, num_max_tokens_per_rank=M,
            expert_alignment=1, num_sms=0, previous_event=previous, async_with_compute_stream=True,
            allocate_on_comm_stream=before,
        )  # fmt: skip
        event.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        counts = torch.tensor(handle.num_recv_tokens_per_expert_list)
        return recv_x, recv_idx, recv_weights, counts, handle

    @staticmethod
    def backward(ctx, grad_x, _idx, grad_weights, _counts, _handle):
        grad, grad_w, event = ctx.buffer.combine(
            grad_x.contiguous(), handle=ctx.handle, topk_weights=grad_weights.float(),
            num_sms=ctx.handle.num_sms, previous_event=ctx.buffer.capture(), async_with_compute_stream=True,
            allocate_on_comm_stream=True,
        )  # fmt: skip
        event.current_stream_wait()
        return grad, None, grad_w, None, None


KEPT = [
    "topk_idx", "psum_num_recv_tokens_per_scaleup_rank", "psum_num_recv_tokens_per_expert", "recv_src_metadata",
    "dst_buffer_slot_idx", "token_metadata_at_forward", "channel_linked_list", "num_unaligned_recv_tokens_per_expert",
]  # fmt: skip


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, buffer, handle):
        out, _, event = buffer.combine(y, handle=handle, async_with_compute_stream=True)
        event.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        ctx.names = [n for n in KEPT if getattr(handle, n) is not None]
        ctx.save_for_backward(*(getattr(handle, n) for n in ctx.names))
        return out

    @staticmethod
    def backward(ctx, grad):
        for name, value in zip(ctx.names, ctx.saved_tensors):
            setattr(ctx.handle, name, value)
        recv, _, _, handle, event = ctx.buffer.dispatch(
            grad.contiguous(),
            handle=ctx.handle,
            num_sms=ctx.handle.num_sms,
            async_with_compute_stream=True,
        )
        assert handle is ctx.handle
        event.current_stream_wait()
        return recv, None, None


def megatron(rank, group, num_ranks, store):
    process_group = open_gloo(rank, num_ranks, store)
    sizes = {"num_max_tokens_per_rank": M, "hidden": HIDDEN, "num_topk": TOPK}
    num_bytes = deep_ep.ElasticBuffer.get_buffer_size_hint(process_group, **sizes)
    buffer = deep_ep.ElasticBuffer(process_group, num_bytes=num_bytes, **sizes)
    assert buffer.group == process_group and buffer.num_bytes >= num_bytes
    assert buffer.num_max_tokens_per_rank >= M
    results = []
    for seed in range(2):  # two micro-batches, backward in either order
        case = case_of(num_ranks, seed, dtype=torch.float64)
        x = case.xs[rank].clone().requires_grad_()
        w = case.weights[rank].clone().requires_grad_()
        recv_x, recv_idx, recv_w, counts, handle = Dispatch.apply(
            x, case.idx[rank], w, buffer, seed == 0
        )
        want = dispatched(case)
        assert same(recv_x.detach(), want.x[rank]) and same(recv_idx, want.topk_idx[rank])
        assert counts.tolist() == want.tokens_per_expert[rank].tolist()
        scale = torch.where(recv_idx >= 0, recv_w, 0).double().sum(1, keepdim=True)
        out = Combine.apply(torch.tanh(recv_x) * scale, buffer, handle)
        results.append((case, x, w, out))
    for case, x, w, out in reversed(results):
        g = torch.Generator().manual_seed(5)
        ups = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in case.xs]
        (out * ups[rank]).sum().backward()
        x2, w2 = case.xs[rank].clone().requires_grad_(), case.weights[rank].clone().requires_grad_()
        chosen = torch.where(case.idx[rank] >= 0, w2, 0).double()
        alone = torch.tanh(x2) * chosen.sum(1, keepdim=True)
        (alone * ups[rank]).sum().backward()
        assert torch.allclose(out, alone, rtol=1e-6) and torch.allclose(x.grad, x2.grad, rtol=1e-6)
        assert torch.allclose(w.grad, w2.grad, rtol=1e-5, atol=1e-6)


def test_megatron_and_nemo(world):
    world(megatron)


# --- prime-rl, DeepSpeed: training in the expanded layout -----------------------------------------


def expanded_training(rank, group, num_ranks, store):
    buffer = deep_ep.ElasticBuffer(
        open_gloo(rank, num_ranks, store), num_max_tokens_per_rank=M, hidden=HIDDEN, num_topk=TOPK,
        num_gpu_timeout_secs=300, explicitly_destroy=True, num_allocated_qps=9, allow_hybrid_mode=True,
    )  # fmt: skip
    assert buffer.get_theoretical_num_qps(24) == 9 and buffer.num_ranks == num_ranks
    case = case_of(num_ranks)
    want = by_expert(case, 8)
    recv_x, recv_idx, recv_w, handle, event = buffer.dispatch(
        case.xs[rank], topk_idx=case.idx[rank].to(deep_ep.topk_idx_t), topk_weights=case.weights[rank],
        num_experts=EXPERTS, num_max_tokens_per_rank=M, expert_alignment=8, num_qps=9, do_expand=True,
        do_zero_padding=True,
    )  # fmt: skip
    assert recv_idx is None and event.event is None
    assert same(recv_x, want.x[rank]) and recv_w.shape == (len(recv_x),)
    assert (
        handle.num_unaligned_recv_tokens_per_expert.tolist()
        == want.tokens_per_expert[rank].tolist()
    )
    grads = random_like(want.x, 3)
    grad, grad_w, _ = buffer.combine(grads[rank], handle, topk_weights=recv_w * 2)
    assert same(grad, summed(grads, case, want, rank))
    assert same(grad_w, torch.where(case.idx[rank] >= 0, case.weights[rank] * 2, 0.0))
    back, *_ = buffer.dispatch(
        grad, handle=handle, num_sms=handle.num_sms, do_expand=True, do_zero_padding=True
    )
    sent = type(case)(
        [summed(grads, case, want, r) for r in range(num_ranks)], case.idx, case.weights, EXPERTS
    )
    assert same(back, by_expert(sent, 8).x[rank])
    buffer.destroy()
    assert buffer.runtime is None


def test_expanded_training(world):
    world(expanded_training)


# --- vLLM: prefill and decode ---------------------------------------------------------------------


@torch.inference_mode()
def vllm(rank, group, num_ranks, store):
    cache = weakref.WeakValueDictionary()
    options = {
        "group": open_gloo(rank, num_ranks, store), "num_max_tokens_per_rank": M, "hidden": HIDDEN,
        "num_topk": TOPK, "use_fp8_dispatch": True, "allow_hybrid_mode": False,
        "prefer_overlap_with_compute": False, "allow_multiple_reduction": False, "explicitly_destroy": True,
    }  # fmt: skip
    key = tuple(sorted((k, str(v)) for k, v in options.items()))
    cache[key] = buffer = deep_ep.ElasticBuffer(**options)
    assert cache[key] is buffer
    assert buffer.get_theoretical_num_sms(num_experts=EXPERTS, num_topk=TOPK) >= 64
    case = case_of(num_ranks, dtype=torch.float8_e4m3fn)
    g = torch.Generator().manual_seed(1)
    all_scales = [
        torch.randint(1 << 30, (len(x), 2), generator=g, dtype=torch.int32) for x in case.xs
    ]
    x = case.xs[rank], all_scales[rank]
    # prefill: expanded, with CPU sync; ids are rebuilt from the counts
    (recv, scales), recv_idx, recv_w, handle, event = buffer.dispatch(
        x=x, topk_idx=case.idx[rank], topk_weights=case.weights[rank], num_experts=EXPERTS,
        num_max_tokens_per_rank=None, do_expand=True, do_cpu_sync=True, async_with_compute_stream=False,
    )  # fmt: skip
    want = reference.dispatch(case.xs, case.idx, case.weights, EXPERTS, "expert", scales=all_scales)
    assert recv_idx is None and event.event is None and recv_w.dim() == 1
    assert same(recv, want.x[rank]) and same(scales, want.scales[rank])
    assert sum(handle.num_recv_tokens_per_expert_list) == len(recv)
    rebuilt = [e for e, n in enumerate(handle.num_recv_tokens_per_expert_list) for _ in range(n)]
    assert rebuilt == want.topk_idx[rank].tolist()
    ys = [y.bfloat16() for y in random_like([x.float() for x in want.x], 2)]
    out, nothing, event = buffer.combine(
        x=ys[rank],
        handle=handle,
        topk_weights=None,
        async_with_compute_stream=True,
        allocate_on_comm_stream=False,
    )
    event.current_stream_wait()
    assert nothing is None and same(out, summed(ys, case, want, rank, each_copy=True))
    # decode: rows of a static shape, counts on the device only
    (recv, scales), recv_idx, recv_w, handle, _ = buffer.dispatch(
        x=x, topk_idx=case.idx[rank], topk_weights=case.weights[rank], num_experts=EXPERTS,
        num_max_tokens_per_rank=M, do_expand=False, do_cpu_sync=False, async_with_compute_stream=False,
    )  # fmt: skip
    want = dispatched(case, all_scales)
    assert (
        not handle.num_recv_tokens_per_expert_list and len(recv) == len(recv_idx) == num_ranks * M
    )
    rows = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
    assert same(recv[:rows], want.x[rank]) and same(scales[:rows], want.scales[rank])
    assert same(recv_idx[:rows], want.topk_idx[rank]) and (recv_idx[rows:] == -1).all()
    ys = [y.bfloat16() for y in random_like([x.float() for x in want.x], 2)]
    y = torch.zeros(num_ranks * M, HIDDEN, dtype=torch.bfloat16)
    y[:rows] = ys[rank]
    out, *_ = buffer.combine(x=y, handle=handle, topk_weights=None, async_with_compute_stream=False)
    assert same(out, summed(ys, case, want, rank))
    buffer.destroy()


def test_vllm(world):
    world(vllm)


# --- sglang ---------------------------------------------------------------------------------------


@torch.inference_mode()
def sglang(rank, group, num_ranks, store):
    buffer = deep_ep.ElasticBuffer(
        open_gloo(rank, num_ranks, store), num_max_tokens_per_rank=M, hidden=HIDDEN, num_topk=TOPK,
        use_fp8_dispatch=True, allow_hybrid_mode=False, sl_idx=0, prefer_overlap_with_compute=False,
    )  # fmt: skip
    assert buffer.num_bytes > 0
    case = case_of(num_ranks)
    for expand, sync in ((True, True), (True, False), (False, True), (False, False)):
        recv_x, _, recv_w, handle, event = buffer.dispatch(
            case.xs[rank], topk_idx=case.idx[rank], topk_weights=case.weights[rank], num_experts=EXPERTS,
            num_max_tokens_per_rank=M, expert_alignment=128, num_sms=24, use_tma_aligned_col_major_sf=True,
            do_cpu_sync=sync, do_expand=expand,
        )  # fmt: skip
        if event.event is not None:
            event.current_stream_wait()
        want = by_expert(case, 128) if expand else dispatched(case)
        rows, psum = len(want.x[rank]), handle.psum_num_recv_tokens_per_expert.tolist()
        counts = want.tokens_per_expert[rank].tolist()
        aligned = [-(-n // 128) * 128 for n in counts]
        if expand:
            assert recv_w.shape == (recv_x.shape[0],)
            assert psum == [sum(aligned[:i]) + n for i, n in enumerate(counts)]
        else:
            assert handle.psum_num_recv_tokens_per_scaleup_rank[-1].item() == rows
            assert psum == [sum(aligned[: i + 1]) for i in range(len(counts))]
        assert same(recv_x[:rows], want.x[rank]) and handle.num_sms == 24
        out, weights, event = buffer.combine(recv_x, handle=handle, topk_weights=recv_w)
        assert event.event is None and same(out, summed(want.x, case, want, rank))
        assert same(weights, torch.where(case.idx[rank] >= 0, case.weights[rank], 0.0))
    windows = weakref.ref(buffer.runtime)
    del buffer  # dropping it must release it
    assert windows() is None


def test_sglang(world):
    world(sglang)
