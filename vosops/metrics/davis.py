"""Region similarity J and boundary accuracy F of DAVIS, of one mask and of one sequence.

The definitions are those of the DAVIS benchmark (Perazzi et al., CVPR 2016; Pont-Tuset et al., 2017) as its
public evaluation code computes them, to the last bit, with two differences. The decay of sequences longer
than 256 frames is right here, where the public code lets 8-bit frame numbers overflow. And the objects of a
sequence are the ids found anywhere in its ground truth, where the public code counts from 1 to the largest id
of the first frame; on DAVIS both give the same objects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[Any]
"""A binary mask (H, W); any dtype, non-zero is foreground."""

Boolean = NDArray[np.bool_]
Frame = TypeVar("Frame")

BOUNDARY_TOLERANCE = 0.008
"""Distance within which two boundaries match, as a share of the image diagonal."""

RECALL_THRESHOLD = 0.5
"""Recall is the share of frames whose value lies above this."""

DECAY_BINS = 4

IGNORED = 255
"""The label of pixels that belong to no object and may be left out of the comparison."""


def region_similarity(prediction: Mask, ground_truth: Mask, void: Mask | None = None) -> float:
    """Compute J, the intersection over the union of two masks.

    Args:
        prediction: (H, W), non-zero is foreground.
        ground_truth: (H, W), non-zero is foreground.
        void: (H, W), pixels to leave out.

    Returns:
        A number in [0, 1]; 1 where both masks are empty.

    Raises:
        ValueError: the shapes differ or are not (H, W).
    """
    predicted, true = _foreground(prediction, ground_truth, void)
    return _intersection_over_union(predicted, true)


def boundary_accuracy(
    prediction: Mask, ground_truth: Mask, void: Mask | None = None, tolerance: float = BOUNDARY_TOLERANCE
) -> float:
    """Compute F, the harmonic mean of precision and recall of the boundary pixels of two masks.

    A boundary pixel is matched where the other mask has one within a disk. Cost: linear in the area of the
    box that holds both masks, plus the length of the boundaries times the radius of the disk.

    Args:
        prediction: (H, W), non-zero is foreground.
        ground_truth: (H, W), non-zero is foreground.
        void: (H, W), pixels that count as background in both masks.
        tolerance: radius of the disk; below 1 a share of the image diagonal, rounded up, else whole pixels.

    Returns:
        A number in [0, 1]; 1 where neither mask has a boundary, 0 where only one has.

    Raises:
        ValueError: the shapes differ or are not (H, W).
    """
    predicted, true = _foreground(prediction, ground_truth, void)
    radius = boundary_radius(predicted.shape, tolerance)
    return _boundary_f(predicted, true, radius)


def boundary_radius(shape: Sequence[int], tolerance: float = BOUNDARY_TOLERANCE) -> int:
    """Return the radius in pixels of the disk within which boundaries match: 8 for 480 x 854."""
    return math.ceil(tolerance if tolerance >= 1 else tolerance * math.hypot(*shape))


def compare_masks(prediction: Mask, ground_truth: Mask, void: Mask | None = None) -> tuple[float, float]:
    """Return J and F of one pair of masks (H, W); see `region_similarity` and `boundary_accuracy`."""
    predicted, true = _foreground(prediction, ground_truth, void)
    box = _bounding_box(predicted | true)
    if box is None:
        return 1.0, 1.0
    radius = boundary_radius(predicted.shape)
    predicted, true = predicted[box], true[box]
    return _intersection_over_union(predicted, true), _boundary_f(predicted, true, radius)


def boundary(mask: Mask) -> Boolean:
    """Return the boundary of a mask (H, W) -> bool (H, W): pixels that differ from the right, lower or diagonal one.

    The boundary is thus one pixel wide and lies half a pixel up and left of the true one. The last row is
    compared to the right only, the last column downwards only, and the last pixel is never on the boundary.
    """
    m = np.asarray(mask).astype(bool)
    edge = np.zeros_like(m)
    right = m[:, :-1] ^ m[:, 1:]
    below = m[:-1] ^ m[1:]
    edge[:, :-1] |= right
    edge[:-1] |= below
    edge[:-1, :-1] |= m[:-1, :-1] ^ m[1:, 1:]
    return edge


@dataclass(frozen=True)
class Statistics:
    """What DAVIS reports of the values of one object over time: their mean, recall and decay."""

    mean: float
    recall: float
    decay: float


def statistics(values: Sequence[float] | NDArray[np.float64]) -> Statistics:
    """Return mean, recall (share above 0.5) and decay (first quarter minus last quarter) of values over time.

    Args:
        values: one value a frame, at least one.

    Raises:
        ValueError: no value.
    """
    series = np.asarray(values, dtype=np.float64)
    if series.ndim != 1 or not len(series):
        raise ValueError(f"values: expected at least one value, one per frame; got shape {series.shape}")
    edges = (np.round(np.linspace(1, len(series), DECAY_BINS + 1) + 1e-10) - 1).astype(np.int64)
    first, last = series[: edges[1] + 1], series[edges[-2] : edges[-1] + 1]
    return Statistics(
        mean=float(np.mean(series)),
        recall=float(np.mean(series > RECALL_THRESHOLD)),
        decay=float(np.mean(first) - np.mean(last)),
    )


@dataclass(frozen=True)
class ObjectScore:
    """One object of one sequence: its values frame by frame, and their statistics."""

    sequence: str
    object_id: int
    frames: tuple[str, ...]
    j_values: tuple[float, ...]
    f_values: tuple[float, ...]

    @property
    def j(self) -> Statistics:
        """Mean, recall and decay of the region similarity."""
        return statistics(self.j_values)

    @property
    def f(self) -> Statistics:
        """Mean, recall and decay of the boundary accuracy."""
        return statistics(self.f_values)

    def row(self) -> dict[str, float]:
        """Return the numbers by DAVIS' names: J&F-Mean, J-Mean, J-Recall, J-Decay, F-Mean, F-Recall, F-Decay."""
        j, f = self.j, self.f
        return {
            "J&F-Mean": (j.mean + f.mean) / 2,
            "J-Mean": j.mean,
            "J-Recall": j.recall,
            "J-Decay": j.decay,
            "F-Mean": f.mean,
            "F-Recall": f.recall,
            "F-Decay": f.decay,
        }


