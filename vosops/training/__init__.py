"""What training the reference systems takes: losses, and clips of annotated videos."""

from vosops.training.clips import ClipSampler
from vosops.training.losses import aggregated_cross_entropy, annealed_share, bootstrapped_cross_entropy

__all__ = ["ClipSampler", "aggregated_cross_entropy", "annealed_share", "bootstrapped_cross_entropy"]
