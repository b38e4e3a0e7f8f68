"""The usage of a memory: each position's weights, summed over the queries, from the saved log-sum-exp.

A program owns memory positions, walks over all queries and sums exp(score - lse). No atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vosops.triton._common import launch_on
from vosops.triton.memory_scores import (
    LOG2E,
    Scores,
    load_lse,
    load_row_tiles,
    load_vector,
    of_batch,
    options_of,
    score_operands,
    scores_of_memory,
    square_blocks,
    unit_stride,
)
from vosops.triton.memory_values import Launch


@triton.jit
def _usage(
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
    lse,
    usage,
    lse_n,
    tiles,
    C: tl.constexpr,
    SQUARES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (memory tiles * N); usage (N, M) contiguous."""
    n = (tl.program_id(0) // tiles).to(tl.int64)
    query += n * query_n
    key += n * key_n
    lse += n * lse_n
    query_biases = of_batch(query_bias, n, query_bias_n)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    key_tile, key_squares = load_row_tiles(key, m, key_c, key_m, key_end, 0, C, SQUARES, False, WIDE, BLOCK_C)
    row_shrinkage = load_vector(of_batch(shrinkage, n, shrinkage_n), m, M, 0.0)
    row_bias = load_vector(of_batch(key_bias, n, key_bias_n), m, M, float("-inf")) * LOG2E
    used = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        score, _, _ = scores_of_memory(
            key_tile, key_squares, row_shrinkage, row_bias, m, p, key, query, query_biases,
            key_c, key_m, query_c, query_p, scale, P, key_end, query_end, shrinkage is not None,
            C, SQUARES, WIDE, BLOCK_M, BLOCK_P, BLOCK_C, PRECISION,
        )  # fmt: skip
        used += tl.sum(tl.exp2(score - load_lse(lse, p, P)[None, :]), axis=1)
    tl.store(usage + n * M + m, used, mask=m < M)


def usage_launch(scores: Scores) -> Launch:
    """Tiles of ``_usage``."""
    return {**scores.constants, **square_blocks(scores)}, options_of(4, 2)


def memory_usage(
    query: Tensor,
    key: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    precision: str,
    lse: Tensor,
) -> Tensor:
    """Each memory position's weight exp(score - lse), summed over the queries -> (N, M) float32.

    Arguments as those of `memory_read`; lse (N, P) float32.
    """
    scores = score_operands(
        query, key, shrinkage, query_bias, key_bias, scale, precision, stream_queries=True
    )
    usage = lse.new_empty((scores.batch, scores.memory))
    if usage.numel() == 0:
        return usage
    constants, options = usage_launch(scores)
    tiles = triton.cdiv(scores.memory, constants["BLOCK_M"])
    lse = unit_stride(lse)
    with launch_on(query):
        _usage[(tiles * scores.batch,)](
            *scores.arguments, lse, usage, lse.stride(0), tiles, **constants, **options
        )
    return usage
