"""Pictures for streams: one object of a video or a still, played in a window, moved, pasted and spoiled at random.

A `Shot` is what a source shows of one sequence of frames, or of one still. A `Scene` plays a shot, or a cut-out of one
before another, in a window of fixed size, for any number of frames. Everything random comes from the generators that a
scene is given, so that the same seed plays the same scene.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from vosops.io.annotations import VOID, annotation_style, values_of
from vosops.io.errors import InputError
from vosops.io.labels import read_labels
from vosops.io.pictures import read_frame

__all__ = ["Camera", "Scene", "Shot", "degraded"]

_CACHED = 512  # frames that stay decoded
_LEAST_PIXELS = 20  # of an object in a frame; a smaller one is not seen
_SIZES = (40.0, 330.0)  # of an object in the window: the square root of its box' area, in pixels
_PASTED_SIZES = (50.0, 250.0)
_WALK = {
    "angle": 0.07,
    "zoom": 0.05,
    "x": 9.0,
    "y": 7.0,
    "aspect": 0.04,
}  # a frame's change of what is pasted
_BEHIND = 0.5  # of that, for what is behind it
_SHAKE = {"angle": 0.012, "zoom": 0.012, "x": 3.0, "y": 3.0, "aspect": 0.0}  # of a video's camera
_BEND = 0.018  # standard deviation of the change of a warp's points, of half a window
_BEND_KEPT = 0.9  # of the warp before
_BEND_POINTS = 4  # in a row and a column
_DOWN = 4  # the stride at which masks are spoiled
_STILL_GAPS = (1, 1, 1, 2, 3)  # frames of a video from one that is played to the next
_COVERED = 0.85  # of the window's longer side, that a video covers at least
_WHOLE_STILLS = 0.35  # of the stills are not cut out, but warped as a whole
_TRIES = 50  # shots that are drawn for one that shows an object
_IN_VIEW = 0.35  # least share of an object's box inside the window

Box = tuple[float, float, float, float]


@dataclass(eq=False)
class Shot:
    """The frames of a sequence with their label maps, or a still with its own.

    frames: (image, label map) each. scale: pixels of the computation for a pixel of the frames, about. problem: why its
    label maps cannot be read, once they have been tried.
    """

    name: str
    frames: tuple[tuple[Path, Path], ...]
    scale: float = 1.0
    problem: str = ""

    @cached_property
    def binary(self) -> bool:
        """Whether whatever is not 0 in its label maps is one object."""
        values = ((i, values_of(read_labels(labels)[0])) for i, (_, labels) in enumerate(self.frames))
        return annotation_style(values).binary

    @cached_property
    def boxes(self) -> list[dict[int, Box]]:
        """The (left, top, right, bottom) of each object in each frame, in pixels; reads all label maps."""
        found = []
        for place in range(len(self.frames)):
            labels = self._labels(place)
            boxes: dict[int, Box] = {}
            for number in labels.unique().tolist():
                rows, columns = (labels == number).nonzero(as_tuple=True)
                if number not in (0, VOID) and len(rows) >= _LEAST_PIXELS:
                    left, right = int(columns.min()), int(columns.max()) + 1
                    boxes[number] = (left, int(rows.min()), right, int(rows.max()) + 1)
            found.append(boxes)
        return found

    @cached_property
    def seen(self) -> dict[int, list[int]]:
        """The frames in which each object is; empty where a label map cannot be read, which `problem` then tells."""
        try:
            self.boxes  # noqa: B018
        except InputError as error:
            self.problem = str(error)
            return {}
        numbers = sorted({number for boxes in self.boxes for number in boxes})
        return {n: [i for i, boxes in enumerate(self.boxes) if n in boxes] for n in numbers}

    @cached_property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of its first label map."""
        labels = self._labels(0)
        return labels.shape[0], labels.shape[1]

    def read(self, place: int) -> tuple[Tensor, Tensor]:
        """Return a frame (3,H,W) in [0, 1] and its labels (H,W) uint8, of one object if `binary`."""
        return _image(self.frames[place][0]).float() / 255, self._labels(place)

    def _labels(self, place: int) -> Tensor:
        labels = _label_map(self.frames[place][1])
        return (labels > 0).byte() if self.binary else labels


