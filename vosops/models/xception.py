"""Xception-65 as DeepLab has it ("aligned"): every pooling a strided separable convolution, dilated on demand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vosops.models.convolution import conv_norm

__all__ = ["Xception65"]

_EPS = 1e-3  # of batch norm
_MIDDLE_BLOCKS = 16
# (input channels, channels of the three convolutions, stride) of the blocks of entry, middle and exit flow.
_BLOCKS: tuple[tuple[int, tuple[int, int, int], int], ...] = (
    (64, (128, 128, 128), 2),
    (128, (256, 256, 256), 2),
    (256, (728, 728, 728), 2),
    *[(728, (728, 728, 728), 1)] * _MIDDLE_BLOCKS,
    (728, (728, 1024, 1024), 2),
)
_LAST = (1024, (1536, 1536, 2048))  # of the last block, which has no shortcut
_LOW_BLOCK = 1  # the block whose second convolution gives the low-level map, of stride 4


class Xception65(nn.Module):
    """Images (N,3,H,W) in [-1, 1] -> low (N,256,ceil(H/4),ceil(W/4)), high (N,2048,ceil(H/s),ceil(W/s)).

    output_stride: s, 8 or 16. low is the second separable convolution of the second block, before its ReLU. Parameters
    are named as in timm's ``xception65``, so that a file of that model loads (its ``head`` aside). Source: Chen et al.,
    Encoder-decoder with atrous separable convolution, ECCV 2018.
    """

    def __init__(self, output_stride: int = 8) -> None:
        super().__init__()
        if output_stride not in (8, 16):
            raise ValueError(f"output_stride must be 8 or 16, got {output_stride}")
        self.stem = nn.Sequential(_ConvNorm(3, 32, 3, stride=2), _ConvNorm(32, 64, 3))
        blocks: list[nn.Module] = []
        reached, dilation = 2, 1
        for inputs, channels, stride in _BLOCKS:
            blocks.append(_Block(inputs, channels, 1 if reached == output_stride else stride, dilation))
            if reached == output_stride:
                dilation *= stride
            else:
                reached *= stride
        blocks.append(_Block(*_LAST, 1, dilation, last=True))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        x = low = self.stem(images)
        for i, block in enumerate(self.blocks):
            assert isinstance(block, _Block)
            if i == _LOW_BLOCK:
                x, low = block.with_second(x)
            else:
                x = block(x)
        return low, x


class _ConvNorm(nn.Module):
    """Convolution, batch norm and, by default, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=_EPS)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(self.conv, self.bn, x, relu=self.relu)


class _Separable(nn.Module):
    """Depthwise 3x3 and 1x1, a batch norm after each, and ReLUs after these or, if inner is False, before all."""

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int, inner: bool) -> None:
        super().__init__()
        self.inner = inner
        self.conv_dw = nn.Conv2d(
            inputs, inputs, 3, stride, dilation, dilation=dilation, groups=inputs, bias=False
        )
        self.bn_dw = nn.BatchNorm2d(inputs, eps=_EPS)
        self.conv_pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn_pw = nn.BatchNorm2d(outputs, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_norm(self.conv_dw, self.bn_dw, x if self.inner else torch.relu(x))
        x = conv_norm(self.conv_pw, self.bn_pw, torch.relu_(x) if self.inner else x)
        return torch.relu_(x) if self.inner else x


class _Block(nn.Module):
    """Three separable convolutions, the stride in the third, and a shortcut around them."""

    def __init__(
        self, inputs: int, channels: Sequence[int], stride: int, dilation: int, last: bool = False
    ) -> None:
        super().__init__()
        self.shortcut = None
        if not last and (stride != 1 or inputs != channels[-1]):
            self.shortcut = _ConvNorm(inputs, channels[-1], 1, stride, relu=False)
        self.last = last
        self.stack = nn.ModuleDict()
        for i, outputs in enumerate(channels):
            self.stack[f"conv{i + 1}"] = _Separable(inputs, outputs, stride if i == 2 else 1, dilation, last)
            inputs = outputs

    def with_second(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's output, and that of its second convolution."""
        second = self.stack["conv2"](self.stack["conv1"](x))
        y = self.stack["conv3"](second)
        if not self.last:
            y = y + (x if self.shortcut is None else self.shortcut(x))
        return y, second

    def forward(self, x: Tensor) -> Tensor:
        return self.with_second(x)[0]
