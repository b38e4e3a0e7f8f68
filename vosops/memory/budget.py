"""Budgets in bytes."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*?)b?\s*", re.IGNORECASE)


class MemoryBudgetError(RuntimeError):
    """The permanent frames do not fit the budget; the bank is unchanged."""

    needed: int | None = None
    """Bytes that the budget must be at least, where that is known."""
    what: str = ""
    """What needs them."""
    fit: int | None = None
    """How many permanent frames fit."""

    @classmethod
    def of(cls, needed: int, what: str, budget: int | None, fit: int | None = None) -> MemoryBudgetError:
        """Return the error of a budget that is known to be too small, and by how much."""
        fitting = "" if fit is None else f": {fit} fit"
        error = cls(f"budget must be at least {needed} bytes for {what}, got {budget}{fitting}")
        error.needed, error.what, error.fit = needed, what, fit
        return error


def parse_bytes(text: str | int) -> int:
    """Return a number of bytes from "2GB", "512 MiB", "1.5g" or an int; decimal units unless written with an i.

    Raises ValueError for anything else, or less than one byte.

        >>> from vosops.memory import parse_bytes
        >>> parse_bytes("2GB"), parse_bytes("1.5 MiB")
        (2000000000, 1572864)
    """
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    unit = match[2].lower() if match else ""
    if isinstance(text, int) and not isinstance(text, bool):
        count = text
    elif match and unit in _UNITS:
        count = int(float(match[1]) * _UNITS[unit])
    else:
        raise ValueError(f"a size must be a number of bytes such as 2GB or 512MiB, got {text!r}")
    if count < 1:
        raise ValueError(f"a size must be at least one byte, got {text!r}")
    return count
