"""3x3 convolutions on a CPU by Winograd's F(4x4,3x3): `torch.nn.functional.conv2d` for the reference networks.

On a CPU most of the time of a frame goes into 3x3 convolutions of hundreds of channels. PyTorch's reach nearly the
processor's peak; with a quarter of the multiplications they are 2.4 times as fast at 256 channels. Their rounding
is some 6 times as large, 1e-6 to 2e-6 of the output's root mean square (benchmarks/convolutions.py). With gradients, in
other dtypes, on other devices and under ``use_backend("reference")`` they are PyTorch's own. Not one of the public ops:
it has no derivative and no GPU kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vosops import backends
from vosops.ops._registration import Piece, dispatched, has_kernel, looping_vmap, register_pieces

HAS_WINOGRAD = has_kernel("conv3x3_winograd", "CPU")
HAS_ROWS = has_kernel("conv3x3_winograd_rows", "CPU")
_MIN_CHANNELS, _MIN_PIXELS = 32, 256  # below them there is little or nothing to gain


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    addend: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`torch.nn.functional.conv2d`, then + addend (of the result's shape) and a ReLU if asked for."""
    same = (_pair(stride), _pair(padding), _pair(dilation), groups) == ((1, 1), (1, 1), (1, 1), 1)
    if same and weight.shape[2:] == (3, 3) and _takes_winograd(x, weight):
        y: Tensor = torch.ops.vosops.conv3x3_winograd(x, weight, bias, addend, relu)
        return y
    y = functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if addend is not None:
        y += addend
    return functional.relu(y, inplace=True) if relu else y


def takes_rows(pixels: int, weight: Tensor, like: Tensor) -> bool:
    """Return whether `conv2d_rows` computes a 3x3 convolution with this weight of maps like this one.

    pixels: of the whole output.
    """
    return (
        HAS_ROWS and _runs(weight, like) and min(weight.shape[:2]) >= _MIN_CHANNELS and pixels >= _MIN_PIXELS
    )


def conv2d_rows(
    maps: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    above: int = 0,
    addend: Tensor | None = None,
    slope: float = 1.0,
) -> None:
    """Write rows of a 3x3 convolution that keeps the size to out (N,M,rows,W).

    maps: (N,C,h,W) each, the rows that are needed of maps whose channels follow each other; zeros lie beyond them. The
    first row of out is centred on row `above`. Then + addend, and what is negative is multiplied by the slope. Maps,
    addend and out may be parts of larger ones, with columns next to each other.
    """
    torch.ops.vosops.conv3x3_winograd_rows(
        [_dense_columns(x) for x in maps],
        weight,
        bias,
        None if addend is None else _dense_columns(addend),
        out,
        slope,
        above,
    )


def _dense_columns(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _pair(value: int | Sequence[int] | str) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else () if isinstance(value, str) else tuple(value)


def _takes_winograd(x: Tensor, weight: Tensor) -> bool:
    return (
        HAS_WINOGRAD
        and _runs(weight, x)
        and x.dim() == 4
        and min(weight.shape[:2]) >= _MIN_CHANNELS
        and x.shape[2] * x.shape[3] >= _MIN_PIXELS
    )


def _runs(weight: Tensor, x: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and backends.forced() in (None, "cpp")
    )


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])


def _fake_rows(
    maps: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    out: Tensor,
    slope: float,
    above: int,
) -> None:
    return None


register_pieces(
    {
        "conv3x3_winograd": Piece(
            _fake, vmap=lambda suffix: looping_vmap(dispatched("conv3x3_winograd", suffix))
        )
    }
)
if HAS_ROWS:
    torch.library.register_fake("vosops::conv3x3_winograd_rows", _fake_rows)
