"""Local correlation and its two gradients.

A program owns BLOCK_P pixels in the order of the map. In ``_correlate`` they are outputs: it holds their sums for
BLOCK_J displacements of one row of the patch and walks over the channels. In ``_weigh`` they are pixels of the query,
or of the key, that receive a gradient: it holds their sums for BLOCK_C channels and walks over the patch, so that no
sum crosses threads, nothing is added atomically, and neighbouring threads read neighbouring pixels. Maps are read in
place, with any strides; what the patch reads again comes from the caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vosops.triton._common import SUPPORTED_DTYPES, compile_options, launch_on, power_of_two

BLOCK_P, BLOCK_J = 64, 16
"""Pixels of a program, and displacements in x of one of ``_correlate``."""

MOST_BLOCK_C = 32
"""Channels of a program of ``_weigh``, at most."""

MAX_PIXELS = 2**30
"""Pixels of one map and blocks of one launch are counted in 32 bits."""


@triton.jit
def _inside(place, size):
    return (place >= 0) & (place < size)


@triton.jit
def _correlate(
    query,
    key,
    out,
    query_n,
    query_c,
    query_y,
    query_x,
    key_n,
    key_c,
    key_y,
    key_x,
    channels,
    height,
    width,
    outputs_y,
    outputs_x,
    patch_y,
    patch_x,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    blocks,
    BLOCK_P: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Grid (blocks of outputs * blocks of displacements in x * rows of the patch * N)."""
    parts = (patch_x + BLOCK_J - 1) // BLOCK_J
    program = tl.program_id(0)
    output = (program % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    j = (program // blocks % parts) * BLOCK_J + tl.arange(0, BLOCK_J)
    i = program // blocks // parts % patch_y
    n = (program // blocks // parts // patch_y).to(tl.int64)
    y = (output // outputs_x).to(tl.int64) * stride_y - padding_y
    x = (output % outputs_x).to(tl.int64) * stride_x - padding_x
    row = y + (i - (patch_y - 1) // 2).to(tl.int64) * dilation_y
    column = x[None, :] + (j - (patch_x - 1) // 2)[:, None].to(tl.int64) * dilation_x
    wanted = output < outputs_y * outputs_x
    exists = wanted & _inside(y, height) & _inside(x, width)
    inside = (exists & _inside(row, height))[None, :] & _inside(column, width) & (j < patch_x)[:, None]
    own = query + n * query_n + y * query_y + x * query_x
    other = key + n * key_n + row[None, :] * key_y + column * key_x
    sums = tl.zeros((BLOCK_J, BLOCK_P), tl.float32)
    for c in range(channels):
        channel = tl.cast(c, tl.int64)
        here = tl.load(own + channel * query_c, mask=exists, other=0.0).to(tl.float32)
        there = tl.load(other + channel * key_c, mask=inside, other=0.0).to(tl.float32)
        sums += here[None, :] * there
    sums = tl.where(inside, sums, 0.0)
    plane = (n * patch_y + i) * patch_x + j
    to = out + plane[:, None] * (outputs_y * outputs_x) + output[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=wanted[None, :] & (j < patch_x)[:, None])


@triton.jit
def _weigh(
    grad,
    maps,
    out,
    grad_n,
    grad_i,
    grad_j,
    grad_y,
    grad_x,
    maps_n,
    maps_c,
    maps_y,
    maps_x,
    channels,
    height,
    width,
    outputs_y,
    outputs_x,
    patch_y,
    patch_x,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    blocks,
    OF_QUERY: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (blocks of pixels * blocks of channels * N); maps: the key for the gradient of the query, or the reverse."""
    parts = (channels + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    pixel = (program % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (program // blocks % parts) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (program // blocks // parts).to(tl.int64)
    y, x = (pixel // width).to(tl.int64), (pixel % width).to(tl.int64)
    exists = pixel < height * width
    own_channels = c < channels
    channel_maps = maps + n * maps_n + c.to(tl.int64)[:, None] * maps_c
    sums = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for i in range(patch_y):
        down = tl.cast(i - (patch_y - 1) // 2, tl.int64) * dilation_y
        row = y + down if OF_QUERY else y - down
        at_y = (y if OF_QUERY else row) + padding_y  # of the query's pixel; that of output at_y / stride
        in_rows = exists & _inside(row, height) & (at_y % stride_y == 0) & (at_y // stride_y < outputs_y)
        for j in range(patch_x):
            across = tl.cast(j - (patch_x - 1) // 2, tl.int64) * dilation_x
            column = x + across if OF_QUERY else x - across
            at_x = (x if OF_QUERY else column) + padding_x
            inside = (
                in_rows & _inside(column, width) & (at_x % stride_x == 0) & (at_x // stride_x < outputs_x)
            )
            position = tl.cast(i, tl.int64) * grad_i + tl.cast(j, tl.int64) * grad_j
            output = (at_y // stride_y) * grad_y + (at_x // stride_x) * grad_x
            weight = tl.load(grad + n * grad_n + position + output, mask=inside, other=0.0).to(tl.float32)
            places = channel_maps + (row * maps_y + column * maps_x)[None, :]
            there = tl.load(places, mask=inside[None, :] & own_channels[:, None], other=0.0)
            sums += weight[None, :] * there.to(tl.float32)
    plane = n * channels + c
    to = out + plane[:, None] * (height * width) + pixel[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=exists[None, :] & own_channels[:, None])


def local_correlation(
    query: Tensor,
    key: Tensor,
    patch_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation_patch: Sequence[int],
) -> Tensor:
    """query[u] . key[u + d] for each displacement d: (N,PH,PW,oH,oW) of two (N,C,H,W) of one dtype."""
    _check("query", query)
    batch, channels, height, width = query.shape
    outputs = _outputs(query, stride, padding)
    out = query.new_empty((batch, *patch_size, *outputs))
    if out.numel() == 0:
        return out
    blocks = triton.cdiv(outputs[0] * outputs[1], BLOCK_P)
    programs = blocks * triton.cdiv(patch_size[1], BLOCK_J) * patch_size[0] * batch
    options = (*outputs, *patch_size, *stride, *padding, *dilation_patch)
    with launch_on(query):
        _correlate[_grid("query", outputs[0] * outputs[1], query, programs)](
            *(query, key, out, *query.stride(), *key.stride(), channels, height, width, *options, blocks),
            BLOCK_P=BLOCK_P,
            BLOCK_J=BLOCK_J,
            **compile_options(4),
        )
    return out


def local_correlation_query(
    grad: Tensor,
    key: Tensor,
    patch_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation_patch: Sequence[int],
) -> Tensor:
    """Return the gradient of the query, (N,C,H,W) as key, for that of the correlation."""
    return _gradient(grad, key, patch_size, stride, padding, dilation_patch, of_query=True)


def local_correlation_key(
    grad: Tensor,
    query: Tensor,
    patch_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation_patch: Sequence[int],
) -> Tensor:
    """Return the gradient of the key, (N,C,H,W) as query, for that of the correlation."""
    return _gradient(grad, query, patch_size, stride, padding, dilation_patch, of_query=False)


def _gradient(
    grad: Tensor,
    maps: Tensor,
    patch_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation_patch: Sequence[int],
    *,
    of_query: bool,
) -> Tensor:
    name = "key" if of_query else "query"
    _check(name, maps)
    if grad.dtype != maps.dtype:
        raise TypeError(f"grad must have the dtype of {name} ({maps.dtype}), got {grad.dtype}")
    batch, channels, height, width = maps.shape
    out = torch.empty_like(maps, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    block_c = min(MOST_BLOCK_C, power_of_two(channels))
    blocks = triton.cdiv(height * width, BLOCK_P)
    outputs = _outputs(maps, stride, padding)
    options = (*outputs, *patch_size, *stride, *padding, *dilation_patch)
    grid = _grid(name, height * width, maps, blocks * triton.cdiv(channels, block_c) * batch)
    with launch_on(maps):
        _weigh[grid](
            *(grad, maps, out, *grad.stride(), *maps.stride(), channels, height, width, *options, blocks),
            OF_QUERY=of_query,
            BLOCK_P=BLOCK_P,
            BLOCK_C=block_c,
            **compile_options(4),
        )
    return out


def _outputs(maps: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[int, int]:
    y, x = ((size + 2 * p - 1) // s + 1 for size, p, s in zip(maps.shape[2:], padding, stride, strict=True))
    return y, x


def _check(name: str, maps: Tensor) -> None:
    if maps.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"{name} must be float32, float16 or bfloat16 for the Triton kernels, got {maps.dtype}"
        )


def _grid(name: str, pixels: int, maps: Tensor, programs: int) -> tuple[int]:
    if pixels >= MAX_PIXELS or programs >= 2 * MAX_PIXELS:
        raise ValueError(f"{name} must have fewer than 2**30 pixels, got shape {tuple(maps.shape)}")
    return (programs,)
