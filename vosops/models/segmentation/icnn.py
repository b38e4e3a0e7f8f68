"""ICNN, interlinked convolutional networks for face parsing: Zhou et al., ISNN 2015.

As aod321/icnn-face and aod321/STN-iCNN compute it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops.models.recurrence import Recurrent, through_time
from vosops.models.rows import Held, Pooled, Repeated, Rows
from vosops.models.segmentation._layers import chain
from vosops.models.semantic_network import FrameNetwork

__all__ = ["ICNN"]

_WIDTHS = (8, 16, 24, 32)  # of the four rows, the finest first
_PLACES = ("row1", "row2", "row3", "bottleneck")  # of ConvLSTMs
_CELLS = 3


def _conv5(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 5, padding=2)


def _halve(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=2, padding=1)


def _enlarge(x: Tensor, like: Tensor) -> Tensor:
    return functional.interpolate(x, like.shape[2:], mode="nearest")


class _Node(nn.Module):
    """What a cell does to one row, and what integrates the row in the last cell; the names are the original's."""

    def __init__(self, row: int) -> None:
        super().__init__()
        own = _WIDTHS[row]
        finer = _WIDTHS[row - 1] if row else 0
        coarser = _WIDTHS[row + 1] if row + 1 < len(_WIDTHS) else 0
        self.conv_node = _conv5(own, own)
        self.conv_node_batchnorm = nn.BatchNorm2d(own)
        self.inter_conv_node = _conv5(finer + own + coarser, own)
        self.inter_conv_node_batchnorm = nn.BatchNorm2d(own)
        # The coarsest row is integrated into the next, so that its own convolution is never run, nor are those of
        # the cells before the last; checkpoints hold them all.
        self.output_conv_node = _conv5(own + (coarser or own), own)
        self.output_conv_node_batchnorm = nn.BatchNorm2d(own)

    def rows(self, sources: list[Rows]) -> Rows:
        relu = nn.ReLU()
        layers = [self.inter_conv_node, self.inter_conv_node_batchnorm, relu]
        return chain(sources, *layers, self.conv_node, self.conv_node_batchnorm, relu)

    def forward(self, sources: list[Tensor]) -> Tensor:
        x = functional.relu(self.inter_conv_node_batchnorm(self.inter_conv_node(torch.cat(sources, 1))))
        return functional.relu(self.conv_node_batchnorm(self.conv_node(x)))

    def integrate(self, own: Tensor, coarser: Tensor) -> Tensor:
        x = torch.cat([own, _enlarge(coarser, own)], 1)
        y: Tensor = torch.tanh(self.output_conv_node_batchnorm(self.output_conv_node(x)))
        return y


class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.iCNN_Nodelist = nn.ModuleList(_Node(row) for row in range(len(_WIDTHS)))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        found = []
        for row, node in enumerate(self.iCNN_Nodelist):
            sources = [maps[row]]
            if row:
                sources.insert(0, _halve(maps[row - 1]))
            if row + 1 < len(maps):
                sources.append(_enlarge(maps[row + 1], maps[row]))
            found.append(node(sources))
        return found

    def whole(self, maps: list[Tensor]) -> list[Tensor]:
        """Return its maps, computed by rows."""
        found = []
        for row, node in enumerate(self.iCNN_Nodelist):
            assert isinstance(node, _Node)
            sources: list[Rows] = [Held(maps[row])]
            if row:
                sources.insert(0, Pooled(Held(maps[row - 1]), 3, padding=1))
            if row + 1 < len(maps):
                sources.append(Repeated(Held(maps[row + 1]), maps[row].shape[2:]))
            found.append(node.rows(sources).whole())
        return found

    def integrate_rows(self, maps: list[Tensor]) -> Rows:
        x: Rows = Held(maps.pop())
        while maps:
            node = self.iCNN_Nodelist[len(maps) - 1]
            assert isinstance(node, _Node)
            own = maps.pop()
            sources = [Held(own), Repeated(x, own.shape[2:])]
            x = chain(sources, node.output_conv_node, node.output_conv_node_batchnorm, nn.Tanh())
            x = Held(x.whole()) if maps else x
        return x

    def integrate(self, maps: list[Tensor]) -> Tensor:
        x = maps[-1]
        for row in reversed(range(len(maps) - 1)):
            node = self.iCNN_Nodelist[row]
            assert isinstance(node, _Node)
            x = node.integrate(maps[row], x)
        return x


