"""Plain float64 definitions of the core matching ops, written for reading: one pixel at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def local_matching(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    radius: list[int],
    dilation: int,
    query_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Distance (N,O,R,H,W) float64 and index (N,O,R,H,W) of the nearest key pixel in each window."""
    height, width = query.shape[-2:]
    y = torch.arange(height).repeat_interleave(width)
    x = torch.arange(width).repeat(height)
    dy, dx = y[None, :] - y[:, None], x[None, :] - x[:, None]
    on_grid = (dy % dilation == 0) & (dx % dilation == 0)
    gap = torch.maximum(dy.abs(), dx.abs())
    windows = torch.stack([on_grid & (gap <= r) for r in radius])
    distance, index = _nearest(query, key, mask.flatten(2)[:, :, None, None] & windows[None, None], 1, query_mask)
    return distance.squeeze(3).unflatten(-1, (height, width)), index.squeeze(3).unflatten(-1, (height, width))


def global_matching(
    query: Tensor, key: Tensor, mask: Tensor, neighbors: int, query_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Distance (N,O,K,H,W) float64 and index of the K nearest key pixels of each object."""
    height, width = query.shape[-2:]
    allowed = mask.flatten(2)[:, :, None, None].expand(-1, -1, 1, height * width, -1)
    distance, index = _nearest(query, key, allowed, neighbors, query_mask)
    return distance.squeeze(2).unflatten(-1, (height, width)), index.squeeze(2).unflatten(-1, (height, width))


def _nearest(
    query: Tensor, key: Tensor, allowed: Tensor, neighbors: int, query_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The ``neighbors`` nearest of the allowed (N,O,R,P,M) pairs, as (N,O,R,K,P)."""
    q, k = query.flatten(2).double().mT, key.flatten(2).double().mT
    pairs = (q[:, :, None] - k[:, None]).square().sum(-1)[:, None, None].expand(allowed.shape)
    candidates = torch.where(allowed & pairs.isfinite(), pairs, torch.inf)
    distance, index = candidates.sort(dim=-1, stable=True)
    short = max(0, neighbors - distance.shape[-1])
    distance = torch.nn.functional.pad(distance, (0, short), value=torch.inf)[..., :neighbors].mT
    index = torch.nn.functional.pad(index, (0, short), value=-1)[..., :neighbors].mT
    unwanted = torch.zeros(q.shape[:2], dtype=torch.bool) if query_mask is None else ~query_mask.flatten(1)
    is_nan = q.isnan().any(-1) & ~unwanted
    distance = torch.where(unwanted[:, None, None, None], torch.inf, distance)
    distance = torch.where(is_nan[:, None, None, None], torch.nan, distance)
    index = torch.where(distance.isfinite(), index, -1)
    return distance, index


def matching_backward(grad: Tensor, query: Tensor, key: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad * distance) in float64, entry by entry."""
    grad_query = torch.zeros(query.shape, dtype=torch.float64)
    grad_key = torch.zeros(key.shape, dtype=torch.float64)
    for n, s, p in (index >= 0).nonzero().tolist():
        m = int(index[n, s, p])
        pull = 2 * grad[n, s, p].double() * (query[n, :, p].double() - key[n, :, m].double())
        grad_query[n, :, p] += pull
        grad_key[n, :, m] -= pull
    return grad_query, grad_key
