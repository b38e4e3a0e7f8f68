"""The memory read: softmax over the memory in a streaming pass, all objects under one affinity.

``_read``: a program owns 128 queries and 256 value columns (the channels of all objects, one after the other) and walks
over a part of the memory in steps of 64 positions: 128 x 64 scores, running maximum and sum of each query in registers,
weights rounded to the values' dtype, product with 64 x 256 values onto a float32 accumulator of 128 x 256, half the
register file. Queries stay in shared memory; key and value tiles arrive by asynchronous copies, two steps in flight
(128 KB). More columns are more programs, which compute the scores again: at 128 key channels a quarter more operations
for 512 columns, the price of an accumulator that fits. Where queries and columns do not fill the device, the memory is
cut into parts, whose results ``_merge`` combines by their log-sum-exp. At T=20, 480p/16: 13 x 2 x 5 programs, 78 Gflop,
47 MB from L2 a part; bound by the tensor cores.

A memory ends at the last position that its bias lets through (`memory_lengths` arrives as a bias of -inf): a kernel of
one program a batch element looks for it, and the parts share the positions before it. Of channel-last keys and values
nothing behind it is loaded, so that a NaN there meets no weight of 0; of channel-major ones the last tile is, for a
bound that is no multiple of what is copied at a time would cut the copies to single elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vosops.triton import memory_descriptors
from vosops.triton._common import launch_on
from vosops.triton.memory_scores import (
    LN2,
    LOG2E,
    as_it_is,
    ends_of,
    in_pieces,
    in_place,
    load_row_tiles,
    load_vector,
    of_batch,
    options_of,
    part_of,
    parts_for,
    piece_of,
    score_operands,
)
from vosops.triton.memory_softmax import read_launch, step, store_read
from vosops.triton.memory_values import MERGE_BLOCK, check_value, kind_of_value


@triton.jit
def _read(
    query,
    key,
    shrinkage,
    query_bias,
    key_bias,
    shrinkage_n,
    query_bias_n,
    key_bias_n,
    query_n,
    query_c,
    query_p,
    key_n,
    key_c,
    key_m,
    scale,
    P,
    M,
    query_end,
    key_end,
    ends,
    value,
    out,
    lse,
    value_n,
    value_o,
    value_c,
    value_m,
    value_end,
    batch,
    columns,
    tiles,
    column_blocks,
    parts,
    C: tl.constexpr,
    VALUE_C: tl.constexpr,
    SQUARES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    VALUE_PRECISION: tl.constexpr,
    KEY_PIECE: tl.constexpr,
    KEY_LAST: tl.constexpr,
    VALUE_PIECE: tl.constexpr,
    VALUE_LAST: tl.constexpr,
):
    """Grid (query tiles * column blocks * N * parts); out (parts, N, columns, P) and lse (parts, N, P) contiguous.

    Strides and ends of keys and values count pieces (`Pieces`), those of neighbours elements.
    """
    tile = tl.program_id(0) % tiles
    column_block = tl.program_id(0) // tiles % column_blocks
    row = (tl.program_id(0) // tiles // column_blocks).to(tl.int64)
    n = row % batch
    part = (row // batch).to(tl.int32)
    if KEY_PIECE > 1 and KEY_LAST:
        key_m *= KEY_PIECE
    elif KEY_PIECE > 1:
        key_c *= KEY_PIECE
        key_end *= KEY_PIECE
    if VALUE_PIECE > 1 and VALUE_LAST:
        value_m *= VALUE_PIECE
    elif VALUE_PIECE > 1:
        value_c *= VALUE_PIECE
        value_end *= VALUE_PIECE
    if VALUE_PIECE > 1:
        value_o *= VALUE_PIECE
    query += n * query_n
    key = piece_of(key, n * KEY_PIECE * key_n, KEY_PIECE)
    value = piece_of(value, n * VALUE_PIECE * value_n, VALUE_PIECE)
    shrinkages = of_batch(shrinkage, n, shrinkage_n)
    query_biases = of_batch(query_bias, n, query_bias_n)
    key_biases = of_batch(key_bias, n, key_bias_n)

    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    column = column_block * BLOCK_V + tl.arange(0, BLOCK_V)
    query_tile, query_squares = load_row_tiles(
        query, p, query_c, query_p, query_end, 0, C, SQUARES, True, WIDE, BLOCK_C
    )
    row_bias = load_vector(query_biases, p, P, 0.0) * LOG2E

    maximum = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    acc = tl.zeros((BLOCK_P, BLOCK_V), tl.float32)
    begin, end = part_of(ends, n, M, part, parts, BLOCK_M)
    if ends is not None and KEY_LAST:
        M = end
        key_end = end
    if ends is not None and VALUE_LAST:
        value_end = end
    for first in range(begin, end, BLOCK_M):
        maximum, total, acc = step(
            maximum, total, acc, query_tile, query_squares, row_bias, p, first + tl.arange(0, BLOCK_M), column,
            query, key, shrinkages, key_biases, query_c, query_p, key_c, key_m, scale, M, query_end, key_end,
            value, value_m, value_o, value_c, value_end, columns, query_bias is not None,
            C, SQUARES, WIDE, BLOCK_P, BLOCK_M, BLOCK_C, PRECISION, VALUE_C, VALUE_PRECISION,
        )  # fmt: skip
    store_read(out, lse, row, tile, column_block, p, maximum, total, acc, P, columns, BLOCK_P, BLOCK_V)


@triton.jit
def _merge(
    part_out, part_lse, out, lse, P, batch, columns, parts, p_blocks, column_blocks, BLOCK: tl.constexpr
):
    """Grid (query blocks * column blocks * N): results of parts, weighted by exp(their lse)."""
    p = tl.program_id(0) % p_blocks * BLOCK + tl.arange(0, BLOCK)
    column_block = tl.program_id(0) // p_blocks % column_blocks
    column = column_block * BLOCK + tl.arange(0, BLOCK)
    n = (tl.program_id(0) // p_blocks // column_blocks).to(tl.int64)
    greatest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for part in range(parts):
        greatest = tl.maximum(greatest, tl.load(part_lse + (part * batch + n) * P + p, mask=p < P, other=0.0))
    offset = tl.where(greatest == float("-inf"), 0.0, greatest)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    inside = (column < columns)[:, None] & (p < P)[None, :]
    for part in range(parts):
        row = part * batch + n
        share = tl.exp2((tl.load(part_lse + row * P + p, mask=p < P, other=0.0) - offset) * LOG2E)
        total += share
        pointers = part_out + (row * columns + column)[:, None] * P + p[None, :]
        acc += share[None, :] * tl.load(pointers, mask=inside, other=0.0)
    some = total != 0.0
    total = tl.where(some, total, 1.0)
    pointers = out + (n * columns + column)[:, None] * P + p[None, :]
    tl.store(pointers, (acc / total[None, :]).to(out.dtype.element_ty), mask=inside)
    if column_block == 0:
        tl.store(lse + n * P + p, tl.where(some, offset + tl.log2(total) * LN2, float("-inf")), mask=p < P)


def ends_with_memory(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a read loads nothing behind the last position that its bias lets through, so that NaN there is harmless.

    query (N, C, P), key (N, C, M), value (N, O, Cv, M), as `memory_read` would get them.
    """
    if memory_descriptors.is_chosen(query, key, value):
        return True
    found = [in_place(tensor) for tensor in (key, value)]
    return all(pieces is not None and pieces.channel_last for pieces in found)


