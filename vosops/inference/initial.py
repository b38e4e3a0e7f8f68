"""The first mask of a track from the classes that a network finds, so that none need be painted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vosops.io.errors import InputError
from vosops.io.frames import FrameSource
from vosops.io.masks import GivenMask

from .classes import find_classes, objects_of_classes, split_objects
from .settings import Flags, ModelSettings, make_semantic_tracker

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["InitialClasses"]


@dataclass(frozen=True)
class InitialClasses(ModelSettings):
    """A network for classes, and those of its classes that are the objects of the first frame.

    Attributes:
        classes: The classes, separated by commas; the first is object 1.
        instances: Whether each connected part of a class is an object of its own.
    """

    flags: ClassVar[Flags] = Flags("--init", "--init-weights", "--init-option", short=False)
    classes: str = ""
    instances: bool = False

    @staticmethod
    def parse(text: str) -> tuple[str, str]:
        """Return the network's name and the classes that ``--init`` names."""
        model, _, classes = text.partition(":")
        if not model or not classes:
            raise InputError(f"--init must be NAME:CLASS[,CLASS], such as hrnet_w48:car,person, got {text}")
        return model, classes

    def arguments(self) -> dict[str, Any]:
        """See :class:`ModelSettings`."""
        return {**super().arguments(), "classes": self.classes, "instances": self.instances}

    def given_mask(self, source: FrameSource, frame: int) -> GivenMask:
        """Return the mask of a frame; a one-line error where the network finds a class nowhere in it."""
        raw = next(iter(source.forward(range(frame, frame + 1))), None)
        if raw is None:
            reason = source.problem or f"{source.title} ends before it"
            raise InputError(f"frame {frame} cannot be read: {reason}")
        mask = self.mask(raw.image)
        digest = sha256(json.dumps(self.arguments(), sort_keys=True).encode()).hexdigest()
        return GivenMask(frame, f"of --init {self.model}", digest, array=mask)

    def mask(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the ids (H, W) of the objects in an image (H, W, 3)."""
        tracker = make_semantic_tracker(self)
        chosen = find_classes(self.classes, tracker.num_classes)
        least = tracker.model.min_side
        if min(image.shape[:2]) < least:
            raise InputError(f"--init {self.model} needs frames with sides of {least} pixels or more")
        labels = tracker.step(torch.from_numpy(image).permute(2, 0, 1), output="labels").cpu().long()
        seen = labels.unique().tolist()
        for name, number in zip(self.classes.split(","), chosen, strict=True):
            if number not in seen:
                raise InputError(
                    f"--init {self.model} finds no pixel of class {name.strip()} in the first frame, only of "
                    f"{', '.join(map(str, seen))}: choose another class, or another --start"
                )
        found: npt.NDArray[np.uint8] = objects_of_classes(chosen, tracker.num_classes)[labels].numpy()
        return split_objects(found) if self.instances else found
