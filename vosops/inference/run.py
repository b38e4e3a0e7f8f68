"""One video from input to finished output folder: masks, checkpoints, pictures, report, resume."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .checkpoint import CHECKPOINT_EVERY, STATE_FOLDER, RunState
from .coco import CocoFile
from .drawing import ContactSheet, colour_table, overlay, write_cutout
from .errors import IncompleteInputError, InputError, InterruptedRunError, ResumeError, disk_errors
from .files import PART_SUFFIX
from .frames import DEFAULT_FPS, FrameSource
from .loop import Propagation
from .masks import CONTACT_SHEET, MaskSet, read_labels, write_labels
from .report import REPORT, FrameRecord, write_report
from .video import VideoFile
from .video_writer import VideoWriter

if TYPE_CHECKING:
    from .masks import Labels

OVERLAY = "overlay.mp4"
COCO = "masks.json"
CUTOUT_FOLDER = "cutout"
_BYTES_PER_MIB = 1 << 20

Mode = Literal["new", "resume", "overwrite"]


class Progress(Protocol):
    """Is told how a run goes on."""

    def begin(self, what: str, total: int | None, done: int) -> None:
        """A stage starts."""
        ...

    def advance(self) -> None:
        """One more frame of the stage is done."""
        ...

    def end(self) -> None:
        """The stage is over."""
        ...


class NoProgress:
    """Keeps quiet."""

    def begin(self, what: str, total: int | None, done: int) -> None:
        """Ignore."""

    def advance(self) -> None:
        """Ignore."""

    def end(self) -> None:
        """Ignore."""


@dataclass(frozen=True)
class Outputs:
    """What to write beside the masks, the contact sheet and the report."""

    overlay: bool = False
    cutout: bool = False
    coco: bool = False


@dataclass(frozen=True)
class Summary:
    """What a run came to."""

    out: Path
    frames: int
    seconds: float
    events: list[str]
    already_complete: bool
    problem: str | None = None


@dataclass
class Run:
    """A run over one video into one folder.

    Args:
        out: The folder; made if it does not exist.
        source: The frames.
        masks: The given masks.
        propagation: The loop.
        arguments: Everything that changes the masks; a resumed run must have the same.
        outputs: What else to write; may differ when resuming.
        progress: Is told how it goes.
        should_stop: Asked after each frame; true saves a checkpoint and ends the run.
    """

    out: Path
    source: FrameSource
    masks: MaskSet
    propagation: Propagation
    arguments: dict[str, Any]
    outputs: Outputs = Outputs()
    progress: Progress = field(default_factory=NoProgress)
    should_stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        self.state = RunState(self.out)
        self._done = 0
        self._seconds = 0.0

    def execute(self, mode: Mode) -> Summary:
        """Run to the end, or raise a one-line error; everything written by then is complete."""
        complete = self._open_folder(mode)
        if not complete:
            self._propagate()
        self._draw()
        facts = self.state.facts()
        events = self._write_report(facts)
        summary = Summary(
            self.out, facts["frames"], facts["seconds"], events, already_complete=complete, problem=facts["problem"]
        )
        if summary.problem:
            raise IncompleteInputError(
                f"{summary.problem}; the {summary.frames} frames read until then are in {self.out}"
            )
        return summary

    def _open_folder(self, mode: Mode) -> bool:
        """Prepare the folder; return whether every mask is there already."""
        prepare_folder(self.out, mode)
        if mode == "resume" and self.state.exists:
            self.state.check(self.arguments)
            if self.state.is_complete:
                self._check_masks_exist()
                return True
            checkpoint = self.state.load()
            if checkpoint is not None:
                self._check_masks_exist()
                self.propagation.load_state_dict(checkpoint["propagation"])
                self._done = checkpoint["done"]
                self._seconds = checkpoint["seconds"]
            return False
        self.state.start(self.arguments)
        return False

    def _check_masks_exist(self) -> None:
        missing = [record.name for record in self.state.record if not self._mask_path(record.name).exists()]
        if missing:
            raise ResumeError(
                f"cannot resume {self.out}: {len(missing)} masks are missing, the first is {missing[0]}.png. "
                "Put them back, or start again with --overwrite"
            )

    def _mask_path(self, name: str) -> Path:
        return self.out / f"{name}.png"

    def _propagate(self) -> None:
        self.progress.begin("segment", self.propagation.total, self._done)
        started = time.monotonic()
        before = self._seconds
        try:
            for frame in self.propagation:
                write_labels(self._mask_path(frame.name), frame.labels.numpy(), self.masks.palette)
                self.state.record.append(FrameRecord.of(frame))
                self._done += 1
                self._seconds = before + time.monotonic() - started
                self.progress.advance()
                stop = self.should_stop()
                if stop or self._done % CHECKPOINT_EVERY == 0:
                    self.state.save(self.propagation.state_dict(), self._done, self._seconds)
                if stop:
                    raise InterruptedRunError(
                        f"stopped after {self._done} frames; run the same command with --resume to go on"
                    )
        finally:
            self.progress.end()
        self.state.finish(
            {
                "frames": self._done,
                "seconds": round(self._seconds, 2),
                "problem": self.propagation.problem,
                "peak_memory_mib": round(peak_memory(self.propagation.device.type == "cuda") / _BYTES_PER_MIB),
            }
        )

    def _draw(self) -> None:
        """Write the contact sheet and the pictures asked for that are not there, from frames and masks."""
        names = dict(self.state.record.names())
        indices = list(names)
        sheet = ContactSheet(self.out / CONTACT_SHEET)
        on_sheet = {indices[i] for i in sheet.choose(len(indices))} if not sheet.path.exists() else set()
        draw_overlay = self.outputs.overlay and not (self.out / OVERLAY).exists()
        cutouts = {
            index: self.out / CUTOUT_FOLDER / f"{name}.png" for index, name in names.items() if self.outputs.cutout
        }
        cutouts = {index: path for index, path in cutouts.items() if not path.exists()}
        if self.outputs.coco and not (self.out / COCO).exists():
            self._write_coco()
        needed = indices if draw_overlay else sorted({*on_sheet, *cutouts})
        if not needed:
            return
        table = colour_table(self.masks.palette, self.masks.binary)
        writer = self._overlay_writer() if draw_overlay else None
        self.progress.begin("draw", len(needed), 0)
        try:
            for raw in self._frames(needed, writer):
                labels = self._read_mask(names[raw.index])
                if raw.index in cutouts:
                    write_cutout(cutouts[raw.index], raw.image, labels, self.masks.binary)
                if writer is not None or raw.index in on_sheet:
                    picture = overlay(raw.image, labels, table, self.masks.binary)
                    if writer is not None:
                        writer.write(picture, raw.time)
                    if raw.index in on_sheet:
                        sheet.add(picture, names[raw.index])
                self.progress.advance()
                if self.should_stop():
                    raise InterruptedRunError(
                        "stopped while drawing; every mask is written; run the same command with --resume to go on"
                    )
        finally:
            self.progress.end()
        if on_sheet:
            sheet.save()

    def _frames(self, indices: list[int], writer: VideoWriter | None) -> Iterator[Any]:
        if writer is None:
            yield from self.source.forward(indices)
        else:
            with writer:
                yield from self.source.forward(indices)
