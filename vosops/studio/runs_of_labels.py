"""How label maps travel between the server and the page: runs of equal labels, four bytes each.

A run is a little-endian 32-bit word: the label in its upper byte, the length in the other three, in row-major order.
A 4K frame with a few objects is some tens of kilobytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vosops.io.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from vosops.io.masks import Labels

__all__ = ["decode", "encode"]

_LABEL_SHIFT = 24
_LONGEST = (1 << _LABEL_SHIFT) - 1
_WORD = 4


def encode(labels: Labels | npt.NDArray[np.bool_]) -> bytes:
    """Return the runs of a (H, W) uint8 label map, or of a bool mask.

    Example:
        >>> import numpy as np
        >>> encode(np.array([[0, 0], [3, 3]], dtype=np.uint8)).hex(" ", 4)
        '02000000 02000003'
    """
    import numpy as np

    flat = np.ascontiguousarray(labels, dtype=np.uint8).ravel()
    edges = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]))
    lengths, values = np.diff(edges), flat[edges[:-1]].astype(np.uint32)
    pieces = -(-lengths // _LONGEST)
    if pieces.size and pieces.max() > 1:  # frames of more than 16 million pixels
        values = np.repeat(values, pieces)
        last = np.cumsum(pieces) - 1
        whole = np.full(values.size, _LONGEST, dtype=np.int64)
        whole[last] = lengths - (pieces - 1) * _LONGEST
        lengths = whole
    return (values << _LABEL_SHIFT | lengths.astype(np.uint32)).astype("<u4").tobytes()


def decode(data: bytes, size: tuple[int, int]) -> Labels:
    """Return the (H, W) uint8 label map of its runs.

    Raises:
        InputError: The runs do not fill a label map of this size.
    """
    import numpy as np

    if len(data) % _WORD:
        raise InputError(f"runs must be whole words of {_WORD} bytes, got {len(data)} bytes")
    words = np.frombuffer(data, "<u4")
    lengths = (words & _LONGEST).astype(np.int64)
    if int(lengths.sum()) != size[0] * size[1]:
        raise InputError(f"runs must cover {size[0] * size[1]} pixels, got {int(lengths.sum())}")
    return np.repeat((words >> _LABEL_SHIFT).astype(np.uint8), lengths).reshape(size)