@lru_cache(_CACHED)
def _image(path: Path) -> Tensor:
    return torch.from_numpy(read_frame(path)).permute(2, 0, 1)


@lru_cache(_CACHED)
def _label_map(path: Path) -> Tensor:
    return torch.from_numpy(read_labels(path)[0].copy())


def _size(box: Box) -> float:
    return math.sqrt((box[2] - box[0]) * (box[3] - box[1]))


@dataclass
class Camera:
    """How a shot is seen in a window: the centre in its pixels, window pixels per pixel, and a walk from there."""

    centre: tuple[float, float]
    scale: float
    size: tuple[int, int]
    flip: bool = False
    aspect: float = 1.0
    tilt: float = 0.0
    state: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_WALK, 0.0))
    bend: Tensor | None = None

    def walk(self, rng: random.Random, amounts: dict[str, float], factor: float = 1.0) -> None:
        """Move on by a random step."""
        for name, amount in amounts.items():
            self.state[name] += rng.gauss(0, amount * factor)

    def warp(self, generator: torch.Generator) -> None:
        """Bend the picture on by a smooth random field."""
        step = _smooth(self.size, _BEND_POINTS, _BEND, 2, generator)
        self.bend = step if self.bend is None else self.bend * _BEND_KEPT + step

    def grid(self, frame: tuple[int, int]) -> Tensor:
        """Return the sampling grid (1,S,W,2) of a frame of that size."""
        height, width = self.size
        y, x = torch.meshgrid(
            torch.arange(height) + 0.5 - height / 2, torch.arange(width) + 0.5 - width / 2, indexing="ij"
        )
        if self.flip:
            x = -x
        angle, scale = self.tilt + self.state["angle"], self.scale * math.exp(self.state["zoom"])
        cosine, sine = math.cos(angle), math.sin(angle)
        stretch = self.aspect * math.exp(self.state["aspect"])
        u = (cosine * x - sine * y) / scale / stretch + self.centre[0] + self.state["x"] / self.scale
        v = (sine * x + cosine * y) / scale + self.centre[1] + self.state["y"] / self.scale
        grid = torch.stack([u / frame[1] * 2 - 1, v / frame[0] * 2 - 1], -1)[None]
        return grid if self.bend is None else grid + self.bend.permute(0, 2, 3, 1)


def _smooth(
    size: tuple[int, int], points: int, deviation: float, channels: int, generator: torch.Generator
) -> Tensor:
    """Return a smooth random field (1,channels,*size)."""
    coarse = torch.randn(1, channels, points, points, generator=generator) * deviation
    return functional.interpolate(coarse, size, mode="bicubic", align_corners=True)


@dataclass(frozen=True)
class _Colour:
    """A change of brightness, contrast, saturation, tint and sharpness, for a scene's length."""

    brightness: float
    contrast: float
    saturation: float
    tint: tuple[float, float, float]
    sharpness: float

    @classmethod
    def drawn(cls, rng: random.Random) -> _Colour:
        return cls(
            rng.uniform(-0.15, 0.15),
            rng.uniform(0.75, 1.3),
            rng.uniform(0.5, 1.5),
            (rng.gauss(0, 0.03), rng.gauss(0, 0.03), rng.gauss(0, 0.03)),
            max(0.0, rng.uniform(-0.6, 1.0)),
        )

    def of(self, image: Tensor, flicker: float) -> Tensor:
        image = (image - 0.5) * self.contrast + (0.5 + self.brightness + flicker)
        image = image + torch.tensor(self.tint).view(3, 1, 1)
        grey = image.mean(0, keepdim=True)
        image = (image - grey) * self.saturation + grey
        if self.sharpness:
            blurred = functional.avg_pool2d(image[None], 3, 1, 1, count_include_pad=False)[0]
            image = image + (image - blurred) * self.sharpness
        return image.clamp(0, 1)


