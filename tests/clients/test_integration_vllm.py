"""vLLM 0.33.0's own managers and prepare/finalize steps (high throughput, low latency, v2) over moe_comm.

Its files that talk to deep_ep are run as they are, with the little of vLLM they need; the rest of it, which wants CUDA
and a hundred packages, is replaced in the rank processes of this test by modules of constants.
"""

import enum
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deep_ep_oracle import combined, dispatched, make_case, open_gloo, same
from pretend import Pretended

from moe_comm import reference
from moe_comm.deep_ep.quant import cast_from_fp8, cast_to_fp8

VLLM = Path(__file__).parents[2] / "build/vllm-0.33.0"
if not VLLM.exists():
    pytest.skip(f"needs the source of vLLM 0.33.0 in {VLLM}", allow_module_level=True)

MOE = "vllm.model_executor.layers.fused_moe"
REAL = {
    "vllm.envs",
    "vllm.utils.import_utils",
    "vllm.utils.math_utils",
    "vllm.distributed.device_communicators.all2all",
    "vllm.distributed.device_communicators.base_device_communicator",
    f"{MOE}.topk_weight_and_reduce",
    f"{MOE}.prepare_finalize.deepep_ht",
    f"{MOE}.prepare_finalize.deepep_ll",
    f"{MOE}.prepare_finalize.deepep_v2",
}
TOKENS, TOPK, EXPERTS = [7, 0, 5, 12], 3, 8
state = SimpleNamespace(ubatch=0, internode=False, fault_tolerance=False)


class ExpertTokensMetadata:
    def __init__(self, expert_num_tokens, expert_num_tokens_cpu):
        self.expert_num_tokens, self.expert_num_tokens_cpu = (
            expert_num_tokens,
            expert_num_tokens_cpu,
        )

    @staticmethod
    def make_from_list(counts, device):
        made = torch.tensor(counts, dtype=torch.int32, device=device)
        return ExpertTokensMetadata(made, made)


def quantized(x, scale, quant_dtype=None, per_act_token_quant=False, block_shape=None, **_):
    if quant_dtype is None:
        return x, None
    assert scale is None and quant_dtype == torch.float8_e4m3fn and block_shape == [128, 128]
    return cast_to_fp8(x)


def constants(num_ranks):
    def nothing(*_, **__):
        return None

    def no(*_, **__):
        return False

    logger = SimpleNamespace(
        debug=nothing, debug_once=nothing, info_once=nothing, warning_once=nothing
    )
    group = SimpleNamespace(rank_in_group=0, world_size=1)
    kernel = {
        "FusedMoEPrepareAndFinalizeModular": object, "FusedMoEExperts": object, "TopKWeightAndReduce": object,
        "PrepareResultType": object, "ReceiverType": object, "ExpertTokensMetadata": ExpertTokensMetadata,
        "FusedMoEActivationFormat": enum.Enum("FusedMoEActivationFormat", "Standard BatchedExperts"),
    }  # fmt: skip
    ubatching = {
        "dbo_current_ubatch_id": lambda: state.ubatch, "dbo_enabled": no, "dbo_get_previous_event": nothing,
        "dbo_switch_to_comm": nothing, "dbo_switch_to_compute": nothing, "dbo_switch_to_compute_sync": nothing,
        "dbo_yield_and_switch_from_comm_to_compute": nothing, "dbo_maybe_run_recv_hook": nothing,
        "dbo_yield_and_switch_from_compute_to_comm": nothing,
    }  # fmt: skip
    counts = SimpleNamespace(num_tokens_across_dp_cpu=torch.tensor(TOKENS[:num_ranks]))
    quantization = "vllm.model_executor.layers.quantization.utils.mxfp8_utils"
    return {
        f"{MOE}.modular_kernel": kernel,
        f"{MOE}.config": {"FusedMoEQuantConfig": object},
        f"{MOE}.utils": {"moe_kernel_quantize_input": quantized},
        quantization: {"MXFP8_BLOCK_SIZE": 32},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_rocm=no)},
        "vllm.v1.worker.ubatching": ubatching,
        "vllm.logger": {"init_logger": lambda _: logger},
        "vllm.forward_context": {
            "get_forward_context": lambda: SimpleNamespace(dp_metadata=counts)
        },
        "vllm.triton_utils": {
            "triton": SimpleNamespace(jit=lambda f: f),
            "tl": SimpleNamespace(constexpr=int),
        },
        "vllm.config": {
            "get_current_vllm_config": lambda: SimpleNamespace(
                parallel_config=SimpleNamespace(enable_fault_tolerance=state.fault_tolerance)
            )
        },
        "vllm.distributed.parallel_state": {
            "get_dp_group": lambda: group,
            "get_tp_group": lambda: group,
            "in_the_same_node_as": lambda *_, **__: [not state.internode],
        },
    }


