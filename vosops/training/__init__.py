"""What training takes: losses, clips of annotated videos, and the trainer behind ``vosops train``.

The trainer is in modules of its own, which need the extra ``train``: :mod:`vosops.training.config`, `task` and `loop`.
"""

from vosops.training.clips import ClipSampler
from vosops.training.losses import (
    aggregated_cross_entropy,
    annealed_share,
    bootstrapped_cross_entropy,
    dice_loss,
)

__all__ = [
    "ClipSampler",
    "aggregated_cross_entropy",
    "annealed_share",
    "bootstrapped_cross_entropy",
    "dice_loss",
]
