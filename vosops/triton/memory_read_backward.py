"""The gradients of the memory read: weights and their flow are computed again from the saved log-sum-exp.

``_query_gradient`` owns queries and walks over the memory, ``_key_gradient`` and ``_value_gradient`` own memory
positions and walk over the queries; ``_mean_gradient`` comes first and sums grad_out * out of each query. Where queries
do not fill the device, the memory is cut into parts, whose gradients are added. No atomics: the same on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vosops.triton._common import dot, launch_on
from vosops.triton.memory_scores import (
    LN2,
    LOG2E,
    MIN_BLOCK,
    Scores,
    aligned,
    block_of,
    load_lse,
    load_row_tiles,
    load_tile,
    load_vector,
    of_batch,
    options_of,
    score_operands,
    scores_of_memory,
    scores_of_queries,
    slowest,
    splits_for,
    square_blocks,
)
from vosops.triton.memory_values import (
    MERGE_BLOCK,
    Launch,
    check_value,
    kind_of_value,
    load_column_rows,
    load_columns,
    store_transposed,
    value_constants,
)


@triton.jit
def _mean_gradient(
    grad,
    out,
    grad_lse,
    delta,
    P,
    columns,
    p_blocks,
    grad_n,
    grad_o,
    grad_c,
    grad_p,
    VALUE_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (query blocks * N): delta = sum over columns of grad * out, minus grad_lse."""
    p = tl.program_id(0) % p_blocks * BLOCK + tl.arange(0, BLOCK)
    n = (tl.program_id(0) // p_blocks).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        g = load_column_rows(grad + n * grad_n, column, p, grad_p, grad_o, grad_c, P, columns, VALUE_C)
        o = load_tile(out + n * columns * P, column, p, P, 1, columns, P)
        total += tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=0)
    at = n * P + p
    tl.store(delta + at, total - tl.load(grad_lse + at, mask=p < P, other=0.0), mask=p < P)


