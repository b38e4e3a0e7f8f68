"""Reporting the progress of a run."""

from __future__ import annotations

from typing import Protocol


def never() -> bool:
    """Do not ask a run to stop."""
    return False


class Progress(Protocol):
    """Receives the stages of a run and each finished frame."""

    def begin(self, what: str, total: int | None, done: int) -> None:
        """Start a stage of ``total`` frames (None: unknown), ``done`` of which an earlier run did."""
        ...

    def advance(self) -> None:
        """Count one more frame of the stage."""
        ...

    def end(self) -> None:
        """Close the stage."""
        ...


class NoProgress:
    """Keeps quiet."""

    def begin(self, what: str, total: int | None, done: int) -> None:
        """Ignore it."""

    def advance(self) -> None:
        """Ignore it."""

    def end(self) -> None:
        """Ignore it."""
