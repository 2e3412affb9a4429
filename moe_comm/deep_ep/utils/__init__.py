"""What DeepEP keeps beside its buffers. Events are here, too, as in its first generation."""

from ..events import EventHandle, EventOverlap
from . import envs, event, math
from .envs import check_nvlink_connections

__all__ = ["EventHandle", "EventOverlap", "check_nvlink_connections", "envs", "event", "math"]
