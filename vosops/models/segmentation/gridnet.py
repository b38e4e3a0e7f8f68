"""GridNet: Fourure et al., "Residual Conv-Deconv Grid Network for Semantic Segmentation", BMVC 2017.

As daigo0927/GridNet computes it, which differs from the authors' Torch7 code in more than details.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from vosops.models.recurrence import Recurrent, through_time
from vosops.models.rows import Added, Held, Rows
from vosops.models.segmentation._layers import chain
from vosops.models.semantic_network import FrameNetwork, Sides

__all__ = ["GridNet"]


_REACH = {3: 65}  # by the number of rows


def _two_convolutions(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.PReLU(),
        nn.Conv2d(inputs, outputs, 3, stride, padding=1),
        nn.PReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
    ]


class _Lateral(nn.Module):
    """A residual block; the shortcut is a convolution where the channels change."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.f = nn.Sequential(*_two_convolutions(inputs, outputs))
        if inputs != outputs:
            self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.widens = inputs != outputs

    def rows(self, x: Rows) -> Rows:
        return chain(x, self.f, addend=chain(x, self.conv) if self.widens else x)

    def add_to(self, x: Tensor, other: Rows | None = None) -> Tensor:
        """Return its map, computed in place of x, and another one's added."""
        own = self.rows(Held(x))
        return (own if other is None else Added([other, own])).whole(into=x)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.f(x)
        return y + (self.conv(x) if self.widens else x)


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.f = nn.Sequential(*_two_convolutions(inputs, outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.f(x)
        return y


class _Up(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        enlarge = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.f = nn.Sequential(enlarge, *_two_convolutions(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.f(x)
        return y


class GridNet(FrameNetwork):
    """A grid of rows (scales) and columns, down in the first half and up in the second: (N,C,H,W) -> logits (N,K,H,W).

    Images lie in [0, 1]; their sides are multiples of two to the power of the rows but one: of 4 by default.

    Args:
        num_classes: K.
        in_channels: C.
        widths: Channels of each row, the finest first.
        recurrent: Where ConvLSTMs are, see :class:`FrameNetwork`: "row1", "row2" ..., the maps of the rows in the
            middle of the grid, "bottleneck", that of the last row, and "head", what the last block reads.

    Source: daigo0927/GridNet, `GridNet`: parametric ReLUs and no batch norm, bilinear enlargement between pixel
    centres, three columns down and three up. The authors' has five rows, batch norm, transposed convolutions and
    dropped branches.

    >>> import torch
    >>> from vosops.models import create_model
    >>> create_model("gridnet", num_classes=4, widths=(8, 16))(torch.rand(1, 3, 10, 14)).shape
    torch.Size([1, 4, 10, 14])
    """

    COLUMNS = 6

    def __init__(
        self,
        num_classes: int = 19,
        *,
        in_channels: int = 3,
        widths: Sequence[int] = (32, 64, 96),
        recurrent: Recurrent | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths must be the channels of two rows or more, got {tuple(widths)}")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.scales = len(widths)
        scale: int = 2 ** (self.scales - 1)
        self.sides = Sides(scale, least=scale)
        self.stride = scale
        self.reach = _REACH.get(self.scales)
        self.lateral_init = _Lateral(in_channels, widths[0])
        for row, width in enumerate(widths):
            for column in range(self.COLUMNS - 1):
                self.add_module(f"lateral_{row}_{column}", _Lateral(width, width))
        for row, (fine, coarse) in enumerate(pairwise(widths)):
            for column in range(self.COLUMNS // 2):
                self.add_module(f"down_{row}_{column}", _Down(fine, coarse))
                self.add_module(f"up_{row}_{column}", _Up(coarse, fine))
        self.lateral_final = _Lateral(widths[0], num_classes)
        self.rows_places = [*(f"row{n}" for n in range(1, self.scales)), "bottleneck"]
        self.set_places({**dict(zip(self.rows_places, widths, strict=True)), "head": widths[0]}, recurrent)

    @through_time
    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,K,H,W)."""
        half = self.COLUMNS // 2
        state: list[Tensor] = [self.lateral_init(images)]
        for row in range(1, self.scales):
            state.append(self.get_submodule(f"down_{row - 1}_0")(state[-1]))
        for column in range(1, half):
            state[0] = self.get_submodule(f"lateral_0_{column - 1}")(state[0])
            for row in range(1, self.scales):
                down = self.get_submodule(f"down_{row - 1}_{column}")(state[row - 1])
                state[row] = down + self.get_submodule(f"lateral_{row}_{column - 1}")(state[row])
        state = [self.at(place, x) for place, x in zip(self.rows_places, state, strict=True)]
        for column in range(half, self.COLUMNS):
            state[-1] = self.get_submodule(f"lateral_{self.scales - 1}_{column - 1}")(state[-1])
            for row in reversed(range(self.scales - 1)):
                up = self.get_submodule(f"up_{row}_{column - half}")(state[row + 1])
                state[row] = up + self.get_submodule(f"lateral_{row}_{column - 1}")(state[row])
        logits: Tensor = self.lateral_final(self.at("head", state[0]))
        return logits

    def rows(self, images: Tensor) -> Rows:
        """See :class:`FrameNetwork`; stores a map of each row, which columns change in place."""
        half = self.COLUMNS // 2
        state = [self.lateral_init.rows(Held(images)).whole()]
        for row in range(1, self.scales):
            state.append(chain(Held(state[-1]), self._part("down", row - 1, 0).f).whole())
        for column in range(1, half):
            for row in range(self.scales):
                above = chain(Held(state[row - 1]), self._part("down", row - 1, column).f) if row else None
                self._part("lateral", row, column - 1).add_to(state[row], above)
        for row, place in enumerate(self.rows_places):
            state[row] = self.at(place, state[row])
        for column in range(half, self.COLUMNS):
            for row in reversed(range(self.scales)):
                below = None
                if row + 1 < self.scales:
                    below = chain(Held(state[row + 1]), self._part("up", row, column - half).f)
                self._part("lateral", row, column - 1).add_to(state[row], below)
        return self.lateral_final.rows(Held(self.at("head", state[0])))

    def _part(self, kind: str, row: int, column: int) -> Any:
        return self.get_submodule(f"{kind}_{row}_{column}")
