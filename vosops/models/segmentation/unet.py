"""U-Net and U-Net++.

U-Net: Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015, as
milesial/Pytorch-UNet computes it. U-Net++: Zhou et al., "UNet++: A Nested U-Net Architecture for Medical Image
Segmentation", DLMIA 2018, as 4uiiurz1/pytorch-nested-unet computes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops.models.recurrence import Recurrent, through_time
from vosops.models.rows import Enlarged, Held, Padded, Pooled, Rows
from vosops.models.segmentation._common import IMAGENET_MEAN, IMAGENET_STD, conv_bn_relu
from vosops.models.segmentation._layers import chain
from vosops.models.semantic_network import FrameNetwork, Sides

__all__ = ["UNet", "UNetPlusPlus"]


_REACH = 108  # of U-Net with transposed convolutions
_PLACES = ("bottleneck", "decoder1", "decoder2", "decoder3", "head")


class _DoubleConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, middle: int | None = None) -> None:
        super().__init__()
        middle = outputs if middle is None else middle
        self.double_conv = nn.Sequential(*conv_bn_relu(inputs, middle), *conv_bn_relu(middle, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.double_conv(x)
        return y


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), _DoubleConv(inputs, outputs))

    def rows(self, x: Rows) -> Rows:
        pool, convolutions = self.maxpool_conv
        assert isinstance(convolutions, _DoubleConv)
        return chain(x, pool, convolutions.double_conv)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.maxpool_conv(x)
        return y


class _Up(nn.Module):
    """Doubles the deeper map, pads it to the skip's size, and convolves both together."""

    def __init__(self, inputs: int, outputs: int, bilinear: bool) -> None:
        super().__init__()
        self.up: nn.Module
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = _DoubleConv(inputs, outputs, inputs // 2)
        else:
            self.up = nn.ConvTranspose2d(inputs, inputs // 2, 2, stride=2)
            self.conv = _DoubleConv(inputs, outputs)

    def rows(self, deeper: Rows, skip: Rows) -> Rows:
        up = chain(deeper, self.up)
        rows, columns = skip.size[2] - up.size[2], skip.size[3] - up.size[3]
        if rows or columns:
            up = Padded(up, skip.size[2:], left=columns // 2, above=rows // 2)
        return chain([skip, up], self.conv.double_conv)

    def forward(self, deeper: Tensor, skip: Tensor) -> Tensor:
        x: Tensor = self.up(deeper)
        rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        if rows or columns:
            x = functional.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        y: Tensor = self.conv(torch.cat([skip, x], 1))
        return y


class _OutConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class UNet(FrameNetwork):
    """U-Net with batch norm, whose convolutions keep the size: images (N,C,H,W) -> logits (N,K,H,W).

    Images lie in [0, 1] and have sides of 16 pixels or more.

    Args:
        num_classes: K; the checkpoints published for Carvana have 2.
        in_channels: C.
        bilinear: Enlarge bilinearly between corners and with half the channels below, instead of by transposed
            convolutions.
        recurrent: Where ConvLSTMs are, see :class:`FrameNetwork`: "bottleneck", "decoder1" to "decoder3", the maps that
            are enlarged next, and "head", the last.

    Source: milesial/Pytorch-UNet, `UNet`; the paper's own does not pad, and crops the skips.

    >>> import torch
    >>> from vosops.models import create_model
    >>> create_model("unet", num_classes=4)(torch.rand(1, 3, 33, 50)).shape
    torch.Size([1, 4, 33, 50])
    """

    sides = Sides(least=16)
    stride = 16
    unused_weights = ("mask_values",)

    def __init__(
        self,
        num_classes: int = 2,
        *,
        in_channels: int = 3,
        bilinear: bool = False,
        recurrent: Recurrent | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.reach = None if bilinear else _REACH  # corners are corners of the whole image
        share = 2 if bilinear else 1
        self.inc = _DoubleConv(in_channels, 64)
        self.down1 = _Down(64, 128)
        self.down2 = _Down(128, 256)
        self.down3 = _Down(256, 512)
        self.down4 = _Down(512, 1024 // share)
        self.up1 = _Up(1024, 512 // share, bilinear)
        self.up2 = _Up(512, 256 // share, bilinear)
        self.up3 = _Up(256, 128 // share, bilinear)
        self.up4 = _Up(128, 64, bilinear)
        self.outc = _OutConv(64, num_classes)
        widths = (1024 // share, 512 // share, 256 // share, 128 // share, 64)
        self.set_places(dict(zip(_PLACES, widths, strict=True)), recurrent)

    @through_time
    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,K,H,W)."""
        skips = [self.inc(images)]
        for down in (self.down1, self.down2, self.down3, self.down4):
            skips.append(down(skips[-1]))
        x = self.at("bottleneck", skips.pop())
        for up, place in zip((self.up1, self.up2, self.up3, self.up4), _PLACES[1:], strict=True):
            x = self.at(place, up(x, skips.pop()))
        logits: Tensor = self.outc(x)
        return logits

    def rows(self, images: Tensor) -> Rows:
        """See :class:`FrameNetwork`; stores the skips, and the map that the next stage enlarges."""
        skips = [chain(Held(images), self.inc.double_conv).whole()]
        for down in (self.down1, self.down2, self.down3, self.down4):
            skips.append(down.rows(Held(skips[-1])).whole())
        x = Held(self.at("bottleneck", skips.pop()))
        for up, place in zip((self.up1, self.up2, self.up3), _PLACES[1:-1], strict=True):
            x = Held(self.at(place, up.rows(x, Held(skips.pop())).whole()))
        last = self.up4.rows(x, Held(skips.pop()))
        return chain(self.rows_at("head", last), self.outc.conv)


class _NestedBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs)

    def rows(self, sources: Sequence[Rows]) -> Rows:
        relu = nn.ReLU()
        return chain(sources, self.conv1, self.bn1, relu, self.conv2, self.bn2, relu)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(x)), inplace=True)


class UNetPlusPlus(FrameNetwork):
    """U-Net++, a U-Net with dense skips: images (N,C,H,W) -> logits (N,K,H,W); sides are multiples of 16.

    Args:
        num_classes: K.
        in_channels: C.
        deep_supervision: Logits after each of the four columns of decoders. In training mode `forward` returns the list
            of them, whose mean loss is the paper's; in eval mode the last.
        recurrent: Where ConvLSTMs are, see :class:`FrameNetwork`: "bottleneck", "decoder1" to "decoder3", the last maps
            of the rows above it, and "head", that of the finest.

    Images are normalised by ImageNet's mean and deviation and divided by 255 once more, as the original's are.
    Source: 4uiiurz1/pytorch-nested-unet, `NestedUNet`.

    >>> import torch
    >>> from vosops.models import create_model
    >>> network = create_model("unetplusplus", num_classes=4, deep_supervision=True)
    >>> network(torch.rand(1, 3, 32, 48)).shape, len(network.train()(torch.rand(1, 3, 32, 48)))
    (torch.Size([1, 4, 32, 48]), 4)
    """

    WIDTHS = (32, 64, 128, 256, 512)

    sides = Sides(16, least=16)
    stride = 16
    mean = IMAGENET_MEAN
    std = tuple(255 * x for x in IMAGENET_STD)

    def __init__(
        self,
        num_classes: int = 1,
        *,
        in_channels: int = 3,
        deep_supervision: bool = False,
        recurrent: Recurrent | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.deep_supervision = deep_supervision
        widths = self.WIDTHS
        self.depth = len(widths)
        for column in range(self.depth):
            for row in range(self.depth - column):
                if column:
                    inputs = widths[row] * column + widths[row + 1]
                else:
                    inputs = widths[row - 1] if row else in_channels
                self.add_module(f"conv{row}_{column}", _NestedBlock(inputs, widths[row]))
        for name in [f"final{n}" for n in range(1, self.depth)] if deep_supervision else ["final"]:
            self.add_module(name, nn.Conv2d(widths[0], num_classes, 1))
        self.set_places(dict(zip(_PLACES, reversed(widths), strict=True)), recurrent)

    @through_time
    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Images (N,C,H,W) -> logits (N,K,H,W); in training mode with deep supervision a list of four."""
        maps: list[list[Tensor]] = []  # by row, each as many as there are columns so far
        for row in range(self.depth):
            x = functional.max_pool2d(maps[-1][0], 2) if row else images
            maps.append([self._last_of(row, 0, self.get_submodule(f"conv{row}_0")(x))])
            for column, above in enumerate(reversed(range(row)), 1):
                up = functional.interpolate(
                    maps[above + 1][column - 1], scale_factor=2, mode="bilinear", align_corners=True
                )
                x = torch.cat([*maps[above], up], 1)
                maps[above].append(
                    self._last_of(above, column, self.get_submodule(f"conv{above}_{column}")(x))
                )
        if self.deep_supervision and self.training:
            return [self.get_submodule(f"final{n}")(x) for n, x in enumerate(maps[0][1:], 1)]
        logits: Tensor = self._last(maps[0][-1])
        return logits

    @property
    def _last(self) -> nn.Module:
        return self.get_submodule(f"final{self.depth - 1}" if self.deep_supervision else "final")

    def rows(self, images: Tensor) -> Rows:
        """See :class:`FrameNetwork`; stores the maps that feed skips, except the last two."""
        maps: list[list[Rows]] = []
        last = self.depth - 1
        for row in range(self.depth):
            source = Pooled(maps[-1][0]) if row else Held(images)
            maps.append([Held(self._last_of(row, 0, self._node(row, 0).rows([source]).whole()))])
            del source
            for column, above in enumerate(reversed(range(row)), 1):
                below = maps[above + 1][column - 1]
                if row == last:  # nothing more is made of that row
                    maps[above + 1].clear()
                size = [2 * side for side in below.size[2:]]
                node = self._node(above, column).rows(
                    [*maps[above], Enlarged(below, size, align_corners=True)]
                )
                del below
                # The finest map before the last is seen by that one alone.
                if above == 0 and column >= last - 1:
                    maps[above].append(self.rows_at("head", node) if column == last else node)
                else:
                    maps[above].append(Held(self._last_of(above, column, node.whole())))
                del node
        return chain(maps[0][-1], self._last)

    def _last_of(self, row: int, column: int, x: Tensor) -> Tensor:
        """Return what a ConvLSTM makes of the last map of a row, if it is that."""
        return self.at(_PLACES[column], x) if row + column == self.depth - 1 else x

    def _node(self, row: int, column: int) -> _NestedBlock:
        node = self.get_submodule(f"conv{row}_{column}")
        assert isinstance(node, _NestedBlock)
        return node
