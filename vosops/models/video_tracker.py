"""`VideoTracker`: what everything offers that tracks objects through a video."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

__all__ = ["VideoTracker"]


class VideoTracker(Protocol):
    """Tracks the objects of a first frame through a video, a frame at a time.

    frame: (3,H,W) uint8, or floating in [0, 1]; every frame of a video has the same size. labels: (H,W) integer,
    0 background, 255 unknown, other values are object ids. Probabilities: (O+1,H,W) float32, background first,
    then the objects in the order of ``object_ids``.
    """

    @property
    def object_ids(self) -> list[int]:
        """The ids of the objects that are tracked, in the order of the probabilities."""

    def initialize(self, frame: Tensor, labels: Tensor) -> None:
        """Forget everything and start from this frame, whose labels are the truth."""

    def step(
        self,
        frame: Tensor,
        labels: Tensor | None = None,
        *,
        permanent: bool = False,
        end: bool = False,
        output: str = "probs",
    ) -> Tensor:
        """Segment the next frame; labels, if any, are the truth for it and are kept permanently.

        permanent: keep the frame permanently, as labelled ones are. end: it is the last one;
        nothing need be stored.
        output: "probs", or "labels" for a map of ids (H,W), uint8 where they fit, else int64.
        """

    def predict(self, frame: Tensor, *, output: str = "probs") -> Tensor:
        """Segment a frame as :meth:`step` would, and leave the tracker as it was.

        To correct what it sees in the next frame: ``step(frame, corrected)``, with labels made from this prediction.
        """

    def confidence(self) -> Tensor:
        """Return the probability (H,W) float32 of each pixel's label in the latest frame; 1 where labels were given.

        Raises RuntimeError before the first frame, and where a state was loaded since.
        """

    def add_objects(self, frame: Tensor, labels: Tensor) -> None:
        """Add the objects of labels, or correct known ones, in the frame that was segmented last.

        0 in labels is "none of the objects in labels": the other objects keep the pixels that they have there.
        """

    def remove_object(self, object_id: int) -> None:
        """Stop tracking an object and forget it."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, as tensors, numbers and lists."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""

    def reset(self) -> None:
        """Forget everything."""
