"""Connected parts of a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["connected_parts"]


def connected_parts(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Return a map (H, W) of the connected parts of a mask: 0 outside, and 1, 2 ..., the part of most pixels first.

    Pixels are connected to their eight neighbours. Parts of equal size are numbered from the top, then from the left.
    Takes time in proportion to the runs of pixels in rows.

    >>> import numpy as np
    >>> connected_parts(np.array([[1, 0, 0, 1], [0, 0, 1, 0]], bool)).tolist()
    [[2, 0, 0, 1], [0, 0, 1, 0]]
    """
    import numpy as np

    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    first_of_row = np.searchsorted(rows, np.arange(len(mask) + 1)).tolist()
    begin, end = starts.tolist(), stops.tolist()
    for row in range(1, len(mask)):
        above, last = first_of_row[row - 1], first_of_row[row]
        for run in range(last, first_of_row[row + 1]):
            while above < last and end[above] < begin[run]:
                above += 1
            touching = above
            while touching < last and begin[touching] <= end[run]:
                one, other = sorted((root(touching), root(run)))
                parents[other] = one  # the first run of a part stands for it
                touching += 1
    roots = np.array([root(run) for run in parents], np.int64)
    return _numbered(mask, roots, stops - starts)


def _numbered(
    mask: npt.NDArray[np.bool_], roots: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """Write the number of each run's part, the largest part first; runs are in the order of their pixels."""
    import numpy as np

    found = np.zeros(mask.shape, np.int32)
    parts, part_of_run = np.unique(roots, return_inverse=True)
    if len(parts):
        order = np.argsort(-np.bincount(part_of_run, lengths), kind="stable")
        numbers = np.empty(len(parts), np.int32)
        numbers[order] = np.arange(1, len(parts) + 1)
        found[mask] = np.repeat(numbers[part_of_run], lengths)
    return found