def memory_read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Values read with the softmax of the scores over the memory.

    Args:
        query: (N, C, P), or (N, 2C, P) to meet the key's channels and their squares; float32, float16 or bfloat16, any
            strides, as key and value.
        key: (N, C, M).
        value: (N, O, Cv, M).
        shrinkage: (N, M) float32 or None.
        query_bias: (N, P) float32 or None.
        key_bias: (N, M) float32 or None; -inf excludes a position.
        scale: Factor of the products.
        precision: "ieee", "tf32" or "tf32x3": products of float32.

    Returns:
        out (N, O, Cv, P) in the value's dtype and the log-sum-exp of the scores (N, P) float32; 0 and -inf where there
        is nothing to read.

    Memory: where queries and channels do not fill the device, N * O * Cv * P float32 for each part of the memory; a
    copy of keys or values in which no 4 bytes can be read at a time (see `in_pieces`): channel-major ones of 16 bits
    with an odd number of positions, for instance.
    """
    check_value(value, key)
    by_descriptors = memory_descriptors.is_chosen(query, key, value)
    pieces = as_it_is if by_descriptors else in_pieces
    scores = score_operands(query, key, shrinkage, query_bias, key_bias, scale, precision, pieces=pieces)
    batch, objects, channels, _ = value.shape
    columns, queries = objects * channels, scores.queries
    out = value.new_empty((batch, objects, channels, queries))
    lse = value.new_empty((batch, queries), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    values = pieces(value)
    if by_descriptors:
        constants, options = memory_descriptors.tile_launch(scores, columns, channels)
        kernel, tiled = memory_descriptors.read_tiles, memory_descriptors.arguments(key, value, constants)
    else:
        constants, options = read_launch(scores, columns, channels, kind_of_value(value, precision, scores))
        kernel, tiled = _read, values.constants("VALUE")
    tiles = triton.cdiv(queries, constants["BLOCK_P"])
    column_blocks = max(1, triton.cdiv(columns, constants["BLOCK_V"]))
    steps = max(1, triton.cdiv(scores.memory, constants["BLOCK_M"]))
    parts = parts_for(tiles * column_blocks * batch, steps, scores.target.processors)
    parts = triton.cdiv(steps, triton.cdiv(steps, parts))
    part_out, part_lse = out, lse
    if parts > 1:
        part_out = out.new_empty((parts, *out.shape), dtype=torch.float32)
        part_lse = lse.new_empty((parts, *lse.shape))
    with launch_on(value):
        kernel[(tiles * column_blocks * batch * parts,)](
            *scores.arguments,
            ends_of(key_bias),
            values.tensor,
            part_out,
            part_lse,
            *values.strides,
            values.end,
            batch,
            columns,
            tiles,
            column_blocks,
            parts,
            **constants,
            **tiled,
            **options,
        )
        if parts > 1:
            p_blocks = triton.cdiv(queries, MERGE_BLOCK)
            merge_blocks = max(1, triton.cdiv(columns, MERGE_BLOCK))
            _merge[(p_blocks * merge_blocks * batch,)](
                part_out,
                part_lse,
                out,
                lse,
                queries,
                batch,
                columns,
                parts,
                p_blocks,
                merge_blocks,
                BLOCK=MERGE_BLOCK,
                **options_of(4, 2),
            )
    return out, lse
