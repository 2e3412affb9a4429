"""Calls of several rounds by kernels (kernel_rounds.py); the suites of tests/ep run so, too: --through rounds."""

# ruff: noqa: F811  (fixtures)
import ctypes
import sys
from pathlib import Path

import pytest
from host_device import run_on_host
from test_kernel_buffer import at_home, device, moved, transport  # noqa: F401
from test_kernel_streams import cuda, on_streams, on_threads  # noqa: F401

import moe_comm
from moe_comm import (
    ArgumentError,
    MismatchError,
    PeerError,
    PeerLost,
    TransportError,
    kernel_rounds,
    reference,
)

sys.path.append(str(Path(__file__).resolve().parents[1] / "ep"))
from cases import check_dispatched, dispatch, expected, make_case, node_list, same

ROW = 64 * 2 + 32  # bytes, about
SIZES = {"hidden": 64, "topk": 3, "num_experts": 8}
TOKENS = [31, 0, 7, 16]


def windows_for(tokens, num_ranks):
    """window_bytes of so many tokens of a round, whatever the hops."""
    return 2 * 2 * num_ranks * tokens * ROW


def _calls(rank, group, device, transport, layout, hops):
    """Dispatch, combine, the same again with its handle, and a combine in wider and narrower windows."""
    device, library = device
    if library:
        run_on_host(library)
    interface = "lo" if transport.startswith("fabric:tcp") else None
    options = {"device": device, "transport": transport, "interface": interface, "ranks_per_node": 2, "hops": hops,
               "timeout_s": 20, **SIZES}  # fmt: skip
    with moe_comm.Buffer(group, window_bytes=windows_for(4, 4), max_tokens=40, **options) as buffer, \
            moe_comm.Buffer(group, window_bytes=windows_for(9, 4), **options) as wider, \
            moe_comm.Buffer(group, window_bytes=windows_for(2, 4), **options) as narrower:  # fmt: skip
        assert buffer.kernels.chunk >= 3 and wider.kernels.chunk > 2 * narrower.kernels.chunk
        for seed in range(2):
            case = make_case(4, layout=layout, seed=seed, tokens=TOKENS, num_experts=8)
            want, here = expected(case), moved(case, device)
            before = buffer.stats()["rounds"]
            got = dispatch(buffer, here, rank)
            assert buffer.stats()["rounds"] - before == -(-31 // buffer.kernels.chunk) > 3
            check_dispatched(at_home(got), want, rank)
            assert kernel_rounds.num_parts(got.handle) == buffer.stats()["rounds"] - before
            ys = [(x.float() * 1.5 + r).to(x.dtype) for r, x in enumerate(want.x)]
            weights = None if layout == "rank" else want.topk_weights
            columns = want.topk_weights
            back = reference.combine(
                ys, want.bookkeeping, weights=weights, topk_weights=columns, node_of=node_list(4, 2), hops=hops
            )  # fmt: skip
            mine = None if weights is None else weights[rank].to(device)
            for other in (buffer, wider, narrower):
                y, summed = other.combine(
                    ys[rank].to(device), got.handle, weights=mine, topk_weights=columns[rank].to(device)
                )  # fmt: skip
                assert same(y.cpu(), back.x[rank]) and same(summed.cpu(), back.topk_weights[rank])
                again = other.dispatch(here.xs[rank] * 2, handle=got.handle, layout=layout)
                assert same(again.x, got.x * 2)
    return True


@pytest.mark.parametrize("hops", ["rank", "node"])
@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
def test_round_trips(run_ranks, device, transport, layout, hops):
    assert all(run_ranks(_calls, 4, device, transport, layout, hops))


@pytest.mark.parametrize("hops", ["rank", "node"])
def test_shaken(run_ranks, library, hops, monkeypatch):
    """Writes late, cut and out of order (chaos), epochs about to wrap."""
    monkeypatch.setenv("MOE_COMM_CHAOS_SEED", "7")
    monkeypatch.setenv("MOE_COMM_SHARD_BYTES", "256")
    monkeypatch.setenv("MOE_COMM_FIRST_EPOCH", str(2**32 - 4))
    assert all(run_ranks(_calls, 4, ("cpu", library._name), "shm", "expert", hops))


def _wrong(rank, group, library, wrong):
    """One rank's input is wrong; all use the same epochs, and the next call works."""
    run_on_host(library)
    case = make_case(2, tokens=[13, 5], num_experts=8)
    options = {"device": "cpu", "window_bytes": windows_for(3, 2), "timeout_s": 10, **SIZES}
    with moe_comm.Buffer(group, **options) as buffer:
        want = expected(case)
        got = dispatch(buffer, case, rank)
        if rank == wrong:
            idx = case.idx[rank].clone()
            idx[len(idx) - 1, 0] = 8  # of the last round
            text = rf"expert ids in \[0, 8\) or -1, got 8 at \[{len(idx) - 1}, 0\]"
            with pytest.raises(ArgumentError, match=text):
                buffer.dispatch(case.xs[rank], idx, num_experts=8)
        else:
            with pytest.raises(
                PeerError, match=f"rank {wrong} raised: topk_idx: expected expert ids"
            ):
                dispatch(buffer, case, rank)
        first = buffer.kernels.next_epoch
        assert len(set(group.gather(first))) == 1
        check_dispatched(dispatch(buffer, case, rank), want, rank)
        with pytest.raises(ArgumentError if rank == wrong else PeerError, match="y: expected"):
            buffer.combine(got.x[:, :32] if rank != wrong else got.x[1:], got.handle)
        with pytest.raises(MismatchError, match="bytes in a row"):
            buffer.combine(got.x[:, :32].contiguous() if rank == wrong else got.x, got.handle)
        small = make_case(2, tokens=[1, 1], num_experts=8)
        other = dispatch(buffer, small, rank)
        with pytest.raises(MismatchError, match="handle"):  # a round here, several there
            mine = other if rank == wrong else got
            buffer.combine(mine.x, mine.handle)
        assert len(set(group.gather(buffer.kernels.next_epoch))) == 1
        with pytest.raises(
            MismatchError, match=r"max_tokens: rank . passed 12, rank 0 has 13 tokens"
        ):
            dispatch(buffer, case, rank, max_tokens=12 if rank == wrong else None)
        with pytest.raises((ArgumentError, PeerError), match="async_op"):
            dispatch(buffer, case, rank, async_op="hook")
        check_dispatched(dispatch(buffer, case, rank), want, rank)


@pytest.mark.parametrize("wrong", [0, 1])
def test_wrong_input_of_one_rank(run_ranks, library, wrong):
    run_ranks(_wrong, 2, library._name, wrong)


def _refuses_wider_rows(rank, group, library, hops):
    """A call that takes several rounds, as its rows are wider than what the Buffer was made for; one is wrong."""
    run_on_host(library)
    case = make_case(4, tokens=[8, 8, 3, 0], num_experts=8)
    wide = make_case(4, tokens=[8, 8, 3, 0], num_experts=8, hidden=512)
    options = {"device": "cpu", "ranks_per_node": 2, "timeout_s": 10, "hops": hops, **SIZES}
    with moe_comm.Buffer(group, max_tokens=8, **options) as buffer:
        check_dispatched(dispatch(buffer, case, rank), expected(case), rank)
        before = buffer.stats()["rounds"]
        check_dispatched(dispatch(buffer, wide, rank), expected(wide), rank)
        assert buffer.stats()["rounds"] - before > 1 and not buffer.kernels.in_rounds
        with pytest.raises(ArgumentError if rank == 1 else PeerError, match="topk_idx: expected"):
            idx = wide.idx[rank].int() if rank == 1 else wide.idx[rank]
            buffer.dispatch(wide.xs[rank], idx, num_experts=8)
        assert len(set(group.gather(buffer.kernels.next_epoch))) == 1
        check_dispatched(dispatch(buffer, wide, rank), expected(wide), rank)


@pytest.mark.parametrize("hops", ["rank", "node"])
def test_a_refused_call_of_wider_rows(run_ranks, library, hops):
    run_ranks(_refuses_wider_rows, 4, library._name, hops)


def _damaged_later(rank, group, library):
    """One bit of the second round's header is another: nobody says that all is well."""
    run_on_host(library)
    case = make_case(2, tokens=[9, 9], num_experts=8)
    options = {"device": "cpu", "window_bytes": windows_for(3, 2), "timeout_s": 5, **SIZES}
    with moe_comm.Buffer(group, **options) as buffer:
        dispatch(buffer, case, rank)
        if rank == 0:
            await_rows, awaited = buffer.kernels.await_rows, []

            def damaged(call, *more):
                await_rows(call, *more)
                awaited.append(call)
                if len(awaited) == 2:
                    window = int(buffer.kernels.table(call, "in", 2)[1])
                    ctypes.c_uint8.from_address(window + 9).value ^= 1

            buffer.kernels.await_rows = damaged
        with pytest.raises((TransportError, PeerLost)) as caught:
            dispatch(buffer, case, rank)
            dispatch(buffer, case, rank)
        group.gather(None)
        return str(caught.value)


def test_a_later_round_is_damaged(run_ranks, library):
    text, _ = run_ranks(_damaged_later, 2, library._name)
    assert "rank 1 (node 0) is damaged" in text


def _other_rounds(rank, group, library, wrong):
    """One rank combines a dispatch of one round, the others one of several: all use as many epochs."""
    run_on_host(library)
    long = make_case(4, tokens=TOKENS, num_experts=8)
    short = make_case(4, tokens=[1, 1, 1, 1], num_experts=8)
    options = {"device": "cpu", "ranks_per_node": 2, "timeout_s": 10, **SIZES}
    with moe_comm.Buffer(group, window_bytes=windows_for(4, 4), **options) as buffer:
        several, one = dispatch(buffer, long, rank), dispatch(buffer, short, rank)
        for mine, others in ((one, several), (several, one)):
            got = mine if rank == wrong else others
            with pytest.raises(MismatchError, match="handle"):
                buffer.combine(got.x, got.handle)
            assert len(set(group.gather(buffer.kernels.next_epoch))) == 1
        check_dispatched(dispatch(buffer, long, rank), expected(long), rank)


@pytest.mark.parametrize("wrong", range(4))
def test_ranks_that_disagree_on_rounds(run_ranks, library, wrong):
    run_ranks(_other_rounds, 4, library._name, wrong)


def test_captured_calls_are_one_round(cuda):
    """All ranks refuse; eager calls go on."""
    case = make_case(2, layout="expert", tokens=[8, 5])

    def body(group, rank):
        with moe_comm.Buffer(
            group, device="cpu", hidden=64, topk=3, num_experts=8, window_bytes=windows_for(3, 2), timeout_s=10
        ) as buffer:  # fmt: skip
            on_streams(cuda, buffer)
            check_dispatched(dispatch(buffer, case, rank), expected(case), rank)
            group.gather(None)
            cuda.captures = True
            with pytest.raises(
                ArgumentError, match="max_tokens: expected as many as fit one round while"
            ):
                dispatch(buffer, case, rank)
            group.gather(None)
            cuda.captures = False
            check_dispatched(dispatch(buffer, case, rank), expected(case), rank)

    on_threads(body)
