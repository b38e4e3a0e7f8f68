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
        weights: A file of the model's weights: safetensors or a checkpoint (:func:`vosops.models.load_weights`), or an
            .npz of a TensorFlow checkpoint's variables (``lstm_icnet``, ``feelvos``). None takes what the model ships
            with: ``propagate`` is not trained and takes no file, ``vosops_s`` takes those of the distribution
            ``vosops-weights-s``, ``cutie``, ``sam2`` and ``xmem`` need theirs, and a network gets random weights,
            always the same ones.
        device: Where its parameters are.
        **options: Of the model's class.

    Returns:
        A tracker (``cutie``, ``propagate``, ``sam2``, ``vosops_s``, ``xmem``) as :class:`vosops.models.VideoTracker`
        says, which tracks objects by itself; or a network, a ``torch.nn.Module`` in eval mode, which tracks objects by
        :func:`vosops.inference.create_tracker`, or finds the class of every pixel by
        :class:`vosops.inference.SemanticTracker`.

    Raises:
        ValueError: The name is unknown, an option cannot be, or the file is not the model's: the first keys missing,
            unexpected and misshapen are named.
        TypeError: An option that the model does not have.
        FileNotFoundError, ImportError: There is no such file; the model needs a package.

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
