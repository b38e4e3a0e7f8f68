"""Dilated ResNets with bottlenecks, as DeepLabV3+, DANet, PSPNet and ICNet have them, and the first block of HRNet."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from vosops.models.rows import Held, Rows
from vosops.models.segmentation._common import conv_bn_relu
from vosops.models.segmentation._layers import chain

__all__ = [
    "BLOCKS",
    "EXPANSION",
    "MIDDLES",
    "Bottleneck",
    "ResNet",
    "bottlenecks",
    "check_backbone",
    "deep_stem",
    "draw_kernels",
    "stages_whole",
]

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
EXPANSION = 4  # of a bottleneck's output over its middle
MIDDLES = (64, 128, 256, 512)  # channels of the middle, of each stage
_STEM = 64  # channels of the first convolution
_DEEP_STEM = (64, 64, 128)  # of the three of a deep stem


def check_backbone(backbone: str, known: Sequence[str]) -> str:
    """Return the name of a backbone, if it is one of those known."""
    if backbone not in known:
        raise ValueError(f"backbone must be one of {', '.join(known)}, got {backbone!r}")
    return backbone


def draw_kernels(module: nn.Module) -> None:
    """Give every convolution random kernels by He et al., as ResNets begin with."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride), 1x1, and the input added."""

    def __init__(self, inputs: int, middle: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        outputs = middle * EXPANSION
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def whole(self, x: Rows) -> Tensor:
        """Return its map, computed by rows; without a downsample in place of a map that is held."""
        relu = nn.ReLU()
        shortcut = x if self.downsample is None else chain(x, self.downsample)
        layers = [self.conv1, self.bn1, relu, self.conv2, self.bn2, relu, self.conv3, self.bn3]
        y = chain(x, *layers, addend=shortcut, slope=0.0)
        return y.whole(into=x.x if isinstance(x, Held) and self.downsample is None else None)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return functional.relu(y, inplace=True)


def bottlenecks(inputs: int, middle: int, dilations: Sequence[int], stride: int = 1) -> nn.Sequential:
    """Build a stage: a block for each dilation, the first with the stride."""
    return nn.Sequential(
        *(
            Bottleneck(
                inputs if n == 0 else middle * EXPANSION, middle, stride if n == 0 else 1, dilation=dilation
            )
            for n, dilation in enumerate(dilations)
        )
    )


def stages_whole(stages: Sequence[nn.Module], source: list[Rows]) -> Tensor:
    """Return the map of stages after each other, computed by rows.

    A stage's first block makes a new map, which the others change in place; that of the stage before is then given up.
    source: one map, which is taken out of the list, so that nobody holds on to it.
    """
    x = source.pop()
    for stage in stages:
        for block in stage.children():
            assert isinstance(block, Bottleneck)
            x = Held(block.whole(x))
    return x.whole()


def deep_stem(in_channels: int) -> list[nn.Module]:
    """Build three 3x3 convolutions in place of one of 7x7, the last without norm and ReLU; stride 2."""
    first, second, third = _DEEP_STEM
    return [
        *conv_bn_relu(in_channels, first, 3, stride=2),
        *conv_bn_relu(first, second, 3),
        nn.Conv2d(second, third, 3, padding=1, bias=False),
    ]


class ResNet(nn.Module):
    """A ResNet without its classifier: maps of the four stages at strides 4, 8, 8 or 16, and 8 or 16.

    name: of BLOCKS. output_stride: 8 or 16. Blocks that take the place of strided ones are dilated as in torchvision:
    the first block of a stage as the last of the stage before. multi_grid: dilations of the last stage's three blocks
    in place of that. Parameters are named as in torchvision; with a deep stem `conv1` is a Sequential.
    """

    def __init__(
        self,
        name: str,
        in_channels: int,
        *,
        output_stride: int,
        deep: bool,
        multi_grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        stem = _DEEP_STEM[-1] if deep else _STEM
        self.conv1: nn.Module = (
            nn.Sequential(*deep_stem(in_channels))
            if deep
            else nn.Conv2d(in_channels, stem, 7, 2, 3, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(stem)
        blocks = BLOCKS[name]
        inputs, reached, dilation = stem, 4, 1
        for n, (middle, count) in enumerate(zip(MIDDLES, blocks, strict=True), start=1):
            before = dilation
            stride = 1 if n == 1 or reached == output_stride else 2
            if n > 1 and stride == 1:
                dilation *= 2
            reached *= stride
            dilations = [before] + [dilation] * (count - 1)
            if multi_grid is not None and n == len(blocks):
                dilations = list(multi_grid)
            self.add_module(f"layer{n}", bottlenecks(inputs, middle, dilations, stride))
            inputs = middle * EXPANSION
        draw_kernels(self)

    def whole(self, images: Rows, last: int = 4) -> Tensor:
        """Return the map of one of the stages, computed by rows."""
        return self.further_whole([self.stem(images)], 1, last)

    def stem(self, images: Rows) -> Rows:
        """Return what the first stage reads."""
        return chain(images, self.conv1, self.bn1, nn.ReLU(), nn.MaxPool2d(3, 2, 1))

    def further_whole(self, source: list[Rows], first: int, last: int = 4) -> Tensor:
        """Return the map of the last of some stages; see `stages_whole`."""
        return stages_whole([self.get_submodule(f"layer{n}") for n in range(first, last + 1)], source)

    def maps(self, images: Tensor, last: int = 4) -> list[Tensor]:
        """Return the maps of the first stages, up to the last that is asked for."""
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
        found = []
        for n in range(1, last + 1):
            x = self.get_submodule(f"layer{n}")(x)
            found.append(x)
        return found
