"""deep_ep.ElasticBuffer in real processes over gloo: DeepEP 2's contract against plain torch, bit for bit."""

import os

import pytest
import torch
from deep_ep_oracle import dispatched, make_case, open_gloo, same

import moe_comm
from moe_comm import deep_ep, reference

WORLDS = [(2, 0), (4, 0), (4, 2)]  # ranks, ranks per pretended node
HIDDEN, TOPK, EXPERTS, M = 64, 5, 12, 24


@pytest.fixture(params=WORLDS, ids=lambda w: f"{w[0]} ranks, nodes of {w[1] or w[0]}")
def world(request, run_ranks, monkeypatch, tmp_path):
    num_ranks, ranks_per_node = request.param
    if ranks_per_node:
        monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", str(ranks_per_node))

    def run(fn, *args):
        return run_ranks(fn, num_ranks, num_ranks, str(tmp_path / "gloo"), *args)

    run.shape = num_ranks, ranks_per_node or num_ranks
    return run


def open_buffer(rank, num_ranks, store, **more):
    options = {"num_max_tokens_per_rank": M, "hidden": HIDDEN, "num_topk": TOPK, **more}
    return deep_ep.ElasticBuffer(open_gloo(rank, num_ranks, store), **options)


def case_of(num_ranks, **more):
    return make_case([9, 0, 17, 4][:num_ranks], **{"topk": TOPK, "num_experts": EXPERTS, **more})


def expanded(case, alignment=1, scales=None):
    return reference.dispatch(
        case.xs, case.idx, case.weights, case.num_experts, "expert", alignment, scales=scales
    )


def random_like(rows, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=g).to(x.dtype) for x in rows]


def send(buffer, case, rank, **more):
    x = more.pop("x", case.xs[rank])
    more = {"topk_idx": case.idx[rank], "topk_weights": case.weights[rank], **more}
    return buffer.dispatch(x, num_experts=case.num_experts, **more)


