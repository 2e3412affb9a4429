"""CUDA tensors through the host (moe_comm/staging.py): bit for bit what CPU tensors give, on their device.

Twice: over a pretended device (tests/far.py), whose copies are late and whose memory no host code can read; and, where
there is a GPU, on that. The whole suite runs so, too: `pytest tests/ep --through far` (or cuda).
"""

import far
import pytest
import test_autograd as autograd
import torch
from cases import dispatch, make_case, same

import moe_comm
from moe_comm import ArgumentError, PeerError, deep_ep, staging

R = 4
OPTIONS = {"hidden": 128, "topk": 3, "num_experts": 7, "ranks_per_node": 2, "max_tokens": 16}
pytestmark = pytest.mark.host("moves tensors itself")


class Device:
    """Where tensors are moved to, and how they come back."""

    def __init__(self, kind):
        self.kind = kind

    def put(self, value):
        if isinstance(value, tuple):
            return tuple(map(self.put, value))
        if not isinstance(value, torch.Tensor):
            return value
        moved = value.detach()
        moved = far.Far(moved.clone()) if self.kind == "far" else moved.cuda()
        return moved.requires_grad_(value.requires_grad)

    def has(self, tensor):
        return isinstance(tensor, far.Far) if self.kind == "far" else tensor.is_cuda

    def get(self, value):
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.get, value))
        if not isinstance(value, torch.Tensor):
            return value
        assert self.has(value)
        value = value.detach()
        return value.near if self.kind == "far" else value.cpu()