def evaluate_sequence(
    predictions: Sequence[Mask] | Mask,
    ground_truth: Sequence[Mask] | Mask,
    *,
    name: str = "sequence",
    keep_ends: bool = False,
) -> list[ObjectScore]:
    """Score every object of one sequence in memory.

    Args:
        predictions: T label maps (H, W), integer; 0 is background.
        ground_truth: T label maps (H, W), integer; 0 is background, 255 is background too.
        name: name of the sequence in the result.
        keep_ends: score the first frame that shows an object and the last frame as well, which the semi-supervised
            protocol leaves out (the first is given, the last was once not annotated alike). Frames before the
            first object are never scored.

    Returns:
        One score per object id of the ground truth, ascending.

    Raises:
        ValueError: the lengths or sizes differ, no frame is left, or the ground truth holds no object.
    """
    if len(predictions) != len(ground_truth):
        raise ValueError(
            f"predictions: expected {len(ground_truth)} frames as in ground_truth; got {len(predictions)}"
        )
    shown = [{int(i) for i in np.unique(labels)} - {0, IGNORED} for labels in ground_truth]
    first = next((t for t, objects in enumerate(shown) if objects), 0)
    scored = scored_frames(range(first, len(ground_truth)), keep_ends)
    ids = sorted(set().union(*shown))
    if not ids:
        raise ValueError(
            "ground_truth: expected at least one object (a label other than 0 and 255); got none"
        )
    values = {i: [compare_masks(predictions[t] == i, ground_truth[t] == i) for t in scored] for i in ids}
    frames = tuple(f"{t:05d}" for t in scored)
    return [
        ObjectScore(name, i, frames, tuple(j for j, _ in pairs), tuple(f for _, f in pairs))
        for i, pairs in values.items()
    ]


