"""Two siblings of LSTM-ICNet: SegNet with ConvLSTMs, and a recurrent fully convolutional network.

Sources: Badrinarayanan et al., "SegNet" (2017), with a ConvLSTM between encoder and decoder, the place that
LSTM-ICNet's authors compare theirs with; Valipour et al., "Recurrent Fully Convolutional Networks for Video
Segmentation" (2017). Neither has weights that could be loaded: they are for training and comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vosops.models.recurrence import State, run_layer
from vosops.models.semantic_network import SemanticNetwork
from vosops.nn import ConvLSTMCell

__all__ = ["RFCN", "LSTMSegNet"]

_STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # of VGG-16: channels over the first stage's, convolutions
_WIDTH = 64  # channels of VGG-16's first stage
_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, on which VGG is trained first
_STD = (0.229, 0.224, 0.225)
_MIN_SIDE = 32  # after five halvings a pixel is left
_POSITIONS = ("encoder", "decoder")


class _ClipNetwork(SemanticNetwork):
    """What the two share: ImageNet's normalisation, and clips through the two halves."""

    min_side = _MIN_SIDE

    def prepare(self, frames: Tensor) -> Tensor:
        """See :class:`SemanticNetwork`."""
        dtype = next(self.parameters()).dtype
        images = frames.to(dtype) / 255 if frames.dtype == torch.uint8 else frames.to(dtype)
        mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (_MEAN, _STD))
        return (images - mean) / std

    def forward(self, clip: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(N,T,3,H,W) RGB, uint8 or floating in [0, 1] -> logits (N,T,K,h,w) of all frames, and the state."""
        if clip.ndim != 5 or clip.shape[2] != 3 or min(clip.shape[3:]) < _MIN_SIDE:
            raise ValueError(
                f"clip must be (N,T,3,H,W), H and W at least {_MIN_SIDE}, got {tuple(clip.shape)}"
            )
        length = clip.shape[1]
        logits, state = self.logits(self.features(self.prepare(clip.flatten(0, 1))), length, state)
        return logits.unflatten(0, (-1, length)), state


class LSTMSegNet(_ClipNetwork):
    """SegNet for video: VGG-16's stages, the way back by the places of the maxima, ConvLSTMs in between or at the end.

    num_classes: K. positions: any of "encoder" (on its 512 channels at 1/32, the usual place) and "decoder" (on
    the 64 channels before the classifier, at full size). variant: of the ConvLSTMs, see
    :class:`vosops.nn.ConvLSTMCell`. width: of the first stage, 64 in VGG-16; all others are multiples of it.
    Logits are as large as the frames, whose sides are 32 or more.

        >>> import torch
        >>> from vosops.models.lstm_segnet import LSTMSegNet
        >>> logits, state = LSTMSegNet(num_classes=3).eval()(torch.rand(1, 2, 3, 40, 64))
        >>> logits.shape
        torch.Size([1, 2, 3, 40, 64])
    """

    def __init__(
        self,
        num_classes: int = 19,
        *,
        positions: Sequence[str] = ("encoder",),
        variant: str = "convolution",
        width: int = _WIDTH,
    ) -> None:
        super().__init__()
        strangers = [p for p in positions if p not in _POSITIONS]
        if strangers:
            raise ValueError(f"positions must be among {', '.join(_POSITIONS)}, got {tuple(positions)}")
        self.num_classes = num_classes
        self.encoder = _encoder(width)
        widths = [width * times for times, _ in _STAGES]
        self.decoder = nn.ModuleList(
            _stage(channels, [*[channels] * (count - 1), before])
            for channels, (_, count), before in zip(widths, _STAGES, [width, *widths[:-1]], strict=True)
        )
        self.lstms = nn.ModuleDict(
            {
                position: ConvLSTMCell(channels, channels, variant=variant)
                for position, channels in zip(_POSITIONS, (widths[-1], width), strict=True)
                if position in positions
            }
        )
        self.classifier = nn.Conv2d(width, num_classes, 3, padding=1)

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """See :class:`SemanticNetwork`: the deepest map, where each pooling's maxima were, and the size."""
        places = []
        x = images
        for stage in self.encoder:
            x, place = F.max_pool2d(stage(x), 2, ceil_mode=True, return_indices=True)
            places.append(place)
        return x, *places, images[:, :0]  # no channels: of the images it has the size alone

    def logits(
        self, features: tuple[Tensor, ...], length: int, state: State | None = None, *, last: bool = False
    ) -> tuple[Tensor, State]:
        """See :class:`SemanticNetwork`."""
        new: State = {}
        x, *places, outline = features
        x = run_layer(self.lstms, "encoder", x, length, state, new)
        if last and "decoder" not in self.lstms:
            x, *places = (m[length - 1 :: length] for m in (x, *places))
        sizes = [outline.shape[2:], *(place.shape[2:] for place in places[:-1])]
        for stage, place, size in zip(reversed(self.decoder), reversed(places), reversed(sizes), strict=True):
            x = stage(F.max_unpool2d(x, place, [2, 2], output_size=list(size)))
        x = run_layer(self.lstms, "decoder", x, length, state, new)
        if last and "decoder" in self.lstms:
            x = x[length - 1 :: length]
        return self.classifier(x), new


class RFCN(_ClipNetwork):
    """A fully convolutional network with a ConvLSTM on its deepest map: VGG-16, scores at 1/32, 1/16 and 1/8, summed.

    num_classes: K. hidden: channels of the ConvLSTM. variant: its kind, see :class:`vosops.nn.ConvLSTMCell`. width: of
    the first stage, 64 in VGG-16; the others are multiples of it. The paper's recurrent unit is a GRU, on other
    encoders; the arrangement is the same. Logits are at 1/8 of the frames, whose sides are 32 or more.

        >>> import torch
        >>> from vosops.models.lstm_segnet import RFCN
        >>> logits, state = RFCN(num_classes=3).eval()(torch.rand(1, 2, 3, 40, 64))
        >>> logits.shape
        torch.Size([1, 2, 3, 5, 8])
    """

    def __init__(
        self, num_classes: int = 19, *, hidden: int = 512, variant: str = "convolution", width: int = _WIDTH
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.encoder = _encoder(width)
        finer, fine, deepest = (width * times for times, _ in _STAGES[2:])
        self.lstms = nn.ModuleDict({"deepest": ConvLSTMCell(deepest, hidden, variant=variant)})
        channels = (hidden, fine, finer)
        self.scores = nn.ModuleList(nn.Conv2d(c, num_classes, 1) for c in channels)

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """See :class:`SemanticNetwork`: the maps at 1/32, 1/16 and 1/8."""
        maps = []
        x = images
        for stage in self.encoder:
            x = F.max_pool2d(stage(x), 2, ceil_mode=True)
            maps.append(x)
        return maps[4], maps[3], maps[2]

    def logits(
        self, features: tuple[Tensor, ...], length: int, state: State | None = None, *, last: bool = False
    ) -> tuple[Tensor, State]:
        """See :class:`SemanticNetwork`."""
        new: State = {}
        deepest, *others = features
        maps = [run_layer(self.lstms, "deepest", deepest, length, state, new), *others]
        if last:
            maps = [x[length - 1 :: length] for x in maps]
        total: Tensor | None = None
        for score, x in zip(self.scores, maps, strict=True):
            here = score(x)
            if total is not None:
                here = here + F.interpolate(total, size=here.shape[2:], mode="bilinear")
            total = here
        assert total is not None
        return total, new


def _encoder(width: int) -> nn.ModuleList:
    before = (3, *(width * times for times, _ in _STAGES[:-1]))
    return nn.ModuleList(
        _stage(channels, [width * times] * count)
        for channels, (times, count) in zip(before, _STAGES, strict=True)
    )


def _stage(channels: int, outputs: Sequence[int]) -> nn.Sequential:
    """3x3 convolutions, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for out in outputs:
        layers += [
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        ]
        channels = out
    return nn.Sequential(*layers)
