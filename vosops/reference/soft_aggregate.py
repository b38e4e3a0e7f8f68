"""STM's fusing of objects as it is written in its descendants: clamp, logarithm of the odds, softmax."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-7
"""What keeps a probability from 0 and from 1."""


def soft_aggregate(
    probabilities: Tensor,
    *,
    background: Tensor | None = None,
    slots: int | None = None,
    return_logits: bool = False,
) -> Tensor:
    """See :func:`vosops.soft_aggregate`; float64 stays float64 here."""
    probabilities = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    if background is None:
        background = torch.prod(1 - probabilities, dim=-3)
    shares = torch.cat([background.to(probabilities.dtype).unsqueeze(-3), probabilities], dim=-3)
    clamped = shares.clamp(EPSILON, 1 - EPSILON)
    logits = torch.log(clamped / (1 - clamped))
    if return_logits:
        return logits
    classes = shares.shape[-3]
    empty = torch.full_like(logits[..., :1, :, :], EPSILON).logit()
    missing = [empty] * ((slots or classes) - classes)
    return torch.softmax(torch.cat([logits, *missing], dim=-3), dim=-3)[..., :classes, :, :]
