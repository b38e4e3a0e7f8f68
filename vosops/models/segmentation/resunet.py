"""ResUNet and ResUNet++.

ResUNet: Zhang et al., "Road Extraction by Deep Residual U-Net", GRSL 2018, as rishikksh20/ResUnet computes it.
ResUNet++: Jha et al., "ResUNet++: An Advanced Architecture for Medical Image Segmentation", ISM 2019, as the author's
PyTorch code, DebeshJha/ResUNetPlusPlus, computes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops.models.recurrence import Recurrent, through_time
from vosops.models.rows import Added, Held, Repeated, Rows
from vosops.models.segmentation._layers import chain
from vosops.models.semantic_network import FrameNetwork, Sides

__all__ = ["ResUNet", "ResUNetPlusPlus"]

_SIDES = Sides(8, least=8)


def _pre_activated(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """Batch norm, a ReLU, and a 3x3 convolution."""
    return [
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 3, stride, padding=1),
    ]


def _stem(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), *_pre_activated(outputs, outputs))


class _ResidualConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            *_pre_activated(inputs, outputs, stride), *_pre_activated(outputs, outputs)
        )
        self.conv_skip = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs)
        )

    def rows(self, sources: Rows | Sequence[Rows]) -> Rows:
        return chain(sources, self.conv_block, addend=chain(sources, self.conv_skip))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv_block(x) + self.conv_skip(x)
        return y


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.upsample(x)
        return y


class ResUNet(FrameNetwork):
    """A U-Net of pre-activated residual blocks: images (N,C,H,W) -> logits (N,K,H,W).

    Images lie in [0, 1]; their sides are multiples of 8.

    Args:
        num_classes: K; 1, the original's, is a foreground.
        in_channels: C.
        filters: Channels of the three scales and of the bridge below them.
        recurrent: Where ConvLSTMs are, see :class:`FrameNetwork`: "bottleneck", the bridge, "decoder1", "decoder2", and
            "head", the last map.

    Source: rishikksh20/ResUnet, `ResUnet`, which ends in a sigmoid; here logits are returned, in training too. Unlike
    in the paper, shortcuts are 3x3 convolutions and maps are enlarged by transposed convolutions.

    >>> import torch
    >>> from vosops.models import create_model
    >>> create_model("resunet", filters=(8, 16, 32, 64))(torch.rand(1, 3, 24, 40)).shape
    torch.Size([1, 1, 24, 40])
    """

    sides = _SIDES
    stride, reach = 8, 44

    def __init__(
        self,
        num_classes: int = 1,
        *,
        in_channels: int = 3,
        filters: Sequence[int] = (64, 128, 256, 512),
        recurrent: Recurrent | None = None,
    ) -> None:
        super().__init__()
        if len(filters) != 4:
            raise ValueError(f"filters must be four numbers of channels, got {tuple(filters)}")
        self.num_classes = num_classes
        self.in_channels = in_channels
        first, second, third, bridge = filters
        self.input_layer = _stem(in_channels, first)
        self.input_skip = nn.Sequential(nn.Conv2d(in_channels, first, 3, padding=1))
        self.residual_conv_1 = _ResidualConv(first, second, 2)
        self.residual_conv_2 = _ResidualConv(second, third, 2)
        self.bridge = _ResidualConv(third, bridge, 2)
        self.upsample_1 = _Upsample(bridge)
        self.up_residual_conv1 = _ResidualConv(bridge + third, third)
        self.upsample_2 = _Upsample(third)
        self.up_residual_conv2 = _ResidualConv(third + second, second)
        self.upsample_3 = _Upsample(second)
        self.up_residual_conv3 = _ResidualConv(second + first, first)
        self.output_layer = nn.Sequential(nn.Conv2d(first, num_classes, 1))
        self.set_places(
            {"bottleneck": bridge, "decoder1": third, "decoder2": second, "head": first}, recurrent
        )

    @through_time
    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,K,H,W)."""
        first = self.input_layer(images) + self.input_skip(images)
        second = self.residual_conv_1(first)
        third = self.residual_conv_2(second)
        x = self.at("bottleneck", self.bridge(third))
        x = self.at("decoder1", self.up_residual_conv1(torch.cat([self.upsample_1(x), third], 1)))
        x = self.at("decoder2", self.up_residual_conv2(torch.cat([self.upsample_2(x), second], 1)))
        x = self.at("head", self.up_residual_conv3(torch.cat([self.upsample_3(x), first], 1)))
        logits: Tensor = self.output_layer(x)
        return logits

    def rows(self, images: Tensor) -> Rows:
        """See :class:`FrameNetwork`; stores the skips, and the map that the next stage enlarges."""
        image = Held(images)
        skips = [chain(image, self.input_layer, addend=chain(image, self.input_skip)).whole()]
        for block in (self.residual_conv_1, self.residual_conv_2, self.bridge):
            skips.append(block.rows(Held(skips[-1])).whole())
        x: Rows = Held(self.at("bottleneck", skips.pop()))
        for upsample, block, place in (
            (self.upsample_1, self.up_residual_conv1, "decoder1"),
            (self.upsample_2, self.up_residual_conv2, "decoder2"),
            (self.upsample_3, self.up_residual_conv3, "head"),
        ):
            x = block.rows([chain(x, upsample.upsample), Held(skips.pop())])
            x = self.rows_at(place, Held(x.whole()) if skips else x)
        return chain(x, self.output_layer)


