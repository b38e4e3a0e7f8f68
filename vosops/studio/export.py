"""Files to take away: masks in the layouts of DAVIS and YouTube-VOS, an overlay, cut-outs, COCO JSON, a command."""

from __future__ import annotations

import io
import json
import re
import shlex
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vosops.inference.settings import DEFAULT_SIZE
from vosops.io.coco import CocoFile
from vosops.io.errors import InputError, VosopsError, require
from vosops.io.frames import RawFrame
from vosops.io.labels import davis_palette
from vosops.io.outputs import complete_or_absent
from vosops.io.video import VideoFile
from vosops.io.video_writer import VideoWriter, in_stated_colours, state_colours
from vosops.runs.drawing import colour_table, overlay, soft_alpha
from vosops.runs.job import Settings

from .follow import reading
from .jobs import Control, Job
from .project import EXPORTS, Project

if TYPE_CHECKING:
    from vosops.io.masks import Labels

__all__ = ["EXPORT_KINDS", "Exporter", "command"]

_FOLDER_CLOCK = Fraction(1, 12_800)  # unit of time of a video made from a folder of frames
_JPEG_QUALITY = 95
_WEBM_OPTIONS = {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "6", "auto-alt-ref": "0"}


@dataclass(frozen=True)
class ExportKind:
    """A kind of file: what the page calls it, and how its name ends."""

    title: str
    about: str
    suffix: str


EXPORT_KINDS = {
    "masks": ExportKind("Masks", "a palette PNG for each frame, as vosops segment writes them", "-masks.zip"),
    "davis": ExportKind("DAVIS layout", "JPEGImages and Annotations of DAVIS 2017", "-davis.zip"),
    "youtube": ExportKind("YouTube-VOS layout", "JPEGImages, Annotations and meta.json", "-youtube-vos.zip"),
    "coco": ExportKind("COCO JSON", "run-length encoded masks with boxes and scores", "-coco.json"),
    "overlay": ExportKind("Overlay video", "the video with coloured objects, MP4", "-overlay.mp4"),
    "cutout": ExportKind(
        "Cut-outs", "the objects on a transparent background, a PNG each frame", "-cutout.zip"
    ),
    "webm": ExportKind("Transparent video", "the cut-outs as WebM with alpha", "-cutout.webm"),
    "command": ExportKind("Command and marks", "the marks, and the vosops segment command", "-command.zip"),
}


@dataclass(frozen=True)
class Exporter:
    """Writes the files of jobs of the kind "export".

    Args:
        settings_of: Returns the engine's settings for a project, for the command.
    """

    settings_of: Callable[[Project], Settings]

    def export(self, project: Project, job: Job, control: Control) -> str:
        """Do a job: write the file of ``request["kind"]`` into the project; return its name."""
        kind = job.request.get("kind")
        if not isinstance(kind, str) or kind not in EXPORT_KINDS:
            raise InputError(f"kind must be one of {', '.join(EXPORT_KINDS)}, got {kind!r}")
        frames = project.shown_frames()
        if not frames:
            raise InputError("there is no mask yet: mark an object, then follow it")
        name = f"{slug(project)}-{job.number:04d}{EXPORT_KINDS[kind].suffix}"
        task = _Task(project, frames, control, project.folder / EXPORTS / name, self.settings_of(project))
        control.begin(len(frames))
        try:
            getattr(task, f"write_{kind}")()
        except _Stopped:
            return "stopped"
        job.memory["file"] = name
        return name


class _Stopped(Exception):
    """Somebody wishes the export to stop; what it wrote so far vanishes with its temporary file."""


