"""A whole ``vosops segment`` job: one video, or every sequence of a data set, into an output folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vosops import _verdicts
from vosops.inference.chunks import DEFAULT_OVERLAP, Chunks
from vosops.inference.loop import TrackingLoop, frame_range
from vosops.inference.prompts import InitialPrompts
from vosops.inference.settings import DEFAULT_SIZE, ModelSettings, find_dtype, make_tracker
from vosops.io.datasets import VideoSequence, find_sequences, masks_of_sequence, open_source
from vosops.io.errors import FolderInUseError, IncompleteInputError, InputError, ResumeError, disk_errors
from vosops.io.frames import DEFAULT_FPS, FrameSource
from vosops.io.listing import pictures
from vosops.io.masks import GivenMask, MaskSet, find_masks
from vosops.io.outputs import OwnedFolder, check_result, is_json_with, nearest_folder, write_text
from vosops.io.protection import protect_inputs
from vosops.io.streams import local_path

from .checkpoint import RunState
from .drawing_pass import Outputs
from .fleet import LEASE_SECONDS, Fleet, Lease, LeaseLostError, Outcome, Shard, divide
from .progress import NoProgress, Progress, never
from .report import REPORT, RESUME
from .run import Mode, Summary, VideoRun, check_folder, written_folders

if TYPE_CHECKING:
    from vosops.inference.initial import InitialClasses
    from vosops.models import VideoTracker


@dataclass(frozen=True)
class Settings(ModelSettings):
    """What changes the masks beside the input and its masks: the model's settings, and these.

    Attributes:
        size: Short side of the computation in pixels; -1: the input's own.
        start: First frame number.
        end: Frame number to stop before.
        step: Every step-th frame.
        chunk_frames: Restart the tracker after this many frames; None: never.
        chunk_overlap: Frames before such a seam from which it starts.
    """

    size: int = DEFAULT_SIZE
    start: int | None = None
    end: int | None = None
    step: int = 1
    chunk_frames: int | None = None
    chunk_overlap: int = DEFAULT_OVERLAP

    def arguments(self) -> dict[str, Any]:
        """See :class:`ModelSettings`."""
        own: dict[str, Any] = {"size": self.size, "start": self.start, "end": self.end, "step": self.step}
        if self.chunk_frames is not None:
            own |= {"chunk-frames": self.chunk_frames, "chunk-overlap": self.chunk_overlap}
        return {**super().arguments(), **own}


def _ignored(text: str) -> None:
    """Take a line for the user and show it to nobody."""


@dataclass
class Job:
    """Runs of one command: the model is made once, on the first run that needs it.

    Args:
        out: Output folder.
        mode: What to do with what is in it.
        settings: What changes the masks.
        outputs: What to write beside masks, contact sheet and report.
        fps: Rate of a folder of frames.
        progress: Receives progress.
        should_stop: Asked between frames.
        shard: Which of several workers on a data set this is; None: the only one.
        steal: Also take what other workers have not begun, or cannot finish.
        lease_seconds: How long a worker may make no progress before others take over.
        note: Receives lines for the user.
    """

    out: Path
    mode: Mode = "new"
    settings: Settings = field(default_factory=Settings)
    outputs: Outputs = field(default_factory=Outputs)
    fps: Fraction = DEFAULT_FPS
    progress: Progress = field(default_factory=NoProgress)
    should_stop: Callable[[], bool] = never
    shard: Shard | None = None
    steal: bool = False
    lease_seconds: float = LEASE_SECONDS
    note: Callable[[str], None] = _ignored

    def into(self, out: Path) -> Job:
        """Return a job that writes into another folder, with the same model, which is made once for both."""
        other = replace(self, out=out)
        other.__dict__["_tracker"] = self._tracker
        return other

    def for_workers(self) -> Job:
        """Return the job without what belongs to this process, to be sent to another one."""
        return replace(self, out=self.out.resolve(), progress=NoProgress(), should_stop=never, note=_ignored)

    def video(
        self,
        path: str | Path,
        mask_specs: Sequence[str],
        initial: InitialClasses | InitialPrompts | None = None,
    ) -> Summary:
        """Segment a video or a folder, with masks as ``--mask`` gives them; the first, if so asked, by `initial`."""
        source = open_source(path, self.fps, self._indices())
        indices = self._indices(source.count if source.count_is_exact else None)
        masks = find_masks(mask_specs, source, indices)
        inputs = [
            local_path(path),
            *self.settings.files,
            *(mask.path for mask in masks if mask.path is not None),
            *(initial.files if initial else []),
        ]
        protect_inputs(inputs, written_folders(self.out))  # before a model is made
        if initial is not None:
            check_folder(OwnedFolder(self.out, RESUME), self.mode)
            if isinstance(initial, InitialPrompts):
                first = initial.given_mask(source, indices[0], self._tracker, self.settings.model)
            else:
                first = initial.given_mask(source, indices[0])
            masks.append(first)
        return self._run(self.out, source, indices, masks, inputs)

    def dataset(
        self,
        root: Path,
        names: Sequence[str] = (),
        resolution: str | None = None,
        on_sequence: Callable[[str, Summary | None], None] = lambda name, summary: None,
        only: Sequence[str] | None = None,
    ) -> list[Summary]:
        """Segment every sequence of a data set into ``out/<sequence>``; resumes each on its own.

        ``on_sequence`` is called with a sequence's name when it starts and with its summary when it ended.
        A sequence that cannot be used, or ends early, does not stop the others; the error comes at the end.
        only: of a worker (``shard`` or ``steal``), the sequences that it does, in place of its share.
        """
        sequences = find_sequences(root, names, resolution)
        inputs = [*self.settings.files, *(Path(name) for name in names if Path(name).is_file())]
        for sequence in sequences:
            inputs += [sequence.frames, sequence.masks]
        folders = [folder for s in sequences for folder in written_folders(self.out / s.name)]
        protect_inputs([root / "JPEGImages", root / "Annotations", *inputs], [self.out, *folders])
        if self.shard is not None or self.steal:
            return self._as_worker(root, sequences, inputs, resolution, on_sequence, only)
        self._open_dataset_folder()
        summaries = []
        problems = []
        for sequence in sequences:
            on_sequence(sequence.name, None)
            try:
                summary = self._sequence(sequence, inputs)
            except (IncompleteInputError, InputError) as error:
                problems.append(f"{sequence.name}: {error}")
                continue
            on_sequence(sequence.name, summary)
            summaries.append(summary)
        self._write_dataset_report(summaries, problems)
        _raise_problems(problems, self.out / REPORT)
        return summaries

    def _as_worker(
        self,
        root: Path,
        sequences: Sequence[VideoSequence],
        inputs: Sequence[Path],
        resolution: str | None,
        on_sequence: Callable[[str, Summary | None], None],
        only: Sequence[str] | None,
    ) -> list[Summary]:
        """Segment this worker's share of the sequences, and what others cannot finish; see `vosops.runs.fleet`."""
        if self.mode == "overwrite":
            raise InputError("--overwrite cannot be combined with --shard or --steal: choose another --out")
        frames = {sequence.name: self._count(sequence) for sequence in sequences}
        fleet = Fleet(self.out, self.lease_seconds)
        self._open_fleet_folder(fleet)
        content = hashlib.sha256(json.dumps(frames, sort_keys=True).encode()).hexdigest()
        arguments = {"input": str(root), "resolution": resolution, "sequences content": content}
        fleet.join({**arguments, **self._settings_alike()})
        shard = self.shard or Shard()
        shares = divide(frames, shard.count)
        own = shares[shard.index] if only is None else list(only)
        others = [n for share in shares for n in share if n not in own] if self.steal and only is None else []
        if self.mode == "resume":
            for name in own:
                fleet.reopen(name)
        by_name = {sequence.name: sequence for sequence in sequences}
        summaries: list[Summary] = []
        problems: list[str] = []
        unusable: set[str] = set()
        for name, lease in fleet.each(own, others, unusable, self.should_stop, self.note):
            on_sequence(name, None)
            summary, problem = None, fleet.trouble(name, lease.number)
            try:
                if problem is None:
                    summary = self._leased(by_name[name], lease, inputs)
                else:
                    problems.append(f"{name}: {problem}")
            except (LeaseLostError, FolderInUseError) as error:  # somebody else has it, or is about to notice
                self.note(str(error))
                time.sleep(fleet.poll_seconds)
                continue
            except ResumeError as error:
                unusable.add(name)
                problems.append(f"{name}: {error}")
                continue
            except (IncompleteInputError, InputError) as error:
                problem = str(error)
                problems.append(f"{name}: {problem}")
            finally:
                if (summary is not None or problem is not None) and not lease.lost:
                    fleet.finish(name, _outcome(summary, problem, fleet.worker, lease.number))
                lease.release()
            if summary is not None:
                on_sequence(name, summary)
                summaries.append(summary)
        self._write_fleet_report(fleet, list(frames))
        _raise_problems(problems, self.out / REPORT)
        return summaries

    def _leased(self, sequence: VideoSequence, lease: Lease, inputs: Sequence[Path]) -> Summary:
        """Segment or continue a sequence while this worker has it."""
        asked = self.should_stop

        def stop() -> bool:
            lease.check()
            return asked()

        return self._sequence(sequence, inputs, mode="resume", should_stop=stop)

    def _count(self, sequence: VideoSequence) -> int:
        """Return how many frames of a sequence are processed, without a look into them; 0 where none can be."""
        try:
            return len(self._indices(len(pictures(sequence.frames))))
        except InputError:  # is said when its turn comes
            return 0

    def _open_fleet_folder(self, fleet: Fleet) -> None:
        """Check the folder of the sequences' folders, where other workers may be at work."""
        if not fleet.exists and self.mode == "new":
            try:
                check_folder(OwnedFolder(self.out, RESUME), "new")
            except InputError:
                if not fleet.exists:  # another worker may have begun meanwhile
                    raise
        nearest_folder(self.out)
        if RunState(OwnedFolder(self.out, RESUME)).exists:
            raise InputError(f"{self.out} holds a run over one video: choose another --out for a data set")
        check_result(self.out / REPORT, _is_dataset_report)

    def _write_fleet_report(self, fleet: Fleet, names: Sequence[str]) -> None:
        """Write what all workers have finished by now; the last one writes it all."""
        with fleet.alone():
            outcomes = {name: fleet.outcome(name) for name in names}
            problems = [f"{name}: {o.problem}" for name, o in outcomes.items() if o and o.problem]
            sequences = {
                name: {
                    "frames": o.frames,
                    "seconds": o.seconds,
                    "events": o.events,
                    "worker": o.worker,
                    "takeovers": o.takeovers,
                }
                for name, o in outcomes.items()
                if o and not o.problem
            }
            unfinished = [name for name, outcome in outcomes.items() if outcome is None]
            report = {
                "complete": not problems and not unfinished,
                "problems": problems,
                "unfinished": unfinished,
                "sequences": sequences,
            }
            self._write_report(report)

    def _open_dataset_folder(self) -> None:
        """Check the folder of the sequences' folders, and make it."""
        folder = OwnedFolder(self.out, RESUME)
        if self.mode == "new":
            check_folder(folder, "new")
        nearest_folder(self.out)
        if RunState(folder).exists:
            raise InputError(f"{self.out} holds a run over one video: choose another --out for a data set")
        check_result(self.out / REPORT, _is_dataset_report)
        with disk_errors(str(self.out), RESUME):
            self.out.mkdir(parents=True, exist_ok=True)
            folder.remove_parts([""])

    def _sequence(self, sequence: VideoSequence, inputs: Sequence[Path], **how: Any) -> Summary:
        source = open_source(sequence.frames, self.fps, self._indices())
        indices = self._indices(source.count if source.count_is_exact else None)
        masks = masks_of_sequence(sequence, source, indices)
        out = self.out / sequence.name
        return self._run(out, source, indices, masks, inputs, only_new_objects=True, **how)

    def _indices(self, count: int | None = None) -> range:
        """Return the frames to process of an input with this many frames; None: not known yet."""
        s = self.settings
        return frame_range(s.start, s.end, s.step, count)

    def _run(
        self,
        out: Path,
        source: FrameSource,
        indices: range,
        given: Sequence[GivenMask],
        inputs: Sequence[Path],
        only_new_objects: bool = False,
        mode: Mode | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Summary:
        masks = MaskSet(given, source.size, only_new_objects)
        loop = TrackingLoop(
            self._tracker,
            source,
            masks,
            indices,
            short_side=self.settings.size,
            device=self.settings.place,
            dtype=find_dtype(self.settings.dtype),
            naive=self.settings.naive,
            chunks=self._chunks(),
        )
        return VideoRun(
            out=out,
            source=source,
            masks=masks,
            loop=loop,
            arguments=self._arguments(source, masks),
            inputs=inputs,
            outputs=self.outputs,
            progress=self.progress,
            should_stop=should_stop or self.should_stop,
        ).execute(mode or self.mode)

    def _chunks(self) -> Chunks | None:
        s = self.settings
        return None if s.chunk_frames is None else Chunks(s.chunk_frames, s.chunk_overlap)

    @cached_property
    def _tracker(self) -> VideoTracker:
        return make_tracker(self.settings)

    def _arguments(self, source: FrameSource, masks: MaskSet) -> dict[str, Any]:
        return {
            "input": source.title,
            "input content": source.fingerprint(),
            "masks": masks.digests(),
            **self._settings_alike(),
            **_verdicts.arguments(self.settings.place),
        }

    def _settings_alike(self) -> dict[str, Any]:
        """Return the recorded settings; any GPU of a machine may continue what another worker began."""
        arguments = self.settings.arguments()
        if self.shard is not None or self.steal:
            arguments["device"] = self.settings.place.type
        return arguments

    def _write_dataset_report(self, summaries: Sequence[Summary], problems: Sequence[str]) -> None:
        sequences = {
            s.out.name: {"frames": s.frames, "seconds": s.seconds, "events": s.events} for s in summaries
        }
        self._write_report({"complete": not problems, "problems": problems, "sequences": sequences})

    def _write_report(self, report: dict[str, Any]) -> None:
        check_result(self.out / REPORT, _is_dataset_report)
        write_text(self.out / REPORT, json.dumps(report, indent=1) + "\n", advice=RESUME)


def _outcome(summary: Summary | None, problem: str | None, worker: str, takeovers: int) -> Outcome:
    if summary is None:
        return Outcome(0, 0.0, [], problem, worker, takeovers)
    return Outcome(summary.frames, summary.seconds, summary.events, None, worker, takeovers)


def _raise_problems(problems: Sequence[str], report: Path) -> None:
    """Raise the first of the sequences' problems, if any."""
    if problems:
        more = f" (and {len(problems) - 1} more, see {report})" if len(problems) > 1 else ""
        raise IncompleteInputError(problems[0] + more)


def _is_dataset_report(content: bytes) -> bool:
    return is_json_with(content, {"complete", "problems", "sequences"})
