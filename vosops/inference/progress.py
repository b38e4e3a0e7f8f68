"""How a run tells the outside how it goes on."""

from __future__ import annotations

from typing import Protocol


def never() -> bool:
    """Do not ask a run to stop."""
    return False


class Progress(Protocol):
    """Is told of stages and of each frame done."""

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
