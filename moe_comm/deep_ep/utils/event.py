"""*Source*: where DeepEP's second generation keeps its events."""

from ..events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
