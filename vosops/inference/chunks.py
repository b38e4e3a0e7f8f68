"""Long videos in overlapping chunks: the tracker restarts at each seam, from masks that it made before it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vosops.io.errors import InputError
from vosops.io.resize import resize_labels

if TYPE_CHECKING:
    from vosops.models import VideoTracker

DEFAULT_OVERLAP = 8


@dataclass(frozen=True)
class _Seen:
    """A frame at the size of the computation, with the label map (h,w) that was made of it and its objects' pixels."""

    number: int
    frame: Tensor
    labels: Tensor
    areas: dict[int, int]


class Chunks:
    """Restarts a tracker every ``frames`` frames, so that nothing older than a chunk is remembered.

    A chunk begins with each object's first frame, whose mask was given, and with the frames that show the objects best
    among the last ``overlap`` ones before the seam; an object that none of these shows, with the last frame that did.
    The masks made of them are taken for the truth. The frames between them and the seam are segmented again, unseen.

    Args:
        frames: Of a chunk, more than ``overlap``.
        overlap: Frames before a seam.

    Raises:
        InputError: One of the numbers is too small.
    """

    def __init__(self, frames: int, overlap: int = DEFAULT_OVERLAP) -> None:
        if overlap < 1 or frames <= overlap:
            raise InputError(
                f"--chunk-frames must be above --chunk-overlap, which must be at least 1, got {frames} and {overlap}"
            )
        self.frames, self.overlap = frames, overlap
        self.clear()

    def clear(self) -> None:
        """Forget everything, for a tracker that starts."""
        self._count = 0
        self._latest: deque[_Seen] = deque(maxlen=self.overlap)
        self._first: dict[int, _Seen] = {}
        self._last: dict[int, _Seen] = {}

    def before(self, tracker: VideoTracker) -> None:
        """Restart the tracker if the next frame is the first of a chunk."""
        if self._count == 0 or self._count % self.frames or not self._last:
            return
        ids = [i for i in tracker.object_ids if i in self._last]
        if not ids:
            return
        best = {seen.number: seen for seen in map(self._best, ids)}
        given = {seen.number: seen for seen in (*(self._first[i] for i in ids), *best.values())}
        since = min((n for n in best if n >= self._latest[0].number), default=self._latest[0].number)
        shown = {seen.number: seen for seen in self._latest if seen.number >= since} | given
        first, *rest = sorted(shown)
        tracker.initialize(shown[first].frame, shown[first].labels)
        for number in rest:
            labels = shown[number].labels if number in given else None
            tracker.step(shown[number].frame, labels, permanent=labels is not None)

    def after(self, frame: Tensor, labels: Tensor, ids: list[int]) -> None:
        """Keep what was made of a frame: frame (3,h,w) as the tracker got it, labels (H,W) with its ids."""
        small = resize_labels(labels, (frame.shape[1], frame.shape[2]), ids).long().to(frame.device)
        counts = torch.bincount(small.flatten(), minlength=256)
        areas = {i: int(counts[i]) for i in ids if int(counts[i])}
        seen = _Seen(self._count, frame, small, areas)
        self._latest.append(seen)
        self._first = {**dict.fromkeys(areas, seen), **self._first}
        self._last = {**self._last, **dict.fromkeys(areas, seen)}
        for kept in (self._first, self._last):
            for gone in kept.keys() - set(ids):
                del kept[gone]
        self._count += 1

    def _best(self, object_id: int) -> _Seen:
        """Return the frame to start an object from: the earliest on a tie, for what is behind it is seen again."""
        shown = [seen for seen in self._latest if object_id in seen.areas]
        if not shown:
            return self._last[object_id]
        return max(shown, key=lambda seen: (seen.areas[object_id], -seen.number))

    def state_dict(self) -> dict[str, Any]:
        """Return what the next seam depends on, as tensors, numbers and lists."""
        kept = {seen.number: seen for seen in (*self._first.values(), *self._last.values(), *self._latest)}
        return {
            "count": self._count,
            "seen": [
                {"number": s.number, "frame": s.frame.cpu(), "labels": s.labels.cpu(), "areas": dict(s.areas)}
                for s in kept.values()
            ],
            "latest": [seen.number for seen in self._latest],
            "first": {i: seen.number for i, seen in self._first.items()},
            "last": {i: seen.number for i, seen in self._last.items()},
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go back to a saved state."""
        kept = {
            s["number"]: _Seen(s["number"], s["frame"].to(device), s["labels"].to(device), s["areas"])
            for s in state["seen"]
        }
        self._count = state["count"]
        self._latest = deque((kept[number] for number in state["latest"]), maxlen=self.overlap)
        self._first = {i: kept[number] for i, number in state["first"].items()}
        self._last = {i: kept[number] for i, number in state["last"].items()}