def scored_frames(frames: Sequence[Frame], keep_ends: bool) -> Sequence[Frame]:
    """Return the frames that count: all but the first and the last, or all; ValueError if none is left."""
    left = frames if keep_ends else frames[1:-1]
    if not left:
        raise ValueError(
            f"{len(frames)} frames leave none to score: the protocol drops the first and the last "
            "(keep the ends to score them)"
        )
    return left


def _foreground(prediction: Mask, ground_truth: Mask, void: Mask | None) -> tuple[Boolean, Boolean]:
    """Return both masks as bool with the void pixels cleared; checks the shapes."""
    predicted, true = np.asarray(prediction).astype(bool), np.asarray(ground_truth).astype(bool)
    if true.ndim != 2:
        raise ValueError(f"ground_truth: expected a mask (H, W); got shape {true.shape}")
    if predicted.shape != true.shape:
        raise ValueError(f"prediction: expected shape {true.shape} as ground_truth; got {predicted.shape}")
    if void is None:
        return predicted, true
    kept = ~np.asarray(void).astype(bool)
    if kept.shape != true.shape:
        raise ValueError(f"void: expected shape {true.shape} as ground_truth; got {kept.shape}")
    return predicted & kept, true & kept


def _bounding_box(mask: Boolean) -> tuple[slice, slice] | None:
    """Return where a mask is not zero, with one more row and column on every side inside the image.

    That margin is what the boundary needs: the pixel left of or above the foreground is on the boundary, and
    an empty last row or column has none, so that boundary(mask[box]) is boundary(mask)[box].
    """
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return None
    top, bottom = int(rows[0]), int(rows[-1])
    columns = np.flatnonzero(mask[top : bottom + 1].any(axis=0))
    left, right = int(columns[0]), int(columns[-1])
    return slice(max(top - 1, 0), bottom + 2), slice(max(left - 1, 0), right + 2)


def _intersection_over_union(predicted: Boolean, true: Boolean) -> float:
    union = np.count_nonzero(predicted | true)
    return np.count_nonzero(predicted & true) / union if union else 1.0


def _boundary_f(predicted: Boolean, true: Boolean, radius: int) -> float:
    predicted_edge, true_edge = boundary(predicted), boundary(true)
    predicted_count, true_count = np.count_nonzero(predicted_edge), np.count_nonzero(true_edge)
    if not predicted_count or not true_count:
        return float(predicted_count == true_count)
    precision = count_within(predicted_edge, true_edge, radius) / predicted_count
    recall = count_within(true_edge, predicted_edge, radius) / true_count
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def count_within(points: Boolean, targets: Boolean, radius: int) -> int:
    """Return how many True pixels of `points` have a True pixel of `targets` within Euclidean distance `radius`.

    Exact: the same as counting points in targets dilated by a disk. For each row of the disk the pixels of
    `targets` in reach are a difference of two running sums along the image row.

    Args:
        points: bool (H, W).
        targets: bool (H, W).
        radius: whole pixels, >= 0.
    """
    height, width = targets.shape
    running = np.zeros((height + 2 * radius, width + 2 * radius + 1), dtype=np.int32)
    inside = running[radius : radius + height]
    np.cumsum(targets, axis=1, out=inside[:, radius + 1 : radius + 1 + width])
    inside[:, radius + 1 + width :] = inside[:, radius + width : radius + width + 1]
    stride = running.shape[1]
    flat = running.ravel()
    y, x = np.nonzero(points)
    pending = (y + radius) * stride + x + radius
    found = 0
    for dy in sorted(range(-radius, radius + 1), key=abs):
        reach = math.isqrt(radius * radius - dy * dy)
        row = pending + dy * stride
        hit = flat.take(row + reach + 1) > flat.take(row - reach)
        found += int(np.count_nonzero(hit))
        pending = pending[~hit]
        if not len(pending):
            break
    return found
