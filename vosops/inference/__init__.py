"""Video in, masks out: readers, the propagation loop, writers, resume."""

from .api import segment
from .errors import VosopsError
from .loop import Propagation, SegmentedFrame
from .semantic import SemanticTracker
from .tracker import Tracker

__all__ = ["Propagation", "SegmentedFrame", "SemanticTracker", "Tracker", "VosopsError", "segment"]
