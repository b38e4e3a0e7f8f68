"""PSPNet and ICNet as LSTM-ICNet is built on them: pruned, three branches, the TensorFlow implementation's conventions.

Every layer is a module whose name is the layer's in TensorFlow, so ``conv2_1_1x1_reduce.weight`` is the
original's ``conv2_1_1x1_reduce/weights`` and ``conv2_1_1x1_reduce_bn.running_var`` its
``conv2_1_1x1_reduce_bn/moving_variance``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vosops import _checks
from vosops.models.convolution import conv_norm

NUM_CLASSES = 19  # of Cityscapes
CHANNELS = 128  # of what the branches hand on
MIN_SIDE = 97  # of a frame: 1/32 of it must have four rows and columns for the finest pooling
_MEAN = (
    72.392,
    82.909,
    73.158,
)  # of Cityscapes in 0..255: blue, green, red, the order that the network reads
_NORM_EPS = 1e-5
_NORM_MOMENTUM = 0.05  # TensorFlow's decay of 0.95
_PYRAMID = (4, 3, 2, 1)  # a pooling window is this part of a side; the finest is named 6 after PSPNet's
_STAGES = (  # name, blocks, inner channels, channels, stride of the first block, dilation
    ("conv2", 3, 32, 128, 1, 1),
    ("conv3", 4, 64, 256, 2, 1),
    ("conv4", 6, 128, 512, 1, 2),
    ("conv5", 3, 256, 1024, 1, 4),
)


class Branches(NamedTuple):
    """What a frame alone gives, before anything is fused: maps (N,128,h,w), of 1024x2048 63x127, 64x128 and 128x256."""

    low: Tensor
    medium: Tensor
    high: Tensor


def resize_aligned(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, the corners stay corners: TensorFlow's ``align_corners=True``, the original's ``interp``."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def halve(x: Tensor) -> Tensor:
    """``interp(s_factor=0.5)``: n rows become (n-1)/2 + 1, rounded down."""
    return resize_aligned(x, [(side + 1) // 2 for side in x.shape[-2:]])


def double(x: Tensor) -> Tensor:
    """``interp(z_factor=2)``: n rows become 2n - 1."""
    return resize_aligned(x, [2 * side - 1 for side in x.shape[-2:]])


def resize_legacy(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear as TensorFlow's ``resize_bilinear`` is without ``align_corners``: src = dst * in / out.

    Neither of PyTorch's two conventions: pixel centres are not at halves and only the first corner stays.
    With the last row and column doubled it is the aligned convention of one row and column more, since in /
    out = (in+1-1) / (out+1-1).
    """
    height, width = size
    if tuple(x.shape[-2:]) == (height, width):
        return x
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    return resize_aligned(padded, (height + 1, width + 1))[..., :height, :width]


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Build a batch norm with the original's constants."""
    return nn.BatchNorm2d(channels, _NORM_EPS, _NORM_MOMENTUM)


def draw_as_tensorflow(layer: nn.Module) -> None:
    """Give a layer Glorot-uniform kernels and zero biases, TensorFlow's defaults."""
    for parameter in layer.parameters():
        if parameter.ndim == 4:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.zeros_(parameter)


