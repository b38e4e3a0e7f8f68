"""Where a result is to be looked at: lost objects, sudden changes of size, low confidence."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from vosops.runs.report import Events, FrameRecord

__all__ = ["JUMP", "confidence_of", "look_at"]

JUMP = 1.5  # an object whose area becomes this many times larger or smaller from one frame to the next is doubtful
_LEAST_CHANGE = 1e-3  # of the frame's pixels: what changes by less may jump
_CERTAIN = 0.95  # confidence from which on a frame needs no look
_LOOK_AT = 12  # frames that the page suggests to look at
_MOST_JUMPS = 6  # of them, so that a flickering object leaves room for others


def confidence_of(record: FrameRecord) -> float | None:
    """Return the confidence of a frame's least certain object that is visible; None where none is."""
    seen = [record.confidences[number] for number, area in record.areas.items() if area]
    return min(seen, default=None)


def look_at(records: dict[int, FrameRecord], marks: set[int], pixels: int) -> list[dict[str, Any]]:
    """Return the frames that deserve a look, the most doubtful first: lost objects, jumps of size, low confidence.

    Of frames near each other, a fiftieth of the video, only the most doubtful is kept, so that one bad passage is one
    entry.

    Args:
        records: What is known of each frame, ascending.
        marks: The frames that a person marked: they need no look.
        pixels: Of a frame.

    Returns:
        {"frame", "kind": "lost", "size" or "confidence", "why": for a person}.
    """
    found = [entry for entry in _lost(records) if entry["frame"] not in marks][:_LOOK_AT]
    apart = max(2, len(records) // 50)
    jumps = [entry for entry in _jumps(records, pixels) if entry["frame"] not in marks]
    _add(found, jumps, apart, min(_LOOK_AT, len(found) + _MOST_JUMPS))
    _add(found, [entry for entry in _uncertain(records) if entry["frame"] not in marks], apart, _LOOK_AT)
    return found


def _add(found: list[dict[str, Any]], more: list[dict[str, Any]], apart: int, most: int) -> None:
    for entry in more:
        if len(found) < most and all(abs(entry["frame"] - other["frame"]) >= apart for other in found):
            found.append(entry)


def _lost(records: dict[int, FrameRecord]) -> list[dict[str, Any]]:
    areas: dict[str, int] = {}
    for record in records.values():
        for number, area in record.areas.items():
            if area:
                areas.setdefault(number, area)
    events = Events(areas)
    for record in records.values():
        events.add(record)
    return [
        {"frame": event["frame"], "kind": "lost", "why": f"object {event['object']} is lost"}
        for event in events.found
        if event["event"] == "lost"
    ]


def _jumps(records: dict[int, FrameRecord], pixels: int) -> list[dict[str, Any]]:
    """Return the frames on which an object's area is JUMP times that of the frame before, or less than 1 / JUMP of it.

    An object that is not there before or after does not jump: it is lost, or has come.
    """
    found = []
    for before, after in pairwise(records.values()):
        if after.index != before.index + 1:
            continue
        for number, area in after.areas.items():
            old = before.areas.get(number, 0)
            if not (old and area) or abs(area - old) < _LEAST_CHANGE * pixels:
                continue
            factor = max(area / old, old / area)
            if factor > JUMP:
                size = (
                    f"{area / old:.1f} times as large" if area > old else f"at {area / old:.0%} of its size"
                )
                why = f"object {number} is suddenly {size}"
                found.append((factor, {"frame": after.index, "kind": "size", "why": why}))
    return [entry for _, entry in sorted(found, key=lambda item: -item[0])]


def _uncertain(records: dict[int, FrameRecord]) -> list[dict[str, Any]]:
    known = [(confidence_of(record), frame) for frame, record in records.items()]
    return [
        {"frame": frame, "kind": "confidence", "why": f"confidence {value:.2f}"}
        for value, frame in sorted((value, frame) for value, frame in known if value is not None)
        if value < _CERTAIN
    ]
