"""Whether a result is right: compared with the reference in float64 on the same, rounded inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vosops.benchmarking.gpu_cases import MODES
from vosops.checking.problems import Problem

RMS = {"ieee": 2e-5, "tf32x3": 5e-5, "tf32": 5e-3, "bf16": 1e-2, "f16": 2e-3}
"""Greatest |result - oracle| / |oracle| over all elements, by arithmetic."""

ELEMENT = {"ieee": 2e-4, "tf32x3": 5e-4, "tf32": 3e-2, "bf16": 4e-2, "f16": 1e-2}
"""Greatest difference of one element, relative to the oracle's greatest."""

GRADIENTS = 4
"""Gradients pass through more products than the results do."""

EXCHANGED = 0.02
"""Share of elements that may be anything where TF32's rounding decides between two candidates."""


def judge(
    results: Sequence[Tensor], expected: Sequence[Tensor], problem: Problem
) -> tuple[str, str, list[float]]:
    """Return "right" or "wrong", why, and the error of each result: of its elements together, relative."""
    if len(results) != len(expected):
        return "wrong", f"{len(results)} results instead of {len(expected)}", []
    errors, reasons = [], []
    for i, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        name = "result" if i == 0 else f"gradient {i}"
        error, reason = compare(result, wanted, problem, GRADIENTS if i else 1)
        errors.append(error)
        if reason:
            reasons.append(f"{name}: {reason}")
    return ("wrong", "; ".join(reasons), errors) if reasons else ("right", "", errors)


def compare(result: Tensor, wanted: Tensor, problem: Problem, factor: float) -> tuple[float, str]:
    """Return the relative error of one result, and what is wrong with it, "" if nothing is."""
    if result.shape != wanted.shape:
        return math.inf, f"shape {tuple(result.shape)} instead of {tuple(wanted.shape)}"
    found, wanted = result.detach().to("cpu", torch.float64), wanted.to("cpu", torch.float64)
    bad = int((found.isfinite() != wanted.isfinite()).sum())
    if bad:
        return math.inf, f"{bad} of {found.numel()} elements are not finite"
    difference = found - wanted
    if difference.numel() == 0:
        return 0.0, ""
    decided = MODES[problem.mode].tf32 and (problem.op.endswith("matching") or "top" in problem.size.name)
    if decided:
        allowed = int(EXCHANGED * difference.numel())
        kept = difference.numel() - allowed
        threshold = difference.abs().flatten().kthvalue(kept).values
        difference = torch.where(difference.abs() > threshold, 0.0, difference)
    error = float(difference.norm() / wanted.norm().clamp(min=1e-30))
    worst = float(difference.abs().max() / wanted.abs().max().clamp(min=1e-30))
    if error > factor * RMS[problem.mode]:
        return error, f"relative error {error:.1e}, at most {factor * RMS[problem.mode]:.0e} is right"
    if worst > factor * ELEMENT[problem.mode]:
        where = tuple(int(i) for i in torch.unravel_index(difference.abs().argmax(), difference.shape))
        return error, f"element {where} is off by {worst:.1e} of the greatest"
    return error, ""
