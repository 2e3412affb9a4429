"""A Buffer of kernels on streams, and captured: torch.cuda's streams and events pretended, all else as it is.

What a graph's calls return is as large as it can become, as nobody asks the device for sizes.
"""

import contextlib
import sys
import threading
from pathlib import Path

import pytest
import torch
from host_device import run_on_host
from torch.utils._python_dispatch import TorchDispatchMode

import moe_comm
from moe_comm import ArgumentError, MismatchError, deep_ep, kernel_exchange, reference
from moe_comm.deep_ep import low_latency
from moe_comm.deep_ep.quant import cast_from_fp8
from moe_comm.kernels import cuda as cuda_sources
from moe_comm.kernels import fused

sys.path.append(str(Path(__file__).resolve().parents[1] / "ep"))
from cases import check_dispatched, dispatch, expected, make_case, same

SIZES = {"hidden": 64, "topk": 3, "num_experts": 8, "max_tokens": 8}


class Pretended:
    """torch.cuda: everything that is launched is over at once; what is called is written down."""

    def __init__(self):
        self.captures, self.called = False, []
        self.current = self.Stream(self)

    class Stream:
        cuda_stream = 0

        def __init__(self, cuda):
            self.cuda = cuda

        def wait_stream(self, other):
            self.cuda.called.append("the exchange's stream waits")

        def wait_event(self, event):
            self.cuda.called.append("the caller's stream waits")

        def query(self):
            return True

    class Event:
        over = True

        def record(self, stream=None):
            pass

        def query(self):
            return self.over

        def wait(self):
            pass


@pytest.fixture
def cuda(library, monkeypatch):
    monkeypatch.setattr(fused, "run", fused.run)
    monkeypatch.setattr(fused, "stream_wait", fused.stream_wait)
    run_on_host(library._name)
    pretended = Pretended()
    in_context = lambda _: contextlib.nullcontext()  # noqa: E731
    for name, value in {
        "Event": pretended.Event, "current_stream": lambda device=None: pretended.current, "stream": in_context,
        "device": in_context, "is_current_stream_capturing": lambda: pretended.captures,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory=False, **kw: zeros(*shape, **kw))
    return pretended


def on_streams(cuda, buffer):
    kernels = buffer.kernels
    kernels.stream = cuda.Stream(cuda)
    kernels._captured_words = torch.zeros(kernel_exchange.CAPTURED_WORDS, dtype=torch.int64)
    if kernels.forwarder is not None:
        kernels.forwarder._thread.shutdown()
        kernels.forwarder._thread, kernels.forwarder._stream = None, cuda.Stream(cuda)


def on_ranks(cuda, body, **options):
    """body(buffer, rank) of two threads; Buffers have streams."""

    def with_buffer(group, rank):
        options.setdefault("timeout_s", 10)
        with moe_comm.Buffer(group, device="cpu", **SIZES, **options) as buffer:
            on_streams(cuda, buffer)
            body(buffer, rank)

    on_threads(with_buffer)


def on_threads(body):
    """body(group, rank) of two threads."""
    errors, groups = [], moe_comm.EPGroup.threads(2)

    def run(rank):
        try:
            body(groups[rank], rank)
        except BaseException as error:  # to be raised by the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]


def combined(want, hops="node", node_of=(0, 0)):
    weights = (
        None if want.x[0].dim() == 2 and want.topk_weights[0].dim() == 2 else want.topk_weights
    )
    return reference.combine(
        want.x, want.bookkeeping, weights=weights, node_of=list(node_of), hops=hops
    ).x  # fmt: skip


@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
@pytest.mark.parametrize("async_op", [None, "event", "hook"])
def test_streams(cuda, layout, async_op):
    case = make_case(2, layout=layout, tokens=[8, 5])
    want = expected(case)

    def body(buffer, rank):
        result = dispatch(buffer, case, rank, async_op=async_op)
        if async_op == "hook":
            result()
            result = result.result
        got, event = result if async_op == "event" else (result, None)
        if event is not None:
            assert event.query()
            event.wait()
        check_dispatched(got, want, rank)
        weights = None if layout == "rank" else got.topk_weights
        assert same(buffer.combine(got.x, got.handle, weights=weights), combined(want)[rank])

    on_ranks(cuda, body)
    halves = 2 * 3 * 2  # two ranks, two calls: sent, headers, rows
    behind = 2 * (async_op == "hook")  # the caller's stream, behind what read its x
    assert cuda.called.count("the exchange's stream waits") == halves + behind
    ends = 4 if async_op != "event" else 2  # an event leaves it to who asked for it
    assert cuda.called.count("the caller's stream waits") == ends


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("hook", [False, True])
def test_between_nodes(cuda, hook, captures):
    """The forwarder's stream comes behind what is sent, and before what is received."""
    case = make_case(2, layout="padded", tokens=[8, 5])
    want = expected(case)

    def body(buffer, rank):
        cuda.captures = captures
        x = case.xs[rank].clone()
        now = type(case)(**{**vars(case), "xs": [x, x]})
        got = dispatch(buffer, now, rank, async_op="hook" if hook else None)
        if hook:
            x.fill_(1)  # it was read
            got()
            got = got.result
        check_dispatched(got, want, rank)
        y = buffer.combine(got.x, got.handle, weights=got.topk_weights)
        assert same(y, combined(want, node_of=(0, 1))[rank])

    on_ranks(cuda, body, ranks_per_node=1)
    # Two ranks, two calls: sent, headers, rows; the forwarder's; and, behind a hooked send, the caller's.
    assert cuda.called.count("the exchange's stream waits") == 2 * (3 * 2 + 2) + 2 * hook
    assert cuda.called.count("the caller's stream waits") == 2 * 2 * 2


