"""The bytes of all tensors that live at the same time while code runs, also of those without data (device "meta")."""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make: `now`, and `peak`. What exists before does not count.

    What an operator makes of tensors without data is found once for tensors of the same layout: PyTorch finds it in
    Python, in 10 ms for a bilinear resize, and a network that runs by bands asks for the same many times.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._results: dict[Any, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        given = [x for x in leaves if isinstance(x, Tensor)]
        self._known.update(x.untyped_storage()._cdata for x in given)
        if given and all(_is_plain_meta(x) for x in given) and _makes_all_it_returns(func):
            # The types because 1, 1.0 and True are equal.
            key = func, _layouts((args, tuple(kwargs.items()))), tuple(map(type, leaves))
            if key in self._results:
                result = _made(self._results[key])
            else:
                result = func(*args, **kwargs)
                self._results[key] = _layouts(result)
        else:
            result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._count(x)
        return result

    def _count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Layout(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _is_plain_meta(x: Tensor) -> bool:
    return x.is_meta and type(x) in (Tensor, nn.Parameter)


@functools.cache
def _makes_all_it_returns(func: Any) -> bool:
    """Whether an operator changes and returns nothing that it was given."""
    schema = func._schema
    return not any(x.alias_info for x in [*schema.arguments, *schema.returns])


def _layouts(x: Any) -> Any:
    """Arguments or results with the layouts of tensors in their places, to be looked up."""
    if isinstance(x, Tensor):
        return _Layout(tuple(x.shape), x.stride(), x.dtype)
    if isinstance(x, (list, tuple)):
        return tuple(_layouts(y) for y in x)
    return x


def _made(x: Any) -> Any:
    """Results, of layouts."""
    if isinstance(x, _Layout):
        return torch.empty_strided(x.size, x.stride, dtype=x.dtype, device="meta")
    return tuple(_made(y) for y in x) if isinstance(x, tuple) else x
