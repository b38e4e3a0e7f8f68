"""Video in, masks out: readers, the propagation loop, writers, resume."""

from .api import segment
from .errors import VosopsError
from .loop import Propagation, SegmentedFrame

__all__ = ["Propagation", "SegmentedFrame", "VosopsError", "segment"]
