"""Video in, masks out: readers, the propagation loop, writers, resume."""

from vosops.io.errors import VosopsError

from .api import segment
from .loop import Propagation, SegmentedFrame
from .semantic import SemanticTracker
from .tracker import Tracker

__all__ = ["Propagation", "SegmentedFrame", "SemanticTracker", "Tracker", "VosopsError", "segment"]
