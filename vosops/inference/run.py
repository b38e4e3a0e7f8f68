"""One video from input to finished output folder: masks, checkpoints, pictures, report, resume."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vosops.io.errors import (
    IncompleteInputError,
    InputError,
    InterruptedRunError,
    ResumeError,
    disk_errors,
    require,
)
from vosops.io.listing import CONTACT_SHEET

from .checkpoint import CHECKPOINT_EVERY, STATE_FOLDER, RunState
from .drawing_pass import COCO, CUTOUT_FOLDER, OVERLAY, DrawingPass, Outputs
from .files import PART_SUFFIX
from .frames import FrameSource
from .loop import FrameLoop
from .masks import LabelMaps, write_labels
from .progress import NoProgress, Progress, never
from .report import REPORT, FrameRecord, write_report
from .usage import peak_memory

_MIB = 1 << 20

Mode = Literal["new", "resume", "overwrite"]


@dataclass(frozen=True)
class Summary:
    """What a run came to."""

    out: Path
    frames: int
    seconds: float
    events: list[str]
    already_complete: bool


@dataclass
class Run:
    """A run over one video into one folder.

    Args:
        out: The folder; made if it does not exist.
        source: The frames.
        masks: The given masks, or what is to be known of label maps without any.
        propagation: The loop.
        arguments: Everything that changes the masks; a resumed run must have the same.
        outputs: What else to write; may differ when resuming.
        progress: Is told how it goes.
        should_stop: Asked after each frame; true saves a checkpoint and ends the run.
    """

    out: Path
    source: FrameSource
    masks: LabelMaps
    propagation: FrameLoop
    arguments: dict[str, Any]
    outputs: Outputs = field(default_factory=Outputs)
    progress: Progress = field(default_factory=NoProgress)
    should_stop: Callable[[], bool] = never

    def __post_init__(self) -> None:
        self.state = RunState(self.out)
        self._done = 0
        self._seconds = 0.0

    def execute(self, mode: Mode) -> Summary:
        """Run to the end, or raise a one-line error; everything written by then is complete.

        Raises:
            InterruptedRunError: ``should_stop`` said so; a checkpoint was saved.
            IncompleteInputError: The input ended early; what could be read is done and written.
            ResumeError: The run in the folder had other arguments.
            VosopsError: Anything else a user can mend, such as a full disk.
        """
        if self.outputs.overlay:
            require("av")  # before all the work, not after it
        already_complete = self._open_folder(mode)
        if not already_complete:
            self._propagate()
        DrawingPass(
            self.out,
            self.source,
            self.masks,
            self.state.record,
            self.outputs,
            self.progress,
            self.should_stop,
        ).execute()
        facts = self.state.facts()
        header = {"complete": facts["problem"] is None, **facts, "arguments": self.arguments}
        events = write_report(self.out / REPORT, self.state.record, self.masks.first_area, header)
        if facts["problem"]:
            raise IncompleteInputError(
                f"{facts['problem']}. The {facts['frames_done']} frames read until then are in {self.out}"
            )
        return Summary(self.out, facts["frames_done"], facts["seconds"], events, already_complete)

    def _open_folder(self, mode: Mode) -> bool:
        """Prepare the folder and continue where a checkpoint says; return whether every mask is there."""
        prepare_folder(self.out, mode)
        if mode != "resume" or not self.state.exists:
            self.state.start(self.arguments)
            return False
        self.state.check(self.arguments)
        if not self.state.is_complete:
            checkpoint = self.state.load()
            if checkpoint is not None:
                self.propagation.load_state_dict(checkpoint["propagation"])
                self._done = checkpoint["done"]
                self._seconds = checkpoint["seconds"]
        missing = [record.name for record in self.state.record if not self._mask_path(record.name).exists()]
        if missing:
            raise ResumeError(
                f"cannot resume {self.out}: {len(missing)} masks are missing, the first is {missing[0]}.png; "
                "put them back, or start again with --overwrite"
            )
        return self.state.is_complete

    def _mask_path(self, name: str) -> Path:
        return self.out / f"{name}.png"

    def _propagate(self) -> None:
        self.progress.begin("segment", self.propagation.total, self._done)
        started = time.monotonic() - self._seconds
        try:
            for frame in self.propagation:
                write_labels(self._mask_path(frame.name), frame.labels.numpy(), self.masks.palette)
                self.state.record.append(FrameRecord.of(frame))
                self._done += 1
                self._seconds = time.monotonic() - started
                self.progress.advance()
                stop = self.should_stop()
                if stop or self._done % CHECKPOINT_EVERY == 0:
                    self.state.save(self.propagation.state_dict(), self._done, self._seconds)
                if stop:
                    raise InterruptedRunError(
                        f"stopped after {self._done} frames; run the same command with --resume to go on"
                    )
        except BaseException:
            self.state.forget_if_alone()
            raise
        finally:
            self.progress.end()
        peak = peak_memory(self.propagation.device.type == "cuda")
        self.state.finish(
            {
                "problem": self.propagation.problem,
                "frames_done": self._done,
                "seconds": round(self._seconds, 2),
                "peak_memory_mib": round(peak / _MIB),
            }
        )


def prepare_folder(out: Path, mode: Mode) -> None:
    """Make the output folder, or refuse one that holds anything, or make room in it as ``mode`` says.

    "new" wants it absent or empty, "resume" wants a run in it (or nothing), "overwrite" deletes what an
    earlier run wrote, and nothing else.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")
    with disk_errors(str(out)):
        out.mkdir(parents=True, exist_ok=True)
    empty = not any(out.iterdir())
    if mode == "overwrite":
        with disk_errors(str(out)):
            _remove_earlier_run(out)
    elif mode == "new" and not empty:
        raise InputError(
            f"{out} is not empty: continue the run in it with --resume, replace it with --overwrite"
        )
    elif mode == "resume" and not empty and not RunState(out).exists:
        raise InputError(
            f"{out} holds no run to resume: choose another --out, or write into it with --overwrite"
        )


def _remove_earlier_run(out: Path) -> None:
    for record in RunState(out).record:
        (out / f"{record.name}.png").unlink(missing_ok=True)
        (out / CUTOUT_FOLDER / f"{record.name}.png").unlink(missing_ok=True)
    for name in (OVERLAY, COCO, CONTACT_SHEET, REPORT):
        (out / name).unlink(missing_ok=True)
    for part in [*out.glob(f".*{PART_SUFFIX}"), *(out / CUTOUT_FOLDER).glob(f".*{PART_SUFFIX}")]:
        part.unlink(missing_ok=True)
    if (out / CUTOUT_FOLDER).is_dir() and not any((out / CUTOUT_FOLDER).iterdir()):
        (out / CUTOUT_FOLDER).rmdir()
    shutil.rmtree(out / STATE_FOLDER, ignore_errors=True)
