"""The first mask of a track from clicks and boxes, for models that take them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vosops.io.errors import InputError
from vosops.io.frames import FrameSource
from vosops.io.masks import IGNORE, GivenMask

if TYPE_CHECKING:
    from vosops.models import VideoTracker

__all__ = ["InitialPrompts", "Prompt", "TakesPrompts"]

_OBJECT = 1  # of prompts that name none


@dataclass(frozen=True)
class Prompt:
    """What marks an object in a frame.

    Attributes:
        points: (x, y, inside): pixels that are the object's, or are not.
        box: (left, top, right, bottom) in pixels, around it.
    """

    points: tuple[tuple[float, float, bool], ...] = ()
    box: tuple[float, float, float, float] | None = None


@runtime_checkable
class TakesPrompts(Protocol):
    """A tracker that finds the masks of marked objects."""

    def labels_of_prompts(self, frame: Tensor, prompts: Mapping[int, Prompt]) -> Tensor:
        """Return the ids (H,W) uint8 of the objects that the prompts mark in a frame (3,H,W); 0 for background."""
        ...


@dataclass(frozen=True)
class InitialPrompts:
    """Prompts of the first frame's objects, by their ids.

    Attributes:
        prompts: Of each object.
    """

    prompts: Mapping[int, Prompt] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """What of these is read: nothing."""
        return []

    @classmethod
    def parse(cls, points: Iterable[str], boxes: Iterable[str]) -> InitialPrompts:
        """Return what ``--points`` and ``--box`` say; an object's points come together from several options."""
        clicks: dict[int, list[tuple[float, float, bool]]] = {}
        found: dict[int, tuple[float, float, float, float]] = {}
        for text in points:
            number, values = _parse("--points", text, "ID:X,Y or ID:X,Y,0", (2, 3))
            if len(values) == 3 and values[2] not in (0, 1):
                raise InputError(f"--points must end with 1 (the object) or 0 (not the object), got {text}")
            clicks.setdefault(number, []).append((values[0], values[1], len(values) == 2 or values[2] == 1))
        for text in boxes:
            number, values = _parse("--box", text, "ID:LEFT,TOP,RIGHT,BOTTOM", (4,))
            left, top, right, bottom = values
            if not (left < right and top < bottom):
                raise InputError(f"--box must have LEFT < RIGHT and TOP < BOTTOM, got {text}")
            if number in found:
                raise InputError(f"--box of object {number} is given twice")
            found[number] = (left, top, right, bottom)
        for number, given in clicks.items():
            if number not in found and not any(inside for *_, inside in given):
                raise InputError(f"--points of object {number} must include one on the object")
        ids = sorted({*clicks, *found})
        return cls({i: Prompt(tuple(clicks.get(i, ())), found.get(i)) for i in ids})

    def given_mask(self, source: FrameSource, frame: int, tracker: VideoTracker, name: str) -> GivenMask:
        """Return the mask of a frame; a one-line error where the model takes no prompts or finds an object nowhere."""
        if not isinstance(tracker, TakesPrompts):
            raise InputError(f"--points and --box cannot be used with --model {name}: choose sam2")
        raw = next(iter(source.forward(range(frame, frame + 1))), None)
        if raw is None:
            reason = source.problem or f"{source.title} ends before it"
            raise InputError(f"frame {frame} cannot be read: {reason}")
        height, width = raw.image.shape[:2]
        for number, prompt in self.prompts.items():
            for x, y in _corners(prompt):
                if not (0 <= x <= width and 0 <= y <= height):
                    raise InputError(
                        f"the prompt of object {number} must be inside the frame of {width}x{height}, got {x:g},{y:g}"
                    )
        labels = tracker.labels_of_prompts(torch.from_numpy(raw.image).permute(2, 0, 1), self.prompts).cpu()
        for number in self.prompts:
            if not bool((labels == number).any()):
                raise InputError(f"--model {name} finds no pixel of object {number}: use other points")
        digest = sha256(json.dumps(self._arguments(), sort_keys=True).encode()).hexdigest()
        return GivenMask(frame, "of --points and --box", digest, array=labels.numpy())

    def _arguments(self) -> dict[str, Any]:
        return {str(number): [list(p.points), p.box] for number, p in self.prompts.items()}


def _parse(flag: str, text: str, form: str, counts: tuple[int, ...]) -> tuple[int, list[float]]:
    """Return the object's id and the numbers of an option."""
    head, colon, tail = text.rpartition(":")
    try:
        number = int(head) if colon else _OBJECT
        values = [float(value) for value in tail.split(",")]
    except ValueError as error:
        raise InputError(f"{flag} must be {form}, got {text}") from error
    if len(values) not in counts or not all(abs(value) < float("inf") for value in values):
        raise InputError(f"{flag} must be {form}, got {text}")
    if not 0 < number < IGNORE:
        raise InputError(f"{flag} must have an ID from 1 to {IGNORE - 1}, got {text}")
    return number, values


def _corners(prompt: Prompt) -> list[tuple[float, float]]:
    corners = [(x, y) for x, y, _ in prompt.points]
    return corners if prompt.box is None else [*corners, prompt.box[:2], prompt.box[2:]]
