"""What *Continue* does where a run has passed a frame that was corrected since: it follows again from that frame.

What was found before the frame stays. A run that goes both ways has up to two parts that are affected: the one
forward, from the earliest corrected frame behind the run's first one, and the one backward, from the latest before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vosops.io.errors import InputError, ResumeError
from vosops.io.outputs import OwnedFolder
from vosops.runs.checkpoint import RunState
from vosops.runs.report import RESUME

from .follow import FollowRequest, changed_marks, given_to, mark_of, marks_of
from .jobs import Job
from .project import Project

__all__ = ["Again", "again"]


@dataclass(frozen=True)
class Again:
    """What to follow in place of going on with a run.

    Attributes:
        frame: The corrected frame that it is followed from again.
        parts: What to follow, one after the other.
    """

    frame: int
    parts: list[FollowRequest]

    @property
    def request(self) -> dict[str, Any]:
        """The request of a job that does it."""
        return {"parts": [asdict(part) for part in self.parts]}


def again(project: Project, job: Job) -> Again | None:
    """Return what to follow in place of a paused job; None: it can go on, or says itself why it cannot."""
    folder = project.run_folder(job.memory["run"]) if "run" in job.memory else None
    done = project.frames_of(folder) if folder is not None else set()
    if folder is None or not done:
        return None
    try:
        parts = FollowRequest.parts_of(job, project)[job.memory.get("part", 0) :]
        before = RunState(OwnedFolder(folder, RESUME)).arguments()
        _, given, others = given_to(project, parts[0], folder)
    except (InputError, ResumeError):
        return None
    run = _Passed(project, parts[0], before, marks_of(given, others), done)
    if not run.changed or run.goes_on():
        return None
    found = list(run.parts())
    return Again(run.corrected(), [*found, *parts[1:]]) if found else None


class _Passed:
    """A run that rests: which frames it has done, and which marks have changed since it began."""

    def __init__(
        self,
        project: Project,
        request: FollowRequest,
        before: dict[str, Any],
        now: dict[str, dict[str, str]],
        done: set[int],
    ) -> None:
        self.project, self.request, self.before, self.now = project, request, before, now
        self.changed = changed_marks(before, now)
        given = [int(frame) for frame in before["masks"]]
        self.first = min(given) if request.direction == "all" else request.frame
        self.low, self.high = min(done), max(done)
        self.above = [frame for frame in self.changed if self.first < frame <= self.high]
        self.below = [frame for frame in self.changed if self.low <= frame < self.first]

    def goes_on(self) -> bool:
        """Whether the run meets every change on its way forward, or rests on it."""
        before, now = self.before["masks"], self.now["masks"]
        forward = self.request.direction != "backward" and self.low == self.first
        return (
            forward
            and self.before["other masks"] == self.now["other masks"]
            and all(
                frame > self.high or (frame == self.high and str(frame) in now and str(frame) not in before)
                for frame in self.changed
            )
        )

    def corrected(self) -> int:
        """Return the frame to name to the person: the corrected one that most depends on, else any that changed."""
        if self.first in self.changed:
            return self.first
        return min(self.above, default=max(self.below, default=self.changed[0]))

    def parts(self) -> Iterator[FollowRequest]:
        """Yield what is to be followed again and what is left of the run."""
        direction, until = self.request.direction, self.request.until
        if self.first in self.changed:
            yield self.request
            return
        last = self.project.count - 1 if until is None else until
        if direction != "backward":
            if self.above:
                frame = min(self.above)
                yield FollowRequest("forward", frame if self._is_marked(frame) else frame - 1, until)
            elif self.low == self.first and self.high < last:
                yield FollowRequest("forward", self.high, until)
        if direction != "forward":
            start = self.low
            if self.below:
                frame = max(self.below)
                start = frame if self._is_marked(frame) else frame + 1
            yield from self._backward(start)

    def _backward(self, start: int) -> Iterator[FollowRequest]:
        """Yield what leads from a frame back to where the run ends, by way of the marks between them."""
        if self.request.direction == "backward":
            if start > (self.request.until or 0):
                yield FollowRequest("backward", start, self.request.until)
            return
        marks = [frame for frame in self.project.marks if frame < start and self._is_marked(frame)]
        for frame in (start, *reversed(marks)):
            if frame > 0:
                yield FollowRequest("backward", frame)

    def _is_marked(self, frame: int) -> bool:
        return mark_of(self.project, frame) is not None
