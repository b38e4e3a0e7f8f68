"""Clips for training, each a function of the seed and its number alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vosops.io.errors import InputError
from vosops.memory import parse_bytes
from vosops.training.config import Data
from vosops.training.motion import Window, sampled, walk
from vosops.training.sources import IGNORED, Decoded, Stills, open_source

__all__ = ["Clip", "ClipSamples"]

_TRIES = 20  # clips that are drawn for one that shows an object and whose files can be read
_CROPS = 10  # parts of a clip that are tried for one with an object in its first frame
_LEAST_SHARE = 0.01  # of the first frame, that objects cover then
_HUE = 0.25  # of the other colours' variation


@dataclass(frozen=True)
class Clip:
    """Frames (T,3,h,w) uint8, labels (T,h,w) uint8, how many objects, and why other clips were not read.

    Labels of objects are 0, 1 to `objects`, and 255 for what does not count; else they are classes.
    """

    frames: Tensor
    labels: Tensor
    objects: int
    problems: tuple[str, ...] = ()


class ClipSamples(torch.utils.data.Dataset[Clip]):
    """Clips by their number, without end, for a ``DataLoader``.

    data: the sources and what is made of them. size: (height, width) of clips. seed: with the number it decides all.
    per_step: how many clips a step takes, by which a clip's step is known. objects: labels are of objects, and each
    clip's first frame shows at least one; otherwise they are classes.

    What cannot be read is passed over for another clip, which the seed and the number decide too, and named in the
    clip's `problems`. Raises InputError if a source holds nothing, and on access where nothing can be read.
    """

    def __init__(self, data: Data, size: tuple[int, int], *, seed: int, per_step: int, objects: bool) -> None:
        self.data = data
        self.size = size
        self.seed = seed
        self.per_step = per_step
        self.objects = objects
        self.sources = [open_source(source, data.clips.frames) for source in data.train]
        self._decoded = Decoded(parse_bytes(data.cache))
        self._orders: dict[tuple[int, int], list[int]] = {}

    def __getitem__(self, index: int) -> Clip:
        """Return a clip; see the class."""
        step = index // self.per_step
        problems = []
        for attempt in range(_TRIES):
            choice = random.Random(f"{self.seed}/{index}/{attempt}")
            try:
                frames, labels = self._drawn(index, step, attempt, choice)
            except InputError as error:
                problems.append(str(error))
                continue
            if not self.objects:
                return Clip(frames, labels, 0, tuple(problems))
            labels, objects = numbered(labels, self.data.clips.objects, choice)
            if objects:
                return Clip(frames, labels, objects, tuple(problems))
        if problems:
            raise InputError(f"no clip of {_TRIES} can be read, the first because {problems[0]}")
        raise InputError(f"no clip of {_TRIES} shows an object in its first frame: enlarge the crop")

    def _drawn(self, index: int, step: int, attempt: int, choice: random.Random) -> tuple[Tensor, Tensor]:
        """Draw a source and an item of it, and return frames and labels of a clip."""
        active = [
            place
            for place, source in enumerate(self.data.train)
            if source.first_step <= step and (source.last_step is None or step < source.last_step)
        ]
        if not active:
            raise InputError(f"data.train must have a source for step {step}, got none")
        [chosen] = choice.choices(active, [self.data.train[place].weight for place in active])
        source = self.sources[chosen]
        item = self._item(chosen, index) if attempt == 0 else choice.randrange(len(source.items))
        clips = self.data.clips
        if not isinstance(source, Stills):
            frames, labels = source.frames(item, clips, step, choice, self._decoded, objects=self.objects)
            frames, labels = cropped(frames, labels, self._part(labels, choice), self.size)
        else:
            frame, labels = source.frames(item, self._decoded, clips.short_side)
            part = self._part(labels, choice)
            if clips.frames == 1:
                frames, labels = cropped(frame, labels, part, self.size)
            else:
                frames, labels = self._moving(source, frame[0], labels[0], part, choice)
        if clips.flip and choice.random() < 0.5:
            frames, labels = frames.flip(3), labels.flip(2)
        return coloured(frames, clips.colour, choice), labels

    def _item(self, source: int, index: int) -> int:
        """Return which item of a source a number stands for, in a random order that is another after each round."""
        count = len(self.sources[source].items)
        key = source, index // count
        if key not in self._orders:
            self._orders = {k: order for k, order in self._orders.items() if k[0] != source}
            order = list(range(count))
            random.Random(f"{self.seed}/{source}/{key[1]}").shuffle(order)
            self._orders[key] = order
        return self._orders[key][index % count]

    def _part(self, labels: Tensor, choice: random.Random) -> tuple[int, int, int, int]:
        """Return top, left, height and width of a part of random scale, whose first frame shows an object if it can."""
        height, width = labels.shape[1:]
        scale = max(choice.uniform(*self.data.clips.scale), self.size[0] / height, self.size[1] / width)
        rows, columns = (
            max(1, min(side, round(own / scale)))
            for side, own in zip((height, width), self.size, strict=True)
        )
        for _ in range(_CROPS):
            top, left = choice.randrange(height - rows + 1), choice.randrange(width - columns + 1)
            shown = labels[0, top : top + rows, left : left + columns]
            if not self.objects or _is_object(shown).float().mean() >= _LEAST_SHARE:
                break
        return top, left, rows, columns

    def _moving(
        self,
        source: Stills,
        frame: Tensor,
        labels: Tensor,
        part: tuple[int, int, int, int],
        choice: random.Random,
    ) -> tuple[Tensor, Tensor]:
        """Return a clip that is made of a still (3,H,W), and of what is cut out of others."""
        motion, count = self.data.motion, self.data.clips.frames
        frames, maps = self._walked(frame, labels, part, count, choice)
        if self.objects:
            for kind in ("objects", "distractors", "occluders"):
                if choice.random() < getattr(motion, kind):
                    frames, maps = self._pasted(source, frames, maps, kind, choice)
        each = [coloured(x[None], motion.colour, choice)[0] if t else x for t, x in enumerate(frames)]
        return torch.stack(each), maps

    def _walked(
        self,
        frame: Tensor,
        labels: Tensor,
        part: tuple[int, int, int, int],
        count: int,
        choice: random.Random,
        *,
        begin: bool = False,
    ) -> tuple[Tensor, Tensor]:
        size = (frame.shape[1], frame.shape[2])
        window = Window(self.size, size, part, flipped=False)
        steps = walk(self.data.motion, choice, count, begin=begin)
        shown = [sampled(frame, labels, window, moved) for moved in steps]
        frames, maps = zip(*shown, strict=True)
        return torch.stack(frames), torch.stack(maps)

    def _pasted(
        self, source: Stills, frames: Tensor, maps: Tensor, kind: str, choice: random.Random
    ) -> tuple[Tensor, Tensor]:
        """Paste what is cut out of another still: behind the objects, or before them as an occluder."""
        item = choice.randrange(len(source.items))
        frame, labels = source.frames(item, self._decoded, self.data.clips.short_side)
        part = self._part(labels, choice)
        cut, own = self._walked(frame[0], labels[0], part, len(frames), choice, begin=True)
        inside = _is_object(own)
        if kind != "occluders":
            inside &= ~_is_object(maps)
        frames = torch.where(inside[:, None], cut, frames)
        number = next(n for n in range(1, IGNORED) if not (maps == n).any()) if kind == "objects" else 0
        return frames, maps.masked_fill(inside, number)


def cropped(
    frames: Tensor, labels: Tensor, part: tuple[int, int, int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return a part (top, left, height, width) of frames (T,3,H,W) uint8 and labels (T,H,W) uint8, at a size."""
    top, left, rows, columns = part
    frames = frames[:, :, top : top + rows, left : left + columns]
    labels = labels[:, top : top + rows, left : left + columns]
    if (rows, columns) == size:
        return frames, labels
    frames = functional.interpolate(frames, size, mode="bilinear", antialias=True)
    near = functional.interpolate(labels[:, None].float(), size, mode="nearest-exact")
    return frames, near[:, 0].to(labels.dtype)


