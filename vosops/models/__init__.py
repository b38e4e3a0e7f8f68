"""Reference systems for video object segmentation, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vosops.models.cutie import Cutie
from vosops.models.feelvos import FEELVOS
from vosops.models.lstm_icnet import LSTMICNet
from vosops.models.lstm_segnet import RFCN, LSTMSegNet
from vosops.models.network import Network
from vosops.models.propagate import Propagate
from vosops.models.rgmp import RGMP
from vosops.models.stm import STM
from vosops.models.tensorflow import load_tensorflow
from vosops.models.weights import load_weights
from vosops.models.xmem import XMem

__all__ = [
    "FEELVOS",
    "RFCN",
    "RGMP",
    "STM",
    "Cutie",
    "LSTMICNet",
    "LSTMSegNet",
    "Network",
    "Propagate",
    "VideoTracker",
    "XMem",
    "create_model",
    "list_models",
    "load_weights",
    "tracks_by_itself",
]


class VideoTracker(Protocol):
    """What every tracker offers: first frame and labels in, then a frame at a time.

    frame: (3,H,W) uint8, or floating in [0, 1]; every frame of a video has the same size. labels: (H,W) integer,
    0 background, 255 unknown, other values are object ids. Probabilities: (O+1,H,W) float32, background first,
    then the objects in the order of ``object_ids``.
    """

    @property
    def object_ids(self) -> list[int]:
        """The ids of the objects that are tracked, in the order of the probabilities."""

    def initialize(self, frame: Tensor, labels: Tensor) -> None:
        """Forgets everything and starts from this frame, whose labels are the truth."""

    def step(
        self,
        frame: Tensor,
        labels: Tensor | None = None,
        *,
        permanent: bool = False,
        end: bool = False,
        output: str = "probs",
    ) -> Tensor:
        """Segments the next frame; labels, if any, are the truth for it and are kept for good."""

    def add_objects(self, frame: Tensor, labels: Tensor) -> None:
        """Adds objects (or corrections) to the frame that was segmented last."""

    def remove_object(self, object_id: int) -> None:
        """Stops tracking an object and forgets it."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors, numbers and lists."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a saved state."""

    def reset(self) -> None:
        """Forgets everything."""


_TRACKERS: dict[str, Callable[..., VideoTracker]] = {"cutie": Cutie, "propagate": Propagate, "xmem": XMem}
_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "feelvos": FEELVOS,
    "lstm_icnet": LSTMICNet,
    "lstm_segnet": LSTMSegNet,
    "rfcn": RFCN,
    "rgmp": RGMP,
    "stm": STM,
}
_SEED = 0  # of the weights of a network that are not loaded


def list_models() -> list[str]:
    """The names that :func:`create_model` knows."""
    return sorted([*_TRACKERS, *_NETWORKS])


def tracks_by_itself(name: str) -> bool:
    """Whether the model of that name is a :class:`VideoTracker`; the others are networks."""
    return name in _TRACKERS


def follows_objects(name: str) -> bool:
    """Whether the model of that name leads objects through a video; the others segment into classes."""
    model = _NETWORKS.get(name)
    return name in _TRACKERS or (isinstance(model, type) and issubclass(model, Network))


def takes(name: str, option: str) -> bool:
    """Whether `create_model` takes an option for the model of that name."""
    return option in inspect.signature({**_TRACKERS, **_NETWORKS}[name]).parameters


def create_model(
    name: str, weights: str | Path | None = None, *, device: str | torch.device = "cpu", **options: Any
) -> Any:
    """Creates a model by name, on a device.

    ``cutie``, ``propagate`` and ``xmem`` track by themselves, as :class:`VideoTracker` says. The others are networks
    (``torch.nn.Module``, in eval mode), which :class:`vosops.inference.Tracker` leads through videos, and
    :class:`vosops.inference.SemanticTracker` those that segment into classes.

    weights: a file with the model's weights, safetensors or a checkpoint (:func:`vosops.models.weights.load_weights`),
    or an .npz of a TensorFlow checkpoint's variables (``lstm_icnet``, ``feelvos``).
    None takes what the model ships with: ``propagate`` is not trained and takes no file, ``cutie`` and ``xmem`` need
    theirs, and a network gets random weights, always the same ones. options: of the model's class. Raises ValueError
    for an unknown name or a file that is not the model's, which names the first keys missing, unexpected or misshapen.

        >>> from vosops.models import create_model
        >>> sum(x.numel() for x in create_model("stm").parameters())
        38925570
    """
    if name in _TRACKERS:
        return _TRACKERS[name](weights=weights, device=device, **options)
    if name not in _NETWORKS:
        raise ValueError(f"model must be one of {', '.join(list_models())}, but is {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        network = _NETWORKS[name](**options)
    if weights is not None:
        load = load_tensorflow if Path(weights).suffix == ".npz" else load_weights
        load(network, weights)
    return network.to(device).eval()
