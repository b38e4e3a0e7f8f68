"""Video in, masks out: trackers, loops over videos, and the API."""

from typing import TYPE_CHECKING

from vosops import _deprecation
from vosops.io.errors import VosopsError

from .api import segment
from .create import create_tracker
from .loop import SegmentedFrame, TrackingLoop
from .network_tracker import NetworkTracker
from .semantic_tracker import SemanticTracker
from .session import Session

__all__ = [
    "NetworkTracker",
    "SegmentedFrame",
    "SemanticTracker",
    "Session",
    "TrackingLoop",
    "VosopsError",
    "create_tracker",
    "segment",
]

_deprecation.moved(
    __name__,
    "vosops.io",
    (
        *("coco", "datasets", "files", "frames", "masks", "picture_stack"),
        *("resize", "rle", "streams", "video", "video_writer"),
    ),
)
_deprecation.moved(
    __name__,
    "vosops.runs",
    ("checkpoint", "drawing", "drawing_pass", "job", "progress", "report", "run"),
)
_RENAMED = {"Propagation": TrackingLoop, "Tracker": NetworkTracker}

if not TYPE_CHECKING:  # so that type checkers still report names that do not exist

    def __getattr__(name: str) -> object:
        if name in _RENAMED:
            _deprecation.warn(f"{__name__}.{name}", f"{__name__}.{_RENAMED[name].__name__}")
            return _RENAMED[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
