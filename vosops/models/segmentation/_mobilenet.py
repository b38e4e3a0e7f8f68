"""MobileNetV2 as DeepLabV3Plus-Pytorch has it: convolutions without padding, blocks that pad their input."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from vosops.models.rows import Held, Padded, Rows
from vosops.models.segmentation._layers import chain

__all__ = ["MobileNetV2"]

_STEM = 32  # channels after the first convolution
_STAGES = (  # expansion, channels, blocks, stride
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_LOW = 4  # how many of the first modules make the fine map


def _conv_norm_relu6(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, dilation=dilation, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class _InvertedResidual(nn.Module):
    """1x1 to more channels (unless the expansion is 1), 3x3 in each channel, 1x1 to fewer, and the input added.

    The input is padded before the first 1x1, so the 3x3 sees what that makes of zeros at the border.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, dilation: int) -> None:
        super().__init__()
        inner = inputs * expansion
        depthwise = _conv_norm_relu6(inner, inner, 3, stride=stride, dilation=dilation, groups=inner)
        self.conv = nn.Sequential(
            *([_conv_norm_relu6(inputs, inner, 1)] if expansion > 1 else []),
            depthwise,
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.padding = dilation
        self.residual = stride == 1 and inputs == outputs

    def rows(self, x: Rows) -> Rows:
        sides = [side + 2 * self.padding for side in x.size[2:]]
        padded = Padded(x, sides, left=self.padding, above=self.padding)
        return chain(padded, self.conv, addend=x if self.residual else None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(functional.pad(x, [self.padding] * 4))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Images -> a map of 24 channels at stride 4, and one of 320 at the output stride, 8 or 16.

    Blocks that take the place of strided ones are dilated; the first of them as the last one before.
    """

    low_channels, channels, least = 24, 320, 3

    def __init__(self, in_channels: int, output_stride: int) -> None:
        super().__init__()
        modules: list[nn.Module] = [_conv_norm_relu6(in_channels, _STEM, 3, stride=2)]
        inputs, reached, dilation = _STEM, 2, 1
        for expansion, outputs, blocks, stride in _STAGES:
            before = dilation
            if reached == output_stride:
                dilation *= stride
                stride = 1
            reached *= stride
            for n in range(blocks):
                first = n == 0
                modules.append(
                    _InvertedResidual(
                        inputs, outputs, expansion, stride if first else 1, before if first else dilation
                    )
                )
                inputs = outputs
        named = [(str(n), module) for n, module in enumerate(modules)]
        self.low_level_features = nn.Sequential(OrderedDict(named[:_LOW]))
        self.high_level_features = nn.Sequential(OrderedDict(named[_LOW:]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def streamed_pair(self, images: Rows) -> Iterator[Tensor]:
        """Yield the map of 24 channels, computed by rows, and then that of 320."""
        x = images
        for modules in (self.low_level_features, self.high_level_features):
            for module in modules:
                x = (
                    Held(module.rows(x).whole())
                    if isinstance(module, _InvertedResidual)
                    else chain(x, module)
                )
            yield x.whole()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low_level_features(images)
        return low, self.high_level_features(low)
