"""The two phases of a top-k memory read: select the k best positions of each query exactly, gather their values.

Select looks at the scores twice. ``_scan`` for MAXIMA keeps, per query and part of the memory, the greatest score of
each column of the tile over all steps: one maximum per score, no sorting. ``_threshold`` takes the k-th greatest of
these maxima: at least k scores reach it, and little more than k do, for neighbouring positions fall into different
groups. ``_scan`` for COLLECT computes the same scores again, bit for bit, and appends what reaches the threshold to a
list per query and part, in order, by a prefix sum. Scores that defeat the threshold (ties, above all) overflow it: then
``_scan`` for REPAIR goes over that part again and cuts the list to its k best whenever it is full, whose last becomes
the threshold. Parts share the positions before the last position that the bias lets through (`part_of`). ``_finish``
joins the lists, cuts them to k and ranks the rest by counting. Entries are 64-bit, the score's bits in sortable form
above the complement of the position, so that ties go to the lowest position. At T=20, 480p/16, Ck=128 that is twice
13.4 Gflop and no more bytes than two reads of the keys; the scores never exist.

Gather: a program owns 16 queries and 128 value columns and adds up its k rows; channel-last values are read in whole
rows. Its backward pass sorts the indices stably and sums each position's entries in their order, without atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vosops.triton._common import INTERPRET, launch_on, power_of_two
from vosops.triton.memory_scores import (
    MIN_BLOCK,
    Scores,
    block_of,
    channel_block,
    check_dtype,
    ends_of,
    load_row_tiles,
    load_vector,
    of_batch,
    options_of,
    part_of,
    score_operands,
    scores_of_queries,
    splits_for,
)
from vosops.triton.memory_values import load_columns

LIST_ROWS = 64 if INTERPRET else 16
"""Queries of a program that works on lists; the interpreter is slow by the program."""

REPAIR_WIDTH = 16
LIST_WIDTH = 32
MAX_LIST_WIDTH = 128
"""Places of a list that are looked at in a step: in repairs, and by programs that work on lists alone."""

MAX_PARTS = 32
"""Parts into which the memory is cut."""

GROUPS_PER_CHOICE = 4
"""Groups of scores per position to select that make the threshold close."""

NOTHING = tl.constexpr(-(2**63))
LEAST_INT = tl.constexpr(-(2**31))
"""The least integers of 64 and 32 bits: empty places of lists."""

LEAST = tl.constexpr(-2139095041)
"""The sortable form of -inf: scores must be greater."""

MAXIMA = tl.constexpr(0)
COLLECT = tl.constexpr(1)
REPAIR = tl.constexpr(2)
"""What ``_scan`` does with the scores."""

BEYOND = tl.constexpr(2**31 - 1)
"""A threshold that no score exceeds."""

LOW_BITS = tl.constexpr(2**31 - 1)
"""The position is kept as its distance from this."""


@triton.jit
def sortable(score):
    """Return a score's bits as an integer of the same order; the least for NaN, which is never selected."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), LEAST)


