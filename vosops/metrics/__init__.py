"""How good masks are: region similarity J and boundary accuracy F as DAVIS defines them."""

from vosops.metrics.davis import (
    ObjectScore,
    Statistics,
    boundary_accuracy,
    compare_masks,
    evaluate_sequence,
    region_similarity,
    statistics,
)
from vosops.metrics.folders import EvaluationError, Report, evaluate

__all__ = [
    "EvaluationError",
    "ObjectScore",
    "Report",
    "Statistics",
    "boundary_accuracy",
    "compare_masks",
    "evaluate",
    "evaluate_sequence",
    "region_similarity",
    "statistics",
]
