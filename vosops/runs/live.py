"""A run over a live stream: masks as they come, late frames dropped, a report at the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vosops.inference.session import Session
from vosops.io.errors import IncompleteInputError, InputError
from vosops.io.labels import davis_palette, read_labels
from vosops.io.live import LiveSource
from vosops.io.masks import BINARY_OBJECT, write_labels
from vosops.io.outputs import OwnedFolder

from .checkpoint import RunState
from .progress import NoProgress, Progress, never
from .report import REPORT, RESUME, FrameRecord, write_report
from .run import Mode, Summary, check_folder

_LATEST = 1000  # frames over which latencies are reported
_MILLISECONDS = 1000


@dataclass
class LiveRun:
    """Segments a stream into a folder until it ends, ``end`` frames came, or it is asked to stop, which is no error.

    Args:
        out: The folder.
        source: The stream.
        session: What segments; its state is not saved.
        mask: PNG of the objects in the first frame that is taken; 0 and 255 alone are one object, 1.
        arguments: For the report.
        mode: "new" or "overwrite".
        end: Stop before this frame of the stream; None: when it ends.
        progress: Receives progress.
        should_stop: Asked after each frame.
    """

    out: Path
    source: LiveSource
    session: Session
    mask: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    mode: Mode = "new"
    end: int | None = None
    progress: Progress = field(default_factory=NoProgress)
    should_stop: Callable[[], bool] = never

    def execute(self) -> Summary:
        """Run; the summary counts the frames that were segmented.

        Raises:
            InputError: The folder or the mask cannot be used.
            IncompleteInputError: The stream ended with an error; what came before is written.
        """
        if self.mode == "resume":
            raise InputError("--resume cannot be combined with --live: a stream cannot be read again")
        folder = OwnedFolder(self.out, RESUME)
        check_folder(folder, self.mode)
        labels, palette = read_labels(self.mask)
        if set(labels.ravel().tolist()) <= {0, BINARY_OBJECT}:
            labels = (labels > 0).astype("uint8")
        palette = palette or davis_palette()
        self.out.mkdir(parents=True, exist_ok=True)
        with folder.locked():
            folder.remove(folder.names())
            state = RunState(folder)
            state.start(self.arguments)
            return self._run(folder, state, labels, palette)

    def _run(self, folder: OwnedFolder, state: RunState, labels: Any, palette: bytes) -> Summary:
        latencies: deque[float] = deque(maxlen=_LATEST)
        started = time.monotonic()
        done, problem = 0, None
        first_area: dict[int, int] = {}
        self.progress.begin("live", self.end, 0)
        try:
            with self.source:
                for frame in self.source:
                    raw = frame.raw
                    if self.end is not None and raw.index >= self.end:
                        break
                    given = labels if done == 0 else None
                    try:
                        segmented = self.session.push(raw.image, given, time=float(raw.time))
                    except InputError as error:
                        if not done:
                            raise
                        problem = f"{self.source.title} ended at frame {raw.index}: {error}"
                        break
                    first_area = first_area or dict(segmented.areas)
                    write_labels(folder.file(f"{raw.name}.png"), segmented.labels.numpy(), palette)
                    record = FrameRecord.of(segmented)
                    fields = {**vars(record), "index": raw.index, "name": raw.name}
                    state.record.append(FrameRecord(**fields))
                    latencies.append((time.monotonic() - frame.came) * _MILLISECONDS)
                    done += 1
                    self.progress.advance()
                    if self.should_stop():
                        break
        finally:
            self.progress.end()
        seconds = time.monotonic() - started
        problem = problem or self.source.problem
        facts = {
            "complete": problem is None,
            "problem": problem,
            "frames_done": done,
            "frames_received": self.source.received,
            "frames_dropped": self.source.received - done,
            "seconds": round(seconds, 2),
            "latency_ms": _percentiles(latencies),
            "arguments": self.arguments,
        }
        events = write_report(folder.file(REPORT), state.record, first_area, facts)
        if not done:
            raise IncompleteInputError(problem or f"{self.source.title} sent no frame")
        if problem is not None:
            raise IncompleteInputError(f"{problem}. The {done} masks until then are in {self.out}")
        dropped = facts["frames_dropped"]
        return Summary(self.out, done, seconds, [f"{dropped} frames dropped"] * bool(dropped) + events, False)


def _percentiles(values: deque[float]) -> dict[str, float]:
    """Return the 50th and 99th percentile of some milliseconds."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {f"p{p}": round(ordered[min(len(ordered) * p // 100, len(ordered) - 1)], 1) for p in (50, 99)}
