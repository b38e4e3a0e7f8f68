"""global_conv and a step of conv_lstm on a GPU: sizes, tensors, and PyTorch's formulations (cuDNN) as peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import vosops
from vosops.reference.conv_lstm import conv_lstm_core
from vosops.reference.global_conv import global_conv

Formulation = Callable[..., Tensor]
"""Takes the tensors of a size, in their order, and gives one result."""


@dataclass(frozen=True)
class GlobalConvSize:
    """RGMP's global convolution of `channels` maps; with `prepared` the second half of them is known before."""

    name: str
    channels: int
    height: int
    width: int
    prepared: bool = False
    middle: int = 256
    outputs: int = 256
    kernel: int = 7
    batch: int = 1

    @property
    def title(self) -> str:
        """What it is, for people."""
        read = f"{self.channels} channels of {self.height} x {self.width}"
        half = ", half of them prepared" if self.prepared else ""
        return (
            f"{read}{half}, {self.middle} between, {self.outputs} out, k = {self.kernel}, batch {self.batch}"
        )

    @property
    def channels_read(self) -> int:
        """Channels that a call reads."""
        return self.channels // 2 if self.prepared else self.channels

    def tensors(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """x, the weights l1, l2, r1, r2, then l2's bias and, if prepared, the other half's share."""
        n, c, h, w, k = self.batch, self.channels_read, self.height, self.width, self.kernel
        shapes = [(self.middle, c, k, 1), (self.outputs, self.middle, 1, k)]
        shapes += [(self.middle, c, 1, k), (self.outputs, self.middle, k, 1)]
        tensors = [_normal((n, c, h, w), 1, 0)]
        tensors += [_normal(s, (s[1] * k) ** -0.5, i) for i, s in enumerate(shapes, 1)]
        tensors.append(_normal((self.outputs,), 1, 5))
        if self.prepared:
            tensors.append(_normal((n, 2 * self.middle, h, w), 1, 6))
        return [t.to(device, dtype) for t in tensors]

    @property
    def differentiated(self) -> int:
        """How many of the tensors, from the first on, a backward pass differentiates."""
        return 5

    @property
    def peers(self) -> dict[str, Formulation]:
        """Other contenders."""
        return {"cuDNN": self.naive}

    def ours(self, precision: str | None) -> Formulation:
        """By vosops."""

        def run(
            x: Tensor,
            l1: Tensor,
            l2: Tensor,
            r1: Tensor,
            r2: Tensor,
            bias: Tensor,
            half: Tensor | None = None,
        ) -> Tensor:
            return vosops.global_conv(x, l1, l2, r1, r2, l2_bias=bias, prepared=half, precision=precision)

        return run

    @staticmethod
    def naive(
        x: Tensor, l1: Tensor, l2: Tensor, r1: Tensor, r2: Tensor, bias: Tensor, half: Tensor | None = None
    ) -> Tensor:
        """By four convolutions of PyTorch."""
        return global_conv(x, l1, l2, r1, r2, l2_bias=bias, prepared=half)

    def work(self, itemsize: int, backward: bool) -> tuple[float, float]:
        """Return the operations and bytes."""
        pixels = self.batch * self.height * self.width
        weights = 2 * self.kernel * self.middle * (self.channels_read + self.outputs)
        moved = itemsize * (pixels * (self.channels_read + self.outputs) + weights)
        passes = 3 if backward else 1
        return 2.0 * pixels * weights * passes, float(moved * passes)


@dataclass(frozen=True)
class LstmSize:
    """A step of a convolutional LSTM with 3 x 3 weights, or several steps of a sequence."""

    name: str
    channels: int
    height: int
    width: int
    frames: int = 1
    batch: int = 1

    @property
    def title(self) -> str:
        """What it is, for people."""
        return f"{self.frames} steps, {self.channels} channels of {self.height} x {self.width}, batch {self.batch}"

    def tensors(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """x, the weight, hidden state, cell, bias."""
        n, c, h, w = self.batch, self.channels, self.height, self.width
        tensors = [
            _normal((n, self.frames, c, h, w), 1, 0),
            _normal((4 * c, 2 * c, 3, 3), (18 * c) ** -0.5, 1),
        ]
        tensors += [_normal((n, c, h, w), 1, 2), _normal((n, c, h, w), 1, 3), _normal((4 * c,), 1, 4)]
        return [t.to(device, dtype) for t in tensors]

    @property
    def differentiated(self) -> int:
        """How many of the tensors, from the first on, a backward pass differentiates."""
        return 4

    @property
    def peers(self) -> dict[str, Formulation]:
        """Other contenders."""
        return {"cuDNN": self.naive}

    def ours(self, precision: str | None) -> Formulation:
        """By vosops, whose convolution is PyTorch's on a GPU: `precision` changes nothing."""

        def run(x: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor, bias: Tensor) -> Tensor:
            return vosops.conv_lstm(x, weight, bias, (hidden, cell))[0]

        return run

    @staticmethod
    def naive(x: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor, bias: Tensor) -> Tensor:
        """By PyTorch's operators, step by step."""
        return conv_lstm_core(x, [weight], bias, hidden, cell, "convolution", 1.0)[0]

    def work(self, itemsize: int, backward: bool) -> tuple[float, float]:
        """Return the operations and bytes."""
        pixels, c = self.batch * self.frames * self.height * self.width, self.channels
        passes = 3 if backward else 1
        weights = 4 * c * 2 * c * 9
        return 2.0 * pixels * weights * passes, float(itemsize * passes * (weights + pixels * c * 4))


ConvolutionSize = GlobalConvSize | LstmSize


def _normal(shape: Sequence[int], scale: float, seed: int) -> Tensor:
    """Return random numbers, the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def channels_last(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return maps and weights with their channels innermost."""
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]


def call(
    formulation: Formulation, tensors: Sequence[Tensor], differentiated: int, backward: bool
) -> Callable[[], list[Tensor]]:
    """Return the function to time: the result, and with `backward` the gradients of the first tensors as well."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [formulation(*tensors)]

    def forward_backward() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors[:differentiated]]
        output = formulation(*leaves, *tensors[differentiated:])
        return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]

    return forward_backward if backward else forward
