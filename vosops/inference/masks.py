"""Label maps in and out: object ids, palettes, and which mask lies on which frame."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vosops.io.errors import InputError, require
from vosops.io.listing import few, label_maps

from .files import complete_or_absent, sha256
from .frames import FrameSource

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Labels = npt.NDArray[np.uint8]

IGNORE = 255
BINARY_OBJECT = 255  # the id, to the outside, of the one object of 0/255 masks
_INSIDE_BINARY = 1  # ... and the id that the tracker sees, for which 255 means "ignore"


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


def read_labels(path: Path) -> tuple[Labels, bytes | None]:
    """Read a mask: (H, W) uint8 label map with the file's own ids, and its palette if it has one.

    Palette and grey images give their values; colour images must be grey or use the DAVIS palette's colours.
    """
    import numpy as np

    require("PIL")
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                raise InputError(f"mask {path} is a JPEG, whose compression blurs the ids: save it as PNG")
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"mask {path} cannot be read as an image ({error}): give a PNG") from error
    if image.mode == "P":
        palette = image.getpalette("RGB") or []
        return np.array(image), bytes(palette).ljust(768, b"\0")
    if image.mode in ("1", "L", "LA"):
        return np.array(image.convert("L")), None
    if image.mode.startswith("I"):
        wide = np.array(image)
        if wide.min() < 0 or wide.max() > IGNORE:
            raise InputError(f"mask {path} has ids above 255: use ids from 1 to 254")
        return wide.astype(np.uint8), None
    return _labels_of_colours(np.array(image.convert("RGB")), path), None


def _labels_of_colours(image: npt.NDArray[np.uint8], path: Path) -> Labels:
    import numpy as np

    if (image == image[..., :1]).all():
        grey: Labels = image[..., 0].copy()
        return grey
    codes = image.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    palette = np.frombuffer(davis_palette(), np.uint8).reshape(256, 3).astype(np.uint32)
    known = palette @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    order = np.argsort(known)
    place = np.searchsorted(known[order], codes).clip(max=IGNORE)
    labels: Labels = order[place].astype(np.uint8)
    if (known[labels] != codes).any():
        raise InputError(
            f"mask {path} is a colour image: save it as a palette or grey PNG whose values are object ids"
        )
    return labels


def write_labels(path: Path, labels: Labels, palette: bytes | None) -> None:
    """Write a (H, W) uint8 label map as a PNG, with a palette or grey; the file is complete or absent."""
    from PIL import Image

    image = Image.fromarray(labels)
    if palette is not None:
        image = image.convert("L")
        image.putpalette(palette)
    with complete_or_absent(path) as part:
        image.save(part, format="PNG")


@dataclass(frozen=True)
class GivenMask:
    """A mask that the user gave: where it lies, where it comes from, and its content's hash."""

    frame: int
    title: str
    digest: str
    path: Path | None = None
    array: Labels | None = None

    def read(self) -> tuple[Labels, bytes | None]:
        """Return its label map and palette."""
        if self.path is not None:
            return read_labels(self.path)
        assert self.array is not None
        return self.array, None


class LabelMaps(Protocol):
    """What drawing and reporting ask about label maps."""

    palette: bytes | None
    """Of the PNGs."""
    binary: bool
    """Whether 0 and 255 are the only values."""
    classes: bool
    """Whether the values are classes, of which 0 is one like the others."""
    first_area: dict[int, int]
    """Pixels of each object in its first mask; an object that is not here cannot get lost."""


class MaskSet:
    """All masks given for one video, checked: their sizes, ids, style and palette.

    Masks whose only values are 0 and 255 (all of them) mean one object, which the tracker sees as 1 and
    the output shows as 255 again; elsewhere 255 means "ignore". Holds no pixels of files: masks are read
    again when their frame comes.

    Args:
        masks: The masks, at most one for a frame.
        size: (H, W) that each must have.
        only_new_objects: Keep of a later mask only the objects that no earlier mask has (the protocol of
            the benchmarks, whose data sets hold the truth of later frames too).
    """

    classes = False

    def __init__(
        self, masks: Sequence[GivenMask], size: tuple[int, int], only_new_objects: bool = False
    ) -> None:
        import numpy as np

        if not masks:
            raise InputError("no mask: say what to segment with --mask")
        self._by_frame: dict[int, GivenMask] = {}
        self.palette: bytes | None = None
        self.first_area: dict[int, int] = {}
        self._new_ids: dict[int, list[int]] = {}
        seen: set[int] = set()
        all_ids: set[int] = set()
        areas: dict[int, dict[int, int]] = {}
        for mask in sorted(masks, key=lambda m: m.frame):
            if mask.frame in self._by_frame:
                other = self._by_frame[mask.frame].title
                raise InputError(
                    f"{other} and {mask.title} both lie on frame {mask.frame}: combine them into one"
                )
            labels, palette = mask.read()
            if labels.shape != size:
                given, needed = f"{labels.shape[1]}x{labels.shape[0]}", f"{size[1]}x{size[0]}"
                raise InputError(
                    f"mask {mask.title} is {given}, but the frames are {needed}: give one of that size"
                )
            self.palette = self.palette or palette
            histogram = np.bincount(labels.ravel(), minlength=256)
            ids = np.flatnonzero(histogram[1:]) + 1
            areas[mask.frame] = {int(i): int(histogram[i]) for i in ids}
            all_ids |= set(areas[mask.frame])
            self._by_frame[mask.frame] = mask
        self.binary = all_ids == {BINARY_OBJECT}
        for frame in list(self._by_frame):
            ids_here = sorted(self._inside(i) for i in areas[frame] if self.binary or i != IGNORE)
            if only_new_objects:
                ids_here = [i for i in ids_here if i not in seen]
            if not ids_here:
                if only_new_objects and (seen or frame != max(self._by_frame)):
                    del self._by_frame[frame]
                    continue
                raise InputError(
                    f"mask {self._by_frame[frame].title} shows no object: paint one with an id above 0"
                )
            self._new_ids[frame] = ids_here
            for inside in ids_here:
                self.first_area.setdefault(self.outside(inside), areas[frame][self.outside(inside)])
            seen |= set(ids_here)
        if self.binary:
            self.palette = None
        elif self.palette is None:
            self.palette = davis_palette()

    @property
    def frames(self) -> list[int]:
        """Frame numbers with a mask, ascending."""
        return sorted(self._by_frame)

    def title(self, frame: int) -> str:
        """Return what to call the mask of a frame."""
        return self._by_frame[frame].title

    def digests(self) -> dict[str, str]:
        """Return the hash of each mask by frame number."""
        return {str(frame): self._by_frame[frame].digest for frame in self.frames}

    def labels(self, frame: int) -> tuple[Labels, list[int]]:
        """Return the (H, W) label map of a frame with the tracker's ids, and the ids it speaks of."""
        import numpy as np

        labels, _ = self._by_frame[frame].read()
        ids = self._new_ids[frame]
        if self.binary:
            return (labels > 0).astype(np.uint8) * np.uint8(_INSIDE_BINARY), ids
        return np.where(np.isin(labels, [*ids, IGNORE]), labels, 0).astype(np.uint8), ids

    def outside(self, object_id: int) -> int:
        """Return the user's id of a tracker's object."""
        return BINARY_OBJECT if self.binary else object_id

    def _inside(self, object_id: int) -> int:
        return _INSIDE_BINARY if self.binary else object_id

    def restore(self, labels: Labels) -> Labels:
        """Return a label map with the user's ids for one with the tracker's."""
        import numpy as np

        return (labels > 0).astype(np.uint8) * np.uint8(BINARY_OBJECT) if self.binary else labels


