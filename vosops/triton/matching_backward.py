"""Gradients of the distances that the matching ops chose, the same on every run.

``_query_gradient`` gathers: a query's gradient is the sum over its slots. ``_key_gradient`` sums segments: a stable
sort of the indices puts the entries that chose a key next to each other, in a fixed order, and one program per key and
128 channels adds them up, 16 at a time. No atomics, and nothing of the size of queries times channels in between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vosops.triton._common import SUPPORTED_DTYPES, compile_options, launch_on

BLOCK_C = 32
BLOCK_P = 64
"""Channels and queries of a program of ``_query_gradient``."""

BLOCK_KEY_C = 128
BLOCK_ENTRIES = 16
"""Channels of a program of ``_key_gradient`` and entries that it adds at a time."""


@triton.jit
def _query_gradient(
    grad,
    query,
    key,
    index,
    out,
    S,
    C,
    P,
    grad_n,
    grad_s,
    grad_p,
    query_n,
    query_c,
    query_p,
    key_n,
    key_c,
    key_m,
    index_n,
    index_s,
    index_p,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid (blocks of queries, blocks of channels, N); ``out`` (N, C, P) is contiguous."""
    p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    n = tl.program_id(2).to(tl.int64)
    inside = (c < C)[:, None] & (p < P)[None, :]
    q = tl.load(query + n * query_n + c[:, None] * query_c + p[None, :] * query_p, mask=inside, other=0.0)
    q = q.to(tl.float32)
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    grad_row = grad + n * grad_n + p * grad_p
    index_row = index + n * index_n + p * index_p
    for _ in range(S):
        m = tl.load(index_row, mask=p < P, other=-1)
        g = tl.load(grad_row, mask=m >= 0, other=0.0)
        chosen = inside & (m >= 0)[None, :]
        k = tl.load(key + n * key_n + c[:, None] * key_c + m[None, :] * key_m, mask=chosen, other=0.0)
        total += tl.where(chosen, g[None, :] * (q - k.to(tl.float32)), 0.0)
        grad_row += grad_s
        index_row += index_s
    tl.store(out + (n * C + c)[:, None] * P + p[None, :], (2.0 * total).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _key_gradient(
    grad,
    query,
    key,
    order,
    bounds,
    out,
    C,
    P,
    M,
    entries,
    grad_n,
    grad_s,
    grad_p,
    query_n,
    query_c,
    query_p,
    key_n,
    key_c,
    key_m,
    BLOCK_C: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """Grid (keys, blocks of channels, N). Contiguous: out (N, C, M), order (N, entries), bounds (N, M + 1)."""
    m = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    n = tl.program_id(2).to(tl.int64)
    k = tl.load(key + n * key_n + c * key_c + m * key_m, mask=c < C, other=0.0).to(tl.float32)
    begin = tl.load(bounds + n * (M + 1) + m)
    end = tl.load(bounds + n * (M + 1) + m + 1)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(begin, end, BLOCK_ENTRIES):
        position = first + tl.arange(0, BLOCK_ENTRIES)
        listed = position < end
        entry = tl.load(order + n * entries + position, mask=listed, other=0)
        s = entry // P
        p = entry % P
        g = tl.load(grad + n * grad_n + s * grad_s + p * grad_p, mask=listed, other=0.0)
        chosen = listed[:, None] & (c < C)[None, :]
        q = tl.load(query + n * query_n + p[:, None] * query_p + c[None, :] * query_c, mask=chosen, other=0.0)
        total += tl.sum(tl.where(chosen, g[:, None] * (k[None, :] - q.to(tl.float32)), 0.0), axis=0)
    tl.store(out + (n * C + c) * M + m, (2.0 * total).to(out.dtype.element_ty), mask=c < C)


def matching_backward(grad: Tensor, query: Tensor, key: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``sum(grad * distance)`` at the chosen pairs with respect to query and key.

    Args:
        grad: (N, S, P) float32: the gradient of each distance.
        query: (N, C, P) float32, float16 or bfloat16, any strides.
        key: (N, C, M), the same dtype.
        index: (N, S, P) int64: the key of each entry; entries of -1 contribute nothing, whatever their ``grad``.

    Returns:
        The gradients of query and key, contiguous and in their dtypes, accumulated in float32 in a fixed order.

    Memory: 24 bytes per entry for the sort. A key chosen by many entries takes a step for every 16 of them.
    """
    if query.dtype not in SUPPORTED_DTYPES or key.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            "query and key must be float32, float16 or bfloat16 for the Triton kernels, "
            f"got {query.dtype} and {key.dtype}"
        )
    batch, channels, queries = query.shape
    keys, slots = key.shape[2], index.shape[1]
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    if index.numel() == 0 or grad_query.numel() == 0 or grad_key.numel() == 0:
        return grad_query.zero_(), grad_key.zero_()
    entries = slots * queries
    chosen, order = index.reshape(batch, entries).to(torch.int32).sort(dim=1, stable=True)
    every_key = torch.arange(keys + 1, dtype=torch.int32, device=key.device).expand(batch, -1).contiguous()
    bounds = torch.searchsorted(chosen, every_key)
    with launch_on(query):
        _query_gradient[(triton.cdiv(queries, BLOCK_P), triton.cdiv(channels, BLOCK_C), batch)](
            grad,
            query,
            key,
            index,
            grad_query,
            slots,
            channels,
            queries,
            *grad.stride(),
            *query.stride(),
            *key.stride(),
            *index.stride(),
            BLOCK_C=BLOCK_C,
            BLOCK_P=BLOCK_P,
            **compile_options(4),
        )
        _key_gradient[(keys, triton.cdiv(channels, BLOCK_KEY_C), batch)](
            grad,
            query,
            key,
            order,
            bounds,
            grad_key,
            channels,
            queries,
            keys,
            entries,
            *grad.stride(),
            *query.stride(),
            *key.stride(),
            BLOCK_C=BLOCK_KEY_C,
            BLOCK_ENTRIES=BLOCK_ENTRIES,
            **compile_options(4),
        )
    return grad_query, grad_key
