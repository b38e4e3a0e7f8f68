"""PSPNet (Zhao et al., CVPR 2017): means over parts of a dilated ResNet's map, beside the map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vosops import _checks
from vosops.models.recurrence import Recurrent, through_time
from vosops.models.rows import Enlarged, Held, Rows
from vosops.models.segmentation._common import IMAGENET_MEAN, IMAGENET_STD, conv_bn_relu, resize
from vosops.models.segmentation._layers import chain
from vosops.models.segmentation._resnet import (
    BLOCKS,
    EXPANSION,
    MIDDLES,
    bottlenecks,
    check_backbone,
    deep_stem,
    draw_kernels,
    stages_whole,
)
from vosops.models.semantic_network import FrameNetwork, Sides

__all__ = ["PSPNet"]

_STEM = 128  # channels after the stem
_STRIDE = 8
_STRIDES = (1, 2, 1, 1)  # of the stages
_DILATIONS = (1, 1, 2, 4)  # of all blocks of the stages, the first ones too
_CHANNELS, _AUX_CHANNELS = 512, 256  # in the heads
_DROPOUT = 0.1
_ZOOM_FACTORS = (1, 2, 4, 8)


class _PyramidPooling(nn.Module):
    """x, and its means over n x n parts for each n of bins, reduced and enlarged: C + len(bins) (C // len(bins))."""

    def __init__(self, channels: int, bins: Sequence[int]) -> None:
        super().__init__()
        reduced = channels // len(bins)
        self.features = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), *conv_bn_relu(channels, reduced, 1)) for n in bins
        )

    def sources(self, x: Tensor) -> list[Rows]:
        """Return the maps that `forward` concatenates."""
        return [
            Held(x),
            *(Enlarged(Held(pool(x)), x.shape[2:], align_corners=True) for pool in self.features),
        ]

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        return torch.cat([x, *(resize(pool(x), size, align_corners=True) for pool in self.features)], 1)


class PSPNet(FrameNetwork):
    """Pyramid pooling on a dilated ResNet of stride 8 with a deep stem.

    Args:
        num_classes: K.
        in_channels: Of the images.
        backbone: "resnet50", "resnet101" or "resnet152".
        bins: Parts of a side whose means are taken; () for no pyramid.
        zoom_factor: By how much the logits are enlarged: 8 to the image's size, 1, 2 or 4.
        recurrent: Where ConvLSTMs are, see :class:`FrameNetwork`: "bottleneck", the backbone's 2048 channels
            ("depthwise" or "separable": a full kernel has 302 million weights), and "head", what the classifier reads.

    `forward` gives logits (N,K,h,w) of images (N,C,H,W), h = (H-1)/8*zoom_factor+1. Sides must be one more than a
    multiple of 8: 473, 713. In training mode it gives those of the auxiliary head too, of which the paper's loss
    takes 0.4 times. Parameters are named as in semseg (``layer0`` ... ``layer4``, ``ppm``, ``cls``, ``aux``). Raises
    ValueError for an invalid option or size.

    Source: Zhao et al., Pyramid scene parsing network, CVPR 2017.

    Example:
        >>> import torch
        >>> from vosops.models import PSPNet
        >>> PSPNet(num_classes=5).eval()(torch.rand(1, 3, 33, 49)).shape
        torch.Size([1, 5, 33, 49])
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    loss_weights = (1.0, 0.4)
    align_corners = True
    sides = Sides(_STRIDE, 1)
    stride = _STRIDE

    def __init__(
        self,
        num_classes: int = 19,
        *,
        in_channels: int = 3,
        backbone: str = "resnet50",
        bins: Sequence[int] = (1, 2, 3, 6),
        zoom_factor: int = 8,
        recurrent: Recurrent | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = _checks.check_positive_int("num_classes", num_classes)
        self.in_channels = _checks.check_positive_int("in_channels", in_channels)
        check_backbone(backbone, list(BLOCKS))
        bins = [_checks.check_positive_int("bins", n) for n in bins]
        if zoom_factor not in _ZOOM_FACTORS:
            raise ValueError(f"zoom_factor must be one of {_ZOOM_FACTORS}, got {zoom_factor}")
        self.zoom_factor = zoom_factor
        *stem, last = deep_stem(in_channels)
        self.layer0 = nn.Sequential(
            *stem, last, nn.BatchNorm2d(_STEM), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        inputs = _STEM
        stages = zip(MIDDLES, BLOCKS[backbone], _STRIDES, _DILATIONS, strict=True)
        for n, (middle, count, stride, dilation) in enumerate(stages, start=1):
            self.add_module(f"layer{n}", bottlenecks(inputs, middle, [dilation] * count, stride))
            inputs = middle * EXPANSION
        draw_kernels(self)
        seen = inputs
        if bins:
            self.ppm = _PyramidPooling(inputs, bins)
            seen += inputs // len(bins) * len(bins)
        self.cls = _head(seen, _CHANNELS, num_classes)
        self.aux = _head(MIDDLES[-2] * EXPANSION, _AUX_CHANNELS, num_classes)
        self.set_places({"bottleneck": inputs, "head": _CHANNELS}, recurrent)

    @through_time
    def forward(self, images: Tensor) -> Any:
        """Images (N,C,H,W) -> logits (N,K,h,w); in training mode (logits, logits of the auxiliary head)."""
        x = self.layer0(images)
        for n in range(1, len(MIDDLES) + 1):
            middle, x = x, self.get_submodule(f"layer{n}")(x)
        x = self.at("bottleneck", x)
        logits = self.classify(self.cls, self.ppm(x) if hasattr(self, "ppm") else x)
        logits = self.enlarged(logits, images)
        return (logits, self.enlarged(self.aux(middle), images)) if self.training else logits

    def rows(self, images: Tensor) -> Rows:
        """See :class:`FrameNetwork`; stores the backbone's last map, and the means of its parts."""
        stages = [self.get_submodule(f"layer{n}") for n in range(1, len(MIDDLES) + 1)]
        x = self.at("bottleneck", stages_whole(stages, [chain(Held(images), self.layer0)]))
        sources = self.ppm.sources(x) if hasattr(self, "ppm") else [Held(x)]
        *layers, last = self.cls
        logits = chain(self.rows_at("head", chain(sources, *layers)), last).whole()
        return Enlarged(Held(logits), self._size(images), align_corners=True)

    def _size(self, images: Tensor) -> list[int]:
        return [(side - 1) // _STRIDE * self.zoom_factor + 1 for side in images.shape[2:]]

    def enlarged(self, logits: Tensor, images: Tensor) -> Tensor:
        """Return logits at the size that zoom_factor makes of the images'."""
        return resize(logits, self._size(images), align_corners=True)


def _head(inputs: int, inner: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        *conv_bn_relu(inputs, inner, 3), nn.Dropout2d(_DROPOUT), nn.Conv2d(inner, num_classes, 1)
    )
