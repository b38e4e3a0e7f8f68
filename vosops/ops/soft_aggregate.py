"""Merging the probabilities of independently segmented objects: STM's soft aggregation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vosops import _checks
from vosops.ops._registration import without_autocast

EPSILON = 1e-7
"""What keeps a probability from 0 and from 1."""


def soft_aggregate(
    probabilities: Tensor,
    *,
    background: Tensor | None = None,
    slots: int | None = None,
    return_logits: bool = False,
) -> Tensor:
    """Merge the probabilities of independently segmented objects into one distribution over background and objects.

    A class of probability p has the weight p / (1 - p), its odds, with p clamped to [1e-7, 1 - 1e-7]; the
    background's probability is the product of 1 - p over the objects unless given. The weights are divided by their
    sum.

    Args:
        probabilities: (...,O,H,W) in [0, 1], of each object against everything else; any floating dtype. O may be 0.
        background: (...,H,W) in [0, 1], instead of the product (RGMP: one minus the probability of the union).
        slots: normalise as if there were this many classes, absent ones with probability 1e-7: STM has 11.
        return_logits: return the logarithms of the odds, before the softmax, for example for cross entropy.

    Returns:
        (...,1+O,H,W), background first: always float32, also under autocast (in float16, 1 - 1e-7 is 1 and its odds are
        infinite); float64 for float64. Sums to 1 over the classes; with `slots`, to a little less.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.

    Differentiable to any order in probabilities and background; the gradient of a clamped probability is 0. NaN in an
    object gives NaN in all classes of that pixel. Without gradients, one buffer of the size of the result is
    allocated in addition to the result. Time O(number of elements).

    Source: Oh et al., STM, ICCV 2019, section 3.4; RGMP, CVPR 2018; `aggregate` in STCN, XMem and Cutie.

        >>> import torch, vosops
        >>> apart = torch.tensor([0.9, 0.9, 0.1]).view(3, 1, 1)
        >>> vosops.soft_aggregate(apart).flatten()
        tensor([5.0e-04, 4.9666e-01, 4.9666e-01, 6.1e-03])
    """
    _check(probabilities, background, slots)
    with without_autocast(probabilities.device.type):
        objects = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
        if background is None:
            background = torch.prod(1 - objects, dim=-3)
        shares = torch.cat([background.to(objects.dtype).unsqueeze(-3), objects], dim=-3)
        logits = torch.logit(shares, EPSILON)
        if return_logits:
            return logits
        fused = torch.softmax(logits, dim=-3)
        empty = 0 if slots is None else slots - logits.shape[-3]
        if empty == 0:
            return fused
        weight = torch.logsumexp(logits, dim=-3, keepdim=True)
        return fused * torch.sigmoid(weight - (math.log(empty) + math.log(EPSILON) - math.log1p(-EPSILON)))


def _check(probabilities: Tensor, background: Tensor | None, slots: int | None) -> None:
    """Raise TypeError or ValueError unless the arguments of `soft_aggregate` fit together."""
    if not isinstance(probabilities, Tensor):
        raise TypeError(f"probabilities must be a tensor, got {type(probabilities).__name__}")
    if probabilities.dim() < 3:
        raise ValueError(f"probabilities must have shape (..., O, H, W), got {tuple(probabilities.shape)}")
    _checks.check_floating("probabilities", probabilities)
    if background is not None:
        *batch, _, height, width = probabilities.shape
        _checks.check_tensor("background", background, (*batch, height, width))
        _checks.check_floating("background", background)
        _checks.check_same_device("background", background, "probabilities", probabilities)
    if slots is not None:
        _checks.check_positive_int("slots", slots, 1 + probabilities.shape[-3])
