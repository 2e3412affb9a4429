"""DeepEP's public names and signatures, written down by hand, for all its generations.

A signature is "name" without default, "name=default" with one; behind "*" by keyword only. ATTRIBUTE: a value, module
or attribute of an instance. Generations: the release v1.2.1, the last commit before version 2, version 2 (2.1.0), and
the branch hybrid-ep, of which only what it adds is listed.
"""

ATTRIBUTE = "(attribute)"
GENERATIONS = ("v1.2.1", "v1-last", "v2", "hybrid-ep")

LAYOUT = "previous_event=None async_finish=False allocate_on_comm_stream=False"
DISPATCH = (
    "x handle=None num_tokens_per_rank=None num_tokens_per_rdma_rank=None is_token_in_rank=None "
    "num_tokens_per_expert=None topk_idx=None topk_weights=None expert_alignment=1"
)
COMBINE = f"x handle topk_weights=None bias=None config=None {LAYOUT}"
INIT = (
    "group num_nvl_bytes=0 num_rdma_bytes=0 low_latency_mode=False num_qps_per_rank=24 "
    "allow_nvlink_for_low_latency_mode=True allow_mnnvl=False"
)
EVENT = "event=None extra_tensors=None"
CONFIG = (
    "num_sms=20 num_max_nvl_chunked_send_tokens=6 num_max_nvl_chunked_recv_tokens=256 "
    "num_max_rdma_chunked_send_tokens=6 num_max_rdma_chunked_recv_tokens=256"
)
EVENTS = (
    "num_sms=0 num_qps=0 previous_event=None previous_event_before_epilogue=None "
    "async_with_compute_stream=False allocate_on_comm_stream=False"
)
ELASTIC = (
    "group num_bytes=None num_cpu_bytes=0 num_max_tokens_per_rank=0 hidden=0 num_topk=0 use_fp8_dispatch=False "
    "deterministic=False allow_hybrid_mode=True allow_multiple_reduction=True prefer_overlap_with_compute=True "
    "sl_idx=3 num_allocated_qps=0 num_cpu_timeout_secs=300 num_gpu_timeout_secs=100 explicitly_destroy=False"
)
HYBRID = (
    "group hidden_dim max_num_of_tokens_per_rank num_local_experts use_fp8=False num_sms_dispatch_api=None "
    "num_sms_combine_api=None num_sms_preprocessing_api=None num_blocks_permute=None num_blocks_unpermute=None "
    "load_cached_kernels=False use_shared_buffer=True enable_custom_allgather=False "
    "num_of_hybrid_ep_ranks_per_nvlink_domain=None use_mnnvl=None"
)


def attributes(owner, names, made):
    """Several attributes of one class."""
    return {f"{owner}.{name}": made for name in names.split()}


def v1(text=ATTRIBUTE):
    return {"v1.2.1": text, "v1-last": text}


def all_three(*texts):
    """One text, or one for each generation."""
    texts = texts or (ATTRIBUTE,)
    return dict(zip(GENERATIONS[:3], texts if len(texts) == 3 else texts * 3, strict=True))


def later(text=ATTRIBUTE):
    return {"v1-last": text, "v2": text}


def v2(text=ATTRIBUTE):
    return {"v2": text}


def hybrid(text=ATTRIBUTE):
    return {"hybrid-ep": text}


