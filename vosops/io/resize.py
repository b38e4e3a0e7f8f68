"""Between the input's size and the computation's: frames and label maps down, probabilities up."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError
from .notes import warn

if TYPE_CHECKING:
    from collections.abc import Sequence

NATIVE = -1
_AREA = 4 << 20  # pixels
_NATIVE_AREA = 32 << 20
_MULTIPLE = 16  # sides of the computation, so that strided networks need no second resize or padding


def computation_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Return the (H, W) of the computation for an input of ``size``.

    The aspect ratio is the input's and the short side ``short_side``, each side rounded up to a
    multiple of 16 (480 for 1920x1080 gives 864x480). ``NATIVE``, or a short side that the input has already,
    keeps the input's size exactly.

    The area is bounded (:func:`largest_area`): strips and enlarged pictures that would exceed it are computed smaller,
    at the input's aspect ratio as nearly as multiples of 16 allow.
    """
    height, width = wanted_size(size, short_side)
    most = largest_area(size, short_side)
    if height * width <= most:
        return height, width
    scale = math.sqrt(most / (size[0] * size[1]))
    short, long = (max(_MULTIPLE, int(side * scale) // _MULTIPLE * _MULTIPLE) for side in sorted(size))
    long = min(long, most // short // _MULTIPLE * _MULTIPLE)
    return (short, long) if size[0] <= size[1] else (long, short)


def bounded_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Return :func:`computation_size`, and warn where its bound makes it smaller than what was asked for."""
    chosen, wanted = computation_size(size, short_side), wanted_size(size, short_side)
    if chosen != wanted:
        frames, large, small = (f"{width}x{height}" for height, width in (size, wanted, chosen))
        warn(
            f"frames of {frames} are computed at {small}: {large}, as requested by --size, would take too much memory"
        )
    return chosen


def wanted_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Return the (H, W) that ``short_side`` asks for, however large."""
    if short_side == NATIVE:
        return size
    if short_side < _MULTIPLE:
        raise InputError(f"--size must be -1 (the input's own) or at least {_MULTIPLE}, got {short_side}")
    if short_side == min(size):
        return size
    scale = short_side / min(size)
    height, width = (-(-round(side * scale) // _MULTIPLE) * _MULTIPLE for side in size)
    return height, width


def largest_area(size: tuple[int, int], short_side: int) -> int:
    """Return the most pixels of the computation: 4 Mi, or what is asked for knowingly.

    That is the input's own area up to four squares of ``short_side``, so that 3840x2160 can be computed as it is;
    with ``NATIVE`` the input's own up to 32 Mi (7680x4320).
    """
    if short_side == NATIVE:
        return _NATIVE_AREA
    return max(_AREA, min(size[0] * size[1], 4 * short_side * short_side))


def resize_frame(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a (3, H, W) uint8 frame, bilinear with antialiasing."""
    if tuple(frame.shape[1:]) == size:
        return frame
    return F.interpolate(frame[None], size=size, mode="bilinear", antialias=True)[0]


def resize_labels(labels: Tensor, size: tuple[int, int], ids: Sequence[int]) -> Tensor:
    """Resize a (H, W) label map to its nearest pixels; every object of ``ids`` keeps at least one pixel."""
    if tuple(labels.shape) == size:
        return labels
    resized = F.interpolate(labels[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(
        labels.dtype
    )
    present = {i for i in ids if (resized == i).any()}
    for missing in (i for i in ids if i not in present):
        rows, columns = (labels == missing).nonzero(as_tuple=True)
        if len(rows):
            resized[rows * size[0] // labels.shape[0], columns * size[1] // labels.shape[1]] = missing
    return resized


def to_labels(
    probabilities: Tensor, object_ids: Sequence[int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the (H, W) uint8 label map at ``size`` and the probability (float32) of each pixel's label.

    ``probabilities`` is (O+1, h, w), background first. Enlarged bilinearly one object at a time, so the
    memory is a few (H, W) maps, however many objects there are. Ties go to the first channel. A NaN is no
    label's probability; where all are NaN the pixel is background, with probability NaN.
    """
    best = resize_probability(probabilities[0], size).clone()
    labels = torch.zeros(size, dtype=torch.uint8, device=probabilities.device)
    for object_id, small in zip(object_ids, probabilities[1:], strict=True):
        probability = resize_probability(small, size)
        labels.masked_fill_((probability > best) | (best.isnan() & ~probability.isnan()), object_id)
        torch.fmax(best, probability, out=best)  # the one that is a number, where one is NaN
    return labels, best


def resize_probability(probability: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize one (h, w) probability map bilinearly to float32 (H, W)."""
    probability = probability.float()
    if tuple(probability.shape) == size:
        return probability
    return F.interpolate(probability[None, None], size=size, mode="bilinear", antialias=True)[0, 0]
