"""Label maps from files and arrays: the ids as stored, whatever a library makes of the samples.

What has no one meaning is refused with what to do: colours of no known palette, transparency that disagrees with the
ids, samples in floating point, formats whose compression blurs ids or whose writers renumber them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .pictures import is_sixteen_bits, opened, page_numbers, raw_mode, to_numpy

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image as Picture

    Labels = npt.NDArray[np.uint8]

MAX_ID = 255
WHITE = 255
_WHITE_16 = 65535
_LOSSY = {
    "JPEG": "a JPEG",
    "MPO": "a JPEG",
    "AVIF": "an AVIF",
    "JPEG2000": "a JPEG 2000 image",
    "HEIF": "a HEIF",
}
_ADVICE = "give a PNG"


def davis_palette() -> bytes:
    """Return the 256-colour palette of DAVIS and PASCAL VOC as 768 bytes."""
    colours = bytearray()
    for index in range(256):
        red = green = blue = 0
        bits = index
        for shift in range(7, -1, -1):
            red |= (bits & 1) << shift
            green |= (bits >> 1 & 1) << shift
            blue |= (bits >> 2 & 1) << shift
            bits >>= 3
        colours += bytes((red, green, blue))
    return bytes(colours)


def read_labels(path: str | os.PathLike[str]) -> tuple[Labels, bytes | None]:
    """Read a mask: (H, W) uint8 label map with the file's own ids, upright, and its palette if it has one.

    Palette and grey images of 1 to 16 bits give their stored values (one bit gives 0 and 255, as does a 16-bit image
    of 0 and 65535 alone); colour images must be grey or use the DAVIS palette's colours. Transparency must agree
    with the ids, or be all there is: then what is opaque is 255.

    Raises:
        InputError: It cannot be read, or what it stores has no one meaning as ids.
    """
    from PIL import ImageOps

    what = f"mask {os.fspath(path)}"
    with opened(path, what, _ADVICE) as picture:
        if picture.format in _LOSSY or _is_lossy_webp(picture, path):
            kind = _LOSSY.get(picture.format or "", "a lossy WebP")
            raise InputError(f"{what} is {kind}, whose compression blurs the ids: save it as PNG")
        if picture.format == "GIF":
            raise InputError(f"{what} is a GIF, whose writers renumber the ids: save it as PNG")
        count = len(page_numbers(picture))
        if count > 1:
            raise InputError(f"{what} holds {count} pictures: save the one of the frame as PNG")
        raw, scale = raw_mode(picture), _scale_of_grey(picture)
        sixteen = is_sixteen_bits(picture, raw)
        return _labels_of_picture(ImageOps.exif_transpose(picture), what, raw, scale, sixteen)


def _labels_of_picture(
    picture: Picture, what: str, raw: str, scale: float, sixteen: bool
) -> tuple[Labels, bytes | None]:
    """Return the labels and palette of a loaded picture. scale: what Pillow multiplied the stored grey values by."""
    import numpy as np

    mode = picture.mode
    samples = np.array(picture)
    if mode in ("P", "PA"):
        palette = bytes(picture.getpalette("RGB") or []).ljust(3 * (MAX_ID + 1), b"\0")
        indices = samples[..., 0].copy() if mode == "PA" else samples
        alpha = samples[..., 1] if mode == "PA" else _alpha_of_indices(picture, indices)
        return _checked_against_alpha(indices, alpha, what), palette[: 3 * (MAX_ID + 1)]
    if mode == "1":
        return _white_where(samples), None
    if mode == "L" or mode.startswith("I"):
        if mode == "L" and "I" in raw.partition(";")[2]:
            raise InputError(f"{what} stores white as 0, so its ids are ambiguous: {_ADVICE}")
        stored = samples if scale == 1 else np.rint(samples / scale).astype(np.int64)
        labels = labels_of_samples(stored, what, sixteen)
        key = picture.info.get("transparency")
        if isinstance(key, int):
            alpha = np.where(stored == key, 0, WHITE).astype(np.uint8)
            return _checked_against_alpha(labels, alpha, what), None
        return labels, None
    if mode == "F":
        raise InputError(f"{what} has floating-point samples: save integer ids (threshold probabilities)")
    if mode not in ("LA", "RGB", "RGBA"):
        raise InputError(
            f"{what} is a {mode} image: save it as a palette or grey PNG whose values are object ids"
        )
    if "16" in raw or scale != 1:
        raise InputError(f"{what} is a colour image with other than 8 bits per sample: save it with 8")
    if mode == "RGB":
        key = picture.info.get("transparency")
        labels = _labels_of_colours(samples, what)
        if isinstance(key, tuple):
            alpha = np.where((samples == np.array(key)).all(axis=2), 0, WHITE).astype(np.uint8)
            return _checked_against_alpha(labels, alpha, what), None
        return labels, None
    colours = np.repeat(samples[..., :1], 3, axis=2) if mode == "LA" else samples[..., :3]
    return _labels_of_colours_with_alpha(colours, samples[..., -1], what), None


def labels_of_samples(samples: npt.NDArray[Any], what: str, sixteen: bool = False) -> Labels:
    """Return the label map of (H, W) bool or integer samples.

    ``sixteen`` says that 65535 is white, so that 0 and 65535 alone are one object.

    Raises:
        InputError: An id is below 0 or above 255.
    """
    import numpy as np

    if samples.dtype == np.uint8 or not samples.size:
        return np.ascontiguousarray(samples.astype(np.uint8, copy=False))
    least, greatest = samples.min(), samples.max()
    if least < 0:
        raise InputError(f"{what} has ids below 0: use ids from 1 to 254")
    if sixteen and greatest == _WHITE_16 and ((samples == 0) | (samples == _WHITE_16)).all():
        return _white_where(samples > 0)
    if greatest > MAX_ID:
        raise InputError(f"{what} has ids above 255: use ids from 1 to 254")
    return np.ascontiguousarray(samples.astype(np.uint8))


def labels_of_array(value: Any) -> Labels:
    """Return the label map that an array or tensor (H, W) of bool or integers holds.

    Raises:
        InputError: For another shape or dtype, or ids that are not from 0 to 255.
    """
    import numpy as np

    array = to_numpy(value)
    integers = np.issubdtype(array.dtype, np.integer) or array.dtype == bool
    found = f"mask must be (H, W) bool or integer ids 0..255, got {tuple(array.shape)} {array.dtype}"
    if array.ndim != 2 or not integers:
        floating = np.issubdtype(array.dtype, np.floating)
        raise InputError(
            found + (": threshold probabilities, or convert ids to integers" if floating else "")
        )
    try:
        return labels_of_samples(array, "mask", array.dtype == np.uint16)
    except InputError as error:
        raise InputError(f"{found} with values from {array.min()} to {array.max()}") from error


def _scale_of_grey(picture: Picture) -> float:
    """Return what Pillow multiplies the stored grey values of this file by when it loads them."""
    raw = raw_mode(picture)
    if picture.mode == "L":
        for bits in (2, 4):
            if raw.startswith(f"L;{bits}"):
                return WHITE / ((1 << bits) - 1)
    tiles = getattr(picture, "tile", None)
    if picture.format == "PPM" and tiles:
        arguments = tiles[0][3]
        if isinstance(arguments, tuple) and len(arguments) == 2 and isinstance(arguments[1], int):
            return (WHITE if picture.mode != "I" else _WHITE_16) / arguments[1]
    return 1


def _alpha_of_indices(picture: Picture, indices: Labels) -> Labels:
    """Return the alpha of each pixel of a palette image."""
    import numpy as np

    table: Labels = np.full(MAX_ID + 1, WHITE, np.uint8)
    given = picture.info.get("transparency")
    if isinstance(given, int) and 0 <= given <= MAX_ID:
        table[given] = 0
    elif isinstance(given, bytes):
        table[: len(given)] = np.frombuffer(given, np.uint8)[: MAX_ID + 1]
    alpha: Labels = table[indices]
    return alpha


def _checked_against_alpha(labels: Labels, alpha: Labels, what: str) -> Labels:
    """Return the labels, if an object is nowhere transparent; what is opaque, if that is all the image tells."""
    inside = _opaque(alpha, what)
    if inside is None:
        return labels
    if labels[~inside].any():
        raise _disagrees(what)
    return labels if labels.any() else _white_where(inside)


def _labels_of_colours_with_alpha(colours: Labels, alpha: Labels, what: str) -> Labels:
    """Return the labels of an image (H, W, 3) whose alpha (H, W) may be the mask itself.

    Colours that nobody sees count only where they contradict those that are seen.
    """
    import numpy as np

    inside = _opaque(alpha, what)
    if inside is None:
        return _labels_of_colours(colours, what)
    seen, hidden = colours[inside], colours[~inside]
    object_seen = seen.any(axis=1)
    if object_seen.all():
        one_colour = (seen == seen[0]).all()
        plain = (hidden == hidden[0]).all() and (
            not hidden.any() or hidden.min() == WHITE or (one_colour and (hidden[0] == seen[0]).all())
        )
        if not plain:
            raise _disagrees(what)
        try:
            return _labels_of_colours(np.where(inside[..., None], colours, 0).astype(np.uint8), what)
        except InputError:
            if one_colour:
                return _white_where(inside)
            raise
    if hidden.any():
        raise _disagrees(what)
    if object_seen.any():
        return _labels_of_colours(colours, what)
    return _white_where(inside)


def _opaque(alpha: Labels, what: str) -> npt.NDArray[np.bool_] | None:
    """Return where an image is opaque; None where its alpha says nothing."""
    least, greatest = int(alpha.min()), int(alpha.max())
    if not greatest:
        raise InputError(f"{what} is fully transparent: save it without alpha")
    if least == greatest:
        return None
    inside: npt.NDArray[np.bool_] = alpha == WHITE
    if (alpha[~inside] > 0).any():
        raise InputError(f"{what} is partly transparent (smoothed?): threshold its alpha, or save it without")
    return inside


def _white_where(inside: npt.NDArray[np.bool_]) -> Labels:
    """Return the mask of one object: 255 where it is, else 0."""
    import numpy as np

    labels: Labels = np.where(inside, WHITE, 0).astype(np.uint8)
    return labels


def _disagrees(what: str) -> InputError:
    return InputError(
        f"{what} has ids or colours where it is transparent, so that alpha and ids disagree: save it without alpha"
    )


def _labels_of_colours(image: Labels, what: str) -> Labels:
    import numpy as np

    if (image == image[..., :1]).all():
        grey: Labels = image[..., 0].copy()
        return grey
    codes = image.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    palette = np.frombuffer(davis_palette(), np.uint8).reshape(256, 3).astype(np.uint32)
    known = palette @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    order = np.argsort(known)
    place = np.searchsorted(known[order], codes).clip(max=MAX_ID)
    labels: Labels = order[place].astype(np.uint8)
    if (known[labels] != codes).any():
        raise InputError(
            f"{what} is a colour image: save it as a palette or grey PNG whose values are object ids"
        )
    return labels


def _is_lossy_webp(picture: Picture, path: str | os.PathLike[str]) -> bool:
    """Say whether a file is a WebP whose picture is not of the lossless kind."""
    if picture.format != "WEBP":
        return False
    with open(path, "rb") as file:
        file.seek(12)
        while len(header := file.read(8)) == 8:
            if header[:4] in (b"VP8 ", b"VP8L"):
                return header[:4] == b"VP8 "
            length = int.from_bytes(header[4:], "little")
            file.seek(length + length % 2, os.SEEK_CUR)
    return False
