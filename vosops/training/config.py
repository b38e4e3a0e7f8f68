"""The configuration of a training run: YAML or a dict, checked, with defaults.

    config = load_config("stm", ["steps=1000", "data.train.0.root=/data/DAVIS"])

A key that there is not is refused with the nearest one that there is.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from vosops.io.errors import InputError, require
from vosops.models.registry import find_model, list_models

require("pydantic", "train")

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator  # noqa: E402

__all__ = [
    "Clips",
    "Data",
    "Every",
    "Gap",
    "HeldOut",
    "Loss",
    "Motion",
    "Optimizer",
    "Schedule",
    "Source",
    "TrainConfig",
    "list_recipes",
    "load_config",
]

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
Side = Annotated[int, Field(ge=8)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Source(_Strict):
    """A source of clips: still images with masks, or annotated videos."""

    kind: Literal["stills", "videos"]
    root: Path | None = None
    """Of videos: a data set in the layout of DAVIS or YouTube-VOS, or a folder of folders with `frames` and `masks`."""
    resolution: str | None = None
    """Of DAVIS: which of its resolutions."""
    sequences: tuple[str, ...] = ()
    """Of videos: only these, by name or by a text file of names."""
    without: tuple[str, ...] = ()
    """Of videos: not these."""
    images: Path | None = None
    """Of stills: the folder of images."""
    masks: Path | None = None
    """Of stills: the folder of label maps of the same names."""
    binary: bool | None = None
    """Whatever is not 0 in a mask is one object; None: where masks hold only 0 and 255."""
    ignored: tuple[int, ...] = ()
    """Values of labels that do not count, as 255 does not."""
    weight: Amount = 1.0
    """How often it is drawn from, relative to the others."""
    first_step: Count = 0
    """It is drawn from in the steps from this one on ..."""
    last_step: int | None = None
    """... up to this one, exclusive."""

    @model_validator(mode="after")
    def _complete(self) -> Source:
        if self.kind == "videos" and self.root is None:
            raise ValueError("root must be given for videos")
        if self.kind == "stills" and (self.images is None or self.masks is None):
            raise ValueError("images and masks must be given for stills")
        return self


class Gap(_Strict):
    """How many frames lie between two frames of a clip at most, growing linearly over the first `steps` steps."""

    first: Positive = 5
    last: Positive = 25
    steps: Count = 0

    def at(self, step: int) -> int:
        """Return the gap at a step."""
        done = min(1.0, step / self.steps) if self.steps else 1.0
        return round(self.first + (self.last - self.first) * done)


class Clips(_Strict):
    """Settings of the clips."""

    frames: Positive = 3
    crop: tuple[Side, Side] | Side = 384
    """(height, width), or the side of a square."""
    short_side: Side | None = None
    """Frames are brought to this short side when they are read; None: as they are."""
    scale: tuple[float, float] = (1.0, 1.3)
    """Range of the further enlargement; a frame is enlarged to hold the crop at least."""
    objects: Positive = 3
    """At most this many are followed in a clip; others that its first frame shows are background."""
    gap: Gap = Gap()
    neighbours: bool = False
    """The first frame is up to a gap before the others, which are neighbours in time, as FEELVOS is trained."""
    reverse: bool = True
    """Half of the clips go back in time."""
    flip: bool = True
    """Half of the clips are mirrored."""
    colour: Share = 0.2
    """How much brightness, contrast and saturation vary, hue a quarter of it."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the crop."""
        return self.crop if isinstance(self.crop, tuple) else (self.crop, self.crop)


class Motion(_Strict):
    """Motion of stills: the maximum change from one frame to the next."""

    rotation: Amount = 10.0
    """Degrees."""
    zoom: Share = 0.1
    shear: Share = 0.1
    shift: Share = 0.1
    """Of the crop's sides."""
    bend: Share = 0.03
    """Standard deviation of what a thin-plate spline moves its points by, of the crop's sides."""
    colour: Share = 0.05
    """As of clips, of each frame by itself."""
    objects: Share = 0.3
    """Chance that an object of another still is pasted beside, and is one to follow."""
    distractors: Share = 0.3
    """Chance that one is pasted that is background."""
    occluders: Share = 0.3
    """Chance that one passes before all others, and is background."""


