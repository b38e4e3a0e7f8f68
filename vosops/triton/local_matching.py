"""Local matching: for each query pixel and object, the nearest key pixel in a window around it.

Two kernels. ``_pack`` copies both maps into strips of 8 columns: row by row, the 8 pixels of a row beside each other,
the padded channels of a pixel contiguous. Any 8 x h block of a strip is then one contiguous piece of memory, read at
full width whatever the strides of the input. With them it writes the query's norms (infinite where the query is not
wanted), per object the key's norms (BIG where the key is not the object's), and per 8 x 8 block whether any object
needs it. Pixels are dealt out by their coordinates modulo the dilation first, which makes every window dense.

``_match``: a program owns 8 x 16 queries, held in shared memory, and up to 8 object-radius pairs. It walks over the
8 x 8 key blocks of its window that an object needs, multiplies the two tiles (128 x 64 x 128 for half precision and 100
channels), adds the terms that exclude pairs outside the window (for rows and columns separately: each is shared by many
pairs) and keeps the least score and its pixel per query and pair. The winner's distance is then computed anew from the
two embeddings. At 120x214, radius 15, that is at most 30 blocks a program, 5418 in all: 78 MB from L2 and 12 us at the
dense half-precision rate of an H100; the epilogue's five instructions per pair run beside it in the other program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vosops.triton._common import (
    BIG,
    NORM_LIMIT,
    Tiling,
    check_inputs,
    compile_options,
    is_exact,
    launch_on,
    least,
    load_rows,
    pack_rows,
    power_of_two,
    product_precision,
    row_offset,
    squared_distance,
    target_of,
    tile_dot,
    tilings,
)

STRIP = 8
"""Columns of a strip, and rows and columns of a block that the packing kernel copies."""

MAX_SLOTS = 8
"""Object-radius pairs that one program serves, unless a single object has more radii."""

MAX_WINDOW_BLOCKS = 4096
"""Windows of more blocks are walked in full instead of the part that objects need."""

PACK_CHANNELS = 64
"""Channels that the packing kernel moves at a time."""


@dataclass(frozen=True)
class LaunchPlan:
    """Grid, warps and compile-time arguments of ``_match``."""

    strips: int
    strip_height: int
    tiles: int
    groups: int
    options: dict[str, int]
    constants: dict[str, Any]


def launch_plan(
    shape: Sequence[int],
    objects: int,
    radius: Sequence[int],
    dilation: int,
    candidates: Sequence[Tiling],
    precision: str,
    *,
    exact: bool,
    processors: int,
) -> LaunchPlan:
    """Take the first tiling that keeps the device busy; for nested radii the smallest, which leaves most registers."""
    batch, _, height, width = shape
    groups = -(-objects // max(1, MAX_SLOTS // len(radius)))
    group = -(-objects // groups)
    phases = dilation * dilation
    phase_height = -(-height // dilation)
    strips = -(-width // dilation // STRIP)
    for tiling in candidates[-1:] if len(radius) > 1 else candidates[:-1] or candidates:
        tile_rows, key_rows = tiling.queries // STRIP, tiling.keys // STRIP
        tiles = phases * strips * -(-phase_height // tile_rows)
        if tiles * batch * groups >= processors:
            break
    strip_height = -(-(phase_height + key_rows - 1) // tile_rows) * tile_rows
    reach = radius[-1] // dilation
    window_y = power_of_two(min(strip_height // STRIP, (tile_rows + 2 * reach) // STRIP + 2))
    window_x = power_of_two(min(strips, 2 * -(-reach // STRIP) + 1))
    if window_y * window_x > MAX_WINDOW_BLOCKS:
        window_y = window_x = 0
    constants = {
        "RADII": tuple(radius),
        "DILATION": dilation,
        "GROUP": group,
        "SLOTS": power_of_two(group * len(radius)),
        "WINDOW_Y": window_y,
        "WINDOW_X": window_x,
        "STRIP": STRIP,
        "BLOCK_Q": tiling.queries,
        "BLOCK_K": tiling.keys,
        "CHANNELS": tiling.channels,
        "BLOCK_C": tiling.block_c,
        "PRECISION": precision,
        "EXACT": exact,
    }
    return LaunchPlan(strips, strip_height, tiles, groups, tiling.options, constants)


@triton.jit
def _pack(
    query,
    key,
    mask,
    query_mask,
    packed_query,
    packed_key,
    query_norm,
    bias,
    needed,
    C,
    H,
    W,
    objects,
    strips,
    strip_height,
    query_n,
    query_c,
    query_h,
    query_w,
    key_n,
    key_c,
    key_h,
    key_w,
    mask_n,
    mask_o,
    mask_h,
    mask_w,
    query_mask_n,
    query_mask_h,
    query_mask_w,
    DILATION: tl.constexpr,
    STRIP: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_QUERY_MASK: tl.constexpr,
):
    """Grid (blocks of STRIP x STRIP pixels, N, 2): the query's block and the key's."""
    ROWS: tl.constexpr = STRIP * STRIP
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    n = tl.program_id(1).to(tl.int64)
    blocks_y = strip_height // STRIP
    strip = block // blocks_y % strips
    phase = block // blocks_y // strips
    row = tl.arange(0, ROWS)
    y = ((block % blocks_y) * STRIP + row // STRIP) * DILATION + phase // DILATION
    x = (strip * STRIP + row % STRIP) * DILATION + phase % DILATION
    inside = (y < H) & (x < W)
    y = y.to(tl.int64)
    x = x.to(tl.int64)
    packed_row = (n * blocks + block) * ROWS + row
    if tl.program_id(2) == 0:
        norm = pack_rows(
            query + n * query_n,
            y * query_h + x * query_w,
            inside,
            query_c,
            packed_query + packed_row[:, None] * CHANNELS,
            row >= 0,
            C,
            CHANNELS,
            BLOCK_C,
        )
        wanted = inside
        if HAS_QUERY_MASK:
            pointers = query_mask + n * query_mask_n + y * query_mask_h + x * query_mask_w
            wanted = inside & (tl.load(pointers, mask=inside, other=0) != 0)
        tl.store(query_norm + packed_row, tl.where(wanted, norm, float("inf")))
    else:
        norm = pack_rows(
            key + n * key_n,
            y * key_h + x * key_w,
            inside,
            key_c,
            packed_key + packed_row[:, None] * CHANNELS,
            row >= 0,
            C,
            CHANNELS,
            BLOCK_C,
        )
        matchable = inside & (norm < NORM_LIMIT)
        any_object = tl.zeros((ROWS,), tl.int32)
        object_mask = mask + n * mask_n + y * mask_h + x * mask_w
        object_bias = bias + (n * objects * blocks + block) * ROWS + row
        for _ in range(objects):
            member = matchable & (tl.load(object_mask, mask=inside, other=0) != 0)
            tl.store(object_bias, tl.where(member, norm, BIG))
            any_object |= member.to(tl.int32)
            object_mask += mask_o
            object_bias += blocks * ROWS
        tl.store(needed + n * blocks + block, tl.max(any_object, axis=0))


@triton.jit
def within(offset, reach: tl.constexpr):
    """Whether ``abs(offset) <= reach``, in one addition and one comparison."""
    return (offset + reach).to(tl.uint32, bitcast=True) <= 2 * reach


@triton.jit
def _match(
    query,
    key,
    query_norm,
    bias,
    needed,
    distance,
    index,
    H,
    W,
    objects,
    strips,
    strip_height,
    RADII: tl.constexpr,
    DILATION: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    WINDOW_Y: tl.constexpr,
    WINDOW_X: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid (query tiles, N, groups of GROUP objects). WINDOW_Y 0: do not look which blocks are needed.

    The middle rows of tiles, which have the most to do, come first. Coordinates are those of the phase, the pixels that
    share their coordinates modulo DILATION, up to the final conversion.
    """
    RINGS: tl.constexpr = len(RADII)
    REACH: tl.constexpr = RADII[RINGS - 1] // DILATION
    REACH_X: tl.constexpr = (REACH + STRIP - 1) // STRIP
    TILE_H: tl.constexpr = BLOCK_Q // STRIP
    STEP_H: tl.constexpr = BLOCK_K // STRIP
    n = tl.program_id(1).to(tl.int64)
    first_object = tl.program_id(2) * GROUP
    phase_height = (H + DILATION - 1) // DILATION
    tiles_y = (phase_height + TILE_H - 1) // TILE_H
    strip = tl.program_id(0) % strips
    phase = tl.program_id(0) // strips % (DILATION * DILATION)
    rank = tl.program_id(0) // strips // (DILATION * DILATION)
    tile_y = (tiles_y // 2 + tl.where(rank % 2 == 0, rank // 2, -(rank + 1) // 2)) * TILE_H
    phase_rows = DILATION * DILATION * strips * strip_height * STRIP
    phase_strip = phase * strips

    row = tl.arange(0, BLOCK_Q)
    query_y = tile_y + row // STRIP
    query_x = strip * STRIP + row % STRIP
    query_row = n * phase_rows + ((phase_strip + strip) * strip_height + tile_y) * STRIP + row
    query_rows = query + query_row[:, None] * CHANNELS
    query_tile = load_rows(query_rows, 0, CHANNELS, BLOCK_C)
    norm = tl.load(query_norm + query_row)
    norm_term = row_offset(norm, EXACT)

    first_y = tl.maximum(tile_y - REACH, 0)
    end_y = tl.minimum(tile_y + TILE_H + REACH, phase_height)
    first_strip = tl.maximum(strip - REACH_X, 0)
    last_strip = tl.minimum(strip + REACH_X, strips - 1)
    if WINDOW_Y > 0:
        block_y = first_y // STRIP + tl.arange(0, WINDOW_Y)
        block_strip = first_strip + tl.arange(0, WINDOW_X)
        blocks_y = strip_height // STRIP
        flags = tl.load(
            needed
            + n * DILATION * DILATION * strips * blocks_y
            + (phase_strip + block_strip)[:, None] * blocks_y
            + block_y[None, :],
            mask=(block_strip <= last_strip)[:, None] & (block_y * STRIP < end_y)[None, :],
            other=0,
        )
        needs_y = tl.max(flags, axis=0) > 0
        needs_strip = tl.max(flags, axis=1) > 0
        first_y = tl.maximum(first_y, tl.min(tl.where(needs_y, block_y * STRIP, end_y), axis=0))
        end_y = tl.minimum(end_y, tl.max(tl.where(needs_y, (block_y + 1) * STRIP, 0), axis=0))
        last_strip = tl.max(tl.where(needs_strip, block_strip, -1), axis=0)
        first_strip = tl.min(tl.where(needs_strip, block_strip, strips), axis=0)
    steps_y = (tl.maximum(end_y - first_y, 0) + STEP_H - 1) // STEP_H
    steps = steps_y * tl.maximum(last_strip - first_strip + 1, 0)
    steps = tl.where(tl.min(norm, axis=0) < NORM_LIMIT, steps, 0)

    slot = tl.arange(0, SLOTS)[None, :]
    best = tl.full((BLOCK_Q, SLOTS), 0.5 * BIG, tl.float32)
    best_index = tl.full((BLOCK_Q, SLOTS), -1, tl.int32)
    column = tl.arange(0, BLOCK_K)
    key_y = first_y
    key_strip = first_strip
    for _ in range(0, steps):
        first_row = ((phase_strip + key_strip) * strip_height + key_y) * STRIP
        key_rows = key + (n * phase_rows + first_row) * CHANNELS + (column * CHANNELS)[:, None]
        bias_rows = bias + n * objects * phase_rows + first_row + column
        key_bias = tl.load(bias_rows + first_object.to(tl.int64) * phase_rows)
        product = tile_dot(query_tile, query_rows, key_rows, CHANNELS, BLOCK_C, BLOCK_Q, BLOCK_K, PRECISION)
        offset_y = (key_y + column // STRIP)[None, :] - query_y[:, None]
        offset_x = (key_strip * STRIP + column % STRIP)[None, :] - query_x[:, None]
        for member in tl.static_range(GROUP):
            next_bias = key_bias
            if member + 1 < GROUP:
                o = tl.minimum(first_object + member + 1, objects - 1).to(tl.int64)
                next_bias = tl.load(bias_rows + o * phase_rows)
            for ring in tl.static_range(RINGS):
                outside_y = tl.where(within(offset_y, RADII[ring] // DILATION), norm_term[:, None], BIG)
                outside_x = tl.where(within(offset_x, RADII[ring] // DILATION), 0.0, BIG)
                score = ((key_bias[None, :] + outside_x) - 2.0 * product) + outside_y
                value, chosen = least(score, BLOCK_K, EXACT)
                y = (key_y + chosen // STRIP) * DILATION + phase // DILATION
                x = (key_strip * STRIP + chosen % STRIP) * DILATION + phase % DILATION
                value = value[:, None]
                pixel = (y * W + x)[:, None]
                better = (value < best) | ((value == best) & (pixel < best_index))
                better = better & (slot == member * RINGS + ring)
                best = tl.where(better, value, best)
                best_index = tl.where(better, pixel, best_index)
            key_bias = next_bias
        key_y += STEP_H
        key_strip = tl.where(key_y < end_y, key_strip, key_strip + 1)
        key_y = tl.where(key_y < end_y, key_y, first_y)

    out_y = query_y * DILATION + phase // DILATION
    out_x = query_x * DILATION + phase % DILATION
    inside = (out_y < H) & (out_x < W)
    for member in tl.static_range(GROUP):
        nearest = tl.full((BLOCK_Q,), float("inf"), tl.float32)
        nearest_index = tl.full((BLOCK_Q,), -1, tl.int32)
        for ring in tl.static_range(RINGS):
            winner = tl.max(tl.where(slot == member * RINGS + ring, best_index, -1), axis=1)
            found = (winner >= 0) & (norm < NORM_LIMIT)
            y = winner // W // DILATION
            x = winner % W // DILATION
            key_row = ((phase_strip + x // STRIP) * strip_height + y) * STRIP + x % STRIP
            key_rows = key + (n * phase_rows + key_row)[:, None] * CHANNELS
            value = squared_distance(query_rows, key_rows, found, BLOCK_Q, CHANNELS, 32)
            nearer = found & ((value < nearest) | ((value == nearest) & (winner < nearest_index)))
            nearest = tl.where(nearer, value, nearest)
            nearest_index = tl.where(nearer, winner, nearest_index)
            o = first_object + member
            out = ((n * objects + o) * RINGS + ring) * H * W + out_y * W + out_x
            if o < objects:
                tl.store(distance + out, tl.where(norm != norm, norm, nearest), mask=inside)
                tl.store(index + out, nearest_index.to(tl.int64), mask=inside)


def local_matching(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    radius: Sequence[int],
    dilation: int,
    query_mask: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Squared distance and flat index of the nearest key pixel of each object within each radius.

    Args:
        query: (N, C, H, W) float32, float16 or bfloat16, any strides.
        key: The same shape and dtype.
        mask: (N, O, H, W) bool: which key pixels belong to which object.
        radius: Ascending radii in pixels; offsets are the multiples of ``dilation`` up to them, in x and in y.
        dilation: Step of the offsets in pixels.
        query_mask: (N, H, W) bool: the query pixels wanted, or None for all.
        precision: "ieee", "tf32" or "tf32x3": products of float32.

    Returns:
        distance (N, O, R, H, W) float32, +inf where there is no such pixel, and index (N, O, R, H, W) int64, -1 there.
        A query pixel with a NaN has distance NaN and index -1; a key pixel with a NaN or an infinity never wins.

    Embeddings with a squared norm of 1e36 or more count as infinite. Memory: a copy of query and key with padded
    channels, and 4 bytes per object and pixel. "tf32" truncates the operands in choosing the key, never in its
    distance.
    """
    check_inputs(query, key, mask, precision)
    batch, channels, height, width = query.shape
    objects, rings = mask.shape[1], len(radius)
    shape = (batch, objects, rings, height, width)
    distance = query.new_empty(shape, dtype=torch.float32)
    index = query.new_empty(shape, dtype=torch.int64)
    if distance.numel() == 0:
        return distance, index

    target = target_of(query)
    precision = product_precision(precision, target)
    launch = launch_plan(
        query.shape,
        objects,
        radius,
        dilation,
        tilings(channels, query.dtype, precision, target),
        precision,
        exact=is_exact(query.dtype, precision),
        processors=target.processors,
    )
    rows = dilation * dilation * launch.strips * launch.strip_height * STRIP
    packed_query = query.new_empty((batch, rows, launch.constants["CHANNELS"]))
    packed_key = torch.empty_like(packed_query)
    query_norm = query.new_empty((batch, rows), dtype=torch.float32)
    bias = query.new_empty((batch, objects, rows), dtype=torch.float32)
    needed = query.new_empty((batch, rows // STRIP**2), dtype=torch.int32)
    mask_bytes = mask.view(torch.uint8)
    wanted = mask_bytes if query_mask is None else query_mask.view(torch.uint8)
    wanted_strides = (0, 0, 0) if query_mask is None else query_mask.stride()
    with launch_on(query):
        _pack[(needed.shape[1], batch, 2)](
            query,
            key,
            mask_bytes,
            wanted,
            packed_query,
            packed_key,
            query_norm,
            bias,
            needed,
            channels,
            height,
            width,
            objects,
            launch.strips,
            launch.strip_height,
            *query.stride(),
            *key.stride(),
            *mask.stride(),
            *wanted_strides,
            DILATION=dilation,
            STRIP=STRIP,
            CHANNELS=launch.constants["CHANNELS"],
            BLOCK_C=min(PACK_CHANNELS, power_of_two(channels)),
            HAS_QUERY_MASK=query_mask is not None,
            **compile_options(4),
        )
        _match[(launch.tiles, batch, launch.groups)](
            packed_query,
            packed_key,
            query_norm,
            bias,
            needed,
            distance,
            index,
            height,
            width,
            objects,
            launch.strips,
            launch.strip_height,
            **launch.constants,
            **launch.options,
        )
    return distance, index
