"""Short clips of annotated videos, for training: crops that show the objects, mirrored and enlarged at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from vosops.io.annotations import AnnotationStyle, annotation_style, values_of
from vosops.io.labels import read_labels
from vosops.io.listing import label_maps, pictures, subfolders
from vosops.io.pictures import read_frame
from vosops.io.resize import resize_labels

IGNORED = 255
_TRIES = 10  # crops that are tried for one with an object in it
_LEAST_SHARE = 0.01  # of the crop, that objects cover then
_CACHED = 256  # frames that stay decoded


class ClipSampler:
    """Random clips from folders in the layout of DAVIS: JPEGImages/NAME/*.jpg, Annotations/NAME/*.png.

    images, annotations: the folders that hold a folder for each sequence. sequences: their names; None: all that have
    both. frames: of a clip: the first frame, which may lie up to max_distance frames before the rest, and then
    neighbours in time, as FEELVOS is trained. crop: side of the square clips. scales: range of the enlargement.
    binary: whatever is not 0 is one object, 255 too (DAVIS-2016); None: in the sequences whose annotations hold only 0
    and 255. Frames before the first annotation that shows an object are left out. seed: clips depend on it alone.
    Raises ValueError if no sequence is long enough (when called too: annotations are read when they are needed), and
    InputError if a folder cannot be listed (see vosops.io.listing).

    Each call gives (frames (T,3,crop,crop) float32 in [0, 1], labels (T,crop,crop) int64, objects): labels are 0, 1 to
    objects, and 255 for what is unknown or an object that the first frame does not show.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        sequences: Sequence[str] | None = None,
        *,
        frames: int = 3,
        max_distance: int = 25,
        crop: int = 384,
        scales: tuple[float, float] = (1.0, 1.3),
        binary: bool | None = None,
        seed: int = 0,
    ) -> None:
        if frames < 2:
            raise ValueError(f"frames must be at least 2, got {frames}")
        names = [p.name for p in subfolders(Path(images))] if sequences is None else sequences
        self.sequences = [_pairs(Path(images) / name, Path(annotations) / name) for name in names]
        self.sequences = [pairs for pairs in self.sequences if len(pairs) >= frames]
        if not self.sequences:
            raise ValueError(f"no sequence of {images} has {frames} annotated frames in {annotations}")
        self.frames = frames
        self.max_distance = max_distance
        self.crop = crop
        self.scales = scales
        self.binary = binary
        self._styles: dict[tuple[Path, Path], AnnotationStyle[int]] = {}
        self.random = random.Random(seed)

    def __call__(self) -> tuple[Tensor, Tensor, int]:
        """Return a random clip; see the class."""
        pairs, binary = self._choose()
        neighbours = self.frames - 1
        start = self.random.randrange(1, len(pairs) - neighbours + 1)
        first = self.random.randrange(max(0, start - self.max_distance), start)
        chosen = [pairs[i] for i in (first, *range(start, start + neighbours))]
        frames, labels = (torch.stack(x) for x in zip(*(_read(*pair) for pair in chosen), strict=True))
        if binary:
            labels = (labels > 0).long()
        if self.random.random() < 0.5:
            frames, labels = frames.flip(3), labels.flip(2)
        frames, labels = self._crop(frames, labels)
        ids = [i for i in labels[0].unique().tolist() if i not in (0, IGNORED)]
        numbered = torch.where(labels == 0, 0, IGNORED)
        for number, object_id in enumerate(ids, 1):
            numbered[labels == object_id] = number
        return frames.float() / 255, numbered, len(ids)

    def _choose(self) -> tuple[list[tuple[Path, Path]], bool]:
        """Return the frames of a sequence from its first object on, and whether whatever is not 0 is one object."""
        while self.sequences:
            pairs = self.random.choice(self.sequences)
            style = self._styles.get(pairs[0]) or self._style(pairs)
            self._styles[pairs[0]] = style
            shown = pairs[style.first :] if style.first is not None else []
            if len(shown) >= self.frames:
                return shown, style.binary
            self.sequences.remove(pairs)
        raise ValueError(f"no sequence has {self.frames} annotated frames from its first object on")

    def _style(self, pairs: Sequence[tuple[Path, Path]]) -> AnnotationStyle[int]:
        """Return where in a sequence the first object is, and how to read the labels."""
        values = ((place, values_of(read_labels(file)[0])) for place, (_, file) in enumerate(pairs))
        if self.binary is None:
            return annotation_style(values)
        void = set() if self.binary else {IGNORED}
        return AnnotationStyle(next((place for place, ids in values if ids - void), None), self.binary)

    def _crop(self, frames: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return a crop of random scale, whose first frame shows an object if one can be found."""
        scale = self.random.uniform(*self.scales)
        scale = max(scale, self.crop / min(frames.shape[2:]))
        size = max(self.crop, round(frames.shape[2] * scale)), max(self.crop, round(frames.shape[3] * scale))
        frames = functional.interpolate(frames.float(), size, mode="bilinear", antialias=True)
        ids = labels.unique().tolist()
        labels = torch.stack([resize_labels(x, size, ids) for x in labels])
        for _ in range(_TRIES):
            top, left = (self.random.randrange(side - self.crop + 1) for side in size)
            inside = (..., slice(top, top + self.crop), slice(left, left + self.crop))
            shown = labels[0][inside]
            if ((shown > 0) & (shown != IGNORED)).float().mean() >= _LEAST_SHARE:
                break
        return frames[inside], labels[inside]


def _pairs(images: Path, annotations: Path) -> list[tuple[Path, Path]]:
    """Return the frames that have an annotation, with it."""
    labels = label_maps(annotations) if annotations.is_dir() else {}
    return [(frame, labels[name]) for name, frame in pictures(images).items() if name in labels]


@lru_cache(_CACHED)
def _read(image: Path, annotation: Path) -> tuple[Tensor, Tensor]:
    """Return frame (3,H,W) uint8 and labels (H,W) int64."""
    import numpy as np

    frame = torch.from_numpy(read_frame(image)).permute(2, 0, 1)
    return frame, torch.from_numpy(read_labels(annotation)[0].astype(np.int64))
