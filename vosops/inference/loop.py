"""The loop over a video: frames through a tracker, forward from the earliest mask, then backward from it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from vosops.backends import use_backend
from vosops.io.errors import InputError, VosopsError
from vosops.io.frames import FrameSource, RawFrame, read_ahead, with_last
from vosops.io.masks import IGNORE, MaskSet
from vosops.io.resize import bounded_size, resize_frame, resize_labels, resize_probability, to_labels
from vosops.memory import MemoryBudgetError
from vosops.models._tracking import ids_of

from .chunks import Chunks

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from vosops.models import VideoTracker

Phase = Literal["forward", "backward", "done"]


@dataclass(frozen=True)
class SegmentedFrame:
    """One segmented frame.

    Attributes:
        index: Frame number in the input, from 0.
        name: Name of its mask file without suffix: the frame file's, or the number in seven digits.
        time: Presentation time in seconds from the first frame.
        image: (H, W, 3) uint8 RGB at the input's size, upright.
        labels: (H, W) uint8 with the ids of the given masks, 0 for background.
        object_ids: Ids of the objects known at this frame.
        areas: Pixels of each object.
        confidences: Mean probability of each object inside its own pixels; 0 where it has none.
        given: Whether a mask was given for this frame.
        probabilities: (O+1, H, W) float32, background first, then ``object_ids``; None unless asked for.
    """

    index: int
    name: str
    time: float
    image: Tensor
    labels: Tensor
    object_ids: list[int]
    areas: dict[int, int]
    confidences: dict[int, float]
    given: bool
    probabilities: Tensor | None = None


class FrameLoop(Protocol):
    """What a run asks of a loop over a video: its frames, and all that going on later needs.

    device: where it computes. indices: the frame numbers that it processes. problem: set when the input ended early;
    one line.
    """

    device: torch.device
    indices: range
    problem: str | None

    @property
    def total(self) -> int | None:
        """Number of frames to process, an estimate where the input's length is one; None if unknown."""

    def state_dict(self) -> dict[str, Any]:
        """Return what going on needs, for ``torch.save`` and a weights-only load."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict`` of a loop with the same arguments."""

    def __iter__(self) -> Iterator[SegmentedFrame]:
        """Yield the frames in the order they are computed."""
        ...


def frame_range(start: int | None, end: int | None, step: int, count: int | None) -> range:
    """Return the frame numbers to process: from ``start`` up to but without ``end``, every ``step``-th.

    ``count`` is the exact length of the input, None if it is not known before reading.
    """
    first = start or 0
    if first < 0 or (end is not None and end < 0) or step < 1:
        raise InputError("--start and --end must be 0 or more, and --step 1 or more")
    stop = min(x for x in (end, count, sys.maxsize) if x is not None)
    if first >= stop:
        length = f"; the input has {count} frames" if count is not None else ""
        raise InputError(f"--start {first} --end {stop} leaves no frame to process{length}")
    return range(first, stop, step)


def expected_frames(source: FrameSource, indices: range) -> int | None:
    """Return the number of frames to process, an estimate where the input's length is one; None if unknown."""
    if source.count is None and indices.stop == sys.maxsize:
        return None
    stop = indices.stop if source.count is None else min(indices.stop, source.count)
    return len(range(indices.start, stop, indices.step))


def resized_frames(
    read: Iterator[RawFrame], size: tuple[int, int]
) -> Iterator[tuple[RawFrame, Tensor, Tensor]]:
    """Yield each frame with its image (H,W,3) as a tensor and as (3,*size), at the size of the computation.

    The second is a copy also at the image's own size: the caller of `segment` may draw on the first.
    """
    for raw in read:
        image = torch.from_numpy(raw.image)
        frame = resize_frame(image.permute(2, 0, 1), size)
        yield raw, image, frame.clone() if tuple(image.shape[:2]) == size else frame


