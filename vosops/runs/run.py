"""One video from input to finished output folder: masks, checkpoints, pictures, report, resume."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vosops.inference.loop import FrameLoop
from vosops.inference.usage import peak_memory
from vosops.io.errors import (
    IncompleteInputError,
    InputError,
    InterruptedRunError,
    ResumeError,
    disk_errors,
    require,
)
from vosops.io.frames import FrameSource
from vosops.io.listing import CONTACT_SHEET
from vosops.io.masks import LabelMaps, write_labels
from vosops.io.outputs import STATE_FOLDER, OwnedFolder, is_json_with, nearest_folder
from vosops.io.protection import protect_inputs

from .checkpoint import CHECKPOINT_EVERY, RunState
from .drawing_pass import COCO, CUTOUT_FOLDER, OVERLAY, DrawingPass, Outputs
from .progress import NoProgress, Progress, never
from .report import REPORT, RESUME, FrameRecord, write_report

_MIB = 1 << 20
_CLOCK_SLACK = 1.0  # seconds between a mask of an old version and the line that records it, at most
_REPORT_KEYS = {"complete", "arguments", "frames", "events"}

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
class VideoRun:
    """A run over one video into one folder.

    Args:
        out: The folder; made if it does not exist.
        source: The frames.
        masks: The given masks, or what is to be known of label maps without any.
        loop: The loop that produces the label maps.
        arguments: Everything that changes the masks; a resumed run must have the same.
        inputs: Files and folders that are read, which must not lie where something is written.
        outputs: What else to write; may differ when resuming.
        progress: Receives progress.
        should_stop: Asked after each frame; true saves a checkpoint and ends the run.
    """

    out: Path
    source: FrameSource
    masks: LabelMaps
    loop: FrameLoop
    arguments: dict[str, Any]
    inputs: Sequence[Path] = ()
    outputs: Outputs = field(default_factory=Outputs)
    progress: Progress = field(default_factory=NoProgress)
    should_stop: Callable[[], bool] = never

    def __post_init__(self) -> None:
        self.folder = OwnedFolder(self.out, RESUME)
        self.state = RunState(self.folder)
        self._done = 0
        self._seconds = 0.0
        self._unsynced: list[Path] = []

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
        self._check(mode)
        with disk_errors(str(self.out), RESUME):
            self.out.mkdir(parents=True, exist_ok=True)
        with self.folder.locked():
            return self._execute(mode)

    def _execute(self, mode: Mode) -> Summary:
        self._check(mode)  # again, now that no other run can change it
        already_complete = self._open_folder(mode)
        if not already_complete:
            self._propagate()
        DrawingPass(
            self.folder,
            self.source,
            self.masks,
            self.state.record,
            self.outputs,
            self.progress,
            self.should_stop,
        ).execute()
        facts = self.state.facts()
        header = {"complete": facts["problem"] is None, **facts, "arguments": self.arguments}
        report = self.folder.file(REPORT)
        events = write_report(report, self.state.record, self.masks.first_area, header)
        if facts["problem"]:
            raise IncompleteInputError(
                f"{facts['problem']}. The {facts['frames_done']} frames read until then are in {self.out}"
            )
        return Summary(self.out, facts["frames_done"], facts["seconds"], events, already_complete)

    def _check(self, mode: Mode) -> None:
        """Refuse what would destroy somebody's file or mix two runs; nothing is touched before."""
        sheet = CONTACT_SHEET.removesuffix(".png")
        if self.source.find(sheet) is not None:
            raise InputError(
                f"{self.source.title} has a frame {sheet}, whose mask would be {CONTACT_SHEET}: rename it"
            )
        protect_inputs(self.inputs, written_folders(self.out))
        check_folder(self.folder, mode)
        done: set[str] = set()
        if mode == "resume" and self.state.exists:
            self.state.check(self.arguments)
            done = set(self.state.done())
        self.folder.check_free(
            self._to_be_written(done, old=mode == "resume" and self.state.is_of_old_version)
        )

    def _to_be_written(self, done: set[str], old: bool) -> Iterator[str]:
        """Yield the files of this run that are there already, and may be somebody else's.

        Args:
            done: Frames whose masks stay as they are.
            old: Whether a version that kept no list of its files made them.
        """
        fixed = [REPORT, CONTACT_SHEET] + [OVERLAY] * self.outputs.overlay + [COCO] * self.outputs.coco
        if not old:
            yield from fixed
            folders = ["", f"{CUTOUT_FOLDER}/"] if self.outputs.cutout else [""]
            for folder in folders:
                yield from (
                    f"{folder}{name}.png"
                    for name in self._frames_in(self.out / folder)
                    if folder or name not in done
                )

    def _frames_in(self, folder: Path) -> Iterator[str]:
        """Return the names of this run's frames that have a PNG, or anything of that name, in a folder."""
        paths = getattr(self.source, "paths", None)
        try:
            names = os.listdir(folder)
        except OSError:
            return
        for stem, suffix in map(os.path.splitext, names):
            index = self.source.find(stem) if suffix == ".png" else None
            if index is not None and index in self.loop.indices:
                if stem == (paths[index].stem if paths else f"{index:07d}"):
                    yield stem

    def _open_folder(self, mode: Mode) -> bool:
        """Prepare the folder and continue where a checkpoint says; return whether every mask exists."""
        self.folder.remove_parts(("", CUTOUT_FOLDER, STATE_FOLDER))
        if mode != "resume" or not self.state.exists:
            self.folder.remove(self.folder.names())
            self.state.start(self.arguments)
            return False
        if self.state.is_of_old_version:
            self._adopt_old_version()
        if self.state.is_complete:
            self.state.drop_checkpoint()
        else:
            checkpoint = self.state.load()
            if checkpoint is not None:
                self.loop.load_state_dict(checkpoint["propagation"])
                self._done = checkpoint["done"]
                self._seconds = checkpoint["seconds"]
        missing = [record.name for record in self.state.record if not self._mask_path(record.name).exists()]
        if missing:
            raise ResumeError(
                f"cannot resume {self.out}: {len(missing)} masks are missing, the first is {missing[0]}.png; "
                "put them back, or start again with --overwrite"
            )
        return self.state.is_complete

    def _adopt_old_version(self) -> None:
        """Note as ours what a run of an old version wrote and nobody changed since it stopped."""
        record = self.state.record.path
        with disk_errors(str(self.folder.state), RESUME):
            self.folder.forget()
            stopped = record.stat().st_mtime + _CLOCK_SLACK if record.exists() else 0.0
            for name in self._frames_in(self.out):
                path = self._mask_path(name)
                if path.is_file() and path.stat().st_mtime <= stopped:
                    self.folder.note(f"{name}.png", path)
            report = self.out / REPORT
            if report.is_file() and is_json_with(report.read_bytes(), _REPORT_KEYS):
                self.folder.note(REPORT, report)

    def _mask_path(self, name: str) -> Path:
        return self.out / f"{name}.png"

    def _propagate(self) -> None:
        self.progress.begin("segment", self.loop.total, self._done)
        started = time.monotonic() - self._seconds
        try:
            for frame in self.loop:
                file = self.folder.file(f"{frame.name}.png")
                write_labels(file, frame.labels.numpy(), self.masks.palette)
                self._unsynced.append(file.path)
                self.state.record.append(FrameRecord.of(frame))
                self._done += 1
                self._seconds = time.monotonic() - started
                self.progress.advance()
                stop = self.should_stop()
                if stop or self._done % CHECKPOINT_EVERY == 0:
                    self.state.save(self.loop.state_dict(), self._done, self._seconds, self._unsynced)
                    self._unsynced.clear()
                if stop:
                    raise InterruptedRunError(
                        f"stopped after {self._done} frames; run the same command with --resume to continue"
                    )
        except BaseException:
            self.state.forget_if_alone()
            raise
        finally:
            self.progress.end()
        peak = peak_memory(self.loop.device.type == "cuda")
        self.state.finish(
            {
                "problem": self.loop.problem,
                "frames_done": self._done,
                "seconds": round(self._seconds, 2),
                "peak_memory_mib": round(peak / _MIB),
            },
            self._unsynced,
        )


