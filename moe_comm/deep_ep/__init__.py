"""DeepEP's names and signatures, of all its generations, on moe_comm; and nothing else.

Importing it needs nothing and changes nothing: no GPU, no NIC, no environment variable. A name exists only if it works.
"""

import torch

from . import buffer, buffers, utils
from .config import Config
from .events import EventHandle, EventOverlap
from .legacy import Buffer

__version__ = "2.1.0"  # the generation of DeepEP that these names come from

topk_idx_t = torch.int64  # the dtype of topk_idx

__all__ = [
    "Buffer",
    "Config",
    "EventHandle",
    "EventOverlap",
    "topk_idx_t",
    "buffer",
    "buffers",
    "utils",
]

from .elastic import ElasticBuffer, get_logical_domain_size, get_physical_domain_size  # noqa: E402
from .handle import EPHandle  # noqa: E402

__all__ += ["ElasticBuffer", "EPHandle", "get_logical_domain_size", "get_physical_domain_size"]
from .hybrid_ep_buffer import HybridEPBuffer  # noqa: E402

__all__ += ["HybridEPBuffer"]
