"""Pictures of masks: object colours, overlays with contours, cut-outs, the contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vosops.io.labels import davis_palette
from vosops.io.masks import BINARY_OBJECT, IGNORE
from vosops.io.outputs import OwnedFile, complete_or_absent

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from vosops.io.frames import Image
    from vosops.io.masks import Labels

OPACITY = 0.5
SHEET_FRAMES = 12
_SHEET_COLUMNS = 4
_SHEET_GAP = 6
_THUMBNAIL_WIDTH = 320
_CAPTION_HEIGHT = 20
_DARKEST = 64  # palette colours whose brightest channel is below this are replaced
_CONTOUR_SHARE = 240  # the contour is the short side over this wide, at least one pixel


def colour_table(palette: bytes | None, binary: bool) -> npt.NDArray[np.uint8]:
    """Return (256, 3) uint8: the colour of each id, the palette's where that can be seen on a picture."""
    import numpy as np

    standard = np.frombuffer(davis_palette(), np.uint8).reshape(256, 3).copy()
    if binary:
        standard[BINARY_OBJECT] = standard[1]
        table = standard
    else:
        table = np.frombuffer(palette or davis_palette(), np.uint8).reshape(256, 3).copy()
        grey = (table == table[:, :1]).all(axis=1)
        unseen = grey | (table.max(axis=1) < _DARKEST)
        table[unseen] = standard[unseen]
    return _brightened(table)


def _brightened(table: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Scale each colour so that its brightest channel is full."""
    import numpy as np

    peak = table.max(axis=1, keepdims=True).clip(min=1).astype(np.float32)
    brightened: npt.NDArray[np.uint8] = (table * (255 / peak)).round().astype(np.uint8)
    return brightened


def contours(labels: Labels, width: int) -> npt.NDArray[np.bool_]:
    """Return where a pixel's label differs from one within ``width`` pixels, on the objects' side only."""
    import numpy as np

    edge: npt.NDArray[np.bool_] = np.zeros(labels.shape, dtype=bool)
    for distance in range(1, width + 1):
        rows = labels[distance:] != labels[:-distance]
        columns = labels[:, distance:] != labels[:, :-distance]
        edge[distance:] |= rows
        edge[:-distance] |= rows
        edge[:, distance:] |= columns
        edge[:, :-distance] |= columns
    edge &= labels > 0
    return edge


def overlay(image: Image, labels: Labels, table: npt.NDArray[np.uint8], binary: bool) -> Image:
    """Return ``image`` with each object tinted and outlined in its colour; ignored pixels are left alone."""
    import numpy as np

    shown = labels if binary else np.where(labels == IGNORE, 0, labels).astype(np.uint8)
    colours = table[shown]
    inside = shown > 0
    result: Image = image.copy()
    tinted = image[inside] * (1 - OPACITY) + colours[inside] * OPACITY
    result[inside] = tinted.astype(np.uint8)
    edge = contours(shown, max(1, round(min(labels.shape) / _CONTOUR_SHARE)))
    result[edge] = colours[edge]
    return result


def class_overlay(image: Image, labels: Labels, palette: bytes) -> Image:
    """Return ``image`` with every pixel tinted in its label's colour of the palette."""
    import numpy as np

    colours = np.frombuffer(palette, np.uint8).reshape(256, 3)[labels]
    tinted: Image = (image * (1 - OPACITY) + colours * OPACITY).astype(np.uint8)
    return tinted


def write_cutout(path: Path | OwnedFile, image: Image, labels: Labels, binary: bool) -> None:
    """Write the objects as an RGBA PNG; alpha is the mask, softened over one pixel at its border."""
    import numpy as np
    from PIL import Image as PILImage

    alpha = soft_alpha(labels > 0 if binary else (labels > 0) & (labels != IGNORE))
    rgba = np.dstack([np.where(alpha[..., None] > 0, image, 0), alpha])
    with complete_or_absent(path) as file:
        PILImage.fromarray(rgba.astype(np.uint8), "RGBA").save(file, format="PNG")


def soft_alpha(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Return the alpha (H, W) of a mask, softened over one pixel at its border."""
    import numpy as np

    padded = np.pad(inside.astype(np.uint16), 1, mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    summed = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    alpha: npt.NDArray[np.uint8] = (summed * 255 // 9).astype(np.uint8)
    return alpha


class ContactSheet:
    """Up to a dozen overlays, evenly spaced over the video, as one PNG to see the result at a glance."""

    def __init__(self, path: Path | OwnedFile) -> None:
        self.path = path
        self._cells: list[tuple[Image, str]] = []

    @staticmethod
    def choose(count: int) -> list[int]:
        """Return which of ``count`` frames to show."""
        shown = min(SHEET_FRAMES, count)
        return sorted({round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)})

    def add(self, picture: Image, caption: str) -> None:
        """Add a picture, made small at once."""
        import numpy as np
        from PIL import Image as PILImage

        height, width, _ = picture.shape
        size = (_THUMBNAIL_WIDTH, max(1, round(height * _THUMBNAIL_WIDTH / width)))
        small = PILImage.fromarray(picture).resize(size, PILImage.Resampling.LANCZOS)
        self._cells.append((np.asarray(small), caption))

    def save(self) -> None:
        """Write the sheet."""
        from PIL import Image as PILImage
        from PIL import ImageDraw, ImageFont

        columns = min(_SHEET_COLUMNS, len(self._cells))
        rows = -(-len(self._cells) // columns)
        cell_height = max(cell.shape[0] for cell, _ in self._cells) + _CAPTION_HEIGHT + _SHEET_GAP
        cell_width = _THUMBNAIL_WIDTH + _SHEET_GAP
        sheet = PILImage.new(
            "RGB", (columns * cell_width + _SHEET_GAP, rows * cell_height + _SHEET_GAP), "white"
        )
        draw = ImageDraw.Draw(sheet)
        font = ImageFont.load_default(size=13)
        for place, (cell, caption) in enumerate(self._cells):
            x = _SHEET_GAP + place % columns * cell_width
            y = _SHEET_GAP + place // columns * cell_height
            sheet.paste(PILImage.fromarray(cell), (x, y))
            draw.text((x, y + cell.shape[0] + 2), caption, fill="black", font=font)
        with complete_or_absent(self.path) as file:
            sheet.save(file, format="PNG")
