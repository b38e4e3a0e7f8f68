"""Local matching: for each query pixel and object, the nearest key pixel in a window around it.

Two kernels. ``_pack`` copies both maps into tiles: TILE_H x 8 pixels whose padded channels are contiguous, so that the
second kernel reads whole tiles at full width whatever the strides of the input; with them the query's norms (infinite
where the query is not wanted), per object the key's norms (BIG where the key is not the object's), and per tile whether
any object needs it. Pixels are dealt out by their coordinates modulo the dilation first, which makes every window dense.

``_match``: a program owns one tile of queries, held in shared memory, and up to 8 object-radius pairs. It walks over the
key tiles of its window that an object needs, multiplies the two tiles (128x128x112 for a half-precision map of 100
channels), adds the terms that exclude pairs outside the window (rows and columns separately: both are shared by many
pairs) and keeps the least score and its pixel per query and pair. The winner's distance is then computed anew from the
two embeddings. At 120x214, radius 15, a program walks over 15 tiles of 29 KB: 83 MB in all from L2, 11 us at the dense
bfloat16 rate of an H100; the epilogue's four instructions per pair cost less than the products.
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
    channel_plan,
    check_embeddings,
    is_exact,
    launch_on,
    least,
    load_query,
    multiprocessors,
    pack_rows,
    power_of_two,
    row_offset,
    squared_distance,
    tile_dot,
    uses_tensor_cores,
)

TILE_W = 8
"""Width of a tile in pixels."""

MAX_SLOTS = 8
"""Object-radius pairs that one program serves, unless a single object has more radii."""

MAX_WINDOW_TILES = 4096
"""Windows of more tiles are walked in full instead of the part that objects need."""

STAGES = 2
"""Key tiles in shared memory, that in use included."""

PACK_CHANNELS = 32
"""Channels that the packing kernel moves at a time."""


@dataclass(frozen=True)
class LaunchPlan:
    """Grid, warps and compile-time arguments of ``_match``."""

    tile_h: int
    tiles_y: int
    tiles_x: int
    tiles: int
    groups: int
    warps: int
    constants: dict[str, Any]


def launch_plan(
    shape: Sequence[int],
    objects: int,
    radius: Sequence[int],
    dilation: int,
    dtype: torch.dtype,
    precision: str,
    processors: int,
) -> LaunchPlan:
    """Choose 128 queries a program where they fit and keep the device busy, else 64."""
    batch, channels, height, width = shape
    tensor_cores = uses_tensor_cores(dtype, precision)
    groups = -(-objects // max(1, MAX_SLOTS // len(radius)))
    group = -(-objects // groups)
    phase_height, phase_width = -(-height // dilation), -(-width // dilation)
    tiles_x = -(-phase_width // TILE_W)
    for tile_h in (16, 8):
        plan = channel_plan(channels, tile_h * TILE_W, dtype.itemsize, STAGES, tensor_cores=tensor_cores)
        tiles_y = -(-phase_height // tile_h)
        tiles = dilation * dilation * tiles_y * tiles_x
        if plan.block == 0 and tiles * batch * groups >= processors:
            break
    reach = radius[-1] // dilation
    window_y = power_of_two(min(tiles_y, 2 * -(-reach // tile_h) + 1))
    window_x = power_of_two(min(tiles_x, 2 * -(-reach // TILE_W) + 1))
    if window_y * window_x > MAX_WINDOW_TILES:
        window_y = window_x = 0
    constants = {
        "RADII": tuple(radius),
        "DILATION": dilation,
        "GROUP": group,
        "SLOTS": power_of_two(group * len(radius)),
        "WINDOW_Y": window_y,
        "WINDOW_X": window_x,
        "TILE_H": tile_h,
        "TILE_W": TILE_W,
        **plan.constants,
        "PRECISION": precision,
        "EXACT": is_exact(dtype, precision),
        "STAGES": STAGES,
    }
    return LaunchPlan(tile_h, tiles_y, tiles_x, tiles, groups, tile_h // 2, constants)


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
    tiles_y,
    tiles_x,
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
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_QUERY_MASK: tl.constexpr,
):
    """Grid (tiles, N, 2): the query's tile and the key's."""
    ROWS: tl.constexpr = TILE_H * TILE_W
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    phase = tile // (tiles_y * tiles_x)
    row = tl.arange(0, ROWS)
    y = ((tile // tiles_x % tiles_y) * TILE_H + row // TILE_W) * DILATION + phase // DILATION
    x = ((tile % tiles_x) * TILE_W + row % TILE_W) * DILATION + phase % DILATION
    inside = (y < H) & (x < W)
    y = y.to(tl.int64)
    x = x.to(tl.int64)
    tiles = tl.num_programs(0)
    packed_row = (n * tiles + tile) * ROWS + row
    if tl.program_id(2) == 0:
        norm = pack_rows(
            query + n * query_n,
            y * query_h + x * query_w,
            inside,
            query_c,
            packed_query + packed_row[:, None] * CHANNELS,
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
            C,
            CHANNELS,
            BLOCK_C,
        )
        matchable = inside & (norm < NORM_LIMIT)
        any_object = tl.zeros((ROWS,), tl.int32)
        object_mask = mask + n * mask_n + y * mask_h + x * mask_w
        object_bias = bias + (n * objects * tiles + tile) * ROWS + row
        for _ in range(objects):
            member = matchable & (tl.load(object_mask, mask=inside, other=0) != 0)
            tl.store(object_bias, tl.where(member, norm, BIG))
            any_object |= member.to(tl.int32)
            object_mask += mask_o
            object_bias += tiles * ROWS
        tl.store(needed + n * tiles + tile, tl.max(any_object, axis=0))


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
    tiles_y,
    tiles_x,
    RADII: tl.constexpr,
    DILATION: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    WINDOW_Y: tl.constexpr,
    WINDOW_X: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    CHANNELS: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (tiles, N, groups of GROUP objects). WINDOW_Y 0: do not look which tiles are needed."""
    ROWS: tl.constexpr = TILE_H * TILE_W
    RINGS: tl.constexpr = len(RADII)
    REACH: tl.constexpr = RADII[RINGS - 1] // DILATION
    REACH_Y: tl.constexpr = (REACH + TILE_H - 1) // TILE_H
    REACH_X: tl.constexpr = (REACH + TILE_W - 1) // TILE_W
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    first_object = tl.program_id(2) * GROUP
    tiles = tl.num_programs(0)
    phase = tile // (tiles_y * tiles_x)
    tile_y = tile // tiles_x % tiles_y
    tile_x = tile % tiles_x
    row = tl.arange(0, ROWS)
    row_y = row // TILE_W
    row_x = row % TILE_W

    query_row = (n * tiles + tile) * ROWS + row
    norm = tl.load(query_norm + query_row)
    query_rows = query + query_row[:, None] * CHANNELS
    q0, q1, q2 = load_query(query_rows, PART_0, PART_1, PART_2)
    offset = row_offset(norm, EXACT)

    first_y = tl.maximum(tile_y - REACH_Y, 0)
    last_y = tl.minimum(tile_y + REACH_Y, tiles_y - 1)
    first_x = tl.maximum(tile_x - REACH_X, 0)
    last_x = tl.minimum(tile_x + REACH_X, tiles_x - 1)
    if WINDOW_Y > 0:
        window_y = first_y + tl.arange(0, WINDOW_Y)
        window_x = first_x + tl.arange(0, WINDOW_X)
        flags = tl.load(
            needed + (n * tiles + phase * tiles_y * tiles_x) + window_y[:, None] * tiles_x + window_x[None, :],
            mask=(window_y <= last_y)[:, None] & (window_x <= last_x)[None, :],
            other=0,
        )
        needs_y = tl.max(flags, axis=1) > 0
        needs_x = tl.max(flags, axis=0) > 0
        first_y = tl.min(tl.where(needs_y, window_y, tiles_y), axis=0)
        last_y = tl.max(tl.where(needs_y, window_y, -1), axis=0)
        first_x = tl.min(tl.where(needs_x, window_x, tiles_x), axis=0)
        last_x = tl.max(tl.where(needs_x, window_x, -1), axis=0)
    columns = tl.maximum(last_x - first_x + 1, 0)
    steps = tl.maximum(last_y - first_y + 1, 0) * columns
    steps = tl.where(tl.min(norm, axis=0) < NORM_LIMIT, steps, 0)

    slot = tl.arange(0, SLOTS)[None, :]
    best = tl.full((ROWS, SLOTS), 0.5 * BIG, tl.float32)
    best_index = tl.full((ROWS, SLOTS), -1, tl.int32)
    for step in tl.range(0, steps, num_stages=STAGES):
        key_y = first_y + step // columns
        key_x = first_x + step % columns
        key_tile = (phase * tiles_y + key_y) * tiles_x + key_x
        first_row = (n * tiles + key_tile) * ROWS
        key_rows = key + first_row * CHANNELS + (row * CHANNELS)[:, None]
        product = tile_dot(
            query_rows,
            key_rows,
            q0,
            q1,
            q2,
            PART_0,
            PART_1,
            PART_2,
            BLOCK_C,
            CHANNELS,
            ROWS,
            ROWS,
            PRECISION,
        )
        gap_y = tl.abs((key_y - tile_y) * TILE_H + row_y[None, :] - row_y[:, None])
        gap_x = tl.abs((key_x - tile_x) * TILE_W + row_x[None, :] - row_x[:, None])
        for ring in tl.static_range(RINGS):
            outside_y = tl.where(gap_y <= RADII[ring] // DILATION, offset[:, None], BIG)
            outside_x = tl.where(gap_x <= RADII[ring] // DILATION, 0.0, BIG)
            for member in tl.static_range(GROUP):
                o = tl.minimum(first_object + member, objects - 1)
                key_bias = tl.load(bias + ((n * objects + o) * tiles + key_tile) * ROWS + row)
                score = (key_bias[None, :] - 2.0 * product) + outside_y + outside_x
                value, column = least(score, ROWS, EXACT)
                y = (key_y * TILE_H + column // TILE_W) * DILATION + phase // DILATION
                x = (key_x * TILE_W + column % TILE_W) * DILATION + phase % DILATION
                value = value[:, None]
                pixel = (y * W + x)[:, None]
                better = (value < best) | ((value == best) & (pixel < best_index))
                better = better & (slot == member * RINGS + ring)
                best = tl.where(better, value, best)
                best_index = tl.where(better, pixel, best_index)

    query_y = (tile_y * TILE_H + row_y) * DILATION + phase // DILATION
    query_x = (tile_x * TILE_W + row_x) * DILATION + phase % DILATION
    inside = (query_y < H) & (query_x < W)
    for member in tl.static_range(GROUP):
        nearest = tl.full((ROWS,), float("inf"), tl.float32)
        nearest_index = tl.full((ROWS,), -1, tl.int32)
        for ring in tl.static_range(RINGS):
            winner = tl.max(tl.where(slot == member * RINGS + ring, best_index, -1), axis=1)
            found = (winner >= 0) & (norm < NORM_LIMIT)
            y = winner // W // DILATION
            x = winner % W // DILATION
            key_tile = (phase * tiles_y + y // TILE_H) * tiles_x + x // TILE_W
            key_row = (n * tiles + key_tile) * ROWS + y % TILE_H * TILE_W + x % TILE_W
            value = squared_distance(
                query_rows, key + key_row[:, None] * CHANNELS, found, ROWS, CHANNELS, 32
            )
            nearer = found & (value < nearest)
            nearest = tl.where(nearer, value, nearest)
            nearest_index = tl.where(nearer, winner, nearest_index)
            o = first_object + member
            out = ((n * objects + o) * RINGS + ring) * H * W + query_y * W + query_x
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
    channels, and 4 bytes per object and pixel. "tf32" truncates the operands in choosing the key, never in its distance.
    """
    check_embeddings(query, key, precision)
    batch, channels, height, width = query.shape
    objects, rings = mask.shape[1], len(radius)
    shape = (batch, objects, rings, height, width)
    distance = query.new_empty(shape, dtype=torch.float32)
    index = query.new_empty(shape, dtype=torch.int64)
    if distance.numel() == 0:
        return distance, index

    launch = launch_plan(query.shape, objects, radius, dilation, query.dtype, precision, multiprocessors(query))
    tiles_y, tiles_x, tiles = launch.tiles_y, launch.tiles_x, launch.tiles
    rows = launch.tile_h * TILE_W
    padded = launch.constants["CHANNELS"]
    packed_query = query.new_empty((batch, tiles * rows, padded))
    packed_key = torch.empty_like(packed_query)
    query_norm = query.new_empty((batch, tiles * rows), dtype=torch.float32)
    bias = query.new_empty((batch, objects, tiles * rows), dtype=torch.float32)
    needed = query.new_empty((batch, tiles), dtype=torch.int32)
    mask_bytes = mask.view(torch.uint8)
    wanted = mask_bytes if query_mask is None else query_mask.view(torch.uint8)
    wanted_strides = (0, 0, 0) if query_mask is None else query_mask.stride()
    with launch_on(query):
        _pack[(tiles, batch, 2)](
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
            tiles_y,
            tiles_x,
            *query.stride(),
            *key.stride(),
            *mask.stride(),
            *wanted_strides,
            DILATION=dilation,
            TILE_H=launch.tile_h,
            TILE_W=TILE_W,
            CHANNELS=padded,
            BLOCK_C=PACK_CHANNELS,
            HAS_QUERY_MASK=query_mask is not None,
            num_warps=4,
        )
        _match[(tiles, batch, launch.groups)](
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
            tiles_y,
            tiles_x,
            **launch.constants,
            num_warps=launch.warps,
        )
    return distance, index
