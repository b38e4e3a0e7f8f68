"""The line convolutions of a global convolution as implicit matrix products: channels and taps times pixels.

Maps are read as rows of channels, a row per pixel, weights as a row per output channel and tap: channels_last memory in
place, anything else after one copy. ``_convolve``: a program owns 128 output channels of one line (split) or of the sum
of both (merge) and 128 pixels, and walks the taps and 64 channels at a time: a tap is the same rows of pixels further
on, masked at the image's edge. Both first convolutions run in one launch and meet in the second-level cache. Where
tiles do not fill the device, the walk is cut into parts, whose sums ``_sum`` adds in their order: the same result on
every run. 4096 channels of 15 x 27 pixels, k = 7, 2 x 256 outputs: 4 x 4 tiles x 8 parts, 12.6 Gflop; bound by the
tensor cores and by that cache, since a tap reads x anew (the CUDA C++ kernel does not). ``_weight_gradient``: 128
output channels x 128 channels of one tap, over all pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vosops.triton._common import PRECISIONS, Target, dot, launch_on, product_precision, target_of
from vosops.triton.memory_scores import ALIGNMENT, block_of, check_dtype, options_of, splits_for

SUM_BLOCK = 512
"""Entries of a program of ``_sum``."""

MAX_PARTS = 32
MAX_ENTRIES = 2**30
"""Pixels of all maps, and channels: 32-bit in the kernels."""

TILES = {"half": (128, 128, 64), "tf32": (128, 128, 32), "tf32x3": (64, 64, 32), "ieee": (64, 64, 16)}
"""The sides of a tile of sums and the depth of a step, by the kind of product."""


@triton.jit
def shifted_rows(data, p, P, dy, dx, n_stride, y_stride, x_stride, H, W):
    """Pointers (rows, 1) to the pixels p of all maps, shifted by (dy, dx), and which of them exist."""
    n = p // (H * W)
    y = p // W % H + dy
    x = p % W + dx
    inside = (p < P) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    offset = n.to(tl.int64) * n_stride + y.to(tl.int64) * y_stride + x.to(tl.int64) * x_stride
    return (data + offset)[:, None], inside[:, None]


@triton.jit
def bias_of(first_bias, second_bias, channel, first_channels, channels):
    """Return the bias of output channels, from one of two vectors that may be None."""
    bias = tl.zeros_like(channel).to(tl.float32)
    if first_bias is not None:
        bias += tl.load(first_bias + channel, mask=channel < first_channels, other=0.0).to(tl.float32)
    if second_bias is not None:
        mask = (channel >= first_channels) & (channel < channels)
        bias += tl.load(second_bias + channel - first_channels, mask=mask, other=0.0).to(tl.float32)
    return bias


@triton.jit
def _convolve(
    x,
    first,
    second,
    first_bias,
    second_bias,
    addend,
    out,
    x_n,
    x_y,
    x_x,
    first_m,
    first_t,
    second_m,
    second_t,
    addend_n,
    addend_c,
    addend_p,
    out_n,
    out_c,
    out_p,
    part_stride,
    P,
    H,
    W,
    first_rows,
    second_rows,
    first_channels,
    second_channels,
    first_taps,
    second_taps,
    first_tiles,
    row_tiles,
    pixel_tiles,
    parts,
    MERGE: tl.constexpr,
    FIRST_VERTICAL: tl.constexpr,
    SECOND_VERTICAL: tl.constexpr,
    FINAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (row tiles * pixel tiles * parts). Unless FINAL, ``out`` receives the sums of each part."""
    tile = tl.program_id(0) % row_tiles
    pixel_tile = tl.program_id(0) // row_tiles % pixel_tiles
    part = tl.program_id(0) // row_tiles // pixel_tiles
    p = pixel_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    first_blocks = tl.cdiv(first_channels, BLOCK_C)
    second_blocks = tl.cdiv(second_channels, BLOCK_C)
    if MERGE:
        in_second = tile < 0
        steps_of_first = first_taps * first_blocks
        steps = steps_of_first + second_taps * second_blocks
    else:
        in_second = tile >= first_tiles
        steps_of_first = 0
        steps = tl.where(in_second, second_taps * second_blocks, first_taps * first_blocks)
    row = (tile - tl.where(in_second, first_tiles, 0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.where(in_second, second_rows, first_rows)

    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for step in range(steps * part // parts, steps * (part + 1) // parts):
        if MERGE:
            on_second = step >= steps_of_first
        else:
            on_second = in_second
        channels = tl.where(on_second, second_channels, first_channels)
        blocks = tl.where(on_second, second_blocks, first_blocks)
        taps = tl.where(on_second, second_taps, first_taps)
        if MERGE:
            at = step - tl.where(on_second, steps_of_first, 0)
            channel_of_x = tl.where(on_second, first_channels, 0)
        else:
            at = step
            channel_of_x = 0
        tap = at // blocks
        c = at % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        weight = tl.where(on_second, second, first)
        offset = row.to(tl.int64) * tl.where(on_second, second_m, first_m)
        offset += tap.to(tl.int64) * tl.where(on_second, second_t, first_t)
        mask = (row < rows)[:, None] & (c < channels)[None, :]
        weights = tl.load(weight + offset[:, None] + c[None, :], mask=mask, other=0.0)
        shift = tap - taps // 2
        vertical = tl.where(on_second, SECOND_VERTICAL, FIRST_VERTICAL)
        dy = tl.where(vertical, shift, 0)
        pixels, inside = shifted_rows(x, p, P, dy, shift - dy, x_n, x_y, x_x, H, W)
        values = tl.load(
            pixels + (channel_of_x + c)[None, :], mask=inside & (c < channels)[None, :], other=0.0
        )
        acc = dot(weights, tl.trans(values), acc, PRECISION)

    channel = row + tl.where(in_second, first_rows, 0)
    n = (p // (H * W)).to(tl.int64)
    pixel = (p % (H * W)).to(tl.int64)
    wide = channel.to(tl.int64)[:, None]
    written = (row < rows)[:, None] & (p < P)[None, :]
    if FINAL:
        end = first_rows if MERGE else first_rows + second_rows
        acc += bias_of(first_bias, second_bias, channel, first_rows, end)[:, None]
        if addend is not None:
            pointers = addend + wide * addend_c + (n * addend_n + pixel * addend_p)[None, :]
            acc += tl.load(pointers, mask=written, other=0.0).to(tl.float32)
    pointers = out + part.to(tl.int64) * part_stride + wide * out_c + (n * out_n + pixel * out_p)[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=written)


@triton.jit
def _sum(
    parts_of_out,
    first_bias,
    second_bias,
    addend,
    out,
    addend_n,
    addend_c,
    addend_p,
    out_n,
    out_c,
    out_p,
    count,
    parts,
    first_rows,
    channels,
    pixels,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of entries): the parts (parts, count), each laid out as ``out``, and what is added to their sum."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros((BLOCK,), tl.float32)
    of_part = parts_of_out + at
    for _ in range(parts):
        total += tl.load(of_part, mask=inside, other=0.0)
        of_part += count
    channel = at // out_c % channels
    total += bias_of(first_bias, second_bias, channel, first_rows, channels)
    if addend is not None:
        place = at // out_n * addend_n + channel * addend_c + at // out_p % pixels * addend_p
        total += tl.load(addend + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight_gradient(
    x,
    grad,
    out,
    x_n,
    x_y,
    x_x,
    grad_n,
    grad_y,
    grad_x,
    part_stride,
    P,
    H,
    W,
    rows,
    channels,
    taps,
    row_tiles,
    channel_tiles,
    parts,
    VERTICAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (taps * row tiles * channel tiles * parts); out (parts, rows, channels, taps)."""
    tap = tl.program_id(0) % taps
    row_tile = tl.program_id(0) // taps % row_tiles
    channel_tile = tl.program_id(0) // taps // row_tiles % channel_tiles
    part = tl.program_id(0) // taps // row_tiles // channel_tiles
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    c = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    shift = tap - taps // 2
    dy = shift if VERTICAL else 0
    dx = 0 if VERTICAL else shift
    steps = tl.cdiv(P, BLOCK_P)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in range(steps * part // parts, steps * (part + 1) // parts):
        p = step * BLOCK_P + tl.arange(0, BLOCK_P)
        pixels, inside = shifted_rows(grad, p, P, 0, 0, grad_n, grad_y, grad_x, H, W)
        g = tl.load(pixels + row[None, :], mask=inside & (row < rows)[None, :], other=0.0)
        pixels, inside = shifted_rows(x, p, P, dy, dx, x_n, x_y, x_x, H, W)
        values = tl.load(pixels + c[None, :], mask=inside & (c < channels)[None, :], other=0.0)
        acc = dot(tl.trans(g), values, acc, PRECISION)
    at = (row.to(tl.int64)[:, None] * channels + c[None, :]) * taps + tap
    pointers = out + part.to(tl.int64) * part_stride + at
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (c < channels)[None, :])


def global_conv_split(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
    addend: Tensor | None,
    precision: str,
) -> Tensor:
    """Two line convolutions of one x (N,C,H,W) side by side -> (N,M1+M2,H,W)."""
    return _convolution(x, (first, second), (first_bias, second_bias), addend, precision, merge=False)


def global_conv_merge(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, precision: str
) -> Tensor:
    """Return the sum of a line convolution of x's first channels and one of its others -> (N,M,H,W)."""
    return _convolution(x, (first, second), (bias, None), None, precision, merge=True)


def global_conv_weight(x: Tensor, grad: Tensor, kernel_h: int, kernel_w: int, precision: str) -> Tensor:
    """Return the gradient (M,C,kernel_h,kernel_w) of a line convolution's weight."""
    _check(precision, x=x, grad=grad)
    rows, channels, taps = grad.shape[1], x.shape[1], kernel_h * kernel_w
    out = x.new_empty((rows, channels, kernel_h, kernel_w))
    if out.numel() == 0:
        return out
    if x.numel() == 0:
        return out.zero_()
    height, width = x.shape[2:]
    maps = [_channels_innermost(t) for t in (x, grad)]
    plan = gradient_plan(
        (rows, channels, taps), x.shape[0] * height * width, x.dtype, precision, target_of(x)
    )
    strides = [t.stride(dim) for t in maps for dim in (0, 2, 3)]

    def launch(sums: Tensor, parts: int) -> None:
        _weight_gradient[(plan.programs * parts,)](
            *(*maps, sums, *strides, out.numel(), plan.pixels, height, width, rows, channels, taps),
            *(*plan.tiles, parts),
            VERTICAL=kernel_w == 1,
            **plan.constants,
            **plan.options,
        )

    return _over_parts(plan, out, launch, None, (None, None), rows)


@dataclass(frozen=True)
class Plan:
    """How a product is cut: tiles along its sides, parts of its depth, constants and compiler options."""

    tiles: tuple[int, ...]
    programs: int
    parts: int
    pixels: int
    constants: dict[str, Any]
    options: dict[str, int]


def _plan_parts(programs: int, steps: int, target: Target) -> int:
    return min(MAX_PARTS, splits_for(programs, steps, target))


def _kind(dtype: torch.dtype, precision: str) -> str:
    return precision if dtype == torch.float32 else "half"


def _options(kind: str) -> dict[str, int]:
    return options_of(8 if kind in ("half", "tf32") else 4, 2 if kind == "ieee" else 3)


def plan_of(
    rows: tuple[int, int],
    channels: tuple[int, int],
    taps: tuple[int, int],
    pixels: int,
    dtype: torch.dtype,
    precision: str,
    target: Target,
    *,
    merge: bool,
) -> Plan:
    """Return the launch of a split or a merge, with the tiles of the first line, of all rows, and of the pixels."""
    precision = product_precision(precision, target)
    kind = _kind(dtype, precision)
    most_rows, most_pixels, depth = TILES[kind]
    block_m, block_p = block_of(max(rows), most_rows), block_of(pixels, most_pixels)
    block_c = block_of(max(channels), depth)
    first_tiles = triton.cdiv(rows[0], block_m)
    row_tiles = first_tiles if merge else first_tiles + triton.cdiv(rows[1], block_m)
    pixel_tiles = triton.cdiv(pixels, block_p)
    depths = [t * triton.cdiv(c, block_c) for t, c in zip(taps, channels, strict=True)]
    steps = sum(depths) if merge else max(depths)
    return Plan(
        (first_tiles, row_tiles, pixel_tiles),
        row_tiles * pixel_tiles,
        _plan_parts(row_tiles * pixel_tiles, steps, target),
        pixels,
        {"BLOCK_M": block_m, "BLOCK_P": block_p, "BLOCK_C": block_c, "PRECISION": precision},
        _options(kind),
    )


def gradient_plan(
    shape: tuple[int, int, int], pixels: int, dtype: torch.dtype, precision: str, target: Target
) -> Plan:
    """Return the launch of a weight gradient (rows, channels, taps); its tiles are those of rows and of channels."""
    precision = product_precision(precision, target)
    kind = _kind(dtype, precision)
    rows, channels, taps = shape
    most_rows, most_channels, depth = TILES[kind]
    block_m, block_c = block_of(rows, most_rows), block_of(channels, most_channels)
    block_p = block_of(pixels, depth)
    tiles = triton.cdiv(rows, block_m), triton.cdiv(channels, block_c)
    programs = taps * tiles[0] * tiles[1]
    return Plan(
        tiles,
        programs,
        _plan_parts(programs, triton.cdiv(pixels, block_p), target),
        pixels,
        {"BLOCK_M": block_m, "BLOCK_C": block_c, "BLOCK_P": block_p, "PRECISION": precision},
        _options(kind),
    )


def _convolution(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    addend: Tensor | None,
    precision: str,
    *,
    merge: bool,
) -> Tensor:
    first, second = weights
    _check(precision, x=x, first=first, second=second)
    batch, _, height, width = x.shape
    rows = first.shape[0], second.shape[0]
    last = x.stride(1) == 1 and not x.is_contiguous()
    out = torch.empty(
        (batch, rows[0] if merge else sum(rows), height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    if out.numel() == 0:
        return out
    channels = first.shape[1], second.shape[1]
    taps = first.shape[2] * first.shape[3], second.shape[2] * second.shape[3]
    plan = plan_of(
        rows, channels, taps, batch * height * width, x.dtype, precision, target_of(x), merge=merge
    )
    rows_of_x = _channels_innermost(x)
    lines = [_channels_innermost(weight) for weight in weights]
    tap_dims = [3 if weight.shape[3] > 1 else 2 for weight in weights]
    line_strides = [
        s for line, dim in zip(lines, tap_dims, strict=True) for s in (line.stride(0), line.stride(dim))
    ]
    added = None if addend is None else addend.flatten(2)
    added_strides = (0, 0, 0)
    if added is not None:
        added_strides = (0 if added.shape[0] == 1 else added.stride(0), added.stride(1), added.stride(2))
    vectors = tuple(None if bias is None else bias.contiguous() for bias in biases)
    out_strides = _flat_strides(out)

    def launch(sums: Tensor, parts: int) -> None:
        x_strides = (rows_of_x.stride(dim) for dim in (0, 2, 3))
        _convolve[(plan.programs * parts,)](
            *(
                rows_of_x,
                *lines,
                *vectors,
                added,
                sums,
                *x_strides,
                *line_strides,
                *added_strides,
                *out_strides,
            ),
            *(out.numel(), plan.pixels, height, width, *rows, *channels, *taps, *plan.tiles, parts),
            MERGE=merge,
            FIRST_VERTICAL=first.shape[3] == 1,
            SECOND_VERTICAL=second.shape[3] == 1,
            FINAL=parts == 1,
            **plan.constants,
            **plan.options,
        )

    return _over_parts(plan, out, launch, (added, added_strides), vectors, rows[0])


def _over_parts(
    plan: Plan,
    out: Tensor,
    launch: Callable[[Tensor, int], None],
    addend: tuple[Tensor | None, tuple[int, ...]] | None,
    biases: tuple[Tensor | None, ...],
    first_rows: int,
) -> Tensor:
    """Launch into ``out``, or into parts whose sums and addends become it."""
    with launch_on(out):
        if plan.parts == 1:
            launch(out, 1)
            return out
        sums = torch.empty((plan.parts, out.numel()), dtype=torch.float32, device=out.device)
        launch(sums, plan.parts)
        added, strides = addend or (None, (0, 0, 0))
        _sum[(triton.cdiv(out.numel(), SUM_BLOCK),)](
            *(sums, *biases, added, out, *strides, *_flat_strides(out), out.numel(), plan.parts, first_rows),
            *(out.shape[1], out.shape[2] * out.shape[3]),
            BLOCK=SUM_BLOCK,
            **options_of(4, 2),
        )
    return out


def _flat_strides(dense: Tensor) -> tuple[int, int, int]:
    """Return the strides of a dense map's batch elements, channels and pixels in either memory format."""
    channels, pixels = dense.shape[1], dense.shape[2] * dense.shape[3]
    if dense.is_contiguous():
        return channels * pixels, pixels, 1
    return channels * pixels, 1, channels


def _check(precision: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        check_dtype(name, tensor)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    x = tensors["x"]
    if x.shape[0] * x.shape[2] * x.shape[3] >= MAX_ENTRIES or x.shape[1] >= MAX_ENTRIES:
        raise ValueError(
            f"x must have fewer than 2**30 pixels and channels for the Triton kernels, got {tuple(x.shape)}"
        )


def _channels_innermost(tensor: Tensor) -> Tensor:
    """Return a map or a weight as it is where rows of channels can be read 16 bytes at a time, else a copy that is so.

    The copy's rows are filled up with zeros to a multiple of ALIGNMENT: it has as many channels or more.
    """
    others = [tensor.stride(dim) for dim in (0, 2, 3) if tensor.shape[dim] > 1]
    if (
        tensor.stride(1) == 1
        and tensor.data_ptr() % ALIGNMENT == 0
        and all(stride % ALIGNMENT == 0 for stride in others)
    ):
        return tensor
    pixels_first = tensor.permute(0, 2, 3, 1)
    padded = torch.nn.functional.pad(pixels_first, (0, -tensor.shape[1] % ALIGNMENT))
    return padded.contiguous().permute(0, 3, 1, 2)
