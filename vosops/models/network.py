"""What :class:`vosops.inference.NetworkTracker` needs of a network: `Network`, its `Memory` of a video, and `Masks`.

The tracker runs a network over a video like this, with every frame padded by :meth:`Network.padding` and, for each
of its scales, resized to :meth:`Network.scaled_size`:

1. first frame and labels: a new memory for each scale;
2. every further frame t: ``memory.add(image[t-1], masks[t-1], ...)``, then ``scores = memory.segment(image[t])``;
3. ``network.evidence(scores, ...)`` gives maps in full resolution, a range of rows at a time, which are averaged over
   the scales, cropped to the frame, and made probabilities by ``network.aggregate``.

Frame t-1 is added at the beginning of step t, so that what a user corrects in between counts. Memorising and
segmenting run without gradients and, if asked for, under autocast; `evidence` and `aggregate` are always float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Masks",
    "Memory",
    "Network",
    "TensorMasks",
    "objects_together",
    "one_mask_each",
    "resize_rows",
    "source_rows",
]

_BATCH_PIXELS = 1 << 20  # of the frames that a GPU computes together, an object counting as one


class Masks(ABC):
    """The soft masks of one frame at the size of the image that goes with them, made as they are asked for.

    object_ids: the objects; class 0 is the background and class 1 + i the object ``object_ids[i]``. size: (h,w).
    Probabilities of given labels are 0 and 1. In the padding all are 0, unless the network's
    ``masks_cover_padding`` says otherwise.
    """

    object_ids: list[int]
    size: tuple[int, int]

    @abstractmethod
    def of(self, index: int) -> Tensor:
        """Return the probability (h,w) float32 of a class; asking for classes in ascending order is cheapest."""

    @abstractmethod
    def labels(self) -> Tensor:
        """Return the most probable class (h,w) int64 of each pixel, the first of equals; 0 in the padding."""


class TensorMasks(Masks):
    """Masks that exist: probabilities (O+1,h,w), background first."""

    def __init__(self, probabilities: Tensor, object_ids: Sequence[int]) -> None:
        if len(probabilities) != 1 + len(object_ids):
            raise ValueError(
                f"probabilities must be of {1 + len(object_ids)} classes, got {tuple(probabilities.shape)}"
            )
        self.probabilities = probabilities.float()
        self.object_ids = list(object_ids)
        self.size = (probabilities.shape[1], probabilities.shape[2])

    def of(self, index: int) -> Tensor:
        """Return the probability (h,w) of a class."""
        return self.probabilities[index]

    def labels(self) -> Tensor:
        """Return the most probable class (h,w) of each pixel."""
        return self.probabilities.argmax(0)


class Memory(ABC):
    """The memory of a network for one video at one scale.

    Images are (1,3,h,w) float32 in [0, 1], padded (and resized), on the network's device; all of one video have one
    size. ``object_ids`` is that of the masks that were added last. Masks may hold objects that earlier ones did not:
    these appear in that frame, which is then permanent. Objects that masks do not hold have been removed before.
    """

    object_ids: list[int]

    @abstractmethod
    def add(self, image: Tensor, masks: Masks, *, frame: int, permanent: bool, keep: bool) -> None:
        """Remembers a frame with its masks.

        Called for every frame before the next one is segmented, in order. frame: its number, from 0. permanent: its
        masks are the truth (the first frame; one with new or corrected objects) and it stays permanently. keep: it is
        one of every N-th that a growing memory keeps (STM); neither: it is needed for the next frame alone, as the
        previous one. A memory that keeps only the first and the previous frame (RGMP, FEELVOS) ignores `keep`. Raises
        MemoryBudgetError (best by its `of`, which says what is needed), and then changes nothing, if permanent frames
        do not fit the budget.
        """

    @abstractmethod
    def segment(self, image: Tensor, *, frame: int) -> Tensor:
        """Return the coarse scores of a frame: a tensor for `Network.evidence`, objects in the order of ``object_ids``.

        They must not depend on a state that this call changes: segmenting twice gives the same. What was computed of
        the image alone may be kept for `add` of the same frame number; nothing else may depend on that.
        """

    @abstractmethod
    def remove_object(self, object_id: int) -> None:
        """Forgets an object of ``object_ids``."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return everything that later frames depend on, for ``torch.save`` and a weights-only load; copies."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state; what follows is the same to the bit (on the CPU)."""

    @abstractmethod
    def memory_bytes(self) -> int:
        """Return the memory used by stored frames, in bytes."""


class Network(nn.Module, ABC):
    """A network that segments a video's frames one after the other, with a memory of those before.

    Its parameters bear the names of the original checkpoint. It is run in eval mode, without gradients.
    """

    stride: int = 1
    """Both sides of an image are multiples of it."""

    channels_last: bool = False
    """Whether it runs in channels-last format by default."""

    masks_cover_padding: bool = False
    """Whether masks that are fed back are those that were predicted in the padding, too (RGMP), or 0 there (STM)."""

    def padding(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Zeros (left, right, top, bottom) around a frame of this size: up to the next `stride`, centred."""
        height, width = (-side % self.stride for side in size)
        return width // 2, width - width // 2, height // 2, height - height // 2

    def scaled_size(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        """Return the size of a padded frame at a scale: here each side rounded up to a multiple of `stride`."""
        height, width = (-(-round(side * scale) // self.stride) * self.stride for side in size)
        return height, width

    @abstractmethod
    def new_memory(self, *, budget: int | None = None, naive: bool = False) -> Memory:
        """Return an empty memory for one video.

        budget: the bytes that it may hold at most; None: what it needs. naive: remember and read as the original code
        does, without this package's memory-efficient ways, to show the difference; the ops themselves are replaced by
        `vosops.use_backend("reference")` then.
        """

    @abstractmethod
    def evidence(self, scores: Tensor, size: tuple[int, int], rows: range) -> Tensor:
        """Return some rows, in full resolution, of what is averaged over the scales: float32 (K,len(rows),w).

        scores: of `Memory.segment`. size: (h,w) of the image that was segmented. rows: a range of its rows, step 1; of
        the whole map no more may be made than these need (`resize_rows` enlarges a range of rows).
        """

    @abstractmethod
    def aggregate(self, evidence: Tensor) -> Tensor:
        """Evidence (K,...), averaged over the scales -> probabilities (O+1,...) float32, background first."""

    def clip_logits(self, frames: Tensor, labels: Tensor, objects: int) -> Tensor:
        """Track objects through clips with gradients, for training by ``vosops train``.

        frames (N,T,3,H,W) in [0, 1], of sides that are multiples of `stride`; labels (N,T,H,W) integer: 0 background, 1
        to `objects`, 255 unknown. Of the labels only those of the frames that are given to the network are looked at,
        the first or more. Returns the logits (N,T',1+objects,H,W) of the last T' frames, those that are predicted.

        Raises NotImplementedError where the network does not say how it is trained.
        """
        raise NotImplementedError(f"{type(self).__name__} has no clip_logits, which training needs")

    def probabilities(self, scores: Tensor, size: tuple[int, int], rows: range | None = None) -> Tensor:
        """Coarse scores of one scale -> probabilities (O+1,len(rows),w) float32 of rows of the image, or of all."""
        return self.aggregate(self.evidence(scores, size, range(size[0]) if rows is None else rows))


def one_mask_each(labels: Tensor, objects: int) -> Tensor:
    """Labels (N,H,W) integer -> the masks (N,objects,H,W) float32 of 1 and on; 0 where a label is anything else.

    >>> import torch
    >>> from vosops.models.network import one_mask_each
    >>> one_mask_each(torch.tensor([[[0, 2, 255]]]), 2).tolist()
    [[[[0.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]]]
    """
    ids = torch.arange(1, objects + 1, device=labels.device)
    return (labels[:, None] == ids[:, None, None]).float()


def objects_together(image: Tensor) -> int:
    """Return how many objects of an image (1,3,h,w) to batch; one on a CPU, where more only take memory."""
    if image.device.type == "cpu":
        return 1
    return max(1, _BATCH_PIXELS // (image.shape[2] * image.shape[3]))


def source_rows(height: int, target: int, rows: range, *, align_corners: bool = False) -> range:
    """Return the rows of a map of `height` rows that `resize_rows` to `target` rows needs for `rows`."""
    if len(rows) == 0:
        return range(0)
    low, high, _ = _coordinates(height, target, range(rows[0], rows[-1] + 1), align_corners)
    return range(int(low[0]), int(high[-1]) + 1)


def resize_rows(
    x: Tensor,
    size: tuple[int, int],
    rows: range,
    *,
    align_corners: bool = False,
    first: int = 0,
    height: int | None = None,
) -> Tensor:
    """Return the rows `rows` of a map resized bilinearly, without the others: (C,h,w) -> (C,len(rows),size[1]) float32.

    size: of the whole result. x may be a part of the map, rows `first` and on of `height`, if it holds all of
    `source_rows`. The same as those rows of ``interpolate(x, size, mode="bilinear")``, but for rounding.

        >>> import torch
        >>> from vosops.models.network import resize_rows
        >>> x = torch.arange(4.0).view(1, 2, 2)
        >>> resize_rows(x, (4, 2), range(1, 3))
        tensor([[[0.5000, 1.5000],
                 [1.5000, 2.5000]]])
    """
    x = x.float()
    height = x.shape[1] if height is None else height
    if height == size[0]:
        x = x[:, rows.start - first : rows.stop - first]
    else:
        low, high, share = _coordinates(height, size[0], rows, align_corners)
        shares = share.to(x.device, torch.float32)[None, :, None]
        x = torch.lerp(x[:, (low - first).to(x.device)], x[:, (high - first).to(x.device)], shares)
    if x.shape[2] == size[1]:
        return x
    return functional.interpolate(
        x[None], (x.shape[1], size[1]), mode="bilinear", align_corners=align_corners
    )[0]


def _coordinates(height: int, target: int, rows: range, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of the result the two source rows that it lies between, and the share of the second one."""
    at = torch.arange(rows.start, rows.stop, dtype=torch.float64)
    if align_corners:
        at = at * ((height - 1) / (target - 1) if target > 1 else 0.0)
    else:
        at = ((at + 0.5) * (height / target) - 0.5).clamp_(min=0)
    low = at.floor().long().clamp_(max=height - 1)
    return low, (low + 1).clamp_(max=height - 1), at - low
