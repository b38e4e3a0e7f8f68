"""The package spatial-correlation-sampler by :func:`vosops.local_correlation`: same names, arguments and results."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vosops.ops import local_correlation

__all__ = ["SpatialCorrelationSampler", "SpatialCorrelationSamplerFunction", "spatial_correlation_sample"]

Pair = int | Sequence[int]


def spatial_correlation_sample(
    input1: Tensor,
    input2: Tensor,
    kernel_size: Pair = 1,
    patch_size: Pair = 1,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    dilation_patch: Pair = 1,
) -> Tensor:
    """Correlate two maps at the displacements of a patch: :func:`vosops.local_correlation` by position.

    Args:
        input1: the query, (N,C,H,W).
        input2: the key, (N,C,H,W).
        kernel_size: an int or a pair for y and x, like all that follow.
        patch_size: number of displacements.
        stride: between outputs.
        padding: around both maps.
        dilation: of the kernel.
        dilation_patch: between displacements.

    Returns:
        (N,PH,PW,oH,oW) in the inputs' dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
    """
    return local_correlation(
        input1,
        input2,
        kernel_size=kernel_size,
        patch_size=patch_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        dilation_patch=dilation_patch,
    )


class SpatialCorrelationSamplerFunction:
    """What programs that call the original's autograd function use: `apply` alone."""

    apply = staticmethod(spatial_correlation_sample)


class SpatialCorrelationSampler(nn.Module):
    """:func:`spatial_correlation_sample` with its options as a module without parameters.

    Args:
        kernel_size: an int or a pair for y and x, like all that follow.
        patch_size: number of displacements.
        stride: between outputs.
        padding: around both maps.
        dilation: of the kernel.
        dilation_patch: between displacements.
    """

    def __init__(
        self,
        kernel_size: Pair = 1,
        patch_size: Pair = 1,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        dilation_patch: Pair = 1,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.patch_size = patch_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.dilation_patch = dilation_patch

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Return (N,PH,PW,oH,oW) of two maps (N,C,H,W)."""
        return spatial_correlation_sample(
            input1,
            input2,
            self.kernel_size,
            self.patch_size,
            self.stride,
            self.padding,
            self.dilation,
            self.dilation_patch,
        )