@triton.jit
def _query_gradient(
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
    value,
    grad,
    lse,
    delta,
    grad_query,
    grad_query_bias,
    value_n,
    value_o,
    value_c,
    value_m,
    value_end,
    grad_n,
    grad_o,
    grad_c,
    grad_p,
    grad_end,
    batch,
    columns,
    tiles,
    channel_blocks,
    part_steps,
    C: tl.constexpr,
    VALUE_C: tl.constexpr,
    SQUARES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PRECISION: tl.constexpr,
    VALUE_PRECISION: tl.constexpr,
):
    """Grid (query tiles * channel blocks * N * parts); grad_query (parts, N, Cq, P), grad_query_bias (parts, N, P)."""
    QUERY_C: tl.constexpr = 2 * C if SQUARES else C
    tile = tl.program_id(0) % tiles
    channel_block = tl.program_id(0) // tiles % channel_blocks
    row = (tl.program_id(0) // tiles // channel_blocks).to(tl.int64)
    n = row % batch
    part = (row // batch).to(tl.int32)
    query += n * query_n
    key += n * key_n
    value += n * value_n
    grad += n * grad_n
    shrinkages = of_batch(shrinkage, n, shrinkage_n)
    query_biases = of_batch(query_bias, n, query_bias_n)
    key_biases = of_batch(key_bias, n, key_bias_n)

    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    c = channel_block * BLOCK_G + tl.arange(0, BLOCK_G)
    query_tile, query_squares = load_row_tiles(
        query, p, query_c, query_p, query_end, 0, C, SQUARES, True, WIDE, BLOCK_C
    )
    row_bias = load_vector(query_biases, p, P, 0.0) * LOG2E
    row_lse = load_lse(lse + n * P, p, P)
    row_delta = tl.load(delta + n * P + p, mask=p < P, other=0.0)

    acc = tl.zeros((BLOCK_P, BLOCK_G), tl.float32)
    acc_squares = tl.zeros((BLOCK_P, BLOCK_G), tl.float32)
    acc_bias = tl.zeros((BLOCK_P,), tl.float32)
    begin = part * part_steps * BLOCK_M
    for first in range(begin, tl.minimum(begin + part_steps * BLOCK_M, M), BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        score, column_shrinkage = scores_of_queries(
            query_tile, query_squares, row_bias, p, m, query, key, shrinkages, key_biases,
            query_c, query_p, key_c, key_m, scale, M, query_end, key_end, query_bias is not None, True,
            C, SQUARES, WIDE, BLOCK_P, BLOCK_M, BLOCK_C, PRECISION,
        )  # fmt: skip
        weight = tl.exp2(score - row_lse[:, None])
        flow = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
        for first_column in range(0, columns, BLOCK_V):
            column = first_column + tl.arange(0, BLOCK_V)
            g = load_columns(grad, p, column, grad_p, grad_o, grad_c, grad_end, columns, VALUE_C)
            v = load_column_rows(value, column, m, value_m, value_o, value_c, value_end, columns, VALUE_C)
            flow = dot(g, v, flow, VALUE_PRECISION)
        ds = weight * (flow - row_delta[:, None])
        if shrinkage is not None:
            ds = ds * column_shrinkage
        acc_bias += tl.sum(ds, axis=1)
        k = load_tile(key, m, c, key_m, key_c, key_end, C)
        if WIDE:
            k = k.to(tl.float32)
        acc = dot(ds.to(k.dtype), k, acc, PRECISION)
        if SQUARES:
            acc_squares = dot(ds, k * k, acc_squares, PRECISION)

    grad_query += row * QUERY_C * P
    store_transposed(grad_query, tile * BLOCK_P, channel_block * BLOCK_G, acc * scale, P, C, BLOCK_P, BLOCK_G)
    if SQUARES:
        grad_query += C * P
        acc = acc_squares * scale
        store_transposed(grad_query, tile * BLOCK_P, channel_block * BLOCK_G, acc, P, C, BLOCK_P, BLOCK_G)
    if channel_block == 0:
        tl.store(grad_query_bias + row * P + p, acc_bias, mask=p < P)


@triton.jit
def _key_gradient(
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
    value,
    grad,
    lse,
    delta,
    grad_key,
    grad_shrinkage,
    grad_key_bias,
    value_n,
    value_o,
    value_c,
    value_m,
    value_end,
    grad_n,
    grad_o,
    grad_c,
    grad_p,
    grad_end,
    columns,
    tiles,
    channel_blocks,
    C: tl.constexpr,
    VALUE_C: tl.constexpr,
    SQUARES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PRECISION: tl.constexpr,
    VALUE_PRECISION: tl.constexpr,
):
    """Grid (memory tiles * channel blocks * N); contiguous: grad_key (N, C, M), the vectors' gradients (N, M)."""
    tile = tl.program_id(0) % tiles
    channel_block = tl.program_id(0) // tiles % channel_blocks
    n = (tl.program_id(0) // tiles // channel_blocks).to(tl.int64)
    query += n * query_n
    key += n * key_n
    value += n * value_n
    grad += n * grad_n
    lse += n * P
    delta += n * P
    query_biases = of_batch(query_bias, n, query_bias_n)

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    c = channel_block * BLOCK_G + tl.arange(0, BLOCK_G)
    key_tile, key_squares = load_row_tiles(key, m, key_c, key_m, key_end, 0, C, SQUARES, False, WIDE, BLOCK_C)
    row_shrinkage = load_vector(of_batch(shrinkage, n, shrinkage_n), m, M, 0.0)
    row_bias = load_vector(of_batch(key_bias, n, key_bias_n), m, M, float("-inf")) * LOG2E

    acc = tl.zeros((BLOCK_M, BLOCK_G), tl.float32)
    acc_squares = tl.zeros((BLOCK_M, BLOCK_G), tl.float32)
    acc_shrinkage = tl.zeros((BLOCK_M,), tl.float32)
    acc_bias = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        score, product, column_bias = scores_of_memory(
            key_tile, key_squares, row_shrinkage, row_bias, m, p, key, query, query_biases,
            key_c, key_m, query_c, query_p, scale, P, key_end, query_end, shrinkage is not None,
            C, SQUARES, WIDE, BLOCK_M, BLOCK_P, BLOCK_C, PRECISION,
        )  # fmt: skip
        weight = tl.exp2(score - load_lse(lse, p, P)[None, :])
        flow = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        for first_column in range(0, columns, BLOCK_V):
            column = first_column + tl.arange(0, BLOCK_V)
            v = load_columns(value, m, column, value_m, value_o, value_c, value_end, columns, VALUE_C)
            g = load_column_rows(grad, column, p, grad_p, grad_o, grad_c, grad_end, columns, VALUE_C)
            flow = dot(v, g, flow, VALUE_PRECISION)
        ds = weight * (flow - tl.load(delta + p, mask=p < P, other=0.0)[None, :])
        acc_bias += tl.sum(ds, axis=1)
        if shrinkage is not None:
            raw = product * scale
            if query_bias is not None:
                raw += column_bias * LN2
            acc_shrinkage += tl.sum(ds * raw, axis=1)
            ds = ds * row_shrinkage[:, None]
        q = load_tile(query, p, c, query_p, query_c, query_end, C)
        if WIDE:
            q = q.to(tl.float32)
        acc = dot(ds.to(q.dtype), q, acc, PRECISION)
        if SQUARES:
            q = load_tile(query, p, tl.where(c < C, C + c, 2 * C), query_p, query_c, query_end, 2 * C)
            acc_squares = dot(ds, q.to(tl.float32), acc_squares, PRECISION)

    if SQUARES:
        k = load_tile(key, m, c, key_m, key_c, key_end, C).to(tl.float32)
        acc += 2.0 * k * acc_squares
    grad_key += n * C * M
    store_transposed(grad_key, tile * BLOCK_M, channel_block * BLOCK_G, acc * scale, M, C, BLOCK_M, BLOCK_G)
    if channel_block == 0:
        tl.store(grad_key_bias + n * M + m, acc_bias, mask=m < M)
        tl.store(grad_shrinkage + n * M + m, acc_shrinkage, mask=m < M)


@triton.jit
def _value_gradient(
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
    grad,
    lse,
    grad_value,
    grad_n,
    grad_o,
    grad_c,
    grad_p,
    grad_end,
    columns,
    tiles,
    column_blocks,
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
):
    """Grid (memory tiles * column blocks * N); grad_value (N, columns, M) contiguous."""
    tile = tl.program_id(0) % tiles
    column_block = tl.program_id(0) // tiles % column_blocks
    n = (tl.program_id(0) // tiles // column_blocks).to(tl.int64)
    query += n * query_n
    key += n * key_n
    grad += n * grad_n
    lse += n * P
    query_biases = of_batch(query_bias, n, query_bias_n)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_block * BLOCK_V + tl.arange(0, BLOCK_V)
    key_tile, key_squares = load_row_tiles(key, m, key_c, key_m, key_end, 0, C, SQUARES, False, WIDE, BLOCK_C)
    row_shrinkage = load_vector(of_batch(shrinkage, n, shrinkage_n), m, M, 0.0)
    row_bias = load_vector(of_batch(key_bias, n, key_bias_n), m, M, float("-inf")) * LOG2E
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        score, _, _ = scores_of_memory(
            key_tile, key_squares, row_shrinkage, row_bias, m, p, key, query, query_biases,
            key_c, key_m, query_c, query_p, scale, P, key_end, query_end, shrinkage is not None,
            C, SQUARES, WIDE, BLOCK_M, BLOCK_P, BLOCK_C, PRECISION,
        )  # fmt: skip
        weight = tl.exp2(score - load_lse(lse, p, P)[None, :])
        g = load_columns(grad, p, column, grad_p, grad_o, grad_c, grad_end, columns, VALUE_C)
        acc = dot(weight.to(g.dtype), g, acc, VALUE_PRECISION)
    grad_value += n * columns * M
    store_transposed(grad_value, tile * BLOCK_M, column_block * BLOCK_V, acc, M, columns, BLOCK_M, BLOCK_V)


def gradient_launch(scores: Scores, columns: int, value_channels: int, value_kind: str) -> Launch:
    """Tiles of ``_query_gradient`` and ``_key_gradient``."""
    kind = slowest((scores.kind, value_kind))
    block_v = {"half": 64, "tf32": 64, "tf32x3": 16, "ieee": 32}[kind]
    if scores.target.architecture.products != "wgmma":
        block_v = min(32, block_v)
    blocks = {
        **square_blocks(scores),
        "BLOCK_V": block_of(columns, block_v),
        "BLOCK_G": block_of(scores.channels, 64 if scores.kind in ("half", "tf32") else 32),
    }
    if scores.kind == "tf32x3":
        blocks["BLOCK_C"] = MIN_BLOCK
    return {**scores.constants, **value_constants(value_channels, value_kind), **blocks}, _gradient_options(
        scores.kind, value_kind
    )


def value_gradient_launch(scores: Scores, columns: int, value_channels: int, value_kind: str) -> Launch:
    """Tiles of ``_value_gradient``."""
    blocks = {**square_blocks(scores), "BLOCK_V": block_of(columns, 128 if value_kind == "half" else 64)}
    return {**scores.constants, **value_constants(value_channels, value_kind), **blocks}, _gradient_options(
        scores.kind, value_kind
    )


def _gradient_options(*kinds: str) -> dict[str, int]:
    """Twice the warps, so twice the registers, where operands are split or multiplied without tensor cores."""
    return options_of(4 if slowest(kinds) in ("half", "tf32") else 8, 2)


def memory_read_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    precision: str,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of `memory_read` with respect to query, key, value, shrinkage, query_bias and key_bias.

    Arguments as those of `memory_read`, with its results and their gradients. Gradients are contiguous and in the
    dtypes of what they belong to; those of vectors that are None are (N, 0). The same on every run.
    """
    check_value(value, key)
    batch, objects, channels, memory = value.shape
    columns, queries = objects * channels, query.shape[2]
    vectors = (shrinkage, query_bias, key_bias)
    matrices = tuple(t.new_empty(t.shape) for t in (query, key, value))
    gradients = tuple(lse.new_empty((batch, 0) if v is None else tuple(v.shape)) for v in vectors)
    if lse.numel() == 0 or key.shape[2] == 0:
        return tuple(t.zero_() for t in (*matrices, *gradients))
    out, lse, grad_lse = out.contiguous(), lse.contiguous(), grad_lse.contiguous()
    grad_out = grad_out.to(value.dtype)
    streams_memory = score_operands(query, key, *vectors, scale, precision)
    streams_queries = score_operands(query, key, *vectors, scale, precision, stream_queries=True)
    value_kind = kind_of_value(value, precision, streams_memory)
    constants, options = gradient_launch(streams_memory, columns, channels, value_kind)
    delta = torch.empty_like(lse)
    p_blocks = triton.cdiv(queries, MERGE_BLOCK)
    tiles = triton.cdiv(queries, constants["BLOCK_P"])
    memory_tiles = triton.cdiv(memory, constants["BLOCK_M"])
    channel_blocks = max(1, triton.cdiv(streams_memory.channels, constants["BLOCK_G"]))
    parts = splits_for(tiles * channel_blocks * batch, memory_tiles, streams_memory.target, resident=2)
    part_steps = triton.cdiv(memory_tiles, parts)
    parts = triton.cdiv(memory_tiles, part_steps)
    part_query = lse.new_empty((parts, *query.shape))
    part_query_bias = lse.new_empty((parts, batch, queries))
    grad_shrinkage, grad_key_bias = (lse.new_empty((batch, memory)) for _ in range(2))
    with launch_on(value):
        _mean_gradient[(p_blocks * batch,)](
            grad_out,
            out,
            grad_lse,
            delta,
            queries,
            columns,
            p_blocks,
            *grad_out.stride(),
            VALUE_C=constants["VALUE_C"],
            BLOCK=MERGE_BLOCK,
            **options_of(4, 2),
        )
        # Also the side that a program owns is read again at every step, for lack of registers.
        value, grad_out = aligned(value), aligned(grad_out)
        _query_gradient[(tiles * channel_blocks * batch * parts,)](
            *streams_memory.arguments,
            value,
            grad_out,
            lse,
            delta,
            part_query,
            part_query_bias,
            *value.stride(),
            value.shape[3],
            *grad_out.stride(),
            grad_out.shape[3],
            batch,
            columns,
            tiles,
            channel_blocks,
            part_steps,
            **constants,
            **options,
        )
        _key_gradient[(memory_tiles * channel_blocks * batch,)](
            *streams_queries.arguments,
            value,
            grad_out,
            lse,
            delta,
            matrices[1],
            grad_shrinkage,
            grad_key_bias,
            *value.stride(),
            value.shape[3],
            *grad_out.stride(),
            grad_out.shape[3],
            columns,
            memory_tiles,
            channel_blocks,
            **constants,
            **options,
        )
        if columns > 0:
            constants, options = value_gradient_launch(streams_queries, columns, channels, value_kind)
            tiles = triton.cdiv(memory, constants["BLOCK_M"])
            column_blocks = triton.cdiv(columns, constants["BLOCK_V"])
            _value_gradient[(tiles * column_blocks * batch,)](
                *streams_queries.arguments,
                grad_out,
                lse,
                matrices[2],
                *grad_out.stride(),
                grad_out.shape[3],
                columns,
                tiles,
                column_blocks,
                **constants,
                **options,
            )
    found = (grad_shrinkage, part_query_bias.sum(0), grad_key_bias)
    return (
        part_query.sum(0).to(query.dtype),
        *matrices[1:],
        *(empty if v is None else g for v, g, empty in zip(vectors, found, gradients, strict=True)),
    )