@pytest.fixture(params=["far", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    monkeypatch.setattr(staging, "DEVICES", dict(staging.DEVICES))
    if request.param == "far":
        far.install()
    return Device(request.param)


@pytest.fixture
def network():
    """Not over chaos as well: what travels is the host's."""


def equal(got, want):
    if isinstance(want, (tuple, list)):
        return len(got) == len(want) and all(map(equal, got, want))
    return same(got, want) if isinstance(want, torch.Tensor) else got == want


def fields(d):
    return d.x, d.topk_idx, d.topk_weights, d.tokens_per_expert


def on_device(device, case):
    moved = make_case(0, tokens=[])
    moved.__dict__.update(case.__dict__)
    moved.xs, moved.idx, moved.weights = (
        [device.put(t) for t in part] for part in (case.xs, case.idx, case.weights)
    )
    moved.scales = None if case.scales is None else [device.put(s) for s in case.scales]
    return moved


@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
@pytest.mark.parametrize("scales", [None, "row-major", "column-major"])
@pytest.mark.parametrize("hops", ["node", "rank"])
def test_every_layout(run_threads, device, layout, scales, hops):
    dtype = torch.float8_e4m3fn if scales else torch.bfloat16
    case = make_case(
        R, hidden=128, layout=layout, scales=scales, dtype=dtype, seed=3, tokens=[9, 0, 16, 4]
    )
    there = on_device(device, case)

    def body(buffer, rank):
        want, got = dispatch(buffer, case, rank), dispatch(buffer, there, rank)
        assert equal(device.get(fields(got)), fields(want))
        assert all(table.is_cpu for table in got.handle.to_tensors())
        again = buffer.dispatch(there.xs[rank], handle=got.handle, layout=layout)
        want_again = buffer.dispatch(case.xs[rank], handle=want.handle, layout=layout)
        assert equal(device.get(again.x), want_again.x)
        y = want_again.x.to(torch.float32)
        weights = torch.rand(y.shape[:-1]) if layout != "rank" else None
        bias = torch.randn(len(case.xs[rank]), y.shape[-1])
        inputs = {"weights": weights, "bias": bias}
        moved = {k: device.put(v) for k, v in inputs.items()}
        combined = buffer.combine(device.put(y), got.handle, **moved)
        assert equal(device.get(combined), buffer.combine(y, want.handle, **inputs))

    run_threads(body, R, hops=hops, **OPTIONS)


def test_columns_out_lanes_and_copies(run_threads, device):
    case = make_case(R, hidden=128, layout="expert", seed=4, tokens=[9, 0, 16, 4])
    there = on_device(device, case)

    def body(buffer, rank):
        want, got = dispatch(buffer, case, rank), dispatch(buffer, there, rank)
        plain = buffer.combine(want.x, want.handle, topk_weights=want.topk_weights)
        out = device.put(torch.full_like(case.xs[rank], 7))
        found = buffer.combine(got.x, got.handle, topk_weights=got.topk_weights, out=out)
        assert found[0] is out and equal(device.get(found), plain)
        more = {"each_copy": True}
        sums = buffer.combine(
            got.x, got.handle, topk_idx=there.idx[rank], source_weights=there.weights[rank], **more
        )
        assert equal(device.get(sums), buffer.combine(
            want.x, want.handle, topk_idx=case.idx[rank], source_weights=case.weights[rank], **more
        ))  # fmt: skip

    run_threads(body, R, hops="rank", **OPTIONS)


def test_hooks_and_events(run_threads, device):
    """x may be overwritten after the call; results come with the hook; the event is the device's."""
    case = make_case(R, hidden=128, seed=5, tokens=[9, 0, 16, 4])

    def body(buffer, rank):
        there = on_device(device, case)
        want = dispatch(buffer, case, rank)
        hook = dispatch(buffer, there, rank, async_op="hook")
        there.xs[rank].zero_()
        assert hook.result is None and not hook.done
        hook()
        hook()
        assert equal(device.get(fields(hook.result)), fields(want))
        out = device.put(torch.zeros_like(case.xs[rank]))
        hook = buffer.combine(hook.result.x, hook.result.handle, out=out, async_op="hook")
        hook()
        assert hook.result is out
        assert equal(device.get(out), buffer.combine(want.x, want.handle))
        got, event = buffer.dispatch(
            device.put(case.xs[rank]), handle=want.handle, async_op="event"
        )
        event.wait()
        assert event._recorded is not None
        assert equal(device.get(got.x), want.x)
        while not event.query():
            pass

    run_threads(body, R, **OPTIONS)


def test_overwritten_after_the_call(run_threads, device):
    """The host's copy of a result is nobody's: many calls one after the other, all results looked at in the end."""
    case = make_case(R, hidden=128, seed=6, tokens=[9, 2, 16, 4])

    def body(buffer, rank):
        first = dispatch(buffer, on_device(device, case), rank)
        got = [
            buffer.dispatch(device.put(case.xs[rank] * n), handle=first.handle).x for n in range(6)
        ]
        for n, x in enumerate(got):
            want = buffer.dispatch(case.xs[rank] * n, handle=first.handle).x
            assert equal(device.get(x), want)

    run_threads(body, R, **OPTIONS)


@pytest.mark.parametrize("model", [autograd.by_ops, autograd.by_functions])
@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
def test_gradients(run_threads, device, model, layout):
    """As on the CPU, and every gradient is where its leaf is."""
    case, leaves, matrices = autograd.inputs()
    moved = [[device.put(leaf) for leaf in rank_leaves] for rank_leaves in leaves]
    there = device.put(matrices)

    def body(buffer, rank):
        with far.FarFactories():
            for leaf, idx, m in (
                (leaves, case.idx[rank], matrices),
                (moved, device.put(case.idx[rank]), there),
            ):
                x, w, b = leaf[rank]
                out = model(buffer, x, idx, w, b, layout, rank, m)
                (out**2).sum().backward()
        for ours, theirs in zip(moved[rank], leaves[rank], strict=True):
            exact = (
                1e-12 if device.kind == "far" else 1e-5
            )  # a GPU's matrix products add in another order
            torch.testing.assert_close(device.get(ours.grad), theirs.grad, rtol=exact, atol=exact)

    run_threads(body, R, **autograd.OPTIONS)


# --- what is wrong -------------------------------------------------------------------------------


def check_refused(run_threads, device, change, text):
    """Rank 1's call is changed and raises; the others raise PeerError with its text; the next call works."""
    case = make_case(R, hidden=128, seed=7, tokens=[9, 5, 16, 4])

    def body(buffer, rank):
        there = on_device(device, case)
        if rank == 1:
            change(there)
        with pytest.raises(ArgumentError if rank == 1 else PeerError, match=text):
            dispatch(buffer, there, rank)
        want = dispatch(buffer, case, rank)
        assert equal(
            device.get(fields(dispatch(buffer, on_device(device, case), rank))), fields(want)
        )

    run_threads(body, R, **OPTIONS)


def test_mixed_devices(run_threads, device):
    def idx_on_the_cpu(there):
        there.idx[1] = torch.zeros(5, 3, dtype=torch.int64)

    check_refused(
        run_threads,
        device,
        idx_on_the_cpu,
        r"x: expected .* got one on .*, but topk_idx is int64 \(5, 3\) on the CPU",
    )


def test_x_on_the_cpu_and_the_rest_not(run_threads, device):
    def x_on_the_cpu(there):
        there.xs[1] = torch.zeros(5, 128, dtype=torch.bfloat16)

    text = r"topk_idx: expected int64 \[T, K\] on the CPU, got int64 \(5, 3\) on"
    check_refused(run_threads, device, x_on_the_cpu, text)


def test_wrong_values_are_found(run_threads, device):
    def twice(there):
        there.idx[1] = device.put(torch.full((5, 3), 4))

    check_refused(run_threads, device, twice, "expert 4 twice at token 0")


class Failing(far.FarCopies):
    def __init__(self, error="", stuck=False):
        self.error, self.stuck = error, stuck

    def event(self, device):
        if self.error:
            raise RuntimeError(self.error)
        return super().event(device)


@pytest.mark.parametrize("how, text", [
    ({"error": "CUDA error: an illegal memory access was encountered"}, "but meta failed: CUDA error: an illegal"),
    ({"stuck": True}, "but its stream did not come to this call within 0.2 s"),
])  # fmt: skip
def test_a_device_that_fails(run_threads, monkeypatch, how, text):
    """The error of an earlier kernel, and a stream that never comes here: bounded, and the peers learn it."""
    monkeypatch.setattr(staging, "DEVICES", dict(staging.DEVICES))
    far.install()
    device = Device("far")
    case = make_case(R, hidden=128, seed=7, tokens=[9, 5, 16, 4])

    staging.DEVICES["meta"] = Failing(**how)

    def call(buffer, rank):
        there = on_device(device, case)
        with pytest.raises(ArgumentError if rank == 1 else PeerError, match=text):
            dispatch(
                buffer, there if rank == 1 else case, rank, timeout_s=0.2 if rank == 1 else None
            )
        dispatch(buffer, case, rank)

    run_threads(call, R, **OPTIONS)


def test_a_stream_that_is_captured(run_threads, monkeypatch):
    monkeypatch.setattr(staging, "DEVICES", dict(staging.DEVICES))
    far.install().problem = "its stream is captured for a CUDA graph"
    case = make_case(1, hidden=128, tokens=[4])

    def body(buffer, rank):
        with pytest.raises(ArgumentError, match="got one on meta, but its stream is captured"):
            dispatch(buffer, on_device(Device("far"), case), rank)

    run_threads(body, 1, **{**OPTIONS, "ranks_per_node": 1})


# --- DeepEP's interfaces -------------------------------------------------------------------------


def both(device, call):
    """call(put, get): its results with CPU tensors, then with the device's."""
    want = call(lambda v: v, lambda v: v)
    got = call(device.put, device.get)
    assert equal(got, want)


def test_deep_ep_normal(run_threads, device):
    case = make_case(R, hidden=128, seed=8, tokens=[9, 0, 16, 4])

    def body(core, rank):
        buffer = deep_ep.Buffer(core.group, explicitly_destroy=True)

        def call(put, get):
            x, idx, weights = put(case.xs[rank]), put(case.idx[rank]), put(case.weights[rank])
            ranks, nodes, experts, in_rank, event = buffer.get_dispatch_layout(
                idx, 7, async_finish=True
            )
            recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
                x, None, ranks, nodes, in_rank, experts, idx, weights, previous_event=event, async_finish=True,
            )  # fmt: skip
            event.current_stream_wait()
            assert all(part.is_cpu for part in handle)
            cached, *_ = buffer.dispatch(x, handle=handle)
            bias = put(torch.ones_like(case.xs[rank])), put(torch.ones_like(case.xs[rank]))
            out, columns, _ = buffer.combine(recv_x, handle, recv_weights, bias)
            return get(
                (ranks, experts, in_rank, recv_x, recv_idx, recv_weights, cached, out, columns)
            ), counts

        both(device, call)
        buffer.destroy()

    run_threads(body, R, **OPTIONS)


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_deep_ep_low_latency(run_threads, device, hook, fp8):
    case = make_case(R, hidden=128, seed=9, tokens=[9, 0, 16, 4], num_experts=8)

    def body(core, rank):
        buffer = deep_ep.Buffer(core.group, low_latency_mode=True, explicitly_destroy=True)
        stats = torch.zeros(2, dtype=torch.int32)

        def call(put, get, zero_copy=False):
            x, idx, weights = put(case.xs[rank]), put(case.idx[rank]), put(case.weights[rank])
            counted = put(stats.clone())
            packed, count, handle, _, receive = buffer.low_latency_dispatch(
                x, idx, 16, 8, counted, use_fp8=fp8, return_recv_hook=hook
            )
            if hook:
                receive()
                receive()
            numbers = get(count)
            rows = get(packed[0] if fp8 else packed)
            used = [rows[e, :n].float() for e, n in enumerate(numbers.tolist())]
            y = torch.zeros(*rows.shape, dtype=torch.bfloat16)
            for e, n in enumerate(numbers.tolist()):
                y[e, :n] = used[e]
            sent = put(y)
            if zero_copy:
                room = buffer.get_next_low_latency_combine_buffer(handle)
                room.copy_(sent)
                sent = put(torch.full_like(y, 5))  # only its shape counts
            out = put(torch.full_like(case.xs[rank], 3))
            combined, _, receive = buffer.low_latency_combine(
                sent, idx, weights, handle, out=out, zero_copy=zero_copy, return_recv_hook=hook
            )
            if hook:
                receive()
            assert combined is out
            return used, numbers, get(counted), get(handle[0]), get(handle[1]), get(combined)

        both(device, call)
        both(device, lambda put, get: call(put, get, zero_copy=True))
        buffer.destroy()

    run_threads(body, R, **OPTIONS)


@pytest.mark.parametrize("expand", [False, True])
def test_deep_ep_elastic(run_threads, device, expand):
    case = make_case(R, hidden=128, seed=10, tokens=[9, 0, 16, 4])

    def body(core, rank):
        buffer = deep_ep.ElasticBuffer(
            core.group, num_max_tokens_per_rank=16, hidden=128, num_topk=3, explicitly_destroy=True
        )  # fmt: skip

        def call(put, get):
            x, idx, weights = put(case.xs[rank]), put(case.idx[rank]), put(case.weights[rank])
            rows, recv_idx, recv_weights, handle, event = buffer.dispatch(
                x, idx, weights, num_experts=7, do_expand=expand, async_with_compute_stream=True
            )
            event.current_stream_wait()
            again, *_ = buffer.dispatch(x, handle=handle, do_expand=expand)
            out, columns, _ = buffer.combine(
                rows, handle, recv_weights, bias=put(torch.ones_like(case.xs[rank]))
            )
            return get((rows, recv_idx, recv_weights, again, out, columns))

        both(device, call)
        buffer.destroy()

    run_threads(body, R, **OPTIONS)


@pytest.mark.parametrize("permute", [False, True])
def test_deep_ep_hybrid(run_threads, device, permute):
    case = make_case(R, hidden=128, seed=6, tokens=[9, 5, 16, 0])

    def body(core, rank):
        buffer = deep_ep.HybridEPBuffer(core.group, 128, 16, 2)

        def call(put, get):
            x, idx, weights = put(case.xs[rank]), put(case.idx[rank]), put(case.weights[rank])
            given = {"topk_idx": idx, "topk_weights": weights, "num_of_experts": 8}
            if permute:
                most = torch.tensor([70], dtype=torch.int32)  # on the host in any case
                rows, probs, _, counts, handle = buffer.dispatch_with_permute(
                    hidden=x, pad_multiple=4, num_permuted_tokens=most, **given
                )
                again, *_ = buffer.dispatch_with_permute(hidden=x, handle=handle)
                out, columns = buffer.combine_with_unpermute(
                    hidden=rows, probs=probs, handle=handle
                )
                return get((rows, probs, counts, again, out, columns))
            rows, probs, _, handle = buffer.dispatch(x, **given)
            again, *_ = buffer.dispatch(x, handle=handle)
            out, columns = buffer.combine(rows, probs, handle)
            return get((rows, probs, again, out, columns))

        both(device, call)

    run_threads(body, R, **OPTIONS)


def test_deep_ep_mixed_devices(run_threads, device):
    case = make_case(R, hidden=128, seed=8, tokens=[9, 5, 16, 4])

    def body(core, rank):
        buffer = deep_ep.ElasticBuffer(
            core.group, num_max_tokens_per_rank=16, hidden=128, num_topk=3, explicitly_destroy=True
        )  # fmt: skip
        idx = case.idx[rank] if rank == 1 else device.put(case.idx[rank])
        with pytest.raises(
            ArgumentError if rank == 1 else PeerError, match="but topk_idx is int64"
        ):
            buffer.dispatch(device.put(case.xs[rank]), idx, num_experts=7)
        buffer.barrier()
        buffer.destroy()

    run_threads(body, R, **OPTIONS)


def test_closed(device):
    (group,) = moe_comm.EPGroup.threads(1)
    buffer = moe_comm.Buffer(group, **{**OPTIONS, "ranks_per_node": 1})
    buffer.close()
    case = on_device(device, make_case(1, hidden=128, tokens=[4]))
    with pytest.raises(moe_comm.ClosedError):
        dispatch(buffer, case, 0)


def test_the_log_says_so_once(device, run_threads, caplog):
    staging._said.clear()
    kind = device.put(torch.zeros(1)).device.type
    case = on_device(device, make_case(2, hidden=128, tokens=[4, 3]))
    with caplog.at_level("INFO", logger="moe_comm.staging"):
        run_threads(lambda buffer, rank: [dispatch(buffer, case, rank) for _ in range(2)], 2)
    assert [r.message for r in caplog.records if "host-staged by copy" in r.message] == [
        f"{kind} tensors are host-staged by copy: a Buffer's windows are in host memory"
    ]
