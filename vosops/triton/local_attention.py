"""The three linear pieces of local attention: dot, weigh and spread.

A program owns a row of pixels' places, BLOCK_P of them in the order of the map. In ``dot`` it holds their sums for
BLOCK_J offsets of one row of the window and walks over the channels, in ``weigh`` those for BLOCK_C channels and walks
over the offsets, so that no sum crosses threads and every load reads neighbouring pixels. Maps are read in place, with
any strides; what the window reads again comes from the caches. ``spread`` is ``weigh`` with the weight of each offset's
mirror image at the pixel that the offset leads to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vosops.triton._common import SUPPORTED_DTYPES, compile_options, launch_on, power_of_two

BLOCK_P, BLOCK_J = 64, 16
"""Pixels, and offsets in x, of a program of ``dot``."""

MOST_BLOCK_C = 32
"""Channels of a program of ``weigh``, at most."""

MAX_PIXELS = 2**30
"""Pixels of one map and blocks of one launch are counted in 32 bits."""


@triton.jit
def _dot(
    a,
    b,
    out,
    a_n,
    a_c,
    a_y,
    a_x,
    b_n,
    b_c,
    b_y,
    b_x,
    channels,
    height,
    width,
    reach,
    dilation,
    blocks,
    BLOCK_P: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Grid (blocks of pixels * blocks of offsets * rows of the window * N)."""
    size = 2 * reach + 1
    parts = (size + BLOCK_J - 1) // BLOCK_J
    program = tl.program_id(0)
    pixel = (program % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    j = (program // blocks % parts) * BLOCK_J + tl.arange(0, BLOCK_J)
    i = program // blocks // parts % size
    n = (program // blocks // parts // size).to(tl.int64)
    y, x = pixel // width, pixel % width
    exists = pixel < height * width
    row = y.to(tl.int64) + (i - reach).to(tl.int64) * dilation
    column = x[None, :].to(tl.int64) + (j - reach)[:, None].to(tl.int64) * dilation
    inside = exists & (row >= 0) & (row < height)
    inside = inside[None, :] & (column >= 0) & (column < width) & (j < size)[:, None]
    own = a + n * a_n + y.to(tl.int64) * a_y + x.to(tl.int64) * a_x
    other = b + n * b_n + row[None, :] * b_y + column * b_x
    sums = tl.zeros((BLOCK_J, BLOCK_P), tl.float32)
    for c in range(channels):
        channel = tl.cast(c, tl.int64)
        here = tl.load(own + channel * a_c, mask=exists, other=0.0).to(tl.float32)
        there = tl.load(other + channel * b_c, mask=inside, other=0.0).to(tl.float32)
        sums += here[None, :] * there
    plane = (n * size + i) * size + j
    to = out + plane[:, None] * (height * width) + pixel[None, :]
    tl.store(to, sums, mask=exists[None, :] & (j < size)[:, None])


@triton.jit
def _weigh(
    weights,
    maps,
    out,
    weights_n,
    first_weight,
    weights_i,
    weights_j,
    weights_y,
    weights_x,
    maps_n,
    maps_c,
    maps_y,
    maps_x,
    channels,
    height,
    width,
    reach,
    dilation,
    blocks,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (blocks of pixels * blocks of channels * N); weight (i, j) of pixel (0, 0) lies at first_weight and on."""
    parts = (channels + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    pixel = (program % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (program // blocks % parts) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (program // blocks // parts).to(tl.int64)
    y, x = (pixel // width).to(tl.int64), (pixel % width).to(tl.int64)
    exists = pixel < height * width
    own_channels = c < channels
    channel_maps = maps + n * maps_n + c.to(tl.int64)[:, None] * maps_c
    own_weights = weights + n * weights_n + first_weight + y * weights_y + x * weights_x
    sums = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for i in range(2 * reach + 1):
        row = y + tl.cast(i - reach, tl.int64) * dilation
        in_rows = exists & (row >= 0) & (row < height)
        for j in range(2 * reach + 1):
            column = x + tl.cast(j - reach, tl.int64) * dilation
            inside = in_rows & (column >= 0) & (column < width)
            at = tl.cast(i, tl.int64) * weights_i + tl.cast(j, tl.int64) * weights_j
            weight = tl.load(own_weights + at, mask=inside, other=0.0)
            places = channel_maps + (row * maps_y + column * maps_x)[None, :]
            there = tl.load(places, mask=inside[None, :] & own_channels[:, None], other=0.0)
            sums += weight[None, :] * there.to(tl.float32)
    plane = n * channels + c
    to = out + plane[:, None] * (height * width) + pixel[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=exists[None, :] & own_channels[:, None])


def local_attention_dot(a: Tensor, b: Tensor, reach: int, dilation: int) -> Tensor:
    """a[p] . b[p + d] for each offset d: (N,K,H,W) float32 of two (N,C,H,W)."""
    _check("a", a)
    size = 2 * reach + 1
    batch, channels, height, width = a.shape
    out = a.new_empty((batch, size * size, height, width), dtype=torch.float32)
    if out.numel() == 0:
        return out
    blocks = triton.cdiv(height * width, BLOCK_P)
    with launch_on(a):
        _dot[_grid("a", a, blocks * triton.cdiv(size, BLOCK_J) * size * batch)](
            *(a, b, out, *a.stride(), *b.stride(), channels, height, width, reach, dilation, blocks),
            BLOCK_P=BLOCK_P,
            BLOCK_J=BLOCK_J,
            **compile_options(4),
        )
    return out


def local_attention_weigh(weights: Tensor, b: Tensor, reach: int, dilation: int) -> Tensor:
    """Return the sum over d of weights[d,p] b[p + d]: (N,C,H,W) as b, of weights (N,K,H,W) float32."""
    return _combine(weights, b, reach, dilation, spread=False)


def local_attention_spread(weights: Tensor, a: Tensor, reach: int, dilation: int) -> Tensor:
    """Return the sum over d of weights[d,p - d] a[p - d]: (N,C,H,W) as a, of weights (N,K,H,W) float32."""
    return _combine(weights, a, reach, dilation, spread=True)


def _combine(weights: Tensor, maps: Tensor, reach: int, dilation: int, *, spread: bool) -> Tensor:
    _check("maps", maps)
    if weights.dtype != torch.float32:
        raise TypeError(f"weights must be float32 for the Triton kernels, got {weights.dtype}")
    size = 2 * reach + 1
    batch, channels, height, width = maps.shape
    out = torch.empty_like(maps, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    weights_n, weights_d, weights_y, weights_x = weights.stride()
    first, row, column = 0, size * weights_d, weights_d
    if spread:
        first = (size * size - 1) * weights_d - reach * dilation * (weights_y + weights_x)
        row, column = dilation * weights_y - row, dilation * weights_x - column
    block_c = min(MOST_BLOCK_C, power_of_two(channels))
    blocks = triton.cdiv(height * width, BLOCK_P)
    strides = (weights_n, first, row, column, weights_y, weights_x, *maps.stride())
    with launch_on(maps):
        _weigh[_grid("maps", maps, blocks * triton.cdiv(channels, block_c) * batch)](
            *(weights, maps, out, *strides, channels, height, width, reach, dilation, blocks),
            BLOCK_P=BLOCK_P,
            BLOCK_C=block_c,
            **compile_options(4),
        )
    return out


def _check(name: str, maps: Tensor) -> None:
    if maps.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"{name} must be float32, float16 or bfloat16 for the Triton kernels, got {maps.dtype}"
        )


def _grid(name: str, maps: Tensor, programs: int) -> tuple[int]:
    if maps.shape[2] * maps.shape[3] >= MAX_PIXELS or programs >= 2 * MAX_PIXELS:
        raise ValueError(f"{name} must have fewer than 2**30 pixels, got shape {tuple(maps.shape)}")
    return (programs,)