def written_folders(out: Path) -> list[Path]:
    """Return the folders that a run into ``out`` writes to."""
    return [out, out / CUTOUT_FOLDER, out / STATE_FOLDER]


def check_folder(folder: OwnedFolder, mode: Mode) -> None:
    """Refuse an output folder that ``mode`` does not suit; changes nothing.

    "new" wants it absent or empty, "resume" wants a run in it (or nothing); of what "overwrite" finds, what earlier
    runs wrote is deleted, and nothing else.
    """
    out, state = folder.root, RunState(folder)
    nearest_folder(out)
    with disk_errors(str(out), RESUME):
        found = os.listdir(out) if out.is_dir() else []
    # A run that died before it wrote its arguments leaves an empty state folder.
    empty = not found or (found == [STATE_FOLDER] and not state.exists)
    if mode == "overwrite" and state.is_of_old_version:
        raise InputError(
            f"{out} holds a run of an older version of vosops, which kept no list of its files, so that --overwrite "
            "could not tell them from yours: empty the folder, or choose another --out"
        )
    if mode == "new" and not empty:
        raise InputError(
            f"{out} is not empty: continue the run in it with --resume, replace it with --overwrite"
        )
    if mode == "resume" and not empty and not state.exists:
        raise InputError(
            f"{out} holds no run to resume: choose another --out, or write into it with --overwrite"
        )
