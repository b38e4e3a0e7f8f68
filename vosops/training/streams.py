"""How vosops-s is trained: streams that go on frame by frame, in which the tracker lives with its own results.

Every step is one frame of each stream. The network's loss is that of this frame alone; its result, detached, is what
the tracker remembers, so that the network sees the drift that it causes, at the price of a graph of one frame. A stream
plays scene after scene (:class:`vosops.training.footage.Scene`). A tracker that has lost its object is put back on it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops.io.errors import InputError
from vosops.models.vosops_s import CELL, STRIDE, Look, Refiner, RefinerInput, VosopsS
from vosops.training.footage import Mix, Scene, Shot, degraded

__all__ = ["Batch", "Begin", "StreamFrame", "StreamSettings", "StreamTrainer", "Streams"]

IGNORED = 255
_LEAST_PIXELS = 60  # of an object in the labelled frame
_TRIES = 5  # scenes that are drawn for one whose labelled frame shows its object
_REMEMBERED = 0.7  # of the late scenes: the share that has a frame in the memory
_LOST_IOU = 0.15
_LOST_FRAMES = 3  # in a row, after which a tracker is put back on its objects
_VISIBLE = 100  # pixels of an object, to be missed
_SMOOTHING = 50.0  # pixels, of Dice
_FAR = -12.0  # a logit outside the region that is searched


@dataclass(frozen=True)
class StreamSettings:
    """Settings of the streams.

    Attributes:
        window: rows and columns of the pictures, multiples of 32.
        shortest, longest: frames that a scene is tracked for.
        mix: the frequency of each kind of scene.
        hardest: share of the pixels whose cross entropy counts.
        dice: weight of the additional Dice loss.
    """

    window: tuple[int, int] = (352, 416)
    shortest: int = 6
    longest: int = 26
    mix: Mix = field(default_factory=Mix)
    hardest: float = 0.25
    dice: float = 1.0

    def __post_init__(self) -> None:
        if any(side < 64 or side % 32 for side in self.window):
            raise ValueError(f"window must be multiples of 32, at least 64, got {self.window}")
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(f"shortest must be from 1 to longest, got {self.shortest} and {self.longest}")
        if not 0 < self.hardest <= 1:
            raise ValueError(f"hardest must be in (0, 1], got {self.hardest}")

    @classmethod
    def parsed(cls, options: Mapping[str, Any]) -> StreamSettings:
        """Return the settings of a mapping, whose "mix" is one of `Mix`; ValueError names an unknown key."""
        options = dict(options)
        for kind, given in ((cls, options), (Mix, options.get("mix", {}))):
            known = [one.name for one in fields(kind)]
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ValueError(f"options of streams must be among {', '.join(known)}, got {unknown[0]}")
        if "mix" in options:
            options["mix"] = Mix(**options["mix"])
        if "window" in options:
            options["window"] = tuple(options["window"])
        return cls(**options)


@dataclass(frozen=True)
class Begin:
    """How a scene begins: the labelled frame, and for a late one what a tracker remembers of the time after it.

    Attributes:
        image: (3,S,W) float32 in [0, 1].
        labels: (S,W) uint8: 0, the objects 1 and maybe 2, and 255.
        memory: an image, and probabilities (O+1,S,W) for it, that entered the memory; None: none did.
        latest: the same of the latest frame; None: the labelled one is the latest.
    """

    image: Tensor
    labels: Tensor
    memory: tuple[Tensor, Tensor] | None = None
    latest: tuple[Tensor, Tensor] | None = None

    @property
    def images(self) -> list[Tensor]:
        """All images, the labelled one first."""
        return [self.image, *(one[0] for one in (self.memory, self.latest) if one is not None)]

    def to(self, device: str | torch.device) -> Begin:
        """Return it on a device."""
        memory, latest = (
            None if one is None else (one[0].to(device), one[1].to(device))
            for one in (self.memory, self.latest)
        )
        return Begin(self.image.to(device), self.labels.to(device), memory, latest)


@dataclass(frozen=True)
class StreamFrame:
    """A frame of a stream: image (3,S,W), labels (S,W) uint8, and how its scene begins if it is the first one.

    mended: probabilities (O+1,S,W) that a tracker takes for its result where it has lost its objects.
    """

    image: Tensor
    labels: Tensor
    mended: Tensor
    begin: Begin | None
    objects: int

    def to(self, device: str | torch.device) -> StreamFrame:
        """Return it on a device."""
        begin = None if self.begin is None else self.begin.to(device)
        image, labels, mended = (x.to(device) for x in (self.image, self.labels, self.mended))
        return StreamFrame(image, labels, mended, begin, self.objects)


@dataclass(frozen=True)
class Batch:
    """A frame of each stream, and the files that could not be read, a line each."""

    frames: tuple[StreamFrame, ...]
    problems: tuple[str, ...] = ()

    def to(self, device: str | torch.device) -> Batch:
        """Return it on a device."""
        return Batch(tuple(frame.to(device) for frame in self.frames), self.problems)


class Streams:
    """Endless streams of scenes: frame n of stream k is a function of (seed, k, n).

    videos, stills: the shots. count: of streams. first: the number of the first of them, for several processes.
    """

    def __init__(
        self,
        videos: Sequence[Shot],
        stills: Sequence[Shot],
        settings: StreamSettings,
        count: int,
        seed: int,
        first: int = 0,
    ) -> None:
        if not videos and not stills:
            raise InputError("training data must have videos or stills, got none")
        self.videos, self.stills, self.settings = videos, stills, settings
        self.count, self.seed, self.first = count, seed, first

    def batches(self, first: int) -> Iterator[Batch]:
        """Yield the frames of all streams, from number `first` on."""
        problems: list[str] = []
        streams = [self.stream(k, first, problems) for k in range(self.first, self.first + self.count)]
        while True:
            frames = tuple(next(stream) for stream in streams)
            yield Batch(frames, tuple(problems))
            problems.clear()

    def stream(self, number: int, first: int, problems: list[str]) -> Iterator[StreamFrame]:
        """Yield a stream from frame `first` on; a scene that had begun before is played from its beginning."""
        place, scene = 0, 0
        while True:
            rng = random.Random(f"{self.seed} {number} {scene}")
            length = rng.randint(self.settings.shortest, self.settings.longest)
            if place + length > first:
                frames = self._scene(rng, length, problems)
                for i, frame in enumerate(frames):
                    if place + i >= first:
                        yield frame
            place, scene = place + length, scene + 1

    def _scene(self, rng: random.Random, length: int, problems: list[str]) -> Iterator[StreamFrame]:
        """Yield the tracked frames of a scene whose labelled frame shows its object, if one of a few does."""
        settings = self.settings
        for _ in range(_TRIES):
            scene = Scene(self.videos, self.stills, settings.window, settings.mix, rng, length)
            frames = self._frames(scene, problems)
            image, labels = next(frames)
            counts = [int((labels == number).sum()) for number in (1, 2)]
            if counts[0] >= _LEAST_PIXELS:
                break
        objects = 0 if counts[0] < _LEAST_PIXELS else 1 + (counts[1] >= _LEAST_PIXELS)
        begin = Begin(image, torch.where((labels > objects) & (labels != IGNORED), 0, labels))
        if scene.late:
            memory, latest = (
                (picture, _with_background(degraded(_one_hot(truth, objects), rng)))
                for picture, truth in (next(frames), next(frames))
            )
            begin = Begin(image, begin.labels, memory if rng.random() < _REMEMBERED else None, latest)
        for i in range(length):
            image, labels = next(frames)
            mended = _with_background(degraded(_one_hot(labels, objects), rng))
            yield StreamFrame(image, labels, mended, begin if i == 0 else None, objects)

    def _frames(self, scene: Scene, problems: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the frames of a scene; one that cannot be read is the one before it again, or unknown."""
        empty = torch.full(self.settings.window, IGNORED, dtype=torch.uint8)
        held = torch.full((3, *self.settings.window), 0.5), empty
        while True:
            try:
                held = scene.next()
            except InputError as error:
                problems.append(str(error))
            yield held


