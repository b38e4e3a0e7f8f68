"""ICNet (Zhao et al., ECCV 2018): a deep branch on a quarter of the image, shallow ones on the half and the whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from vosops import _checks
from vosops.models.recurrence import Recurrent, through_time
from vosops.models.rows import Added, Enlarged, Held, Rows
from vosops.models.segmentation._common import IMAGENET_MEAN, IMAGENET_STD, conv_bn_relu, resize
from vosops.models.segmentation._layers import chain
from vosops.models.segmentation._resnet import ResNet
from vosops.models.semantic_network import FrameNetwork, Sides

__all__ = ["ICNet"]

_IMAGENET_CLASSES = 1000
_CHANNELS = 128  # of fused maps
_MEDIUM_CHANNELS, _LOW_CHANNELS = 512, 2048  # of the backbone's second and last map
_FULL = (32, 32, 64)  # channels of the convolutions that see the whole image
_BINS = (1, 2, 3, 6)
_OUTPUT_STRIDE = 8
_MEDIUM_STAGES, _LOW_STAGES = 2, 4  # of the backbone, for the half and for the quarter of the image
_QUARTER = 4  # the logits at this part of the sides are enlarged by as much


class _ConvNorm(nn.Module):
    """A 3x3 convolution of stride 2, batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv_bn_relu(inputs, outputs, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn(self.conv(x)))
        return y


