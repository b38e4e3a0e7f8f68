"""The layers of a network as rows: what `vosops.models.rows` has for PyTorch's modules, with batch norm folded in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm as _Norm

from vosops.models.rows import Convolved, Doubled, Enlarged, Mapped, Pooled, Rows, Slope

__all__ = ["chain", "convolution", "folded"]

_NO_BEND = 1.0
_POINTWISE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.ReLU: functional.relu,
    nn.ReLU6: functional.relu6,
    nn.Tanh: torch.tanh,
}


def chain(
    sources: Rows | Sequence[Rows],
    *modules: nn.Module,
    addend: Rows | None = None,
    slope: Slope = 1.0,
) -> Rows:
    """Return what modules, run one after the other in eval mode, make of maps whose channels follow each other.

    addend, slope: of the last module, which must be a convolution or its batch norm: the map that is added, and the
    factor of what is negative then (0 for a ReLU). Raises TypeError for a module that has no counterpart.
    """
    maps = [sources] if isinstance(sources, Rows) else list(sources)
    rest = list(_flat(modules))
    while rest:
        module = rest.pop(0)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            norm: _Norm | None = None
            if rest and isinstance(rest[0], _Norm):
                norm = rest[0]
                rest = rest[1:]
            bend = _slope(rest.pop(0)) if rest and isinstance(rest[0], nn.ReLU | nn.PReLU) else _NO_BEND
            last = {} if rest else {"addend": addend}
            maps = [
                convolution(
                    maps, module, norm, slope=slope if not rest and bend is _NO_BEND else bend, **last
                )
            ]
        elif isinstance(module, _Norm):
            relu = bool(rest) and isinstance(rest[0], nn.ReLU)
            rest = rest[relu:]
            maps = _normalised(maps, module, relu)
        elif isinstance(module, nn.PReLU):
            maps = [Mapped(x, partial(functional.prelu, weight=module.weight)) for x in maps]
        elif type(module) in _POINTWISE:
            maps = [Mapped(x, _POINTWISE[type(module)]) for x in maps]
        elif isinstance(module, nn.MaxPool2d):
            maps = [Pooled(x, module.kernel_size, stride=module.stride, padding=module.padding) for x in maps]  # type: ignore[arg-type]
        elif isinstance(module, nn.Upsample) and module.mode == "bilinear":
            factor, corners = int(module.scale_factor), bool(module.align_corners)  # type: ignore[arg-type]
            maps = [Enlarged(x, [factor * side for side in x.size[2:]], align_corners=corners) for x in maps]
        else:
            raise TypeError(f"modules must be ones that compute by rows, got {type(module).__name__}")
    (x,) = maps
    return x


def convolution(
    sources: Sequence[Rows],
    conv: nn.Conv2d | nn.ConvTranspose2d,
    norm: _Norm | None = None,
    *,
    slope: Slope = 1.0,
    addend: Rows | None = None,
) -> Rows:
    """Return a convolution of maps with its batch norm.

    A transposed one must have stride 1, or kernels of 2x2 and stride 2.
    """
    weight, bias = folded(conv, norm)
    if isinstance(conv, nn.Conv2d):
        stride, padding, dilation = conv.stride[0], int(conv.padding[0]), conv.dilation[0]
    elif conv.stride[0] == 1:  # a convolution with the kernel turned round
        weight = weight.transpose(0, 1).flip(2, 3)
        stride, padding, dilation = 1, conv.kernel_size[0] - 1 - int(conv.padding[0]), 1
    else:
        (source,) = sources
        return Doubled(source, weight, bias)
    return Convolved(
        sources,
        weight,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=conv.groups,
        slope=slope,
        addend=addend,
    )


def folded(conv: nn.Conv2d | nn.ConvTranspose2d, norm: _Norm | None) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a convolution followed by a batch norm in eval mode."""
    if norm is None:
        return conv.weight, conv.bias
    scale, shift = _affine(norm)
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    of_outputs = (-1, 1, 1, 1) if isinstance(conv, nn.Conv2d) else (1, -1, 1, 1)
    weight = conv.weight * scale.view(of_outputs)
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)


def _flat(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Return the modules that do something in eval mode."""
    for module in modules:
        if isinstance(module, nn.Sequential):
            yield from _flat(list(module.children()))
        elif not isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d):
            yield module


def _affine(norm: _Norm) -> tuple[Tensor, Tensor]:
    """Return the factor and the summand of a batch norm in eval mode, in float32 at least."""
    assert norm.running_mean is not None and norm.running_var is not None
    dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = norm.weight * (norm.running_var.to(dtype) + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def _slope(module: nn.Module) -> Slope:
    return module.weight if isinstance(module, nn.PReLU) else 0.0


def _normalised(maps: Sequence[Rows], norm: _Norm, relu: bool) -> list[Rows]:
    """Return the maps after a batch norm over the channels of all, and a ReLU if asked for."""
    channels = [x.size[1] for x in maps]
    scale, shift = _affine(norm)
    found: list[Rows] = []
    for x, count, stop in zip(maps, channels, accumulate(channels), strict=True):
        part = slice(stop - count, stop)
        scales, shifts = (y[part].view(-1, 1, 1) for y in (scale, shift))
        found.append(Mapped(x, partial(_transformed, scale=scales, shift=shifts, relu=relu)))
    return found


def _transformed(x: Tensor, *, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    y = torch.addcmul(shift, x, scale).to(x.dtype)
    return functional.relu_(y) if relu else y
