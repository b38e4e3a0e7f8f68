"""Xception as DeepLabV3Plus-Pytorch has it: the network for classification, dilated, not DeepLab's aligned one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from vosops.models.rows import Added, Held, Rows
from vosops.models.segmentation._layers import chain
from vosops.models.segmentation._resnet import draw_kernels

__all__ = ["Xception"]

_LEAST = {16: 71, 8: 103}  # sides of an image, for each output stride


class _Separable(nn.Module):
    """3x3 in each channel, then 1x1."""

    def __init__(self, inputs: int, outputs: int, *, padding: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            inputs, inputs, 3, padding=padding, dilation=dilation, groups=inputs, bias=False
        )
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pointwise(self.conv1(x))
        return y


class _Block(nn.Module):
    """Separable convolutions through the given channels, max-pooled if strided, and the input added.

    relu: whether a ReLU comes before the first convolution too.
    """

    def __init__(self, *channels: int, stride: int = 1, dilation: int = 1, relu: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n, (inputs, outputs) in enumerate(pairwise(channels)):
            if relu or n > 0:
                layers.append(nn.ReLU(inplace=n > 0))  # the block's input is added at the end
            layers.append(_Separable(inputs, outputs, padding=dilation, dilation=dilation))
            layers.append(nn.BatchNorm2d(outputs))
        if stride > 1:
            layers.append(nn.MaxPool2d(3, stride, 1))
        self.rep = nn.Sequential(*layers)
        self.skip: nn.Module | None = None
        if channels[0] != channels[-1] or stride > 1:
            self.skip = nn.Conv2d(channels[0], channels[-1], 1, stride, bias=False)
            self.skipbn = nn.BatchNorm2d(channels[-1])

    def rows(self, x: Rows) -> Rows:
        shortcut = x if self.skip is None else chain(x, self.skip, self.skipbn)
        layers: list[nn.Module] = []
        for layer in self.rep:
            layers += layer.children() if isinstance(layer, _Separable) else [layer]
        if isinstance(layers[-1], nn.MaxPool2d):
            return Added([chain(x, *layers), shortcut])
        return chain(x, *layers, addend=shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rep(x)
        y += x if self.skip is None else self.skipbn(self.skip(x))
        return y


class Xception(nn.Module):
    """Images -> a map of 128 channels at stride 4, and one of 2048 at the output stride, 8 or 16.

    The first two convolutions have no padding. The last two are dilated and padded by 1, so each takes two rows and
    columns from the map at output stride 16, six at 8; what follows them for classification is absent.
    """

    low_channels, channels = 128, 2048

    def __init__(self, in_channels: int, output_stride: int) -> None:
        super().__init__()
        self.least = _LEAST[output_stride]
        fine = output_stride == min(_LEAST)
        middle, last = (2, 4) if fine else (1, 2)  # dilations
        self.conv1 = nn.Conv2d(in_channels, 32, 3, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.block1 = _Block(64, 128, 128, stride=2, relu=False)
        self.block2 = _Block(128, 256, 256, stride=2)
        self.block3 = _Block(256, 728, 728, stride=1 if fine else 2, dilation=middle)
        for n in range(4, 12):
            self.add_module(f"block{n}", _Block(728, 728, 728, 728, dilation=middle))
        self.block12 = _Block(728, 728, 1024, dilation=last)
        self.conv3 = _Separable(1024, 1536, padding=1, dilation=last)
        self.bn3 = nn.BatchNorm2d(1536)
        self.conv4 = _Separable(1536, 2048, padding=1, dilation=last)
        draw_kernels(self)

    def streamed_pair(self, images: Rows) -> Iterator[Tensor]:
        """Yield the map of 128 channels, computed by rows, and then that of 2048."""
        relu = nn.ReLU()
        stem = chain(images, self.conv1, self.bn1, relu, self.conv2, self.bn2, relu)
        x = Held(self.block1.rows(stem).whole())
        del stem
        yield x.x
        for n in range(2, 13):
            block = self.get_submodule(f"block{n}")
            assert isinstance(block, _Block)
            x = Held(block.rows(x).whole())
        yield chain(x, *self.conv3.children(), self.bn3, relu, *self.conv4.children()).whole()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        x = functional.relu(self.bn2(self.conv2(x)), inplace=True)
        low = x = self.block1(x)
        for n in range(2, 13):
            x = self.get_submodule(f"block{n}")(x)
        x = functional.relu(self.bn3(self.conv3(x)), inplace=True)
        return low, self.conv4(x)
