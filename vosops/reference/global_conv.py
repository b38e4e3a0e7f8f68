"""The global convolution in plain PyTorch: four line convolutions and a sum, as RGMP writes it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d


def line_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the "same" convolution of x (N,C,H,W) with weight (M,C,k,1) or (M,C,1,k), zeros around the map."""
    if weight.numel() == 0:
        zeros = x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:])
        return zeros if bias is None else zeros + bias[:, None, None]
    return conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))


def global_conv_split_core(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
    addend: Tensor | None,
) -> Tensor:
    """Two line convolutions of one x (N,C,H,W) side by side -> (N,M1+M2,H,W); addend (N or 1,M1+M2,H,W) is added."""
    out = torch.cat([line_conv(x, first, first_bias), line_conv(x, second, second_bias)], 1)
    return out if addend is None else out + addend


def global_conv_merge_core(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    """Return the sum of a line convolution of x's first channels and one of its others -> (N,M,H,W)."""
    channels = first.shape[1]
    return line_conv(x[:, :channels], first, bias) + line_conv(x[:, channels:], second)


def global_conv_weight_core(x: Tensor, grad: Tensor, kernel_h: int, kernel_w: int) -> Tensor:
    """Return the gradient (M,C,kernel_h,kernel_w) of line_conv's weight for grad (N,M,H,W) of its result."""
    shape = (grad.shape[1], x.shape[1], kernel_h, kernel_w)
    if x.numel() == 0 or grad.numel() == 0:
        return x.new_zeros(shape)
    padding = [kernel_h // 2, kernel_w // 2]
    options = ([1, 1], padding, [1, 1], False, [0, 0], 1, [False, True, False])
    gradients = torch.ops.aten.convolution_backward(grad, x, x.new_empty(shape), None, *options)
    result: Tensor = gradients[1]
    return result


def global_conv(
    x: Tensor,
    l1_weight: Tensor,
    l2_weight: Tensor,
    r1_weight: Tensor,
    r2_weight: Tensor,
    *,
    l1_bias: Tensor | None = None,
    l2_bias: Tensor | None = None,
    r1_bias: Tensor | None = None,
    r2_bias: Tensor | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    """`vosops.global_conv` in plain PyTorch; see there."""
    l1_weight, r1_weight = l1_weight[:, : x.shape[1]], r1_weight[:, : x.shape[1]]
    left, right = line_conv(x, l1_weight, l1_bias), line_conv(x, r1_weight, r1_bias)
    if prepared is not None:
        middle = l1_weight.shape[0]
        left, right = left + prepared[:, :middle], right + prepared[:, middle:]
    return line_conv(left, l2_weight, l2_bias) + line_conv(right, r2_weight, r2_bias)