class _Layer:
    """A shot that plays from a frame on, forwards and backwards, before a camera."""

    def __init__(self, shot: Shot, number: int, order: list[int], camera: Camera, rng: random.Random) -> None:
        self.shot, self.number, self.order, self.camera = shot, number, order, camera
        self.colour = _Colour.drawn(rng)

    def render(self, place: int, flicker: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the image (3,S,W), labels (S,W) uint8 and where the frame has pixels, bool (S,W)."""
        image, labels = self.shot.read(place)
        grid = self.camera.grid((image.shape[1], image.shape[2]))
        seen = functional.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)[0]
        # Each label's share by itself, so that an enlarged mask has no stairs.
        numbers = [n for n in labels.unique().tolist() if n]
        if numbers:
            shares = torch.stack([(labels == n).float() for n in numbers])
            shares = functional.grid_sample(
                shares[None], grid, padding_mode="reflection", align_corners=False
            )[0]
            best, winner = shares.max(0)
            found = torch.tensor(numbers, dtype=torch.uint8)[winner]
            seen_labels = torch.where(best > 0.5, found, torch.zeros_like(found))
        else:
            seen_labels = torch.zeros(grid.shape[1:3], dtype=torch.uint8)
        inside = grid.abs().amax(-1)[0] <= 1
        return self.colour.of(seen, flicker), seen_labels, inside


@dataclass(frozen=True)
class Mix:
    """The frequency of each kind of scene, from 0 to 1."""

    stills: float = 0.25
    """Cut-outs of stills."""
    composites: float = 0.25
    """Cut-outs of videos; all other scenes are videos as they are."""
    late: float = 0.4
    """Scenes that begin long after the labelled frame, from a mask that a tracker might have left."""
    second: float = 0.5
    """Composites whose background has an object: it is the second to be tracked, or else a distractor."""
    occluders: float = 0.25
    """Composites whose background's object passes before the cut-out."""


class Scene:
    """A scene from shots: `next` gives (image (3,S,W) float32, labels (S,W) uint8: 0, 1, 2 and 255 for unknown).

    videos, stills: shots; either may be empty. size: of the window, (rows, columns), multiples of 32. The first frame
    is labelled; a `late` scene has one more from the time between, and one that a tracker has just left, before it goes
    on frame by frame.
    """

    def __init__(
        self,
        videos: Sequence[Shot],
        stills: Sequence[Shot],
        size: tuple[int, int],
        mix: Mix,
        rng: random.Random,
        length: int,
    ) -> None:
        self.size, self.mix, self.rng = size, mix, rng
        self.generator = torch.Generator().manual_seed(rng.getrandbits(62))
        self.late = rng.random() < mix.late
        self._steps = length + (3 if self.late else 1)
        chance = rng.random()
        if stills and (chance < mix.stills or not videos):
            self._paste(self._choose(stills), [*videos, *stills])
        elif chance < mix.stills + mix.composites:
            self._paste(self._choose(videos), [*videos, *stills])
        else:
            self._play(self._choose(videos))
        self._step = 0

    def _choose(self, shots: Sequence[Shot]) -> Shot:
        """Return one of the shots that shows an object."""
        for _ in range(_TRIES):
            shot = self.rng.choice(shots)
            if shot.seen:
                return shot
        problem = next((": " + shot.problem for shot in shots if shot.problem), "")
        raise InputError(
            f"training data must show objects, got {_TRIES} sequences or stills without{problem}"
        )

    def _play(self, shot: Shot) -> None:
        """Play a video as it is, enlarged at random, with a camera that shakes."""
        rng = self.rng
        number = rng.choice(list(shot.seen))
        order = self._order(shot, number)
        present = [shot.boxes[i][number] for i in order if number in shot.boxes[i]]
        size = sum(map(_size, present)) / len(present)
        scale = shot.scale * math.exp(rng.uniform(math.log(0.55), math.log(1.15)))
        scale = max(scale, _SIZES[0] / size, _COVERED * self._covering(shot))
        scale = min(scale, _SIZES[1] / size)
        after = order[2:] if self.late else order
        camera = Camera(
            self._on(shot, self._centre(shot, number, after, scale), scale),
            scale,
            self.size,
            rng.random() < 0.5,
            rng.uniform(0.87, 1.15),
            rng.uniform(-0.12, 0.12) if rng.random() < 0.4 else 0.0,
        )
        self.front = _Layer(shot, number, self._in_view(shot, number, order, camera), camera, rng)
        self.behind: _Layer | None = None
        self.bends = False
        self.amounts = _SHAKE if rng.random() < 0.5 else {}

    def _paste(self, shot: Shot, others: Sequence[Shot]) -> None:
        """Move a cut-out before another picture, or a still as a whole."""
        rng = self.rng
        number = rng.choice(list(shot.seen))
        order = self._order(shot, number)
        box = shot.boxes[order[0]].get(number) or shot.boxes[shot.seen[number][0]][number]
        wanted = math.exp(rng.uniform(*map(math.log, _PASTED_SIZES)))
        scale = min(max(wanted / _size(box), 0.35 * shot.scale), 2.5 * shot.scale)
        whole = len(shot.frames) == 1 and rng.random() < _WHOLE_STILLS
        if whole:
            scale = max(scale, self._covering(shot))
            whole = _size(box) * scale < _SIZES[1]
        centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        if whole:
            centre = self._on(shot, centre, scale)
        camera = Camera(centre, scale, self.size, rng.random() < 0.5)
        self.front = _Layer(shot, number, self._in_view(shot, number, order, camera), camera, rng)
        self.bends = len(shot.frames) == 1 or rng.random() < 0.3
        self.amounts = _WALK
        self.behind = None
        if not whole:
            other = self._choose([one for one in others if one is not shot] or [shot])
            second = rng.choice(list(other.seen))
            order = self._order(other, second)
            height, width = other.size
            scale = max(self._covering(other), other.scale * 0.7) * rng.uniform(1.0, 1.4)
            camera = Camera((width / 2, height / 2), scale, self.size, rng.random() < 0.5)
            self.behind = _Layer(other, second, order, camera, rng)
            self.occludes = rng.random() < self.mix.occluders
            self.tracks_second = rng.random() < self.mix.second

    def _covering(self, shot: Shot) -> float:
        """Return the scale at which a frame just covers the window."""
        return max(window / side for window, side in zip(self.size, shot.size, strict=True))

    def _on(self, shot: Shot, centre: tuple[float, float], scale: float) -> tuple[float, float]:
        """Return the centre (x, y), moved so that the frame fills the window as far as it can."""
        moved = []
        for at, window, side in zip(centre, self.size[::-1], shot.size[::-1], strict=True):
            half = min(window / scale / 2, side / 2)
            moved.append(min(max(at, half), side - half))
        return moved[0], moved[1]

    def _order(self, shot: Shot, number: int) -> list[int]:
        """Return the frames to play: from one that shows the object on, and back again at the end."""
        rng, seen, count = self.rng, shot.seen[number], len(shot.frames)
        if count == 1:
            return [0] * self._steps
        gap, sign, place = rng.choice(_STILL_GAPS), rng.choice((1, -1)), rng.choice(seen)
        order = []
        for _ in range(self._steps - (2 if self.late else 0)):
            order.append(place)
            if not 0 <= place + sign * gap < count:
                sign = -sign
            place = min(max(place + sign * gap, 0), count - 1)
        if not self.late:
            return order
        first = rng.choice(seen)
        low, high = sorted((first, order[0]))
        return [first, rng.choice([i for i in seen if low <= i <= high]), *order]

    def _centre(self, shot: Shot, number: int, order: Sequence[int], scale: float) -> tuple[float, float]:
        """Return the centre of a window that holds the object for as many frames as it can."""
        left = top = math.inf
        right = bottom = -math.inf
        for place in order:
            box = shot.boxes[place].get(number)
            if box is None:
                continue
            wide = max(right, box[2]) - min(left, box[0]), max(bottom, box[3]) - min(top, box[1])
            if right > left and (wide[0] * scale > self.size[1] - 16 or wide[1] * scale > self.size[0] - 12):
                break
            left, top = min(left, box[0]), min(top, box[1])
            right, bottom = max(right, box[2]), max(bottom, box[3])
        shift = [self.rng.uniform(-30, 30) / scale for _ in range(2)]
        return (left + right) / 2 + shift[0], (top + bottom) / 2 + shift[1]

    def _in_view(self, shot: Shot, number: int, order: list[int], camera: Camera) -> list[int]:
        """Return an order that turns back where the object leaves the window."""
        if len(shot.frames) == 1:
            return order
        start = 2 if self.late else 0
        half = self.size[1] / 2 / camera.scale, self.size[0] / 2 / camera.scale
        kept = order[: start + 1]
        for place in order[start + 1 :]:
            box = shot.boxes[place].get(number)
            if box is not None:
                across = [
                    min(box[i + 2], camera.centre[i] + half[i]) - max(box[i], camera.centre[i] - half[i])
                    for i in (0, 1)
                ]
                area = max(across[0], 0) * max(across[1], 0)
                if area < _IN_VIEW * _size(box) ** 2:
                    break
            kept.append(place)
        played = kept[start:]
        there_and_back = [*played, *played[-2:0:-1]]
        wanted = len(order) - start
        return [*order[:start], *(there_and_back[i % len(there_and_back)] for i in range(wanted))]

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the next frame: see the class."""
        step, self._step = self._step, self._step + 1
        jumps = 3 if self.late and step in (1, 2) else 1
        for _ in range(jumps if step else 0):
            self.front.camera.walk(self.rng, self.amounts)
            if self.behind is not None:
                self.behind.camera.walk(self.rng, _WALK, _BEHIND)
            if self.bends:
                self.front.camera.warp(self.generator)
        camera = self.front.camera
        place = self.front.order[step]
        centre = camera.centre
        box = self.front.shot.boxes[place].get(self.front.number)
        if self.late and step < 2 and box is not None and len(self.front.shot.frames) > 1:
            camera.centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2  # the time before had another view
        image, labels, inside = self.front.render(place, self.rng.uniform(-0.02, 0.02))
        camera.centre = centre
        own = labels == self.front.number
        if self.behind is None:
            unknown = (labels == VOID) | ~inside  # a mirror image of the frame is no truth
            return image, torch.where(unknown, VOID, own.byte()).byte()
        back, back_labels, _ = self.behind.render(self.behind.order[step], self.rng.uniform(-0.02, 0.02))
        other = back_labels == self.behind.number
        own = own & inside
        alpha = functional.avg_pool2d(own[None, None].float(), 3, 1, 1)[0, 0]
        if self.occludes:
            alpha, own = alpha * ~other, own & ~other
        image = image * alpha + back * (1 - alpha)
        labels = own.byte()
        if self.tracks_second:
            labels[other & ~own] = 2
        return image, labels


def degraded(probabilities: Tensor, rng: random.Random) -> Tensor:
    """Return masks (O,H,W) as a tracker might have left them: blurred, eaten into, grown; not where none would be left.

    A fifth of them stays as it is.
    """
    if rng.random() < 0.2 or not len(probabilities):
        return probabilities
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    size = (probabilities.shape[1] // _DOWN, probabilities.shape[2] // _DOWN)
    x = functional.interpolate(probabilities[None], size, mode="area")
    radius = rng.choice((1, 2, 2, 3, 4))
    for _ in range(2):
        x = functional.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)
    noise = _smooth(size, rng.choice((4, 6, 10, 16)), rng.uniform(0, 0.28), x.shape[1], generator)
    x = x + noise + rng.uniform(-0.1, 0.1)
    x = functional.interpolate(x, probabilities.shape[1:], mode="bilinear", align_corners=False)[0]
    x = torch.sigmoid((x - 0.5) * rng.uniform(8, 40))
    left = (x > 0.5).flatten(1).any(1)[:, None, None]
    return torch.where(left, x, probabilities)
