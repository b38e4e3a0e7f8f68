"""A whole ``vosops segment`` job: one video, or every sequence of a data set, into an output folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vosops.io.errors import IncompleteInputError, InputError, disk_errors
from vosops.io.outputs import OwnedFolder, check_result, is_json_with, nearest_folder, write_text
from vosops.io.protection import protect_inputs

from .checkpoint import RunState
from .datasets import VideoSequence, find_sequences, masks_of_sequence, open_source
from .drawing_pass import Outputs
from .files import sha256
from .frames import DEFAULT_FPS, FrameSource
from .loop import TrackingLoop, frame_range
from .masks import GivenMask, MaskSet, find_masks
from .models import DEFAULT_MODEL, DEFAULT_SIZE, find_device, find_dtype, make_tracker
from .progress import NoProgress, Progress, never
from .report import REPORT, RESUME
from .run import Mode, Run, Summary, check_folder, written_folders
from .streams import local_path

if TYPE_CHECKING:
    from vosops.models import VideoTracker


@dataclass(frozen=True)
class Settings:
    """What changes the masks beside the input and its masks."""

    model: str = DEFAULT_MODEL
    weights: Path | None = None
    backbone: str | None = None
    device: str | None = None
    dtype: str = "float32"
    size: int = DEFAULT_SIZE
    start: int | None = None
    end: int | None = None
    step: int = 1
    memory_budget: int | str | None = None
    checkout: Path | None = None
    naive: bool = False
    scales: tuple[float, ...] = (1.0,)


@dataclass
class Job:
    """Runs of one command: the model is made once, on the first run that needs it.

    Args:
        out: Output folder.
        mode: What to do with what is in it.
        settings: What changes the masks.
        outputs: What to write beside masks, contact sheet and report.
        fps: Rate of a folder of frames.
        progress: Is told how it goes.
        should_stop: Asked between frames.
    """

    out: Path
    mode: Mode = "new"
    settings: Settings = field(default_factory=Settings)
    outputs: Outputs = field(default_factory=Outputs)
    fps: Fraction = DEFAULT_FPS
    progress: Progress = field(default_factory=NoProgress)
    should_stop: Callable[[], bool] = never

    def video(self, path: str | Path, mask_specs: Sequence[str]) -> Summary:
        """Segment a video file or a folder of frames, with masks as ``--mask`` gives them."""
        source = open_source(path, self.fps)
        indices = self._indices(source)
        masks = find_masks(mask_specs, source, indices)
        inputs = [
            local_path(path),
            *self._settings_inputs(),
            *(mask.path for mask in masks if mask.path is not None),
        ]
        protect_inputs(inputs, written_folders(self.out))  # before a model is made
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
        inputs = [*self._settings_inputs(), *(Path(name) for name in names if Path(name).is_file())]
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

    def _settings_inputs(self) -> list[Path]:
        return [path for path in (self.settings.weights, self.settings.checkout) if path is not None]

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
        source = open_source(sequence.frames, self.fps)
        indices = self._indices(source)
        masks = masks_of_sequence(sequence, source, indices)
        return self._run(self.out / sequence.name, source, indices, masks, inputs, only_new_objects=True)

    def _indices(self, source: FrameSource) -> range:
        s = self.settings
        return frame_range(s.start, s.end, s.step, source.count if source.count_is_exact else None)

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
        propagation = TrackingLoop(
            self._tracker,
            source,
            masks,
            indices,
            short_side=self.settings.size,
            device=self._device,
            dtype=find_dtype(self.settings.dtype),
            naive=self.settings.naive,
        )
        return Run(
            out=out,
            source=source,
            masks=masks,
            propagation=propagation,
            arguments=self._arguments(source, masks),
            inputs=inputs,
            outputs=self.outputs,
            progress=self.progress,
            should_stop=self.should_stop,
        ).execute(self.mode)

    @cached_property
    def _device(self) -> torch.device:
        return find_device(self.settings.device)

    @cached_property
    def _tracker(self) -> VideoTracker:
        s = self.settings
        return make_tracker(
            s.model,
            self._device,
            weights=s.weights,
            backbone=s.backbone,
            memory_budget=s.memory_budget,
            checkout=s.checkout,
            naive=s.naive,
            scales=s.scales,
        )

    @cached_property
    def _weights_content(self) -> str | None:
        return None if self.settings.weights is None else sha256(self.settings.weights)

    def _arguments(self, source: FrameSource, masks: MaskSet) -> dict[str, Any]:
        s = self.settings
        return {
            "input": source.title,
            "input content": source.fingerprint(),
            "masks": masks.digests(),
            "model": s.model,
            "weights content": self._weights_content,
            "backbone": s.backbone,
            "device": str(self._device),
            "dtype": s.dtype,
            "size": s.size,
            "start": s.start,
            "end": s.end,
            "step": s.step,
            "memory-budget": s.memory_budget,
            "checkout": None if s.checkout is None else str(s.checkout),
            "naive": s.naive,
            "scales": list(s.scales),
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