class ICNN(FrameNetwork):
    """Four rows of convolutions at four scales, interlinked: images (N,C,H,W) in [0, 1] -> logits (N,K,H,W), any size.

    Args:
        num_classes: K; 9 of the whole face, or with ``part`` 2 of an eyebrow, an eye or a nose, and 4 of the mouth.
        in_channels: C.
        part: The network of the second stage, which sees a part of the face.
        recurrent: Where ConvLSTMs are, see :class:`FrameNetwork`: "row1" to "row3", the maps after the last cell,
            "bottleneck", the coarsest of them, and "head", all in one.

    The original sees a whole face at 64 x 64, eyebrows, eyes and noses at 64 x 64 and the mouth at 80 x 80. Parts on
    the right are mirrored for the network of the left. Source: aod321/icnn-face, `FaceModel` and `Stage2FaceModel`.

    >>> import torch
    >>> from vosops.models import create_model
    >>> create_model("icnn", num_classes=4, part=True)(torch.rand(1, 3, 33, 40)).shape
    torch.Size([1, 4, 33, 40])
    """

    stride, reach = 8, 148

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        in_channels: int = 3,
        part: bool = False,
        recurrent: Recurrent | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = (2 if part else 9) if num_classes is None else num_classes
        self.in_channels = in_channels
        self.input_conv = nn.ModuleList(_conv5(in_channels, width) for width in _WIDTHS)
        self.input_bnm = nn.ModuleList(nn.BatchNorm2d(width) for width in _WIDTHS)
        self.interlink_layers = nn.ModuleList(_Cell() for _ in range(_CELLS))
        labels = self.num_classes
        middle = 2 * labels + 8
        self.last_conv1 = _conv5(_WIDTHS[0], middle)
        self.last_con1_bnm = nn.BatchNorm2d(middle)
        self.last_conv2 = _conv5(middle, labels)
        self.last_con2_bnm = nn.BatchNorm2d(labels)  # of checkpoints; never run, and nor is the next
        self.last_conv3 = nn.Conv2d(labels, labels, 9, padding=4)
        self.last_conv3_bnm = nn.BatchNorm2d(labels)
        self.set_places({**dict(zip(_PLACES, _WIDTHS, strict=True)), "head": _WIDTHS[0]}, recurrent)

    @through_time
    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,K,H,W)."""
        maps = []
        for row, (conv, norm) in enumerate(zip(self.input_conv, self.input_bnm, strict=True)):
            images = _halve(images) if row else images
            maps.append(torch.tanh(norm(conv(images))))
        for cell in self.interlink_layers:
            maps = cell(maps)
        maps = [self.at(place, x) for place, x in zip(_PLACES, maps, strict=True)]
        last = self.interlink_layers[-1]
        assert isinstance(last, _Cell)
        x = self.at("head", last.integrate(maps))
        x = torch.tanh(self.last_con1_bnm(self.last_conv1(x)))
        logits: Tensor = self.last_conv3(self.last_conv2(x))
        return logits

    def rows(self, images: Tensor) -> Rows:
        """See :class:`FrameNetwork`; stores the maps of a cell, and those of the next."""
        maps = []
        for row, (conv, norm) in enumerate(zip(self.input_conv, self.input_bnm, strict=True)):
            images = _halve(images) if row else images
            maps.append(chain(Held(images), conv, norm, nn.Tanh()).whole())
        for cell in self.interlink_layers:
            assert isinstance(cell, _Cell)
            maps = cell.whole(maps)
        for row, place in enumerate(_PLACES):
            maps[row] = self.at(place, maps[row])
        last = self.interlink_layers[-1]
        assert isinstance(last, _Cell)
        x = self.rows_at("head", last.integrate_rows(maps))
        return chain(x, self.last_conv1, self.last_con1_bnm, nn.Tanh(), self.last_conv2, self.last_conv3)
