"""*Source*: where DeepEP's first generation keeps its Buffer."""

from .events import EventHandle, EventOverlap
from .legacy import Buffer, Config

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap"]
