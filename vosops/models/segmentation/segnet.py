"""SegNet: Badrinarayanan et al., "SegNet: A Deep Convolutional Encoder-Decoder Architecture", PAMI 2017.

As vinceecws/SegNet_PyTorch computes it, whose convolutions and widths are those of the authors' Caffe network.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional

from vosops.models.recurrence import Recurrent, through_time
from vosops.models.rows import Held, Rows, Unpooled, pool_with_places
from vosops.models.segmentation._layers import chain
from vosops.models.semantic_network import FrameNetwork, Sides

__all__ = ["SegNet"]

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_MOMENTUM = 0.5  # of batch norm
_LAST = "De11"  # of the convolutions, without batch norm and ReLU


class SegNet(FrameNetwork):
    """VGG-16 down and its mirror image up, which puts values back where max-pooling found them.

    Images (N,C,H,W) -> logits (N,K,H,W). Images lie in [0, 1]; their sides are even and of 32 pixels or more.

    Args:
        num_classes: K.
        in_channels: C.
        recurrent: Where ConvLSTMs are, see :class:`FrameNetwork`: "bottleneck", between encoder and decoder, "decoder5"
            to "decoder2", the maps after those stages, and "head", what the last convolution reads.

    Source: vinceecws/SegNet_PyTorch, `SegNet`, which ends in a softmax; here logits are returned, in training too. The
    authors' Caffe code rounds up where it pools, which differs where a side is odd at some depth.

    >>> import torch
    >>> from vosops.models import create_model
    >>> create_model("segnet", num_classes=4)(torch.rand(1, 3, 34, 50)).shape
    torch.Size([1, 4, 34, 50])
    """

    sides = Sides(2, least=32)
    stride, reach = 32, 214

    def __init__(
        self, num_classes: int = 12, *, in_channels: int = 3, recurrent: Recurrent | None = None
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        inputs = in_channels
        for stage, widths in enumerate(_STAGES, 1):
            for n, outputs in enumerate(widths, 1):
                self._add("En", stage, n, inputs, outputs)
                inputs = outputs
        for stage in range(len(_STAGES), 0, -1):
            below = _STAGES[stage - 2][-1] if stage > 1 else num_classes
            for n in range(len(_STAGES[stage - 1]), 0, -1):
                outputs = _STAGES[stage - 1][n - 1] if n > 1 else below
                self._add("De", stage, n, inputs, outputs)
                inputs = outputs
        decoders = {f"decoder{stage}": _STAGES[stage - 2][-1] for stage in range(len(_STAGES), 1, -1)}
        self.set_places({"bottleneck": _STAGES[-1][-1], **decoders, "head": _STAGES[0][0]}, recurrent)

    def _add(self, half: str, stage: int, n: int, inputs: int, outputs: int) -> None:
        self.add_module(f"Conv{half}{stage}{n}", nn.Conv2d(inputs, outputs, 3, padding=1))
        # The last convolution of all gives the logits; its batch norm is in checkpoints and never run.
        self.add_module(f"BN{half}{stage}{n}", nn.BatchNorm2d(outputs, momentum=_MOMENTUM))

    def _layer(self, half: str, stage: int, n: int, x: Tensor) -> Tensor:
        x = self.get_submodule(f"Conv{half}{stage}{n}")(x)
        return functional.relu(self.get_submodule(f"BN{half}{stage}{n}")(x), inplace=True)

    @through_time
    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,K,H,W)."""
        x = images
        pooled = []  # by stage: where each value was found, and the size of the map it was found in
        for stage, widths in enumerate(_STAGES, 1):
            for n in range(1, len(widths) + 1):
                x = self._layer("En", stage, n, x)
            size = x.shape[2:]
            x, places = functional.max_pool2d(x, 2, return_indices=True)
            pooled.append((places, size))
        x = self.at("bottleneck", x)
        for stage in range(len(_STAGES), 0, -1):
            places, size = pooled.pop()
            x = functional.max_unpool2d(x, places, [2, 2], output_size=size)
            for n in range(len(_STAGES[stage - 1]), 1, -1):
                x = self._layer("De", stage, n, x)
            if stage > 1:
                x = self.at(f"decoder{stage}", self._layer("De", stage, 1, x))
        logits: Tensor = self.get_submodule("ConvDe11")(self.at("head", x))
        return logits

    def rows(self, images: Tensor) -> Rows:
        """See :class:`FrameNetwork`; stores a pooled map, and two bits for each value of those before it."""
        x = images
        pooled = []
        for stage, widths in enumerate(_STAGES, 1):
            full = chain(Held(x), *self._stage("En", stage, range(1, len(widths) + 1)))
            size = full.size[2:]
            x, places = pool_with_places(full)
            pooled.append((places, size))
        x = self.at("bottleneck", x)
        while True:
            stage = len(pooled)
            places, size = pooled.pop()
            up = Unpooled(Held(x), places, size)
            if stage == 1:
                y = chain(up, *self._stage("De", stage, range(len(_STAGES[0]), 1, -1)))
                return chain(self.rows_at("head", y), self.get_submodule("ConvDe11"))
            y = chain(up, *self._stage("De", stage, range(len(_STAGES[stage - 1]), 0, -1)))
            x = self.at(f"decoder{stage}", y.whole())

    def _stage(self, half: str, stage: int, numbers: Iterable[int]) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for n in numbers:
            name = f"{half}{stage}{n}"
            layers.append(self.get_submodule(f"Conv{name}"))
            if name != _LAST:
                layers += [self.get_submodule(f"BN{name}"), nn.ReLU()]
        return layers
