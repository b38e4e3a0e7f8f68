"""The progress and the result of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["Progress", "Result", "Silent"]


class Progress(Protocol):
    """What receives the progress of a run."""

    def begin(self, steps: int, done: int) -> None:
        """Begin a run of `steps` steps, of which some are done."""

    def advance(self, step: int, figures: dict[str, float]) -> None:
        """Report the figures after a step."""

    def note(self, text: str) -> None:
        """Report an event, in a line."""


class Silent:
    """Reports nothing."""

    def begin(self, steps: int, done: int) -> None:
        """See :class:`Progress`."""

    def advance(self, step: int, figures: dict[str, float]) -> None:
        """See :class:`Progress`."""

    def note(self, text: str) -> None:
        """See :class:`Progress`."""


@dataclass(frozen=True)
class Result:
    """The result of a run: its steps, the file of weights, scores, skipped files, seconds, peak bytes."""

    steps: int
    weights: Path
    score: float | None
    best: float | None
    problems: tuple[str, ...]
    seconds: float
    peak: int
