"""vLLM (0.33): the plug-in that gives its DeepEP backends moe_comm, when MOE_COMM_AS_DEEP_EP=1 asks for it.

    MOE_COMM_AS_DEEP_EP=1 vllm serve … --enable-expert-parallel --all2all-backend deepep_high_throughput

Found by vLLM itself (entry point group `vllm.general_plugins`) and called in every process before the worker's class is
imported; `VLLM_PLUGINS` must not exclude `moe_comm_as_deep_ep`. Without the variable it does nothing, so it may stay
installed. `deepep_v2` asks for an NCCL of its own accord, which nothing here needs: use the other two without it.
"""

from moe_comm.alias import install_from_environment


def install() -> None:
    """Make `import deep_ep` find `moe_comm.deep_ep` in this process if the variable asks. Again: does nothing.

    If another one is installed, importing it raises ImportError and says where (MOE_COMM_AS_DEEP_EP=override hides it).
    """
    install_from_environment()