@triton.jit
def kth_greatest(lists, length, longest, top_k, NONE: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the top_k-th greatest integer of each list, found bit by bit; NONE, the least integer, of shorter lists.

    lists (rows, 1): where each begins; length (rows,), at most ``longest``.
    """
    place = tl.arange(0, WIDTH)[None, :]
    bar = tl.zeros_like(length).to(lists.dtype.element_ty) + NONE
    for step in range(BITS):
        candidate = bar ^ (tl.full((1,), 1, lists.dtype.element_ty) << (BITS - 1 - step))
        reached = tl.zeros_like(length)
        for first in range(0, longest, WIDTH):
            entry = tl.load(lists + first + place, mask=first + place < length[:, None], other=NONE)
            reached += tl.sum((entry >= candidate[:, None]).to(tl.int32), axis=1)
        bar = tl.where(reached >= top_k, candidate, bar)
    return bar


@triton.jit
def compact(lists, source, length, longest, count, bar, WIDTH: tl.constexpr):
    """Append a list's entries that reach ``bar`` to the count entries at lists (rows, 1); the new count.

    The list begins ``source`` places on, at or behind where they go.
    """
    place = tl.arange(0, WIDTH)[None, :]
    for first in range(0, longest, WIDTH):
        listed = first + place < length[:, None]
        entry = tl.load(lists + source + first + place, mask=listed, other=NOTHING)
        kept = (listed & (entry >= bar[:, None])).to(tl.int32)
        tl.debug_barrier()  # every entry is read before one is overwritten
        tl.store(lists + count[:, None] + tl.cumsum(kept, axis=1) - 1, entry, mask=kept > 0)
        count += tl.sum(kept, axis=1)
    tl.debug_barrier()
    return count


@triton.jit
def _scan(
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
    maxima,
    thresholds,
    counts,
    entries,
    batch,
    tiles,
    parts,
    top_k,
    C: tl.constexpr,
    SQUARES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    MODE: tl.constexpr,
    CAPACITY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid (query tiles * N * parts).

    Contiguous: maxima (N, P, parts, BLOCK_M), thresholds (N, P), counts (N, P, parts) int32, entries
    (N, P, parts, CAPACITY) int64.
    """
    tile = tl.program_id(0) % tiles
    n = (tl.program_id(0) // tiles % batch).to(tl.int64)
    part = tl.program_id(0) // tiles // batch
    query += n * query_n
    key += n * key_n
    shrinkages = of_batch(shrinkage, n, shrinkage_n)
    key_biases = of_batch(key_bias, n, key_bias_n)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    row = n * P + p
    query_tile, query_squares = load_row_tiles(
        query, p, query_c, query_p, query_end, 0, C, SQUARES, True, WIDE, BLOCK_C
    )
    row_bias = load_vector(of_batch(query_bias, n, query_bias_n), p, P, 0.0)
    begin, end = part_of(ends, n, M, part, parts, BLOCK_M)
    if MODE == MAXIMA:
        greatest = tl.full((BLOCK_P, BLOCK_M), LEAST, tl.int32)
    else:
        limit = tl.load(thresholds + row, mask=p < P, other=BEYOND)
        count = tl.zeros((BLOCK_P,), tl.int32)
        lists = entries + (row * parts + part)[:, None] * CAPACITY
        if MODE == REPAIR:
            collected = tl.load(counts + row * parts + part, mask=p < P, other=0)
            end = tl.where(tl.max(collected, axis=0) > CAPACITY, end, begin)
    for first in range(begin, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        score, _ = scores_of_queries(
            query_tile, query_squares, row_bias, p, m, query, key, shrinkages, key_biases,
            query_c, query_p, key_c, key_m, scale, M, query_end, key_end, query_bias is not None, False,
            C, SQUARES, WIDE, BLOCK_P, BLOCK_M, BLOCK_C, PRECISION,
        )  # fmt: skip
        code = sortable(score)
        if MODE == MAXIMA:
            greatest = tl.maximum(greatest, code)
        else:
            hit = (code > limit[:, None]).to(tl.int32)
            hits = tl.sum(hit, axis=1)
            if MODE == REPAIR:
                if tl.max(count + hits, axis=0) > CAPACITY:
                    tl.debug_barrier()
                    longest = tl.max(count, axis=0)
                    bar = kth_greatest(lists, count, longest, top_k, NOTHING, 64, WIDTH)
                    count = compact(lists, 0, count, longest, tl.zeros_like(count), bar, WIDTH)
                    # Later positions must exceed the last score kept.
                    limit = tl.maximum(limit, (bar >> 32).to(tl.int32))
                    hit = (code > limit[:, None]).to(tl.int32)
                    hits = tl.sum(hit, axis=1)
            else:
                room = count + hits <= CAPACITY
                hit = hit & room.to(tl.int32)[:, None]
                hits = tl.where(room, hits, CAPACITY + 1)
            entry = (code.to(tl.int64) << 32) | (m ^ LOW_BITS).to(tl.int64)[None, :]
            tl.store(lists + count[:, None] + tl.cumsum(hit, axis=1) - 1, entry, mask=hit > 0)
            count = tl.minimum(count + hits, CAPACITY + 1)
    if MODE == MAXIMA:
        pointers = maxima + (row * parts + part)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(pointers, greatest, mask=(p < P)[:, None])
    elif MODE == COLLECT:
        tl.store(counts + row * parts + part, count, mask=p < P)
    else:
        tl.store(counts + row * parts + part, count, mask=p < tl.where(begin < end, P, 0))


@triton.jit
def _threshold(maxima, thresholds, rows, groups, top_k, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Grid (blocks of rows = N * P): what scores must exceed to be as great as the top_k-th of a row's maxima."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    length = tl.where(row < rows, groups, 0)
    reached = kth_greatest(maxima + row[:, None] * groups, length, groups, top_k, LEAST_INT, 32, WIDTH)
    tl.store(thresholds + row, tl.maximum(reached, LEAST + 1) - 1, mask=row < rows)


@triton.jit
def _finish(
    counts,
    entries,
    score,
    index,
    P,
    blocks,
    parts,
    top_k,
    slots,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid (blocks of queries * N): the top_k best of all parts, in order; score and index (N, slots, P)."""
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    row = (n * P + p) * parts
    lists = entries + row[:, None] * CAPACITY
    nothing = tl.full((ROWS,), NOTHING, tl.int64)
    total = tl.zeros((ROWS,), tl.int32)
    for part in range(parts):
        length = tl.load(counts + row + part, mask=p < P, other=0)
        total = compact(lists, part * CAPACITY, length, tl.max(length, axis=0), total, nothing, WIDTH)
    longest = tl.max(total, axis=0)
    bar = kth_greatest(lists, total, longest, top_k, NOTHING, 64, WIDTH)
    total = compact(lists, 0, total, longest, tl.zeros_like(total), bar, WIDTH)
    for first in range(0, top_k, WIDTH):
        place = first + tl.arange(0, WIDTH)[None, :]
        listed = place < total[:, None]
        entry = tl.load(lists + place, mask=listed, other=NOTHING)
        rank = tl.zeros((ROWS, WIDTH), tl.int32)
        for other in range(top_k):
            rival = tl.load(lists + other, mask=other < total[:, None], other=NOTHING)
            rank += (rival > entry).to(tl.int32)
        code = (entry >> 32).to(tl.int32)
        value = (code ^ ((code >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        at = (n * slots + rank) * P + p[:, None]
        tl.store(score + at, value, mask=listed)
        tl.store(index + at, (entry & LOW_BITS) ^ LOW_BITS, mask=listed)


@triton.jit
def _gather(
    weight,
    index,
    value,
    out,
    value_n,
    value_o,
    value_c,
    value_m,
    slots,
    P,
    columns,
    p_blocks,
    column_blocks,
    VALUE_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (query blocks * column blocks * N). Contiguous: weight, index (N, slots, P), out (N, columns, P)."""
    p = tl.program_id(0) % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.program_id(0) // p_blocks % column_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    n = (tl.program_id(0) // p_blocks // column_blocks).to(tl.int64)
    acc = tl.zeros((BLOCK_P, BLOCK_V), tl.float32)
    for slot in range(slots):
        at = (n * slots + slot) * P + p
        m = tl.load(index + at, mask=p < P, other=-1)
        w = tl.load(weight + at, mask=m >= 0, other=0.0)
        end = tl.where(m >= 0, m + 1, m)
        v = load_columns(value + n * value_n, m, column, value_m, value_o, value_c, end, columns, VALUE_C)
        acc += w[:, None] * v.to(tl.float32)
    pointers = out + (n * columns + column)[None, :] * P + p[:, None]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(p < P)[:, None] & (column < columns)[None, :])


@triton.jit
def _weight_gradient(
    grad,
    index,
    value,
    grad_weight,
    grad_n,
    grad_o,
    grad_c,
    grad_p,
    value_n,
    value_o,
    value_c,
    value_m,
    slots,
    P,
    columns,
    p_blocks,
    VALUE_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (query blocks * slots * N): grad . value[index] over all columns."""
    p = tl.program_id(0) % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    row = (tl.program_id(0) // p_blocks).to(tl.int64)
    n = row // slots
    m = tl.load(index + row * P + p, mask=p < P, other=-1)
    end = tl.where(m >= 0, m + 1, m)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for first in range(0, columns, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        v = load_columns(value + n * value_n, m, column, value_m, value_o, value_c, end, columns, VALUE_C)
        g = load_columns(grad + n * grad_n, p, column, grad_p, grad_o, grad_c, P, columns, VALUE_C)
        total += tl.sum(tl.where((m >= 0)[:, None], v.to(tl.float32) * g.to(tl.float32), 0.0), axis=1)
    tl.store(grad_weight + row * P + p, total, mask=p < P)


@triton.jit
def _gathered_value_gradient(
    grad_rows,
    weight,
    order,
    bounds,
    grad_value,
    P,
    M,
    columns,
    entry_count,
    m_blocks,
    column_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (blocks of positions * column blocks * N).

    Contiguous: grad_rows (N, P, columns), weight and order (N, entry_count), bounds (N, M + 1),
    grad_value (N, columns, M).
    """
    m = tl.program_id(0) % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) // m_blocks % column_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    n = (tl.program_id(0) // m_blocks // column_blocks).to(tl.int64)
    begin = tl.load(bounds + n * (M + 1) + m, mask=m < M, other=0)
    end = tl.load(bounds + n * (M + 1) + m + 1, mask=m < M, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for step in range(tl.max(end - begin, axis=0)):
        listed = begin + step < end
        entry = tl.load(order + n * entry_count + begin + step, mask=listed, other=0)
        w = tl.load(weight + n * entry_count + entry, mask=listed, other=0.0)
        pointers = grad_rows + (n * P + entry % P)[:, None] * columns + column[None, :]
        g = tl.load(pointers, mask=listed[:, None] & (column < columns)[None, :], other=0.0)
        acc += w[:, None] * g.to(tl.float32)
    pointers = grad_value + (n * columns + column)[None, :] * M + m[:, None]
    tl.store(
        pointers, acc.to(grad_value.dtype.element_ty), mask=(m < M)[:, None] & (column < columns)[None, :]
    )


def scan_launch(scores: Scores, top_k: int, mode: tl.constexpr) -> tuple[dict[str, Any], dict[str, int]]:
    """Compile-time arguments and options of ``_scan``; all modes cut the scores into the same tiles."""
    half, tensor_memory = scores.kind == "half", scores.target.architecture.products == "tcgen05"
    block_p = block_of(scores.queries, 64)
    block_m = block_of(scores.memory, 64 if half else 32)
    blocks = {
        "BLOCK_P": block_p,
        "BLOCK_M": block_m,
        "BLOCK_C": MIN_BLOCK if scores.kind == "tf32x3" else channel_block(scores),
        "MODE": mode.value,
        "CAPACITY": triton.cdiv(top_k, LIST_WIDTH) * LIST_WIDTH + 2 * block_m,
        "WIDTH": LIST_WIDTH if tensor_memory else REPAIR_WIDTH,
    }
    warps = 4 if mode.value == COLLECT.value and tensor_memory else 8
    return {**scores.constants, **blocks}, options_of(warps, 2)


def list_width(top_k: int) -> int:
    """Places that a program that works on lists looks at in a step."""
    return min(MAX_LIST_WIDTH, max(LIST_WIDTH, power_of_two(top_k)))


def memory_select(
    query: Tensor,
    key: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    precision: str,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Return each query's exact top_k greatest scores and their memory positions; ties go to the lowest position.

    Arguments as those of `memory_read`.

    Returns:
        score (N, top_k, P) float32, falling, and index (N, top_k, P) int64; -inf and -1 where fewer positions have a
        score above -inf.

    Memory: 8 (top_k + 160) + 260 bytes per query and part of the memory; parts are as many as fill the device, at most
    MAX_PARTS.
    """
    scores = score_operands(query, key, shrinkage, query_bias, key_bias, scale, precision)
    batch, queries, memory = scores.batch, scores.queries, scores.memory
    score = torch.full((batch, top_k, queries), -torch.inf, device=query.device)
    index = torch.full((batch, top_k, queries), -1, dtype=torch.int64, device=query.device)
    kept = min(top_k, memory)
    if score.numel() == 0 or kept == 0:
        return score, index
    constants, options = scan_launch(scores, kept, MAXIMA)
    block_m, capacity = constants["BLOCK_M"], constants["CAPACITY"]
    tiles = triton.cdiv(queries, constants["BLOCK_P"])
    steps = triton.cdiv(memory, block_m)
    wanted = max(
        splits_for(tiles * batch, steps, scores.target, resident=2),
        min(triton.cdiv(GROUPS_PER_CHOICE * kept, block_m), steps // 2),
    )
    parts = triton.cdiv(steps, triton.cdiv(steps, max(1, min(wanted, MAX_PARTS))))
    integers: dict[str, Any] = {"dtype": torch.int32, "device": query.device}
    maxima = torch.empty((batch, queries, parts, block_m), **integers)
    thresholds = torch.full((batch, queries), LEAST.value, **integers)
    counts = torch.empty((batch, queries, parts), **integers)
    entries = torch.empty((batch, queries, parts, capacity), dtype=torch.int64, device=query.device)
    rest = (ends_of(key_bias), maxima, thresholds, counts, entries, batch, tiles, parts, kept)
    lists = {"ROWS": LIST_ROWS, "WIDTH": list_width(kept), **options_of(4, 2)}
    with launch_on(key):
        grid = (tiles * batch * parts,)
        if memory > capacity:
            _scan[grid](*scores.arguments, *rest, **constants, **options)
            rows = batch * queries
            widest = {**lists, "WIDTH": MAX_LIST_WIDTH}
            grid_rows = (triton.cdiv(rows, LIST_ROWS),)
            _threshold[grid_rows](maxima, thresholds, rows, parts * block_m, kept, **widest)
        for mode in (COLLECT, REPAIR):
            constants, options = scan_launch(scores, kept, mode)
            _scan[grid](*scores.arguments, *rest, **constants, **options)
        blocks = triton.cdiv(queries, LIST_ROWS)
        _finish[(blocks * batch,)](
            *(counts, entries, score, index, queries, blocks, parts, kept, top_k), CAPACITY=capacity, **lists
        )
    return score, index


GATHER_BLOCKS = {"BLOCK_P": 16, "BLOCK_V": 128}
"""Tiles of ``_gather`` and ``_weight_gradient``."""

SCATTER_BLOCKS = {"BLOCK_M": 16, "BLOCK_V": 128}
"""Tiles of ``_gathered_value_gradient``."""


def memory_gather(weight: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Sum over K of weight (N, K, P) float32 times value (N, O, Cv, M) at index (N, K, P) int64; -1 adds nothing.

    Returns (N, O, Cv, P) in the value's dtype. Values may have any strides; channel-last is fastest.
    """
    _check_gather(weight, index, value)
    batch, objects, channels, _ = value.shape
    columns, queries = objects * channels, weight.shape[2]
    out = value.new_empty((batch, objects, channels, queries))
    if out.numel() == 0:
        return out
    p_blocks = triton.cdiv(queries, GATHER_BLOCKS["BLOCK_P"])
    column_blocks = triton.cdiv(columns, GATHER_BLOCKS["BLOCK_V"])
    with launch_on(value):
        _gather[(p_blocks * column_blocks * batch,)](
            weight.contiguous(),
            index.contiguous(),
            value,
            out,
            *value.stride(),
            weight.shape[1],
            queries,
            columns,
            p_blocks,
            column_blocks,
            VALUE_C=channels,
            **GATHER_BLOCKS,
            **options_of(4, 3),
        )
    return out


def memory_gather_backward(
    grad: Tensor, weight: Tensor, index: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `memory_gather` with respect to weight and value, contiguous, the same on every run.

    grad (N, O, Cv, P) in the value's dtype. Memory: a copy of grad, and 24 bytes per entry of index for its sort.
    """
    _check_gather(weight, index, value)
    batch, objects, channels, memory = value.shape
    slots, queries = weight.shape[1:]
    columns, entries = objects * channels, slots * queries
    grad_weight = weight.new_zeros(weight.shape)
    grad_value = value.new_zeros(value.shape)
    if batch * columns * memory * entries == 0:
        return grad_weight, grad_value
    grad = grad.to(value.dtype)
    weight, index = weight.contiguous(), index.contiguous()
    grad_rows = grad.flatten(1, 2).transpose(1, 2).contiguous()
    chosen, order = index.view(batch, entries).to(torch.int32).sort(dim=1, stable=True)
    every = torch.arange(memory + 1, dtype=torch.int32, device=value.device).expand(batch, -1).contiguous()
    bounds = torch.searchsorted(chosen, every)
    p_blocks = triton.cdiv(queries, GATHER_BLOCKS["BLOCK_P"])
    m_blocks = triton.cdiv(memory, SCATTER_BLOCKS["BLOCK_M"])
    column_blocks = triton.cdiv(columns, SCATTER_BLOCKS["BLOCK_V"])
    with launch_on(value):
        _weight_gradient[(p_blocks * slots * batch,)](
            grad,
            index,
            value,
            grad_weight,
            *grad.stride(),
            *value.stride(),
            slots,
            queries,
            columns,
            p_blocks,
            VALUE_C=channels,
            **GATHER_BLOCKS,
            **options_of(8, 2),
        )
        _gathered_value_gradient[(m_blocks * column_blocks * batch,)](
            grad_rows,
            weight,
            order,
            bounds,
            grad_value,
            queries,
            memory,
            columns,
            entries,
            m_blocks,
            column_blocks,
            **SCATTER_BLOCKS,
            **options_of(4, 2),
        )
    return grad_weight, grad_value


def _check_gather(weight: Tensor, index: Tensor, value: Tensor) -> None:
    check_dtype("value", value)
    if value.dim() != 4 or weight.dim() != 3 or weight.shape[0] != value.shape[0]:
        raise ValueError(
            f"value must have shape (N,O,Cv,M) for weights {tuple(weight.shape)}, got {tuple(value.shape)}"
        )
    if weight.dtype != torch.float32:
        raise TypeError(f"weight must be float32, got {weight.dtype}")
    if index.shape != weight.shape or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 {tuple(weight.shape)}, got {index.dtype} {tuple(index.shape)}")
