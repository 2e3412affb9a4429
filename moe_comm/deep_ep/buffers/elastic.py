"""*Source*: where DeepEP's second generation keeps its ElasticBuffer."""

from ..elastic import ElasticBuffer
from ..handle import EPHandle

__all__ = ["EPHandle", "ElasticBuffer"]