class HeldOut(_Strict):
    """The held-out data that is scored during training."""

    sources: tuple[Source, ...] = ()
    size: int = -1
    """Short side of the computation; -1: the frames' own."""
    frames: Positive | None = None
    """Of each video only this many after the first mask; of stills this many in all, evenly spread."""


class Data(_Strict):
    """The sources of clips and how they are read."""

    train: tuple[Source, ...] = Field(min_length=1)
    held_out: HeldOut = HeldOut()
    clips: Clips = Clips()
    motion: Motion = Motion()
    workers: Count = 2
    """Processes that read; 0: the training process itself."""
    cache: int | str = "256MB"
    """What each worker may keep of decoded frames: bytes or a text such as "1GB"."""


class Loss(_Strict):
    """The loss: the cross entropy of each sample, averaged over its pixels and then over samples."""

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the hardest share of the pixels of each sample counts (bootstrapping)."""
    anneal: Count = 0
    """The share goes down from 1 over that many steps."""
    dice: Amount = 0.0
    """Weight of the Dice loss, added to the cross entropy."""
    outputs: tuple[Amount, ...] | None = None
    """Weights of a semantic network's outputs; None: its own."""
    at: Literal["labels", "logits"] = "labels"
    """Whether logits are enlarged to the labels, or labels brought to the logits by the nearest pixel."""


class Optimizer(_Strict):
    """How steps are made."""

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Amount = 1e-4
    """Not of biases and norms."""
    momentum: Share = 0.9
    """Of SGD."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Of Adam."""
    factors: dict[str, Amount] = {}
    """Of the rate, for parameters whose names match a pattern such as "Encoder*", the first that matches."""
    clip_norm: Amount | None = None
    """Gradients are scaled down to this norm."""


class Schedule(_Strict):
    """The learning rate over the steps: up linearly, then down."""

    kind: Literal["constant", "cosine", "poly"] = "cosine"
    warm_up: Count = 0
    """Steps."""
    power: Amount = 0.9
    """Of poly."""
    least: Share = 0.0
    """Factor that is left at the end."""


class Every(_Strict):
    """After how many steps what happens; the last step always counts."""

    log: Positive = 20
    score: Positive = 500
    save: Positive = 500
    pictures: Positive = 500


class TrainConfig(_Strict):
    """A training run."""

    model: str
    options: dict[str, Any] = {}
    """Of the model's class."""
    weights: Path | None = None
    """A file to begin with, such as the result of an earlier stage."""
    task: dict[str, Any] = {}
    """What the model's own task reads."""
    data: Data
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    steps: Positive
    batch: Positive = 4
    """Samples of a process and a pass."""
    accumulate: Positive = 1
    """Passes before a step."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an average of the weights, which is scored and saved; after n steps at most (1 + n) / (10 + n)."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """bfloat16 and float16 are autocast's; float16 needs a GPU."""
    channels_last: bool = False
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained."""
    freeze_batch_norm: bool = False
    """Batch norm keeps its statistics; its weights are trained unless they are frozen too."""
    recompute: tuple[str, ...] = ()
    """Patterns of modules whose maps are not kept, but computed again for the gradients."""
    device: str | None = None
    """"cpu" or "cuda"; None: GPUs if there are any."""
    seed: int = 0
    every: Every = Every()
    tensorboard: bool = True


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load a configuration.

    Args:
        source: A YAML file, or the name of a model, whose recipe it is (:func:`list_recipes`).
        overrides: Texts ``a.b=value``, in order: keys of dicts and numbers of list items, and a value in YAML.

    Raises:
        InputError: There is no such file or model, or a key or value cannot be; unknown keys name the nearest.
    """
    yaml = require("yaml", "train")
    text = _text_of(source)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{source} must hold keys and values, got {type(content).__name__}")
    if not Path(source).is_file():
        content["model"] = find_model(str(source)).name
    for override in overrides:
        key, given, value = override.partition("=")
        if not given or not key:
            raise InputError(f"--set must be KEY=VALUE, got {override!r}")
        try:
            _put(content, key.split("."), yaml.safe_load(value), key)
        except yaml.YAMLError as error:
            raise InputError(f"--set {key} must be a value in YAML, got {value!r}") from error
    return parse_config(content, str(source))


