"""deep_ep.Buffer with enable_shrink: low-latency calls go on without a rank that died, is late, or was masked."""

import dataclasses
import logging
import os
import signal
import time

import pytest
import torch
from deep_ep_oracle import make_case, open_gloo, padded_rows, same, weighted_sum

import moe_comm
from moe_comm import deep_ep
from moe_comm.deep_ep.quant import cast_to_fp8

NUM_RANKS, MAX_TOKENS, NUM_PLACES = 4, 16, 4 * 16
DEAD = 1


@pytest.fixture(params=[0, 1, 2], ids=lambda g: f"nodes of {g or NUM_RANKS}")
def world(request, run_ranks, monkeypatch, tmp_path):
    if request.param:
        monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", str(request.param))
    monkeypatch.setenv("MOE_COMM_TIMEOUT_S", "2")

    def run(fn, *args, may_die=()):
        return run_ranks(fn, NUM_RANKS, str(tmp_path / "gloo"), *args, may_die=may_die)

    return run


def open_buffer(rank, store, **more):
    return deep_ep.Buffer(
        open_gloo(rank, NUM_RANKS, store), **{"low_latency_mode": True, "enable_shrink": True, **more}
    )  # fmt: skip


def make(seed=0, hidden=512):
    tokens = [9, 6, 0, MAX_TOKENS]
    return make_case(tokens, seed=seed, hidden=hidden, num_experts=8, topk=4)