def _one_hot(labels: Tensor, objects: int) -> Tensor:
    """Labels (S,W) -> masks (O,S,W) float32 of the objects 1 to O."""
    return (labels == torch.arange(1, objects + 1, device=labels.device)[:, None, None]).float()


def _with_background(masks: Tensor) -> Tensor:
    """Masks (O,S,W) in [0, 1] -> probabilities (O+1,S,W)."""
    total = masks.sum(0, keepdim=True)
    masks = masks / total.clamp(min=1)
    return torch.cat([1 - masks.sum(0, keepdim=True), masks])


class StreamTrainer:
    """The trackers of some streams, and the loss of the network in them.

    network: what is trained. pretrained: False takes random weights for the backbone, for tests.
    """

    def __init__(
        self,
        network: Refiner,
        settings: StreamSettings,
        count: int,
        *,
        pretrained: bool = True,
        device: str | torch.device = "cpu",
    ) -> None:
        self.settings = settings
        self.device = torch.device(device)
        self.trackers = [
            VosopsS(network, pretrained=pretrained and k == 0, device=device) for k in range(count)
        ]
        for tracker in self.trackers[1:]:  # one backbone serves all
            tracker.backbone, tracker.backbone_name = (
                self.trackers[0].backbone,
                self.trackers[0].backbone_name,
            )
        self.lost = [0] * count

    def loss(self, network: nn.Module, frames: Sequence[StreamFrame]) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss of a frame of each stream, and the mean IoU of its result and of propagate's.

        Afterwards the trackers have gone on by a frame.
        """
        frames = [frame.to(self.device) for frame in frames]
        images = [image for frame in frames for image in (*_begun(frame), frame.image)]
        maps = iter(zip(*(x.split(1) for x in self.trackers[0].pyramid(torch.stack(images))), strict=True))
        looks: list[Look | None] = []
        current = []
        for tracker, frame in zip(self.trackers, frames, strict=True):
            if frame.begin is not None:
                self._begin(tracker, frame, [next(maps) for _ in frame.begin.images])
            current.append(next(maps))
            looks.append(tracker.look(current[-1], whole=True) if tracker.object_ids else None)
        there = [look for look in looks if look is not None]
        if not there:
            nothing = sum(parameter.sum() for parameter in network.parameters()) * 0.0
            return nothing, {}  # type: ignore[return-value]
        outputs = network(RefinerInput.joined([look.inputs for look in there]))[:, 0].float()
        parts = iter(outputs.split([len(look.inputs.logit) for look in there]))
        losses, figures = [], []
        for k, look in enumerate(looks):
            if look is None:
                continue
            logits = next(parts)
            loss, truth = self._loss_of(logits, look, frames[k])
            losses.append(loss)
            figures.append(self._go_on(k, look, logits.detach(), frames[k], truth, current[k]))
        total = torch.stack(losses).mean()
        scored = [one for one in figures if one is not None]
        means = [sum(column) / len(scored) for column in zip(*scored, strict=True)] if scored else []
        return total, dict(zip(("iou", "propagate"), means, strict=False))

    def state_dict(self) -> dict[str, Any]:
        """Return the trackers' states; loads with ``weights_only=True``."""
        return {"lost": list(self.lost), "trackers": [tracker.state_dict() for tracker in self.trackers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        if len(state["trackers"]) != len(self.trackers):
            raise ValueError(
                f"state must have {len(self.trackers)} streams, got {len(state['trackers'])}: give the same batch"
            )
        self.lost = list(state["lost"])
        for tracker, one in zip(self.trackers, state["trackers"], strict=True):
            tracker.load_state_dict(one)

    def _begin(self, tracker: VosopsS, frame: StreamFrame, maps: list[tuple[Tensor, ...]]) -> None:
        begin = frame.begin
        assert begin is not None
        if not frame.objects:
            tracker.reset()
            return
        tracker.begin(maps[0], begin.labels)
        rest = iter(maps[1:])
        if begin.memory is not None:
            tracker.take(next(rest), begin.memory[1], memorize=True)
        if begin.latest is not None:
            tracker.take(next(rest), begin.latest[1])

    def _loss_of(self, logits: Tensor, look: Look, frame: StreamFrame) -> tuple[Tensor, Tensor]:
        """Return the loss of logits (O,4h,4w) of one frame, and the truth (O+1,4h,4w) at their size."""
        masks = _with_background(_one_hot(frame.labels, frame.objects))
        truth = functional.avg_pool2d(masks, STRIDE)
        known = functional.max_pool2d((frame.labels == IGNORED)[None].float(), STRIDE)[0] == 0
        counted = look.searched() & known
        if not counted.any():
            return logits.sum() * 0.0, truth
        classes = torch.cat([torch.zeros_like(logits[:1]), logits])[:, counted]
        wanted = truth[:, counted]
        entropy = functional.cross_entropy(classes.T, wanted.T, reduction="none")
        hardest = entropy.topk(max(1, int(self.settings.hardest * len(entropy))), sorted=False).values
        found = classes.softmax(0)[1:]
        overlap = 2 * (found * wanted[1:]).sum(1) + _SMOOTHING
        dice = 1 - overlap / (found.sum(1) + wanted[1:].sum(1) + _SMOOTHING)
        return hardest.mean() + self.settings.dice * dice.mean(), truth

    def _go_on(
        self,
        k: int,
        look: Look,
        logits: Tensor,
        frame: StreamFrame,
        truth: Tensor,
        maps: tuple[Tensor, ...],
    ) -> tuple[float, float] | None:
        """Make the result the stream's latest; return the IoU of it and of propagate's own logit, if there is truth."""
        tracker = self.trackers[k]
        tracker.settle(look, logits, frame.image)
        searched = look.searched()
        own = functional.interpolate(look.inputs.logit, scale_factor=CELL, mode="bilinear")[:, 0]
        ious = []
        for found in (logits, own):
            inside = torch.where(searched, found, _FAR)
            winner = torch.cat([torch.zeros_like(inside[:1]), inside]).argmax(0)
            ious.append(_ious(winner, truth))
        visible = truth[1:].sum((1, 2)) >= _VISIBLE / STRIDE**2
        missed = bool(((ious[0] < _LOST_IOU) & visible).any())
        self.lost[k] = self.lost[k] + 1 if missed else 0
        if self.lost[k] >= _LOST_FRAMES:
            tracker.take(maps, frame.mended)
            self.lost[k] = 0
        if not visible.any():
            return None
        one, other = (float(iou[visible].mean()) for iou in ious)
        return one, other


def _begun(frame: StreamFrame) -> list[Tensor]:
    return [] if frame.begin is None else frame.begin.images


def _ious(winner: Tensor, truth: Tensor) -> Tensor:
    """Classes (H,W) against truth (O+1,H,W) -> (O,): intersection over union of each object."""
    found = winner == torch.arange(1, len(truth), device=winner.device)[:, None, None]
    true = truth[1:] > 0.5
    both, either = (found & true).sum((1, 2)), (found | true).sum((1, 2))
    return both / either.clamp(min=1)
