"""The call sequences of real clients, keyword for keyword: vLLM, sglang, xtuner, prime-rl, lmdeploy, NeMo Automodel, …

Each part does what the client's own code does between import and result, on CPU tensors. What arrives is checked in the
other files; here: that the forms are taken, that what is unpacked has the form wanted, and that the sums are right.
"""

import gc
import json
import shutil
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from deep_ep_oracle import combined, dispatched, make_case, open_gloo, same

import moe_comm
from moe_comm import deep_ep
from moe_comm.deep_ep import Buffer
from moe_comm.deep_ep.quant import cast_from_fp8, cast_to_fp8
from moe_comm.deep_ep.utils import EventOverlap

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


# --- vLLM ----------------------------------------------------------------------------------------


class Cache:
    """all2all.py: buffers by their arguments, held weakly."""

    def __init__(self):
        self._cache = weakref.WeakValueDictionary()

    def get_or_create(self, kwargs, make):
        key = tuple(sorted((k, v) for k, v in kwargs.items()))
        made = self._cache.get(key)
        if made is None:
            made = make(**kwargs)
            self._cache[key] = made
        return made


@torch.inference_mode()
def check_vllm_high_throughput(rank, group, num_ranks, store, node_of):
    cpu_group = open_gloo(rank, num_ranks, store)
    cache = Cache()
    kwargs = {
        "group": cpu_group,
        "num_nvl_bytes": 1024 * 1024 * 1024,
        "num_rdma_bytes": 0,
        "low_latency_mode": False,
        "num_qps_per_rank": 1,
        "explicitly_destroy": True,
    }
    buffer = cache.get_or_create(kwargs, deep_ep.Buffer)
    assert cache.get_or_create(kwargs, deep_ep.Buffer) is buffer
    deep_ep.Buffer.set_num_sms(20)
    capture = buffer.capture
    cases = [
        make_case([7, 3, 0, 12][:num_ranks], seed=s, num_experts=2 * num_ranks, hidden=512)
        for s in range(2)
    ]
    handles = [None, None]
    configs = (
        deep_ep.Buffer.get_dispatch_config(num_ranks),
        deep_ep.Buffer.get_combine_config(num_ranks),
    )
    received = []
    for i, case in enumerate(cases):  # two micro-batches, the first with FP8 rows
        previous_event = capture()
        per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
            topk_idx=case.idx[rank],
            num_experts=case.num_experts,
            previous_event=previous_event,
            async_finish=False,
            allocate_on_comm_stream=False,
        )
        tokens = cast_to_fp8(case.xs[rank]) if i == 0 else case.xs[rank]
        (
            token_data,
            recv_idx,
            recv_weights,
            counts,
            handle,
            event,
        ) = buffer.dispatch(
            x=tokens,
            handle=None,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=case.idx[rank],
            topk_weights=case.weights[rank],
            expert_alignment=1,
            config=configs[0],
            previous_event=previous_event,
            async_finish=False,
            allocate_on_comm_stream=False,
        )
        handles[i] = handle
        if event.event is not None:
            event.current_stream_wait()
        rows = cast_from_fp8(*token_data) if i == 0 else token_data
        want = dispatched(case)
        sent = [cast_from_fp8(*cast_to_fp8(x)) if i == 0 else x for x in case.xs]
        case.xs = sent
        assert same(rows, dispatched(case).x[rank])
        assert isinstance(counts, list) and counts == want.tokens_per_expert[rank].tolist()
        offset = rank * case.experts_per_rank
        global_idx = torch.where(
            recv_idx == -1, 0 if rank else case.num_experts - 1, recv_idx + offset
        )
        assert bool((global_idx[recv_weights > 0] // case.experts_per_rank == rank).all())
        received.append(rows)
    for i, case in enumerate(cases):
        for async_finish in (False, True):
            combined_x, _, event = buffer.combine(
                x=received[i],
                handle=handles[i],
                topk_weights=None,
                config=configs[1],
                previous_event=capture(),
                async_finish=async_finish,
                allocate_on_comm_stream=False,
            )
            assert (event.event is not None) == async_finish
            want = dispatched(case)
            assert same(combined_x, combined(want.x, want.bookkeeping, rank, node_of).bfloat16())
    buffer.destroy()


def test_vllm_high_throughput(world):
    world(check_vllm_high_throughput)


def unchanged(rows, topk_ids, weights):
    """What experts that change nothing give: float32 fused multiply-add in top-k order."""
    total = torch.zeros(rows.shape)
    for k in range(topk_ids.shape[1]):
        more = total.double() + rows.double() * weights[:, k : k + 1].double()
        total = torch.where(topk_ids[:, k : k + 1] < 0, total, more.float())
    return total.to(rows.dtype)


@torch.inference_mode()
def check_vllm_low_latency(rank, group, num_ranks, store, node_of):
    cpu_group = open_gloo(rank, num_ranks, store)
    max_tokens, num_experts, hidden = 16, 2 * num_ranks, 2048
    num_rdma_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=max_tokens,
        hidden=hidden,
        num_ranks=num_ranks,
        num_experts=num_experts,
    )
    buffer = deep_ep.Buffer(
        group=cpu_group,
        num_nvl_bytes=1024 * 1024 * 1024,
        num_rdma_bytes=num_rdma_bytes,
        low_latency_mode=True,
        num_qps_per_rank=num_experts // num_ranks,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=True,
        enable_shrink=True,
    )
    case = make_case([7, 16, 0, 12][:num_ranks], num_experts=num_experts, hidden=hidden)
    x, topk_ids, weights = case.xs[rank], case.idx[rank], case.weights[rank]

    def forward():
        for use_fp8 in (False, True):
            for use_ue8m0 in (False, True):
                expert_x, expert_num_tokens, handle, _, hook = buffer.low_latency_dispatch(
                    x,
                    topk_ids,
                    max_tokens,
                    num_experts,
                    use_fp8=use_fp8,
                    round_scale=use_fp8 and use_ue8m0,
                    use_ue8m0=use_fp8 and use_ue8m0,
                    async_finish=False,
                    return_recv_hook=True,
                )
                hook()
                if use_fp8:
                    expert_x = cast_from_fp8(*expert_x)
                assert expert_num_tokens.dtype == torch.int32
                output = torch.full_like(x, torch.nan)
                _, _, hook = buffer.low_latency_combine(
                    expert_x,
                    topk_ids,
                    weights,
                    handle,
                    async_finish=False,
                    zero_copy=False,
                    return_recv_hook=True,
                    out=output,
                )
                hook()
                sent = cast_from_fp8(*cast_to_fp8(x, round_scale=use_ue8m0)) if use_fp8 else x
                assert same(output, unchanged(sent, topk_ids, weights))

    def masks():
        buffer.low_latency_query_mask_buffer(
            status := torch.full((num_ranks,), 7, dtype=torch.int32)
        )
        return status.tolist()

    forward()
    assert masks() == [0] * num_ranks
    # Its fault recovery: who does not answer is masked; later memory and masks are wiped, and all go on.
    other = (rank + 1) % num_ranks
    buffer.low_latency_update_mask_buffer(other, True)
    assert masks() == [int(r == other) for r in range(num_ranks)]
    buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True).zero_()
    buffer.low_latency_clean_mask_buffer()
    assert masks() == [0] * num_ranks
    forward()
    buffer.destroy()


