"""*Source*: where DeepEP's second generation keeps its buffers."""

from . import elastic, legacy

__all__ = ["elastic", "legacy"]
