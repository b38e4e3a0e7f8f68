"""What the page knows of a video, on disk: marks, objects, results of runs; opening it again shows it all.

A project is a folder::

    project.json    the video, the objects, the settings
    marks/NAME.png  label maps that a person drew or corrected: a frame's last word
    runs/0001/      what a run of the engine wrote: NAME.png for each frame, and its state in .vosops
    jobs/0001.json  the jobs that were asked for, and how far they came
    cache/          small pictures of the frames, made again when they are missing
    exports/        files to take away

Runs are never changed by later ones. A frame's result is that of the latest run that reached it, the one before is
what the page compares it with.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vosops.io.datasets import is_dataset, open_source
from vosops.io.errors import InputError
from vosops.io.frames import FrameSource
from vosops.io.labels import davis_palette, read_labels
from vosops.io.masks import IGNORE, write_labels
from vosops.io.outputs import OwnedFolder, write_text
from vosops.io.seeking import SeekableVideo
from vosops.io.video import VideoFile
from vosops.runs.checkpoint import RunState
from vosops.runs.drawing import colour_table
from vosops.runs.report import RESUME, FrameRecord

from .doubts import confidence_of, look_at

if TYPE_CHECKING:
    from vosops.io.masks import Labels

__all__ = ["Project", "StudioObject", "open_video"]

PROJECT = "project.json"
MARKS, RUNS, JOBS, EXPORTS, CACHE = "marks", "runs", "jobs", "exports", "cache"
MOST_OBJECTS = 254
_VERSION = 1
_LONGEST_NAME = 80

Layer = Literal["shown", "mark", "result", "before"]


@dataclass
class StudioObject:
    """An object: its id in the masks, and what the person calls it."""

    id: int
    name: str


@dataclass
class Run:
    """The results of one run of the engine: which frames it has, and what is known of them."""

    folder: Path
    frames: dict[int, FrameRecord] = field(default_factory=dict)


def open_video(path: Path) -> FrameSource:
    """Open a video file or a folder of frames for reading in any order.

    Raises:
        InputError: It cannot be used; the message is one line.
    """
    if is_dataset(path):
        raise InputError(f"{path} is a data set: give the folder of one of its sequences")
    source = open_source(path)
    return SeekableVideo(source.path, source.title) if isinstance(source, VideoFile) else source


class Project:
    """A video and all that was done with it, kept in a folder.

    Every change is on the disk when the method returns; a file is complete or absent. Methods may be called from any
    thread.

    Args:
        folder: The project's folder, which exists.
        source: The frames; None opens them.

    Raises:
        InputError: The folder holds no project, or its video is gone or has changed.
    """

    def __init__(self, folder: Path, source: FrameSource | None = None) -> None:
        self.folder = folder
        self.id = folder.name
        self._lock = threading.RLock()
        try:
            stored = json.loads((folder / PROJECT).read_bytes())
            self.path = Path(stored["path"])
            self._fingerprint: str = stored["fingerprint"]
            self.objects = [StudioObject(**item) for item in stored["objects"]]
            self.settings: dict[str, Any] = stored["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder} holds no project that can be read") from error
        self.source = source or open_video(self.path)
        if source is None and self.source.fingerprint() != self._fingerprint:
            raise InputError(f"{self.path} has changed since it was opened: open it again as a new project")
        self._runs = [self._load_run(path) for path in self._folders(RUNS)]
        self._marks = self._find_marks()

    @classmethod
    def create(cls, root: Path, path: Path) -> Project:
        """Open the project of a video in the folder of projects, or begin one.

        Raises:
            InputError: The video cannot be used.
        """
        source = open_video(path)
        place, fingerprint = path.resolve(), source.fingerprint()
        digest = hashlib.sha256(f"{place}\n{fingerprint}".encode("utf-8", "surrogateescape")).hexdigest()[:8]
        stem = re.sub(r"[^A-Za-z0-9]+", "-", path.stem).strip("-").lower()[:32] or "video"
        folder = root / f"{stem}-{digest}"
        if not (folder / PROJECT).exists():
            content = {
                "version": _VERSION,
                "path": str(place),
                "fingerprint": fingerprint,
                "objects": [asdict(StudioObject(1, "Object 1"))],
                "settings": {},
            }
            write_text(folder / PROJECT, json.dumps(content, indent=1))
        return cls(folder, source)

    @property
    def title(self) -> str:
        """What to call it: the name of the video's file or folder."""
        return self.path.name

    @property
    def count(self) -> int:
        """The number of frames, an estimate until the file was read through."""
        stated = self.source.count or 1
        if self.source.count_is_exact:
            return stated
        return max(stated, 1 + max([*self._marks, *self._done()], default=0))

    def name(self, frame: int) -> str:
        """Return the name of a frame's mask without its suffix, as a run names it."""
        paths = getattr(self.source, "paths", None)
        return str(paths[frame].stem) if paths else f"{frame:07d}"

    def check_frame(self, frame: int) -> int:
        """Return the frame's number; InputError if there is no such frame."""
        if not 0 <= frame < self.count:
            raise InputError(f"frame must be from 0 to {self.count - 1}, got {frame}")
        return frame

    # Marks

    @property
    def marks(self) -> list[int]:
        """The numbers of the frames that a person marked, ascending."""
        with self._lock:
            return sorted(self._marks)

    def mark_path(self, frame: int) -> Path:
        """Return the file of a frame's mark."""
        return self.folder / MARKS / f"{self.name(frame)}.png"

    def write_mark(self, frame: int, labels: Labels) -> None:
        """Keep a frame's label map (H, W) as drawn.

        Raises:
            InputError: There is no such frame, or the map is of another size or has ids that are none.
        """
        self.check_frame(frame)
        if labels.shape != self.source.size:
            raise InputError(f"labels must be {self.source.size}, got {labels.shape}")
        if (labels == IGNORE).any():
            raise InputError(f"labels must be from 0 to {MOST_OBJECTS}, got {IGNORE}")
        with self._lock:
            write_labels(self.mark_path(frame), labels, davis_palette())
            self._marks.add(frame)
            known = {item.id for item in self.objects}
            found = set(map(int, set(labels[labels > 0].tolist())))
            for number in sorted(found - known):
                self.objects.append(StudioObject(number, f"Object {number}"))
            if found - known:
                self._save()

    def remove_mark(self, frame: int) -> None:
        """Forget a frame's mark; its result, if it has one, is shown again."""
        self.check_frame(frame)
        with self._lock:
            self.mark_path(frame).unlink(missing_ok=True)
            self._marks.discard(frame)

    def labels(self, frame: int, layer: Layer = "shown", *, without: Path | None = None) -> Labels | None:
        """Return a frame's label map (H, W), None if it has none.

        Args:
            frame: Its number.
            layer: "mark" is what was drawn, "result" what the latest run found, "before" what the run before that
                found, "shown" the first of the first two.
            without: The folder of a run that does not count.
        """
        self.check_frame(frame)
        path = self._layer(frame, layer, without)
        if path is None:
            return None
        try:
            return read_labels(path)[0]
        except InputError:  # deleted while it was looked for
            return None

    def _layer(self, frame: int, layer: Layer, without: Path | None = None) -> Path | None:
        with self._lock:
            if layer in ("shown", "mark") and frame in self._marks:
                return self.mark_path(frame)
            if layer == "mark":
                return None
            with_frame = self._runs_with(frame, without)
            place = 1 if layer == "before" else 0
            return with_frame[place].folder / f"{self.name(frame)}.png" if len(with_frame) > place else None

    # Results

    def begin_run(self) -> Path:
        """Return the folder of a new run; :meth:`run_of` returns what to call with each frame that is written there."""
        with self._lock:
            numbers = [int(path.name) for path in self._folders(RUNS)]
            folder = self.folder / RUNS / f"{max(numbers, default=0) + 1:04d}"
            folder.mkdir(parents=True)
            self._runs.append(Run(folder))
            return folder

    def run_folder(self, name: str) -> Path | None:
        """Return the folder of a run, of which only the name counts; None if the run was taken back."""
        with self._lock:
            return next((run.folder for run in self._runs if run.folder.name == Path(name).name), None)

    def frames_of(self, folder: Path) -> set[int]:
        """Return the numbers of the frames that a run has found."""
        with self._lock:
            return {frame for run in self._runs if run.folder == folder for frame in run.frames}

    def run_of(self, folder: Path) -> Callable[[FrameRecord], None]:
        """Return what to call with each frame that is written to a run's folder."""
        run = next(run for run in self._runs if run.folder == folder)

        def add(record: FrameRecord) -> None:
            with self._lock:
                run.frames[record.index] = record

        return add

    def reload_run(self, folder: Path) -> None:
        """Read a run's record again, after it was cut back to a checkpoint."""
        with self._lock:
            for run in self._runs:
                if run.folder == folder:
                    run.frames = self._load_run(folder).frames

    def discard_last_run(self) -> None:
        """Take back the latest run: its masks are deleted, and those of the run before are shown.

        Raises:
            InputError: There is none.
        """
        with self._lock:
            if not self._runs:
                raise InputError("there is no result to discard")
            run = self._runs.pop()
            owned = OwnedFolder(run.folder, RESUME)
            state = RunState(owned)
            owned.remove(owned.names())
            for path in state.folder.glob("*"):
                path.unlink()
            for folder in (state.folder, run.folder):
                with suppress(OSError):  # somebody else's file is in it
                    folder.rmdir()

    def shown_frames(self) -> list[int]:
        """Return the numbers of the frames that have a mark or a result, ascending."""
        with self._lock:
            return sorted({*self._marks, *self._done()})

    def record(self, frame: int, *, without: Path | None = None) -> FrameRecord | None:
        """Return what the latest run that reached a frame knows of it; ``without``: a run that does not count."""
        with self._lock:
            return next((run.frames[frame] for run in self._runs_with(frame, without)), None)

    def _runs_with(self, frame: int, without: Path | None = None) -> list[Run]:
        """Return the runs that reached a frame, the latest first."""
        return [run for run in reversed(self._runs) if frame in run.frames and run.folder != without]

    def _done(self) -> set[int]:
        return {frame for run in self._runs for frame in run.frames}

    def _latest(self) -> dict[int, FrameRecord]:
        latest: dict[int, FrameRecord] = {}
        for run in self._runs:
            latest.update(run.frames)
        return {frame: latest[frame] for frame in sorted(latest)}

    # Objects and settings

    def write_objects(self, objects: list[StudioObject]) -> None:
        """Replace the list of objects.

        Raises:
            InputError: An id is none or occurs twice, or a name is none.
        """
        ids = [item.id for item in objects]
        if len(set(ids)) != len(ids) or not all(1 <= number <= MOST_OBJECTS for number in ids):
            raise InputError(f"ids of objects must be different, from 1 to {MOST_OBJECTS}, got {ids}")
        if any(not 0 < len(item.name) <= _LONGEST_NAME for item in objects):
            raise InputError(f"names of objects must have 1 to {_LONGEST_NAME} characters")
        with self._lock:
            self.objects = objects
            self._save()

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Replace the settings, which the page and the engine give a meaning."""
        with self._lock:
            self.settings = settings
            self._save()

    def _save(self) -> None:
        content = {
            "version": _VERSION,
            "path": str(self.path),
            "fingerprint": self._fingerprint,
            "objects": [asdict(item) for item in self.objects],
            "settings": self.settings,
        }
        write_text(self.folder / PROJECT, json.dumps(content, indent=1))

    # What the page shows

    def state(self) -> dict[str, Any]:
        """Return all that the page shows beside pictures and jobs, as JSON can hold it."""
        with self._lock:
            records, marks = self._latest(), sorted(self._marks)
            table = colour_table(davis_palette(), binary=False)
            height, width = self.source.size
            reached = Counter(frame for run in self._runs for frame in run.frames)
            return {
                "id": self.id,
                "title": self.title,
                "path": str(self.path),
                "width": width,
                "height": height,
                "count": self.count,
                "exact": self.source.count_is_exact,
                "rate": float(self.source.average_rate),
                "objects": [
                    {**asdict(item), "colour": "#{:02x}{:02x}{:02x}".format(*table[item.id])}
                    for item in self.objects
                ],
                "marks": marks,
                "frames": sorted(records),
                "confidence": [confidence_of(record) for record in records.values()],
                "before": [frame for frame in records if reached[frame] > 1],
                "look": look_at(records, set(marks), height * width),
                "settings": self.settings,
            }

    # Reading the folder

    def _folders(self, name: str) -> list[Path]:
        folder = self.folder / name
        if not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def _load_run(self, folder: Path) -> Run:
        record = RunState(OwnedFolder(folder, RESUME)).record
        return Run(folder, {line.index: line for line in record})

    def _find_marks(self) -> set[int]:
        folder = self.folder / MARKS
        stems = [path.stem for path in folder.glob("*.png")] if folder.is_dir() else []
        found = {stem: self.source.find(stem) for stem in stems}
        return {frame for stem, frame in found.items() if frame is not None and self.name(frame) == stem}


def projects_in(root: Path) -> Iterator[dict[str, Any]]:
    """Yield id, title and path of the projects in a folder, those that were changed last first."""
    found = [path for path in root.glob(f"*/{PROJECT}")] if root.is_dir() else []
    for path in sorted(found, key=os.path.getmtime, reverse=True):
        try:
            stored = json.loads(path.read_bytes())
            yield {"id": path.parent.name, "title": Path(stored["path"]).name, "path": stored["path"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
