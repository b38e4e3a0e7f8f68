"""COCO run-length encoding of binary masks, as pycocotools writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_BITS = 5  # payload bits per character
_PAYLOAD = (1 << _BITS) - 1
_SIGN = 1 << (_BITS - 1)
_MORE = 1 << _BITS
_FIRST_CHARACTER = 48
_DELTA_FROM = 3  # counts from the fourth on are stored as the difference to the one two before


def counts(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Return the run lengths of a (H, W) mask in column-major order, background first."""
    import numpy as np

    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate(([0], changes, [flat.size]))
    runs: list[int] = np.diff(edges).tolist()
    return [0, *runs] if flat.size and flat[0] else runs


def compress(runs: list[int]) -> str:
    """Return COCO's compressed string of run lengths: five bits a character, signed differences."""
    characters = []
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i >= _DELTA_FROM else run
        more = True
        while more:
            bits = value & _PAYLOAD
            value >>= _BITS
            more = value != (-1 if bits & _SIGN else 0)
            characters.append(chr((bits | _MORE if more else bits) + _FIRST_CHARACTER))
    return "".join(characters)


def encode(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Return ``{"size": [H, W], "counts": "..."}`` for a (H, W) mask, readable by pycocotools.

    Example:
        >>> import numpy as np
        >>> encode(np.array([[0, 1], [0, 1]], dtype=bool))
        {'size': [2, 2], 'counts': '22'}
    """
    height, width = mask.shape
    return {"size": [height, width], "counts": compress(counts(mask))}
