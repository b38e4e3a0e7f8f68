"""The sources of a training run: lists of annotated frames, and a cache of decoded frames."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vosops.io.annotations import AnnotationStyle, annotation_style, values_of
from vosops.io.datasets import find_sequences, is_dataset
from vosops.io.errors import InputError
from vosops.io.labels import read_labels
from vosops.io.listing import chosen_names, few, label_maps, pictures, shown, subfolders
from vosops.io.pictures import read_frame
from vosops.io.resize import resize_frame, resize_labels
from vosops.training.config import Clips, Source

__all__ = [
    "IGNORED",
    "AnnotatedFrames",
    "Decoded",
    "Stills",
    "Videos",
    "meant",
    "open_source",
    "places_of",
    "sequences_of",
]

IGNORED = 255
_FRAMES, _MASKS = "frames", "masks"  # of a sequence that is a folder with both


@dataclass
class Decoded:
    """Frames and labels that have been read, of `most` bytes at most; the least recently used go first."""

    most: int
    bytes: int = 0
    kept: OrderedDict[tuple[Path, Path, int | None], tuple[Tensor, Tensor]] = field(
        default_factory=OrderedDict
    )

    def read(self, image: Path, labels: Path, short_side: int | None) -> tuple[Tensor, Tensor]:
        """Return a frame (3,H,W) and its labels (H,W), both uint8, brought to a short side unless it is None.

        Raises:
            InputError: A file cannot be read, or the two differ in size.
        """
        key = (image, labels, short_side)
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        found = _read(image, labels, short_side)
        self.bytes += _bytes_of(found)
        self.kept[key] = found
        while self.bytes > self.most and len(self.kept) > 1:
            _, dropped = self.kept.popitem(last=False)
            self.bytes -= _bytes_of(dropped)
        return found


def _bytes_of(pair: tuple[Tensor, Tensor]) -> int:
    return pair[0].nbytes + pair[1].nbytes


def _read(image: Path, labels: Path, short_side: int | None) -> tuple[Tensor, Tensor]:
    frame = torch.from_numpy(read_frame(image)).permute(2, 0, 1).contiguous()
    ids = torch.from_numpy(read_labels(labels)[0])
    if frame.shape[1:] != ids.shape:
        sizes = " and ".join(f"{x.shape[-1]}x{x.shape[-2]}" for x in (frame, ids))
        raise InputError(f"{shown(image)} and {shown(labels)} must have the same size, got {sizes}")
    if short_side is not None and short_side != min(ids.shape):
        scale = short_side / min(ids.shape)
        size = max(1, round(ids.shape[0] * scale)), max(1, round(ids.shape[1] * scale))
        frame, ids = resize_frame(frame, size), resize_labels(ids, size, ids.unique().tolist())
    return frame, ids


@dataclass(frozen=True)
class AnnotatedFrames:
    """Annotated frames of one video, or a still: its name, and the files of each frame and its labels."""

    name: str
    frames: tuple[tuple[Path, Path], ...]


class Stills:
    """Images with a label map of the same name."""

    moving = True
    """Whether the frames of a clip have to be made of one."""

    def __init__(self, source: Source) -> None:
        assert source.images is not None and source.masks is not None
        self.source = source
        images, masks = pictures(source.images), label_maps(source.masks)
        self.items = [
            AnnotatedFrames(name, ((images[name], masks[name]),)) for name in images if name in masks
        ]
        if not self.items:
            raise InputError(f"{source.images} holds no image with a mask of the same name in {source.masks}")

    def frames(self, item: int, decoded: Decoded, short_side: int | None) -> tuple[Tensor, Tensor]:
        """Return the frame (1,3,H,W) and its labels (1,H,W), both uint8."""
        frame, labels = decoded.read(*self.items[item].frames[0], short_side)
        return frame[None], meant(labels, self.source, _is_binary([labels], self.source))[None]


class Videos:
    """Videos in which some frames have a label map."""

    moving = False

    def __init__(self, source: Source, least: int) -> None:
        assert source.root is not None
        self.source = source
        self.items = [x for x in _sequences(source) if len(x.frames) >= least]
        if not self.items:
            raise InputError(f"{source.root} holds no sequence with {least} annotated frames")
        self._styles: dict[int, AnnotationStyle[int]] = {}

    def frames(
        self,
        item: int,
        clips: Clips,
        step: int,
        choice: random.Random,
        decoded: Decoded,
        *,
        objects: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the frames (T,3,H,W) of a random clip and their labels (T,H,W), both uint8.

        objects: labels are of objects, and the first frame is not one before any is shown.
        """
        sequence = self.items[item].frames
        first, binary = 0, bool(self.source.binary)
        if objects:
            style = self._style(item)
            if style.first is None or len(sequence) - style.first < clips.frames:
                raise InputError(
                    f"{shown(sequence[0][1].parent)} has no {clips.frames} frames from its first object on"
                )
            first, binary = style.first, style.binary
        chosen = places_of(len(sequence) - first, clips, clips.gap.at(step), choice)
        pairs = [decoded.read(*sequence[first + place], clips.short_side) for place in chosen]
        if any(labels.shape != pairs[0][1].shape for _, labels in pairs):
            raise InputError(f"{shown(sequence[0][0].parent)} holds frames of different sizes")
        frames, labels = (torch.stack(x) for x in zip(*pairs, strict=True))
        return frames, meant(labels, self.source, binary)

    def _style(self, item: int) -> AnnotationStyle[int]:
        """Return where in a sequence the first object is, and how to read the labels; reads what it takes once."""
        if item not in self._styles:
            maps = [labels for _, labels in self.items[item].frames]
            values = ((place, values_of(read_labels(file)[0])) for place, file in enumerate(maps))
            if self.source.binary is None:
                self._styles[item] = annotation_style(values)
            else:
                void = set() if self.source.binary else {IGNORED, *self.source.ignored}
                first = next((place for place, ids in values if ids - void), None)
                self._styles[item] = AnnotationStyle(first, self.source.binary)
        return self._styles[item]


