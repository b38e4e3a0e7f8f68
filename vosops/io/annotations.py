"""What the annotations of one sequence mean, decided over all of them and not from the first one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import numpy.typing as npt

VOID = 255
"""In a sequence with other ids: pixels that belong to no object. In one without: the one object."""

Frame = TypeVar("Frame")


@dataclass(frozen=True)
class AnnotationStyle(Generic[Frame]):
    """How to read the annotations of a sequence.

    Attributes:
        first: The first frame whose annotation shows an object; None if none does.
        binary: Whether no annotation holds anything but 0 and 255, so that 255 is the one object.
    """

    first: Frame | None
    binary: bool


def annotation_style(annotations: Iterable[tuple[Frame, Collection[int]]]) -> AnnotationStyle[Frame]:
    """Return how to read a sequence, given each frame and the values in its annotation, in order.

    Reads on until an id other than 255 decides: one annotation of most sequences, all of a sequence of 0 and 255.

    >>> annotation_style([("00000", {0}), ("00001", {0, 255}), ("00002", {0, 1, 255})])
    AnnotationStyle(first='00002', binary=False)
    >>> annotation_style([("00000", {0}), ("00001", {0, 255})])
    AnnotationStyle(first='00001', binary=True)
    """
    first: Frame | None = None
    for frame, values in annotations:
        ids = set(values) - {0}
        if ids - {VOID}:
            return AnnotationStyle(frame, binary=False)
        if ids and first is None:
            first = frame
    return AnnotationStyle(first, binary=first is not None)


def values_of(labels: npt.NDArray[Any]) -> set[int]:
    """Return the values other than 0 of a label map (H, W) uint8."""
    import numpy as np

    return set(np.flatnonzero(np.bincount(labels.ravel(), minlength=VOID + 1)).tolist()) - {0}
