"""Reading and writing label maps: object ids, palettes, and the frames of masks."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .annotations import annotation_style, values_of
from .errors import InputError
from .files import sha256
from .frames import FrameSource, frame_number
from .labels import davis_palette, labels_of_array, read_labels
from .listing import few, label_maps
from .names import absence
from .notes import warn
from .outputs import OwnedFile, complete_or_absent
from .slivers import slivers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Labels = npt.NDArray[np.uint8]

IGNORE = 255
BINARY_OBJECT = 255  # the id, to the outside, of the one object of 0/255 masks
_INSIDE_BINARY = 1  # ... and the id that the tracker sees, for which 255 means "ignore"
_SMOOTH_EDGES = 4  # this many ids that occur along borders only are not objects
_IDS_SHOWN = 3


def write_labels(path: Path | OwnedFile, labels: Labels, palette: bytes | None) -> None:
    """Write a (H, W) uint8 label map as a PNG, with a palette or grey; the file is complete or absent."""
    from PIL import Image

    image = Image.fromarray(labels)
    if palette is not None:
        image = image.convert("L")
        image.putpalette(palette)
    with complete_or_absent(path) as file:
        image.save(file, format="PNG")


@dataclass(frozen=True)
class GivenMask:
    """A mask given by the user: its frame, its origin, and the hash of its content.

    ``folder`` is set if not the mask itself but its folder was named.
    """

    frame: int
    title: str
    digest: str
    path: Path | None = None
    array: Labels | None = None
    folder: Path | None = None

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
    the output shows as 255 again; elsewhere 255 means "ignore". Of a folder, its masks of frames that are not
    processed count too, and those that show no object are left out. Holds no pixels of files: masks are read
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
            raise InputError(
                "no mask given: pass --mask PNG, FRAME=PNG or a folder (repeatable), --points, --box or "
                "--init NAME:CLASS"
            )
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
                    f"{other} and {mask.title} are both for frame {mask.frame}: combine them into one"
                )
            labels, palette = mask.read()
            if labels.shape != size:
                given, needed = f"{labels.shape[1]}x{labels.shape[0]}", f"{size[1]}x{size[0]}"
                turned = ", turned as the frames are seen" if labels.shape == size[::-1] else ""
                raise InputError(
                    f"mask {mask.title} is {given}, but the frames are {needed}: give one of that size{turned}"
                )
            self.palette = self.palette or palette
            histogram = np.bincount(labels.ravel(), minlength=256)
            ids = np.flatnonzero(histogram[1:]) + 1
            areas[mask.frame] = {int(i): int(histogram[i]) for i in ids}
            _check_edges(labels, mask.title)
            all_ids |= set(areas[mask.frame])
            self._by_frame[mask.frame] = mask
        self.binary = all_ids == {BINARY_OBJECT} and not self._other_ids_in_folders()
        if not (self.binary or only_new_objects):
            self._warn_of_unknown({frame: area[IGNORE] for frame, area in areas.items() if IGNORE in area})
        for frame in list(self._by_frame):
            ids_here = sorted(self._inside(i) for i in areas[frame] if self.binary or i != IGNORE)
            if only_new_objects:
                ids_here = [i for i in ids_here if i not in seen]
            if not ids_here:
                mask = self._by_frame[frame]
                if (only_new_objects or mask.folder) and (seen or frame != max(self._by_frame)):
                    del self._by_frame[frame]
                    continue
                if mask.folder:
                    raise InputError(f"no mask in {mask.folder} of a processed frame shows an object")
                raise InputError(f"mask {mask.title} shows no object: paint one with an id above 0")
            self._new_ids[frame] = ids_here
            for inside in ids_here:
                self.first_area.setdefault(self.outside(inside), areas[frame][self.outside(inside)])
            seen |= set(ids_here)
        if self.binary:
            self.palette = None
        elif self.palette is None:
            self.palette = davis_palette()

    def _other_ids_in_folders(self) -> bool:
        """Return whether readable masks next to those given contain an id other than 255."""
        given = {mask.path for mask in self._by_frame.values()}
        folders = {mask.folder for mask in self._by_frame.values() if mask.folder is not None}

        def others() -> Iterator[tuple[Path, set[int]]]:
            for folder in folders:
                for path in label_maps(folder).values():
                    if path not in given:
                        with suppress(InputError):
                            yield path, values_of(read_labels(path)[0])

        style = annotation_style(others())
        return style.first is not None and not style.binary

    def _warn_of_unknown(self, pixels: Mapping[int, int]) -> None:
        """Say that pixels of 255 are no object, given how many each frame's mask has; of the first mask alone."""
        for frame in sorted(pixels)[:1]:
            others = len(pixels) - 1
            more = f", like those of {others} other{'s' * (others > 1)}," if others else ""
            warn(
                f"mask {self._by_frame[frame].title}: its {pixels[frame]} pixels of value 255{more} count as unknown, "
                "because there are other ids too: give an object another id"
            )

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


def _check_edges(labels: Labels, title: str) -> None:
    """Refuse a mask most of whose ids are the steps of smooth edges; warn where these are few."""
    import numpy as np

    thin = slivers(labels)
    count = int((np.bincount(labels.ravel(), minlength=IGNORE + 1)[1:IGNORE] > 0).sum())
    if not thin or len(thin) * 2 < count:
        return
    ids = ", ".join(str(i) for i in thin[:_IDS_SHOWN]) + (", ..." if len(thin) > _IDS_SHOWN else "")
    where = f"shows the ids {ids} as thin strips along borders alone"
    if len(thin) >= _SMOOTH_EDGES:
        raise InputError(
            f"mask {title} {where}, {count} ids in all. Was it smoothed or resized? Threshold it"
        )
    warn(f"mask {title} {where}: if it was smoothed or resized, threshold it")