class _CascadeFusion(nn.Module):
    """A coarse map, enlarged, and a fine one -> their sum, and logits of the coarse one at the fine one's size."""

    def __init__(self, low: int, high: int, num_classes: int) -> None:
        super().__init__()
        dilated = nn.Conv2d(low, _CHANNELS, 3, padding=2, dilation=2, bias=False)
        self.conv_low = nn.Sequential(dilated, nn.BatchNorm2d(_CHANNELS))
        self.conv_high = nn.Sequential(nn.Conv2d(high, _CHANNELS, 1, bias=False), nn.BatchNorm2d(_CHANNELS))
        self.conv_low_cls = nn.Conv2d(_CHANNELS, num_classes, 1, bias=False)

    def rows(self, low: Rows, high: Rows) -> Rows:
        enlarged = Enlarged(low, high.size[2:], align_corners=True)
        return chain(enlarged, self.conv_low, addend=chain(high, self.conv_high), slope=0.0)

    def parts_rows(self, low: Rows, high: Rows) -> tuple[Rows, Rows]:
        """Return what `rows` adds."""
        enlarged = Enlarged(low, high.size[2:], align_corners=True)
        return chain(enlarged, self.conv_low), chain(high, self.conv_high)

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what is added before the ReLU, and the logits in training mode."""
        low = self.conv_low(resize(low, high.shape[2:], align_corners=True))
        return low, self.conv_high(high), self.conv_low_cls(low) if self.training else None


class _Head(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.cff_12 = _CascadeFusion(_CHANNELS, _FULL[-1], num_classes)
        self.cff_24 = _CascadeFusion(_LOW_CHANNELS, _MEDIUM_CHANNELS, num_classes)
        self.conv_cls = nn.Conv2d(_CHANNELS, num_classes, 1, bias=False)


class ICNet(FrameNetwork):
    """The image cascade network with one unpruned ResNet-50 for two of its three branches.

    Args:
        num_classes: K.
        in_channels: Of the images.
        recurrent: Where ConvLSTMs are, see :class:`FrameNetwork`: "bottleneck", "medium" and "high", the 128 channels
            that the three branches contribute, after their batch norms, and "head", what the classifier reads, as in
            LSTM-ICNet's versions: v1 is "high", v2 "head", v3 "bottleneck", v4 the first two, v5 the first three, v6
            all.

    `forward` gives logits (N,K,h,w) of images (N,C,H,W) with sides of 4 pixels or more; h is the height rounded up to
    a multiple of 8, so for other sizes the logits are larger than the image. In training mode it gives four: these,
    the same at a quarter of the size, and of the coarser branches at an eighth and a sixteenth. The loss weighs the
    last three by 1, 0.4 and 0.4. Parameters are named as in ICNet-pytorch (``pretrained``, ``conv_sub1``, ``head``),
    with the ``pretrained.fc`` that nothing uses. What the original computes of the half-size image and throws away,
    the backbone's last two stages, is left out: in training their batch norms see the quarter-size image alone.
    Raises ValueError for an invalid option or size.

    Source: Zhao et al., ICNet for real-time semantic segmentation on high-resolution images, ECCV 2018.

    Example:
        >>> import torch
        >>> from vosops.models import ICNet
        >>> ICNet(num_classes=5).eval()(torch.rand(1, 3, 64, 96)).shape
        torch.Size([1, 5, 64, 96])
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    loss_weights = (1.0, 0.4, 0.4, 0.4)
    align_corners = True
    sides = Sides(least=_QUARTER)
    stride = 32

    def __init__(
        self, num_classes: int = 19, *, in_channels: int = 3, recurrent: Recurrent | None = None
    ) -> None:
        super().__init__()
        self.num_classes = _checks.check_positive_int("num_classes", num_classes)
        self.in_channels = _checks.check_positive_int("in_channels", in_channels)
        self.pretrained = ResNet("resnet50", in_channels, output_stride=_OUTPUT_STRIDE, deep=True)
        self.pretrained.fc = nn.Linear(_LOW_CHANNELS, _IMAGENET_CLASSES)
        self.conv_sub1 = nn.Sequential(
            *(
                _ConvNorm(inputs, outputs)
                for inputs, outputs in zip((in_channels, *_FULL), _FULL, strict=False)
            )
        )
        self.head = _Head(num_classes)
        self.set_places(dict.fromkeys(("bottleneck", "medium", "high", "head"), _CHANNELS), recurrent)

    def rows(self, images: Tensor) -> Rows:
        """See :class:`FrameNetwork`; stores the last map of each branch, at most."""
        image = Held(images)
        scaled = (
            Enlarged(image, [side // n for side in images.shape[2:]], align_corners=True)
            for n in (_QUARTER, 2)
        )
        low = self.pretrained.whole(next(scaled), last=_LOW_STAGES)
        x: Rows = Held(low)
        means = (
            Enlarged(Held(functional.adaptive_avg_pool2d(low, n)), low.shape[2:], align_corners=True)
            for n in _BINS
        )
        Added([x, *means]).whole(into=low)
        medium = self.pretrained.whole(next(scaled), last=_MEDIUM_STAGES)
        fused = Held(self._fused_rows(self.head.cff_24, x, Held(medium), "bottleneck", "medium").whole())
        del low, medium, x
        high = chain(image, *(layer for convolution in self.conv_sub1 for layer in convolution.children()))
        last = self.rows_at("head", self._fused_rows(self.head.cff_12, fused, high, None, "high"))
        # A 1x1 convolution without bias of an enlarged map is the enlarged convolution.
        x = Held(chain(last, self.head.conv_cls).whole())
        for factor in (2, 2 * _QUARTER):
            x = Enlarged(x, [factor * side for side in last.size[2:]], align_corners=True)
        return x

    def _fused_rows(
        self, fusion: _CascadeFusion, low: Rows, high: Rows, of_low: str | None, of_high: str
    ) -> Rows:
        """Return the sum of two branches, each with the ConvLSTM of its place."""
        if not self.recurrent:
            return fusion.rows(low, high)
        first, second = fusion.parts_rows(low, high)
        return Added(
            [self.rows_at(of_low, first) if of_low else first, self.rows_at(of_high, second)], slope=0.0
        )

    @through_time
    def forward(self, images: Tensor) -> Any:
        """Images (N,C,H,W) -> logits (N,K,h,w); in training mode at full size, 1/4, 1/8 and 1/16."""
        high = self.conv_sub1(images)
        stages = _LOW_STAGES if self.naive else _MEDIUM_STAGES  # the original computes all, and uses two
        medium = self.pretrained.maps(_scaled(images, 2), stages)[_MEDIUM_STAGES - 1]
        low = _with_pyramid(self.pretrained.maps(_scaled(images, _QUARTER), _LOW_STAGES)[-1])
        low, medium, logits_16 = self.head.cff_24(low, medium)
        medium = functional.relu(self.at("bottleneck", low) + self.at("medium", medium))
        medium, high, logits_8 = self.head.cff_12(medium, high)
        high = functional.relu(medium + self.at("high", high))
        logits_4 = self.head.conv_cls(_enlarged(self.at("head", high), 2))
        logits = _enlarged(logits_4, _QUARTER)
        return (logits, logits_4, logits_8, logits_16) if self.training else logits


def _scaled(images: Tensor, divisor: int) -> Tensor:
    """Return the images with sides divided, rounded down."""
    return resize(images, [side // divisor for side in images.shape[2:]], align_corners=True)


def _enlarged(x: Tensor, factor: int) -> Tensor:
    return resize(x, [factor * side for side in x.shape[2:]], align_corners=True)


def _with_pyramid(x: Tensor) -> Tensor:
    """Return x, with its means over n x n parts for each n of the bins, enlarged and added."""
    total = x
    for n in _BINS:
        total = total + resize(functional.adaptive_avg_pool2d(x, n), x.shape[2:], align_corners=True)
    return total
