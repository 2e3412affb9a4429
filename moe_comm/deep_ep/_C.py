"""The names that DeepEP's C++ module (`deep_ep._C`, formerly `deep_ep_cpp`) shares with the package."""

from . import topk_idx_t
from .config import Config
from .events import EventHandle

__all__ = ["Config", "EventHandle", "topk_idx_t"]
