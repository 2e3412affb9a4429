"""sglang (0.5.23): the plug-in that gives its DeepEP dispatchers moe_comm, when MOE_COMM_AS_DEEP_EP=1 asks for it.

    MOE_COMM_AS_DEEP_EP=1 python -m sglang.launch_server … --moe-a2a-backend deepep

Found by sglang itself (entry point group `sglang.srt.plugins`) and called in every process that it starts; where
`SGLANG_PLUGINS` is set, it must name `moe_comm_as_deep_ep`. Without the variable it does nothing, so it may stay
installed.
"""

from moe_comm.alias import install_from_environment


def install() -> None:
    """Make `import deep_ep` find `moe_comm.deep_ep` in this process if the variable asks. Again: does nothing.

    If another one is installed, importing it raises ImportError and says where (MOE_COMM_AS_DEEP_EP=override hides it).
    """
    install_from_environment()
