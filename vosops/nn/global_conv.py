"""RGMP's global convolution as a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vosops.ops.global_conv import global_conv, global_conv_prepare


class GlobalConv2d(nn.Module):
    """A large convolution of low rank, as in RGMP's decoder: (kh,1) then (1,kw), plus (1,kw) then (kh,1).

    Args:
        in_channels: of the input, or of target and reference together.
        out_channels: of the result.
        kernel_size: odd, or an odd (kh,kw).
        mid_channels: between the two convolutions of each branch.
        bias: whether the four convolutions have biases.
        precision: as in `vosops.global_conv`.
        device: of the parameters.
        dtype: of the parameters.

    The parameters have RGMP's names: `conv_l1.weight` (mid,in,kh,1), `conv_l2.weight` (out,mid,1,kw),
    `conv_r1.weight` (mid,in,1,kw), `conv_r2.weight` (out,mid,kh,1), and a `bias` each, initialised as those of
    torch.nn.Conv2d. On a GPU the four weights are channels_last, the layout in which the kernels read them in place:
    they are rearranged once, where the module arrives there, and not in every call.

    Where the last channels of the input are the same for many calls, as the features of RGMP's reference frame,
    `prepare` computes their half of the first stage once:

        >>> import torch, vosops.nn
        >>> module = vosops.nn.GlobalConv2d(32, 4, mid_channels=8)
        >>> target, reference = torch.randn(2, 1, 16, 15, 27)
        >>> prepared = module.prepare(reference)
        >>> module(target, prepared).shape
        torch.Size([1, 4, 15, 27])
        >>> torch.allclose(module(target, prepared), module(torch.cat([target, reference], 1)), atol=1e-4)
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 7,
        mid_channels: int = 256,
        *,
        bias: bool = True,
        precision: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        sizes = [kernel_size] * 2 if isinstance(kernel_size, int) else list(kernel_size)
        if len(sizes) != 2 or any(size < 1 or size % 2 != 1 for size in sizes):
            raise ValueError(f"kernel_size must be an odd int or two of them, got {kernel_size!r}")
        height, width = sizes
        self.in_channels, self.out_channels, self.mid_channels = in_channels, out_channels, mid_channels
        self.kernel_size, self.precision = (height, width), precision

        def line(inputs: int, outputs: int, size: tuple[int, int]) -> nn.Conv2d:
            padding = (size[0] // 2, size[1] // 2)
            return nn.Conv2d(inputs, outputs, size, padding=padding, bias=bias, device=device, dtype=dtype)

        self.conv_l1 = line(in_channels, mid_channels, (height, 1))
        self.conv_l2 = line(mid_channels, out_channels, (1, width))
        self.conv_r1 = line(in_channels, mid_channels, (1, width))
        self.conv_r2 = line(mid_channels, out_channels, (height, 1))
        self._arrange_weights()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GlobalConv2d:
        """Move or cast the parameters, as every module does, and lay out the weights for where they are then."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._arrange_weights()
        return self

    def _arrange_weights(self) -> None:
        for conv in (self.conv_l1, self.conv_l2, self.conv_r1, self.conv_r2):
            weight = conv._parameters.get("weight")  # None under a parametrization
            if weight is not None and weight.device.type != "cpu":
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor, prepared: Tensor | None = None) -> Tensor:
        """Convolve (N,in,H,W) -> (N,out,H,W); with `prepared` x is the target, the first channels of the input."""
        return global_conv(
            x,
            self.conv_l1.weight,
            self.conv_l2.weight,
            self.conv_r1.weight,
            self.conv_r2.weight,
            l1_bias=None if prepared is not None else self.conv_l1.bias,
            l2_bias=self.conv_l2.bias,
            r1_bias=None if prepared is not None else self.conv_r1.bias,
            r2_bias=self.conv_r2.bias,
            prepared=prepared,
            precision=self.precision,
        )

    def prepare(self, reference: Tensor) -> Tensor:
        """Return the first stage's half for a constant reference (N or 1,C',H,W), the last C' channels of the input.

        Differentiable; good for as long as the first stage's parameters stay as they are.
        """
        return global_conv_prepare(
            reference,
            self.conv_l1.weight,
            self.conv_r1.weight,
            l1_bias=self.conv_l1.bias,
            r1_bias=self.conv_r1.bias,
            precision=self.precision,
        )

    def extra_repr(self) -> str:
        """Return the options in the module's repr."""
        return f"kernel_size={self.kernel_size}, precision={self.precision}"
