"""The pass after the loop: overlay video, cut-outs, COCO JSON and contact sheet from frames and masks.

Everything here is made from the input and the finished masks, so a run that stops here starts this pass
again and loses nothing. Files that are there already are not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from vosops.io.coco import CocoFile
from vosops.io.errors import InputError, InterruptedRunError
from vosops.io.frames import FrameSource
from vosops.io.labels import read_labels
from vosops.io.listing import CONTACT_SHEET, shown
from vosops.io.masks import LabelMaps
from vosops.io.video import VideoFile
from vosops.io.video_writer import VideoWriter

from .drawing import ContactSheet, class_overlay, colour_table, overlay, write_cutout
from .progress import Progress
from .report import FrameRecord, Record

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np
    import numpy.typing as npt

    from vosops.io.frames import Image
    from vosops.io.masks import Labels
    from vosops.io.outputs import OwnedFile, OwnedFolder

OVERLAY = "overlay.mp4"
COCO = "masks.json"
CUTOUT_FOLDER = "cutout"
_CAPTION_OBJECTS = 4
_FOLDER_CLOCK = Fraction(1, 12_800)  # unit of time of an overlay made from a folder of frames


@dataclass(frozen=True)
class Outputs:
    """What to write beside the masks, the contact sheet and the report."""

    overlay: bool = False
    cutout: bool = False
    coco: bool = False


@dataclass(frozen=True)
class DrawingPass:
    """Draws what is asked for and not there yet in ``out``."""

    out: OwnedFolder
    source: FrameSource
    masks: LabelMaps
    record: Record
    outputs: Outputs
    progress: Progress
    should_stop: Callable[[], bool]

    def execute(self) -> None:
        """Write the files; each is complete or absent."""
        names = dict(self.record.names())
        if self.outputs.coco and not self.out.file(COCO).exists():
            self._write_coco()
        overlay_file = self.out.file(OVERLAY)
        writer = (
            self._overlay_writer(overlay_file) if self.outputs.overlay and not overlay_file.exists() else None
        )
        cutouts = self._missing_cutouts(names) if self.outputs.cutout else {}
        sheet = ContactSheet(self.out.file(CONTACT_SHEET))
        indices = list(names)
        on_sheet = (
            set()
            if self.out.file(CONTACT_SHEET).exists()
            else {indices[i] for i in sheet.choose(len(indices))}
        )
        needed = indices if writer is not None else sorted({*on_sheet, *cutouts})
        if not needed:
            return
        captions = {r.index: _caption(r) for r in self.record if r.index in on_sheet}
        context: AbstractContextManager[object] = writer or nullcontext()
        self.progress.begin("draw", len(needed), 0)
        try:
            with context:
                for raw in self.source.forward(needed):
                    labels = self._labels(names[raw.index])
                    if raw.index in cutouts:
                        write_cutout(cutouts[raw.index], raw.image, labels, self.masks.binary)
                    if writer is not None or raw.index in on_sheet:
                        picture = self._picture(raw.image, labels)
                        if writer is not None:
                            writer.write(picture, raw.time)
                        if raw.index in on_sheet:
                            sheet.add(picture, captions[raw.index])
                    self.progress.advance()
                    if self.should_stop():
                        raise InterruptedRunError(
                            "stopped while drawing, all masks are written; "
                            "run the same command with --resume to continue"
                        )
        finally:
            self.progress.end()
        if on_sheet:
            sheet.save()

    def _picture(self, image: Image, labels: Labels) -> Image:
        masks = self.masks
        if masks.classes and masks.palette is not None:
            return class_overlay(image, labels, masks.palette)
        return overlay(image, labels, self._table, masks.binary)

    @cached_property
    def _table(self) -> npt.NDArray[np.uint8]:
        return colour_table(self.masks.palette, self.masks.binary)

    def _missing_cutouts(self, names: dict[int, str]) -> dict[int, OwnedFile]:
        files = {index: self.out.file(f"{CUTOUT_FOLDER}/{name}.png") for index, name in names.items()}
        return {index: file for index, file in files.items() if not file.exists()}

    def _overlay_writer(self, file: OwnedFile) -> VideoWriter:
        if isinstance(self.source, VideoFile):
            video = self.source
            return VideoWriter(
                file, video.size, video.average_rate, video.time_base, video.sample_aspect_ratio
            )
        return VideoWriter(file, self.source.size, self.source.average_rate, _FOLDER_CLOCK)

    def _write_coco(self) -> None:
        CocoFile(self.out.file(COCO), self.source.size, self.masks.first_area).write(
            self._records_and_labels()
        )

    def _records_and_labels(self) -> Iterator[tuple[FrameRecord, Labels]]:
        for record in self.record.in_order():
            yield record, self._labels(record.name)

    def _labels(self, name: str) -> Labels:
        path = self.out.root / f"{name}.png"
        labels = read_labels(path)[0]
        if labels.shape != self.source.size:
            raise InputError(f"{path} was changed and no longer has the size of the frames: fix or remove it")
        return labels


def _caption(record: FrameRecord) -> str:
    """Return a frame's name and what is known of its objects, for the contact sheet."""
    name = shown(record.name)
    if record.given:
        return f"{name}   given mask"
    objects = [f"{i}: {c:.2f}" if record.areas[i] else f"{i}: -" for i, c in record.confidences.items()]
    more = " ..." if len(objects) > _CAPTION_OBJECTS else ""
    return f"{name}   {'  '.join(objects[:_CAPTION_OBJECTS])}{more}"
