"""Variables of a TensorFlow checkpoint into a module whose layers bear TensorFlow's names, or that knows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import torch
from torch import Tensor, nn

from vosops.nn import ConvLSTMCell
from vosops.nn.conv_lstm import TENSORFLOW_GATES, TENSORFLOW_NAMES

__all__ = ["NORM_NAMES", "Variable", "load_tensorflow", "load_variables", "read_variables", "variable_shapes"]

_OF_OPTIMIZERS = ("Adam", "Momentum", "beta1_power", "beta2_power", "global_step", "AccumGradOptimizer")
NORM_NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


class Variable(NamedTuple):
    """Where a variable goes: kernels from (h,w,in,out), those of a ConvLSTM with their gates in another order.

    depthwise: a kernel from (h,w,in,1).
    """

    tensor: Tensor
    of_gates: bool = False
    depthwise: bool = False

    @property
    def order(self) -> tuple[int, int, int, int]:
        """The dimensions of a kernel here, in TensorFlow's order."""
        return (2, 3, 0, 1) if self.depthwise else (2, 3, 1, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in TensorFlow."""
        return tuple(self.tensor.permute(self.order).shape if self.tensor.ndim == 4 else self.tensor.shape)

    def load(self, array: Any) -> None:
        """Copy an array of that shape."""
        source = torch.as_tensor(array)
        if source.ndim == 4:
            source = source.permute(2, 3, 0, 1) if self.depthwise else source.permute(3, 2, 0, 1)
        if self.of_gates:
            source = source.unflatten(0, (len(TENSORFLOW_GATES), -1))[TENSORFLOW_GATES].flatten(0, 1)
        self.tensor.copy_(source)


def load_tensorflow(module: nn.Module, path: str | Path) -> None:
    """Load an .npz of variables into a module, as :func:`load_variables` does; the error names the file, too."""
    variables = read_variables(path)
    try:
        load_variables(module, variables)
    except ValueError as error:
        raise ValueError(f"{error} in {path}") from error


def read_variables(path: str | Path) -> dict[str, Any]:
    """Return the arrays of an .npz by their names; ValueError if it cannot be read, FileNotFoundError."""
    import numpy as np

    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"weights must be a file, got {path}, which {what}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        reason = str(error).split("\n")[0]
        if "pickle" in reason:  # numpy advises to run what the file holds
            reason = "it is not an .npz file, or holds other things than numbers"
        raise ValueError(f"weights must be an .npz of arrays, got {path}: {reason}") from error


def variable_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every TensorFlow variable of a module."""
    return {name: variable.shape for name, variable in _variables_of(module).items()}


def load_variables(module: nn.Module, variables: Mapping[str, Any]) -> None:
    """Load arrays by their TensorFlow names into a module, each exactly once.

    What optimizers save beside is passed over. Raises ValueError that names the first missing, unexpected and
    misshapen, and then changes nothing.
    """
    own = _variables_of(module)
    given = {name: x for name, x in variables.items() if not any(word in name for word in _OF_OPTIMIZERS)}
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    misshapen = [
        f"{name} is {tuple(given[name].shape)} and must be {variable.shape}"
        for name, variable in own.items()
        if name in given and tuple(given[name].shape) != variable.shape
    ]
    problems = [
        f"{len(names)} {kind} (first {names[0]})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"variables must be those of {type(module).__name__}, got {'; '.join(problems)}")
    with torch.no_grad():
        for name, variable in own.items():
            variable.load(given[name])


def _variables_of(module: nn.Module) -> dict[str, Variable]:
    own = getattr(module, "tensorflow_variables", None)
    found: dict[str, Variable] = {} if own is None else own()
    if own is not None:
        return found
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            found[f"{name}/weights"] = Variable(layer.weight)
            if layer.bias is not None:
                found[f"{name}/biases"] = Variable(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            for theirs, ours in NORM_NAMES.items():
                found[f"{name}/{theirs}"] = Variable(getattr(layer, ours))
        elif isinstance(layer, ConvLSTMCell):
            scope = f"{name}/rnn/{name}"
            for kernel, weight in zip(TENSORFLOW_NAMES[layer.variant], layer.weights, strict=True):
                found[f"{scope}/{kernel}"] = Variable(weight, of_gates=True)
            if layer.bias is not None:
                found[f"{scope}/biases"] = Variable(layer.bias, of_gates=True)
    return found
