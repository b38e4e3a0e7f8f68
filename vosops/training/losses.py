"""Losses of video object segmentation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vosops import _checks
from vosops.ops.soft_aggregate import soft_aggregate

IGNORED = 255


def bootstrapped_cross_entropy(
    logits: Tensor, labels: Tensor, *, share: float = 0.15, ignored: int = IGNORED
) -> Tensor:
    """Average the cross entropy over the hardest pixels only (FEELVOS, CFBI, STCN, XMem).

    Args:
        logits: (N,K,H,W) floating, of K classes.
        labels: (N,H,W) integer, the class of each pixel.
        share: the share of the hardest pixels of the batch that count, in (0, 1].
        ignored: the label of pixels that count nothing, though they count as pixels.

    Returns:
        A scalar, in float32 at least: the mean of the chosen losses that are not zero, 0 if all are.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range.

    Examples:
        >>> import torch
        >>> from vosops.training import bootstrapped_cross_entropy
        >>> logits = torch.tensor([0.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
        >>> labels = torch.tensor([[[0, 1], [1, 1]]])
        >>> round(float(bootstrapped_cross_entropy(logits, labels, share=0.25)), 3)
        4.018
    """
    _check(logits, labels)
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    losses = functional.cross_entropy(
        logits.float() if logits.element_size() < 4 else logits,
        labels.long(),
        ignore_index=ignored,
        reduction="none",
    ).flatten()
    hardest = losses.topk(max(1, int(share * losses.numel())), sorted=False).values
    return hardest.sum() / (hardest != 0).sum().clamp(min=1)


def annealed_share(step: int, end: int, share: float = 0.15) -> float:
    """Return the share for :func:`bootstrapped_cross_entropy` at a step: from 1 down to share, linearly until step end.

    Examples:
        >>> from vosops.training import annealed_share
        >>> [round(annealed_share(step, 100), 3) for step in (0, 50, 100, 200)]
        [1.0, 0.575, 0.15, 0.15]
    """
    done = min(1.0, step / end) if end > 0 else 1.0
    return done * share + (1 - done)


def aggregated_cross_entropy(probabilities: Tensor, labels: Tensor, *, ignored: int = IGNORED) -> Tensor:
    """Compute the cross entropy of objects that were segmented separately and then fused (STM, RGMP, STCN, XMem).

    Args:
        probabilities: (N,O,H,W) in [0, 1]: of each object against all else.
        labels: (N,H,W) integer: 0 background, 1 to O the objects.
        ignored: the label of pixels that do not count.

    Returns:
        A scalar in float32: the mean cross entropy of :func:`vosops.soft_aggregate`; 0 if no pixel counts.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape.

    Examples:
        >>> import torch
        >>> from vosops.training import aggregated_cross_entropy
        >>> round(float(aggregated_cross_entropy(torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 2, 2).long())), 3)
        0.693
    """
    _check(probabilities, labels, "probabilities")
    logits = soft_aggregate(probabilities, return_logits=True)
    total = functional.cross_entropy(logits, labels.long(), ignore_index=ignored, reduction="sum")
    return total / (labels != ignored).sum().clamp(min=1)


def dice_loss(logits: Tensor, labels: Tensor, *, ignored: int = IGNORED) -> Tensor:
    """Compute 1 - Dice, averaged over the classes that occur in the labels (Milletari et al., V-Net, 3DV 2016).

    Small objects count as much as large ones, as they do in J. Cost: a softmax, and one class's sums at a time.

    Args:
        logits: (N,K,H,W) floating, of K classes.
        labels: (N,H,W) integer, the class of each pixel.
        ignored: the label of pixels that do not count.

    Returns:
        A scalar in float32: 0 where the prediction is certain and right, and if no pixel counts. The sums of each class
        go over the whole batch.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape.

    Examples:
        >>> import torch
        >>> from vosops.training import dice_loss
        >>> logits = torch.tensor([0.0, 20.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4)
        >>> round(float(dice_loss(logits, torch.tensor([[[1, 1, 1, 0]]]))), 3)
        0.571
    """
    _check(logits, labels)
    counted = labels != ignored
    probabilities = logits.float().softmax(1)
    terms = []
    for number in range(logits.shape[1]):
        true = (labels == number).float()
        found = probabilities[:, number] * counted
        overlap, sizes = (found * true).sum(), (found + true).sum()
        present = true.sum() > 0
        terms.append(torch.stack([(1 - 2 * overlap / sizes.clamp(min=1e-6)) * present, present.float()]))
    total, classes = torch.stack(terms).sum(0)
    mean: Tensor = total / classes.clamp(min=1)
    return mean


def _check(scores: Tensor, labels: Tensor, name: str = "logits") -> None:
    _checks.check_floating(name, scores)
    if scores.dim() != 4:
        raise ValueError(f"{name} must have shape (N, K, H, W), got {tuple(scores.shape)}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    _checks.check_tensor("labels", labels, (scores.shape[0], scores.shape[2], scores.shape[3]))
