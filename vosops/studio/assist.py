"""Help with a mask: what a box or a click on a frame selects."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vosops.inference.settings import Flags, ModelSettings, make_semantic_tracker
from vosops.io.components import connected_parts
from vosops.io.errors import InputError, VosopsError, require

from .previews import small

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from vosops.inference import SemanticTracker
    from vosops.io.frames import Image

    Mask = npt.NDArray[np.bool_]

__all__ = ["ClassClicks", "ClickTool", "Sam2Clicks", "grab_cut"]

_LONGEST_CUT = 480  # GrabCut takes seconds on a megapixel
_ROUNDS = 4
_LEAST_BOX = 4  # pixels
_CONTEXT = 0.5  # of the box around it, that tells the background's colours

Point = tuple[int, int, bool]
"""x, y, and whether the object is there (or is not)."""


class ClickTool(Protocol):
    """What turns clicks on a frame into a mask."""

    @property
    def title(self) -> str:
        """What the page calls it."""

    def select(self, key: object, image: Image, points: Sequence[Point]) -> Mask:
        """Return the mask (H, W) of what was clicked on.

        Args:
            key: Tells the frame from others, for what is computed once for a frame.
            image: (H, W, 3) uint8 RGB.
            points: At least one that is on the object.
        """
        ...


def grab_cut(image: Image, box: tuple[int, int, int, int]) -> Mask:
    """Return the mask (H, W) of the object in a box, by OpenCV's GrabCut (Rother et al., SIGGRAPH 2004).

    Computed on the box and half its size around it, at 480 pixels at most; some tenths of a second.

    Args:
        image: (H, W, 3) uint8 RGB.
        box: left, top, right, bottom in pixels, right and bottom exclusive.

    Raises:
        InputError: The box is smaller than 4 pixels within the frame.
        VosopsError: OpenCV is not installed.
    """
    import numpy as np

    cv2: Any = require("cv2", "studio")
    height, width, _ = image.shape
    left, right = (min(max(value, 0), width) for value in sorted((box[0], box[2])))
    top, bottom = (min(max(value, 0), height) for value in sorted((box[1], box[3])))
    if right - left < _LEAST_BOX or bottom - top < _LEAST_BOX:
        raise InputError(f"box must have sides of {_LEAST_BOX} pixels or more in the frame, got {box}")
    around_x, around_y = round((right - left) * _CONTEXT) + 1, round((bottom - top) * _CONTEXT) + 1
    x0, x1 = max(0, left - around_x), min(width, right + around_x)
    y0, y1 = max(0, top - around_y), min(height, bottom + around_y)
    part = small(np.ascontiguousarray(image[y0:y1, x0:x1]), _LONGEST_CUT)
    scale_x, scale_y = part.shape[1] / (x1 - x0), part.shape[0] / (y1 - y0)
    inside = (
        round((left - x0) * scale_x),
        round((top - y0) * scale_y),
        max(1, round((right - left) * scale_x)),
        max(1, round((bottom - top) * scale_y)),
    )
    state = np.full(part.shape[:2], cv2.GC_BGD, np.uint8)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    x, y, w, h = inside
    state[y : y + h, x : x + w] = cv2.GC_PR_FGD
    if not (state == cv2.GC_BGD).any():  # the box is the frame: its border is the background
        state[[0, -1]] = state[:, [0, -1]] = cv2.GC_BGD
    cv2.setRNGSeed(0)
    cv2.grabCut(np.ascontiguousarray(part[..., ::-1]), state, None, *models, _ROUNDS, cv2.GC_INIT_WITH_MASK)
    found = ((state == cv2.GC_FGD) | (state == cv2.GC_PR_FGD)).astype(np.float32)
    whole = cv2.resize(found, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR) > 0.5
    mask: Mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = whole
    mask[:, :left] = mask[:, right:] = mask[:top] = mask[bottom:] = False
    return mask


@dataclass(frozen=True)
class ClickSettings(ModelSettings):
    """The network whose classes a click selects."""

    flags = Flags("--click", "--click-weights", "--click-option", short=False)


@dataclass
class ClassClicks:
    """Selects the connected part of the class that a network finds where the click is.

    Args:
        settings: The network.
    """

    settings: ClickSettings
    _tracker: SemanticTracker | None = field(default=None, repr=False)
    _latest: tuple[object, npt.NDArray[np.uint8]] | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def title(self) -> str:
        """What the page calls it."""
        return f"Select by the classes of {self.settings.model}"

    def select(self, key: object, image: Image, points: Sequence[Point]) -> Mask:
        """See :class:`ClickTool`; a point that is not on the object removes the part there."""
        import numpy as np

        labels = self._labels(key, image)
        mask: Mask = np.zeros(labels.shape, dtype=bool)
        for x, y, on in points:
            parts = connected_parts(labels == labels[y, x])
            part = parts == parts[y, x]
            mask = mask | part if on else mask & ~part
        return mask

    def _labels(self, key: object, image: Image) -> npt.NDArray[np.uint8]:
        import torch

        with self._lock:
            if self._tracker is None:
                self._tracker = make_semantic_tracker(self.settings)
            if self._latest is None or self._latest[0] != key:
                self._tracker.reset()
                frame = torch.from_numpy(image.copy()).permute(2, 0, 1)
                with torch.inference_mode():
                    labels = self._tracker.step(frame, output="labels").cpu().byte().numpy()
                self._latest = (key, labels)
            return self._latest[1]


@dataclass
class Sam2Clicks:
    """Selects with SAM 2 (Ravi et al., 2024), in the format of the package ``transformers``.

    Args:
        folder: What ``Sam2Model.save_pretrained`` wrote, with its processor; nothing is downloaded.
        device: Where it runs.
    """

    folder: Path
    device: str = "cpu"
    title: str = "Select with SAM 2"
    _made: tuple[Any, Any] | None = field(default=None, repr=False)
    _latest: tuple[object, Any] | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def select(self, key: object, image: Image, points: Sequence[Point]) -> Mask:
        """See :class:`ClickTool`."""
        import numpy as np
        import torch

        with self._lock, torch.inference_mode():
            model, processor = self._model()
            clicks = {
                "input_points": [[[[x, y] for x, y, _ in points]]],
                "input_labels": [[[int(on) for _, _, on in points]]],
            }
            given = processor(images=np.asarray(image), **clicks, return_tensors="pt").to(self.device)
            if self._latest is None or self._latest[0] != key:
                self._latest = (key, model.get_image_embeddings(given["pixel_values"]))
            found = model(
                input_points=given["input_points"],
                input_labels=given["input_labels"],
                image_embeddings=self._latest[1],
                multimask_output=len(points) == 1,
            )
            best = int(found.iou_scores[0, 0].argmax())
            masks = processor.post_process_masks(found.pred_masks.cpu(), given["original_sizes"])[0]
            mask: Mask = np.asarray(masks[0, best].numpy(), dtype=bool)
            return mask

    def _model(self) -> tuple[Any, Any]:
        if self._made is None:
            try:
                transformers: Any = import_module("transformers")
            except ImportError as error:
                raise VosopsError("--sam2 needs transformers: pip install transformers") from error
            try:
                model = transformers.Sam2Model.from_pretrained(self.folder, local_files_only=True)
                processor = transformers.Sam2Processor.from_pretrained(self.folder, local_files_only=True)
            except (OSError, ValueError, AttributeError) as error:
                reason = " ".join(str(error).split())
                raise VosopsError(f"--sam2 {self.folder} cannot be used: {reason}") from error
            self._made = (model.to(self.device).eval(), processor)
        return self._made