def find_masks(specs: Sequence[str], source: FrameSource, indices: Sequence[int]) -> list[GivenMask]:
    """Return the masks that ``--mask`` options name.

    Args:
        specs: Each a PNG (it lies on the first frame of ``indices``), ``FRAME=PNG``, or a folder of PNGs
            named by frame. FRAME is a frame's name, else its number in the input.
        source: Finds frames by name.
        indices: The frame numbers that will be processed. A folder may hold masks of other frames (they
            are left out); a mask that was named on its own may not.
    """
    found = []
    for spec in specs:
        path = Path(spec)
        key, separator, rest = spec.partition("=")
        if path.is_dir():
            found += _masks_of_folder(path, source, indices)
        elif separator and not path.exists():
            frame = source.find(key)
            if frame is None and key.isdigit():
                frame = int(key)
            if frame is None:
                raise InputError(
                    f"--mask {spec}: {source.title} has no frame {key}: give its name or its number"
                )
            found.append(_mask_file(Path(rest), frame, indices))
        else:
            found.append(_mask_file(path, indices[0], indices))
    return found


def _mask_file(path: Path, frame: int, indices: Sequence[int]) -> GivenMask:
    if not path.is_file():
        raise InputError(f"mask {path} does not exist: --mask takes PNG, FRAME=PNG or a folder")
    if frame not in indices:
        raise InputError(
            f"mask {path} lies on frame {frame}, which is not processed: "
            "change --start, --end, --step or the frame"
        )
    return GivenMask(frame, str(path), sha256(path), path=path)


def _masks_of_folder(folder: Path, source: FrameSource, indices: Sequence[int]) -> list[GivenMask]:
    frames = {path: source.find(name) for name, path in label_maps(folder).items()}
    strangers = [path.name for path, frame in frames.items() if frame is None]
    if strangers:
        raise InputError(f"mask folder {folder}: no frame of {source.title} is named like {few(strangers)}")
    found = [
        GivenMask(frame, str(path), sha256(path), path=path)
        for path, frame in frames.items()
        if frame is not None and frame in indices
    ]
    if not found:
        raise InputError(f"mask folder {folder} holds no PNG for a frame that is processed")
    return found


def masks_from_python(mask: Any, source: FrameSource, indices: Sequence[int]) -> list[GivenMask]:
    """Return the masks given to ``vosops.segment``: a path, spec or array, or a dict or list of them.

    A dict maps frames (number or name) to paths or (H, W) integer or bool arrays; a list holds specs.
    """
    if isinstance(mask, (str, Path)):
        return find_masks([str(mask)], source, indices)
    if isinstance(mask, Mapping):
        found = []
        for key, value in mask.items():
            if isinstance(value, (str, Path)):
                found += find_masks([f"{key}={value}"], source, indices)
                continue
            frame = key if isinstance(key, int) else source.find(str(key))
            if frame is None or frame not in indices:
                raise InputError(f"mask of frame {key!r}: that frame is not processed")
            found.append(_mask_array(value, frame))
        return found
    if isinstance(mask, (list, tuple)) and all(isinstance(item, (str, Path)) for item in mask):
        return find_masks([str(item) for item in mask], source, indices)
    return [_mask_array(mask, indices[0])]


def _mask_array(value: Any, frame: int) -> GivenMask:
    import numpy as np

    array = np.asarray(value)
    integers = np.issubdtype(array.dtype, np.integer) or array.dtype == bool
    if array.ndim != 2 or not integers or (array.size and (array.min() < 0 or array.max() > IGNORE)):
        raise InputError(f"mask must be (H, W) bool or integer ids 0..255, got {array.shape} {array.dtype}")
    labels = np.ascontiguousarray(array.astype(np.uint8))
    return GivenMask(
        frame, f"array of frame {frame}", hashlib.sha256(labels.tobytes()).hexdigest(), array=labels
    )
