"""What local and global matching share around their cores: masks in, normalised distances out."""

from __future__ import annotations

import torch
from torch import Tensor

from vosops._checks import INTEGER_DTYPES, check_positive_int, check_same_device, check_tensor

IGNORED_LABEL = 255


def object_masks(mask: Tensor, num_objects: int | None, key: Tensor) -> Tensor:
    """The boolean masks (N,O,*key.shape[2:]) that `mask` stands for.

    A boolean or floating `mask` (N,O,...) holds one map per object (floating: > 0.5), which may overlap.
    An integer `mask` (N,...) is a label map: value v belongs to object v for v < num_objects, 0 included;
    255 and any other value belong to no object.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    check_same_device("mask", mask, "query", key)
    batch, pixels = key.shape[0], tuple(key.shape[2:])
    if mask.dtype in INTEGER_DTYPES:
        if num_objects is None:
            raise ValueError(f"num_objects must be given with an integer label map (mask is {mask.dtype})")
        count = check_positive_int("num_objects", num_objects, least=0)
        check_tensor("mask", mask, (batch, *pixels))
        if count > IGNORED_LABEL:
            raise ValueError(f"num_objects must be at most {IGNORED_LABEL} with a label map, got {count}")
        labels = torch.arange(count, device=mask.device).view(1, count, *(1,) * len(pixels))
        return mask.long().unsqueeze(1) == labels
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be bool, floating or an integer label map, got {mask.dtype}")
    check_tensor("mask", mask, (batch, "O", *pixels))
    if num_objects is not None and mask.shape[1] != num_objects:
        raise ValueError(f"num_objects must be mask.shape[1] ({mask.shape[1]}) or None, got {num_objects}")
    return mask if mask.dtype == torch.bool else mask > 0.5


def finish_distance(distance: Tensor, bias: Tensor | None, normalize: bool) -> Tensor:
    """Add the object's bias to a raw distance (N,O,...) and map it to [-1, 1] by tanh(d / 2).

    tanh(d / 2) equals FEELVOS' 1 - 2 / (1 + exp(d)), but its derivatives stay finite where exp overflows;
    an infinite distance (no such pixel) gives exactly 1.
    """
    if bias is not None:
        distance = distance + bias.to(distance.dtype).view(1, -1, *(1,) * (distance.dim() - 2))
    return torch.tanh(distance / 2) if normalize else distance


def nearest_mean(distance: Tensor, index: Tensor) -> Tensor:
    """Mean over dim 2 of the K nearest distances (N,O,K,H,W), of those that there are (index >= 0)."""
    found = index >= 0
    count = found.sum(2)
    mean = torch.where(found, distance, 0).sum(2) / count.clamp(min=1)
    return torch.where(count > 0, mean, distance.select(2, 0))
