"""How much the tests try: `make test` what can fail differently, `make test-all` everything, before a release."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

import pytest

EXHAUSTIVE = os.environ.get("VOSOPS_EXHAUSTIVE") == "1"
"""Whether every cell of every grid runs, not only those that can fail differently."""

MORE_EXAMPLES = 10
"""How many times more random problems an exhaustive run makes up."""


def examples(usual: int) -> int:
    """How many random problems to make up: VOSOPS_FUZZ_EXAMPLES if that is set, else the usual number or more."""
    chosen = os.environ.get("VOSOPS_FUZZ_EXAMPLES")
    return int(chosen) if chosen else usual * (MORE_EXAMPLES if EXHAUSTIVE else 1)


def interpreter_reason_not() -> str | None:
    """Why Triton's interpreter cannot run here although it is wanted, or None."""
    triton, numpy = (
        tuple(int(part) for part in importlib.metadata.version(name).split(".")[:2])
        for name in ("triton", "numpy")
    )
    if triton < (3, 7) and numpy >= (2, 4):
        return f"the interpreter of Triton {triton[0]}.{triton[1]} needs numpy < 2.4"
    return None


def leave_out(condition: bool, why: str) -> None:
    """Skips a cell of a grid, except in exhaustive runs."""
    if condition and not EXHAUSTIVE:
        pytest.skip(f"{why}; make test-all runs it")


def one_at_a_time(*values_and_usual: tuple[Any, Any]) -> None:
    """Skips a cell of a slow grid in which more than one value is unusual, except in exhaustive runs.

    For values that an implementation treats apart from each other, so that they can only fail one by one.
    """
    unusual = sum(value != usual for value, usual in values_and_usual)
    leave_out(unusual > 1, "values that can only fail one by one")
