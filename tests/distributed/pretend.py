"""A GPU that there is not: tensors of the CPU that say they are on it, and a mode that refuses what CUDA refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
_COPIES = {torch.Tensor.copy_, torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}
_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)


def on_gpu(tensor: torch.Tensor) -> OnGpu:
    return tensor.as_subclass(OnGpu)


def tensors_in(arguments: Any) -> Iterator[torch.Tensor]:
    if isinstance(arguments, torch.Tensor):
        yield arguments
    elif isinstance(arguments, (list, tuple)):
        for each in arguments:
            yield from tensors_in(each)
    elif isinstance(arguments, dict):
        yield from tensors_in(list(arguments.values()))


class Devices(TorchFunctionMode):
    """Makes tensors on the GPU where they are asked for, and refuses operands of both devices."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        wanted = kwargs.get("device")
        args = list(args)
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], (str, torch.device)):
            wanted, args[1] = args[1], "cpu"
        elif func is torch.Tensor.cpu:
            wanted = "cpu"
        elif wanted is not None:
            kwargs["device"] = "cpu"
        writes = func is torch.Tensor.__setitem__ and not list(tensors_in(args[1]))
        if func not in _COPIES and not writes:
            operands = [args[0], *args[2:]] if func in _INDEXING else [args, kwargs]
            # CUDA takes numbers, tensors without dimensions among them, from the CPU
            kinds = {isinstance(t, OnGpu) for t in tensors_in(operands) if t.dim() or isinstance(t, OnGpu)}
            assert len(kinds) < 2, f"{func.__name__} got tensors of the CPU and of the GPU"
        result = func(*args, **kwargs)
        if wanted is None or not isinstance(result, torch.Tensor):
            return result
        return result.as_subclass(OnGpu if torch.device(wanted).type == "cuda" else torch.Tensor)
