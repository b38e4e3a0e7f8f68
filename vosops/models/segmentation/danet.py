"""DANet (Fu et al., CVPR 2019): attention over positions and over channels, on a dilated ResNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vosops import _checks
from vosops.models.recurrence import Recurrent, through_time
from vosops.models.rows import Added, Enlarged, Held, Rows
from vosops.models.segmentation._common import IMAGENET_MEAN, IMAGENET_STD, conv_bn_relu, resize
from vosops.models.segmentation._layers import chain
from vosops.models.segmentation._resnet import BLOCKS, ResNet, check_backbone
from vosops.models.semantic_network import FrameNetwork
from vosops.ops.memory_read import memory_read

__all__ = ["ChannelAttention", "DANet", "PositionAttention"]

_CHANNELS = 2048  # of the backbone's last map
_NARROWING = 4  # from it to what attention sees
_KEY_NARROWING = 8  # from that to queries and keys
_DROPOUT = 0.1
_BLOCKS_OF_THE_LAST_STAGE = 3
_OUTPUT_STRIDE = 8


class PositionAttention(nn.Module):
    """Every position reads all positions: gamma * sum over q of softmax(query[p] . key[q]) value[q] + x[p].

    (N,C,H,W) -> the same. The affinity is never held: :func:`vosops.memory_read` with a scale of 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // _KEY_NARROWING, 1)
        self.key_conv = nn.Conv2d(channels, channels // _KEY_NARROWING, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def whole(self, x: Tensor) -> Tensor:
        """Return the same, with one map more than x at a time."""
        return self._read(x).mul_(self.gamma).add_(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N,C,H,W) -> (N,C,H,W)."""
        return self.gamma * self._read(x) + x

    def _read(self, x: Tensor) -> Tensor:
        return memory_read(self.query_conv(x), self.key_conv(x), self.value_conv(x), scale=1.0)


class ChannelAttention(nn.Module):
    """Every channel reads all channels, the least similar ones most: gamma * softmax(-x x^T) x + x.

    (N,C,H,W) -> the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def whole(self, x: Tensor) -> Tensor:
        """Return the same, with one map more than x at a time."""
        flat = x.flatten(2)
        return torch.baddbmm(flat, self._weights(flat).mul_(self.gamma), flat).view_as(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N,C,H,W) -> (N,C,H,W)."""
        flat = x.flatten(2)
        return self.gamma * torch.bmm(self._weights(flat), flat).view_as(x) + x

    @staticmethod
    def _weights(flat: Tensor) -> Tensor:
        return torch.softmax(-torch.bmm(flat, flat.mT), dim=-1)


class _Head(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        inner = _CHANNELS // _NARROWING
        self.conv5a = nn.Sequential(*conv_bn_relu(_CHANNELS, inner, 3))
        self.conv5c = nn.Sequential(*conv_bn_relu(_CHANNELS, inner, 3))
        self.sa = PositionAttention(inner)
        self.sc = ChannelAttention()
        self.conv51 = nn.Sequential(*conv_bn_relu(inner, inner, 3))
        self.conv52 = nn.Sequential(*conv_bn_relu(inner, inner, 3))
        self.conv6, self.conv7, self.conv8 = (
            nn.Sequential(nn.Dropout2d(_DROPOUT), nn.Conv2d(inner, num_classes, 1)) for _ in range(3)
        )

    def rows(self, x: Tensor) -> list[Rows]:
        """Return what the position attention and the channel attention lead to."""
        positions, channels = (chain(Held(x), conv).whole() for conv in (self.conv5a, self.conv5c))
        del x
        attended = [Held(self.sa.whole(positions)), Held(self.sc.whole(channels))]
        del positions, channels
        return [chain(y, conv) for y, conv in zip(attended, (self.conv51, self.conv52), strict=True)]

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the position attention and the channel attention lead to."""
        return self.conv51(self.sa(self.conv5a(x))), self.conv52(self.sc(self.conv5c(x)))


class DANet(FrameNetwork):
    """Dual attention on a ResNet of stride 8.

    Args:
        num_classes: K.
        in_channels: Of the images.
        backbone: "resnet50", "resnet101" or "resnet152".
        deep_stem: Whether three 3x3 convolutions begin the backbone, as in the code's latest version; False for the
            7x7 of the published DANet101.pth.tar.
        multi_grid: Dilations of the last stage's three blocks; (4, 8, 16) for the published DANet101.pth.tar, None for
            (2, 4, 4).
        recurrent: Where ConvLSTMs are, see :class:`FrameNetwork`: "bottleneck", the backbone's 2048 channels
            ("depthwise" or "separable": a full kernel has 302 million weights), "positions" and "channels", what each
            attention leads to, and "head", their sum.

    `forward` gives logits (N,K,H,W) of images (N,C,H,W) of any size; in training mode those of the sum, of the
    position attention and of the channel attention, of which the loss is the sum of three. Parameters are named as in
    PyTorch-Encoding (``pretrained.*``, ``head.*``). Raises ValueError for an invalid option.

    Source: Fu et al., Dual attention network for scene segmentation, CVPR 2019.

    Example:
        >>> import torch
        >>> from vosops.models import DANet
        >>> DANet(num_classes=5).eval()(torch.rand(1, 3, 32, 48)).shape
        torch.Size([1, 5, 32, 48])
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    align_corners = True
    stride = _OUTPUT_STRIDE
    unused_weights = ("pretrained.fc.",)  # of older versions of the code

    def __init__(
        self,
        num_classes: int = 19,
        *,
        in_channels: int = 3,
        backbone: str = "resnet50",
        deep_stem: bool = True,
        multi_grid: Sequence[int] | None = None,
        recurrent: Recurrent | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = _checks.check_positive_int("num_classes", num_classes)
        self.in_channels = _checks.check_positive_int("in_channels", in_channels)
        check_backbone(backbone, list(BLOCKS))
        if multi_grid is not None:
            if len(multi_grid) != _BLOCKS_OF_THE_LAST_STAGE:
                raise ValueError(f"multi_grid must be None or three dilations, got {multi_grid}")
            multi_grid = [_checks.check_positive_int("multi_grid", dilation) for dilation in multi_grid]
        self.pretrained = ResNet(
            backbone, in_channels, output_stride=_OUTPUT_STRIDE, deep=deep_stem, multi_grid=multi_grid
        )
        self.head = _Head(num_classes)
        inner = _CHANNELS // _NARROWING
        places = {"bottleneck": _CHANNELS, "positions": inner, "channels": inner, "head": inner}
        self.set_places(places, recurrent)

    def rows(self, images: Tensor) -> Rows:
        """See :class:`FrameNetwork`; stores the backbone's last map, then the inputs of the attention."""
        found = self.head.rows(self.at("bottleneck", self.pretrained.whole(Held(images))))
        both = [self.rows_at(place, x) for place, x in zip(("positions", "channels"), found, strict=True)]
        del found
        # What each attention sees alone is classified in training only.
        logits = chain(self.rows_at("head", Added(both)), self.head.conv8).whole()
        return Enlarged(Held(logits), images.shape[2:], align_corners=True)

    @through_time
    def forward(self, images: Tensor) -> Any:
        """Images (N,C,H,W) -> logits (N,K,H,W), in training mode of the sum, of positions and of channels."""
        found = self.head.features(self.at("bottleneck", self.pretrained.maps(images)[-1]))
        positions, channels = (self.at(*x) for x in zip(("positions", "channels"), found, strict=True))
        logits = [self.head.conv8(self.at("head", positions + channels))]
        if self.training or self.naive:
            logits += [self.head.conv6(positions), self.head.conv7(channels)]
        enlarged = tuple(resize(x, images.shape[2:], align_corners=True) for x in logits)
        return enlarged if self.training else enlarged[0]
