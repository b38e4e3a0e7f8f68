"""Pictures through Pillow: opened the same way everywhere, samples as stored, one error for whatever is wrong.

Frames are (H, W, 3) uint8 RGB, upright. Samples of 16 bits are scaled to 8 as the frames of a video are, to their upper
byte; samples whose range is ambiguous (signed, 32 bits, floating point) are refused.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from .errors import InputError, VosopsError, require
from .notes import warn

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image as Picture

    Image = npt.NDArray[np.uint8]

_OPENING = Lock()  # filters of warnings belong to the process
_TRANSPARENT_MODES = frozenset({"P", "PA", "LA", "La", "RGBA", "RGBa"})
_PAGED = frozenset(
    {"TIFF", "GIF", "WEBP", "AVIF", "PNG"}
)  # formats whose further pictures are pages or frames
_UPPER_BYTE = 8
_DARK = 1 << 12
_SUBFILE_TYPE = 254  # a tag of TIFF
_NO_PAGE = 1 | 4  # a smaller copy, a mask of transparency


@contextmanager
def opened(path: str | os.PathLike[str], what: str, advice: str) -> Iterator[Picture]:
    """Open a picture; whatever goes wrong with it until the context is left is one :class:`InputError`.

    ``what`` names it in the message, ``advice`` says what to do. Pictures larger than twice
    ``PIL.Image.MAX_IMAGE_PIXELS`` are refused, as Pillow does; those in between are read without a warning.
    """
    require("PIL")
    from PIL import Image as PILImage

    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)
            picture = PILImage.open(path)
        with picture:
            yield picture
    except VosopsError:
        raise
    except Exception as error:  # damaged files make Pillow raise nearly everything
        raise InputError(f"{what} cannot be read as an image ({reason(error)}): {advice}") from error


def reason(error: BaseException) -> str:
    """Return what an error of a library says, on one line."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split()) or type(error).__name__


def raw_mode(picture: Picture) -> str:
    """Return how Pillow names the layout of the stored samples ("L;4", "I;16B"); ask before they are loaded."""
    tiles = getattr(picture, "tile", None)
    if not tiles:
        return picture.mode
    arguments = tiles[0][3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else picture.mode


def is_sixteen_bits(picture: Picture, raw: str) -> bool:
    """Say whether the samples of a grey picture are 16 bits, unsigned; ``raw`` is its :func:`raw_mode`."""
    if picture.mode.startswith("I;16"):
        return True
    return picture.mode == "I" and (picture.format == "PPM" or ("16" in raw and not raw.endswith("S")))


def page_numbers(picture: Picture) -> list[int]:
    """Return the numbers of the pages or frames of a file; [0] for formats that hold one picture.

    Pages of a TIFF that are marked as a smaller copy or as the transparency of another one do not count.
    """
    count = getattr(picture, "n_frames", 1) if picture.format in _PAGED else 1
    if count == 1 or picture.format != "TIFF":
        return list(range(count))
    found = []
    for page in range(count):
        picture.seek(page)
        if not picture.tag_v2.get(_SUBFILE_TYPE, 0) & _NO_PAGE:  # type: ignore[attr-defined]
            found.append(page)
    picture.seek(0)
    return found or [0]


def read_frame(path: str | os.PathLike[str], what: str | None = None) -> Image:
    """Read one picture as a frame; EXIF orientation is applied.

    Raises:
        InputError: It cannot be read, holds several pictures, or its samples have no one meaning as a picture.
    """
    what = what or os.fspath(path)
    with opened(path, what, "replace or remove it") as picture:
        count = len(page_numbers(picture))
        if count > 1:
            raise InputError(
                f"{what} holds {count} pictures: give only that file as the input, or save each frame separately"
            )
        return frame_of_picture(picture, what)


def frame_of_picture(picture: Picture, what: str) -> Image:
    """Return the frame that an open picture shows; see :func:`read_frame`."""
    import numpy as np
    from PIL import ImageOps

    sixteen = is_sixteen_bits(picture, raw_mode(picture))
    if picture.mode in ("I", "F") and not sixteen:
        kind = "floating-point" if picture.mode == "F" else "signed or 32-bit"
        raise InputError(
            f"{what} has {kind} samples, whose range is ambiguous: save it with 8 or 16 bits a sample"
        )
    upright = ImageOps.exif_transpose(picture)
    if sixteen:
        grey = _upper_byte(np.asarray(upright))
        return np.repeat(grey[..., None], 3, axis=2)
    if upright.mode in _TRANSPARENT_MODES:  # at once to RGB, Pillow warns about palettes with transparency
        upright = upright.convert("RGBA")
    return np.array(upright.convert("RGB"))


def _upper_byte(samples: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return the upper bytes of samples of 16 bits; warns once where these would be nearly black."""
    import numpy as np

    if samples.size and 0 < samples.max() < _DARK:
        warn(
            f"a 16-bit frame has no sample of {_DARK} or more out of 65535 and is nearly black: if the samples "
            "have fewer bits, scale them to 16"
        )
    upper: npt.NDArray[np.uint8] = (samples >> _UPPER_BYTE).astype(np.uint8)
    return upper


def frame_of_array(value: Any, what: str) -> Image:
    """Return a copy of the frame that an array or tensor (H, W, 3) of RGB holds: uint8, or uint16 scaled as in files.

    Callers may fill one array with frame after frame, and draw on the frames that they get.

    Raises:
        InputError: For any other shape or dtype, with what to do.
    """
    import numpy as np

    array = to_numpy(value)
    shape, dtype = tuple(array.shape), array.dtype
    found = f"{what} must be (H, W, 3) uint8 RGB, got {shape} {dtype}"
    if array.ndim != 3 or shape[2] != 3:
        if array.ndim == 3 and shape[0] == 3:
            found += ": put the channels last, frame.transpose(1, 2, 0)"
        elif array.ndim == 3 and shape[2] == 4:
            found += ": leave out the alpha, frame[..., :3]"
        elif array.ndim == 2:
            found += ": repeat the grey values in three channels"
        raise InputError(found)
    if 0 in shape:
        raise InputError(f"{found}: it has no pixel")
    if dtype == np.uint16:
        return np.ascontiguousarray(_upper_byte(array))
    if dtype != np.uint8:
        if np.issubdtype(dtype, np.floating):
            found += ": scale values in [0, 1] by 255 and convert them to uint8"
        raise InputError(found)
    return np.array(array, order="C")


def to_numpy(value: Any) -> npt.NDArray[Any]:
    """Return an array for what the caller gave: an array, or a tensor on any device; InputError for another thing."""
    import numpy as np

    if hasattr(value, "detach"):  # a tensor, without importing torch
        value = value.detach().cpu()
    try:
        array = np.asarray(value)
    except Exception as error:  # ragged lists, tensors of types that numpy lacks
        raise InputError(f"{type(value).__name__} cannot be used as an array ({reason(error)})") from error
    if isinstance(value, np.ma.MaskedArray) and np.ma.getmaskarray(value).any():
        raise InputError("a masked array has no value where it is masked: fill it, array.filled(0)")
    return array
