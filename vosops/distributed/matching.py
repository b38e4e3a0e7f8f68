"""Nearest pixels over the reference frames of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vosops.distributed.exchange import Exchange
from vosops.ops._matching import nearest_mean


def nearest_of_all(
    exchange: Exchange, distance: Tensor, index: Tensor, positions: int
) -> tuple[Tensor, Tensor]:
    """Return the mean (N,O,H,W) of the k least distances over all ranks, and their indices (N,O,k,H,W).

    distance, index: (N,O,k,H,W) of this rank, nearest first, -1 for none. positions: how many pixels its frames have,
    by which the indices of the ranks after it are further.
    """
    if exchange.size == 1:
        return nearest_mean(distance, index), index
    before = sum(count for (count,) in exchange.numbers([positions], index.device)[: exchange.rank])
    index = torch.where(index >= 0, index + before, -1)
    mean, indices = _Nearest.apply(exchange, distance, index)
    return mean, indices


class _Nearest(torch.autograd.Function):
    """Each rank merges the slice of pixels that it has; the gradient of a mean goes to the distances it was made of."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, distance: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        size = distance.shape[-2:]
        pixels = distance.shape[-2] * distance.shape[-1]
        parts = exchange.scatter([distance.flatten(-2), index.flatten(-2)])
        k = distance.shape[2]
        distances = torch.cat([part[0] for part in parts], 2)
        indices = torch.cat([part[1] for part in parts], 2)
        undefined = distances.isnan().any(2)  # a query pixel that is NaN, the same on every rank
        order = torch.where(indices >= 0, distances, torch.inf).sort(dim=2, stable=True).indices[:, :, :k]
        indices = indices.gather(2, order)
        found = distances.gather(2, order).masked_fill(indices < 0, torch.inf)
        mean = nearest_mean(found, indices).masked_fill(undefined, torch.nan)
        whole = exchange.gather([mean, indices], [pixels, pixels])
        mean, indices = (tensor.unflatten(-1, size) for tensor in whole)
        ctx.save_for_backward(index, indices)
        ctx.mark_non_differentiable(indices)
        return mean, indices

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[None, Tensor, None]:
        index, indices = ctx.saved_tensors
        chosen = torch.stack(
            [((own[:, :, None] == indices) & (own[:, :, None] >= 0)).any(2) for own in index.unbind(2)], 2
        )
        count = (indices >= 0).sum(2, keepdim=True).clamp(min=1)
        return None, torch.where(chosen, grad[:, :, None] / count, 0), None
