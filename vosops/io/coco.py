"""The masks as COCO JSON: one annotation for each object and frame, run-length encoded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .outputs import OwnedFile, complete_or_absent, text_of
from .rle import encode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .masks import Labels


class CocoFrame(Protocol):
    """What the file tells of a frame beside its masks."""

    @property
    def index(self) -> int:
        """Its number in the input."""

    @property
    def name(self) -> str:
        """Its name, to which the file adds ``.png``."""

    @property
    def confidences(self) -> Mapping[str, float]:
        """Confidences by object id."""


class CocoFile:
    """Streams annotations into a COCO JSON file; :meth:`write` consumes frames one at a time.

    ``score`` is the object's confidence on the frame; ``bbox`` is x, y, width, height in pixels. ``names`` are those of
    objects that have one.
    """

    def __init__(
        self,
        path: Path | OwnedFile,
        size: tuple[int, int],
        object_ids: Iterable[int],
        names: Mapping[int, str] | None = None,
    ) -> None:
        self.path = path
        self.size = size
        self.object_ids = sorted(object_ids)
        self.names = names or {}

    def write(self, frames: Iterable[tuple[CocoFrame, Labels]]) -> None:
        """Write the file from (frame, (H, W) label map) pairs."""
        height, width = self.size
        images = []
        count = 0
        with complete_or_absent(self.path) as file, text_of(file) as out:
            out.write('{"annotations": [\n')
            for record, labels in frames:
                name = f"{record.name}.png"
                images.append({"id": record.index, "file_name": name, "height": height, "width": width})
                for annotation in self._annotations(record, labels):
                    count += 1
                    out.write((",\n" if count > 1 else "") + json.dumps({"id": count, **annotation}))
            categories = [{"id": i, "name": self.names.get(i, f"object {i}")} for i in self.object_ids]
            out.write(f'\n],\n"images": {json.dumps(images)},\n"categories": {json.dumps(categories)}}}\n')

    def _annotations(self, record: CocoFrame, labels: Labels) -> Iterable[dict[str, Any]]:
        for object_id in self.object_ids:
            mask = labels == object_id
            if mask.any():
                yield {
                    "image_id": record.index,
                    "category_id": object_id,
                    "segmentation": encode(mask),
                    "area": int(mask.sum()),
                    "bbox": _box(mask),
                    "iscrowd": 0,
                    "score": record.confidences.get(str(object_id), 0.0),
                }


def _box(mask: npt.NDArray[np.bool_]) -> list[int]:
    import numpy as np

    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]
