"""Layers of the networks here, whose convolutions are those of `vosops.ops.conv3x3`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops.ops.conv3x3 import conv2d

__all__ = ["Conv3x3", "conv2d", "conv_norm"]


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the size, by `conv2d`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor, addend: Tensor | None = None, relu: bool = False) -> Tensor:
        """Return the convolution of x, + addend, and a ReLU if asked for."""
        return conv2d(x, self.weight, self.bias, padding=1, addend=addend, relu=relu)


def conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor, *, relu: bool = False) -> Tensor:
    """norm(conv(x)), and a ReLU if asked for; without gradients and in eval mode by one convolution."""
    if torch.is_grad_enabled() or norm.training:
        y: Tensor = norm(conv(x))
        return functional.relu(y, inplace=True) if relu else y
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = conv.weight * scale[:, None, None, None]
    bias = norm.bias - norm.running_mean * scale
    return conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups, relu=relu)
