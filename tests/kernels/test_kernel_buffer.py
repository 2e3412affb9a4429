"""A Buffer of kernels, run by threads of the host in several processes: over the engine's proxies and real transports.

The whole suites of tests/ep run over it, too: `pytest tests/ep --through kernels`.
"""

import ctypes
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from host_device import run_on_host

import moe_comm
from moe_comm import (
    ArgumentError,
    PeerError,
    PeerLost,
    PeerTimeout,
    TransportError,
    _engine,
    deep_ep,
    kernel_exchange,
    reference,
)
from moe_comm.deep_ep.quant import cast_from_fp8

sys.path.append(str(Path(__file__).resolve().parents[1] / "ep"))
from cases import check_dispatched, dispatch, expected, make_case, node_list, same

FIRSTS = {"plain": 2, "16 bits": 2**16 - 8, "48 bits": 2**48 - 8, "64 bits": 2**64 - 8}
SIZES = {"hidden": 64, "topk": 3, "num_experts": 8}
CALLS = 6


def why_not(name):
    for report in _engine.transports():
        if report["name"] == name:
            return "" if report["available"] else report["reason"]
    return f"{name} was not built in"


@pytest.fixture(params=["shm", "fabric:tcp;ofi_rxm"])
def transport(request):
    reason = why_not(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


ON_GPU = [pytest.param(kind, marks=pytest.mark.gpu) for kind in ("cuda", "cuda, host-staged")]


@pytest.fixture(params=["host", *ON_GPU])
def device(request, library, monkeypatch):
    """What ranks take: a GPU that they share, windows in its memory or staged; or the host, and kernels as its code."""
    if request.param == "host":
        return "cpu", library._name
    monkeypatch.setenv("MOE_COMM_WINDOWS", "host" if "staged" in request.param else "auto")
    return "cuda", None


def moved(case, device):
    """On a rank's device."""
    names = ("xs", "idx", "weights")
    return dataclasses.replace(case, **{n: [t.to(device) for t in getattr(case, n)] for n in names})


def at_home(dispatched):
    """What was dispatched, on the host."""
    names = ("x", "topk_idx", "topk_weights", "tokens_per_expert")
    tensors = {n: getattr(dispatched, n) for n in names}
    return dataclasses.replace(
        dispatched, **{n: t if t is None else t.cpu() for n, t in tensors.items()}
    )


def _calls(rank, group, device, transport, layout, ranks_per_node, hops="rank"):
    """Dispatches, each with its combine and once more with its handle."""
    device, library = device
    if library:
        run_on_host(library)
    num_ranks = group.num_ranks
    cases = [make_case(num_ranks, layout=layout, seed=s, tokens=9) for s in range(CALLS)]
    interface = "lo" if transport.startswith("fabric:tcp") else None
    with moe_comm.Buffer(
        group, hops=hops, device=device, max_tokens=10, transport=transport, interface=interface,
        ranks_per_node=ranks_per_node, timeout_s=20, **SIZES,
    ) as buffer:  # fmt: skip
        for case in cases:
            want = expected(case)
            here = moved(case, device)
            got = dispatch(buffer, here, rank)
            check_dispatched(at_home(got), want, rank)
            ys = [(x.float() * 1.5 + rank).to(x.dtype) for rank, x in enumerate(want.x)]
            weights = None if layout == "rank" else want.topk_weights
            columns = want.topk_weights
            back = reference.combine(
                ys, want.bookkeeping, weights=weights, topk_weights=columns,
                node_of=node_list(num_ranks, ranks_per_node), hops=hops,
            )  # fmt: skip
            mine = None if weights is None else weights[rank].to(device)
            y, summed = buffer.combine(
                ys[rank].to(device), got.handle, weights=mine, topk_weights=columns[rank].to(device)
            )
            assert same(y.cpu(), back.x[rank]) and same(summed.cpu(), back.topk_weights[rank])
            again = buffer.dispatch(here.xs[rank] * 2, handle=got.handle, layout=layout)
            assert same(again.x, got.x * 2)
    return buffer.engine.transport, buffer.kernels.num_links, buffer.kernels.ring.stats()


def check(results, waits=2):
    """`waits`: armed in each call."""
    for _, num_links, stats in results:
        calls = 3 * CALLS
        assert stats["commands"] == calls * (2 * num_links + waits)  # rows and releases
        assert stats["armed"] == stats["ended"] == waits * calls and stats["failed"] == 0


@pytest.mark.parametrize("first", FIRSTS.values(), ids=FIRSTS)
@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
def test_round_trips(run_ranks, device, transport, layout, first, monkeypatch):
    monkeypatch.setenv("MOE_COMM_FIRST_EPOCH", str(first))
    check(run_ranks(_calls, 3, device, transport, layout, 1))


@pytest.mark.parametrize("first", FIRSTS.values(), ids=FIRSTS)
@pytest.mark.parametrize("num_ranks, ranks_per_node", [(2, 1), (3, 1), (4, 2), (6, 2)])
def test_round_trips_by_node(
    run_ranks, device, transport, num_ranks, ranks_per_node, first, monkeypatch
):
    """Rows that forwarders pass on, and sums of nodes."""
    monkeypatch.setenv("MOE_COMM_FIRST_EPOCH", str(first))
    layout = ("rank", "expert", "padded")[num_ranks % 3]
    check(run_ranks(_calls, num_ranks, device, transport, layout, ranks_per_node, "node"), waits=3)


@pytest.mark.parametrize("hops", ["rank", "node"])
@pytest.mark.parametrize("seed", [1, 2])
def test_shaken(run_ranks, device, transport, seed, hops, monkeypatch):
    """Writes late, cut and out of order (chaos)."""
    monkeypatch.setenv("MOE_COMM_CHAOS_SEED", str(seed))
    monkeypatch.setenv("MOE_COMM_SHARD_BYTES", "256")
    results = run_ranks(_calls, 4, device, transport, "expert", 2, hops)
    check(results, waits=2 if hops == "rank" else 3)


@pytest.mark.parametrize("hops", ["rank", "node"])
def test_by_efas_rules(run_ranks, library, efa_rules, hops, monkeypatch):
    monkeypatch.setenv("MOE_COMM_LIBFABRIC", efa_rules)
    results = run_ranks(_calls, 3, ("cpu", library._name), "fabric:efa", "expert", 1, hops)
    check(results, waits=2 if hops == "rank" else 3)
    assert all("efa" in name for name, _, _ in results)


# --- what may be in a window -----------------------------------------------------------------------


def _damaged(rank, group, library, offset):
    run_on_host(library)
    case = make_case(2, tokens=[6, 4], num_experts=8)
    with moe_comm.Buffer(group, device="cpu", max_tokens=8, timeout_s=10, **SIZES) as buffer:
        check_dispatched(dispatch(buffer, case, rank), expected(case), rank)
        hook = dispatch(buffer, case, rank, async_op="hook")
        group.gather(None)  # all have sent
        if rank == 1:
            hook()
            return None
        kernels, (pending, _) = buffer.kernels, buffer._unhooked[0]
        window = int(kernels.table(pending.call, "in", 2)[1])
        byte = ctypes.c_uint8.from_address(window + offset)
        byte.value ^= 1
        with pytest.raises(TransportError) as caught:
            hook()
        with pytest.raises(PeerLost, match="damaged"):  # it gave up
            dispatch(buffer, case, rank)
        return str(caught.value)


@pytest.mark.parametrize("offset", [0, 9, 20, 60, 200, 256], ids=str)
def test_a_damaged_header(run_ranks, library, offset):
    """Not a row is touched of a header, or counts, of which one bit is another."""
    text, _ = run_ranks(_damaged, 2, library._name, offset)
    assert "rank 1 (node 0) is damaged" in text


def _damaged_link(rank, group, library, offset, kind):
    """Rank 3 hears it from its rail peer, rank 1, as rank 0 of it: what one of node 0 wrote is another."""
    run_on_host(library)
    case = make_case(4, tokens=[6] * 4, num_experts=8)
    with moe_comm.Buffer(
        group, device="cpu", max_tokens=8, ranks_per_node=2, timeout_s=10, **SIZES
    ) as buffer:
        got = dispatch(buffer, case, rank)
        check_dispatched(got, expected(case), rank)
        kernels = buffer.kernels
        if rank == 1:
            await_links = kernels.await_links

            def damaged(call, *more):
                await_links(call, *more)
                window = int(
                    kernels.table(call, "link_in" if kind == "dispatch" else "gathered", 1)[0]
                )
                ctypes.c_uint8.from_address(window + offset).value ^= 1

            kernels.await_links = damaged
        with pytest.raises((TransportError, PeerLost)) as caught:
            if kind == "dispatch":
                dispatch(buffer, case, rank)
            else:
                buffer.combine(got.x, got.handle)
            dispatch(buffer, case, rank)  # a combine's errors come with the next call at latest
        return str(caught.value)


@pytest.mark.parametrize("offset", [0, 9, 60, 200, 256], ids=str)
def test_a_forwarder_finds_a_damaged_header(run_ranks, library, offset):
    """All ranks of its node blame the rank that the window is of."""
    texts = run_ranks(_damaged_link, 4, library._name, offset, "dispatch")
    for text in texts[:2]:
        assert (
            "rank 3 (node 1) sent something else; a forwarder says: the header in the window"
            in text
        )
    assert all("rank 3" in text for text in texts[2:])


def _forwarder_gives_up(rank, group, library):
    """Rank 2 does not call. Its rail peer, rank 0, waits for it on its forwarder's stream alone: no hook is called."""
    run_on_host(library)
    case = make_case(4, tokens=[6] * 4, num_experts=8)
    with moe_comm.Buffer(
        group, device="cpu", max_tokens=8, ranks_per_node=2, timeout_s=2, **SIZES
    ) as buffer:
        got = dispatch(buffer, case, rank)
        check_dispatched(got, expected(case), rank)
        text = ""
        if rank != 2:
            hook = dispatch(buffer, case, rank, async_op="hook")
        if rank in (1, 3):
            with pytest.raises((PeerLost, PeerTimeout)) as caught:
                hook()
            text = str(caught.value)
        group.gather(None)
        return text


def test_a_forwarder_says_whom_it_misses(run_ranks, library):
    """To who waits for what it would pass on, although its host does not look."""
    texts = run_ranks(_forwarder_gives_up, 4, library._name)
    assert "rank 0 (node 0)" in texts[1] and "it gave up on rank 2" in texts[1]
    assert "rank 2 (node 1)" in texts[3]


@pytest.mark.parametrize("offset", [0, 60, 200], ids=str)
def test_a_forwarder_finds_damaged_results(run_ranks, library, offset):
    texts = run_ranks(_damaged_link, 4, library._name, offset, "combine")
    assert "rank 0 (node 0) sent something else; a forwarder says: the header in the" in texts[3]


# --- captured ------------------------------------------------------------------------------------


def _captured(rank, group, ranks_per_node):
    """Two micro-batches' dispatch and combine in one graph, replayed with other tokens and routing."""
    cases = [make_case(2, layout="padded", tokens=[8, 8], seed=s, none=0.3) for s in range(6)]
    with moe_comm.Buffer(
        group, device="cuda", max_tokens=8, timeout_s=20, ranks_per_node=ranks_per_node, **SIZES
    ) as buffer:
        first = [moved(case, "cuda") for case in cases[:2]]
        static = [(c.xs[rank].clone(), c.idx[rank].clone(), c.weights[rank].clone()) for c in first]

        def calls():
            got = [
                buffer.dispatch(x, idx, weights, num_experts=7, layout="padded", async_op="hook")
                for x, idx, weights in static
            ]
            for hook in got:
                hook()
            return [
                (h.result.x, h.result.topk_weights,
                 buffer.combine(h.result.x, h.result.handle, weights=h.result.topk_weights))
                for h in got
            ]  # fmt: skip

        calls()  # compiles, and makes what is kept
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = calls()
        for round_idx in range(6):
            now = [cases[(round_idx + i) % 6] for i in (0, 3)]
            for (x, idx, weights), case in zip(static, now):
                x.copy_(case.xs[rank])
                idx.copy_(case.idx[rank])
                weights.copy_(case.weights[rank])
            graph.replay()
            torch.cuda.synchronize()
            for (x, weights, y), case in zip(outs, now):
                want = expected(case)
                back = reference.combine(
                    want.x, want.bookkeeping, weights=want.topk_weights, hops="node",
                    node_of=node_list(2, ranks_per_node),
                )  # fmt: skip
                assert same(x.cpu(), want.x[rank]) and same(weights.cpu(), want.topk_weights[rank])
                assert same(y.cpu(), back.x[rank])
        got = dispatch(buffer, first[0], rank)  # not captured, after all the replays
        check_dispatched(at_home(got), expected(cases[0]), rank)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks_per_node", [2, 1])
def test_captured(run_ranks, ranks_per_node):
    run_ranks(_captured, 2, ranks_per_node)


def _captured_low_latency(rank, group, use_fp8):
    """DeepEP's low-latency pair in a graph, replayed with other tokens and routing, against the same calls eager."""
    cases = [make_case(2, tokens=[8, 8], seed=s, none=0.3, hidden=512) for s in range(4)]
    buffer = deep_ep.Buffer(group, low_latency_mode=True, explicitly_destroy=True)
    static = [t.cuda() for t in (cases[0].xs[rank], cases[0].idx[rank], cases[0].weights[rank])]

    def call(x, idx, weights):
        packed, count, handle, _, hook = buffer.low_latency_dispatch(
            x, idx, 8, 7, use_fp8=use_fp8, return_recv_hook=True
        )
        hook()
        rows = cast_from_fp8(*packed) if use_fp8 else packed
        y, _, hook = buffer.low_latency_combine(rows, idx, weights, handle, return_recv_hook=True)
        hook()
        return count, handle[0], handle[1], y

    call(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = call(*static)
    for case in cases * 2:
        now = [t[rank].cuda() for t in (case.xs, case.idx, case.weights)]
        for target, value in zip(static, now, strict=True):
            target.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        found = [t.cpu() for t in outs]
        for one, other in zip(call(*now), found, strict=True):
            assert torch.equal(one.cpu(), other)
    buffer.destroy()


@pytest.mark.gpu
@pytest.mark.parametrize("use_fp8", [False, True])
def test_captured_low_latency(run_ranks, use_fp8, monkeypatch):
    monkeypatch.setenv("MOE_COMM_DEVICE", "cuda")
    run_ranks(_captured_low_latency, 2, use_fp8)


# --- what it cannot do ---------------------------------------------------------------------------


def _refused(rank, group, library):
    run_on_host(library)
    with pytest.raises(ArgumentError, match="device: expected cuda or cuda:N, got 'gpus'"):
        moe_comm.Buffer(group, device="gpus", **SIZES)
    with moe_comm.Buffer(group, device="cpu", max_tokens=8, **SIZES) as buffer:
        case = make_case(2, tokens=[5, 3], num_experts=8)
        got = dispatch(buffer, case, rank)
        check_dispatched(dispatch(buffer, case, rank), expected(case), rank)
        with moe_comm.Buffer(group, **SIZES) as loops:
            other = dispatch(loops, case, rank)
            for call, result in ((loops.combine, got), (buffer.combine, other)):
                with pytest.raises(ArgumentError, match="handle: expected one of a Buffer with"):
                    call(result.x, result.handle)
        with moe_comm.Buffer(group, device="cpu", max_tokens=20, **SIZES) as another:
            assert same(another.combine(got.x, got.handle), buffer.combine(got.x, got.handle))


def test_refused(run_ranks, library):
    run_ranks(_refused, 2, library._name)


def _no_memory(rank, group, library, options, where):
    """Rank 1 has none for what it receives: it says so, the others have theirs, and the next call works."""
    run_on_host(library)
    case = make_case(2, tokens=[9, 4], layout="expert", num_experts=8)
    with moe_comm.Buffer(group, device="cpu", timeout_s=10, **options, **SIZES) as buffer:
        want = expected(case)
        got = dispatch(buffer, case, rank)
        exchange, calls = buffer.kernels, []

        def new(shape, dtype):
            calls.append((shape, dtype))
            if rank == 1 and len(shape) == 2 and dtype in (torch.bfloat16, torch.uint8):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")
            return type(exchange).new(exchange, shape, dtype)

        call = {
            "dispatch": lambda: dispatch(buffer, case, rank), "combine": lambda: buffer.combine(got.x, got.handle),
            "again": lambda: buffer.dispatch(case.xs[rank], handle=got.handle, layout="expert"),
        }[where]  # fmt: skip
        exchange.new = new
        if rank == 1:
            text = "CUDA out of memory. Tried to allocate 7 GiB"
            with pytest.raises(ArgumentError, match=text):
                call()
        else:
            try:
                call()
            except PeerError as error:  # found before rank 1 sent
                assert "out of memory" in str(error) and not options.get("max_tokens")
        del exchange.new
        assert calls
        for _ in range(3):
            check_dispatched(dispatch(buffer, case, rank), want, rank)


@pytest.mark.parametrize("where", ["dispatch", "combine", "again"])
@pytest.mark.parametrize(
    "options", [{"max_tokens": 10}, {"window_bytes": 2 * 2 * 2 * 3 * 160}], ids=["one", "rounds"]
)
def test_no_memory(run_ranks, library, options, where):
    run_ranks(_no_memory, 2, library._name, options, where)


def _one_has_no_driver(rank, group, library):
    run_on_host(library)

    def made(buffer, native):
        raise RuntimeError("no driver")

    real = kernel_exchange.KernelExchange
    if rank == 1:
        kernel_exchange.KernelExchange = made
    with pytest.raises((ArgumentError, TransportError)) as caught:
        moe_comm.Buffer(group, device="cpu", max_tokens=8, **SIZES)
    kernel_exchange.KernelExchange = real
    moe_comm.Buffer(group, device="cpu", max_tokens=8, **SIZES).close()
    return str(caught.value)


def test_all_raise_where_one_cannot(run_ranks, library):
    there, here = run_ranks(_one_has_no_driver, 2, library._name)
    assert here == "device: cpu: no driver"
    assert there == "kernels: rank 1 failed: device: cpu: no driver"
