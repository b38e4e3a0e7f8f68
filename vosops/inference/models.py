"""Making the model that a run uses, with one-line errors for what a user can get wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vosops.io.errors import InputError, VosopsError

from .tracker import Tracker

if TYPE_CHECKING:
    from vosops.models import VideoTracker

DEFAULT_MODEL = "propagate"
DEFAULT_SIZE = 480
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str | None) -> torch.device:
    """Return the device of that name, None meaning the GPU if there is one; checks that it exists."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used ({reason}): try cpu, cuda or cuda:0") from error
    return device


def find_dtype(name: str) -> torch.dtype:
    """Return the floating type of that name."""
    if name not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {name}")
    return DTYPES[name]


def check_weights(file: Path) -> None:
    """Refuses a file of weights that is none."""
    if not file.is_file():
        what = "is a folder: give a file" if file.is_dir() else "does not exist"
        raise InputError(f"--weights {file} {what}")


def make_tracker(
    name: str,
    device: torch.device,
    *,
    weights: Path | None = None,
    backbone: str | None = None,
    memory_budget: int | str | None = None,
    checkout: Path | None = None,
    naive: bool = False,
    scales: Sequence[float] = (1.0,),
) -> VideoTracker:
    """Return the model of that name; it computes at the size of the frames it gets.

    memory_budget: bytes, or a text such as "2GB", that the model may remember at most. checkout: folder of
    a clone of the model's repository, for those that need one. naive, scales: what :class:`Tracker` says, for networks.
    """
    from vosops.memory import parse_bytes
    from vosops.models import create_model, follows_objects, list_models, takes, tracks_by_itself

    known = list_models()
    if name not in known:
        able = ", ".join(model for model in known if follows_objects(model))
        raise InputError(f"--model {name} is not known: choose one of {able}")
    if not follows_objects(name):
        raise InputError(f"--model {name} does not follow objects through a video: see vosops semantic")
    if weights is not None:
        check_weights(weights)
    options: dict[str, Any] = {}
    for option, value in (("backbone", backbone), ("checkout", checkout)):
        if value is not None:
            if not takes(name, option):
                raise InputError(f"--{option} does not go with --model {name}")
            options[option] = value
    budget = None
    if memory_budget is not None:
        try:
            budget = parse_bytes(memory_budget)
        except ValueError as error:
            raise InputError(f"--memory-budget {memory_budget} cannot be used: {error}") from error
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise InputError(f"--scales must be positive numbers, got {tuple(scales)}")
    if tracks_by_itself(name):
        if tuple(scales) != (1.0,):
            raise InputError(f"--scales does not go with --model {name}, which runs at --size alone")
        options["memory_budget"] = budget
    elif weights is None:
        raise InputError(f"--model {name} needs --weights FILE: no weights come with it")
    try:
        model = create_model(name, weights=weights, device=device, **options)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise VosopsError(f"model {name} cannot be made: {reason}") from error
    if tracks_by_itself(name):
        tracker: VideoTracker = model
        return tracker
    return Tracker(model, memory_budget=budget, naive=naive, scales=scales)
