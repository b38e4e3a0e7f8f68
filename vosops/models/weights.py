"""Weights from files: safetensors, or checkpoints read without running what they hold."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["load_weights", "read_weights"]

_NESTED = ("state_dict", "model_state", "model")  # where training scripts put the weights
_PREFIXES = ("module.", "model.")  # before every name: DataParallel's, and of networks saved with their loss
_COUNTER = "num_batches_tracked"  # of batch norm: older checkpoints lack it, and nothing depends on it
_NUMPY_CODES = "?bhilqBHILQefd"  # of bool, integers and floating-point numbers
_SHOWN = 3  # names of each kind in an error


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a module's weights from a file; every parameter and buffer must be present with its shape.

    path: safetensors (by its suffix) or a checkpoint of ``torch.save``, read with ``weights_only=True``; for what may
    be in it see :func:`read_weights`. A ``model.`` before every name is removed too, unless the module's own names
    have it, and names that begin as its ``unused_weights`` say are passed over. All of those that begin as its
    ``optional_weights`` say may be absent (a recurrent network begins with the weights of one that was not): a warning
    then names the first, and they keep their values. The values are brought to the module's dtypes and device. Raises
    ValueError that names the first keys missing, unexpected or misshapen, and then changes
    nothing; FileNotFoundError.

        >>> import torch
        >>> from vosops.models.weights import load_weights
        >>> torch.save({"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}, "linear.pth")
        >>> layer = torch.nn.Linear(2, 1)
        >>> load_weights(layer, "linear.pth")
        >>> layer.weight.tolist()
        [[1.0, 1.0]]
    """
    own = module.state_dict()
    kept = [x for x in _PREFIXES if own and all(name.startswith(x) for name in own)]
    prefixes = [x for x in _PREFIXES if x not in kept]
    given = _read(path, prefixes, tuple(getattr(module, "unused_weights", ())))
    missing = [name for name in own if name not in given and not name.endswith(_COUNTER)]
    optional = [name for name in own if name.startswith(tuple(getattr(module, "optional_weights", ())))]
    absent = optional if all(name in missing for name in optional) else []
    missing = [name for name in missing if name not in absent]
    unexpected = [name for name in given if name not in own]
    misshapen = [
        f"{name} is {tuple(given[name].shape)} and must be {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {kind} ({_first_of(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError(
            f"weights must be those of {type(module).__name__}, got {path}, where of {len(own)} tensors "
            f"{'; '.join(problems)}"
        )
    module.load_state_dict(given, strict=False)
    if absent:
        warnings.warn(
            f"{path} has none of the {len(absent)} recurrent weights of {type(module).__name__} "
            f"({_first_of(absent)}): they keep their values",
            stacklevel=2,
        )


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file by their names, on the CPU.

    A dictionary of tensors, or one under "state_dict", "model_state" or "model"; a ``module.`` before every name is
    removed. Raises ValueError for what cannot be read or holds anything else, FileNotFoundError.
    """
    return _read(path, _PREFIXES[:1])


def _read(path: str | Path, prefixes: Iterable[str], unused: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """See `read_weights`; without what begins with one of ``unused``, before or after prefixes are removed."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a file, got {path}, which {_absence(path)}")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    for name in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if isinstance(found, Mapping):
        found = {str(name): x for name, x in found.items() if not str(name).startswith(unused)}
        for prefix in prefixes:
            if all(name.startswith(prefix) for name in found):
                found = {name.removeprefix(prefix): x for name, x in found.items()}
                found = {name: x for name, x in found.items() if not name.startswith(unused)}
    if not isinstance(found, Mapping) or not found or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(
            f"weights must be tensors by their names, got {path}, which holds {_describe(found)}"
        )
    return dict(found)


def _absence(path: Path) -> str:
    return "is a folder" if path.is_dir() else "does not exist"


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("safetensors files need: pip install 'vosops[video]'") from error
    try:
        return load_file(path)
    except Exception as error:  # its own kind, that is no public name
        raise ValueError(f"weights must be a safetensors file, got {path}: {_first_line(error)}") from error


def _read_checkpoint(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_numbers_of_numpy()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what the file is
        raise ValueError(
            f"weights must be a checkpoint of tensors, got {path}: {_first_line(error)}"
        ) from error


def _numbers_of_numpy() -> list[Any]:
    """Return the constructors of numbers of NumPy, such as the best score that training scripts store."""
    try:
        import numpy
    except ImportError:
        return []
    scalar = numpy.float64(0).__reduce__()[0]
    modules = (
        "numpy.core.multiarray",
        "numpy._core.multiarray",
    )  # of NumPy before version 2, and from then on
    dtypes = {type(numpy.dtype(code)) for code in _NUMPY_CODES}
    return [numpy.dtype, *dtypes, *((scalar, f"{module}.scalar") for module in modules)]


def _first_line(error: Exception) -> str:
    if isinstance(error, UnpicklingError):  # whose own text advises to run what the file holds
        return "it is not a weights file, or holds other things than tensors"
    if isinstance(error, EOFError):
        return "it is empty or cut off"
    return str(error).strip().split("\n")[0] or type(error).__name__


def _describe(found: Any) -> str:
    if isinstance(found, Mapping):
        others: Sequence[str] = [str(name) for name, x in found.items() if not isinstance(x, Tensor)]
        return f"other things ({', '.join(others[:_SHOWN])})" if found else "nothing"
    return f"a {type(found).__name__}"