def test_vllm_low_latency(world):
    world(check_vllm_low_latency)


# --- sglang --------------------------------------------------------------------------------------


@torch.inference_mode()
def check_sglang(rank, group, num_ranks, store, node_of):
    """One buffer for both modes; the normal one with FP8 rows and counts aligned to 128."""
    process_group = open_gloo(rank, num_ranks, store)
    hidden, max_tokens, num_experts = 512, 128, 2 * num_ranks
    hidden_bytes = hidden * 2
    num_nvl_bytes = num_rdma_bytes = 0
    for config in (
        Buffer.get_dispatch_config(process_group.size()),
        Buffer.get_combine_config(process_group.size()),
    ):
        num_nvl_bytes = max(
            config.get_nvl_buffer_size_hint(hidden_bytes, process_group.size()), num_nvl_bytes
        )
        num_rdma_bytes = max(
            config.get_rdma_buffer_size_hint(hidden_bytes, process_group.size()), num_rdma_bytes
        )
    num_rdma_bytes = max(
        Buffer.get_low_latency_rdma_size_hint(
            max_tokens, hidden, process_group.size(), num_experts
        ),
        num_rdma_bytes,
    )
    buffer = Buffer(
        process_group,
        num_nvl_bytes,
        num_rdma_bytes,
        low_latency_mode=True,
        num_qps_per_rank=max(Buffer.num_sms, num_experts // process_group.size()),
        allow_mnnvl=True,
        use_fabric=True,
    )
    assert buffer.group_size == num_ranks and buffer.low_latency_mode
    from_json = """{"num_sms": 24, "num_max_nvl_chunked_send_tokens": 8, "num_max_nvl_chunked_recv_tokens": 288,
        "num_max_rdma_chunked_send_tokens": 8, "num_max_rdma_chunked_recv_tokens": 128}"""
    normal_config = deep_ep.Config(**json.loads(from_json))
    case = make_case([7, 0, 5, 12][:num_ranks], num_experts=num_experts, hidden=hidden)
    topk_ids, topk_weights = case.idx[rank], case.weights[rank]
    for _ in range(2):
        # dispatch_a, dispatch_b: normal
        x = cast_to_fp8(case.xs[rank])
        previous_event = Buffer.capture()
        per_rank, per_rdma_rank, per_expert, in_rank, previous_event = buffer.get_dispatch_layout(
            topk_ids,
            num_experts,
            previous_event=previous_event,
            async_finish=True,
            allocate_on_comm_stream=previous_event is not None,
        )
        recv_x, _recv_ids, _recv_weights, counts, handle, event = buffer.dispatch(
            x,
            topk_idx=topk_ids,
            topk_weights=topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=previous_event,
            async_finish=True,
            allocate_on_comm_stream=(previous_event is not None) and True,
            expert_alignment=128,
            config=normal_config,
        )
        event.current_stream_wait()
        assert all(count % 128 == 0 for count in counts)
        rows = cast_from_fp8(*recv_x)
        previous_event = Buffer.capture()
        got, _, event = buffer.combine(
            rows,
            handle,
            async_finish=True,
            previous_event=previous_event,
            allocate_on_comm_stream=previous_event is not None,
            config=normal_config,
        )
        event.current_stream_wait()
        back = make_case([7, 0, 5, 12][:num_ranks], num_experts=num_experts, hidden=hidden)
        back.xs = [cast_from_fp8(*cast_to_fp8(t)) for t in back.xs]
        want = dispatched(back)
        assert same(got, combined(want.x, want.bookkeeping, rank, node_of).bfloat16())
        # to low latency
        buffer.clean_low_latency_buffer(max_tokens, hidden, num_experts)
        for return_recv_hook in (True, False):
            packed, _masked_m, handle, event, hook = buffer.low_latency_dispatch(
                case.xs[rank],
                topk_ids,
                max_tokens,
                num_experts,
                use_fp8=True,
                async_finish=not return_recv_hook,
                return_recv_hook=return_recv_hook,
                round_scale=True,
                use_ue8m0=True,
            )
            hook() if return_recv_hook else event.current_stream_wait()
            rows = cast_from_fp8(*packed)
            got, event, hook = buffer.low_latency_combine(
                x=rows,
                topk_idx=topk_ids,
                topk_weights=topk_weights,
                handle=handle,
                async_finish=not return_recv_hook,
                return_recv_hook=return_recv_hook,
            )
            hook() if return_recv_hook else event.current_stream_wait()
            sent = cast_from_fp8(*cast_to_fp8(case.xs[rank], round_scale=True))
            assert same(got, unchanged(sent, topk_ids, topk_weights))


def test_sglang(world):
    world(check_sglang)


# --- others --------------------------------------------------------------------------------------


def check_others(rank, group, num_ranks, store, node_of):
    process_group = open_gloo(rank, num_ranks, store)
    case = make_case([7, 0, 5, 12][:num_ranks], num_experts=2 * num_ranks)
    want = dispatched(case)
    total = combined(want.x, want.bookkeeping, rank, node_of).bfloat16()
    # NeMo Automodel: explicitly_destroy by keyword, is_sm90_compiled, destroy.
    buffer = Buffer(process_group, 1 << 20, 0, explicitly_destroy=True)
    assert Buffer.is_sm90_compiled()
    # prime-rl: everything by keyword, the cached call with each layout argument as None.
    layout = buffer.get_dispatch_layout(topk_idx=case.idx[rank], num_experts=case.num_experts)
    narrow = buffer.get_dispatch_layout(case.idx[rank].int(), case.num_experts)
    assert all((a is None and b is None) or same(a, b) for a, b in zip(layout[:4], narrow[:4]))
    names = (
        "num_tokens_per_rank",
        "num_tokens_per_rdma_rank",
        "num_tokens_per_expert",
        "is_token_in_rank",
    )
    given = dict(zip(names, layout[:4], strict=True))
    x, *_, handle, _ = buffer.dispatch(
        x=case.xs[rank], topk_idx=case.idx[rank], topk_weights=case.weights[rank], **given
    )
    again, idx, weights, counts, no_handle, event = buffer.dispatch(
        x=case.xs[rank],
        handle=handle,
        topk_idx=None,
        topk_weights=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        previous_event=None,
        async_finish=True,
        allocate_on_comm_stream=False,
    )
    assert same(again, x) and (idx, weights, counts, no_handle) == (None,) * 4
    # xtuner: an empty EventOverlap whose event is set from another; events of either kind anywhere.
    mine = EventOverlap(None)
    mine.event = event.event
    for previous in (mine, event.event, EventOverlap(None), moe_comm.Event(), None):
        got, _, _ = buffer.combine(x, handle, previous_event=previous)
        assert same(got, total)
    # As the old names of the paths between nodes.
    x, *_, handle, _ = buffer.internode_dispatch(
        case.xs[rank], topk_idx=case.idx[rank], topk_weights=case.weights[rank], **given
    )
    assert same(buffer.internode_combine(x, handle)[0], total)
    buffer.get_comm_stream().synchronize()
    # LightLLM: the memory as a workspace; lmdeploy: one buffer for both modes.
    workspace = buffer.get_local_buffer_tensor(torch.uint8)
    assert workspace.dtype == torch.uint8 and workspace.shape == (1 << 20,)
    assert not workspace.any()
    workspace.fill_(7)
    view = buffer.get_local_buffer_tensor(torch.bfloat16, torch.Size([3, 5]), 4)
    assert view.shape == (3, 5) and view.data_ptr() == workspace.data_ptr() + 8
    with pytest.raises(moe_comm.ArgumentError, match="size: expected"):
        buffer.get_local_buffer_tensor(torch.int8, torch.Size([1 << 21]))
    assert buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True).numel() == 0
    assert same(buffer.internode_combine(x, handle)[0], total)  # scratch is no window
    buffer.destroy()
    # lmdeploy: one buffer for both modes, use_fp8 in the fifth place.
    buffer = Buffer(
        group=process_group, num_nvl_bytes=128, num_rdma_bytes=128, low_latency_mode=True, num_qps_per_rank=2
    )  # fmt: skip
    assert (buffer.group_size, buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (num_ranks, 128, 128)
    for use_fp8 in (True, False):
        packed, *_, hook = buffer.low_latency_dispatch(
            case.xs[rank], case.idx[rank], 16, case.num_experts, use_fp8, async_finish=False, return_recv_hook=True
        )  # fmt: skip
        hook()
        assert isinstance(packed, tuple) == use_fp8
    # All eleven in the order of the last first generation; ints for bools.
    buffer = Buffer(process_group, 128, 0, 0, 24, 1, 0, 0, 1, 0, None)
    assert buffer.explicitly_destroy is True and buffer.enable_shrink is False
    buffer.destroy()
    buffer = Buffer(process_group, 128, 0, False, 24, True, False, True, False, None)
    assert buffer.explicitly_destroy is True
    assert Buffer(process_group, enable_shrink=True).enable_shrink is True
    with pytest.raises(ValueError, match="Either 'group' or 'comm' must be provided"):
        Buffer(None)
    with pytest.raises(moe_comm.ArgumentError, match="num_nvl_bytes: expected"):
        Buffer(process_group, -1)


def test_others(world):
    world(check_others)


def check_dropped(rank, group, num_ranks, store, node_of):
    """Dropping the last reference releases it: threads and windows of 12 buffers would be noticed."""
    process_group = open_gloo(rank, num_ranks, store)
    case = make_case([7, 0, 5, 12][:num_ranks], num_experts=2 * num_ranks)
    seen = []
    for _ in range(3):
        buffer = Buffer(process_group, low_latency_mode=True)
        buffer.low_latency_dispatch(case.xs[rank], case.idx[rank], 16, case.num_experts)
        seen.append((weakref.ref(buffer), weakref.ref(buffer.runtime)))
    del buffer
    gc.collect()
    assert all(ref() is None for pair in seen for ref in pair)


def test_dropped_buffers_are_released(world):
    world(check_dropped)


MPI_RANK = """
    import torch
    from mpi4py import MPI
    import moe_comm
    from moe_comm import deep_ep

    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    idx = torch.tensor([[rank, (rank + 1) % size]] * 3)
    x = torch.full((3, 64), float(rank + 1)).bfloat16()
    forms = [
        lambda: deep_ep.Buffer(None, 128, 0, comm=comm),
        lambda: deep_ep.Buffer(None, 128, 0, False, 24, True, False, False, comm),  # v1.2.1
        lambda: deep_ep.Buffer(None, 128, 0, True, 24, True, False, False, True, False, comm),  # the last v1
        lambda: deep_ep.Buffer(None, 128, 0, True, 24, True, False, True, False, comm),  # v2
    ]
    handle = None
    for i, form in enumerate(forms):
        buffer = form()
        assert (buffer.rank, buffer.group_size, buffer.group) == (rank, size, None)
        assert buffer.explicitly_destroy == (i >= 2)
        if handle is not None:  # of the buffer before
            got, _, _ = buffer.combine(recv, handle)
            assert torch.equal(got, 2 * x), got
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, size)
        recv, *_, handle, _ = buffer.dispatch(
            x, None, per_rank, per_node, in_rank, per_expert, idx, torch.ones(3, 2)
        )
        assert recv.shape == (6, 64)
    packed, count, low_latency, _, _ = buffer.low_latency_dispatch(x, idx, 4, size, use_fp8=False)
    got, _, _ = buffer.low_latency_combine(packed, idx, torch.ones(3, 2), low_latency)
    assert torch.equal(got, 2 * x)
    buffer.destroy()
    try:
        moe_comm.EPGroup.from_mpi(3)
    except moe_comm.ArgumentError as error:
        assert "comm: expected an mpi4py communicator" in str(error)
    print("done")
"""


def test_mpi4py(tmp_path):
    pytest.importorskip("mpi4py", reason="needs mpi4py and an MPI (pip install mpi4py mpich)")
    beside = shutil.which("mpiexec", path=str(sys.prefix) + "/bin")
    mpiexec = beside or shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("needs mpiexec (pip install mpich)")
    program = tmp_path / "rank.py"
    program.write_text(textwrap.dedent(MPI_RANK))
    done = subprocess.run(
        [mpiexec, "-n", "2", sys.executable, str(program)], capture_output=True, text=True, timeout=100
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done") == 2
