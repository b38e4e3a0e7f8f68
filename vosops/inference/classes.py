"""Classes that a network finds, as the objects of a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vosops.io.cityscapes import CITYSCAPES
from vosops.io.components import connected_parts
from vosops.io.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["find_classes", "objects_of_classes", "split_objects"]

_MOST_OBJECTS = 254  # that a mask of one byte tells apart from 0 and 255
_LEAST_SHARE = 1e-3  # of a frame's pixels that a part needs to be an object by itself


def find_classes(text: str, count: int) -> list[int]:
    """Return the classes that a text names, separated by commas, of a network with that many.

    A class is a number, or where there are Cityscapes' 19 its name, such as "traffic light". Raises InputError for any
    other, or one named twice.
    """
    names = list(CITYSCAPES) if count == len(CITYSCAPES) else []
    found: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        if part in names:
            chosen = names.index(part)
        elif part.isascii() and part.isdecimal() and int(part) < count:
            chosen = int(part)
        else:
            known = f", or one of {', '.join(names)}" if names else ""
            raise InputError(f"class {part!r} is unknown: give a number from 0 to {count - 1}{known}")
        if chosen in found:
            raise InputError(f"class {part!r} is named twice")
        found.append(chosen)
    return found


def objects_of_classes(classes: Sequence[int], count: int) -> torch.Tensor:
    """Return the object (count,) uint8 of each class: 1 for the first one chosen, 2 ..., and 0 for all others."""
    objects = torch.zeros(count, dtype=torch.uint8)
    objects[list(classes)] = torch.arange(1, len(classes) + 1, dtype=torch.uint8)
    return objects


def split_objects(labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return a mask in which every connected part of an object is an object of its own.

    Those of object 1 come first, the largest first of all. Parts of less than a thousandth of the frame are left out,
    as background; an object that has no other keeps its largest. Raises InputError for more than 254.
    """
    found = np.zeros_like(labels)
    count = 0
    for own in np.unique(labels[labels > 0]):
        parts = connected_parts(labels == own)
        areas = np.bincount(parts.ravel())[1:]
        kept = max(1, int((areas >= _LEAST_SHARE * labels.size).sum()))
        if count + kept > _MOST_OBJECTS:
            raise InputError(f"the first frame has more than {_MOST_OBJECTS} parts: choose fewer classes")
        inside = (parts > 0) & (parts <= kept)
        found[inside] = parts[inside] + count
        count += kept
    return found
