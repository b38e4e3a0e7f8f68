"""How good masks are: J and F as DAVIS defines them; of classes, the mean IoU as Cityscapes does."""

from vosops.metrics.classes import (
    Consistency,
    SemanticReport,
    SequenceCounts,
    class_iou,
    confusion_matrix,
    evaluate_semantic,
)
from vosops.metrics.davis import (
    ObjectScore,
    Statistics,
    boundary_accuracy,
    compare_masks,
    evaluate_sequence,
    region_similarity,
    statistics,
)
from vosops.metrics.files import EvaluationError, Problem
from vosops.metrics.folders import Report, evaluate

__all__ = [
    "Consistency",
    "EvaluationError",
    "ObjectScore",
    "Problem",
    "Report",
    "SemanticReport",
    "SequenceCounts",
    "Statistics",
    "boundary_accuracy",
    "class_iou",
    "compare_masks",
    "confusion_matrix",
    "evaluate",
    "evaluate_semantic",
    "evaluate_sequence",
    "region_similarity",
    "statistics",
]
