"""How much the tests try: `make test` what can fail differently, `make test-all` everything, before a release."""

from __future__ import annotations

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


def exhaustive(*values: Any) -> Any:
    """A cell of a grid that runs in exhaustive runs only."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)