def quant_config(block):
    return SimpleNamespace(
        is_block_quantized=block, quant_dtype=torch.float8_e4m3fn if block else None, a1_scale=None, a1_gscale=None,
        a2_scale=None, per_act_token_quant=False, block_shape=[128, 128] if block else None,
        is_scale_swizzled=False, mx_alignment=0,
    )  # fmt: skip


def as_sent(case, fp8, round_scale=False):
    if fp8:
        case.xs = [cast_from_fp8(*cast_to_fp8(x, round_scale=round_scale)) for x in case.xs]
    return case


def prepared(step, x, case, rank, config):
    """(result of prepare): through prepare_async where it gives a hook, as the modular kernel does."""
    return step.prepare(x, case.weights[rank], case.idx[rank], EXPERTS, None, False, config)


def finished(step, rows, case, rank, reduce, asynchronous):
    """What finalize writes to the layer's output."""
    output = torch.full((len(case.idx[rank]), rows.shape[-1]), torch.nan, dtype=torch.bfloat16)
    arguments = (output, rows, case.weights[rank], case.idx[rank], False, reduce)
    if asynchronous:
        done = step.finalize_async(*arguments)
        for function in done if isinstance(done, tuple) else (done,):
            function()
    else:
        step.finalize(*arguments)
    return output


def two_batches(rank, num_ranks, step, reduce, hidden, fp8, round_scale, check):
    """Two micro-batches in flight, each with its handle; finalized in either order, at once or later."""
    for order, asynchronous in (((0, 1), True), ((1, 0), False)):
        cases, received = [], []
        for state.ubatch in range(2):
            case = make_case(
                TOKENS[:num_ranks], seed=state.ubatch, hidden=hidden, topk=TOPK, num_experts=EXPERTS
            )
            x = case.xs[rank]
            got = prepared(step, x, case, rank, quant_config(fp8))
            cases.append(as_sent(case, fp8, round_scale))
            received.append(check(case, got))
        for state.ubatch in order:
            case, (rows, want) = cases[state.ubatch], received[state.ubatch]
            assert same(finished(step, rows, case, rank, reduce, asynchronous), want)


def check_high_throughput(rank, group, num_ranks, node_of, fp8):
    from vllm.distributed.device_communicators.all2all import DeepEPHTAll2AllManager
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ht import (
        DeepEPHTPrepareAndFinalize,
    )
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    manager = DeepEPHTAll2AllManager(group)
    buffer = manager.get_handle({})
    assert manager.get_handle({}) is buffer
    manager.set_num_sms(24)
    local = EXPERTS // num_ranks
    step = DeepEPHTPrepareAndFinalize(buffer, num_ranks, num_ranks, rank * local)

    def check(case, got):
        rows, scales, meta, ids, weights = got
        rows = cast_from_fp8(rows, scales) if fp8 else rows
        want = dispatched(case)
        assert same(rows, want.x[rank]) and same(weights, want.topk_weights[rank])
        assert meta.expert_num_tokens.tolist() == want.tokens_per_expert[rank].tolist()
        mine = want.topk_idx[rank] >= 0
        assert same(ids[mine], want.topk_idx[rank][mine] + rank * local)
        assert not (ids[~mine] // local == rank).any()
        return rows, combined(want.x, want.bookkeeping, rank, node_of).bfloat16()

    two_batches(rank, num_ranks, step, TopKWeightAndReduceNoOP(), 512, fp8, False, check)
    manager.destroy()


def unchanged(rows, topk_ids, weights):
    """What experts that change nothing give: float32 fused multiply-add in top-k order."""
    total = torch.zeros(rows.shape)
    for k in range(topk_ids.shape[1]):
        more = total.double() + rows.double() * weights[:, k : k + 1].double()
        total = torch.where(topk_ids[:, k : k + 1] < 0, total, more.float())
    return total.to(rows.dtype)


def check_low_latency(rank, group, num_ranks, fp8, ue8m0):
    from vllm.distributed.device_communicators.all2all import DeepEPLLAll2AllManager
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ll import (
        DeepEPLLPrepareAndFinalize,
    )
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
        TopKWeightAndReduceDelegate,
    )

    manager, local = DeepEPLLAll2AllManager(group), EXPERTS // num_ranks
    sizes = {
        "max_num_tokens_per_dp_rank": 16, "token_hidden_size": 2048, "num_ep_ranks": num_ranks,
        "num_global_experts": EXPERTS, "num_local_experts": local,
    }  # fmt: skip
    buffer = manager.get_handle(dict(sizes))
    assert manager.get_handle(dict(sizes)) is buffer
    step = DeepEPLLPrepareAndFinalize(buffer, 16, num_ranks, use_fp8_dispatch=fp8)
    step.post_init_setup(SimpleNamespace(supports_packed_ue8m0_act_scales=lambda: ue8m0))

    def check(case, got):
        rows, scales, meta, _, _ = got
        rows = cast_from_fp8(rows, scales) if fp8 else rows
        want = dispatched(case)
        assert meta.expert_num_tokens.tolist() == want.tokens_per_expert[rank].tolist()
        return rows, unchanged(case.xs[rank], case.idx[rank], case.weights[rank])

    def forward():
        two_batches(rank, num_ranks, step, TopKWeightAndReduceDelegate(), 2048, fp8, ue8m0, check)

    forward()
    if state.fault_tolerance:
        DeepEPLLAll2AllManager._mask = torch.zeros(num_ranks, dtype=torch.int32)  # it says "cuda"
        torch.accelerator.synchronize = lambda: None
        assert buffer.enable_shrink and not manager.query_fault()
        buffer.low_latency_update_mask_buffer((rank + 1) % num_ranks, True)
        assert manager.query_fault()
        assert manager.query_active_mask().nonzero().tolist() == [[(rank + 1) % num_ranks]]
        manager.clean_buffers()
        assert not manager.query_fault()
        forward()
    manager.destroy()


