"""What someone else's package would hold: a network for classes and one for masks, each entered by a line.

Nothing of vosops knows this file. `test_stranger.py` imports it, and finds the two wherever models are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops import soft_aggregate
from vosops.models import FrameNetwork, Network, register_model
from vosops.models.network import Masks, Memory, resize_rows

STRIDE = 4


@register_model(
    "stranger_classes",
    kind="semantic network",
    summary="two convolutions, for the class of every pixel",
    paper="Nobody, 2026",
    aliases=("stranger++",),
    checkpoint="stranger_classes.pth",
)
class StrangerClasses(FrameNetwork):
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, num_classes: int = 4, *, in_channels: int = 3, width: int = 8) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.first = nn.Conv2d(in_channels, width, 3, stride=STRIDE, padding=1)
        self.last = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.first(images).relu())
        return logits


class StrangerMasks(Network):
    """An object is where its colour in the last frame is."""

    stride = STRIDE

    def __init__(self, *, sharpness: float = 20.0) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def new_memory(self, *, budget: int | None = None, naive: bool = False) -> Memory:
        return _Colours(self)

    def evidence(self, scores: Tensor, size: tuple[int, int], rows: range) -> Tensor:
        return resize_rows(scores, size, rows)

    def aggregate(self, evidence: Tensor) -> Tensor:
        return soft_aggregate(evidence)


class _Colours(Memory):
    def __init__(self, network: StrangerMasks) -> None:
        self.network, self.object_ids, self.colours = network, [], {}

    def add(self, image: Tensor, masks: Masks, *, frame: int, permanent: bool, keep: bool) -> None:
        self.object_ids = list(masks.object_ids)
        for n, i in enumerate(self.object_ids):
            own = masks.of(1 + n)
            self.colours[i] = (image[0] * own).sum((1, 2)) / own.sum().clamp(min=1)

    def segment(self, image: Tensor, *, frame: int) -> Tensor:
        small = functional.avg_pool2d(image, STRIDE)[0]
        colours = torch.stack([self.colours[i] for i in self.object_ids])
        distance = (small[None] - colours[:, :, None, None]).square().sum(1)
        return torch.exp(-self.network.sharpness * distance).clamp(max=0.99)

    def remove_object(self, object_id: int) -> None:
        self.object_ids.remove(object_id)
        del self.colours[object_id]

    def state_dict(self) -> dict[str, Any]:
        return {"ids": list(self.object_ids), "colours": [self.colours[i].clone() for i in self.object_ids]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.object_ids = list(state["ids"])
        self.colours = dict(zip(self.object_ids, state["colours"], strict=True))

    def memory_bytes(self) -> int:
        return sum(4 * x.numel() for x in self.colours.values())


register_model(
    "stranger_masks",
    f"{__name__}:StrangerMasks",
    kind="mask network",
    summary="follows colours",
    weights="optional",
)
