"""Local correlation: products of two maps at the displacements of a patch (FlowNetC's correlation, the cost volume)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vosops import _checks, backends
from vosops.ops._bilinear import bilinear_piece
from vosops.ops._registration import register_op, register_pieces
from vosops.reference.local_correlation import local_correlation_core

Pair = int | Sequence[int]
"""A number for y and x, or both."""


def local_correlation(
    query: Tensor,
    key: Tensor,
    *,
    kernel_size: Pair = 1,
    patch_size: Pair = 1,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    dilation_patch: Pair = 1,
) -> Tensor:
    """Compute dot products of each pixel of `query` with the pixels of `key` at the displacements of a patch.

    For output o and position p of the patch, the result is the sum over channels and over pixels k of the kernel of
    query[o * stride - padding + k * dilation] key[the same + (p - (patch_size - 1) // 2) * dilation_patch]. Positions
    outside the image contribute nothing. The sum is not normalised.

    Args:
        query: (N,C,H,W); float32, float16, bfloat16, on the CPU also float64.
        key: (N,C,H,W), of the same dtype.
        kernel_size: pixels of the kernel. Every option is an int or a pair for y and x.
        patch_size: number of displacements; with an even number there is one more to the right than to the left.
        stride: between the query pixels of neighbouring outputs, in pixels.
        padding: pixels that the outputs reach beyond the image on each side.
        dilation: between the pixels of the kernel, in pixels.
        dilation_patch: between displacements, in pixels.

    Returns:
        (N,PH,PW,oH,oW) in the dtype of query, with oH = (H + 2 padding - (kernel_size - 1) dilation - 1) // stride + 1.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        NotImplementedError: under forward-mode differentiation.

    Sums are float32 (float64 for float64), rounded once, also under autocast. Differentiable to any order,
    deterministic. Time O(N oH oW PH PW C), for any kernel: the products of a pixel are computed once and then summed
    by the kernel, for which they are stored at every pixel that it touches (O(N H W PH PW) if that exceeds the
    output). Memory beyond inputs and output: a copy of both maps.

    Source: Dosovitskiy et al., FlowNet, ICCV 2015, section 3; with the options of `SpatialCorrelationSampler` of the
    package spatial-correlation-sampler.

        >>> import torch, vosops
        >>> first, second = torch.randn(2, 1, 64, 30, 54)
        >>> vosops.local_correlation(first, second, patch_size=21, dilation_patch=2).shape
        torch.Size([1, 21, 21, 30, 54])
    """
    _checks.refuse_forward_mode("local_correlation")
    arguments = _resolve(
        query,
        key,
        kernel_size=kernel_size,
        patch_size=patch_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        dilation_patch=dilation_patch,
    )
    kernels = backends.choose("local_correlation", arguments.call)
    query, key, kernel = arguments.query, arguments.key, arguments.kernel
    if kernel.pixels == 1:
        result: Tensor = kernels.run("local_correlation", query, key, *arguments.core)
        return result
    wide = torch.promote_types(query.dtype, torch.float32)
    products = kernels.run("local_correlation", query.to(wide), key.to(wide), *arguments.core)
    return kernel.sums(products).to(query.dtype)


class _Kernel(NamedTuple):
    """How the products of single pixels add up to those of a kernel, for y and x."""

    size: tuple[int, int]
    spacing: tuple[int, int]
    """Between the kernel's pixels, counted in products."""
    step: tuple[int, int]
    """Between neighbouring outputs, counted in products."""
    outputs: tuple[int, int]

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]

    def sums(self, products: Tensor) -> Tensor:
        """Return the outputs of products (N,PH,PW,h,w)."""
        for dim, size, spacing, step, count in zip((3, 4), *self, strict=True):
            length = max(0, (count - 1) * step + 1)
            terms = [products.narrow(dim, i * spacing, length) for i in range(size)]
            every = (slice(None),) * dim + (slice(None, None, step),)
            products = terms[0][every]
            for term in terms[1:]:
                products = products + term[every]
        return products


class _Correlation(NamedTuple):
    """The checked arguments: what decides who serves the call, the maps, the core's options, and the kernel."""

    call: backends.Call
    query: Tensor
    key: Tensor
    core: tuple[list[int], ...]
    kernel: _Kernel


def _resolve(
    query: Tensor,
    key: Tensor,
    *,
    kernel_size: Pair = 1,
    patch_size: Pair = 1,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    dilation_patch: Pair = 1,
) -> _Correlation:
    """Check the public arguments and turn them into those of the core, whose kernel is one pixel.

    It gets the stride at which the outputs and all pixels of their kernels are among its own outputs.
    """
    query, key = _checks.promote_under_autocast(query, key)
    _checks.check_embeddings(query, key, ("N", "C", "H", "W"))
    _checks.check_tensor("key", key, tuple(query.shape))
    kernel = _pair("kernel_size", kernel_size)
    patch = _pair("patch_size", patch_size)
    steps = _pair("stride", stride)
    pads = _pair("padding", padding, least=0)
    spacings = _pair("dilation", dilation)
    shifts = _pair("dilation_patch", dilation_patch)
    outputs = []
    for name, size, pixels, step, pad, spacing in zip(
        "HW", query.shape[2:], kernel, steps, pads, spacings, strict=True
    ):
        room = size + 2 * pad - (pixels - 1) * spacing
        if size and room < 1:
            raise ValueError(
                f"kernel_size and dilation must fit the padded query, {name} = {size} + 2 * {pad}, got a kernel of "
                f"{(pixels - 1) * spacing + 1}"
            )
        outputs.append(max(0, (room - 1) // step + 1))
    common = [
        step if pixels == 1 else _common_divisor(step, spacing)
        for pixels, step, spacing in zip(kernel, steps, spacings, strict=True)
    ]
    summed = _Kernel(
        kernel,
        (spacings[0] // common[0], spacings[1] // common[1]),
        (steps[0] // common[0], steps[1] // common[1]),
        (outputs[0], outputs[1]),
    )
    call = backends.Call(query.device, query.dtype, backward=_checks.wants_gradients(query, key))
    return _Correlation(call, query, key, (list(patch), common, list(pads), list(shifts)), summed)


def _common_divisor(a: int, b: int) -> int:
    """Return the greatest common divisor; torch.compile cannot trace math.gcd."""
    while b:
        a, b = b, a % b
    return a


def _pair(name: str, value: Pair, least: int = 1) -> tuple[int, int]:
    """Return an option for y and x."""
    values = list(value) if isinstance(value, Sequence) else [value, value]
    if len(values) != 2:
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    y, x = (_checks.check_positive_int(name, each, least) for each in values)
    return y, x


# ---- The registered pieces: the correlation of single pixels, and its gradients, each of which has the other two as
# its own derivatives. All tensors have one dtype.


def _fake(
    query: Tensor,
    key: Tensor,
    patch_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation_patch: Sequence[int],
) -> Tensor:
    sizes = zip(query.shape[2:], padding, stride, strict=True)
    return query.new_empty(
        query.shape[0], *patch_size, *((size + 2 * pad - 1) // step + 1 for size, pad, step in sizes)
    )


def _fake_gradient(grad: Tensor, other: Tensor, *options: Sequence[int]) -> Tensor:
    return torch.empty_like(other, memory_format=torch.contiguous_format)


OPTIONS = "int[] patch_size, int[] stride, int[] padding, int[] dilation_patch) -> Tensor"
CORRELATION, OF_QUERY, OF_KEY = "local_correlation", "local_correlation_query", "local_correlation_key"
PIECES = {
    CORRELATION: bilinear_piece(
        f"(Tensor query, Tensor key, {OPTIONS}",
        _fake,
        lambda query, key, grad: ((OF_QUERY, grad, key), (OF_KEY, grad, query)),
    ),
    OF_QUERY: bilinear_piece(
        f"(Tensor grad, Tensor key, {OPTIONS}",
        _fake_gradient,
        lambda weights, key, grad: ((CORRELATION, grad, key), (OF_KEY, weights, grad)),
    ),
    OF_KEY: bilinear_piece(
        f"(Tensor grad, Tensor query, {OPTIONS}",
        _fake_gradient,
        lambda weights, query, grad: ((CORRELATION, query, grad), (OF_QUERY, weights, grad)),
    ),
}
register_pieces(PIECES, "local_correlation")
register_op(
    "local_correlation",
    resolve={"local_correlation": _resolve},
    reference={"local_correlation": local_correlation_core},
    orders={"cpu": backends.UNMEASURED, "cuda": backends.UNMEASURED},
)
