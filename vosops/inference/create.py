"""`create_tracker`: a tracker from the name of a model, a network, or a tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vosops.models.create import create_model
from vosops.models.network import Network
from vosops.models.registry import find_model
from vosops.models.video_tracker import VideoTracker

from .network_tracker import NetworkTracker, uncompiled

__all__ = ["create_tracker"]

_RUNNING = ("memory_every", "scales", "memory_budget", "dtype", "channels_last", "naive")  # of NetworkTracker
_METHODS = [name for name in vars(VideoTracker) if not name.startswith("_")]


def create_tracker(
    model: str | Network | VideoTracker,
    weights: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    **options: Any,
) -> VideoTracker:
    """Create a tracker of objects in a video from the name of a model, a network or a tracker.

    Args:
        model: A name of :func:`vosops.models.list_models`, a :class:`vosops.models.Network`, or a
            :class:`vosops.models.VideoTracker`, which is returned.
        weights: A file of the model's weights, if model is a name: see :func:`vosops.models.create_model`.
        device: Device to run on; None: the CPU, or for a network its own device.
        **options: Options of the model, if model is a name; for a network those of
            :class:`vosops.inference.NetworkTracker`, which
            runs it: ``memory_every``, ``scales``, ``memory_budget``, ``dtype``, ``channels_last``, ``naive``.

    Raises:
        ValueError: The name is unknown, its model does not track objects, or an option or the file is invalid.
        TypeError: The model has another type, or does not have an option.
        FileNotFoundError, ImportError: The file does not exist; a required package is missing.

    Example:
        >>> import torch
        >>> from vosops.models import create_tracker
        >>> tracker = create_tracker("stm", memory_budget="2GB")
        >>> labels = torch.zeros(32, 32, dtype=torch.uint8)
        >>> labels[8:24, 8:24] = 1
        >>> tracker.initialize(torch.rand(3, 32, 32), labels)
        >>> tracker.step(torch.rand(3, 32, 32)).shape
        torch.Size([2, 32, 32])
    """
    if isinstance(model, str):
        return _by_name(model, weights, "cpu" if device is None else device, options)
    if weights is not None:
        raise ValueError(f"weights must be None with an existing model, got {weights}")
    if isinstance(uncompiled(model), Network):
        return NetworkTracker(model if device is None else model.to(device), **options)  # type: ignore[union-attr, arg-type]
    missing = [name for name in _METHODS if not hasattr(model, name)]
    if "initialize" in missing:
        raise TypeError(f"model must be a name, a network or a tracker, got {type(model).__name__}")
    if missing:
        raise TypeError(
            f"model must have {', '.join(missing)}, as a VideoTracker, got {type(model).__name__}"
        )
    if options or device is not None:
        given = ", ".join([*options, *(["device"] if device is not None else [])])
        raise TypeError(f"options must be none for {type(model).__name__}, which is a tracker, got {given}")
    return model  # type: ignore[return-value]


def _by_name(
    name: str, weights: str | Path | None, device: str | torch.device, options: dict[str, Any]
) -> VideoTracker:
    entry = find_model(name)
    if not entry.tracks_objects:
        raise ValueError(f"model must track objects, got {name!r}, a {entry.kind}: see SemanticTracker")
    if entry.kind == "tracker":
        tracker: VideoTracker = create_model(name, weights, device=device, **options)
        return tracker
    running = {option: value for option, value in options.items() if option in _RUNNING}
    own = {option: value for option, value in options.items() if option not in _RUNNING}
    return NetworkTracker(create_model(name, weights, device=device, **own), **running)
