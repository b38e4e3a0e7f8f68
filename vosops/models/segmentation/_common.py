"""What several of the networks here are built from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "conv_bn_relu", "resize"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def conv_bn_relu(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> list[nn.Module]:
    """Return a convolution that keeps the size (at stride 1), batch norm and a ReLU, for an `nn.Sequential`."""
    padding = kernel // 2 * dilation
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=bias),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def resize(x: Tensor, size: Sequence[int], *, align_corners: bool) -> Tensor:
    """Return a map resized bilinearly; itself if it has the size."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return functional.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)
