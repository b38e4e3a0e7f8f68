"""What the two matchings of the reference share around their cores: objects in, normalised distances out."""

from __future__ import annotations

import torch
from torch import Tensor


def object_masks(mask: Tensor, num_objects: int | None) -> Tensor:
    """One boolean mask per object (N,O,...), of one per object (N,O,...) or of a label map (N,...)."""
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point():
        return mask > 0.5
    masks = [mask == label for label in range(num_objects or 0)]
    return (
        torch.stack(masks, 1)
        if masks
        else mask.new_empty((mask.shape[0], 0, *mask.shape[1:]), dtype=torch.bool)
    )


def finish_distance(distance: Tensor, bias: Tensor | None, normalize: bool) -> Tensor:
    """FEELVOS' 1 - 2 / (1 + exp(d + bias)) of raw distances d (N,O,...), or d + bias; NaN stays, without gradient."""
    undefined = distance.isnan()
    distance = distance.masked_fill(undefined, 0)
    if bias is not None:
        distance = distance + bias.to(distance.dtype).view(-1, *(1,) * (distance.dim() - 2))
    distance = 2 * torch.sigmoid(distance) - 1 if normalize else distance
    return distance.masked_fill(undefined, torch.nan)


def nearest_mean(distance: Tensor, index: Tensor) -> Tensor:
    """Mean of the K nearest distances (N,O,K,H,W) of those that exist; where none does, the absent value."""
    exist = index >= 0
    total = distance.masked_fill(~exist, 0).sum(2)
    return torch.where(exist.any(2), total / exist.sum(2).clamp(min=1), distance[:, :, 0])
