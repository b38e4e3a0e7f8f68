"""What is minimised, of one sample at a time: the mean over a batch is then the same however it is divided."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vosops.training.config import Loss
from vosops.training.losses import IGNORED, annealed_share, bootstrapped_cross_entropy, dice_loss

__all__ = ["sample_loss"]


def sample_loss(logits: Tensor, labels: Tensor, loss: Loss, step: int) -> Tensor:
    """Return the loss of one sample, a scalar in float32.

    logits: (T,K,h,w) of a clip's frames. labels: (T,H,W) integer, 255 where nothing counts; those of K and above count
    nothing either. One class alone is a foreground, whose background has logits of 0.
    """
    logits = logits.float()
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    labels = labels.long().where(labels < logits.shape[1], IGNORED)
    if logits.shape[2:] != labels.shape[1:]:
        if loss.at == "labels":
            logits = functional.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
        else:
            near = functional.interpolate(labels[:, None].float(), logits.shape[2:], mode="nearest-exact")
            labels = near[:, 0].long()
    total = _cross_entropy(logits, labels, annealed_share(step, loss.anneal, loss.share))
    if loss.dice:
        total = total + loss.dice * dice_loss(logits, labels)
    return total


def _cross_entropy(logits: Tensor, labels: Tensor, share: float) -> Tensor:
    """Return the mean over the pixels that count, or over the hardest share of all pixels."""
    if share < 1:
        return bootstrapped_cross_entropy(logits, labels, share=share)
    total = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)