def check_v2(rank, group, num_ranks, decode, fp8):
    from vllm.distributed.device_communicators import all2all
    from vllm.model_executor.layers.fused_moe.prepare_finalize import deepep_v2
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    def globalized(idx, psum, offset, num_experts):  # a Triton kernel
        rows = torch.arange(len(idx))[:, None] < psum[-1]
        return torch.where(rows & (idx >= 0), idx + offset, -1)

    deepep_v2._globalize_recv_topk_idx = globalized
    all2all.has_deep_ep_v2 = lambda: True  # it asks for an NCCL
    manager, local = all2all.DeepEPV2All2AllManager(group, device_group=group), EXPERTS // num_ranks
    manager._gin_checked = True
    sizes = {
        "num_max_tokens_per_rank": 32,
        "hidden": 512,
        "num_topk": TOPK,
        "use_fp8_dispatch": fp8,
    }
    buffer = manager.get_handle({**sizes, "num_experts": EXPERTS})
    assert manager.get_handle({**sizes, "num_experts": EXPERTS}) is buffer
    assert manager.max_sms_used() > 0
    step = deepep_v2.DeepEPV2PrepareAndFinalize(
        buffer, num_ranks, num_ranks, rank * local, EXPERTS, TOPK, use_fp8_dispatch=fp8, use_cudagraph=decode
    )  # fmt: skip

    def check(case, got):
        rows, scales, meta, ids, weights = got
        rows = cast_from_fp8(rows, scales) if fp8 else rows
        how = "rank" if decode else "expert"
        want = reference.dispatch(case.xs, case.idx, case.weights, EXPERTS, how)
        num_rows = len(want.x[rank])
        expected = want.topk_idx[rank] if decode else want.topk_idx[rank][:, None]
        assert same(rows[:num_rows], want.x[rank])
        assert same(ids[:num_rows], torch.where(expected >= 0, expected + rank * local, -1))
        if decode:
            assert int(meta.psum_recv_per_rank[-1]) == num_rows and bool(
                (ids[num_rows:] == -1).all()
            )
            assert len(rows) == num_ranks * (
                8 if num_ranks == 2 else 16
            )  # a power of two >= any rank's
            assert same(weights[:num_rows], want.topk_weights[rank])
        else:
            assert meta.expert_num_tokens.tolist() == want.tokens_per_expert[rank].tolist()
            assert same(weights[:, 0], want.topk_weights[rank]) and len(rows) == num_rows
        ys = want.x
        total = reference.combine_by_lane(ys, want.bookkeeping, case.idx, EXPERTS)
        return rows, total[rank]

    two_batches(rank, num_ranks, step, TopKWeightAndReduceNoOP(), 512, fp8, False, check)
    manager.destroy()


def run_vllm(rank, group, num_ranks, store, node_of):
    process_group = open_gloo(rank, num_ranks, store)
    Pretended("vllm", VLLM, REAL, constants(num_ranks)).install()
    os.environ["MOE_COMM_AS_DEEP_EP"] = "1"
    from moe_comm.integrations.vllm import install

    install()
    with torch.inference_mode():
        for fp8 in (True, False):
            state.internode = fp8
            check_high_throughput(rank, process_group, num_ranks, node_of, fp8)
            check_low_latency(rank, process_group, num_ranks, fp8, False)
            check_v2(rank, process_group, num_ranks, False, fp8)
            check_v2(rank, process_group, num_ranks, True, fp8)
        check_low_latency(rank, process_group, num_ranks, True, True)
        state.fault_tolerance = True
        check_low_latency(rank, process_group, num_ranks, False, False)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("num_ranks, ranks_per_node", [(2, 0), (4, 2)])
def test_vllm(run_ranks, tmp_path, monkeypatch, num_ranks, ranks_per_node):
    if ranks_per_node:
        monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", str(ranks_per_node))
    node_of = [r // (ranks_per_node or num_ranks) for r in range(num_ranks)]
    store = str(tmp_path / "gloo")
    run_ranks(run_vllm, num_ranks, num_ranks, store, node_of, timeout_s=180)
