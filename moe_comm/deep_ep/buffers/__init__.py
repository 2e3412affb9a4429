"""*Source*: where DeepEP's second generation keeps its buffers."""

from . import legacy

__all__ = ["legacy"]