@dataclass(frozen=True)
class _Task:
    """One file in the making."""

    project: Project
    frames: list[int]
    control: Control
    target: Path
    settings: Settings

    @property
    def sequence(self) -> str:
        return slug(self.project)

    def write_masks(self) -> None:
        with self._archive() as archive:
            for frame, labels in self._labels():
                archive.writestr(f"{self.project.name(frame)}.png", png_of(labels))

    def write_davis(self) -> None:
        folder = "{}/480p/" + self.sequence
        with self._archive() as archive:
            for raw, labels in self._pictures():
                name = f"{raw.index:05d}"
                archive.writestr(f"{folder.format('JPEGImages')}/{name}.jpg", jpeg_of(raw))
                archive.writestr(f"{folder.format('Annotations')}/{name}.png", png_of(labels))
            archive.writestr("ImageSets/2017/val.txt", f"{self.sequence}\n")

    def write_youtube(self) -> None:
        seen: dict[int, list[str]] = {}
        with self._archive() as archive:
            for raw, labels in self._pictures():
                name = f"{raw.index:05d}"
                archive.writestr(f"JPEGImages/{self.sequence}/{name}.jpg", jpeg_of(raw))
                archive.writestr(f"Annotations/{self.sequence}/{name}.png", png_of(labels))
                for number in ids_in(labels):
                    seen.setdefault(number, []).append(name)
            names = {item.id: item.name for item in self.project.objects}
            objects = {
                str(number): {"category": names.get(number, f"Object {number}"), "frames": frames}
                for number, frames in sorted(seen.items())
            }
            meta = {"videos": {self.sequence: {"objects": objects}}}
            archive.writestr("meta.json", json.dumps(meta, indent=1))

    def write_coco(self) -> None:
        ids = [item.id for item in self.project.objects]
        names = {item.id: item.name for item in self.project.objects}
        CocoFile(self.target, self.project.source.size, ids, names).write(self._records())

    def write_overlay(self) -> None:
        table = colour_table(davis_palette(), binary=False)
        source = self.project.source
        time_base = source.time_base if isinstance(source, VideoFile) else _FOLDER_CLOCK
        shape = source.sample_aspect_ratio if isinstance(source, VideoFile) else None
        with VideoWriter(self.target, source.size, source.average_rate, time_base, shape) as writer:
            for raw, labels in self._pictures():
                writer.write(overlay(raw.image, labels, table, binary=False), raw.time)

    def write_cutout(self) -> None:
        from PIL import Image

        with self._archive() as archive:
            for raw, labels in self._pictures():
                buffer = io.BytesIO()
                Image.fromarray(cut_out(raw, labels), "RGBA").save(buffer, format="PNG", compress_level=4)
                archive.writestr(f"{self.project.name(raw.index)}.png", buffer.getvalue())

    def write_webm(self) -> None:
        av: Any = require("av")
        if "libvpx-vp9" not in av.codecs_available:
            raise VosopsError("this build of PyAV has no libvpx-vp9: export the cut-outs as PNG")
        source = self.project.source
        height, width = source.size
        with complete_or_absent(self.target) as file, av.open(file, "w", format="webm") as container:
            stream = container.add_stream("libvpx-vp9", rate=source.average_rate, options=_WEBM_OPTIONS)
            stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuva420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            state_colours(stream.codec_context)
            last = -1
            for raw, labels in self._pictures():
                picture = pad_to_even(cut_out(raw, labels))
                frame = in_stated_colours(av.VideoFrame.from_ndarray(picture, format="rgba"), "yuva420p")
                frame.pts = last = max(last + 1, round(raw.time * 1000))
                frame.time_base = Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())

    def write_command(self) -> None:
        project = self.project
        with self._archive() as archive:
            for frame in project.marks:
                archive.write(project.mark_path(frame), f"marks/{project.name(frame)}.png")
                self.control.advance()
            text = command(project, self.settings, Path("marks"))
            about = "# Run this in the folder that holds marks/. It follows every mark in one run.\n"
            archive.writestr("command.sh", f"#!/bin/sh\n{about}{text}\n")

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        with complete_or_absent(self.target) as file, zipfile.ZipFile(file, "w") as archive:
            yield archive

    def _advance(self) -> None:
        self.control.advance()
        if self.control.should_stop():
            raise _Stopped

    def _labels(self) -> Iterator[tuple[int, Labels]]:
        for frame in self.frames:
            labels = self.project.labels(frame)
            if labels is not None:
                yield frame, labels
            self._advance()

    def _pictures(self) -> Iterator[tuple[RawFrame, Labels]]:
        """Yield each frame that has a mask, and its label map."""
        with reading(self.project.source) as reader:
            for raw in reader.forward(self.frames):
                labels = self.project.labels(raw.index)
                if labels is not None:
                    yield raw, labels
                self._advance()
            if reader.problem:
                raise VosopsError(reader.problem)

    def _records(self) -> Iterator[tuple[Any, Labels]]:
        for frame, labels in self._labels():
            yield _Described.of(self.project, frame), labels


@dataclass(frozen=True)
class _Described:
    """What COCO tells of a frame beside its masks."""

    index: int
    name: str
    confidences: dict[str, float]

    @classmethod
    def of(cls, project: Project, frame: int) -> _Described:
        record = project.record(frame)
        certain = {str(item.id): 1.0 for item in project.objects}
        marked = frame in project.marks or record is None
        return cls(frame, project.name(frame), certain if marked else record.confidences)  # type: ignore[union-attr]


def command(project: Project, settings: Settings, marks: Path | None = None) -> str:
    """Return the ``vosops segment`` command that follows every mark of a project in one run.

    Args:
        project: The project.
        settings: How its objects are followed.
        marks: The folder of the marks as the command shall name it; None: where they are. Marks without an object are
            left out, as ``--mask`` has no use for them.
    """
    words = ["vosops", "segment", str(project.path), "--out", f"{slug(project)}-masks"]
    words += ["--mask", str(marks if marks is not None else project.mark_path(0).parent)]
    words += ["--model", settings.model]  # what is usual depends on what is installed
    if settings.weights is not None:
        words += ["--weights", str(settings.weights)]
    for name, value in settings.options.items():
        words += (
            [f"--{name}", str(value)] if name in ("backbone", "checkout") else ["--option", f"{name}={value}"]
        )
    if settings.device is not None:
        words += ["--device", settings.device]
    if settings.dtype != "float32":
        words += ["--dtype", settings.dtype]
    if settings.memory_budget is not None:
        words += ["--memory-budget", str(settings.memory_budget)]
    if settings.size != DEFAULT_SIZE:
        words += ["--size", str(settings.size)]
    return shlex.join(words)


def slug(project: Project) -> str:
    """Return the name of a project's files: that of its video in letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", project.path.stem).strip("-").lower() or "video"


def ids_in(labels: Labels) -> list[int]:
    """Return the ids of the objects in a label map, ascending."""
    import numpy as np

    return [int(number) for number in np.flatnonzero(np.bincount(labels.ravel(), minlength=256)) if number]


def png_of(labels: Labels) -> bytes:
    """Return a label map as a PNG with DAVIS' palette."""
    from PIL import Image

    picture = Image.fromarray(labels)
    picture.putpalette(davis_palette())
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def jpeg_of(raw: RawFrame) -> bytes:
    """Return a frame as a JPEG."""
    from .previews import jpeg

    return jpeg(raw.image, _JPEG_QUALITY)


def cut_out(raw: RawFrame, labels: Labels) -> Any:
    """Return the objects of a frame, (H, W, 4) uint8 RGBA."""
    import numpy as np

    alpha = soft_alpha(labels > 0)
    return np.dstack([np.where(alpha[..., None] > 0, raw.image, 0).astype(np.uint8), alpha])


def pad_to_even(picture: Any) -> Any:
    """Return a picture with even sides, by repeating its last row and column."""
    import numpy as np

    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
