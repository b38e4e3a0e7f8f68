"""Finding masks whose edges are smooth, so that the steps between two ids would become objects of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_BETWEEN_SHARE = 0.5
_LEAST_PIXELS = 16  # of a strip; smaller ones are small objects that touch


def slivers(labels: npt.NDArray[np.uint8]) -> list[int]:
    """Return the ids of a (H, W) label map that exist as thin strips between a lower and a higher value alone.

    Such an id has no pixel whose eight neighbours are all of it, and at least half of its pixels lie between a lower
    and a higher neighbour: a blurred, enlarged or anti-aliased edge. An object of a few pixels on the background is
    none, for nothing there is higher. Takes a few maps of (H, W) bytes and about ten passes over them.
    """
    import numpy as np

    padded = np.pad(labels, 1, mode="edge")
    rows_least = np.minimum(np.minimum(padded[:-2], padded[1:-1]), padded[2:])
    rows_most = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
    least = np.minimum(np.minimum(rows_least[:, :-2], rows_least[:, 1:-1]), rows_least[:, 2:])
    most = np.maximum(np.maximum(rows_most[:, :-2], rows_most[:, 1:-1]), rows_most[:, 2:])
    pixels = np.bincount(labels.ravel(), minlength=256)
    cores = np.bincount(labels[least == most], minlength=256)
    between = np.bincount(labels[(least < labels) & (labels < most)], minlength=256)
    thin = (pixels > 0) & (cores == 0) & (between >= _BETWEEN_SHARE * pixels)
    found = [int(i) for i in np.flatnonzero(thin) if i]
    return found if pixels[found].sum() >= _LEAST_PIXELS else []
