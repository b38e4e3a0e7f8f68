"""What happened, frame by frame: a record of each frame on disk, and report.json made from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vosops.inference.loop import SegmentedFrame
from vosops.io.errors import ResumeError, disk_errors
from vosops.io.outputs import OwnedFile, append_line, complete_or_absent, text_of

REPORT = "report.json"
RESUME = "run the same command with --resume"
LOST_SHARE = 0.01  # an object is lost where it has less than this share of its first given mask's pixels
_LEAST_CONFIDENT = 5
_DIGITS = 4


@dataclass(frozen=True)
class FrameRecord:
    """One line of the record: areas in pixels and confidences (mean probability inside) by object id."""

    index: int
    name: str
    time: float
    given: bool
    areas: dict[str, int]
    confidences: dict[str, float]

    @classmethod
    def of(cls, frame: SegmentedFrame) -> FrameRecord:
        """Return the record of a segmented frame."""
        return cls(
            index=frame.index,
            name=frame.name,
            time=frame.time,
            given=frame.given,
            areas={str(i): area for i, area in frame.areas.items()},
            confidences={str(i): round(c, _DIGITS) for i, c in frame.confidences.items()},
        )


class Record:
    """The frames done so far as JSON lines in a file: its memory does not grow with the video."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, frame: FrameRecord) -> None:
        """Add a frame."""
        with disk_errors(str(self.path), RESUME):
            append_line(self.path, json.dumps(asdict(frame)))

    @property
    def size(self) -> int:
        """Bytes written, to return to with :meth:`cut`."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Forget what was written after ``size`` bytes."""
        if self.size > size:
            os.truncate(self.path, size)

    def __iter__(self) -> Iterator[FrameRecord]:
        return self.up_to(self.size)

    def up_to(self, size: int) -> Iterator[FrameRecord]:
        """Yield the frames of the first ``size`` bytes."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                size -= len(line)
                if size < 0:
                    return
                yield self._parsed(line)

    def in_order(self) -> Iterator[FrameRecord]:
        """Yield the frames in input order; holds two numbers a frame."""
        if not self.path.exists():
            return
        offsets = []
        with self.path.open("rb") as file:
            offset = 0
            for line in file:
                offsets.append((self._parsed(line).index, offset))
                offset += len(line)
            for _, offset in sorted(offsets):
                file.seek(offset)
                yield self._parsed(file.readline())

    def _parsed(self, line: bytes) -> FrameRecord:
        try:
            frame = FrameRecord(**json.loads(line))
            if frame.name == os.path.basename(frame.name):  # else it leads to another folder
                return frame
            raise ValueError(frame.name)
        except (TypeError, ValueError) as error:
            raise ResumeError(f"{self.path} is damaged: start again with --overwrite") from error

    def names(self) -> list[tuple[int, str]]:
        """Return (index, name) of every frame, in input order."""
        return sorted((frame.index, frame.name) for frame in self)


class Events:
    """Finds where objects of known first areas are lost and return; feed it the frames in input order."""

    def __init__(self, first_area: dict[str, int]) -> None:
        self._first_area = first_area
        self._visible: dict[str, bool] = {}
        self.found: list[dict[str, Any]] = []

    def add(self, frame: FrameRecord) -> None:
        """Look at the next frame."""
        for object_id, area in frame.areas.items():
            if object_id not in self._first_area:
                continue
            visible = area >= max(1.0, LOST_SHARE * self._first_area[object_id])
            before = self._visible.get(object_id)
            if before is not None and visible != before:
                what = "returned" if visible else "lost"
                self.found.append(
                    {
                        "object": int(object_id),
                        "event": what,
                        "frame": frame.index,
                        "name": frame.name,
                        "text": f"object {object_id} {what} at frame {frame.index}",
                    }
                )
            if before is not None or visible:
                self._visible[object_id] = visible


def write_report(
    path: Path | OwnedFile, record: Record, first_area: dict[int, int], header: dict[str, Any]
) -> list[str]:
    """Write report.json, a frame a line, and return the texts of its events."""
    events = Events({str(i): area for i, area in first_area.items()})
    totals: dict[str, _Total] = {}
    with complete_or_absent(path) as file, text_of(file) as out:
        out.write("{\n")
        for key, value in header.items():
            out.write(f'"{key}": {json.dumps(value)},\n')
        out.write('"frames": [')
        separator = "\n"
        for frame in record.in_order():
            events.add(frame)
            for object_id in frame.areas:
                totals.setdefault(object_id, _Total()).add(frame, object_id)
            out.write(separator + json.dumps(_row(frame)))
            separator = ",\n"
        out.write("\n],\n")
        out.write(f'"objects": {json.dumps({i: t.summary() for i, t in totals.items()})},\n')
        out.write(f'"events": {json.dumps(events.found)}\n}}\n')
    return [event["text"] for event in events.found]


def _row(frame: FrameRecord) -> dict[str, Any]:
    return {
        "frame": frame.index,
        "name": frame.name,
        "time": frame.time,
        "given": frame.given,
        "objects": {i: {"area": area, "confidence": frame.confidences[i]} for i, area in frame.areas.items()},
    }


class _Total:
    """Running summary of one object."""

    def __init__(self) -> None:
        self.frames = 0
        self.area = 0
        self.confidence = 0.0
        self.least: list[tuple[float, int]] = []

    def add(self, frame: FrameRecord, object_id: str) -> None:
        area, confidence = frame.areas[object_id], frame.confidences[object_id]
        if not area:
            return
        self.frames += 1
        self.area += area
        self.confidence += confidence
        self.least = sorted([*self.least, (confidence, frame.index)])[:_LEAST_CONFIDENT]

    def summary(self) -> dict[str, Any]:
        count = max(1, self.frames)
        return {
            "frames_visible": self.frames,
            "mean_area": round(self.area / count, 1),
            "mean_confidence": round(self.confidence / count, _DIGITS),
            "least_confident_frames": [{"frame": index, "confidence": c} for c, index in self.least],
        }
