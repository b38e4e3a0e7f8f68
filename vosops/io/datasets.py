"""What an INPUT is: a video file, a folder of frames, or the root of a DAVIS or YouTube-VOS data set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from .annotations import VOID, annotation_style, values_of
from .errors import InputError
from .files import sha256
from .frames import ALL_FRAMES, DEFAULT_FPS, FrameSource, ImageFolder
from .labels import read_labels
from .listing import IMAGE_SUFFIXES, chosen_names, few, label_maps, pictures, subfolders
from .masks import GivenMask
from .names import absence
from .picture_stack import PictureStack
from .pictures import opened, page_numbers
from .streams import Spooled, local_copy
from .video import VideoFile

_IMAGES = "JPEGImages"
_MASKS = "Annotations"
_DAVIS_RESOLUTION = "480p"
_DAVIS_RESOLUTIONS = (_DAVIS_RESOLUTION, "Full-Resolution", "1080p", "240p")


@dataclass(frozen=True)
class VideoSequence:
    """A sequence of a data set: its name, its frames and the folder of its masks."""

    name: str
    frames: Path
    masks: Path
    first_mask_only: bool


def is_dataset(path: Path) -> bool:
    """Say whether a path is the root of a data set."""
    return os.path.isdir(path / _IMAGES) and os.path.isdir(path / _MASKS)


def open_source(
    path: str | os.PathLike[str], fps: Fraction = DEFAULT_FPS, wanted: range = ALL_FRAMES
) -> FrameSource:
    """Open a video, a folder of frames, or one file of many pictures.

    ``fps`` is the rate of frames without times. Frames of a folder that are not ``wanted`` may be unusable.
    A pipe or an http(s) URL is copied to a temporary file first, to its end, for it can be read once.
    """
    name = os.fspath(path)
    copy = local_copy(name)
    if isinstance(copy, Spooled):
        source = _open_file(copy.path, fps, name)
        source.keep_alive = copy
        return source
    path = Path(path) if copy is None else copy
    absent = absence(path)
    if absent:
        raise InputError(f"{name} {absent}: give a video file, a folder of frames or a data set's root")
    if path.is_dir():
        found = list(pictures(path).values())
        if len(found) == 1 and _holds_several(found[0]):
            return PictureStack(found[0], fps, name)
        return ImageFolder(path, fps, wanted)
    if not path.is_file():
        raise InputError(f"{name} is not a file: give a video file, a folder of frames or a data set's root")
    return _open_file(path, fps, name)


def _open_file(path: Path, fps: Fraction, title: str) -> FrameSource:
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return VideoFile(path, title)
    if _holds_several(path, title):
        return PictureStack(path, fps, title)
    raise InputError(f"{title} is a single image: give a video file or the folder of its frames")


def _holds_several(path: Path, title: str | None = None) -> bool:
    with opened(
        path, title or str(path), "replace it, or give a video file or a folder of frames"
    ) as picture:
        return len(page_numbers(picture)) > 1


def find_sequences(
    root: Path, names: Sequence[str] = (), resolution: str | None = None
) -> list[VideoSequence]:
    """Return the sequences of a data set that have a mask, by name.

    DAVIS has ``JPEGImages/<resolution>/SEQ`` and masks of every frame, of which only the first that shows an
    object is given to the model; YouTube-VOS has ``JPEGImages/SEQ`` and masks of the frames where objects appear.

    Args:
        root: The data set.
        names: Only these sequences: names, or text files of names (:func:`vosops.io.listing.chosen_names`).
        resolution: For DAVIS, which one; 480p if there, else the first that is.
    """
    images, masks = root / _IMAGES, root / _MASKS
    found = [r for r in _DAVIS_RESOLUTIONS if (images / r).is_dir()]
    if resolution is not None and resolution not in found:
        raise InputError(
            f"{root} has no resolution {resolution}: it has {', '.join(found) or 'none (not DAVIS)'}"
        )
    davis = bool(found)
    if davis:
        chosen = resolution or found[0]
        images, masks = images / chosen, masks / chosen
    sequences = [
        VideoSequence(folder.name, folder, masks / folder.name, first_mask_only=davis)
        for folder in subfolders(images)
        if (masks / folder.name).is_dir()
    ]
    known = [sequence.name for sequence in sequences]
    wanted = chosen_names(names, known)
    missing = [name for name in wanted if name not in known]
    if missing:
        raise InputError(f"{images} has no sequence {few(missing)} with a mask")
    sequences = [s for s in sequences if not names or s.name in wanted]
    if not sequences:
        raise InputError(f"{images} holds no sequence that has masks in {masks}")
    return sequences


def masks_of_sequence(
    sequence: VideoSequence, source: FrameSource, indices: Sequence[int]
) -> list[GivenMask]:
    """Return the masks that the benchmark's protocol gives to the model.

    Where that is one, it is the first that shows an object. Whether 255 is an object or void is decided over all
    masks of the sequence, those of frames that are not processed too.
    """
    masks = label_maps(sequence.masks)
    found = []
    for name, path in masks.items():
        frame = source.find(name)
        if frame is not None and frame in indices:
            found.append((frame, path))
    if not found:
        raise InputError(f"{sequence.masks} holds no mask of a processed frame")
    if sequence.first_mask_only:
        found = [_first_object(sequence, found, masks.values())]
    folder = None if sequence.first_mask_only else sequence.masks
    return [GivenMask(frame, str(path), sha256(path), path=path, folder=folder) for frame, path in found]


def _first_object(
    sequence: VideoSequence, found: Sequence[tuple[int, Path]], all_masks: Iterable[Path]
) -> tuple[int, Path]:
    """Yield the first of the frames and masks that shows an object."""
    known: dict[Path, set[int]] = {}

    def values(path: Path) -> set[int]:
        if path not in known:
            known[path] = values_of(read_labels(path)[0])
        return known[path]

    def readable() -> Iterator[tuple[Path, set[int]]]:
        for path in all_masks:
            try:
                yield path, values(path)
            except InputError:
                continue  # it stops the sequence only if it comes before the first object

    binary = annotation_style(readable()).binary
    for frame, path in found:
        if values(path) - (set() if binary else {VOID}):
            return frame, path
    raise InputError(f"no mask in {sequence.masks} of a processed frame shows an object")
