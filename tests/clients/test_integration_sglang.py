"""sglang 0.5.23's own dispatchers (DeepEPDispatcher, DeepEPv2Dispatcher) over moe_comm, found by its plug-in.

    pip install --no-deps --target build/sglang-0.5.23 sglang==0.5.23

Its files that talk to deep_ep are run as they are, with the little of sglang they need; the rest of sglang, which wants
CUDA and a hundred packages, is replaced in the rank processes of this test by modules of constants.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deep_ep_oracle import combined, dispatched, make_case, open_gloo, same
from pretend import Pretended

from moe_comm import reference
from moe_comm.deep_ep.quant import cast_from_fp8, cast_to_fp8, pack_ue8m0

SGLANG = Path(__file__).parents[2] / "build/sglang-0.5.23"
if not SGLANG.exists():
    pytest.skip(f"needs sglang 0.5.23 in {SGLANG} (pip, --no-deps)", allow_module_level=True)

MOE = "sglang.srt.layers.moe"
REAL = {
    "sglang.srt.environ",
    f"{MOE}.utils",
    f"{MOE}.token_dispatcher.base",
    f"{MOE}.token_dispatcher.deepep",
    f"{MOE}.token_dispatcher.deepep_v2",
}
TOKENS, HIDDEN, TOPK, EXPERTS = [7, 0, 5, 12], 512, 3, 8
state = SimpleNamespace(prefill=True, output="fp8", config="", recorded=[])


def quantized(x, group, column_major_scales, scale_tma_aligned, scale_ue8m0):
    """sglang's kernel: FP8 rows and their scales, fp32 or packed UE8M0, these column by column."""
    assert group == 128 and column_major_scales == scale_tma_aligned == scale_ue8m0
    rows, scales = cast_to_fp8(x, round_scale=scale_ue8m0)
    if scale_ue8m0:
        scales = pack_ue8m0(scales).t().contiguous().t()
    return rows, scales


def constants(ue8m0):
    """{module: its names}: a Hopper or (ue8m0) a Blackwell machine, one process group, no other features."""
    moe = SimpleNamespace(deepep_v2_mode="direct", tbo_enabled=False)
    parallel = SimpleNamespace(attn_dp_size=2, attn_cp_size=1, tp_size=1, tp_group=None)
    resources = SimpleNamespace(buffers={})

    def recorded(counts, **layout):
        state.recorded.append((counts, layout))

    recorder = SimpleNamespace(
        on_deepep_dispatch_normal=recorded, on_deepep_dispatch_low_latency=recorded
    )

    def execution():
        moe.deepep_dispatcher_output_dtype = state.output
        moe.deepep_config = state.config
        return SimpleNamespace(moe=moe)

    def no(*_):
        return False

    utils = {
        "get_bool_env_var": no, "get_cuda_version": lambda: (13, 0), "is_blackwell": lambda: ue8m0,
        "is_flashinfer_available": no, "is_hip": no, "is_npu": no, "is_cuda": no, "load_json_config": json.loads,
    }  # fmt: skip
    return {
        "sglang.srt.utils": utils,
        "sglang.srt.utils.common": {"log_info_on_rank0": no},
        "sglang.srt.eplb.expert_distribution": {
            "get_global_expert_distribution_recorder": lambda: recorder
        },
        "sglang.srt.layers.deep_gemm_wrapper": {
            "ENABLE_JIT_DEEPGEMM": True,
            "DEEPGEMM_BLACKWELL": ue8m0,
            "DEEPGEMM_SCALE_UE8M0": ue8m0,
            "DEEPGEMM_NEED_TMA_ALIGNED_SCALES": ue8m0,
        },
        "sglang.srt.layers.dp_attention": {"get_is_extend_in_batch": lambda: state.prefill},
        f"{MOE}.topk": {"TopKOutput": object},
        "sglang.srt.runtime_context": {
            "get_parallel": lambda: parallel,
            "get_resources": lambda: resources,
            "get_exec": execution,
            "get_flags": execution,
            "get_server_args": lambda: True,
        },
        "sglang.kernels.ops.quantization.fp8_kernel": {
            "sglang_per_token_group_quant_fp8": quantized
        },
    }