def coloured(frames: Tensor, most: float, choice: random.Random) -> Tensor:
    """Return frames (T,3,h,w) uint8 with other brightness, contrast, saturation and hue, the same for all."""
    if not most:
        return frames
    from torchvision.transforms.v2 import functional as colours

    brightness, contrast, saturation = (choice.uniform(1 - most, 1 + most) for _ in range(3))
    hue = choice.uniform(-_HUE * most, _HUE * most)
    frames = colours.adjust_brightness(frames, brightness)
    frames = colours.adjust_contrast(frames, contrast)
    frames = colours.adjust_saturation(frames, saturation)
    adjusted: Tensor = colours.adjust_hue(frames, hue)
    return adjusted


def numbered(labels: Tensor, most: int, choice: random.Random) -> tuple[Tensor, int]:
    """Give the objects that the first frame of labels (T,h,w) shows numbers from 1 on, at most `most` of them.

    Its other objects are background; what the first frame does not show is unknown, 255.
    """
    shown = [i for i in labels[0].unique().tolist() if i not in (0, IGNORED)]
    ids = sorted(choice.sample(shown, most)) if len(shown) > most else shown
    table = torch.full((256,), IGNORED, dtype=torch.uint8)
    table[[0, *shown]] = 0
    for number, object_id in enumerate(ids, 1):
        table[object_id] = number
    return table[labels.long()], len(ids)


def _is_object(labels: Tensor) -> Tensor:
    return (labels > 0) & (labels != IGNORED)
