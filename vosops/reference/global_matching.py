"""Global matching in plain PyTorch: one distance matrix per object."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vosops.reference._matching import finish_distance, nearest_mean, object_masks
from vosops.reference.local_matching import absent_queries


def global_matching_core(
    query: Tensor, key: Tensor, mask: Tensor, neighbors: int, query_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the `neighbors` least raw squared distances to each object's reference pixels, ascending.

    query (N,C,H,W), key (N,C,T,H2,W2), mask bool (N,O,T,H2,W2) -> distance and int64 flat index
    (N,O,K,H,W), +inf and -1 where fewer pixels exist. Differentiable to any order through the distance.
    """
    batch, _, height, width = query.shape
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k = query.to(accumulate).flatten(2), key.to(accumulate).flatten(2)
    usable = k.isfinite().all(1, keepdim=True)
    matched = q.isfinite().all(1)[:, :, None]
    q, k = torch.where(matched.transpose(1, 2), q, 0), torch.where(usable, k, 0)
    squared = q.square().sum(1)[:, :, None] + k.square().sum(1)[:, None, :] - 2 * q.transpose(1, 2) @ k
    squared = squared.clamp(min=0)
    allowed = mask.flatten(2) & usable
    kept = min(neighbors, k.shape[2])
    distances, indices = [], []
    for o in range(mask.shape[1]):
        masked = squared.masked_fill(~(allowed[:, o, None, :] & matched), torch.inf)
        order = torch.sort(masked.detach(), dim=2, stable=True).indices[:, :, :kept]
        nearest = masked.gather(2, order)
        found = nearest < torch.inf
        missing = (0, neighbors - kept)
        indices.append(torch.nn.functional.pad(torch.where(found, order, -1), missing, value=-1))
        distances.append(torch.nn.functional.pad(nearest, missing, value=torch.inf))
    if not distances:
        shape = (batch, 0, neighbors, height, width)
        return q.new_empty(shape), torch.empty(shape, dtype=torch.int64, device=q.device)
    shape = (batch, mask.shape[1], neighbors, height, width)
    distance = torch.stack(distances, 1).transpose(2, 3).reshape(shape)
    index = torch.stack(indices, 1).transpose(2, 3).reshape(shape)
    return absent_queries(distance, index, query, query_mask)


def global_matching(
    query: Tensor,
    key: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor],
    *,
    neighbors: int = 1,
    bias: Tensor | None = None,
    normalize: bool = True,
    num_objects: int | None = None,
    query_mask: Tensor | None = None,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vosops.global_matching` in plain PyTorch; see there. Memory: query times reference pixels."""
    key, mask = stack_frames(key, mask)
    masks = object_masks(mask, num_objects)
    distance, index = global_matching_core(query, key, masks, neighbors, query_mask)
    nearest = nearest_mean(distance, index) if neighbors > 1 else distance.squeeze(2)
    nearest = finish_distance(nearest, bias, normalize)
    return (nearest, index if neighbors > 1 else index.squeeze(2)) if return_indices else nearest


def stack_frames(key: Tensor | Sequence[Tensor], mask: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Key (N,C,T,H,W) and mask of one frame, or of a sequence of frames."""
    if not isinstance(key, Tensor):
        return torch.stack(tuple(key), 2), torch.stack(tuple(mask), -3)
    assert isinstance(mask, Tensor)
    return (key.unsqueeze(2), mask.unsqueeze(-3)) if key.dim() == 4 else (key, mask)
