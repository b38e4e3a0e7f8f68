"""What the trackers share: the checks of frames and labels, and label maps from probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST, _MOST = -1.0, 2.0  # of floating frames; sharpening filters leave [0, 1] by less
IGNORED = 255  # the label of pixels about which nothing is known


def ids_of(labels: Tensor) -> list[int]:
    """Return the ids of the objects in labels, ascending."""
    return [int(i) for i in torch.unique(labels).tolist() if i not in (0, IGNORED)]


def check_first(frame: Tensor, labels: Tensor) -> None:
    """Raise ValueError or TypeError unless a tracker can start from this frame."""
    check_frame(frame)
    check_labels(labels, frame)
    if not ids_of(labels):
        raise ValueError("labels must hold at least one object, got only background and unknown pixels")


def check_frame(frame: Tensor, size: tuple[int, int] | None = None, channels: int = 3) -> None:
    """Raise ValueError or TypeError unless frame is (channels,H,W) uint8 or floating, of this size.

    A first frame (size None) must hold values that can be meant to be in [0, 1].
    """
    if not isinstance(frame, Tensor):
        raise TypeError(f"frame must be a tensor ({channels},H,W), got a {type(frame).__name__}")
    if frame.ndim != 3 or frame.shape[0] != channels or 0 in frame.shape:
        raise ValueError(f"frame must be ({channels},H,W), got {tuple(frame.shape)}")
    if frame.dtype != torch.uint8 and not frame.is_floating_point():
        scale = ": divide by 65535 for [0, 1]" if frame.dtype == torch.uint16 else ""
        raise TypeError(f"frame must be uint8 or floating in [0, 1], got {frame.dtype}{scale}")
    if size is None and frame.is_floating_point() and (frame.amax() > _MOST or frame.amin() < _LEAST):
        raise ValueError(
            "frame must be uint8 or floating in [0, 1], got values from "
            f"{float(frame.amin()):.4g} to {float(frame.amax()):.4g}: pass the image as displayed, not normalised"
        )
    if size is not None and tuple(frame.shape[1:]) != size:
        raise ValueError(f"frame must have the first frame's size {size}, got {tuple(frame.shape[1:])}")


def check_labels(labels: Tensor, frame: Tensor) -> None:
    """Raise ValueError or TypeError unless labels are integers >= 0 of the frame's size."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor (H,W), got a {type(labels).__name__}")
    if labels.shape != frame.shape[1:]:
        raise ValueError(f"labels must be (H,W) = {tuple(frame.shape[1:])}, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.dtype in (torch.uint16, torch.uint32, torch.uint64):  # for which torch has no minimum
        raise TypeError(f"labels must be uint8 or signed integers, got {labels.dtype}: use labels.long()")
    if labels.numel() and int(labels.min()) < 0:
        raise ValueError(f"labels must be >= 0, got {int(labels.min())}")


def check_output(output: str) -> None:
    """Raise ValueError unless output is "probs" or "labels"."""
    if output not in ("probs", "labels"):
        raise ValueError(f"output must be 'probs' or 'labels', got {output!r}")


def id_dtype(object_ids: Sequence[int]) -> torch.dtype:
    """Return the dtype of a map of these ids: uint8 where they fit, else int64."""
    return torch.uint8 if max(object_ids, default=0) <= IGNORED else torch.int64


def most_probable(probabilities: Tensor, object_ids: Sequence[int]) -> Tensor:
    """(O+1,H,W) -> (H,W) ids of the most probable class: uint8 where the ids fit, else int64."""
    return _with_ids(probabilities.argmax(0), object_ids)


def _with_ids(classes: Tensor, object_ids: Sequence[int]) -> Tensor:
    return torch.tensor([0, *object_ids], dtype=id_dtype(object_ids), device=classes.device)[classes]


class KeepsConfidence:
    """The part of a tracker that answers what :meth:`step` found, and keeps what :meth:`confidence` asks for."""

    object_ids: list[int]
    _confidence: Tensor | None = None

    def confidence(self) -> Tensor:
        """Return the probability (H,W) of each pixel's label in the latest frame; see `vosops.models.VideoTracker`."""
        if self._confidence is None:
            raise RuntimeError("initialize or step must be called before confidence")
        return self._confidence

    def _answer(self, probabilities: Tensor, output: str) -> Tensor:
        """Probabilities (O+1,H,W) of the latest frame, as `output` asks for them."""
        if output == "probs":
            self._confidence = probabilities.amax(0)
            return probabilities
        self._confidence, classes = probabilities.max(0)
        return _with_ids(classes, self.object_ids)