def told_of(asked, name, plain):
    """The method `plain` of a tensor, but that who calls it is noted; a twin stands for a kernel, which asks nobody."""

    def method(self, *args, **options):
        if not sys._getframe(1).f_code.co_filename.startswith(str(cuda_sources.HERE)):
            asked.append(name)
        return plain(self, *args, **options)

    return method


class Launches(TorchDispatchMode):
    """What a GPU would be given: kernels of *.cu, Triton's in the place of twins, and torch's own."""

    FREE = (
        "empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "detach", "_local_scalar_dense"
    )  # fmt: skip
    OF_STEPS = {"route": 2, "places": 2, "lane_numbers": 2, "unpack_lanes": 2}

    def __init__(self, monkeypatch):
        super().__init__()
        self.names, self.in_step, self.thread = [], False, threading.get_ident()
        run = fused.run

        def counted(name, *args):
            if threading.get_ident() == self.thread:
                self.names.append(name)
            run(name, *args)

        monkeypatch.setattr(fused, "run", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        name = function._schema.name.removeprefix("aten::")
        if not (views or self.in_step or name in self.FREE):
            self.names.append(name)
        return function(*args, **(kwargs or {}))

    def of(self, kernels):
        def counted(name, step):
            def call(*args, **options):
                if threading.get_ident() != self.thread:
                    return step(*args, **options)
                self.names += [name] * self.OF_STEPS.get(name, 1)
                self.in_step = True
                try:
                    return step(*args, **options)
                finally:
                    self.in_step = False

            return call

        steps = {n: counted(n, step) for n, step in kernels._asdict().items() if callable(step)}
        return kernels._replace(**steps)


def test_launches_of_low_latency(cuda, monkeypatch):
    """Each costs microseconds, whatever it does: there are few."""
    monkeypatch.setenv("MOE_COMM_DEVICE", "cpu")
    counted = {}

    def with_buffer(group, rank):
        buffer = deep_ep.Buffer(group, low_latency_mode=True, explicitly_destroy=True)
        idx, x, weights = torch.tensor([[0, 3, 1]]), torch.ones(1, 512).bfloat16(), torch.ones(1, 3)

        def pair(seen):
            with seen("dispatch"):
                packed, _, handle, _, hook = buffer.low_latency_dispatch(
                    x, idx, 4, 4, use_fp8=False, return_recv_hook=True
                )
            with seen("its hook"):
                hook()
            with seen("combine"):
                _, _, hook = buffer.low_latency_combine(
                    packed, idx, weights, handle, return_recv_hook=True
                )
            with seen("its hook, too"):
                hook()

        pair(lambda name: contextlib.nullcontext())
        if rank == 1:
            return pair(lambda name: contextlib.nullcontext())
        kernels = buffer._low_latency.windows.buffer.kernels
        mine, plain = Launches(monkeypatch), low_latency.for_device
        kernels.kernels = mine.of(kernels.kernels)
        monkeypatch.setattr(low_latency, "for_device", lambda device: mine.of(plain(device)))

        @contextlib.contextmanager
        def seen(name):
            mine.names = []
            with mine:
                yield
            counted[name] = mine.names

        pair(seen)

    on_threads(with_buffer)
    for found in counted.values():
        print(*found)
    assert {name: len(found) for name, found in counted.items()} == {
        "dispatch": 5, "its hook": 11, "combine": 6, "its hook, too": 5,
    }  # fmt: skip


@pytest.mark.parametrize("use_fp8", [False, True])
def test_captured_low_latency(cuda, monkeypatch, use_fp8):
    """Nothing asks the host for numbers, once a call made the windows."""
    monkeypatch.setenv("MOE_COMM_DEVICE", "cpu")
    monkeypatch.setenv("MOE_COMM_TIMEOUT_S", "10")
    gate = threading.Barrier(2)
    idx = [torch.tensor([[0, 3, 1], [2, -1, 1]]), torch.tensor([[3, 2, 0]])]
    xs = [torch.randn(len(i), 512).bfloat16() for i in idx]
    weights = [torch.rand(i.shape) for i in idx]
    asked = []

    def with_buffer(group, rank):
        buffer = deep_ep.Buffer(group, low_latency_mode=True, explicitly_destroy=True)

        def call(max_tokens=4):
            packed, count, handle, _, hook = buffer.low_latency_dispatch(
                xs[rank], idx[rank], max_tokens, 4, use_fp8=use_fp8, return_recv_hook=True
            )
            hook()
            rows = cast_from_fp8(*packed) if use_fp8 else packed
            y, _, hook = buffer.low_latency_combine(
                rows, idx[rank], weights[rank], handle, return_recv_hook=True
            )
            hook()
            return count, handle[0], handle[1], y

        call(max_tokens=9)  # windows for more tokens than are captured
        eager = call()
        on_streams(cuda, buffer._low_latency.windows.buffer)
        gate.wait(10)
        if rank == 0:
            cuda.captures = True
            for name in ("tolist", "item", "nonzero", "__bool__", "__int__"):
                plain = getattr(torch.Tensor, name)
                monkeypatch.setattr(torch.Tensor, name, told_of(asked, name, plain))
        gate.wait(10)
        captured = call()
        gate.wait(10)
        if rank == 0:
            monkeypatch.undo()
        gate.wait(10)
        for one, other in zip(eager, captured, strict=True):
            assert torch.equal(one, other)
        buffer.destroy()

    on_threads(with_buffer)
    assert not asked


@pytest.mark.parametrize(
    "layout, alignment", [("rank", 1), ("expert", 1), ("expert", 4), ("padded", 1)]
)
def test_captured_calls_know_no_sizes(cuda, layout, alignment):
    cuda.captures = True
    case = make_case(2, layout=layout, tokens=[8, 5], alignment=alignment)
    want = expected(case)

    def body(buffer, rank):
        got = dispatch(buffer, case, rank)
        x, rows = got.x, len(want.x[rank])
        assert same(x[:rows], want.x[rank]) and not x[rows:].any()
        assert got.handle.number == 0 and got.handle.totals == (0, 0)
        owned = (4, 3)[rank]
        bounds = {"rank": 16, "expert": 16 * 3 + owned * (alignment - 1), "padded": owned}
        assert len(x) == bounds[layout], "of 8 tokens a rank, 3 experts a token"
        weights = None if layout == "rank" else got.topk_weights
        assert same(buffer.combine(x, got.handle, weights=weights), combined(want)[rank])
        again = buffer.dispatch(case.xs[rank] * 2, handle=got.handle, layout=layout)
        assert same(again.x, x * 2)
        assert len(buffer.kernels._reports) == 3 and all(
            r.captured for r in buffer.kernels._reports
        )

    on_ranks(cuda, body)


def test_graphs_with_too_many_calls(cuda):
    """The call that finds no room is refused on all ranks before it sends rows; eager ones go on."""
    case = make_case(2, layout="padded", tokens=[8, 5])
    gate = threading.Barrier(2)

    def body(buffer, rank):
        words = buffer.kernels._captured_words
        buffer.kernels._captured_words = words[: 1 + buffer.kernels.handle_words(4)]
        gate.wait(10)
        cuda.captures = True
        dispatch(buffer, case, rank)
        with pytest.raises(ArgumentError, match="device: expected fewer captured calls"):
            dispatch(buffer, case, rank)
        gate.wait(10)
        cuda.captures = False
        gate.wait(10)
        check_dispatched(dispatch(buffer, case, rank), expected(case), rank)

    on_ranks(cuda, body)


def test_what_a_graph_found_is_raised_by_the_next_call(cuda):
    case = make_case(2, layout="padded", tokens=[8, 5])
    gate = threading.Barrier(2)

    def body(buffer, rank):
        small = {**vars(case), "num_experts": 7 + rank}
        with pytest.raises(ArgumentError, match="capacity: expected at least 16 while a graph is"):
            gate.wait(10)
            cuda.captures = True
            dispatch(buffer, type(case)(**{**vars(case), "capacity": 9}), rank)
        dispatch(buffer, type(case)(**small), rank)  # nobody looks
        gate.wait(10)
        cuda.captures = False
        gate.wait(10)
        with pytest.raises(MismatchError, match="disagrees in num_experts"):
            dispatch(buffer, case, rank)
        check_dispatched(dispatch(buffer, case, rank), expected(case), rank)  # once

    on_ranks(cuda, body)


def test_every_call_that_failed_is_told_of(cuda, monkeypatch):
    """Two calls fail before anybody looks: the next two raise, one after the other, then a call works."""
    case = make_case(2, layout="padded", tokens=[8, 5])
    gate = threading.Barrier(2)

    def body(buffer, rank):
        monkeypatch.setattr(Pretended.Event, "over", False)
        gate.wait(10)
        for _ in range(2):
            dispatch(buffer, type(case)(**{**vars(case), "num_experts": 7 + rank}), rank)
        gate.wait(10)
        monkeypatch.setattr(Pretended.Event, "over", True)
        gate.wait(10)
        for epoch in (2, 3):
            with pytest.raises(MismatchError, match=f"dispatch epoch {epoch}: .* num_experts"):
                dispatch(buffer, case, rank)
        check_dispatched(dispatch(buffer, case, rank), expected(case), rank)

    on_ranks(cuda, body)
