"""Global matching: for each query pixel and object, the nearest of all the object's reference pixels.

Four kernels. ``_pack`` copies query and key into rows of padded channels and writes their norms, and counts the pixels
of each object in each block of keys. ``_list_members`` writes, per object, the indices of its pixels in ascending
order, so that the inner loop has no mask and no work on other objects' pixels; the host never knows how many.
``_match``: a program owns 256 queries, held in shared memory, and a share of one object's list; it gathers 64 keys a
step, multiplies (256 x 64 x 128 for half precision and 100 channels) and keeps the least score per query. ``_merge``
takes the least of the shares and computes its distance anew from the two embeddings.

At 120x214 with 100 channels a step moves 14 KB from L2 for 1024 tensor-core cycles of an H100: 0.6 GB in all, and
0.2 ms at its dense half-precision rate.
"""

from __future__ import annotations

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

PACK_ROWS = 64
"""Pixels that a program packs or lists."""

PACK_CHANNELS = 64
"""Channels that the packing kernel moves at a time."""

SHARE = 4096
"""Keys per share of an object's list, unless that makes more than MAX_SHARES."""

MAX_SHARES = 16

MERGE_ROWS = 32
MERGE_CHANNELS = 32
"""Queries that a program merges, and channels that it compares at a time."""


@triton.jit
def _pack(
    query,
    key,
    mask,
    query_mask,
    packed_query,
    packed_key,
    query_norm,
    key_norm,
    counts,
    C,
    query_width,
    query_pixels,
    key_height,
    key_width,
    key_pixels,
    objects,
    query_blocks,
    key_blocks,
    query_n,
    query_c,
    query_h,
    query_w,
    key_n,
    key_c,
    key_t,
    key_h,
    key_w,
    mask_n,
    mask_o,
    mask_t,
    mask_h,
    mask_w,
    query_mask_n,
    query_mask_h,
    query_mask_w,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_QUERY_MASK: tl.constexpr,
    FLAT_QUERY: tl.constexpr,
    FLAT_KEY: tl.constexpr,
):
    """Grid (blocks of ROWS pixels, N): first the query's blocks, then the key's.

    FLAT: pixels lie at equal distances, so that the compiler sees which ones are neighbours in memory.
    """
    block = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    if block < query_blocks:
        pixel = block * ROWS + tl.arange(0, ROWS)
        inside = pixel < query_pixels
        y = (pixel // query_width).to(tl.int64)
        x = (pixel % query_width).to(tl.int64)
        row = n * query_pixels + pixel
        offset = pixel.to(tl.int64) * query_w if FLAT_QUERY else y * query_h + x * query_w
        norm = pack_rows(
            query + n * query_n,
            offset,
            inside,
            query_c,
            packed_query + row[:, None] * CHANNELS,
            inside,
            C,
            CHANNELS,
            BLOCK_C,
        )
        if HAS_QUERY_MASK:
            wanted = tl.load(
                query_mask + n * query_mask_n + y * query_mask_h + x * query_mask_w, mask=inside, other=0
            )
            norm = tl.where(wanted != 0, norm, float("inf"))
        tl.store(query_norm + row, norm, mask=inside)
    else:
        block -= query_blocks
        pixel = block * ROWS + tl.arange(0, ROWS)
        inside = pixel < key_pixels
        t = (pixel // key_width // key_height).to(tl.int64)
        y = (pixel // key_width % key_height).to(tl.int64)
        x = (pixel % key_width).to(tl.int64)
        row = n * key_pixels + pixel
        offset = pixel.to(tl.int64) * key_w if FLAT_KEY else t * key_t + y * key_h + x * key_w
        norm = pack_rows(
            key + n * key_n,
            offset,
            inside,
            key_c,
            packed_key + row[:, None] * CHANNELS,
            inside,
            C,
            CHANNELS,
            BLOCK_C,
        )
        matchable = inside & (norm < NORM_LIMIT)
        tl.store(key_norm + row, tl.where(matchable, norm, BIG), mask=inside)
        object_mask = mask + n * mask_n + t * mask_t + y * mask_h + x * mask_w
        object_count = counts + n * objects * key_blocks + block
        for _ in range(objects):
            member = matchable & (tl.load(object_mask, mask=inside, other=0) != 0)
            tl.store(object_count, tl.sum(member.to(tl.int32), axis=0))
            object_mask += mask_o
            object_count += key_blocks


@triton.jit
def _list_members(
    mask,
    key_norm,
    counts,
    cumulative,
    members,
    member_norm,
    key_height,
    key_width,
    key_pixels,
    objects,
    key_blocks,
    mask_n,
    mask_o,
    mask_t,
    mask_h,
    mask_w,
    ROWS: tl.constexpr,
):
    """Grid (blocks of ROWS key pixels, N * O): append the block's pixels and their norms to the object's list."""
    block = tl.program_id(0)
    item = tl.program_id(1).to(tl.int64)
    n = item // objects
    o = item % objects
    pixel = block * ROWS + tl.arange(0, ROWS)
    inside = pixel < key_pixels
    t = (pixel // key_width // key_height).to(tl.int64)
    y = (pixel // key_width % key_height).to(tl.int64)
    x = (pixel % key_width).to(tl.int64)
    pointers = mask + n * mask_n + o * mask_o + t * mask_t + y * mask_h + x * mask_w
    norm = tl.load(key_norm + n * key_pixels + pixel, mask=inside, other=BIG)
    member = (tl.load(pointers, mask=inside, other=0) != 0) & (norm < NORM_LIMIT)
    before = tl.load(cumulative + item * key_blocks + block) - tl.load(counts + item * key_blocks + block)
    position = before + tl.cumsum(member.to(tl.int32), axis=0) - 1
    tl.store(members + item * key_pixels + position, pixel, mask=member)
    tl.store(member_norm + item * key_pixels + position, norm, mask=member)


@triton.jit
def _match(
    query,
    key,
    query_norm,
    cumulative,
    members,
    member_norm,
    scores,
    candidates,
    query_pixels,
    key_pixels,
    objects,
    key_blocks,
    share,
    NEIGHBORS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid (query tiles, shares, N * O): the NEIGHBORS least scores of the share, in no order, and their pixels.

    Lists ascend and later equals never replace earlier ones, so that the lowest index wins a tie.
    """
    item = tl.program_id(2).to(tl.int64)
    n = item // objects
    pixel = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = pixel < query_pixels
    query_row = n * query_pixels + tl.minimum(pixel, query_pixels - 1)
    query_rows = query + query_row[:, None] * CHANNELS
    query_tile = load_rows(query_rows, 0, CHANNELS, BLOCK_C)
    norm = tl.load(query_norm + query_row)
    offset = row_offset(norm, EXACT)

    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, tl.load(cumulative + item * key_blocks + key_blocks - 1))
    end = tl.where(tl.min(norm, axis=0) < NORM_LIMIT, end, begin)
    column = tl.arange(0, BLOCK_K)
    if NEIGHBORS == 1:
        best = tl.full((BLOCK_Q,), 0.5 * BIG, tl.float32)
        best_position = tl.full((BLOCK_Q,), -1, tl.int32)
    else:
        # A free slot has a score that any key beats and its own position; slots beyond NEIGHBORS are never the worst.
        slot = tl.arange(0, SLOTS)[None, :] + tl.zeros((BLOCK_Q, SLOTS), tl.int32)
        best = tl.where(slot < NEIGHBORS, 0.5 * BIG, -BIG)
        best_position = -1 - slot
    for start in range(begin, end, BLOCK_K):
        position = start + column
        listed = position < end
        bias = tl.load(member_norm + item * key_pixels + position, mask=listed, other=BIG)
        row = tl.load(members + item * key_pixels + position, mask=listed, other=0)
        if WIDE:
            row = row.to(tl.int64)
        key_rows = key + n * key_pixels * CHANNELS + row[:, None] * CHANNELS
        product = tile_dot(query_tile, query_rows, key_rows, CHANNELS, BLOCK_C, BLOCK_Q, BLOCK_K, PRECISION)
        score = (bias[None, :] - 2.0 * product) + offset[:, None]
        value, chosen = least(score, BLOCK_K, EXACT)
        if NEIGHBORS == 1:
            better = value < best
            best = tl.where(better, value, best)
            best_position = tl.where(better, start + chosen, best_position)
        else:
            worst = tl.max(best, axis=1)
            while tl.max((value < worst).to(tl.int32), axis=0) > 0:
                last = tl.max(tl.where(best == worst[:, None], best_position, -SLOTS - 1), axis=1)
                replaced = (best == worst[:, None]) & (best_position == last[:, None])
                replaced = replaced & (value < worst)[:, None]
                best = tl.where(replaced, value[:, None], best)
                best_position = tl.where(replaced, (start + chosen)[:, None], best_position)
                worst = tl.max(best, axis=1)
                score = tl.where(column[None, :] == chosen[:, None], BIG, score)
                value, chosen = least(score, BLOCK_K, EXACT)

    out = item * NEIGHBORS * tl.num_programs(1) + tl.program_id(1) * NEIGHBORS
    if NEIGHBORS == 1:
        found = best_position >= 0
        winner = tl.load(members + item * key_pixels + best_position, mask=found, other=-1)
        tl.store(scores + out * query_pixels + pixel, best, mask=inside)
        tl.store(candidates + out * query_pixels + pixel, winner, mask=inside)
    else:
        found = best_position >= 0
        winner = tl.load(members + item * key_pixels + best_position, mask=found, other=-1)
        rows = (out + slot) * query_pixels + pixel[:, None]
        store = inside[:, None] & (slot < NEIGHBORS)
        tl.store(scores + rows, best, mask=store)
        tl.store(candidates + rows, winner, mask=store)


@triton.jit
def _merge(
    query,
    key,
    query_norm,
    scores,
    candidates,
    distance,
    index,
    query_pixels,
    key_pixels,
    objects,
    choices,
    NEIGHBORS: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (blocks of ROWS queries, N * O): the NEIGHBORS least of ``choices`` scores, and their true distances."""
    item = tl.program_id(1).to(tl.int64)
    n = item // objects
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = pixel < query_pixels
    query_row = n * query_pixels + pixel
    norm = tl.load(query_norm + query_row, mask=inside, other=float("inf"))
    choice = tl.arange(0, CHOICES)
    rows = (item * choices + choice)[None, :] * query_pixels + pixel[:, None]
    load = inside[:, None] & (choice < choices)[None, :]
    score = tl.load(scores + rows, mask=load, other=BIG)
    candidate = tl.load(candidates + rows, mask=load, other=-1)
    for neighbor in range(NEIGHBORS):
        least_score = tl.min(score, axis=1)
        is_least = score == least_score[:, None]
        winner = tl.min(tl.where(is_least, candidate, 2147483647), axis=1)
        score = tl.where(is_least & (candidate == winner[:, None]), BIG, score)
        found = inside & (least_score < 0.5 * BIG) & (norm < NORM_LIMIT)
        value = squared_distance(
            query + query_row[:, None] * CHANNELS,
            key + (n * key_pixels + winner)[:, None] * CHANNELS,
            found,
            ROWS,
            CHANNELS,
            BLOCK_C,
        )
        out = (item * NEIGHBORS + neighbor) * query_pixels + pixel
        tl.store(distance + out, tl.where(norm != norm, norm, value), mask=inside)
        tl.store(index + out, tl.where(found, winner, -1).to(tl.int64), mask=inside)


def is_flat(tensor: Tensor) -> bool:
    """Whether the pixels of a (N, C, ...) tensor lie at equal distances, as in contiguous and channels_last ones."""
    expected = tensor.stride(-1)
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def match_constants(
    tiling: Tiling, neighbors: int, key_pixels: int, precision: str, *, exact: bool
) -> dict[str, Any]:
    """Compile-time arguments of ``_match``."""
    return {
        "NEIGHBORS": neighbors,
        "SLOTS": power_of_two(neighbors),
        "BLOCK_Q": tiling.queries,
        "BLOCK_K": tiling.keys,
        "CHANNELS": tiling.channels,
        "BLOCK_C": tiling.block_c,
        "WIDE": key_pixels * tiling.channels >= 2**31,
        "PRECISION": precision,
        "EXACT": exact,
    }


def match_options(tiling: Tiling) -> dict[str, int]:
    """Compiler options of ``_match``: two more stages than the tiling's, for the lists that keys are gathered by."""
    return {**tiling.options, "num_stages": tiling.options["num_stages"] + 2}


def global_matching(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    neighbors: int,
    query_mask: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Squared distance and flat index of the nearest key pixels of each object.

    Args:
        query: (N, C, H, W) float32, float16 or bfloat16, any strides.
        key: (N, C, T, H2, W2), the same dtype.
        mask: (N, O, T, H2, W2) bool: which key pixels belong to which object.
        neighbors: How many of the nearest, K.
        query_mask: (N, H, W) bool: the query pixels wanted, or None for all.
        precision: "ieee", "tf32" or "tf32x3": products of float32.

    Returns:
        distance (N, O, K, H, W) float32, ascending, +inf where there are fewer, and index int64, -1 there
        A query pixel with a NaN has distance NaN and index -1; a key pixel with a NaN or an infinity never wins.

    Embeddings with a squared norm of 1e36 or more count as infinite. Memory: a copy of query and key with padded
    channels, 8 bytes per object and key pixel and 8 per object, query pixel, neighbor and share of keys (at most 16).
    With more than one neighbor a step repeats its selection while any of its queries finds a nearer key.
    "tf32" truncates the operands in choosing the keys, never in their distance.
    """
    check_inputs(query, key, mask, precision)
    batch, channels, height, width = query.shape
    frames, key_height, key_width = key.shape[2:]
    objects = mask.shape[1]
    items = batch * objects
    distance = query.new_empty((batch, objects, neighbors, height, width), dtype=torch.float32)
    index = torch.empty_like(distance, dtype=torch.int64)
    if distance.numel() == 0:
        return distance, index

    query_pixels, key_pixels = height * width, frames * key_height * key_width
    target = target_of(query)
    precision = product_precision(precision, target)
    exact = is_exact(query.dtype, precision)
    tiling = tilings(channels, query.dtype, precision, target, many_queries=neighbors == 1)[0]
    query_blocks = triton.cdiv(query_pixels, PACK_ROWS)
    key_blocks = max(1, triton.cdiv(key_pixels, PACK_ROWS))
    shares = max(1, min(MAX_SHARES, triton.cdiv(key_pixels, SHARE)))
    share = triton.cdiv(key_pixels, shares * tiling.keys) * tiling.keys
    choices = shares * neighbors
    packed_query = query.new_empty((batch, query_pixels, tiling.channels))
    packed_key = query.new_empty((batch, key_pixels, tiling.channels))
    query_norm = query.new_empty((batch, query_pixels), dtype=torch.float32)
    key_norm = query.new_empty((batch, key_pixels), dtype=torch.float32)
    counts = query.new_empty((items, key_blocks), dtype=torch.int32)
    members = query.new_empty((items, key_pixels), dtype=torch.int32)
    member_norm = torch.empty_like(members, dtype=torch.float32)
    scores = query.new_empty((items, choices, query_pixels), dtype=torch.float32)
    candidates = torch.empty_like(scores, dtype=torch.int32)
    mask_bytes = mask.view(torch.uint8)
    wanted = mask_bytes if query_mask is None else query_mask.view(torch.uint8)
    wanted_strides = (0, 0, 0) if query_mask is None else query_mask.stride()
    with launch_on(query):
        _pack[(query_blocks + key_blocks, batch)](
            query,
            key,
            mask_bytes,
            wanted,
            packed_query,
            packed_key,
            query_norm,
            key_norm,
            counts,
            channels,
            width,
            query_pixels,
            key_height,
            key_width,
            key_pixels,
            objects,
            query_blocks,
            key_blocks,
            *query.stride(),
            *key.stride(),
            *mask.stride(),
            *wanted_strides,
            ROWS=PACK_ROWS,
            CHANNELS=tiling.channels,
            BLOCK_C=min(PACK_CHANNELS, power_of_two(channels)),
            HAS_QUERY_MASK=query_mask is not None,
            FLAT_QUERY=is_flat(query),
            FLAT_KEY=is_flat(key),
            **compile_options(4),
        )
        cumulative = counts.cumsum(1, dtype=torch.int32)
        _list_members[(key_blocks, items)](
            mask_bytes,
            key_norm,
            counts,
            cumulative,
            members,
            member_norm,
            key_height,
            key_width,
            key_pixels,
            objects,
            key_blocks,
            *mask.stride(),
            ROWS=PACK_ROWS,
            **compile_options(2),
        )
        _match[(triton.cdiv(query_pixels, tiling.queries), shares, items)](
            packed_query,
            packed_key,
            query_norm,
            cumulative,
            members,
            member_norm,
            scores,
            candidates,
            query_pixels,
            key_pixels,
            objects,
            key_blocks,
            share,
            **match_constants(tiling, neighbors, key_pixels, precision, exact=exact),
            **match_options(tiling),
        )
        _merge[(triton.cdiv(query_pixels, MERGE_ROWS), items)](
            packed_query,
            packed_key,
            query_norm,
            scores,
            candidates,
            distance,
            index,
            query_pixels,
            key_pixels,
            objects,
            choices,
            NEIGHBORS=neighbors,
            CHOICES=power_of_two(choices),
            ROWS=MERGE_ROWS,
            CHANNELS=tiling.channels,
            BLOCK_C=MERGE_CHANNELS,
            **compile_options(4),
        )
    if neighbors == 1:
        return distance, index
    distance, order = distance.sort(dim=2, stable=True)
    return distance, index.gather(2, order)
