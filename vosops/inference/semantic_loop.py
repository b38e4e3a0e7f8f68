"""A whole ``vosops semantic`` job: classes through a video, into an output folder, resumable."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vosops.io.cityscapes import CITYSCAPES
from vosops.io.errors import InputError
from vosops.io.frames import FrameSource, RawFrame, read_ahead
from vosops.io.labels import davis_palette
from vosops.io.resize import bounded_size

from .classes import objects_of_classes
from .loop import SegmentedFrame, expected_frames, resized_frames
from .semantic_tracker import SemanticTracker

_PALETTE_BYTES = 768


def class_palette(num_classes: int) -> bytes:
    """Return the palette of the label maps: Cityscapes' colours for its 19 classes, else those of DAVIS."""
    if num_classes != len(CITYSCAPES):
        return davis_palette()
    return bytes(value for kind in CITYSCAPES.values() for value in kind.colour).ljust(_PALETTE_BYTES, b"\0")


@dataclass
class ClassLabels:
    """What drawing and reporting ask about label maps of classes."""

    palette: bytes | None
    binary: bool = False
    classes: bool = True
    first_area: dict[int, int] = field(default_factory=dict)


class SemanticLoop:
    """Drives a tracker over a video; iterate over it once to get the frames, in input order.

    Between two frames :meth:`state_dict` says all that :meth:`load_state_dict` needs to go on. ``problem`` is
    set when the input ended early.

    Args:
        tracker: The tracker, whose video is forgotten.
        source: Frames; read in a thread, a few ahead.
        indices: Frame numbers to process.
        short_side: Short side of the computation in pixels, -1 for the input's size.
        objects: Classes that are objects 1, 2 ... of masks, all others being background; None: label maps of classes.
        resets: Frame numbers before which the video so far is forgotten, because a new scene begins there.
    """

    def __init__(
        self,
        tracker: SemanticTracker,
        source: FrameSource,
        indices: range,
        *,
        short_side: int,
        objects: Sequence[int] | None = None,
        resets: Collection[int] = (),
    ) -> None:
        self.tracker = tracker
        self.source = source
        self.indices = indices
        self._resets = sorted(resets)
        self._objects = objects
        self.compute_size = bounded_size(source.size, short_side)
        least = tracker.model.min_side
        if min(self.compute_size) < least:
            height, width = self.compute_size
            raise InputError(f"frames of {width}x{height} are too small: give --size {least} or more")
        if tracker.tile is not None and tuple(self.compute_size) != tuple(source.size):
            raise InputError("--tile segments frames at their own size: leave out --size")
        self.device = tracker.device
        self.problem: str | None = None
        self.position = indices.start
        tracker.reset()

    @property
    def total(self) -> int | None:
        """Number of frames to process, an estimate where the input's length is one; None if unknown."""
        return expected_frames(self.source, self.indices)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the tracker's state, for ``torch.save`` and a weights-only load."""
        return {"position": self.position, "problem": self.problem, "tracker": self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict`` of a loop with the same arguments."""
        self.position = state["position"]
        self.problem = state["problem"]
        self.tracker.load_state_dict(state["tracker"])

    def __iter__(self) -> Iterator[SegmentedFrame]:
        step = self.indices.step
        read = self.source.forward(range(self.position, self.indices.stop, step))
        with read_ahead(resized_frames(read, self.compute_size)) as ahead:
            for raw, image, frame in ahead:
                if any(raw.index - step < reset <= raw.index for reset in self._resets):
                    self.tracker.reset()
                segmented = self._segment(raw, image, frame)
                self.position = raw.index + step
                yield segmented
        self.problem = self.source.problem
        if self.position == self.indices.start:
            reason = self.problem or f"{self.source.title} ends before it"
            raise InputError(f"frame {self.indices.start} cannot be read: {reason}")

    def _segment(self, raw: RawFrame, image: Tensor, frame: Tensor) -> SegmentedFrame:
        labels, best = (x.cpu() for x in self.tracker.labels(frame.to(self.device), size=self.source.size))
        ids: Sequence[int] = range(self.tracker.num_classes)
        if self._objects is not None:
            labels = objects_of_classes(self._objects, len(ids))[labels.long()]
            ids = range(1, len(self._objects) + 1)
        flat = labels.flatten().long()
        areas = torch.bincount(flat, minlength=len(ids) + 1).tolist()
        sums = torch.bincount(flat, best.flatten().double(), minlength=len(ids) + 1).tolist()
        seen = [i for i in ids if areas[i]]
        return SegmentedFrame(
            index=raw.index,
            name=raw.name,
            time=float(raw.time),
            image=image,
            labels=labels,
            object_ids=seen,
            areas={i: areas[i] for i in seen},
            confidences={i: sums[i] / areas[i] for i in seen},
            given=False,
        )