RECORD = {
    # --- the package
    "Buffer": all_three(
        f"{INIT} explicitly_destroy=False comm=None",
        f"{INIT} use_fabric=False explicitly_destroy=False enable_shrink=False comm=None",
        f"{INIT} explicitly_destroy=False enable_shrink=False comm=None",
    ),
    "ElasticBuffer": v2(ELASTIC),
    "EPHandle": v2(),
    "HybridEPBuffer": hybrid(HYBRID),
    "EventOverlap": all_three(EVENT),
    "EventHandle": v2(""),
    "Config": all_three(CONFIG),
    "topk_idx_t": later(),
    "get_physical_domain_size": v2("group"),
    "get_logical_domain_size": v2("group allow_hybrid_mode=True"),
    "__version__": v2(),
    "buffer": v1(),
    "buffer.Buffer": v1(),
    "buffers": v2(),
    "buffers.legacy": v2(),
    "buffers.legacy.Buffer": v2(),
    "buffers.elastic": v2(),
    "buffers.elastic.ElasticBuffer": v2(),
    "buffers.elastic.EPHandle": v2(),
    "hybrid_ep_buffer": hybrid(),
    "hybrid_ep_buffer.HybridEPBuffer": hybrid(),
    "hybrid_ep_buffer.indices_to_map": hybrid("topk_idx topk_weights num_of_tokens num_of_experts"),
    "utils": all_three(),
    "utils.EventHandle": all_three(),
    "utils.EventOverlap": v1(),
    "utils.check_nvlink_connections": v1("group"),
    "utils.event": v2(),
    "utils.event.EventHandle": v2(),
    "utils.event.EventOverlap": v2(),
    "utils.envs": v2(),
    "utils.envs.check_nvlink_connections": v2("group"),
    "utils.math": v2(),
    "utils.math.align": v2("a b"),
    "utils.math.ceil_div": v2("a b"),
    "utils.math.calc_diff": v2("x y"),
    "utils.math.per_token_cast_to_fp8": v2(),
    "utils.math.per_token_cast_back": v2(),
    "utils.testing": v2(),
    "utils.gate": v2(),
    "utils.refs": v2(),
    "utils.comm": v2(),
    "utils.semantic": v2(),
    "utils.find_pkgs": v2(),
    "find_cuda_home": v2(),
    "find_nccl_root": v2(),
    "check_nccl_so": v2(),
    "init_jit": v2(),
    "persistent_envs": v2(),
    # --- the C++ module: deep_ep_cpp in version 1
    "_C.Config": all_three(),
    "_C.EventHandle": all_three(),
    "_C.topk_idx_t": later(),
    "_C.Buffer": all_three(),
    "_C.ElasticBuffer": v2(),
    "_C.is_sm90_compiled": all_three(),
    "_C.get_low_latency_rdma_size_hint": all_three(),
    "_C.init_jit": v2(),
    "_C.create_cpu_handle": v2(),
    "_C.calculate_elastic_buffer_size": v2(),
    "_C.get_elastic_buffer_alignment": v2(),
    "_C.get_local_nccl_unique_id": v2(),
    "_C.create_nccl_comm": v2(),
    "_C.destroy_nccl_comm": v2(),
    "_C.get_physical_domain_size": v2(),
    "_C.get_logical_domain_size": v2(),
    # --- Buffer
    "Buffer.num_sms": all_three(),
    "Buffer.rank": all_three(),
    "Buffer.group": all_three(),
    "Buffer.group_size": all_three(),
    "Buffer.num_nvl_bytes": all_three(),
    "Buffer.num_rdma_bytes": all_three(),
    "Buffer.low_latency_mode": all_three(),
    "Buffer.explicitly_destroy": all_three(),
    "Buffer.enable_shrink": later(),
    "Buffer.runtime": all_three(),
    "Buffer.nvshmem_qp_depth": all_three(),
    "Buffer.destroy": all_three("self"),
    "Buffer.is_sm90_compiled": all_three(""),
    "Buffer.set_num_sms": all_three("new_num_sms"),
    "Buffer.capture": all_three(""),
    "Buffer.get_low_latency_rdma_size_hint": all_three(
        "num_max_dispatch_tokens_per_rank hidden num_ranks num_experts"
    ),
    "Buffer.get_dispatch_config": all_three("num_ranks"),
    "Buffer.get_combine_config": all_three("num_ranks"),
    "Buffer.get_comm_stream": all_three("self"),
    "Buffer.get_local_buffer_tensor": all_three(
        "self dtype size=None offset=0 use_rdma_buffer=False"
    ),
    "Buffer._unpack_bias": all_three("bias"),
    "Buffer.get_dispatch_layout": all_three(f"self topk_idx num_experts {LAYOUT}"),
    "Buffer.dispatch": all_three(f"self {DISPATCH} num_worst_tokens=0 config=None {LAYOUT}"),
    "Buffer.combine": all_three(f"self {COMBINE}"),
    "Buffer.internode_dispatch": all_three(
        f"self {DISPATCH} config=None {LAYOUT}",
        f"self {DISPATCH} num_worst_tokens=0 config=None {LAYOUT}",
        f"self {DISPATCH} config=None {LAYOUT}",
    ),
    "Buffer.internode_combine": all_three(f"self {COMBINE}"),
    "Buffer.low_latency_dispatch": all_three(
        "self x topk_idx num_max_dispatch_tokens_per_rank num_experts cumulative_local_expert_recv_stats=None "
        "dispatch_wait_recv_cost_stats=None use_fp8=True round_scale=False use_ue8m0=False async_finish=False "
        "return_recv_hook=False"
    ),
    "Buffer.low_latency_combine": all_three(
        "self x topk_idx topk_weights handle use_logfmt=False zero_copy=False async_finish=False "
        "return_recv_hook=False out=None combine_wait_recv_cost_stats=None"
    ),
    "Buffer.clean_low_latency_buffer": all_three(
        "self num_max_dispatch_tokens_per_rank hidden num_experts"
    ),
    "Buffer.get_next_low_latency_combine_buffer": all_three("self handle"),
    "Buffer.low_latency_update_mask_buffer": later("self rank_to_mask mask=False"),
    "Buffer.low_latency_query_mask_buffer": later("self mask_status"),
    "Buffer.low_latency_clean_mask_buffer": later("self"),
    # --- Config, events
    "Config.get_nvl_buffer_size_hint": all_three("self hidden_bytes num_ranks"),
    "Config.get_rdma_buffer_size_hint": all_three("self hidden_bytes num_ranks"),
    "EventHandle.current_stream_wait": all_three("self"),
    "EventOverlap.event": all_three(),
    "EventOverlap.extra_tensors": all_three(),
    "EventOverlap.hook_after_wait": v2(),
    "EventOverlap.current_stream_wait": all_three("self", "self", "self release_handle=False"),
    "EventOverlap.register_hook_after_wait": v2("self fn"),
    "EventOverlap.__call__": v2("self release_handle=False"),
    "EventOverlap.__enter__": all_three("self"),
    "EventOverlap.__exit__": all_three(),
    # --- ElasticBuffer
    **attributes(
        "ElasticBuffer",
        "group rank_idx num_ranks allow_hybrid_mode allow_multiple_reduction prefer_overlap_with_compute "
        "deterministic nccl_comm_handle num_bytes num_max_tokens_per_rank num_allocated_qps explicitly_destroy "
        "runtime num_scaleout_ranks num_scaleup_ranks scaleout_rank_idx scaleup_rank_idx num_rdma_ranks "
        "num_nvlink_ranks",
        v2(),
    ),
    "ElasticBuffer.destroy": v2("self"),
    "ElasticBuffer.get_buffer_size_hint": v2(
        "group num_max_tokens_per_rank hidden num_topk=0 use_fp8_dispatch=False allow_hybrid_mode=True "
        "allow_multiple_reduction=True"
    ),
    "ElasticBuffer.barrier": v2("self use_comm_stream=True with_cpu_sync=False sequential=True"),
    "ElasticBuffer.capture": v2(""),
    "ElasticBuffer.get_comm_stream": v2("self"),
    "ElasticBuffer.get_physical_domain_size": v2("self"),
    "ElasticBuffer.get_logical_domain_size": v2("self"),
    "ElasticBuffer.get_theoretical_num_sms": v2(
        "self num_experts num_topk num_scaleout_topk=0 rdma_gbs=0 nvlink_gbs=0 sm_read_gbs=200 sm_write_gbs=50"
    ),
    "ElasticBuffer.get_theoretical_num_qps": v2("self num_sms"),
    "ElasticBuffer.dispatch": v2(
        "self x topk_idx=None topk_weights=None cumulative_local_expert_recv_stats=None num_experts=None "
        f"num_max_tokens_per_rank=None expert_alignment=None {EVENTS} handle=None do_handle_copy=True "
        "do_cpu_sync=None do_expand=False do_zero_padding=False use_tma_aligned_col_major_sf=False"
    ),
    "ElasticBuffer.combine": v2(f"self x handle topk_weights=None bias=None {EVENTS}"),
    "ElasticBuffer.get_engram_storage_size_hint": v2(),
    "ElasticBuffer.engram_write": v2(),
    "ElasticBuffer.engram_fetch": v2(),
    "ElasticBuffer.get_pp_buffer_size_hint": v2(),
    "ElasticBuffer.pp_set_config": v2(),
    "ElasticBuffer.pp_send": v2(),
    "ElasticBuffer.pp_recv": v2(),
    "ElasticBuffer.get_agrs_num_max_session_bytes": v2(),
    "ElasticBuffer.get_agrs_buffer_size_hint": v2(),
    "ElasticBuffer.agrs_set_config": v2(),
    "ElasticBuffer.create_agrs_session": v2(),
    "ElasticBuffer.destroy_agrs_session": v2(),
    "ElasticBuffer.agrs_new_session": v2(),
    "ElasticBuffer.agrs_get_inplace_tensor": v2(),
    "ElasticBuffer.all_gather": v2(),
    # --- EPHandle
    **attributes(
        "EPHandle",
        "do_expand num_experts expert_alignment num_max_tokens_per_rank num_sms topk_idx "
        "psum_num_recv_tokens_per_scaleup_rank psum_num_recv_tokens_per_expert "
        "num_unaligned_recv_tokens_per_expert num_recv_tokens_per_expert_list recv_src_metadata "
        "dst_buffer_slot_idx token_metadata_at_forward channel_linked_list num_recv_tokens num_expanded_tokens "
        "cached_recv_src_metadata_before_sort deterministic_sort",
        v2(),
    ),
    # --- HybridEPBuffer, and what its branch adds to Buffer
    "HybridEPBuffer.configurer": hybrid(),
    "HybridEPBuffer.empty_jit_cache": hybrid("self"),
    "HybridEPBuffer.update_template_config": hybrid(
        "self hidden_dim=None num_of_tokens_per_rank=None num_local_experts=None pad_multiple=None use_fp8=None "
        "fuse_permute_dispatch=False **kwargs"
    ),
    "HybridEPBuffer.dispatch": hybrid(
        "self hidden scaling_factor=None topk_idx=None topk_weights=None num_of_experts=None probs=None "
        "routing_map=None num_dispatched_tokens_tensor=None num_dispatched_tokens=None handle=None"
    ),
    "HybridEPBuffer.combine": hybrid("self hidden probs=None handle=None"),
    "HybridEPBuffer.dispatch_with_permute": hybrid(
        "self * hidden topk_idx=None topk_weights=None num_of_experts_per_rank=None num_of_experts=None use_fp8=None "
        "routing_map=None probs=None scaling_factor=None num_permuted_tokens=None pad_multiple=None handle=None "
        "non_blocking=False fuse_permute_dispatch=False num_dispatched_tokens=None use_host_meta=None"
    ),
    "HybridEPBuffer.combine_with_unpermute": hybrid(
        "self * hidden probs=None handle=None pad_multiple=None fuse_unpermute_combine=False "
        "num_dispatched_tokens=None"
    ),
    "Buffer(allow_nvlink_for_normal_mode)": hybrid(),
    "Buffer.low_latency_dispatch(topk_weights)": hybrid(),
    "Buffer.low_latency_dispatch(x_global_scale)": hybrid(),
    "Buffer.low_latency_dispatch(use_nvfp4)": hybrid(),
    "Buffer.low_latency_dispatch(use_ue8m0_for_sf)": hybrid(),
    "Buffer.low_latency_combine(overlap)": hybrid(),
    "Buffer.low_latency_combine(src_signals)": hybrid(),
    "Buffer.low_latency_combine(src_signal_expect_value)": hybrid(),
}

# Where our positional order cannot be all of theirs: these are passed by keyword, or told apart by their types.
BY_KEYWORD = {"Buffer": {"use_fabric", "explicitly_destroy", "enable_shrink", "comm"}}
BY_KEYWORD["Buffer.internode_dispatch"] = {"config", *(p.split("=")[0] for p in LAYOUT.split())}