class _SqueezeExcitation(nn.Module):
    RATIO = 8

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(channels, channels // self.RATIO, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // self.RATIO, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self._share(x)

    def scale_(self, x: Tensor) -> Tensor:
        """Return the same, computed in place."""
        return x.mul_(self._share(x))

    def _share(self, x: Tensor) -> Tensor:
        share: Tensor = self.net(x.mean((2, 3)))
        return share[:, :, None, None]


class _SqueezedResidual(nn.Module):
    """A residual block whose sum passes squeeze and excitation."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, first: bool = False) -> None:
        super().__init__()
        if first:
            self.c1 = _stem(inputs, outputs)
        else:
            self.c1 = nn.Sequential(
                *_pre_activated(inputs, outputs, stride), *_pre_activated(outputs, outputs)
            )
        self.c2 = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.attn = _SqueezeExcitation(outputs)

    def whole(self, sources: Rows | Sequence[Rows]) -> Tensor:
        """Return its map, computed by rows."""
        return self.attn.scale_(chain(sources, self.c1, addend=chain(sources, self.c2)).whole())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn(self.c1(x) + self.c2(x))
        return y


class _SummedPyramid(nn.Module):
    """Four dilated convolutions, summed."""

    RATES = (1, 6, 12, 18)

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        for n, rate in enumerate(self.RATES, 1):
            conv = nn.Conv2d(inputs, outputs, 3, padding=rate, dilation=rate)
            self.add_module(f"c{n}", nn.Sequential(conv, nn.BatchNorm2d(outputs)))
        self.c5 = nn.Conv2d(outputs, outputs, 1)

    def rows(self, x: Rows) -> Rows:
        branches = [chain(x, self.get_submodule(f"c{n}")) for n in range(1, len(self.RATES) + 1)]
        return chain(Added(branches), self.c5)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.get_submodule("c1")(x)
        for n in range(2, len(self.RATES) + 1):
            total = total + self.get_submodule(f"c{n}")(x)
        y: Tensor = self.c5(total)
        return y


class _Attention(nn.Module):
    """Weighs the deeper map by the encoder's and itself."""

    def __init__(self, skip: int, deeper: int) -> None:
        super().__init__()
        self.g_conv = nn.Sequential(*_pre_activated(skip, deeper), nn.MaxPool2d(2))
        self.x_conv = nn.Sequential(*_pre_activated(deeper, deeper))
        self.gc_conv = nn.Sequential(*_pre_activated(deeper, deeper))

    def whole(self, skip: Tensor, deeper: Tensor) -> Tensor:
        """Return its map, computed by rows."""
        both = Added([chain(Held(skip), self.g_conv), chain(Held(deeper), self.x_conv)])
        return chain(both, self.gc_conv).whole().mul_(deeper)

    def forward(self, skip: Tensor, deeper: Tensor) -> Tensor:
        y: Tensor = self.gc_conv(self.g_conv(skip) + self.x_conv(deeper))
        return y * deeper


class _Decoder(nn.Module):
    def __init__(self, skip: int, deeper: int, outputs: int) -> None:
        super().__init__()
        self.a1 = _Attention(skip, deeper)
        self.r1 = _SqueezedResidual(deeper + skip, outputs)

    def whole(self, skip: Tensor, deeper: Tensor) -> Tensor:
        """Return its map, computed by rows."""
        up = Repeated(Held(self.a1.whole(skip, deeper)), skip.shape[2:])
        return self.r1.whole([up, Held(skip)])

    def forward(self, skip: Tensor, deeper: Tensor) -> Tensor:
        up = functional.interpolate(self.a1(skip, deeper), scale_factor=2, mode="nearest")
        y: Tensor = self.r1(torch.cat([up, skip], 1))
        return y


class ResUNetPlusPlus(FrameNetwork):
    """ResUNet++: images (N,C,H,W) in [0, 1] -> logits (N,K,H,W); sides are multiples of 8.

    ResUNet with squeeze and excitation, a pyramid of dilated convolutions as bridge and before the classifier, and
    attention in the decoder.

    Args:
        num_classes: K; 1, the original's, is a foreground.
        in_channels: C.
        recurrent: Where ConvLSTMs are, see :class:`FrameNetwork`: "bottleneck", the bridge, "decoder1" to "decoder3",
            and "head", what the classifier reads.

    Source: the author's own PyTorch code, DebeshJha/ResUNetPlusPlus, `build_resunetplusplus`. `ResUnetPlusPlus` of
    rishikksh20/ResUnet is another network, and its checkpoints do not fit.

    >>> import torch
    >>> from vosops.models import create_model
    >>> create_model("resunetplusplus", num_classes=4)(torch.rand(1, 3, 24, 40)).shape
    torch.Size([1, 4, 24, 40])
    """

    sides = _SIDES
    stride = 8

    def __init__(
        self, num_classes: int = 1, *, in_channels: int = 3, recurrent: Recurrent | None = None
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.c1 = _SqueezedResidual(in_channels, 16, first=True)
        self.c2 = _SqueezedResidual(16, 32, 2)
        self.c3 = _SqueezedResidual(32, 64, 2)
        self.c4 = _SqueezedResidual(64, 128, 2)
        self.b1 = _SummedPyramid(128, 256)
        self.d1 = _Decoder(64, 256, 128)
        self.d2 = _Decoder(32, 128, 64)
        self.d3 = _Decoder(16, 64, 32)
        self.aspp = _SummedPyramid(32, 16)
        self.output = nn.Conv2d(16, num_classes, 1)
        places = {"bottleneck": 256, "decoder1": 128, "decoder2": 64, "decoder3": 32, "head": 16}
        self.set_places(places, recurrent)

    @through_time
    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,K,H,W)."""
        first = self.c1(images)
        second = self.c2(first)
        third = self.c3(second)
        x = self.at("bottleneck", self.b1(self.c4(third)))
        for n, (decoder, skip) in enumerate(((self.d1, third), (self.d2, second), (self.d3, first)), 1):
            x = self.at(f"decoder{n}", decoder(skip, x))
        logits: Tensor = self.output(self.at("head", self.aspp(x)))
        return logits

    def rows(self, images: Tensor) -> Rows:
        """See :class:`FrameNetwork`; stores the maps that are squeezed or weighted by attention."""
        skips = [self.c1.whole(Held(images))]
        for block in (self.c2, self.c3):
            skips.append(block.whole(Held(skips[-1])))
        x = self.at("bottleneck", self.b1.rows(Held(self.c4.whole(Held(skips[-1])))).whole())
        for n, decoder in enumerate((self.d1, self.d2, self.d3), 1):
            x = self.at(f"decoder{n}", decoder.whole(skips.pop(), x))
        return chain(self.rows_at("head", self.aspp.rows(Held(x))), self.output)
