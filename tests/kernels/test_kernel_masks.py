"""Masks by kernels: on a GPU, or as host code (tests/ep/test_mask.py runs over it, too: `--through kernels`)."""

# ruff: noqa: F811  (fixtures)
import dataclasses
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from host_device import run_on_host
from test_kernel_buffer import at_home, device, moved, transport  # noqa: F401
from test_kernel_streams import cuda, on_ranks  # noqa: F401

import moe_comm
from moe_comm import reference

sys.path.append(str(Path(__file__).resolve().parents[1] / "ep"))
from cases import check_dispatched, dispatch, expected, make_case, same
from test_generations import _wait_for_all, _without

SIZES = {"hidden": 64, "topk": 3, "num_experts": 6, "max_tokens": 8, "hops": "rank"}
NUM_RANKS, DEAD = 3, 1


def make(seed, layout="padded"):
    capacity = 8 * NUM_RANKS if layout == "padded" else None
    case = make_case(NUM_RANKS, tokens=[6, 8, 5], num_experts=6, seed=seed, layout=layout)
    return dataclasses.replace(case, capacity=capacity)


def left(case, dead):
    """The same without the dead: what is expected."""
    return dataclasses.replace(_without(case, dead), layout=case.layout, capacity=case.capacity)


def back_of(case, dead):
    """By rank, where results are what was received."""
    want, nothing = expected(case), torch.zeros(0, dtype=torch.int64)
    copies = list(want.bookkeeping.copies)
    for rank in dead:
        copies[rank] = reference.Copies(nothing, nothing, nothing)
    bookkeeping = dataclasses.replace(want.bookkeeping, copies=tuple(copies))
    return reference.combine(want.x, bookkeeping, hops="rank").x


def check_round_trip(buffer, rank, device, seed, layout, dead):
    case = make(seed, layout)
    got = dispatch(buffer, moved(case, device), rank)
    check_dispatched(at_home(got), expected(left(case, dead)), rank)
    assert same(buffer.combine(got.x, got.handle).cpu(), back_of(case, dead)[rank])


def _goes_on(rank, group, device, transport, ranks_per_node, layout):
    device, library = device
    if library:
        run_on_host(library)
    interface = "lo" if transport.startswith("fabric:tcp") else None
    buffer = moe_comm.Buffer(
        group, device=device, transport=transport, interface=interface, ranks_per_node=ranks_per_node,
        mask_lost=True, timeout_s=4, **SIZES,
    )  # fmt: skip
    assert buffer.kernels is not None and buffer.kernels.masks is not None
    for seed in range(3):
        check_round_trip(buffer, rank, device, seed, layout, ())
    _wait_for_all(group, rank, range(NUM_RANKS), "whole")
    if rank == DEAD:
        os.kill(os.getpid(), signal.SIGKILL)
    for seed in range(4):
        check_round_trip(buffer, rank, device, seed, layout, (DEAD,))
    assert buffer.alive() == (True, False, True)
    buffer.close()


@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
@pytest.mark.parametrize("ranks_per_node", [1, NUM_RANKS])
def test_goes_on_without_a_rank(run_ranks, device, transport, ranks_per_node, layout):
    run_ranks(_goes_on, NUM_RANKS, device, transport, ranks_per_node, layout, may_die=[DEAD])


def test_captured_calls_leave_out_who_is_masked(cuda):
    """What a graph launches reads the masks; its outputs are as large as with everybody."""
    case = make_case(2, tokens=[4, 4], num_experts=8, seed=1, layout="padded", topk=3)
    case.capacity = 16

    def body(buffer, rank):
        dispatch(buffer, case, rank)
        buffer.mask(1 - rank)
        cuda.captures = True
        try:
            got = dispatch(buffer, case, rank)
            y = buffer.combine(got.x, got.handle)
        finally:
            cuda.captures = False
        alone = left(case, (1 - rank,))
        check_dispatched(got, expected(alone), rank)
        assert same(y, back_of(case, (1 - rank,))[rank])

    on_ranks(cuda, body, hops="rank", mask_lost=True, ranks_per_node=1)


def _captured(rank, group):
    """A graph's replays go on without a rank that died between two of them."""
    with moe_comm.Buffer(group, device="cuda", mask_lost=True, timeout_s=4, **SIZES) as buffer:
        static = [t[rank].cuda() for t in (make(0).xs, make(0).idx)]

        def calls():
            got = buffer.dispatch(*static, num_experts=6, layout="padded")
            return got.x, buffer.combine(got.x, got.handle)

        calls()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x, y = calls()
        for seed in range(6):
            if seed == 3:
                _wait_for_all(group, rank, range(NUM_RANKS), "three")
                if rank == DEAD:
                    os.kill(os.getpid(), signal.SIGKILL)
            case, dead = make(seed), (DEAD,) if seed >= 3 else ()
            for target, value in zip(static, (case.xs[rank], case.idx[rank]), strict=True):
                target[: len(value)].copy_(value)
            graph.replay()
            torch.cuda.synchronize()
            assert same(x.cpu(), expected(left(case, dead)).x[rank])
            assert same(y.cpu(), back_of(case, dead)[rank])


@pytest.mark.gpu
def test_captured(run_ranks):
    run_ranks(_captured, NUM_RANKS, may_die=[DEAD])
