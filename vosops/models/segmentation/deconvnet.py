"""DeconvNet: Noh et al., "Learning Deconvolution Network for Semantic Segmentation", ICCV 2015.

As Jasonlee1995/DeconvNet computes it, whose layers are those of the authors' Caffe network.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from vosops.models.recurrence import Recurrent, through_time
from vosops.models.rows import Held, Rows, Unpooled, pool_with_places
from vosops.models.segmentation._common import IMAGENET_MEAN, IMAGENET_STD, conv_bn_relu
from vosops.models.segmentation._layers import chain
from vosops.models.semantic_network import FrameNetwork, Sides

__all__ = ["DeconvNet"]

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_FULL = 4096  # channels of what was fully connected
_WINDOW = 7  # its kernel


def _deconv_bn_relu(inputs: int, outputs: int, kernel: int, padding: int) -> list[nn.Module]:
    return [
        nn.ConvTranspose2d(inputs, outputs, kernel, padding=padding),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


class DeconvNet(FrameNetwork):
    """VGG-16 with its fully connected layers down, its mirror image up by unpooling and transposed convolutions.

    Images (N,C,H,W) -> logits (N,K,H,W); sides are multiples of 32, of 224 pixels or more. The weights take 1 GB in
    float32. Images are normalised by ImageNet's mean and deviation.

    Args:
        num_classes: K.
        in_channels: C.
        recurrent: Where ConvLSTMs are, see :class:`FrameNetwork`: "bottleneck", the map before the first unpooling,
            "decoder5" to "decoder2", the maps after those stages, and "head", what the classifier reads.

    Source: Jasonlee1995/DeconvNet, `DeconvNet`. The paper merges what 50 proposals of an image give, each a crop of
    224 x 224; that is not part of the network.

    >>> import torch
    >>> from vosops.models.segmentation.deconvnet import DeconvNet
    >>> with torch.device("meta"):  # shapes alone
    ...     network = DeconvNet(21)
    ...     print(network(torch.rand(1, 3, 224, 256)).shape)
    torch.Size([1, 21, 224, 256])
    """

    sides = Sides(32, least=224)
    stride = 32
    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(
        self, num_classes: int = 21, *, in_channels: int = 3, recurrent: Recurrent | None = None
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        inputs = in_channels
        for stage, widths in enumerate(_STAGES, 1):
            layers = []
            for outputs in widths:
                layers += conv_bn_relu(inputs, outputs, bias=True)
                inputs = outputs
            self.add_module(f"conv{stage}", nn.Sequential(*layers))
        self.conv67 = nn.Sequential(
            nn.Conv2d(inputs, _FULL, _WINDOW),
            nn.BatchNorm2d(_FULL),
            nn.ReLU(inplace=True),
            *conv_bn_relu(_FULL, _FULL, 1, bias=True),
        )
        self.deconv67 = nn.Sequential(*_deconv_bn_relu(_FULL, inputs, _WINDOW, 0))
        for stage in range(len(_STAGES), 0, -1):
            last = _STAGES[stage - 2][-1] if stage > 1 else _STAGES[0][0]
            layers = []
            for outputs in (*_STAGES[stage - 1][1:], last):
                layers += _deconv_bn_relu(inputs, outputs, 3, 1)
                inputs = outputs
            if stage == 1:
                layers.append(nn.ConvTranspose2d(inputs, num_classes, 1))
            self.add_module(f"deconv{stage}", nn.Sequential(*layers))
        decoders = {f"decoder{stage}": _STAGES[stage - 2][-1] for stage in range(len(_STAGES), 1, -1)}
        self.set_places({"bottleneck": _STAGES[-1][-1], **decoders, "head": _STAGES[0][0]}, recurrent)

    @through_time
    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,K,H,W)."""
        x: Tensor = images
        places = []
        for stage in range(1, len(_STAGES) + 1):
            x, place = functional.max_pool2d(self.get_submodule(f"conv{stage}")(x), 2, return_indices=True)
            places.append(place)
        x = self.at("bottleneck", self.deconv67(self.conv67(x)))
        for stage in range(len(_STAGES), 1, -1):
            unpooled = functional.max_unpool2d(x, places.pop(), [2, 2])
            x = self.at(f"decoder{stage}", self.get_submodule(f"deconv{stage}")(unpooled))
        last = self.get_submodule("deconv1")
        assert isinstance(last, nn.Sequential)
        return self.classify(last, functional.max_unpool2d(x, places.pop(), [2, 2]))

    def rows(self, images: Tensor) -> Rows:
        """See :class:`FrameNetwork`; stores a pooled map, and two bits for each value of those before it."""
        x = images
        pooled = []
        for stage in range(1, len(_STAGES) + 1):
            x, places = pool_with_places(chain(Held(x), self.get_submodule(f"conv{stage}")))
            pooled.append(places)
        x = self.at("bottleneck", self.deconv67(self.conv67(x)))
        while True:
            stage = len(pooled)
            up = Unpooled(Held(x), pooled.pop(), [2 * side for side in x.shape[2:]])
            *layers, last = self.get_submodule(f"deconv{stage}").children()
            if stage == 1:
                return chain(self.rows_at("head", chain(up, *layers)), last)
            x = self.at(f"decoder{stage}", chain(up, *layers, last).whole())
