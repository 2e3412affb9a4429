"""Config: DeepEP's tuning of its normal kernels. Checked, and used by the size hints; num_sms bounds the SMs of calls
by kernels, as in DeepEP, and nothing else is tuned by it.

`moe_comm` sizes its windows by MOE_COMM_WINDOW_BYTES, whatever T. The hints say what receive queues of the given
numbers of tokens take, because clients size their buffers by them and compare; a `Buffer` works with any size.
"""

from ..arguments import Found, wrong

RANKS_PER_NVL_DOMAIN = (
    8  # as DeepEP counts: groups up to this size need no RDMA bytes, says its hint
)
SIZE_ALIGNMENT = 128
_TOPK, _SCALES = 128, 128  # per token, at most, as DeepEP counts
_EXTRA_BYTES = 8 + _TOPK * (8 + 4) + _SCALES * 4  # metadata, ids and weights, scales


class Config:
    """Positional or keyword. recv tokens of RDMA are rounded up to a multiple of its send tokens.

    Raises: ArgumentError unless num_sms >= 0, sizes >= 1, send < recv, and for RDMA 2 * send <= recv.
    """

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        nvl_send, nvl_recv = num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens
        rdma_send, rdma_recv = num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens
        if num_sms < 0:
            raise wrong("num_sms", "an int >= 0", num_sms)
        for name, size in (("nvl", nvl_send), ("rdma", rdma_send)):
            if size < 1:
                raise wrong(f"num_max_{name}_chunked_send_tokens", "an int >= 1", size)
        if nvl_recv <= nvl_send:
            raise wrong(
                "num_max_nvl_chunked_recv_tokens", f"more than the {nvl_send} sent", nvl_recv
            )
        rdma_recv = -(-rdma_recv // rdma_send) * rdma_send
        if rdma_recv < 2 * rdma_send:
            raise wrong(
                "num_max_rdma_chunked_recv_tokens",
                f"at least twice the {rdma_send} sent",
                Found(num_max_rdma_chunked_recv_tokens),
            )
        self._num_sms, self._channels = num_sms, max(1, num_sms // 2)
        self._nvl_recv, self._rdma_recv = nvl_recv, rdma_recv

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of receive queues for the ranks of a node; > 0, a multiple of 128."""
        slots = self._channels * min(num_ranks, RANKS_PER_NVL_DOMAIN) * self._nvl_recv
        return _aligned(slots * (hidden_bytes + _EXTRA_BYTES))

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of send and receive queues for the other nodes; 0 up to 8 ranks, else > 0, a multiple of 128."""
        if num_ranks <= RANKS_PER_NVL_DOMAIN:
            return 0
        nodes = -(-num_ranks // RANKS_PER_NVL_DOMAIN)
        slots = 2 * self._channels * nodes * self._rdma_recv
        return _aligned(slots * (hidden_bytes + _EXTRA_BYTES))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // SIZE_ALIGNMENT) * SIZE_ALIGNMENT
