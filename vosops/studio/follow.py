"""Following objects: the loop of ``vosops segment``, from any frame, in either direction, with a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from vosops import _verdicts
from vosops.inference.loop import TrackingLoop, frame_range
from vosops.inference.settings import find_dtype, make_tracker
from vosops.io.errors import InputError, ResumeError
from vosops.io.files import sha256
from vosops.io.frames import FrameSource
from vosops.io.labels import davis_palette, read_labels
from vosops.io.masks import GivenMask, MaskSet, write_labels
from vosops.io.outputs import OwnedFolder
from vosops.io.resize import resize_frame, resize_labels
from vosops.io.seeking import SeekableVideo
from vosops.models._tracking import ids_of
from vosops.runs.checkpoint import CHECKPOINT_EVERY, RunState
from vosops.runs.job import Settings
from vosops.runs.report import RESUME, FrameRecord

from .doubts import confidence_of
from .jobs import Control, Job
from .project import Project

if TYPE_CHECKING:
    from vosops.io.frames import Image
    from vosops.models import VideoTracker

__all__ = [
    "Engine",
    "FollowRequest",
    "WithReferences",
    "changed_marks",
    "given_to",
    "mark_of",
    "marks_of",
    "own_reader",
    "reading",
]

Direction = Literal["all", "forward", "backward"]
_MOST_REFERENCES = 16
_MARKS = ("masks", "other masks")  # of a run's arguments: what a person may change while it rests


@dataclass(frozen=True)
class FollowRequest:
    """What to follow.

    Attributes:
        direction: "all" is what ``vosops segment`` does with every mark: forward from the first to the end, then
            backward from it. "forward" and "backward" go on from one frame, whose mark, or else whose result, is the
            truth; other marks are remembered.
        frame: That frame.
        until: The last frame; None: the end of the video, and backward the frame after the mark before.
    """

    direction: Direction
    frame: int = 0
    until: int | None = None

    @classmethod
    def parse(cls, request: dict[str, Any], project: Project) -> FollowRequest:
        """Return what JSON asks for; InputError if it cannot be."""
        direction: Any = request.get("direction")
        if direction not in get_args(Direction):
            raise InputError(f"direction must be one of {', '.join(get_args(Direction))}, got {direction!r}")
        numbers = {name: request.get(name) for name in ("frame", "until")}
        for name, value in numbers.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise InputError(f"{name} must be a frame's number, got {value!r}")
        frame, until = numbers["frame"] or 0, numbers["until"]
        project.check_frame(frame)
        if until is not None:
            project.check_frame(until)
            if (direction == "forward" and until < frame) or (direction == "backward" and until > frame):
                raise InputError(f"until must be in direction {direction} from frame {frame}, got {until}")
        return cls(direction, frame, until)

    @classmethod
    def parts_of(cls, job: Job, project: Project) -> list[FollowRequest]:
        """Return what a job follows, one after the other."""
        return [cls.parse(part, project) for part in job.request.get("parts", [job.request])]


class WithReferences:
    """A tracker that has seen other marked frames before it starts: a :class:`vosops.models.VideoTracker`.

    ``initialize`` shows it the references first, so that what a person marked elsewhere is remembered permanently,
    then the frame it starts from. Objects that this frame does not show are known but nowhere in it.

    Args:
        tracker: What tracks.
        references: Yields (frame (3,H,W), labels (H,W)) at the size of the computation, each time it is called.
    """

    def __init__(
        self, tracker: VideoTracker, references: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    ) -> None:
        self.tracker = tracker
        self.references = references

    def initialize(self, frame: Tensor, labels: Tensor) -> None:
        """See :class:`vosops.models.VideoTracker`."""
        started = False
        for picture, truth in [*self.references(), (frame, labels)]:
            if started:
                self.tracker.step(picture, labels=truth, permanent=True)
            elif ids_of(truth):
                self.tracker.initialize(picture, truth)
                started = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tracker, name)


@dataclass
class Engine:
    """Makes the tracker once, and follows what the page asks for with it.

    Args:
        settings: The model and how it computes.
        offer: Called with each project, frame and image that was decoded, for previews.
        create: Makes the tracker.
    """

    settings: Settings
    offer: Callable[[Project, int, Image], None] = lambda project, frame, image: None
    create: Callable[[Settings], VideoTracker] = make_tracker
    _made: tuple[Settings, VideoTracker] | None = field(default=None, repr=False)

    def settings_of(self, project: Project) -> Settings:
        """Return the settings with those that the project has of its own."""
        size = project.settings.get("size")
        return replace(self.settings, size=size) if isinstance(size, int) else self.settings

    def follow(self, project: Project, job: Job, control: Control) -> str:
        """Do a job of the kind "follow"; return what came of it."""
        parts = FollowRequest.parts_of(job, project)
        while True:
            number = job.memory.setdefault("part", 0)
            message = self._follow(project, parts[number], job, control)
            if control.should_stop() or number + 1 == len(parts):
                return message
            job.memory = {"part": number + 1}

    def _follow(self, project: Project, request: FollowRequest, job: Job, control: Control) -> str:
        settings = self.settings_of(project)
        known = project.run_folder(job.memory["run"]) if "run" in job.memory else None
        indices, given, others = given_to(project, request, known)
        masks = MaskSet(given, project.source.size)
        tracker = self._tracker(settings)
        arguments = {
            "request": [request.direction, request.frame, request.until],
            **marks_of(given, others),
            **settings.arguments(),
            **_verdicts.arguments(settings.place),
        }
        with reading(project.source) as source:
            loop = TrackingLoop(
                tracker,
                source,
                masks,
                indices,
                short_side=settings.size,
                device=settings.place,
                dtype=find_dtype(settings.dtype),
                naive=settings.naive,
            )
            if others:
                shown = partial(_references, project.source, others, loop)
                loop.tracker = WithReferences(tracker, shown)  # type: ignore[assignment]
            folder = known or project.begin_run()
            job.memory["run"] = folder.name
            run = _Run(project, folder, loop, masks, control, self.offer)
            return run.execute(arguments, project.run_of(folder))

    def _tracker(self, settings: Settings) -> VideoTracker:
        model = replace(settings, size=self.settings.size)
        if self._made is None or self._made[0] != model:
            self._made = (model, self.create(model))
        tracker = self._made[1]
        tracker.reset()
        return tracker


@dataclass
class _Run:
    """One run of the loop into the folder of a run, begun or continued."""

    project: Project
    folder: Path
    loop: TrackingLoop
    masks: MaskSet
    control: Control
    offer: Callable[[Project, int, Image], None]
    _unsynced: list[Path] = field(default_factory=list)

    def execute(self, arguments: dict[str, Any], add: Callable[[FrameRecord], None]) -> str:
        owned = OwnedFolder(self.folder, RESUME)
        state = RunState(owned)
        with owned.locked():
            done, seconds = self._open(state, arguments)
            started = time.monotonic() - seconds
            self.control.begin(self.loop.total, done)
            for frame in self.loop:
                file = owned.file(f"{frame.name}.png")
                write_labels(file, frame.labels.numpy(), davis_palette())
                self._unsynced.append(file.path)
                record = FrameRecord.of(frame)
                state.record.append(record)
                add(record)
                self.offer(self.project, frame.index, frame.image.numpy())
                done += 1
                self.control.advance(frame=frame.index, confidence=confidence_of(record))
                stop = self.control.should_stop()
                if stop or done % CHECKPOINT_EVERY == 0:
                    state.save(self.loop.state_dict(), done, time.monotonic() - started, self._unsynced)
                    self._unsynced.clear()
                if stop:
                    return f"{done} frames"
            facts = {"problem": self.loop.problem, "frames_done": done, "seconds": time.monotonic() - started}
            state.finish(facts, self._unsynced)
        rate = done / max(1e-9, time.monotonic() - started)
        frames = "1 frame" if done == 1 else f"{done} frames"
        return self.loop.problem or f"{frames}, {rate:.1f} frames a second"

    def _open(self, state: RunState, arguments: dict[str, Any]) -> tuple[int, float]:
        """Begin the run, or continue it where its checkpoint is; return frames and seconds spent."""
        if not state.exists:
            state.start(arguments)
            return 0, 0.0
        try:
            before = state.arguments()
            state.check({**arguments, **{key: before.get(key) for key in _MARKS}})
            checkpoint = state.load()
        except ResumeError as error:
            raise InputError(
                f"this cannot continue, for {_reason(error)}: follow again from the frame you want"
            ) from error
        self.project.reload_run(self.folder)
        if checkpoint is None:
            state.start(arguments)
            return 0, 0.0
        self.loop.load_state_dict(checkpoint["propagation"])
        done, seconds = checkpoint["done"], checkpoint["seconds"]
        if any(before.get(key) != arguments[key] for key in _MARKS):
            corrected = self._corrected(before, arguments)
            if corrected is not None:
                self._correct(corrected)
                state.save(self.loop.state_dict(), done, seconds, [])
            state.amend(arguments)
        return done, seconds

    def _corrected(self, before: dict[str, Any], now: dict[str, Any]) -> int | None:
        """Return the frame behind which the run rests, if it was corrected, else None.

        Marks on frames that are still to come were no part of what was done: the loop meets them on its way.

        Raises:
            InputError: A mark changed that the run has used, or on a frame that it has passed.
        """
        changed = changed_marks(before, now)
        latest = self.loop.position - 1
        used = {int(frame) for frame in before["masks"] if int(frame) <= latest}
        forward = self.loop.phase == "forward" and before["other masks"] == now["other masks"]
        for frame in changed:
            passed = frame < latest or frame in used or (frame == latest and frame not in self.masks.frames)
            if passed or not forward:
                raise InputError(
                    f"this cannot continue: it has passed frame {frame}, whose mark changed since. Go to that frame "
                    "and choose Forward from here or Backward from here"
                )
        return latest if latest in changed else None

    def _correct(self, frame: int) -> None:
        labels, _ = self.masks.labels(frame)
        with reading(self.project.source) as reader:
            for raw in reader.forward(range(frame, frame + 1)):
                self.loop.correct(torch.from_numpy(raw.image), torch.from_numpy(labels))


def _reason(error: ResumeError) -> str:
    reason = str(error).partition(": ")[2]
    return reason.removesuffix("Give the same arguments, or --overwrite").rstrip(" .")


def marks_of(given: list[GivenMask], others: list[GivenMask]) -> dict[str, dict[str, str]]:
    """Return what a run remembers of the marks that it was given, by frame, to know later which have changed."""
    kinds = {"masks": given, "other masks": others}
    return {kind: {str(mask.frame): mask.digest for mask in masks} for kind, masks in kinds.items()}


def changed_marks(before: dict[str, Any], now: dict[str, Any]) -> list[int]:
    """Return the frames whose marks differ between the arguments of a run and those of now, ascending."""
    pairs = [(before[kind], now[kind]) for kind in _MARKS]
    return sorted(
        int(frame) for old, new in pairs for frame in {*old, *new} if old.get(frame) != new.get(frame)
    )


def given_to(
    project: Project, request: FollowRequest, run: Path | None
) -> tuple[range, list[GivenMask], list[GivenMask]]:
    """Return the frames to process, the masks on them, and masks of other frames to remember.

    run: the folder of what this has found already, which is not what it began with.
    """
    source = project.source
    count = source.count if source.count_is_exact else None
    marks = {frame: mask for frame in project.marks if (mask := mark_of(project, frame)) is not None}
    if request.direction == "all":
        if not marks:
            raise InputError("nothing is marked yet: mark an object on a frame first")
        return frame_range(None, None, 1, count), list(marks.values()), []
    frame = request.frame
    start = marks.get(frame)
    if start is None:
        labels = None if frame in project.marks else project.labels(frame, "result", without=run)
        if labels is None or not labels.any():
            raise InputError(f"frame {frame} shows no object: mark one there, or follow from another frame")
        record = project.record(frame, without=run)
        title = f"found on frame {frame}"
        digest = f"{frame} {record}"
        start = GivenMask(frame, title, digest, array=labels)
    if request.direction == "forward":
        stop = request.until + 1 if request.until is not None else None
        indices = frame_range(frame, stop, 1, count)
        given = [start, *(mask for number, mask in marks.items() if number > frame and number in indices)]
    else:
        before = max((number for number in marks if number < frame), default=-1)
        first = request.until if request.until is not None else before + 1
        indices = range(first, frame + 1)
        given = [start]
    taken = {mask.frame for mask in given}
    others = [mask for number, mask in marks.items() if number not in taken]
    nearest = sorted(others, key=lambda mask: abs(mask.frame - frame))[:_MOST_REFERENCES]
    return indices, given, sorted(nearest, key=lambda mask: mask.frame)


def mark_of(project: Project, frame: int) -> GivenMask | None:
    """Return the mark of a frame; None where no object is in it."""
    path = project.mark_path(frame)
    try:
        labels, _ = read_labels(path)
    except InputError:  # taken back in the meantime
        return None
    return GivenMask(frame, path.name, sha256(path), path=path) if labels.any() else None


def _references(
    source: FrameSource, masks: list[GivenMask], loop: TrackingLoop
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the frames of masks and their labels at the size of the computation."""
    with reading(source) as reader:
        for mask in masks:
            labels = torch.from_numpy(mask.read()[0])
            for raw in reader.forward(range(mask.frame, mask.frame + 1)):
                frame = resize_frame(torch.from_numpy(raw.image).permute(2, 0, 1), loop.compute_size)
                small = resize_labels(labels, loop.compute_size, ids_of(labels))
                yield frame.to(loop.device), small.long().to(loop.device)


def own_reader(source: FrameSource) -> FrameSource:
    """Return a source for another thread than the one that reads this one."""
    return source.twin() if isinstance(source, SeekableVideo) else source


@contextmanager
def reading(source: FrameSource) -> Iterator[FrameSource]:
    """Yield :func:`own_reader` of a source, and close its decoder at the end."""
    reader = own_reader(source)
    try:
        yield reader
    finally:
        if isinstance(reader, SeekableVideo):
            reader.close()
