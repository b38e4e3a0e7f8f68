"""HRNet (Wang et al., PAMI 2020) and object-contextual representations on it (OCR, Yuan et al., ECCV 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops import _checks
from vosops.models.recurrence import Recurrent, through_time
from vosops.models.rows import Added, Convolved, Enlarged, Held, Mapped, Rows
from vosops.models.segmentation._common import IMAGENET_MEAN, IMAGENET_STD, conv_bn_relu, resize
from vosops.models.segmentation._layers import chain, folded
from vosops.models.segmentation._resnet import EXPANSION, bottlenecks, stages_whole
from vosops.models.semantic_network import FrameNetwork
from vosops.ops.memory_read import memory_read

__all__ = ["HRNetW18", "HRNetW32", "HRNetW48", "HRNetW48OCR", "ObjectAttention", "SpatialGather"]

_PLACES = ("branch1", "branch2", "branch3", "bottleneck")  # of ConvLSTMs
_STEM = 64  # channels of the first two convolutions, and of the middle of the bottlenecks
_FIRST_BLOCKS = (1, 1, 1, 1)  # dilations of the bottlenecks
_BRANCHES = 4
_BLOCKS = 4  # of each branch of a module
_MODULES = {2: 1, 3: 4, 4: 3}  # of the stages; as many branches as the stage's number
_KERNEL_STD = 0.001  # of random weights
_OCR_CHANNELS, _KEY_CHANNELS = 512, 256
_OCR_DROPOUT = 0.05


class _BasicBlock(nn.Module):
    """Two 3x3, and the input added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def change(self, x: Tensor) -> None:
        """Compute it by rows, in place of x."""
        layers = [self.conv1, self.bn1, nn.ReLU(), self.conv2, self.bn2]
        chain(Held(x), *layers, addend=Held(x), slope=0.0).whole(into=x)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x
        return functional.relu(y, inplace=True)


class _Module(nn.Module):
    """Blocks in each branch, then to each branch the sum of all, brought to its size."""

    def __init__(self, widths: Sequence[int], align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.branches = nn.ModuleList(
            nn.Sequential(*(_BasicBlock(width) for _ in range(_BLOCKS))) for width in widths
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_fuse_layer(widths, j, i) for j in range(len(widths))) for i in range(len(widths))
        )

    def whole(self, maps: list[Tensor]) -> list[Tensor]:
        """Return its maps, computed by rows; those given are changed."""
        for branch, x in zip(self.branches, maps, strict=True):
            for block in branch.children():
                assert isinstance(block, _BasicBlock)
                block.change(x)
        held = [Held(x) for x in maps]
        found = []
        for own, layers in zip(maps, self.fuse_layers, strict=True):
            brought = (chain(x, layer) for layer, x in zip(layers.children(), held, strict=True))
            size, corners = own.shape[2:], self.align_corners
            found.append(
                Added([Enlarged(x, size, align_corners=corners) for x in brought], slope=0.0).whole()
            )
        return found

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        found = []
        for own, layers in zip(maps, self.fuse_layers, strict=True):
            brought = (
                resize(layer(x), own.shape[2:], align_corners=self.align_corners)
                for layer, x in zip(layers.children(), maps, strict=True)
            )
            total = next(brought)
            for x in brought:
                total = total + x
            found.append(functional.relu(total))
        return found


def _fuse_layer(widths: Sequence[int], source: int, target: int) -> nn.Module:
    """Bring one branch's map to another's channels, and down to its size."""
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(*conv_bn_relu(widths[source], widths[target], 1)[:-1])
    steps = target - source
    outputs = [widths[source]] * (steps - 1) + [widths[target]]
    return nn.Sequential(
        *(
            nn.Sequential(*conv_bn_relu(widths[source], n, 3, stride=2)[: 3 if step < steps else 2])
            for step, n in enumerate(outputs, start=1)
        )
    )


