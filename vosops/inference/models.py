"""Making the model that a run uses, with one-line errors for what a user can get wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vosops.io.errors import InputError, VosopsError
from vosops.memory import parse_bytes
from vosops.models.registry import Kind, ModelEntry, find_model, list_models

from .create import create_tracker

if TYPE_CHECKING:
    from vosops.models import VideoTracker

DEFAULT_MODEL = "propagate"
DEFAULT_SIZE = 480
_NAMES_OF_OPTIONS = {"classes": "num_classes"}  # of models, where the command line's are others
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
    a clone of the model's repository, for those that need one. naive, scales: as for :class:`NetworkTracker`.
    """
    entry = find_entry(name, "mask network", "tracker")
    options = model_options(entry, {"backbone": backbone, "checkout": checkout})
    check_weights(entry, weights)
    if memory_budget is not None:
        try:
            options["memory_budget"] = parse_bytes(memory_budget)
        except ValueError as error:
            raise InputError(f"--memory-budget {memory_budget} cannot be used: {error}") from error
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise InputError(f"--scales must be positive numbers, got {tuple(scales)}")
    if entry.kind == "mask network":
        options |= {"naive": naive, "scales": scales}
    elif tuple(scales) != (1.0,):
        raise InputError(f"--scales does not go with --model {entry.name}, which runs at --size alone")
    with one_line_errors(entry):
        return create_tracker(entry.name, weights, device=device, **options)


def find_entry(name: str, *kinds: Kind) -> ModelEntry:
    """Return the entry of a model of these kinds; a one-line error for any other name."""
    known = sorted(model for kind in kinds for model in list_models(kind))
    try:
        entry = find_model(name)
    except ValueError as error:
        raise InputError(f"--model {name} is not known: choose one of {', '.join(known)}") from error
    if entry.kind not in kinds:
        what = "track objects" if "tracker" in kinds else "segment into classes"
        command = "segment" if entry.tracks_objects else "semantic"
        raise InputError(
            f"--model {name} does not {what}, see vosops {command}: choose one of {', '.join(known)}"
        )
    return entry


def check_weights(entry: ModelEntry, file: Path | None) -> None:
    """Refuse a file of weights that does not exist, and a model that is of no use without one."""
    if file is None:
        if entry.weights == "required":
            what = f" ({entry.checkpoint})" if entry.checkpoint else ""
            raise InputError(f"--model {entry.name} needs --weights FILE{what}: no weights come with it")
    elif not file.is_file():
        what = "is a folder: give a file" if file.is_dir() else "does not exist"
        raise InputError(f"--weights {file} {what}")


def model_option(option: str) -> str:
    """Return what models call an option of the command line."""
    return _NAMES_OF_OPTIONS.get(option, option)


def model_options(entry: ModelEntry, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given (not None), all of which the model must take, by the model's names.

    given: by the names of the command line.
    """
    options = {}
    for option, value in given.items():
        if value is not None:
            name = model_option(option)
            if not entry.takes(name):
                raise InputError(f"--{option} does not go with --model {entry.name}")
            options[name] = value
    return options


@contextmanager
def one_line_errors(entry: ModelEntry) -> Iterator[None]:
    """Turn what the making of a model raises into an error of one line."""
    try:
        yield
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise VosopsError(f"model {entry.name} cannot be made: {reason}") from error