def without(case, dead):
    """The same inputs where `dead` ranks have no tokens and nobody asks for their experts."""
    idx, xs = [], []
    for rank, ids in enumerate(case.idx):
        lost = torch.isin(ids // case.experts_per_rank, torch.tensor(dead))
        idx.append(torch.where(lost, -1, ids)[: 0 if rank in dead else None])
        xs.append(case.xs[rank][: 0 if rank in dead else None])
    return dataclasses.replace(case, xs=xs, idx=idx)


def check_received(case, rank, packed, count, handle, rows=None):
    want = padded_rows(case, rank, NUM_PLACES, rows)
    assert count.tolist() == [len(found) for found in want]
    src_info, layout_range = handle[:2]
    for e, found in enumerate(want):
        for i, (source, token, row) in enumerate(found):
            assert same(packed[e, i], row) and src_info[e, i] == token
            begin, number = (
                int(layout_range[e, source]) >> 32,
                int(layout_range[e, source]) & 0xFFFF,
            )
            assert begin <= i < begin + number
        assert sum(int(r) & 0xFFFF for r in layout_range[e]) == len(found)


def results_of(case, seed=5):
    g = torch.Generator().manual_seed(seed)
    ys, places = [], {}
    for r in range(NUM_RANKS):
        ys.append(torch.randn((2, NUM_PLACES, case.xs[0].shape[1]), generator=g).bfloat16())
        for e, found in zip(case.owned(r), padded_rows(case, r, NUM_PLACES), strict=True):
            for i, (source, token, _) in enumerate(found):
                places[e, source, token] = i
    return ys, places


def send(buffer, case, rank, **more):
    return buffer.low_latency_dispatch(
        case.xs[rank], case.idx[rank], MAX_TOKENS, case.num_experts, **{"use_fp8": False, **more}
    )


def round_trip(buffer, rank, dead, seed, hook=False, use_fp8=False):
    """What arrives is as if the dead had no tokens and no experts."""
    given, case = make(seed), without(make(seed), dead)
    packed, count, handle, _, received = send(
        buffer, given, rank, return_recv_hook=hook, use_fp8=use_fp8
    )
    if hook:
        received()
    if use_fp8:
        casts = [cast_to_fp8(x) for x in case.xs]
        check_received(case, rank, packed[0], count, handle, [c[0] for c in casts])
        check_received(case, rank, packed[1], count, handle, [c[1] for c in casts])
    else:
        check_received(case, rank, packed, count, handle)
    ys, places = results_of(case)
    got, _, received = buffer.low_latency_combine(
        ys[rank], given.idx[rank], given.weights[rank], handle, return_recv_hook=hook
    )
    if hook:
        received()
    assert same(got, weighted_sum(case, rank, ys, places))
    return given, handle


def masks_of(buffer):
    status = torch.full((NUM_RANKS,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    return status.tolist()


def logged_masks(caplog_records):
    return [r.getMessage() for r in caplog_records if "goes on without rank" in r.getMessage()]


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records = []
        logging.getLogger("moe_comm").addHandler(self)

    def emit(self, record):
        self.records.append(record)


def wait_for_all(group, rank, tag):
    group.store.set(f"{tag}/{rank}", "1")
    group.store.wait([f"{tag}/{r}" for r in range(NUM_RANKS)])


# --- a rank that dies ------------------------------------------------------------------------------


def check_killed(rank, group, store):
    buffer, seen = open_buffer(rank, store), Records()
    assert buffer.enable_shrink is True
    for seed in range(3):
        round_trip(buffer, rank, (), seed, hook=seed == 1)
    assert masks_of(buffer) == [0, 0, 0, 0] and not logged_masks(seen.records)
    wait_for_all(group, rank, "whole")
    if rank == DEAD:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    for seed in range(6):
        round_trip(buffer, rank, (DEAD,), seed, hook=seed % 2 == 0, use_fp8=seed % 3 == 1)
        assert masks_of(buffer) == [0, 1, 0, 0]
    assert time.monotonic() - start < 10
    assert len(logged_masks(seen.records)) == 1, "said once, not by each call"
    assert "without rank 1" in logged_masks(seen.records)[0]
    # What is lost does not stop what needs no more room; windows cannot grow without all ranks.
    with pytest.raises(moe_comm.ArgumentError, match=r"while ranks \[1\] are masked"):
        send(buffer, make(hidden=1024), rank)
    round_trip(buffer, rank, (DEAD,), 1)
    with pytest.raises(moe_comm.ArgumentError, match="mask: expected True for a masked rank"):
        buffer.low_latency_update_mask_buffer(DEAD)
    # Those that live meet; the dead does not come.
    buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True).zero_()
    buffer.low_latency_clean_mask_buffer()
    assert masks_of(buffer) == [0, 1, 0, 0]
    for seed in range(3):
        round_trip(buffer, rank, (DEAD,), seed, hook=True)


def test_killed_rank(world):
    world(check_killed, may_die=[DEAD])


def check_killed_before(rank, group, store, shrink):
    """Windows are made in the first call: all ranks must come, and who ended is not waited for."""
    buffer = open_buffer(rank, store, enable_shrink=shrink)
    wait_for_all(group, rank, "made")
    if rank == DEAD:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises((moe_comm.PeerLost, moe_comm.PeerTimeout), match=r"for ranks \[1\]"):
        send(buffer, make(), rank)
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("shrink", [False, True])
def test_killed_before_the_first_call(world, shrink):
    world(check_killed_before, shrink, may_die=[DEAD])


def check_killed_before_on_one_node(rank, group, store):
    """The same at once, however long a call may take."""
    start = time.monotonic()
    check_killed_before(rank, group, store, False)
    assert time.monotonic() - start < 20


def test_killed_before_the_first_call_on_one_node(run_ranks, monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_COMM_TIMEOUT_S", "300")
    run_ranks(check_killed_before_on_one_node, NUM_RANKS, str(tmp_path / "gloo"), may_die=[DEAD])


def check_killed_between(rank, group, store, hook):
    """Its tokens were received, and its results are missing."""
    buffer = open_buffer(rank, store)
    given = make()
    for _ in range(2):
        _, _, handle, _, received = send(buffer, given, rank, return_recv_hook=hook)
        if hook:
            received()
        ys, places = results_of(given)
        mine = (ys[rank], given.idx[rank], given.weights[rank])
        buffer.low_latency_combine(*mine, handle)
    packed, count, handle, _, received = send(buffer, given, rank, return_recv_hook=hook)
    if hook:
        received()
    check_received(given, rank, packed, count, handle)
    wait_for_all(group, rank, "sent")
    if rank == DEAD:
        os.kill(os.getpid(), signal.SIGKILL)
    got, _, received = buffer.low_latency_combine(*mine, handle, return_recv_hook=hook)
    if hook:
        received()
    lost = without(given, (DEAD,))
    assert same(got, weighted_sum(lost, rank, ys, places))
    assert masks_of(buffer) == [0, 1, 0, 0]


@pytest.mark.parametrize("hook", [False, True])
def test_killed_between_dispatch_and_combine(world, hook):
    world(check_killed_between, hook, may_die=[DEAD])


# --- a rank that is late, and comes back -----------------------------------------------------------


def check_late(rank, group, store):
    buffer = open_buffer(rank, store)
    _, old = round_trip(buffer, rank, (), 0)
    pids = group.gather(os.getpid())
    if rank == DEAD:
        os.kill(os.getpid(), signal.SIGSTOP)
        given = make()
        for _ in range(2):  # nobody sends to it any more
            _, count, *_ = send(buffer, given, rank)
        assert masks_of(buffer) == [1, 0, 1, 1]
        alone = without(given, (0, 2, 3))
        assert count.tolist() == [len(found) for found in padded_rows(alone, rank, NUM_PLACES)]
        group.store.set("alone", "1")
    else:
        for seed in range(3):
            round_trip(buffer, rank, (DEAD,), seed)
        assert masks_of(buffer) == [0, 1, 0, 0]
        group.store.set(f"masked/{rank}", "1")
        if rank == 0:
            group.store.wait(["masked/2", "masked/3"])
            os.kill(pids[DEAD], signal.SIGCONT)
        group.store.wait(["alone"])
    buffer.low_latency_clean_mask_buffer()
    assert masks_of(buffer) == [0, 0, 0, 0]
    given = make()
    with pytest.raises(moe_comm.ArgumentError, match="generation"):
        ys, _ = results_of(given)
        buffer.low_latency_combine(ys[rank], given.idx[rank], given.weights[rank], old)
    for seed in range(4):
        round_trip(buffer, rank, (), seed, hook=True)
    # All are there: windows may grow again.
    larger = make(hidden=1024)
    packed, count, handle, _, _ = send(buffer, larger, rank)
    check_received(larger, rank, packed, count, handle)
    group.gather(None)


def test_late_rank_comes_back(world):
    world(check_late)


# --- by hand ---------------------------------------------------------------------------------------


def check_by_hand(rank, group, store):
    buffer = open_buffer(rank, store, explicitly_destroy=True)
    buffer.low_latency_update_mask_buffer(
        3 if rank == 2 else 2, mask=True
    )  # before there are windows
    assert masks_of(buffer)[3 if rank == 2 else 2] == 1
    buffer.low_latency_clean_mask_buffer()  # is local then
    assert masks_of(buffer) == [0, 0, 0, 0]
    round_trip(buffer, rank, (), 0)
    buffer.low_latency_update_mask_buffer(2)  # not masked: nothing to do
    buffer.low_latency_update_mask_buffer(2, False)
    if rank != 3:
        buffer.low_latency_update_mask_buffer(3, mask=True)
        buffer.low_latency_update_mask_buffer(rank_to_mask=3, mask=1)
        for seed in range(3):
            round_trip(buffer, rank, (3,), seed, hook=True)
            assert masks_of(buffer) == [0, 0, 0, 1]
    buffer.low_latency_clean_mask_buffer()
    round_trip(buffer, rank, (), 3)
    with pytest.raises(moe_comm.ArgumentError, match="rank_to_mask: expected another rank"):
        buffer.low_latency_update_mask_buffer(rank, True)
    for bad in (-1, NUM_RANKS, None):
        with pytest.raises(moe_comm.ArgumentError, match="rank_to_mask: expected a rank of 4"):
            buffer.low_latency_update_mask_buffer(bad, True)
    for bad in (torch.zeros(NUM_RANKS), torch.zeros(3, dtype=torch.int32), None):
        with pytest.raises(moe_comm.ArgumentError, match=r"mask_status: expected int32 \(4,\)"):
            buffer.low_latency_query_mask_buffer(bad)
    group.gather(None)
    buffer.destroy()
    with pytest.raises(moe_comm.ClosedError):
        masks_of(buffer)


def test_by_hand(world):
    world(check_by_hand)


def check_masked_at_first(rank, group, store):
    """Masks from before the first call hold in it."""
    buffer = open_buffer(rank, store)
    if rank != 3:
        buffer.low_latency_update_mask_buffer(3, mask=True)
        round_trip(buffer, rank, (3,), 0)
    else:
        send(buffer, make(), rank)
        assert masks_of(buffer) == [1, 1, 1, 0]
    group.gather(None)


def test_masked_before_the_first_call(world):
    world(check_masked_at_first)


def check_not_enabled(rank, group, store):
    process_group = open_gloo(rank, NUM_RANKS, store)
    for more, match in (
        ({"low_latency_mode": True}, "enable_shrink: expected True for masks"),
        ({"enable_shrink": True}, "low_latency_mode: expected True"),
    ):
        buffer = deep_ep.Buffer(process_group, **more)
        for call in (
            lambda buffer=buffer: masks_of(buffer),
            lambda buffer=buffer: buffer.low_latency_update_mask_buffer(1, True),
            lambda buffer=buffer: buffer.low_latency_clean_mask_buffer(),
        ):
            with pytest.raises(moe_comm.ArgumentError, match=match):
                call()
    group.gather(None)


def test_not_enabled(world):
    world(check_not_enabled)