def places_of(count: int, clips: Clips, gap: int, choice: random.Random) -> list[int]:
    """Return which of `count` frames a clip is made of; the gaps are what fits where the video is short.

    >>> import random
    >>> from vosops.training.config import Clips
    >>> places_of(9, Clips(frames=3, reverse=False), 2, random.Random(0))
    [3, 4, 6]
    """
    further = clips.frames - 1
    if clips.neighbours and further:
        start = choice.randrange(1, count - further + 1)
        chosen = [choice.randrange(max(0, start - gap), start), *range(start, start + further)]
    else:
        most = min(gap, (count - 1) // further) if further else 1
        steps = [choice.randint(1, max(1, most)) for _ in range(further)]
        place = choice.randrange(count - sum(steps))
        chosen = [place]
        for step in steps:
            chosen.append(chosen[-1] + step)
    if clips.reverse and further and choice.random() < 0.5:
        return [count - 1 - place for place in chosen]
    return chosen


def open_source(source: Source, least: int) -> Stills | Videos:
    """List what a source holds; InputError if it has nothing. least: annotated frames that a video must have."""
    return Stills(source) if source.kind == "stills" else Videos(source, least)


def sequences_of(source: Source) -> list[AnnotatedFrames]:
    """Return the annotated frames of each video, or each still, of a source."""
    return list(open_source(source, 1).items)


def _sequences(source: Source) -> list[AnnotatedFrames]:
    root = source.root
    assert root is not None
    if is_dataset(root):
        found = {s.name: (s.frames, s.masks) for s in find_sequences(root, (), source.resolution)}
    else:
        found = {
            folder.name: (folder / _FRAMES, folder / _MASKS)
            for folder in subfolders(root)
            if (folder / _FRAMES).is_dir() and (folder / _MASKS).is_dir()
        }
        if not found:
            raise InputError(
                f"{shown(root)} must hold JPEGImages and Annotations, or folders with {_FRAMES} and {_MASKS}"
            )
    wanted = chosen_names(source.sequences, found, "sequences") if source.sequences else list(found)
    without = chosen_names(source.without, found, "without") if source.without else []
    missing = [name for name in (*wanted, *without) if name not in found]
    if missing:
        raise InputError(f"{shown(root)} has no sequence {few(missing)} with masks")
    return [
        AnnotatedFrames(name, _pairs(*found[name]))
        for name in found
        if name in wanted and name not in without
    ]


def _pairs(frames: Path, masks: Path) -> tuple[tuple[Path, Path], ...]:
    labels = label_maps(masks)
    return tuple((frame, labels[name]) for name, frame in pictures(frames).items() if name in labels)


def _is_binary(labels: Sequence[Tensor], source: Source) -> bool:
    """Return whether whatever is not 0 is one object."""
    if source.binary is not None:
        return source.binary
    return set().union(*(x.unique().tolist() for x in labels)) <= {0, IGNORED}


def meant(labels: Tensor, source: Source, binary: bool) -> Tensor:
    """Return the labels as their source means them."""
    if binary:
        return (labels > 0).to(labels.dtype)
    for value in source.ignored:
        labels = labels.masked_fill(labels == value, IGNORED)
    return labels
