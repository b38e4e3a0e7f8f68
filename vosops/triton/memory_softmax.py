"""What the kernels of a full memory read share: the streaming softmax, what a program stores, tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from vosops.triton._common import dot
from vosops.triton.memory_scores import (
    LN2,
    Scores,
    block_of,
    channel_block,
    options_of,
    scores_of_queries,
    slowest,
)
from vosops.triton.memory_values import Launch, load_columns, store_transposed, value_constants


@triton.jit
def weigh(score, maximum, total):
    """Return the weights of scores of powers of two, relative to each query's maximum; by what to rescale sums so far.

    The maximum and total of the weights, to which these were added, come last.
    """
    greater = tl.maximum(maximum, tl.max(score, axis=1))
    offset = tl.where(greater == float("-inf"), 0.0, greater)
    weight = tl.exp2(score - offset[:, None])
    rescale = tl.exp2(maximum - offset)
    return weight, rescale, greater, total * rescale + tl.sum(weight, axis=1)


@triton.jit
def step(
    maximum,
    total,
    acc,
    query_tile,
    query_squares,
    row_bias,
    p,
    m,
    column,
    query,
    key,
    shrinkages,
    key_biases,
    query_c,
    query_p,
    key_c,
    key_m,
    scale,
    M,
    query_end,
    key_end,
    value,
    value_m,
    value_o,
    value_c,
    value_end,
    columns,
    HAS_QUERY_BIAS: tl.constexpr,
    C: tl.constexpr,
    SQUARES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    VALUE_C: tl.constexpr,
    VALUE_PRECISION: tl.constexpr,
):
    """Read the positions m, of which those from M on have no weight: maximum, total and acc with them."""
    score, _ = scores_of_queries(
        query_tile, query_squares, row_bias, p, m, query, key, shrinkages, key_biases,
        query_c, query_p, key_c, key_m, scale, M, query_end, key_end, HAS_QUERY_BIAS, True,
        C, SQUARES, WIDE, BLOCK_P, BLOCK_M, BLOCK_C, PRECISION,
    )  # fmt: skip
    weight, rescale, maximum, total = weigh(score, maximum, total)
    tile_of_values = load_columns(value, m, column, value_m, value_o, value_c, value_end, columns, VALUE_C)
    acc = dot(weight.to(value.dtype.element_ty), tile_of_values, acc * rescale[:, None], VALUE_PRECISION)
    return maximum, total, acc


@triton.jit
def store_read(
    out,
    lse,
    row,
    tile,
    column_block,
    p,
    maximum,
    total,
    acc,
    P,
    columns,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Store what a program read of the rows out (row, columns, P) and, with its first columns, lse (row, P)."""
    some = total != 0.0
    total = tl.where(some, total, 1.0)
    acc = acc * (1.0 / total)[:, None]
    store_transposed(
        out + row * columns * P, tile * BLOCK_P, column_block * BLOCK_V, acc, P, columns, BLOCK_P, BLOCK_V
    )
    if column_block == 0:
        tl.store(
            lse + row * P + p, tl.where(some, (maximum + tl.log2(total)) * LN2, float("-inf")), mask=p < P
        )


HALF_TILES = {
    # 16 rows a warp: 64 registers of sums and 32 of scores a thread; twice the columns would spill. 64 KB, which 99 KB
    # of sm_86, sm_89 and sm_120 hold, too.
    "mma.sync": (128, 64, 128),
    # 64 rows for each of two warp groups, and the widest product there is, 256 columns: 128 registers of sums a thread.
    # 128 KB for queries and two stages.
    "wgmma": (128, 64, 256),
    # Sums and scores are in tensor memory, 256 and 32 of its 512 columns; what a step adds passes through registers.
    "tcgen05": (128, 32, 256),
    "mfma": (128, 64, 128),
}
"""Queries, positions and value columns of a tile with 16-bit products, by how an architecture multiplies: 8 warps."""

TF32_COLUMNS = {"tcgen05": 64}
"""Value columns with TF32; elsewhere 128: 4 warps, 64 queries and 32 positions, which pass through registers."""


def read_launch(scores: Scores, columns: int, value_channels: int, value_kind: str) -> Launch:
    """Tiles of a read by pointers."""
    kind, products = slowest((scores.kind, value_kind)), scores.target.architecture.products
    block_p, block_m, block_v, options = {
        "half": (*HALF_TILES[products], options_of(8, 2)),
        "tf32": (64, 32, TF32_COLUMNS.get(products, 128), options_of(4, 2)),
        "tf32x3": (64, 32, 64, options_of(4, 2)),
        "ieee": (64, 32, 64, options_of(4, 2)),
    }[kind]
    blocks = {
        "BLOCK_P": block_of(scores.queries, block_p),
        "BLOCK_M": block_of(scores.memory, block_m),
        "BLOCK_C": channel_block(scores),
        "BLOCK_V": block_of(columns, block_v),
    }
    return {**scores.constants, **value_constants(value_channels, value_kind), **blocks}, options