def up(value, multiple):
    return -(-value // multiple) * multiple


# --- dispatch ------------------------------------------------------------------------------------


def check_compact(rank, group, num_ranks, store):
    buffer = open_buffer(rank, num_ranks, store)
    assert (buffer.runtime.kernels is not None) == bool(os.environ.get("MOE_COMM_DEVICE"))
    for alignment, num_experts in ((1, EXPERTS), (8, EXPERTS), (4, 7)):
        case = case_of(num_ranks, seed=alignment, num_experts=num_experts)
        want = dispatched(case)
        counts = want.tokens_per_expert[rank]
        aligned = [up(c, alignment) for c in counts.tolist()]
        stats = torch.full((len(counts),), 3, dtype=torch.int32)
        rows = len(want.x[rank])
        for sync in (None, 1, 0):
            x, idx, weights, handle, event = send(
                buffer, case, rank, expert_alignment=alignment, do_cpu_sync=sync,
                cumulative_local_expert_recv_stats=stats,
            )  # fmt: skip
            assert event.event is None
            assert len(x) == len(idx) == len(weights) == (num_ranks * M if sync == 0 else rows)
            assert same(x[:rows], want.x[rank]) and not x[rows:].any()
            assert same(idx[:rows], want.topk_idx[rank]) and (idx[rows:] == -1).all()
            assert same(weights[:rows], want.topk_weights[rank]) and not weights[rows:].any()
            assert handle.num_recv_tokens_per_expert_list == ([] if sync == 0 else aligned)
            psum = torch.tensor(aligned).cumsum(0).int()
            assert same(handle.psum_num_recv_tokens_per_expert, psum)
            sources = want.bookkeeping.copies[rank].token
            starts = torch.tensor([0, *map(len, case.xs)]).cumsum(0)
            per_rank = (sources[:, None] < starts[None, 1:]).sum(0).int()
            assert same(handle.psum_num_recv_tokens_per_scaleup_rank, per_rank)
            assert handle.num_unaligned_recv_tokens_per_expert is None
            assert (handle.do_expand, handle.num_experts) == (False, num_experts)
            assert handle.expert_alignment == alignment and handle.num_max_tokens_per_rank == M
            assert handle.num_recv_tokens == len(x) and handle.num_sms >= 4
            source = torch.searchsorted(starts[1:], sources, right=True)
            code = source * M + sources - starts[source]
            assert same(handle.recv_src_metadata[:rows, 0].long(), code)
            last = [max(k for k in range(TOPK) if i[k] >= 0) for i in idx[:rows].tolist()]
            assert handle.recv_src_metadata[:rows, 1].tolist() == last
            assert (handle.recv_src_metadata[:, 2:] == -1).all()
            assert (handle.recv_src_metadata[rows:] == -1).all()
        assert (stats - 3).tolist() == (counts * 3).tolist()
        slots = []
        for ids in case.idx[rank].tolist():
            owners = [e // case.experts_per_rank if e >= 0 else -1 for e in ids]
            slots.append(owners)
        seen = [-1] * num_ranks
        for token, owners in enumerate(slots):
            for owner in {o for o in owners if o >= 0}:
                seen[owner] += 1
            want_slots = [seen[o] if o >= 0 else -1 for o in owners]
            assert handle.dst_buffer_slot_idx[token].tolist() == want_slots


def test_compact(world):
    world(check_compact)


def check_expanded(rank, group, num_ranks, store):
    buffer = open_buffer(rank, num_ranks, store, explicitly_destroy=True)
    case = case_of(num_ranks, seed=5)
    for alignment in (1, 8):
        want = expanded(case, alignment)
        counts = want.tokens_per_expert[rank]
        sizes = [up(c, alignment) for c in counts.tolist()]
        starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
        rows, num_local = len(want.x[rank]), len(counts)
        worst = num_ranks * M * min(TOPK, num_local) + (alignment - 1) * num_local
        for sync in (True, False):
            x, idx, weights, handle, _ = send(
                buffer, case, rank, expert_alignment=alignment, do_expand=1, do_cpu_sync=sync,
                do_zero_padding=True,
            )  # fmt: skip
            assert idx is None and weights.dim() == 1
            assert len(x) == len(weights) == (rows if sync else up(worst, alignment))
            assert same(x[:rows], want.x[rank]) and not x[rows:].any()
            assert same(weights[:rows], want.topk_weights[rank]) and not weights[rows:].any()
            assert handle.num_recv_tokens_per_expert_list == (sizes if sync else [])
            assert same(handle.psum_num_recv_tokens_per_expert, (starts + counts).int())
            assert same(handle.num_unaligned_recv_tokens_per_expert, counts.int())
            positions = handle.recv_src_metadata[:, 2:]
            copies = want.bookkeeping.copies[rank]
            flat = positions[positions >= 0]
            assert same(flat.long(), copies.row)  # by (token, lane), as copies are
            assert handle.num_expanded_tokens == len(x) and handle.do_expand is True
            assert len(positions) == (len(dispatched(case).x[rank]) if sync else num_ranks * M)
    buffer.destroy()
    buffer.destroy()
    with pytest.raises(moe_comm.ClosedError):
        send(buffer, case, rank)


def test_expanded(world):
    world(check_expanded)


def check_scales(rank, group, num_ranks, store):
    buffer = open_buffer(rank, num_ranks, store)
    case = case_of(num_ranks, dtype=torch.float8_e4m3fn)
    for dtype in (torch.float32, torch.int32):
        g = torch.Generator().manual_seed(1)
        scales = [torch.randint(1 << 20, (3, len(x)), generator=g).to(dtype).t() for x in case.xs]
        for want, expand in ((dispatched(case, scales), 0), (expanded(case, 8, scales), 1)):
            for column_major in (False, True):
                (x, sf), *_ = send(
                    buffer, case, rank, x=(case.xs[rank], scales[rank]), do_expand=expand,
                    expert_alignment=8, use_tma_aligned_col_major_sf=column_major,
                )  # fmt: skip
                assert same(x, want.x[rank]) and same(sf, want.scales[rank])
                assert sf.stride() == ((1, up(len(sf), 4)) if column_major else (3, 1))


def test_scales(world):
    world(check_scales)


def check_cached(rank, group, num_ranks, store):
    buffer = open_buffer(rank, num_ranks, store)
    case = case_of(num_ranks, seed=2)
    g = torch.Generator().manual_seed(3)
    other = [torch.randn(x.shape, generator=g).bfloat16() for x in case.xs]
    again = [torch.randn(w.shape, generator=g) for w in case.weights]
    scales = [torch.randn(len(x), 2, generator=g) for x in case.xs]
    case2 = type(case)(other, case.idx, again, case.num_experts)
    wants = dispatched(case2, scales), expanded(case2, 4, scales)
    for made_as in (0, 1):
        for sync in (True, False):
            first = send(
                buffer, case, rank, do_expand=made_as, expert_alignment=4, do_cpu_sync=sync
            )
            handle = first[3]
            for expand in (made_as, 1 - made_as):  # the layout is that of the argument
                want = wants[expand]
                rows = len(want.x[rank])
                for weights in (None, again[rank]):
                    for x in (other[rank], (other[rank], scales[rank])):
                        got, idx, got_weights, same_handle, event = buffer.dispatch(
                            x, topk_weights=weights, handle=handle, do_expand=expand,
                            async_with_compute_stream=True,
                        )  # fmt: skip
                        assert same_handle is handle and event.event is not None
                        event.current_stream_wait()
                        if isinstance(x, tuple):
                            got, sf = got
                            assert same(sf[:rows], want.scales[rank]) and not sf[rows:].any()
                        assert len(got) == (
                            handle.num_expanded_tokens if expand else handle.num_recv_tokens
                        )
                        assert len(got) == rows or not sync
                        assert same(got[:rows], want.x[rank]) and not got[rows:].any()
                        if expand:
                            assert idx is None
                        else:
                            assert (
                                same(idx[:rows], want.topk_idx[rank]) and (idx[rows:] == -1).all()
                            )
                        if weights is None:
                            assert got_weights is None
                        else:
                            assert same(got_weights[:rows], want.topk_weights[rank])
                            assert not got_weights[rows:].any() and len(got_weights) == len(got)


def test_cached(world):
    world(check_cached)


# --- combine -------------------------------------------------------------------------------------


def sums(case, rank, ys, book, how, biases=()):
    """[T, H]: token by token and lane by lane. `ys` [rank] rows, `book` of their dispatch; `how`: compact, local (a
    rank's copies are added and rounded first), each."""
    first = sum(book.num_tokens[:rank])
    out = torch.zeros_like(case.xs[rank])
    rows = [
        {(t, k): ys[r][row] for t, k, row in zip(*(c.tolist() for c in (b.token, b.lane, b.row)))}
        for r, b in enumerate(book.copies)
    ]
    for t, ids in enumerate(case.idx[rank].tolist()):
        owners = [e // case.experts_per_rank if e >= 0 else None for e in ids]
        terms = []
        for k, owner in enumerate(owners):
            if owner is None:
                continue
            if how == "each":
                terms.append(rows[owner][first + t, k])
            elif owner not in owners[k + 1 :]:  # its last lane
                if how == "compact":
                    terms.append(rows[owner][first + t, 0])
                else:
                    mine = [
                        rows[owner][first + t, j].float()
                        for j in range(k + 1)
                        if owners[j] == owner
                    ]
                    terms.append(sum(mine[1:], mine[0]).to(out.dtype))
        start = torch.zeros(out.shape[1])
        for bias in biases:
            start = start + bias[t].float()
        for term in terms:
            start = start + term.float()
        out[t] = start.to(out.dtype)
    return out


def check_combine(rank, group, num_ranks, store):
    buffers = [open_buffer(rank, num_ranks, store)]
    buffers.append(
        deep_ep.ElasticBuffer(torch.distributed.group.WORLD, 4 << 20, allow_multiple_reduction=0)
    )
    for seed, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
        case = case_of(num_ranks, seed=seed, dtype=dtype, none=0.05)
        biases = [random_like(case.xs, 7)[rank], random_like(case.xs, 8)[rank]]
        for expand in (0, 1):
            want = expanded(case, 4) if expand else dispatched(case)
            ys = random_like(want.x, 9)
            for buffer, with_copies in zip(buffers, ("local", "each"), strict=True):
                how = with_copies if expand else "compact"
                for sync in (True, False):
                    x, _, weights, handle, _ = send(
                        buffer,
                        case,
                        rank,
                        do_expand=expand,
                        expert_alignment=4,
                        do_cpu_sync=sync,
                        num_max_tokens_per_rank=M,
                    )
                    y = torch.full(x.shape, float("nan"), dtype=dtype)  # the tail is not read
                    y[: len(ys[rank])] = ys[rank]
                    for bias in (None, biases[0], tuple(biases)):
                        used = (
                            []
                            if bias is None
                            else [bias]
                            if isinstance(bias, torch.Tensor)
                            else bias
                        )
                        given = weights if how != "each" else None
                        if given is not None and not expand:  # a stranger's lanes do not count
                            given = torch.where(given == 0, 99.0, given)
                        out, back, event = buffer.combine(y, handle, given, bias)
                        assert same(out, sums(case, rank, ys, want.bookkeeping, how, used))
                        assert event.event is None
                        if given is not None:
                            assert same(
                                back, torch.where(case.idx[rank] >= 0, case.weights[rank], 0.0)
                            )
                    exact = ys[rank]
                    assert same(buffer.combine(exact, handle)[0], buffer.combine(y, handle)[0])


def test_combine(world):
    world(check_combine)


def test_orders_differ():
    """Or the test of combine would say nothing: the three orders give different bits."""
    case = case_of(4, seed=0, none=0.05, dtype=torch.float32)
    compact, each = dispatched(case), expanded(case, 4)
    ys, zs = random_like(compact.x, 9), random_like(each.x, 9)
    by_rank = reference.combine(ys, compact.bookkeeping, hops="rank").x
    ours = [sums(case, r, ys, compact.bookkeeping, "compact") for r in range(4)]
    assert any(not same(a, b) for a, b in zip(by_rank, ours))
    local = [sums(case, r, zs, each.bookkeeping, "local") for r in range(4)]
    one_by_one = [sums(case, r, zs, each.bookkeeping, "each") for r in range(4)]
    assert any(not same(a, b) for a, b in zip(local, one_by_one))


def check_metadata(rank, group, num_ranks, store):
    """Rows in another order, and metadata that says so."""
    buffer = open_buffer(rank, num_ranks, store)
    case = case_of(num_ranks, seed=4)
    g = torch.Generator().manual_seed(rank)
    for expand in (0, 1):
        x, _, weights, handle, _ = send(buffer, case, rank, do_expand=expand)
        y = random_like([x], 3)[0]
        want, want_weights, _ = buffer.combine(y, handle, weights)
        order = torch.randperm(len(x), generator=g)
        rows = torch.randperm(len(handle.recv_src_metadata), generator=g)
        if not expand:
            rows = order
        metadata = handle.recv_src_metadata[rows].clone()
        if expand:
            moved = torch.argsort(order)
            places = metadata[:, 2:]
            if len(moved):
                metadata[:, 2:] = torch.where(
                    places >= 0, moved[places.clamp(min=0).long()].int(), -1
                )
        handle.recv_src_metadata = metadata
        out, back, _ = buffer.combine(y[order], handle, weights[order])
        assert same(out, want) and same(back, want_weights)
        handle.recv_src_metadata = handle.recv_src_metadata + 1
        with pytest.raises((moe_comm.ArgumentError, moe_comm.PeerError), match="recv_src_metadata"):
            buffer.combine(y, handle)


def test_metadata_may_be_replaced(world):
    world(check_metadata)


def check_rounds(rank, group, num_ranks, store):
    """More tokens than windows hold."""
    buffer = open_buffer(
        rank, num_ranks, store, num_bytes=2 << 20, num_max_tokens_per_rank=6000, num_topk=2
    )
    case = make_case([6000, 0, 17, 3000][:num_ranks], topk=2, num_experts=EXPERTS)
    for expand in (False, True):
        want = expanded(case) if expand else dispatched(case)
        x, _, weights, handle, _ = send(buffer, case, rank, do_expand=expand)
        assert same(x, want.x[rank])
        ys = random_like(want.x, 1)
        out, back, _ = buffer.combine(ys[rank], handle, weights)
        assert same(out, reference.combine_by_lane(ys, want.bookkeeping, case.idx, EXPERTS)[rank])
        assert same(back, torch.where(case.idx[rank] >= 0, case.weights[rank], 0.0))
    assert buffer.runtime.stats()["rounds"] >= 8
    # The least windows hold all copies of a token.
    process_group = torch.distributed.group.WORLD
    buffer = deep_ep.ElasticBuffer(process_group, 2 << 20, allow_multiple_reduction=False)
    case = make_case([3, 0, 1, 2][:num_ranks], hidden=7168, topk=32, num_experts=32 * num_ranks)
    want = expanded(case)
    _, _, _, handle, _ = send(buffer, case, rank, do_expand=True)
    out, _, _ = buffer.combine(want.x[rank], handle)
    assert same(out, sums(case, rank, want.x, want.bookkeeping, "each"))


def test_rounds(world):
    world(check_rounds)


# --- the rest ------------------------------------------------------------------------------------


def check_errors(rank, group, num_ranks, store):
    buffer = open_buffer(rank, num_ranks, store)
    case = case_of(num_ranks)
    errors = (moe_comm.ArgumentError, moe_comm.PeerError)
    *_, handle, _ = send(buffer, case, rank)
    *_, wide, _ = send(buffer, case, rank, do_expand=True)
    x, idx = case.xs[rank], case.idx[rank]

    def fails(match, call, *args, **more):
        with pytest.raises(errors, match=match):
            call(*args, **more)

    fails("num_experts: expected an int > 0", buffer.dispatch, x, idx)
    fails("topk_idx: expected int64 ", buffer.dispatch, x, num_experts=EXPERTS)
    fails("topk_idx: expected None with a handle", buffer.dispatch, x, idx, handle=handle)
    fails(
        "do_cpu_sync: expected False with a handle",
        buffer.dispatch,
        x,
        handle=handle,
        do_cpu_sync=True,
    )
    fails(
        "expert_alignment: expected 1, the handle's",
        buffer.dispatch,
        x,
        handle=handle,
        expert_alignment=2,
    )
    stats = torch.zeros(EXPERTS // num_ranks, dtype=torch.int32)
    fails(
        "recv_stats: expected None",
        buffer.dispatch,
        x,
        handle=handle,
        cumulative_local_expert_recv_stats=stats,
    )
    fails(
        "recv_stats: expected int32",
        send,
        buffer,
        case,
        rank,
        cumulative_local_expert_recv_stats=stats[1:],
    )
    fails("previous_event: expected", send, buffer, case, rank, previous_event=3)
    # one rank alone is wrong: the others learn it, and nobody waits
    most = {"num_max_tokens_per_rank": 3 if rank == 0 else M}
    fails(
        "x: expected at most num_max_tokens_per_rank = 3 tokens", send, buffer, case, rank, **most
    )
    # Enough for each rank's own tokens, not for those of another: all raise, also who has a size of its own or none.
    most = max(len(other) for other in case.xs)
    lone = next(r for r, other in enumerate(case.xs) if len(other) < most)
    for others in ({}, {"do_cpu_sync": True}, {"num_max_tokens_per_rank": 2 * most}):
        few = {"do_cpu_sync": False, "num_max_tokens_per_rank": max(1, len(x))}
        with pytest.raises(
            moe_comm.MismatchError,
            match=rf"max_tokens: rank \d passed \d+, rank \d has {most} tokens",
        ):
            send(buffer, case, rank, **{**few, **({} if rank == lone else others)})
        send(buffer, case, rank, do_cpu_sync=False)
    enough = {
        "num_max_tokens_per_rank": most + rank,
        "do_cpu_sync": False,
    }  # not the same, and no matter
    recv_x = send(buffer, case, rank, **enough)[0]
    assert len(recv_x) == num_ranks * (most + rank)
    y = torch.zeros(handle.num_recv_tokens + (rank == 0), HIDDEN, dtype=torch.bfloat16)
    fails("x: expected a tensor of", buffer.combine, y, handle)
    fails("handle: expected the EPHandle", buffer.combine, y, None)
    buffer.allow_multiple_reduction = False
    y = torch.zeros(wide.num_expanded_tokens, HIDDEN, dtype=torch.bfloat16)
    fails("topk_weights: expected None", buffer.combine, y, wide, torch.zeros(len(y)))
    fails("explicitly_destroy: expected True", buffer.destroy)
    buffer.barrier()
    send(buffer, case, rank)  # goes on


def test_wrong_input(world):
    world(check_errors)


def check_attributes(rank, group, num_ranks, store, ranks_per_node):
    buffer = open_buffer(rank, num_ranks, store)
    process_group = torch.distributed.group.WORLD
    hint = deep_ep.ElasticBuffer.get_buffer_size_hint(process_group, M, HIDDEN, TOPK)
    assert hint == buffer.num_bytes and hint % (2 << 20) == 0
    assert buffer.group is process_group and buffer.num_max_tokens_per_rank == M
    assert (buffer.rank_idx, buffer.num_ranks, bool(buffer.runtime)) == (rank, num_ranks, True)
    assert (
        buffer.get_logical_domain_size()
        == deep_ep.get_logical_domain_size(process_group)
        == (1, num_ranks)
    )
    nodes = (num_ranks // ranks_per_node, ranks_per_node)
    assert (
        buffer.get_physical_domain_size()
        == deep_ep.get_physical_domain_size(process_group)
        == nodes
    )
    assert (buffer.num_scaleup_ranks, buffer.scaleup_rank_idx) == (num_ranks, rank)
    assert isinstance(buffer.capture(), deep_ep.EventHandle)
    sms = buffer.get_theoretical_num_sms(EXPERTS, TOPK)
    assert sms % 2 == 0 and sms >= 4 and buffer.get_theoretical_num_qps(sms) == 9
    assert buffer.get_theoretical_num_qps(4) == 4 and buffer.num_allocated_qps >= 9
    with pytest.raises(moe_comm.ArgumentError, match="num_scaleout_topk: expected 0"):
        buffer.get_theoretical_num_sms(EXPERTS, TOPK, 2)
    other = deep_ep.ElasticBuffer(
        process_group, 2 << 20, num_allocated_qps=5, prefer_overlap_with_compute=0
    )
    assert other.get_theoretical_num_sms(EXPERTS, TOPK) >= 64
    assert other.num_allocated_qps == other.get_theoretical_num_qps(64) == 5
    for name in (
        "engram_write",
        "engram_fetch",
        "pp_send",
        "pp_recv",
        "agrs_new_session",
        "all_gather",
    ):
        assert not hasattr(buffer, name)
    case = case_of(num_ranks)
    either = (None, buffer.capture(), deep_ep.Buffer.capture(), deep_ep.EventOverlap())
    for event in either:
        x, _, _, handle, after = send(
            buffer, case, rank, previous_event=event, allocate_on_comm_stream=True, do_handle_copy=False,
            async_with_compute_stream=1,
        )  # fmt: skip
        assert handle.topk_idx.data_ptr() == case.idx[rank].data_ptr() or not len(x)
        with after:
            pass
        buffer.combine(x, handle, previous_event=after, previous_event_before_epilogue=event)
    copied = send(buffer, case, rank)[3].topk_idx
    assert same(copied, case.idx[rank]) and (copied is not case.idx[rank])
    # a handle lives longer than its buffer, and is used in any order
    handles = [send(buffer, case, rank)[3] for _ in range(2)]
    ys = random_like([dispatched(case).x[rank]] * 2, rank)
    want = [buffer.combine(y, h)[0] for y, h in zip(ys, handles)]
    del buffer
    other = deep_ep.buffers.elastic.ElasticBuffer(process_group, 2 << 20)  # no more than needed
    for y, h, w in reversed(list(zip(ys, handles, want))):
        assert same(other.combine(y, h)[0], w)


def test_attributes(world):
    world(check_attributes, world.shape[1])
