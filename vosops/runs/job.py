"""A whole ``vosops segment`` job: one video, or every sequence of a data set, into an output folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vosops import _verdicts
from vosops.inference.loop import TrackingLoop, frame_range
from vosops.inference.prompts import InitialPrompts
from vosops.inference.settings import DEFAULT_SIZE, ModelSettings, find_dtype, make_tracker
from vosops.io.datasets import VideoSequence, find_sequences, masks_of_sequence, open_source
from vosops.io.errors import IncompleteInputError, InputError, disk_errors
from vosops.io.frames import DEFAULT_FPS, FrameSource
from vosops.io.masks import GivenMask, MaskSet, find_masks
from vosops.io.outputs import OwnedFolder, check_result, is_json_with, nearest_folder, write_text
from vosops.io.protection import protect_inputs
from vosops.io.streams import local_path

from .checkpoint import RunState
from .drawing_pass import Outputs
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
    """

    size: int = DEFAULT_SIZE
    start: int | None = None
    end: int | None = None
    step: int = 1

    def arguments(self) -> dict[str, Any]:
        """See :class:`ModelSettings`."""
        own = {"size": self.size, "start": self.start, "end": self.end, "step": self.step}
        return {**super().arguments(), **own}


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
    """

    out: Path
    mode: Mode = "new"
    settings: Settings = field(default_factory=Settings)
    outputs: Outputs = field(default_factory=Outputs)
    fps: Fraction = DEFAULT_FPS
    progress: Progress = field(default_factory=NoProgress)
    should_stop: Callable[[], bool] = never

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
    ) -> list[Summary]:
        """Segment every sequence of a data set into ``out/<sequence>``; resumes each on its own.

        ``on_sequence`` is called with a sequence's name when it starts and with its summary when it ended.
        A sequence that cannot be used, or ends early, does not stop the others; the error comes at the end.
        """
        sequences = find_sequences(root, names, resolution)
        inputs = [*self.settings.files, *(Path(name) for name in names if Path(name).is_file())]
        for sequence in sequences:
            inputs += [sequence.frames, sequence.masks]
        folders = [folder for s in sequences for folder in written_folders(self.out / s.name)]
        protect_inputs([root / "JPEGImages", root / "Annotations", *inputs], [self.out, *folders])
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
        if problems:
            more = f" (and {len(problems) - 1} more, see {self.out / REPORT})" if len(problems) > 1 else ""
            raise IncompleteInputError(problems[0] + more)
        return summaries

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

    def _sequence(self, sequence: VideoSequence, inputs: Sequence[Path]) -> Summary:
        source = open_source(sequence.frames, self.fps, self._indices())
        indices = self._indices(source.count if source.count_is_exact else None)
        masks = masks_of_sequence(sequence, source, indices)
        return self._run(self.out / sequence.name, source, indices, masks, inputs, only_new_objects=True)

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
            should_stop=self.should_stop,
        ).execute(self.mode)

    @cached_property
    def _tracker(self) -> VideoTracker:
        return make_tracker(self.settings)

    def _arguments(self, source: FrameSource, masks: MaskSet) -> dict[str, Any]:
        return {
            "input": source.title,
            "input content": source.fingerprint(),
            "masks": masks.digests(),
            **self.settings.arguments(),
            **_verdicts.arguments(self.settings.place),
        }

    def _write_dataset_report(self, summaries: Sequence[Summary], problems: Sequence[str]) -> None:
        sequences = {
            s.out.name: {"frames": s.frames, "seconds": s.seconds, "events": s.events} for s in summaries
        }
        report = {"complete": not problems, "problems": problems, "sequences": sequences}
        check_result(self.out / REPORT, _is_dataset_report)
        write_text(self.out / REPORT, json.dumps(report, indent=1) + "\n", advice=RESUME)


def _is_dataset_report(content: bytes) -> bool:
    return is_json_with(content, {"complete", "problems", "sequences"})
