"""*Source*: DeepEP's second generation's place of the first one's Buffer."""

from ..legacy import Buffer, Config

__all__ = ["Buffer", "Config"]
