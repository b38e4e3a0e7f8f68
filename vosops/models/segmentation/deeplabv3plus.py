"""DeepLabV3+ (Chen et al., ECCV 2018): parallel dilated convolutions, and a decoder that sees a finer map."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vosops import _checks
from vosops.models.recurrence import Recurrent, through_time
from vosops.models.rows import Enlarged, Held, Rows
from vosops.models.segmentation._common import IMAGENET_MEAN, IMAGENET_STD, conv_bn_relu, resize
from vosops.models.segmentation._layers import chain
from vosops.models.segmentation._mobilenet import MobileNetV2
from vosops.models.segmentation._resnet import ResNet, check_backbone
from vosops.models.segmentation._xception import Xception
from vosops.models.semantic_network import FrameNetwork, Sides

__all__ = ["DeepLabV3Plus"]

_BACKBONES = ("resnet50", "resnet101", "mobilenet_v2", "xception")
_RATES = {8: (12, 24, 36), 16: (6, 12, 18)}  # for each output stride
_CHANNELS, _LOW_CHANNELS = 256, 48  # of what the decoder sees of the coarse and of the fine map
_DROPOUT = 0.1
_PAPER_NORM_EPS = 1e-3


class _ResNetMaps(ResNet):
    """Of the maps of a ResNet the first and the last."""

    low_channels, channels, least = 256, 2048, 1

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        low, *_, high = self.maps(images)
        return low, high

    def streamed_pair(self, images: Rows) -> Iterator[Tensor]:
        """Yield the first map, computed by rows, and then the last."""
        held: list[Rows] = [Held(self.whole(images, last=1))]
        yield held[0].whole()
        yield self.further_whole(held, first=2)


def _conv3x3(inputs: int, outputs: int, *, dilation: int = 1, separable: bool) -> list[nn.Module]:
    """Return a 3x3 convolution with batch norm and ReLU; or a depthwise and a 1x1 one, each with its own."""
    if not separable:
        return conv_bn_relu(inputs, outputs, 3, dilation=dilation)
    return [
        *conv_bn_relu(inputs, inputs, 3, dilation=dilation, groups=inputs),
        *conv_bn_relu(inputs, outputs, 1),
    ]


class _ASPP(nn.Module):
    """A 1x1, three dilated 3x3 and the mean of the map, concatenated and reduced."""

    def __init__(self, channels: int, rates: tuple[int, ...], *, separable: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Sequential(*conv_bn_relu(channels, _CHANNELS, 1)),
                *(
                    nn.Sequential(*_conv3x3(channels, _CHANNELS, dilation=rate, separable=separable))
                    for rate in rates
                ),
                nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(channels, _CHANNELS, 1)),
            ]
        )
        branches = len(self.convs)
        self.project = nn.Sequential(*conv_bn_relu(branches * _CHANNELS, _CHANNELS, 1), nn.Dropout(_DROPOUT))

    def rows(self, x: Tensor) -> Rows:
        *convs, of_mean = self.convs
        pool, *layers = of_mean.children()
        mean = chain(Held(pool(x)), *layers).whole()
        everywhere = mean.expand(-1, -1, *x.shape[2:])
        return chain([*(chain(Held(x), conv) for conv in convs), Held(everywhere)], self.project)

    def forward(self, x: Tensor) -> Tensor:
        *convs, of_mean = self.convs
        found = [*(conv(x) for conv in convs), of_mean(x).expand(-1, -1, *x.shape[2:])]
        y: Tensor = self.project(torch.cat(found, 1))
        return y


class _Head(nn.Module):
    def __init__(
        self, low_channels: int, channels: int, rates: tuple[int, ...], num_classes: int, *, paper: bool
    ) -> None:
        super().__init__()
        self.align_corners = paper
        self.project = nn.Sequential(*conv_bn_relu(low_channels, _LOW_CHANNELS, 1))
        self.aspp = _ASPP(channels, rates, separable=paper)
        self.classifier = nn.Sequential(
            *_conv3x3(_LOW_CHANNELS + _CHANNELS, _CHANNELS, separable=paper),
            *(_conv3x3(_CHANNELS, _CHANNELS, separable=True) if paper else []),
            nn.Conv2d(_CHANNELS, num_classes, 1),
        )
        if paper:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = _PAPER_NORM_EPS

    def joined(self, low: Tensor, high: Tensor) -> Tensor:
        """Return what the last convolutions read."""
        return torch.cat([low, resize(high, low.shape[2:], align_corners=self.align_corners)], 1)


class DeepLabV3Plus(FrameNetwork):
    """Atrous spatial pyramid pooling and a decoder, as in VainF's widespread PyTorch code.

    Args:
        num_classes: K.
        in_channels: Of the images.
        backbone: "resnet50", "resnet101", "mobilenet_v2" or "xception".
        output_stride: Of the backbone's last map: 16, or 8 for a finer one that costs more.
        paper: Whether the head is the one of the paper and its TensorFlow code: separable 3x3 convolutions in the
            pyramid, two of them in the decoder, batch norms with an epsilon of 1e-3, and corners aligned where maps
            are resized. Checkpoints of DeepLabV3Plus-Pytorch do not fit it.
        recurrent: Where ConvLSTMs are, see :class:`FrameNetwork`: "bottleneck", what the parallel convolutions give,
            "low", the 48 channels of the finer map, and "head", what the classifier reads.

    `forward` gives logits (N,K,H,W) of images (N,C,H,W). They may have any size, with "xception" sides of at least
    71, or 103 where output_stride is 8, and of at least 3 with "mobilenet_v2". Parameters are named as in
    DeepLabV3Plus-Pytorch (``backbone``, ``classifier``). Raises ValueError for an invalid option or size.

    Source: Chen et al., Encoder-decoder with atrous separable convolution for semantic image segmentation, ECCV 2018.

    Example:
        >>> import torch
        >>> from vosops.models import DeepLabV3Plus
        >>> DeepLabV3Plus(num_classes=5, backbone="mobilenet_v2").eval()(torch.rand(1, 3, 32, 48)).shape
        torch.Size([1, 5, 32, 48])
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(
        self,
        num_classes: int = 21,
        *,
        in_channels: int = 3,
        backbone: str = "resnet50",
        output_stride: int = 16,
        paper: bool = False,
        recurrent: Recurrent | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = _checks.check_positive_int("num_classes", num_classes)
        self.in_channels = _checks.check_positive_int("in_channels", in_channels)
        check_backbone(backbone, _BACKBONES)
        if output_stride not in _RATES:
            raise ValueError(f"output_stride must be 8 or 16, got {output_stride}")
        self.backbone: _ResNetMaps | MobileNetV2 | Xception
        if backbone == "mobilenet_v2":
            self.backbone = MobileNetV2(in_channels, output_stride)
        elif backbone == "xception":
            self.backbone = Xception(in_channels, output_stride)
        else:
            self.backbone = _ResNetMaps(backbone, in_channels, output_stride=output_stride, deep=False)
        self.sides = Sides(least=self.backbone.least)
        self.stride = output_stride
        self.classifier = _Head(
            self.backbone.low_channels,
            self.backbone.channels,
            _RATES[output_stride],
            num_classes,
            paper=paper,
        )
        self.set_places({"bottleneck": _CHANNELS, "low": _LOW_CHANNELS, "head": _CHANNELS}, recurrent)

    def rows(self, images: Tensor) -> Rows:
        """See :class:`FrameNetwork`; stores the backbone's map, and 48 channels of the fine one."""
        maps = self.backbone.streamed_pair(Held(images))
        low = chain(Held(next(maps)), self.classifier.project).whole()
        coarse = Held(self.at("bottleneck", self.classifier.aspp.rows(next(maps)).whole()))
        joined = [
            Held(self.at("low", low)),
            Enlarged(coarse, low.shape[2:], align_corners=self.classifier.align_corners),
        ]
        del low
        *layers, last = self.classifier.classifier
        logits = chain(self.rows_at("head", chain(joined, *layers)), last).whole()
        return Enlarged(Held(logits), images.shape[2:], align_corners=self.classifier.align_corners)

    @through_time
    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,K,H,W)."""
        fine, coarse = self.backbone(images)
        low = self.at("low", self.classifier.project(fine))
        high = self.at("bottleneck", self.classifier.aspp(coarse))
        logits = self.classify(self.classifier.classifier, self.classifier.joined(low, high))
        return resize(logits, images.shape[2:], align_corners=self.classifier.align_corners)
