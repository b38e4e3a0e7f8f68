"""The ResNet-50 that STM and RGMP share: it takes masks beside the frame, and its parameters bear their names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops.models.convolution import conv_norm

__all__ = ["ResNet50Encoder"]

_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, which the original encoders were trained on first
_STD = (0.229, 0.224, 0.225)
_STEM = 64  # channels after the first convolution
_EXPANSION = 4  # of a bottleneck's output over its middle
_STAGES = {2: (64, 3), 3: (128, 4), 4: (256, 6), 5: (512, 3)}  # channels of the middle, blocks


class ResNet50Encoder(nn.Module):
    """A ResNet-50 whose first convolution also sees masks.

    mask_inputs: what follows ``conv1_`` in the names of the masks' first convolutions: ("m", "o") for STM's memory
    encoder, ("p",) for RGMP's. last_stage: 4 (stride 16) or 5 (stride 32). mask_bias: whether these convolutions have
    a bias. Parameters are named as in the original checkpoints: mean, std, conv1, conv1_m ..., bn1, res2 ... res5.
    Batch norm uses its running statistics in training, too, as both papers do. Weights are random until some are
    loaded.

        >>> import torch
        >>> from vosops.models.resnet import ResNet50Encoder
        >>> encoder = ResNet50Encoder(mask_inputs=("m", "o"), last_stage=4, mask_bias=False)
        >>> frame, masks, others = torch.rand(1, 3, 32, 32), torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32)
        >>> [tuple(x.shape) for x in encoder(frame, masks, others)]
        [(2, 256, 8, 8), (2, 512, 4, 4), (2, 1024, 2, 2)]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mask_inputs: Sequence[str] = (), last_stage: int = 4, mask_bias: bool = False) -> None:
        super().__init__()
        if last_stage not in _STAGES:
            raise ValueError(f"last_stage must be one of {tuple(_STAGES)}, got {last_stage}")
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))
        self.conv1 = nn.Conv2d(3, _STEM, 7, stride=2, padding=3, bias=False)
        self._mask_convolutions = [f"conv1_{name}" for name in mask_inputs]
        for name in self._mask_convolutions:
            self.add_module(name, nn.Conv2d(1, _STEM, 7, stride=2, padding=3, bias=mask_bias))
        self.bn1 = _FrozenBatchNorm(_STEM)
        self._stages = [f"res{stage}" for stage in _STAGES if stage <= last_stage]
        channels = _STEM
        for name in self._stages:
            middle, blocks = _STAGES[int(name[-1])]
            stride = 1 if channels == _STEM else 2
            outputs = middle * _EXPANSION
            sizes = pairwise([channels] + [outputs] * blocks)
            self.add_module(
                name,
                nn.Sequential(
                    *(_Bottleneck(n, middle, stride if i == 0 else 1) for i, (n, _) in enumerate(sizes))
                ),
            )
            channels = outputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, frame: Tensor, *masks: Tensor) -> list[Tensor]:
        """Return the maps of all stages, strides 4, 8, 16 (and 32), from res2 to the last.

        frame (N,3,H,W) in [0, 1], H and W multiples of the last stride; masks, one for each of mask_inputs, (N,1,H,W)
        or (N,H,W). Frame or masks may have a batch of 1, which goes with any other: the first convolution of one frame
        for several objects is done once.
        """
        return list(self.stages(frame, *masks))

    def last(self, frame: Tensor, *masks: Tensor) -> Tensor:
        """Return the last stage's map alone; the others are freed as soon as they have been used."""
        # Gradients keep the other maps anyway; called as a module, so that `recompute` applies.
        if torch.is_grad_enabled():
            maps: list[Tensor] = self(frame, *masks)
            return maps[-1]
        for x in self.stages(frame, *masks):  # noqa: B007
            pass
        return x

    def stages(self, frame: Tensor, *masks: Tensor) -> Iterator[Tensor]:
        """Yield the maps of :meth:`forward`, one after the other."""
        if len(masks) != len(self._mask_convolutions):
            raise ValueError(f"masks must be {len(self._mask_convolutions)} tensors, got {len(masks)}")
        for mask in masks:
            if mask.dim() not in (3, 4) or mask.shape[-2:] != frame.shape[-2:]:
                raise ValueError(
                    f"masks must be (N,H,W) or (N,1,H,W) for a frame of {tuple(frame.shape)}, got {tuple(mask.shape)}"
                )
        x = self.conv1((frame - self.mean) / self.std)
        for name, mask in zip(self._mask_convolutions, masks, strict=True):
            x = x + self.get_submodule(name)(mask if mask.dim() == 4 else mask[:, None])
        x = functional.relu(self.bn1(x), inplace=True)
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
        for name in self._stages:
            x = self.get_submodule(name)(x)
            yield x


class _FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm by its running statistics, in training too."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class _Downsample(nn.Sequential):
    """A convolution and its norm."""

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm = self
        assert isinstance(convolution, nn.Conv2d) and isinstance(norm, _FrozenBatchNorm)
        return conv_norm(convolution, norm, x)


class _Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride), 1x1, and the input added."""

    def __init__(self, inputs: int, middle: int, stride: int) -> None:
        super().__init__()
        outputs = middle * _EXPANSION
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = _FrozenBatchNorm(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, bias=False)
        self.bn2 = _FrozenBatchNorm(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = _FrozenBatchNorm(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = _Downsample(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), _FrozenBatchNorm(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = conv_norm(self.conv1, self.bn1, x, relu=True)
        y = conv_norm(self.conv2, self.bn2, y, relu=True)
        y = conv_norm(self.conv3, self.bn3, y)
        y += x if self.downsample is None else self.downsample(x)
        return functional.relu(y, inplace=True)