def parse_config(content: dict[str, Any], name: str = "configuration") -> TrainConfig:
    """Check a configuration; InputError, which names the key and the nearest one that there is."""
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as error:
        found = error.errors()[0]
        key = ".".join(str(part) for part in found["loc"])
        if found["type"] == "extra_forbidden":
            known = sorted(_fields_at(TrainConfig, found["loc"][:-1]))
            near = difflib.get_close_matches(str(found["loc"][-1]), known, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(known)}"
            raise InputError(f"{name}: {key} is unknown: {hint}") from error
        reason = found["msg"].removeprefix("Value error, ")
        if found["type"] == "missing":
            raise InputError(f"{name}: {key} must be given") from error
        raise InputError(f"{name}: {key}: {reason}, got {found['input']!r}") from error


def list_recipes() -> list[str]:
    """Return the names that :func:`load_config` knows: every network of the registry.

    A model without its own recipe uses the one of its kind.
    """
    own = {name for name in _own_recipes() if name in list_models()}
    return sorted({*list_models("mask network"), *list_models("semantic network"), *own})


def _own_recipes() -> list[str]:
    folder = resources.files("vosops.training") / "recipes"
    return [file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")]


def _text_of(source: str | Path) -> str:
    """Return the text of a file, or of a model's recipe."""
    path = Path(source)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        raise InputError(f"{source} does not exist: give a YAML file or the name of a model")
    try:
        entry = find_model(str(source))
    except ValueError as error:
        raise InputError(f"{source} is neither a YAML file nor a model: {error}") from error
    own = _own_recipes()
    recipe = next((name for name in (entry.name, entry.kind.replace(" ", "_")) if name in own), None)
    if recipe is None:
        raise InputError(f"{source} has no recipe: give a YAML file, or one of {', '.join(list_recipes())}")
    return (resources.files("vosops.training") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")


def _put(content: Any, keys: Sequence[str], value: Any, whole: str) -> None:
    """Set a value within dicts and lists."""
    key, *further = keys
    if isinstance(content, list):
        if not key.isdigit() or int(key) > len(content):
            raise InputError(f"--set {whole}: {key!r} must be a number up to {len(content)}, a new item")
        place: Any = int(key)
        if place == len(content):
            content.append(None)
    elif isinstance(content, dict):
        place = key
        content.setdefault(key, {})
    else:
        raise InputError(f"--set {whole}: {key!r} is a key of {content!r}, which has none")
    if not further:
        content[place] = value
        return
    if content[place] is None:
        content[place] = {}
    _put(content[place], further, value, whole)


def _fields_at(model: type[BaseModel], place: Sequence[str | int]) -> set[str]:
    """Return the keys that a model has at a place within it."""
    current: Any = model
    for part in place:
        if isinstance(part, int):
            continue  # an item of a list, whose type `_model_of` has found
        field = current.model_fields.get(part)
        current = _model_of(field.annotation) if field is not None else None
        if current is None:
            return set()
    return set(current.model_fields)


def _model_of(annotation: Any) -> Any:
    """Return the model class within an annotation such as tuple[Source, ...] or Source | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Annotated, Union, types.UnionType, tuple, list):
        return next((found for x in get_args(annotation) if (found := _model_of(x)) is not None), None)
    return None
