"""`create_model`: a model by its name, with its weights, on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vosops.models.network import Network
from vosops.models.registry import ModelEntry, find_model
from vosops.models.semantic_network import SemanticNetwork
from vosops.models.weights import load_weights

__all__ = ["create_model"]

_SEED = 0  # of the weights of a network that are not loaded
_NETWORKS = {"mask network": Network, "semantic network": SemanticNetwork}
_METHODS_OF_TRACKERS = ("initialize", "step")  # by which a tracker is known


def create_model(
    name: str, weights: str | Path | None = None, *, device: str | torch.device = "cpu", **options: Any
) -> Any:
    """Create a model by name, on a device.

    Args:
        name: One of :func:`vosops.models.list_models`, or an alias.
        weights: A file of the model's weights: safetensors or a checkpoint (:func:`vosops.models.load_weights`), or
            an .npz of a TensorFlow checkpoint's variables (``lstm_icnet``, ``feelvos``). None selects the default:
            ``propagate`` is not trained and takes no file, ``vosops_s`` uses the weights of the distribution
            ``vosops-weights-s``, ``cutie``, ``sam2`` and ``xmem`` require a file, and a network gets fixed random
            weights.
        device: Device of the parameters.
        **options: Options of the model's class.

    Returns:
        A tracker (``cutie``, ``propagate``, ``sam2``, ``vosops_s``, ``xmem``), which is a
        :class:`vosops.models.VideoTracker`; or a network, a ``torch.nn.Module`` in eval mode, which tracks objects
        with :func:`vosops.inference.create_tracker` or predicts the class of every pixel with
        :class:`vosops.inference.SemanticTracker`.

    Raises:
        ValueError: The name is unknown, an option is invalid, or the file does not fit the model: the error lists the
            first keys that are missing, unexpected or have the wrong shape.
        TypeError: The model does not have an option.
        FileNotFoundError, ImportError: The file does not exist; a required package is missing.

    Example:
        >>> from vosops.models import create_model
        >>> sum(x.numel() for x in create_model("stm").parameters())
        38925570
    """
    entry = find_model(name)
    entry.check_options(options)
    factory = entry.load()
    if entry.kind == "tracker":
        return _checked(entry, factory(weights=weights, device=device, **options))
    if weights is not None and entry.weights == "none":
        raise ValueError(f"weights must be None: {entry.name} takes none, got {weights}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        network: nn.Module = _checked(entry, factory(**options))
    if weights is not None:
        if Path(weights).suffix == ".npz":
            from vosops.models.tensorflow import load_tensorflow as load
        else:
            load = load_weights
        load(network, weights)
    return network.to(device).eval()


def _checked(entry: ModelEntry, made: Any) -> Any:
    """Return what a factory made, if it is of the kind that its entry says."""
    wanted = _NETWORKS.get(entry.kind)
    if wanted is None:
        fits = all(hasattr(made, method) for method in _METHODS_OF_TRACKERS)
    else:
        fits = isinstance(made, wanted)
    if not fits:
        raise TypeError(f"factory of {entry.name} must make a {entry.kind}, got {type(made).__name__}")
    return made