def unchanged(rows, topk_ids, weights):
    """What experts that change nothing give: float32 fused multiply-add in top-k order."""
    total = torch.zeros(rows.shape)
    for k in range(topk_ids.shape[1]):
        more = total.double() + rows.double() * weights[:, k : k + 1].double()
        total = torch.where(topk_ids[:, k : k + 1] < 0, total, more.float())
    return total.to(rows.dtype)


def received(hidden, scales):
    return hidden if scales is None else cast_from_fp8(hidden, scales)


def as_sent(x, fp8, round_scale):
    return cast_from_fp8(*cast_to_fp8(x, round_scale=round_scale)) if fp8 else x


def check_v1(rank, group, num_ranks, node_of, ue8m0, return_recv_hook, async_finish):
    """One dispatcher for prefill (normal) and decode (low latency), which take turns."""
    from sglang.srt.layers.moe.token_dispatcher import deepep
    from sglang.srt.layers.moe.utils import DeepEPMode

    assert deepep.use_deepep, deepep._deepep_import_error
    fp8 = state.output == "fp8"
    dispatcher = deepep.DeepEPDispatcher(
        group=group, router_topk=TOPK, permute_fusion=True, num_experts=EXPERTS, num_local_experts=EXPERTS // num_ranks,
        hidden_size=HIDDEN, params_dtype=torch.bfloat16, deepep_mode=DeepEPMode.AUTO, async_finish=async_finish,
        return_recv_hook=return_recv_hook,
    )  # fmt: skip
    for seed, prefill in enumerate((True, False, False, True, False)):
        state.prefill = prefill
        case = make_case(TOKENS[:num_ranks], seed=seed, hidden=HIDDEN, num_experts=EXPERTS)
        x, topk = (
            case.xs[rank],
            SimpleNamespace(topk_ids=case.idx[rank].int(), topk_weights=case.weights[rank]),
        )
        case.xs = [as_sent(t, fp8, ue8m0) for t in case.xs]
        want = dispatched(case)
        got = dispatcher.dispatch(x, topk)
        rows = received(got.hidden_states, got.hidden_states_scale)
        counts, layout = state.recorded.pop()
        if prefill:
            kind = deepep.DeepEPNormalCombineInput
            assert same(rows, want.x[rank]) and same(got.topk_ids, want.topk_idx[rank])
            exact = want.tokens_per_expert[rank].tolist()
            assert got.num_recv_tokens_per_expert == [-(-n // 128) * 128 for n in exact] == counts
            mine = case.idx[rank]
            here = (mine >= 0) & (mine // case.experts_per_rank == rank)
            assert int(layout["num_tokens_per_rank"][rank]) == int(here.any(1).sum())
        else:
            kind = deepep.DeepEPLLCombineInput
            assert got.masked_m.tolist() == want.tokens_per_expert[rank].tolist()
            assert counts is got.masked_m
        back = dispatcher.combine(kind(rows, got.topk_ids, got.topk_weights))
        if prefill:
            assert same(back, combined(want.x, want.bookkeeping, rank, node_of).bfloat16())
        else:
            assert same(back, unchanged(case.xs[rank], case.idx[rank], case.weights[rank]))


def check_v2(rank, group, num_ranks, ue8m0, fp8):
    """Prefill in the expanded and the compact layout, decode in the expanded one without knowing counts."""
    from sglang.srt.layers.moe.token_dispatcher import deepep_v2

    assert deepep_v2.use_deepep_v2, deepep_v2._deepep_v2_import_error
    for expand in (True, False):
        os.environ["SGLANG_DEEPEP_V2_ENABLE_PREFILL_EXPAND"] = str(int(expand))
        dispatcher = deepep_v2.DeepEPv2Dispatcher(
            group=group, router_topk=TOPK, num_experts=EXPERTS, num_local_experts=EXPERTS // num_ranks,
            hidden_size=HIDDEN, params_dtype=torch.bfloat16, use_fp8_dispatch=fp8,
        )  # fmt: skip
        dispatcher.prebuild()
        for seed, prefill in enumerate((True, False, True)):
            state.prefill = prefill
            case = make_case(TOKENS[:num_ranks], seed=seed, hidden=HIDDEN, num_experts=EXPERTS)
            x, topk = (
                case.xs[rank],
                SimpleNamespace(topk_ids=case.idx[rank], topk_weights=case.weights[rank]),
            )
            case.xs = [as_sent(t, fp8, ue8m0) for t in case.xs]
            for r in range(num_ranks):  # what an idle rank sends in a prefill
                if prefill and not len(case.xs[r]):
                    case.xs[r] = as_sent(torch.zeros(1, HIDDEN).bfloat16(), fp8, ue8m0)
                    case.idx[r], case.weights[r] = torch.arange(TOPK)[None], torch.zeros(1, TOPK)
            got = dispatcher.dispatch(x, topk)
            assert got.is_expanded == (expand or not prefill)
            how = ("expert", 128) if got.is_expanded else ("rank", 1)
            want = reference.dispatch(case.xs, case.idx, case.weights, EXPERTS, *how)
            rows = received(got.hidden_states, got.hidden_states_scale)
            counts = want.tokens_per_expert[rank].tolist()
            aligned = [-(-n // 128) * 128 for n in counts]
            for i, psum in enumerate(got.psum_num_recv_tokens_per_expert.tolist()):
                assert psum == sum(aligned[:i]) + (counts[i] if got.is_expanded else aligned[i])
                if got.is_expanded:
                    mine = slice(sum(aligned[:i]), psum)
                    assert same(rows[mine], want.x[rank][mine])
            if not got.is_expanded:
                assert same(rows, want.x[rank]) and same(got.topk_ids, want.topk_idx[rank])
            combine_input = deepep_v2.DeepEPv2CombineInput(rows, got.topk_weights)
            back = dispatcher.combine(combine_input)
            ys = reference.combine_by_lane(want.x, want.bookkeeping, case.idx, EXPERTS)
            assert same(back, ys[rank][: len(x)])
        deepep_v2.DeepEPv2Buffer.destroy()


def run_sglang(rank, group, num_ranks, store, node_of, ue8m0):
    process_group = open_gloo(rank, num_ranks, store)
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    Pretended("sglang", SGLANG, REAL, constants(ue8m0)).install()
    os.environ["MOE_COMM_AS_DEEP_EP"] = "1"
    from moe_comm.integrations.sglang import install

    install()
    numbers = {
        "num_sms": 24, "num_max_nvl_chunked_send_tokens": 8, "num_max_nvl_chunked_recv_tokens": 288,
        "num_max_rdma_chunked_send_tokens": 8, "num_max_rdma_chunked_recv_tokens": 128,
    }  # fmt: skip
    with torch.inference_mode():
        for output, hook, asynchronous in (("fp8", True, True), ("bf16", False, False)):
            state.output = output
            state.config = json.dumps({"normal_dispatch": numbers, "normal_combine": numbers})
            check_v1(rank, process_group, num_ranks, node_of, ue8m0, hook, asynchronous)
            check_v2(rank, process_group, num_ranks, ue8m0, output == "fp8")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("num_ranks, ranks_per_node, ue8m0", [(2, 0, True), (4, 2, False)])
def test_sglang(run_ranks, tmp_path, monkeypatch, num_ranks, ranks_per_node, ue8m0):
    if ranks_per_node:
        monkeypatch.setenv("MOE_COMM_RANKS_PER_NODE", str(ranks_per_node))
    node_of = [r // (ranks_per_node or num_ranks) for r in range(num_ranks)]
    store = str(tmp_path / "gloo")
    run_ranks(run_sglang, num_ranks, num_ranks, store, node_of, ue8m0, timeout_s=180)