class TrackingLoop:
    """Drives a tracker over one video; iterate over it once to get :class:`SegmentedFrame` objects.

    Frames come in the order they are computed: forward from the earliest mask to the end, then, with the tracker
    restarted on the earliest mask, backward from it to the first frame. Only the objects of the earliest mask go
    backward; an object first given later exists from its mask on.

    A mask on a later frame is that frame's output. It speaks of the objects it shows: known ones are corrected, and
    the tracker keeps the frame permanently; new ids become new objects; known objects that it does not show stay
    where the tracker sees them outside the mask's own objects.

    Between two frames :meth:`state_dict` says all that :meth:`load_state_dict` needs to go on; on the CPU
    the frames that follow are bit-identical.

    Args:
        tracker: The model.
        source: Frames; read in a thread, a few ahead.
        masks: Given masks; each frame number must be in ``indices``.
        indices: Frame numbers to process.
        short_side: Short side of the computation in pixels, -1 for the input's size.
        device: Where frames go.
        dtype: Autocast type of the tracker's computation; float32 means no autocast.
        keep_probabilities: Fill ``SegmentedFrame.probabilities``.
        naive: Run the ops in plain PyTorch.
        chunks: Restart the tracker at the seams between these; None: one chunk.
    """

    def __init__(
        self,
        tracker: VideoTracker,
        source: FrameSource,
        masks: MaskSet,
        indices: range,
        *,
        short_side: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        keep_probabilities: bool = False,
        naive: bool = False,
        chunks: Chunks | None = None,
    ) -> None:
        self.tracker = tracker
        self.chunks = chunks
        self.source = source
        self.masks = masks
        self.indices = indices
        self.size = source.size
        self.compute_size = bounded_size(source.size, short_side)
        self.device = device
        self.dtype = dtype
        self.keep_probabilities = keep_probabilities
        self.naive = naive
        self.first = masks.frames[0]
        self.phase: Phase = "forward"
        self.position = self.first
        self.problem: str | None = None
        self._started = False

    @property
    def total(self) -> int | None:
        """Number of frames to process, an estimate where the input's length is one; None if unknown."""
        return expected_frames(self.source, self.indices)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the tracker's state, for ``torch.save`` and a weights-only load."""
        return {
            "phase": self.phase,
            "position": self.position,
            "problem": self.problem,
            "tracker": self.tracker.state_dict() if self._started else None,
            "chunks": self.chunks.state_dict() if self.chunks is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict`` of a loop with the same arguments."""
        self.phase = state["phase"]
        self.position = state["position"]
        self.problem = state["problem"]
        if state["tracker"] is not None:
            self.tracker.load_state_dict(state["tracker"])
            self._started = True
        if self.chunks is not None:
            self.chunks.load_state_dict(state["chunks"], self.device)

    def __iter__(self) -> Iterator[SegmentedFrame]:
        if not self._started:
            self.tracker.reset()
        if self.phase == "forward":
            yield from self._forward()
        if self.phase == "backward":
            yield from self._backward()

    def correct(self, image: Tensor, labels: Tensor) -> None:
        """Show the tracker the truth of the frame that came last, before the next one; it is kept permanently.

        Unlike a given mask, and unlike :meth:`vosops.Session.add_objects`, it speaks of every object: one that it does
        not show is not in the frame.

        Args:
            image: (H, W, 3) uint8 RGB at the input's size.
            labels: (H, W) integer ids of the given masks.
        """
        frame = resize_frame(image.permute(2, 0, 1), self.compute_size).to(self.device)
        small = self._small(labels, ids_of(labels))
        with torch.inference_mode(), self._autocast(), self._backend():
            self.tracker.step(frame, labels=small, permanent=True)

    def _forward(self) -> Iterator[SegmentedFrame]:
        step = self.indices.step
        read = self.source.forward(range(self.position, self.indices.stop, step))
        yield from self._run(read, step, given=self.masks.frames)
        self.problem = self.source.problem
        missed = [frame for frame in self.masks.frames if frame >= self.position]
        if self.position == self.first:
            reason = self.problem or f"{self.source.title} ends before it"
            raise InputError(
                f"frame {self.first} of mask {self.masks.title(self.first)} cannot be read: {reason}"
            )
        if missed and self.problem is None:
            self.problem = (
                f"mask {self.masks.title(missed[0])} is for frame {missed[0]}, after the last frame"
            )
        self.phase = "backward" if self.first > self.indices.start else "done"
        self.position = self.first
        self._started = False
        if self.chunks is not None:
            self.chunks.clear()

    def _backward(self) -> Iterator[SegmentedFrame]:
        step = -self.indices.step
        remaining = range(self.position, self.indices.start - 1, step)
        if not self._started:
            self.tracker.reset()
        frames = self._run(self.source.backward(remaining), step, given=[self.first])
        yield from (frame for frame in frames if frame.index != self.first)
        self.phase = "done"

    def _run(self, read: Iterator[RawFrame], step: int, given: list[int]) -> Iterator[SegmentedFrame]:
        with read_ahead(resized_frames(read, self.compute_size)) as ahead:
            for (raw, image, frame), last in with_last(ahead):
                try:
                    with torch.inference_mode(), self._autocast(), self._backend():
                        segmented = self._segment(raw, image, frame.to(self.device), raw.index in given, last)
                except MemoryBudgetError as error:
                    raise VosopsError(
                        f"--memory-budget is too small at frame {raw.index}: {error}"
                    ) from error
                self.position = raw.index + step
                yield segmented

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _backend(self) -> AbstractContextManager[Any]:
        return use_backend("reference") if self.naive else nullcontext()

    def _segment(
        self, raw: RawFrame, image: Tensor, frame: Tensor, given: bool, last: bool
    ) -> SegmentedFrame:
        import numpy as np

        probabilities = None
        if self.chunks is not None and self._started:
            self.chunks.before(self.tracker)
        if given:
            labels = self._apply_mask(raw.index, frame, last)
            best = torch.ones(self.size)
        elif self.compute_size == self.size and not self.keep_probabilities:
            labels = self.tracker.step(frame, end=last, output="labels").cpu()
            best = self.tracker.confidence().cpu()
        else:
            probabilities = self.tracker.step(frame, end=last)
            labels, best = to_labels(probabilities, self.tracker.object_ids, self.size)
            labels, best = labels.cpu(), best.cpu()
        self._started = True
        ids = list(self.tracker.object_ids)
        if self.chunks is not None:
            self.chunks.after(frame, labels, ids)
        array = labels.numpy()
        areas = np.bincount(array.ravel(), minlength=256)
        sums = np.bincount(array.ravel(), weights=best.numpy().ravel(), minlength=256)
        outside = self.masks.outside
        return SegmentedFrame(
            index=raw.index,
            name=raw.name,
            time=float(raw.time),
            image=image,
            labels=torch.from_numpy(self.masks.restore(array)),
            object_ids=[outside(i) for i in ids],
            areas={outside(i): int(areas[i]) for i in ids},
            confidences={outside(i): float(sums[i] / max(1, areas[i])) for i in ids},
            given=given,
            probabilities=self._full_probabilities(probabilities, labels, ids)
            if self.keep_probabilities
            else None,
        )

    def _apply_mask(self, index: int, frame: Tensor, last: bool) -> Tensor:
        """Give the tracker the mask of this frame; return the frame's label map at the input's size."""
        array, ids = self.masks.labels(index)
        labels = torch.from_numpy(array)
        if not self._started:
            self.tracker.initialize(frame, self._small(labels, ids))
            return labels
        others = [i for i in self.tracker.object_ids if i not in ids]
        if others:
            predicted = self._predict(frame)
            keep = (labels == 0) & torch.isin(predicted, torch.tensor(others, dtype=predicted.dtype))
            labels = torch.where(keep, predicted, labels)
        self.tracker.step(frame, labels=self._small(labels, [*ids, *others]), permanent=True, end=last)
        return labels

    def _predict(self, frame: Tensor) -> Tensor:
        """Return the label map, at the input's size, that the tracker sees on the next frame."""
        probabilities = self.tracker.predict(frame)
        labels, _ = to_labels(probabilities, self.tracker.object_ids, self.size)
        return labels.cpu()

    def _small(self, labels: Tensor, ids: list[int]) -> Tensor:
        return resize_labels(labels, self.compute_size, ids).long().to(self.device)

    def _full_probabilities(self, probabilities: Tensor | None, labels: Tensor, ids: list[int]) -> Tensor:
        if probabilities is None:
            return torch.stack([(labels == i) | ((labels == IGNORE) & (i == 0)) for i in [0, *ids]]).float()
        return torch.stack([resize_probability(p, self.size).cpu() for p in probabilities])
