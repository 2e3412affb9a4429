"""Names and signatures of DeepEP's second generation and of hybrid-ep; one process."""

import importlib
import inspect

import pytest

from moe_comm import deep_ep

# Written down by hand: "name" without default, "name=default" with one; after "*" by keyword only.
EVENTS = (
    "num_sms=0 num_qps=0 previous_event=None previous_event_before_epilogue=None "
    "async_with_compute_stream=False allocate_on_comm_stream=False"
)
SIGNATURES = {
    "ElasticBuffer": "group num_bytes=None num_cpu_bytes=0 num_max_tokens_per_rank=0 hidden=0 num_topk=0 "
    "use_fp8_dispatch=False deterministic=False allow_hybrid_mode=True allow_multiple_reduction=True "
    "prefer_overlap_with_compute=True sl_idx=3 num_allocated_qps=0 num_cpu_timeout_secs=300 "
    "num_gpu_timeout_secs=100 explicitly_destroy=False",
    "ElasticBuffer.destroy": "self",
    "ElasticBuffer.get_buffer_size_hint": "group num_max_tokens_per_rank hidden num_topk=0 use_fp8_dispatch=False "
    "allow_hybrid_mode=True allow_multiple_reduction=True",
    "ElasticBuffer.barrier": "self use_comm_stream=True with_cpu_sync=False sequential=True",
    "ElasticBuffer.capture": "",
    "ElasticBuffer.get_comm_stream": "self",
    "ElasticBuffer.get_physical_domain_size": "self",
    "ElasticBuffer.get_logical_domain_size": "self",
    "ElasticBuffer.get_theoretical_num_sms": "self num_experts num_topk num_scaleout_topk=0 rdma_gbs=0 nvlink_gbs=0 "
    "sm_read_gbs=200 sm_write_gbs=50",
    "ElasticBuffer.get_theoretical_num_qps": "self num_sms",
    "ElasticBuffer.dispatch": "self x topk_idx=None topk_weights=None cumulative_local_expert_recv_stats=None "
    "num_experts=None num_max_tokens_per_rank=None expert_alignment=None "
    + EVENTS
    + " handle=None do_handle_copy=True do_cpu_sync=None do_expand=False do_zero_padding=False "
    "use_tma_aligned_col_major_sf=False",
    "ElasticBuffer.combine": f"self x handle topk_weights=None bias=None {EVENTS}",
    "get_physical_domain_size": "group",
    "get_logical_domain_size": "group allow_hybrid_mode=True",
    "HybridEPBuffer": "group hidden_dim max_num_of_tokens_per_rank num_local_experts use_fp8=False "
    "num_sms_dispatch_api=None num_sms_combine_api=None num_sms_preprocessing_api=None num_blocks_permute=None "
    "num_blocks_unpermute=None load_cached_kernels=False use_shared_buffer=True enable_custom_allgather=False "
    "num_of_hybrid_ep_ranks_per_nvlink_domain=None use_mnnvl=None",
    "HybridEPBuffer.empty_jit_cache": "self",
    "HybridEPBuffer.update_template_config": "self hidden_dim=None num_of_tokens_per_rank=None num_local_experts=None "
    "pad_multiple=None use_fp8=None fuse_permute_dispatch=False **kwargs",
    "HybridEPBuffer.dispatch": "self hidden scaling_factor=None topk_idx=None topk_weights=None num_of_experts=None "
    "probs=None routing_map=None num_dispatched_tokens_tensor=None num_dispatched_tokens=None handle=None",
    "HybridEPBuffer.combine": "self hidden probs=None handle=None",
    "HybridEPBuffer.dispatch_with_permute": "self * hidden topk_idx=None topk_weights=None "
    "num_of_experts_per_rank=None num_of_experts=None use_fp8=None routing_map=None probs=None scaling_factor=None "
    "num_permuted_tokens=None pad_multiple=None handle=None non_blocking=False fuse_permute_dispatch=False "
    "num_dispatched_tokens=None use_host_meta=None",
    "HybridEPBuffer.combine_with_unpermute": "self * hidden probs=None handle=None pad_multiple=None "
    "fuse_unpermute_combine=False num_dispatched_tokens=None",
    "hybrid_ep_buffer.indices_to_map": "topk_idx topk_weights num_of_tokens num_of_experts",
}
HANDLE = (
    "do_expand num_experts expert_alignment num_max_tokens_per_rank num_sms topk_idx "
    "num_recv_tokens_per_expert_list psum_num_recv_tokens_per_scaleup_rank psum_num_recv_tokens_per_expert "
    "num_unaligned_recv_tokens_per_expert recv_src_metadata dst_buffer_slot_idx token_metadata_at_forward "
    "channel_linked_list num_recv_tokens num_expanded_tokens"
)


def spelled(function):
    out, named = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not named:
            named = True
            out.append("*")
        if p.kind is p.VAR_KEYWORD:
            out.append("**" + p.name)
        else:
            out.append(p.name if p.default is p.empty else f"{p.name}={p.default}")
    return out


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    found = deep_ep
    for part in name.split("."):
        found = getattr(found, part)
    assert spelled(found) == SIGNATURES[name].split()


def test_handle():
    public = [n for n in inspect.signature(deep_ep.EPHandle).parameters if not n.startswith("_")]
    assert sorted(public) == sorted(HANDLE.split())


def test_methods_of_the_class_need_no_instance():
    for name in ("get_buffer_size_hint", "capture"):
        assert isinstance(inspect.getattr_static(deep_ep.ElasticBuffer, name), staticmethod)


def test_nothing_else_is_offered():
    """A name advertises what it does: clients ask by hasattr."""
    offered = {n for n in vars(deep_ep.ElasticBuffer) if not n.startswith("_")}
    assert offered == {n.split(".")[1] for n in SIGNATURES if n.startswith("ElasticBuffer.")}
    offered = {n for n in vars(deep_ep.HybridEPBuffer) if not n.startswith("_")}
    assert offered == {n.split(".")[1] for n in SIGNATURES if n.startswith("HybridEPBuffer.")}


def test_where_clients_look():
    for module, name in (
        ("moe_comm.deep_ep", "ElasticBuffer"),
        ("moe_comm.deep_ep", "EPHandle"),
        ("moe_comm.deep_ep", "HybridEPBuffer"),
        ("moe_comm.deep_ep.buffers.elastic", "ElasticBuffer"),
        ("moe_comm.deep_ep.buffers.elastic", "EPHandle"),
        ("moe_comm.deep_ep.hybrid_ep_buffer", "HybridEPBuffer"),
        ("moe_comm.deep_ep._C", "Config"),
    ):
        assert getattr(importlib.import_module(module), name) is getattr(deep_ep, name)
