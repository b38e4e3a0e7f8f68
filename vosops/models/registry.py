"""The registry of models: their names, and how each model is created and run.

A model of this package joins by a line of `_BUILT_IN`; one of another package by :func:`register_model`, which a
package can have called at the first look into the registry by an entry point of the group ``vosops.models``.
Nothing is imported before it is asked for: a line names its class as ``"module:attribute"``.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, overload

__all__ = ["ENTRY_POINTS", "Kind", "ModelEntry", "find_model", "list_models", "register_model"]

Kind = Literal["tracker", "mask network", "semantic network"]
"""What a model is: a tracker tracks objects by itself (:class:`vosops.models.VideoTracker`), a mask network tracks them
when a tracker runs it (:class:`vosops.models.Network`), a semantic network finds the class of every pixel
(:class:`vosops.models.SemanticNetwork`)."""

Weights = Literal["required", "optional", "none"]

ENTRY_POINTS = "vosops.models"
"""The group of entry points that other packages register their models by."""

_Factory = TypeVar("_Factory", bound=Callable[..., Any])
_OF_CREATE_MODEL = ("weights", "device")  # parameters of a tracker's factory that are no options


@dataclass(frozen=True)
class ModelEntry:
    """A line of the registry.

    Attributes:
        name: Its name in `create_model`; an identifier, as required by `torch.hub`.
        factory: Called with the options, for a tracker also with ``weights`` and ``device``. A class, a function, or
            ``"module:attribute"``, which is imported when it is needed.
        kind: The type of model that the factory creates: "tracker", "mask network" or "semantic network".
        summary: A one-line description for tables and lists.
        paper: Authors, venue and year.
        weights: Whether it is of use without a file of weights: "required", "optional", or "none" if it takes none.
        checkpoint: Which file that is.
        aliases: Other names.
        package: A package that it cannot be created without, as it is imported, and in `install` how to get it.
        install: A command.
        page: Its page, relative to docs/models.
        weights_package: A package that holds weights for it, as it is imported; it is not needed. Its
            ``weights_path()`` is their file, its ``TITLE`` their name, and its ``LICENCE`` what they may be used for.
    """

    name: str
    factory: Callable[..., Any] | str
    kind: Kind
    summary: str
    paper: str = ""
    weights: Weights = "required"
    checkpoint: str = ""
    aliases: tuple[str, ...] = ()
    package: str = ""
    install: str = ""
    page: str = ""
    weights_package: str = ""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"name must be an identifier, got {self.name!r}")
        for option, known in (("kind", get_args(Kind)), ("weights", get_args(Weights))):
            if getattr(self, option) not in known:
                raise ValueError(f"{option} must be one of {', '.join(known)}, got {getattr(self, option)!r}")
        if isinstance(self.factory, str) and not all(self.factory.partition(":")[::2]):
            raise ValueError(f"factory must be a callable or 'module:attribute', got {self.factory!r}")
        if not isinstance(self.factory, str) and not callable(self.factory):
            raise TypeError(f"factory must be a callable or 'module:attribute', got {self.factory!r}")
        if not self.summary or "\n" in self.summary:
            raise ValueError(f"summary must be one line of text, got {self.summary!r}")

    @property
    def tracks_objects(self) -> bool:
        """Whether it tracks objects through a video, alone or with a tracker."""
        return self.kind != "semantic network"

    @property
    def missing_package(self) -> str:
        """The package that it needs and that is not installed; empty if there is none."""
        if not self.package or importlib.util.find_spec(self.package) is not None:
            return ""
        return self.package

    @property
    def installed_weights(self) -> Path | None:
        """The file of the weights that `weights_package` holds; None where that is not installed."""
        if not self.weights_package or importlib.util.find_spec(self.weights_package) is None:
            return None
        path: Path = import_module(self.weights_package).weights_path()
        return path

    @property
    def weights_notice(self) -> str:
        """The title and licence of the installed weights; empty where there are none."""
        if self.installed_weights is None:
            return ""
        package = import_module(self.weights_package)
        return f"{package.TITLE}, {package.LICENCE}"

    @property
    def target(self) -> str:
        """The factory as "module:attribute"."""
        if isinstance(self.factory, str):
            return self.factory
        return (
            f"{self.factory.__module__}:{getattr(self.factory, '__qualname__', type(self.factory).__name__)}"
        )

    def load(self) -> Callable[..., Any]:
        """Return the factory, and import it if need be."""
        if not isinstance(self.factory, str):
            return self.factory
        module, _, attribute = self.factory.partition(":")
        factory: Callable[..., Any] = getattr(import_module(module), attribute)
        return factory

    @property
    def options(self) -> tuple[str, ...]:
        """The names of its options; imports it."""
        parameters = inspect.signature(self.load()).parameters.values()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names = (p.name for p in parameters if p.kind in named)
        return tuple(name for name in names if self.kind != "tracker" or name not in _OF_CREATE_MODEL)

    @property
    def defaults(self) -> dict[str, Any]:
        """The values of the options that need not be given; imports it."""
        parameters = inspect.signature(self.load()).parameters
        given = {name: parameters[name].default for name in self.options}
        return {name: value for name, value in given.items() if value is not inspect.Parameter.empty}

    @property
    def takes_any_option(self) -> bool:
        """Whether its factory has ``**options``; imports it."""
        parameters = inspect.signature(self.load()).parameters.values()
        return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    def takes(self, option: str) -> bool:
        """Return whether it has an option of that name; imports it."""
        return self.takes_any_option or option in self.options

    def check_options(self, options: Any) -> None:
        """Raise TypeError unless it takes all of these options; imports it."""
        for option in options:
            if not self.takes(option):
                known = ", ".join(self.options) or "nothing"
                raise TypeError(f"options of {self.name} must be among {known}, got {option}")


_CHECKOUT_PAGE = "../integrations.md#cutie-and-xmem-in-vosops-segment"

_BUILT_IN = (
    ModelEntry(
        "propagate",
        "vosops.models.propagate:Propagate",
        "tracker",
        "matches ImageNet features with the labelled and the latest three frames; the default of `vosops segment`",
        weights="none",
        checkpoint="none, it is not trained",
        page="propagate.md",
    ),
    ModelEntry(
        "vosops_s",
        "vosops.models.vosops_s:VosopsS",
        "tracker",
        "propagate's evidence, weighted by a small trained network; the default if its weights are installed",
        weights="optional",
        checkpoint="vosops-weights-s (CC BY-NC 4.0), or your own training",
        aliases=("vosops-s",),
        page="vosops_s.md",
        weights_package="vosops_weights_s",
    ),
    ModelEntry(
        "cutie",
        "vosops.integrations.cutie:Cutie",
        "tracker",
        "the authors' own code; vosops reads and bounds its long-term memory",
        paper="Cheng et al., CVPR 2024",
        checkpoint="cutie-base-mega.pth or cutie-small-mega.pth",
        package="cutie",
        install="pip install 'vosops[cutie]'",
        page=_CHECKOUT_PAGE,
    ),
    ModelEntry(
        "xmem",
        "vosops.integrations.xmem:XMem",
        "tracker",
        "the authors' own code from your clone; vosops reads and bounds its long-term memory",
        paper="Cheng and Schwing, ECCV 2022",
        checkpoint="XMem.pth",
        page=_CHECKOUT_PAGE,
    ),
    ModelEntry(
        "sam2",
        "vosops.integrations.sam2:SAM2",
        "tracker",
        "SAM 2 and 2.1, from clicks, boxes or masks; vosops reads and bounds its memory",
        paper="Ravi et al., ICLR 2025",
        checkpoint="sam2.1_hiera_small.pt and similar files",
        package="sam2",
        install="pip install 'vosops[sam2]'",
        page="../sam2.md",
    ),
    ModelEntry(
        "stm",
        "vosops.models.stm:STM",
        "mask network",
        "attention over every fifth past frame; the memory grows or has a budget",
        paper="Oh et al., ICCV 2019",
        checkpoint="STM_weights.pth",
        page="stm.md",
    ),
    ModelEntry(
        "rgmp",
        "vosops.models.rgmp:RGMP",
        "mask network",
        "corrects the previous mask with the first frame as a reference",
        paper="Oh et al., CVPR 2018",
        checkpoint="the official weights.pth",
        page="rgmp.md",
    ),
    ModelEntry(
        "feelvos",
        "vosops.models.feelvos:FEELVOS",
        "mask network",
        "nearest embeddings in the first and the previous frame, one head for all objects; optionally CFBI's matching",
        paper="Voigtlaender et al., CVPR 2019",
        checkpoint="an .npz of the original's variables, or your own training",
        page="feelvos.md",
    ),
    ModelEntry(
        "lstm_icnet",
        "vosops.models.lstm_icnet:LSTMICNet",
        "semantic network",
        "ICNet with ConvLSTMs over four frames or with a carried state; the default of `vosops semantic`",
        paper="Pfeuffer et al., IV 2019",
        checkpoint="an .npz of the original's variables",
        page="lstm_icnet.md",
    ),
    ModelEntry(
        "lstm_segnet",
        "vosops.models.lstm_segnet:LSTMSegNet",
        "semantic network",
        "SegNet with ConvLSTMs, for comparison",
        paper="Badrinarayanan et al., PAMI 2017",
        checkpoint="your own training",
        page="lstm_icnet.md#siblings",
    ),
    ModelEntry(
        "rfcn",
        "vosops.models.lstm_segnet:RFCN",
        "semantic network",
        "a fully convolutional network with a ConvLSTM, for comparison",
        paper="Valipour et al., WACV 2017",
        checkpoint="your own training",
        page="lstm_icnet.md#siblings",
    ),
    ModelEntry(
        "deeplabv3plus",
        "vosops.models.segmentation.deeplabv3plus:DeepLabV3Plus",
        "semantic network",
        "parallel dilated convolutions, and a decoder that also reads a finer map",
        paper="Chen et al., ECCV 2018",
        checkpoint="best_deeplabv3plus_resnet50_voc_os16.pth and similar files, or your own training",
        aliases=("deeplabv3+",),
        page="deeplabv3plus.md",
    ),
    ModelEntry(
        "hrnet_w18",
        "vosops.models.segmentation.hrnet:HRNetW18",
        "semantic network",
        "four parallel scales throughout; the finest has 18 channels",
        paper="Wang et al., PAMI 2020",
        checkpoint="your own training",
        page="hrnet.md",
    ),
    ModelEntry(
        "hrnet_w32",
        "vosops.models.segmentation.hrnet:HRNetW32",
        "semantic network",
        "four parallel scales throughout; the finest has 32 channels",
        paper="Wang et al., PAMI 2020",
        checkpoint="your own training",
        page="hrnet.md",
    ),
    ModelEntry(
        "hrnet_w48",
        "vosops.models.segmentation.hrnet:HRNetW48",
        "semantic network",
        "four parallel scales throughout; the finest has 48 channels",
        paper="Wang et al., PAMI 2020",
        checkpoint="hrnet_cs_8090_torch11.pth and similar files, or your own training",
        page="hrnet.md",
    ),
    ModelEntry(
        "hrnet_w48_ocr",
        "vosops.models.segmentation.hrnet:HRNetW48OCR",
        "semantic network",
        "HRNet with attention from each pixel to a representation of each class",
        paper="Yuan et al., ECCV 2020",
        checkpoint="hrnet_ocr_cs_8162_torch11.pth and similar files, or your own training",
        page="hrnet.md#ocr",
    ),
    ModelEntry(
        "danet",
        "vosops.models.segmentation.danet:DANet",
        "semantic network",
        "attention over positions and over channels",
        paper="Fu et al., CVPR 2019",
        checkpoint="DANet101.pth.tar, or your own training",
        page="danet.md",
    ),
    ModelEntry(
        "pspnet",
        "vosops.models.segmentation.pspnet:PSPNet",
        "semantic network",
        "pyramid pooling: the map concatenated with means over its parts",
        paper="Zhao et al., CVPR 2017",
        checkpoint="semseg's train_epoch_200.pth and similar files, or your own training",
        page="pspnet.md",
    ),
    ModelEntry(
        "icnet",
        "vosops.models.segmentation.icnet:ICNet",
        "semantic network",
        "a deep branch at a quarter of the resolution, shallow branches at half and full resolution",
        paper="Zhao et al., ECCV 2018",
        checkpoint="icnet_resnet50_197_0.710_best_model.pth, or your own training",
        page="icnet.md",
    ),
    ModelEntry(
        "unet",
        "vosops.models.segmentation.unet:UNet",
        "semantic network",
        "an encoder and a decoder with skip connections",
        paper="Ronneberger et al., MICCAI 2015",
        checkpoint="unet_carvana_scale1.0_epoch2.pth, or your own training",
        page="unet.md",
    ),
    ModelEntry(
        "unetplusplus",
        "vosops.models.segmentation.unet:UNetPlusPlus",
        "semantic network",
        "U-Net with nested, dense skip connections and deep supervision",
        paper="Zhou et al., DLMIA 2018",
        checkpoint="model.pth of pytorch-nested-unet, or your own training",
        aliases=("unet++",),
        page="unet.md#u-net_1",
    ),
    ModelEntry(
        "resunet",
        "vosops.models.segmentation.resunet:ResUNet",
        "semantic network",
        "a U-Net of residual blocks, for foreground segmentation",
        paper="Zhang et al., GRSL 2018",
        checkpoint="a checkpoint of rishikksh20/ResUnet, or your own training",
        page="resunet.md",
    ),
    ModelEntry(
        "resunetplusplus",
        "vosops.models.segmentation.resunet:ResUNetPlusPlus",
        "semantic network",
        "ResUNet with attention, squeeze and excitation, and dilated convolutions",
        paper="Jha et al., ISM 2019",
        checkpoint="a checkpoint of DebeshJha/ResUNetPlusPlus, or your own training",
        aliases=("resunet++",),
        page="resunet.md#resunet_1",
    ),
    ModelEntry(
        "segnet",
        "vosops.models.segmentation.segnet:SegNet",
        "semantic network",
        "VGG-16 and a mirrored decoder with unpooling",
        paper="Badrinarayanan et al., PAMI 2017",
        checkpoint="a checkpoint of vinceecws/SegNet_PyTorch, or your own training",
        page="segnet.md",
    ),
    ModelEntry(
        "deconvnet",
        "vosops.models.segmentation.deconvnet:DeconvNet",
        "semantic network",
        "VGG-16 with its fully connected layers, and a mirrored decoder; 1 GB of weights",
        paper="Noh et al., ICCV 2015",
        checkpoint="a checkpoint of Jasonlee1995/DeconvNet, or your own training",
        page="segnet.md#deconvnet",
    ),
    ModelEntry(
        "icnn",
        "vosops.models.segmentation.icnn:ICNN",
        "semantic network",
        "interlinked convolutions at four scales, for face parsing",
        paper="Zhou et al., ISNN 2015",
        checkpoint="a checkpoint of aod321/icnn-face, or your own training",
        page="icnn.md",
    ),
    ModelEntry(
        "gridnet",
        "vosops.models.segmentation.gridnet:GridNet",
        "semantic network",
        "a grid of scales and columns",
        paper="Fourure et al., BMVC 2017",
        checkpoint="a checkpoint of daigo0927/GridNet, or your own training",
        page="gridnet.md",
    ),
)

_ENTRIES = {entry.name: entry for entry in _BUILT_IN}
_NAMES = {name: entry.name for entry in _BUILT_IN for name in (entry.name, *entry.aliases)}


@overload
def register_model(name: str, factory: Callable[..., Any] | str, **entry: Any) -> ModelEntry: ...


@overload
def register_model(name: str, **entry: Any) -> Callable[[_Factory], _Factory]: ...


def register_model(name: str, factory: Callable[..., Any] | str | None = None, **entry: Any) -> Any:
    """Add a model to the registry: a function to call, or a decorator of a class or function.

    From then on `create_model`, `create_tracker`, `vosops segment` and `vosops semantic` make it by its name, and
    `list_models` and `vosops info` list it.

    Args:
        name: Its name.
        factory: A callable that creates it, or ``"module:attribute"``, which is imported on first use.
        **entry: The other attributes of :class:`vosops.models.ModelEntry`: ``kind`` and ``summary`` at least.

    Returns:
        The entry; without a factory a decorator, which returns what it decorates.

    Raises:
        ValueError: The name or an alias is another model's; an attribute cannot be.
        TypeError: An attribute is missing, or there is no such attribute.

    Example:
        >>> import torch
        >>> from vosops.models import FrameNetwork, create_model, register_model
        >>> @register_model("one_layer", kind="semantic network", summary="a convolution", weights="optional")
        ... class OneLayer(FrameNetwork):
        ...     def __init__(self, num_classes=19):
        ...         super().__init__()
        ...         self.num_classes = num_classes
        ...         self.layer = torch.nn.Conv2d(3, num_classes, 3, padding=1)
        ...
        ...     def forward(self, images):
        ...         return self.layer(images)
        >>> create_model("one_layer", num_classes=5)(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 5, 8, 8])
    """
    if factory is not None:
        return _add(ModelEntry(name, factory, **entry))

    def decorate(decorated: _Factory) -> _Factory:
        _add(ModelEntry(name, decorated, **entry))
        return decorated

    return decorate


def _add(entry: ModelEntry) -> ModelEntry:
    """Enter it; the same factory again (a notebook's cell that ran twice) takes the place of its former self."""
    for name in (entry.name, *entry.aliases):
        other = _ENTRIES.get(_NAMES.get(name, ""))
        if other is not None and (other.name != entry.name or other.target != entry.target):
            raise ValueError(f"name must be new, got {name!r}, which is {other.target}")
    _NAMES.update({name: entry.name for name in (entry.name, *entry.aliases)})
    _ENTRIES[entry.name] = entry
    return entry


def list_models(kind: Kind | None = None) -> list[str]:
    """Return the names of all models, or of those of a kind: "tracker", "mask network" or "semantic network".

    >>> from vosops.models import list_models
    >>> list_models("mask network")
    ['feelvos', 'rgmp', 'stm']
    """
    if kind is not None and kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    _load_entry_points()
    return sorted(name for name, entry in _ENTRIES.items() if kind in (None, entry.kind))


def find_model(name: str) -> ModelEntry:
    """Return the entry of a model by its name or an alias; ValueError, with similar names, if it is unknown."""
    if name not in _NAMES:
        _load_entry_points()
    if name not in _NAMES:
        near = difflib.get_close_matches(str(name), _NAMES, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"model must be one of {', '.join(list_models())}, got {name!r}{hint}")
    return _ENTRIES[_NAMES[name]]


@cache
def _load_entry_points() -> None:
    """Import what other packages name in the group ``vosops.models``; one that fails is passed over with a warning."""
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:
            warnings.warn(
                f"the models of {point.value} cannot be registered ({type(error).__name__}: {error})",
                stacklevel=2,
            )