class _HRNet(FrameNetwork):
    """Four branches at 1/4, 1/8, 1/16 and 1/32 of the image that exchange what they find, seven times."""

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    unused_weights = ("loss.",)  # of checkpoints that were saved with it
    stride = 32

    def __init__(self, width: int, num_classes: int, in_channels: int, align_corners: bool) -> None:
        super().__init__()
        self.num_classes = _checks.check_positive_int("num_classes", num_classes)
        self.in_channels = _checks.check_positive_int("in_channels", in_channels)
        self.align_corners = align_corners
        self.conv1 = nn.Conv2d(in_channels, _STEM, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.conv2 = nn.Conv2d(_STEM, _STEM, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(_STEM)
        self.layer1 = bottlenecks(_STEM, _STEM, _FIRST_BLOCKS)
        widths = [width << n for n in range(_BRANCHES)]
        self.widths, self.channels = widths, sum(widths)
        before = [_STEM * EXPANSION]
        for stage, modules in _MODULES.items():
            self.add_module(f"transition{stage - 1}", _transition(before, widths[:stage]))
            before = widths[:stage]
            made = (_Module(before, align_corners) for _ in range(modules))
            self.add_module(f"stage{stage}", nn.Sequential(*made))

    def draw(self) -> None:
        """Give every convolution the random kernels that the original begins with."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=_KERNEL_STD)

    def streamed(self, images: Tensor) -> list[Tensor]:
        """Images (N,C,H,W) -> the maps of the four branches, computed by rows."""
        relu = nn.ReLU()
        stem = chain(Held(images), self.conv1, self.bn1, relu, self.conv2, self.bn2, relu)
        maps = [stages_whole([self.layer1], [Held(stem.whole())])]
        del stem
        for stage in _MODULES:
            layers = self.get_submodule(f"transition{stage - 1}").children()
            maps = [chain(Held(maps[min(n, len(maps) - 1)]), layer).whole() for n, layer in enumerate(layers)]
            for module in self.get_submodule(f"stage{stage}").children():
                assert isinstance(module, _Module)
                maps = module.whole(maps)
        return [self.at(place, x) for place, x in zip(_PLACES, maps, strict=True)]

    def inner_rows(self, maps: Sequence[Tensor], head: nn.Sequential) -> Rows:
        """Return what a head's last convolution reads.

        The first, of 1x1, sees each map at its own size instead of all that are joined.
        """
        first, norm, _, _ = head
        assert isinstance(first, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
        weight, bias = folded(first, norm)
        weights = weight.split([x.shape[1] for x in maps], 1)
        size, corners = maps[0].shape[2:], self.align_corners
        parts = [Convolved([Held(maps[0])], weights[0], bias)]
        parts += [Convolved([Held(x)], part) for x, part in zip(maps[1:], weights[1:], strict=True)]
        return Added([Enlarged(x, size, align_corners=corners) for x in parts], slope=0.0)

    def put_places(self, head: int, recurrent: Recurrent | None) -> None:
        """Name the places: the branches, and what is classified, of that many channels."""
        self.set_places({**dict(zip(_PLACES, self.widths, strict=True)), "head": head}, recurrent)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Images (N,C,H,W) -> the maps of the four branches, the finest first."""
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        x = functional.relu(self.bn2(self.conv2(x)), inplace=True)
        maps = [self.layer1(x)]
        for stage in _MODULES:
            layers = self.get_submodule(f"transition{stage - 1}").children()
            new = [layer(maps[min(n, len(maps) - 1)]) for n, layer in enumerate(layers)]
            maps = self.get_submodule(f"stage{stage}")(new)
        return [self.at(place, x) for place, x in zip(_PLACES, maps, strict=True)]

    def joined(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the maps of the branches, enlarged to the finest, in one."""
        size = maps[0].shape[2:]
        return torch.cat([resize(x, size, align_corners=self.align_corners) for x in maps], 1)


def _transition(before: Sequence[int], widths: Sequence[int]) -> nn.ModuleList:
    """Bring the branches to the next stage's widths, and begin a new one from the last."""
    layers: list[nn.Module] = []
    for n, width in enumerate(widths):
        if n >= len(before):
            layers.append(nn.Sequential(nn.Sequential(*conv_bn_relu(before[-1], width, 3, stride=2))))
        elif before[n] != width:
            layers.append(nn.Sequential(*conv_bn_relu(before[n], width, 3)))
        else:
            layers.append(nn.Identity())
    return nn.ModuleList(layers)


def _pixel_head(channels: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(*conv_bn_relu(channels, channels, 1, bias=True), nn.Conv2d(channels, num_classes, 1))


class _PlainHRNet(_HRNet):
    width: int

    def __init__(
        self,
        num_classes: int = 19,
        *,
        in_channels: int = 3,
        align_corners: bool = True,
        recurrent: Recurrent | None = None,
    ) -> None:
        super().__init__(self.width, num_classes, in_channels, align_corners)
        self.last_layer = _pixel_head(self.channels, num_classes)
        self.draw()
        self.put_places(self.channels, recurrent)

    @through_time
    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,K,h,w) at a quarter of the size, rounded up."""
        return self.classify(self.last_layer, self.joined(self.maps(images)))

    def rows(self, images: Tensor) -> Rows:
        """See :class:`FrameNetwork`; stores the maps of the four branches."""
        x = self.rows_at("head", self.inner_rows(self.streamed(images), self.last_layer))
        return Held(chain(x, self.last_layer[-1]).whole())


class HRNetW48(_PlainHRNet):
    """HRNetV2 with 48 channels in its finest branch.

    Args:
        num_classes: K.
        in_channels: Of the images.
        align_corners: How maps are upsampled; upsample the logits in the same way. True for the checkpoints of the
            branch HRNet-OCR for COCO-Stuff and ADE20K; False for those of pytorch-v1.1 and of Cityscapes, LIP and
            PASCAL-Context.
        recurrent: Where ConvLSTMs are, see :class:`FrameNetwork`: "branch1" to "branch3", the maps of the finer
            branches, "bottleneck", that of the coarsest, and "head", what the classifier reads.

    `forward` gives logits (N,K,h,w) of images (N,C,H,W) of any size, at a quarter of it, rounded up. Parameters are
    named as in HRNet-Semantic-Segmentation. Raises ValueError for an invalid option.

    Source: Wang et al., Deep high-resolution representation learning for visual recognition, PAMI 2020.

    Example:
        >>> import torch
        >>> from vosops.models import HRNetW48
        >>> HRNetW48(num_classes=5).eval()(torch.rand(1, 3, 32, 48)).shape
        torch.Size([1, 5, 8, 12])
    """

    width = 48


class HRNetW32(_PlainHRNet):
    """HRNetV2 with 32 channels in its finest branch; otherwise :class:`HRNetW48`."""

    width = 32


class HRNetW18(_PlainHRNet):
    """HRNetV2 with 18 channels in its finest branch; otherwise :class:`HRNetW48`."""

    width = 18


class SpatialGather(nn.Module):
    """What each class looks like: the sum over pixels of softmax(logits[k]) features.

    Features (N,C,H,W) and logits (N,K,H,W) -> (N,C,K,1).
    """

    def read(self, features: Tensor, logits: Tensor) -> Tensor:
        """Return the same; each class reads the memory of all pixels, whose scores are its logits."""
        classes = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)[None]
        return memory_read(classes, logits.flatten(2), features.flatten(2), scale=1.0)[..., None]

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Features (N,C,H,W), logits (N,K,H,W) -> (N,C,K,1)."""
        weights = torch.softmax(logits.flatten(2), dim=-1)
        return torch.bmm(features.flatten(2), weights.mT)[..., None]


class ObjectAttention(nn.Module):
    """Every pixel reads what the classes look like, by its similarity to each.

    Pixels (N,C,H,W) and objects (N,C,K,1) -> (N,C,H,W).
    """

    def __init__(self, channels: int, key_channels: int) -> None:
        super().__init__()
        self.key_channels = key_channels
        self.f_pixel = _layers(channels, key_channels, key_channels)
        self.f_object = _layers(channels, key_channels, key_channels)
        self.f_down = _layers(channels, key_channels)
        self.f_up = _layers(key_channels, channels)

    def rows(self, x: Rows, objects: Tensor) -> Rows:
        """Return the same of pixels as rows."""
        key, value = self.f_object(objects).flatten(2), self.f_down(objects).flatten(2)
        scale = self.key_channels**-0.5
        read = Mapped(chain(x, self.f_pixel), lambda query: memory_read(query, key, value, scale=scale))
        return chain(read, self.f_up)

    def forward(self, x: Tensor, objects: Tensor) -> Tensor:
        """Pixels (N,C,H,W), objects (N,C,K,1) -> (N,C,H,W)."""
        query = self.f_pixel(x).flatten(2)
        key, value = self.f_object(objects).flatten(2), self.f_down(objects).flatten(2)
        similarity = torch.bmm(query.mT, key) * self.key_channels**-0.5
        read = torch.bmm(value, torch.softmax(similarity, dim=-1).mT)
        y: Tensor = self.f_up(read.unflatten(2, x.shape[2:]))
        return y


def _layers(*channels: int) -> nn.Sequential:
    """1x1 convolutions through the given channels, each followed by a module of batch norm and ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        convolution, *norm_relu = conv_bn_relu(inputs, outputs, 1)
        layers += [convolution, nn.Sequential(*norm_relu)]
    return nn.Sequential(*layers)


class _OCRHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.object_context_block = ObjectAttention(_OCR_CHANNELS, _KEY_CHANNELS)
        self.conv_bn_dropout = nn.Sequential(
            *_layers(2 * _OCR_CHANNELS, _OCR_CHANNELS), nn.Dropout2d(_OCR_DROPOUT)
        )

    def rows(self, features: Rows, objects: Tensor) -> Rows:
        return chain([self.object_context_block.rows(features, objects), features], self.conv_bn_dropout)

    def forward(self, features: Tensor, objects: Tensor) -> Tensor:
        context = self.object_context_block(features, objects)
        y: Tensor = self.conv_bn_dropout(torch.cat([context, features], 1))
        return y


class HRNetW48OCR(_HRNet):
    """HRNetV2-W48 whose pixels read a representation of each class that is made of a first guess.

    Args:
        num_classes: K.
        in_channels: Of the images.
        align_corners: How maps are upsampled; upsample the logits in the same way. True for all published checkpoints.
        recurrent: Where ConvLSTMs are, see :class:`FrameNetwork`: "branch1" to "branch3", the maps of the finer
            branches, "bottleneck", that of the coarsest, and "head", what the classifier reads.

    `forward` gives logits (N,K,h,w) of images (N,C,H,W) of any size, at a quarter of it, rounded up; in training mode
    those of the first guess, of which the loss takes 0.4 times, and the logits. Parameters are named as in
    HRNet-Semantic-Segmentation. Raises ValueError for an invalid option.

    Source: Yuan et al., Object-contextual representations for semantic segmentation, ECCV 2020.

    Example:
        >>> import torch
        >>> from vosops.models import HRNetW48OCR
        >>> HRNetW48OCR(num_classes=5).eval()(torch.rand(1, 3, 32, 48)).shape
        torch.Size([1, 5, 8, 12])
    """

    loss_weights = (0.4, 1.0)

    def __init__(
        self,
        num_classes: int = 19,
        *,
        in_channels: int = 3,
        align_corners: bool = True,
        recurrent: Recurrent | None = None,
    ) -> None:
        super().__init__(48, num_classes, in_channels, align_corners)
        self.conv3x3_ocr = nn.Sequential(*conv_bn_relu(self.channels, _OCR_CHANNELS, 3, bias=True))
        self.ocr_gather_head = SpatialGather()
        self.ocr_distri_head = _OCRHead()
        self.cls_head = nn.Conv2d(_OCR_CHANNELS, num_classes, 1)
        self.aux_head = _pixel_head(self.channels, num_classes)
        self.draw()
        self.put_places(_OCR_CHANNELS, recurrent)

    @through_time
    def forward(self, images: Tensor) -> Any:
        """Images (N,C,H,W) -> logits (N,K,h,w) at a quarter of the size; in training mode (first guess, logits)."""
        joined = self.joined(self.maps(images))
        guess = self.aux_head(joined)
        features = self.conv3x3_ocr(joined)
        x = self.ocr_distri_head(features, self.ocr_gather_head(features, guess))
        logits = self.cls_head(self.at("head", x))
        return (guess, logits) if self.training else logits

    def rows(self, images: Tensor) -> Rows:
        """See :class:`FrameNetwork`; stores the maps of the four branches, and then 512 channels."""
        maps = self.streamed(images)
        guess = chain(self.inner_rows(maps, self.aux_head), self.aux_head[-1]).whole()
        size, corners = maps[0].shape[2:], self.align_corners
        joined = [Enlarged(Held(x), size, align_corners=corners) for x in maps]
        features = chain(joined, self.conv3x3_ocr).whole()
        del joined, maps
        objects = self.ocr_gather_head.read(features, guess)
        x = self.rows_at("head", self.ocr_distri_head.rows(Held(features), objects))
        return Held(chain(x, self.cls_head).whole())