def prepare_frames(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """(...,3,H,W) RGB, uint8 or floating in [0, 1] -> what the network reads: blue first, 0..255, the mean removed."""
    images = frames.flip(-3).to(dtype)
    if frames.dtype != torch.uint8:
        images = images * 255
    return images - torch.tensor(_MEAN, dtype=dtype, device=frames.device).reshape(3, 1, 1)


class PSPNet(nn.Module):
    """The pruned PSPNet that is ICNet's coarse branch: a dilated ResNet-50 of half the width and pyramid pooling.

    Dilation keeps its last stages at 1/32 of the frame; means over the whole, halves, thirds and quarters of
    the map are added to it (PSPNet concatenates them). Frames whose sides are below 97 are refused.

    Args:
        num_classes: K.

    Example:
        >>> logits = PSPNet().eval()(torch.rand(1, 3, 128, 128))
        >>> logits.shape
        torch.Size([1, 19, 7, 7])
    """

    def __init__(self, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.num_classes = _checks.check_positive_int("num_classes", num_classes)
        self._add("conv1_1_3x3_s2", 3, 32, 3, stride=2, padding=0)
        self._add("conv1_2_3x3", 32, 32, 3)
        self._add("conv1_3_3x3", 32, 64, 3)
        before = 64
        for stage, blocks, inner, channels, stride, dilation in _STAGES:
            for block in range(1, blocks + 1):
                name = f"{stage}_{block}"
                first = stride if block == 1 else 1
                if block == 1:
                    self._add(f"{name}_1x1_proj", before, channels, 1, stride=first)
                self._add(f"{name}_1x1_reduce", before, inner, 1, stride=first)
                self._add(f"{name}_3x3", inner, inner, 3, dilation=dilation)
                self._add(f"{name}_1x1_increase", inner, channels, 1)
                before = channels
        self._add("conv5_4_k1", before, 256, 1)
        self._add("sub4_out", 256, num_classes, 1, bias=True, norm=False)

    def _add(
        self,
        name: str,
        channels: int,
        out: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        padding: int | None = None,
        bias: bool = False,
        norm: bool = True,
    ) -> None:
        """Add a convolution ("same" unless padding is given) and, by default, its batch norm."""
        padding = dilation * (kernel // 2) if padding is None else padding
        layer = nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, dilation=dilation, bias=bias)
        draw_as_tensorflow(layer)
        self.add_module(name, layer)
        if norm:
            self.add_module(f"{name}_bn", batch_norm(out))

    def _layer(self, name: str, x: Tensor, *, relu: bool = True) -> Tensor:
        convolution, norm = self.get_submodule(name), self.get_submodule(f"{name}_bn")
        assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        return conv_norm(convolution, norm, x, relu=relu)

    def _norm(self, name: str, x: Tensor, *, relu: bool = False) -> Tensor:
        x = self.get_submodule(name)(x)
        return F.relu_(x) if relu else x

    def _halving(self, name: str, x: Tensor) -> Tensor:
        """Return a 3x3 layer of stride 2 with TensorFlow's "same" padding: of an even side only the end is padded."""
        height, width = x.shape[-2:]
        top, left = height % 2, width % 2
        return self._layer(name, F.pad(x, (left, 1, top, 1)))

    def _stage(self, name: str, blocks: range, x: Tensor) -> Tensor:
        for number in blocks:
            block = f"{name}_{number}"
            shortcut = self._layer(f"{block}_1x1_proj", x, relu=False) if number == 1 else x
            y = self._layer(f"{block}_1x1_reduce", x)
            y = self._layer(f"{block}_3x3", y)
            y = self._layer(f"{block}_1x1_increase", y, relu=False)
            x = F.relu_(y + shortcut)
        return x

    def trunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``conv3_1`` (N,256) at 1/16 and ``conv5_4_interp`` (N,256) just below it from images (N,3,H,W)."""
        if min(images.shape[-2:]) < MIN_SIDE:
            raise ValueError(f"frames must have sides of at least {MIN_SIDE}, got {tuple(images.shape[-2:])}")
        x = self._halving("conv1_1_3x3_s2", halve(images))
        x = self._layer("conv1_3_3x3", self._layer("conv1_2_3x3", x))
        x = F.max_pool2d(x, 3, 2, 1)
        x = self._stage("conv2", range(1, 4), x)
        medium = self._stage("conv3", range(1, 2), x)
        x = self._stage("conv3", range(2, 5), halve(medium))
        x = self._stage("conv4", range(1, 7), x)
        x = self._stage("conv5", range(1, 4), x)
        return medium, double(self._layer("conv5_4_k1", _add_pyramid(x)))

    def forward(self, frames: Tensor) -> Tensor:
        """(N,3,H,W) RGB, uint8 or floating in [0, 1] -> (N,K,h,w) logits at about 1/16."""
        _, pooled = self.trunk(prepare_frames(frames, next(self.parameters()).dtype))
        logits: Tensor = self.get_submodule("sub4_out")(pooled)
        return logits


class ICNet(PSPNet):
    """ICNet: PSPNet sees half the resolution, three cheap layers see the whole, and two fusions bring them together.

    Args:
        num_classes: K.

    Example:
        >>> logits = ICNet().eval()(torch.rand(1, 3, 128, 256))
        >>> logits.shape
        torch.Size([1, 19, 31, 63])
    """

    def __init__(self, num_classes: int = NUM_CLASSES) -> None:
        super().__init__(num_classes)
        self._add("conv_sub4", 256, CHANNELS, 3, dilation=2)
        self._add("conv3_1_sub2_proj", 256, CHANNELS, 1)
        self._add("conv_sub2", CHANNELS, CHANNELS, 3, dilation=2)
        self._add("conv1_sub1", 3, 32, 3, stride=2, padding=0)
        self._add("conv2_sub1", 32, 32, 3, stride=2, padding=0)
        self._add("conv3_sub1", 32, 64, 3, stride=2, padding=0)
        self._add("conv3_sub1_proj", 64, CHANNELS, 1)
        self._add("conv6_cls", CHANNELS, num_classes, 1, bias=True, norm=False)
        self._add("sub24_out", CHANNELS, num_classes, 1, bias=True, norm=False)

    def branches(self, images: Tensor) -> tuple[Branches, Tensor]:
        """Return the per-frame part of the branches of prepared images (N,3,H,W), and ``conv5_4_interp``."""
        medium, pooled = self.trunk(images)
        high = self._halving("conv1_sub1", images)
        high = self._halving("conv3_sub1", self._halving("conv2_sub1", high))
        branches = Branches(
            low=self.get_submodule("conv_sub4")(pooled),
            medium=self.get_submodule("conv3_1_sub2_proj")(medium),
            high=self.get_submodule("conv3_sub1_proj")(high),
        )
        return branches, pooled

    def fuse(self, low: Tensor, medium: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse branches (N,128,.,.) into ``sub24_sum_interp`` (middle output) and ``sub12_sum`` (last output)."""
        low, medium = self._norm("conv_sub4_bn", low), self._norm("conv3_1_sub2_proj_bn", medium)
        sub24 = double(F.relu_(resize_legacy(low, medium.shape[-2:]) + medium))
        low, high = self._layer("conv_sub2", sub24, relu=False), self._norm("conv3_sub1_proj_bn", high)
        return sub24, F.relu_(resize_legacy(low, high.shape[-2:]) + high)

    def forward(self, frames: Tensor) -> Tensor:
        """(N,3,H,W) RGB, uint8 or floating in [0, 1] -> (N,K,h,w) logits at about 1/4."""
        branches, _ = self.branches(prepare_frames(frames, next(self.parameters()).dtype))
        logits: Tensor = self.get_submodule("conv6_cls")(double(self.fuse(*branches)[1]))
        return logits


def _add_pyramid(x: Tensor) -> Tensor:
    """Add to a map its means over windows of a quarter, third, half and all of its sides, resized to it."""
    size = height, width = x.shape[-2:]
    total = x
    for part in _PYRAMID:
        total = total + resize_aligned(F.avg_pool2d(x, (height // part, width // part)), size)
    return total