def find_masks(specs: Sequence[str], source: FrameSource, indices: Sequence[int]) -> list[GivenMask]:
    """Return the masks that ``--mask`` options name.

    Args:
        specs: Each a PNG (for the first frame of ``indices``), ``FRAME=PNG``, or a folder of PNGs
            named by frame. FRAME is a frame's name, else its number in the input.
        source: Finds frames by name.
        indices: The frame numbers that will be processed. A folder may hold masks of other frames (they
            are left out); a mask that was named on its own may not.
    """
    found = []
    for spec in specs:
        path = Path(spec)
        if os.path.isdir(path):
            found += _masks_of_folder(path, source, indices)
        elif "=" in spec and not os.path.exists(path):
            key, rest = _split(spec, source)
            found.append(_mask_file(Path(rest), _frame_of_name(key, source, f"--mask {spec}"), indices))
        else:
            found.append(_mask_file(path, indices[0], indices))
    return found


def _split(spec: str, source: FrameSource) -> tuple[str, str]:
    """Return FRAME and PNG of ``FRAME=PNG``; names of frames may hold "=" too."""
    places = [place for place, character in enumerate(spec) if character == "="]
    named = [place for place in places if source.find(spec[:place]) is not None]
    place = (named or places)[0]
    return spec[:place], spec[place + 1 :]


def _mask_file(path: Path, frame: int, indices: Sequence[int]) -> GivenMask:
    absent = absence(path) or (None if os.path.isfile(path) else "is not a file")
    if absent:
        raise InputError(f"mask {path} {absent}: --mask takes PNG, FRAME=PNG or a folder")
    if frame not in indices:
        raise InputError(
            f"mask {path} is for frame {frame}, which is not processed: "
            "change --start, --end, --step or the frame"
        )
    return _given(path, frame)


def _given(path: Path, frame: int, folder: Path | None = None) -> GivenMask:
    try:
        return GivenMask(frame, str(path), sha256(path), path=path, folder=folder)
    except OSError as error:
        raise InputError(f"mask {path} cannot be opened ({error.strerror}): fix or remove it") from error


def _masks_of_folder(folder: Path, source: FrameSource, indices: Sequence[int]) -> list[GivenMask]:
    frames = {path: source.find(name) for name, path in label_maps(folder).items()}
    strangers = [path.name for path, frame in frames.items() if frame is None]
    if strangers:
        raise InputError(f"mask folder {folder}: no frame of {source.title} is named like {few(strangers)}")
    found = [
        _given(path, frame, folder)
        for path, frame in frames.items()
        if frame is not None and frame in indices
    ]
    if not found:
        raise InputError(f"mask folder {folder} holds no PNG for a processed frame")
    return found


def masks_from_python(mask: Any, source: FrameSource, indices: Sequence[int]) -> list[GivenMask]:
    """Return the masks given to ``vosops.segment``: a path, spec or array, or a dict or list of them.

    A dict maps frames to paths or (H, W) integer or bool arrays; a list holds specs. An integer (of Python, numpy or
    torch) is a frame number, a text is a frame's name, else its number.
    """
    if isinstance(mask, (str, Path)):
        return find_masks([str(mask)], source, indices)
    if isinstance(mask, Mapping):
        found = []
        for key, value in mask.items():
            frame = _frame_of_key(key, source)
            if isinstance(value, (str, Path)):
                found.append(_mask_file(Path(value), frame, indices))
                continue
            if frame not in indices:
                raise InputError(f"mask of frame {key!r}: that frame is not processed")
            found.append(_mask_array(value, frame))
        return found
    if isinstance(mask, (list, tuple)) and all(isinstance(item, (str, Path)) for item in mask):
        return find_masks([str(item) for item in mask], source, indices)
    return [_mask_array(mask, indices[0])]


def _frame_of_key(key: Any, source: FrameSource) -> int:
    """Return the frame number that a key of a dict of masks means."""
    if isinstance(key, (str, Path)):
        return _frame_of_name(str(key), source, f"mask of frame {key}")
    try:
        if type(key).__name__ in ("bool", "bool_") or str(getattr(key, "dtype", "")) == "torch.bool":
            raise TypeError
        return operator.index(key)
    except (TypeError, ValueError):
        raise InputError(
            f"the keys of a dict of masks must be frame numbers or names, got {type(key).__name__} {key!r}"
        ) from None


def _frame_of_name(name: str, source: FrameSource, what: str) -> int:
    """Return the number of the frame of that name, else the number that it is."""
    frame = source.find(name)
    if frame is None:
        frame = frame_number(name)
    if frame is None:
        raise InputError(f"{what}: {source.title} has no frame {name}: give its name or its number")
    return frame


def _mask_array(value: Any, frame: int) -> GivenMask:
    labels = labels_of_array(value).copy()  # the caller may go on to change it
    return GivenMask(
        frame, f"array of frame {frame}", hashlib.sha256(labels.tobytes()).hexdigest(), array=labels
    )
