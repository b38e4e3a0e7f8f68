"""Whether the order of a folder's frames is beyond doubt."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .listing import few, natural_key, shown


def doubt_about_order(stems: Sequence[str]) -> str | None:
    """Return what is doubtful about names of frames that are in this order, in one line; None if nothing is.

    Doubtful are names of several kinds (``frame1``, ``img2``), two that are one number (``1`` and ``01``), and numbers
    with a sign or a fraction, which their values order (0.25 before 0.5).
    """
    starts: dict[str, str] = {}
    numbers: dict[tuple[object, ...], str] = {}
    for stem in stems:
        starts.setdefault(re.split(r"\d", stem, maxsplit=1)[0].casefold(), stem)
        number = natural_key(stem)[0]
        if number in numbers:
            return f"{shown(numbers[number])} and {shown(stem)} are one number; {shown(numbers[number])} comes first"
        numbers[number] = stem
    if len(starts) > 1 and any(re.search(r"\d", stem) for stem in stems):
        return (
            f"their names do not share one numbering ({few(list(starts.values()))}); they come in this order"
        )
    counted = sorted(stems, key=natural_key)
    for first, second in zip(stems, counted, strict=True):
        if first != second:
            return f"their names are ordered by value, {shown(first)} before {shown(second)}"
    return None
