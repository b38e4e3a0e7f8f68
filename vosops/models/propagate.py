"""Propagate: masks through a video by matching frozen features. No training, no download.

Each cell of a coarse grid (stride 8) is compared with the cells of every object, and of the background, in the
permanent frames (global matching: the mean of the nearest few) and in recent frames (local matching: the nearest in a
window). The features are whitened by the covariance within the classes. A linear classifier fitted to the permanent
frames adds its score, and, if wanted, a memory of every fifth frame what it reads. A softmax over these gives coarse
probabilities, which a guided filter brings to the frame's edges. docs/models/propagate.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

import vosops
from vosops.memory import MemoryBank, MemoryBudgetError, parse_bytes
from vosops.models._tracking import (
    IGNORED,
    KeepsConfidence,
    check_first,
    check_frame,
    check_labels,
    check_output,
    ids_of,
    most_probable,
)
from vosops.models.features import create_backbone
from vosops.models.guided_filter import GuidedFilter, box_mean

__all__ = ["Evidence", "Propagate"]

SIZE_MULTIPLE = 16  # of the computation's height and width
CONTEXT_RADIUS = 1  # of the box over neighbouring cells that adds context to a cell's features
CONTEXT_WEIGHT = 0.4  # of the context beside the cell's own features
SHRINKAGE = 0.6  # of the covariance within the classes towards its mean variance, before whitening
EMBEDDING_CHANNELS = 128  # what is kept of the whitened features
NEIGHBORS = 5  # of global matching
WINDOWS = {1: 8, 3: 14}  # radius of local matching in cells, for each age of a recent frame
TEMPERATURE = 0.05  # of the softmax over the classes' cosine similarities
LOCAL_MARGIN = 0.25  # how much more similar the recent frames must be than the permanent ones to be believed
LOCAL_SLOPE = 0.05  # of that choice, which is a sigmoid
RIDGE = 0.01  # regularisation of the linear classifier
FEWEST_CELLS = 3.0  # a class with fewer counts less in the classifier
RECENT_WEIGHT = 0.5  # of the recent frames in the classifier, beside the permanent ones
RECENT_RATE = 0.1  # of the running mean over the recent frames
CONFIDENT = 0.6  # cells with a less probable class teach the classifier nothing
MEMORY_EVERY = 5  # frames from one that enters the memory to the next
MEMORY_FRAMES = 6  # in the memory beside the permanent ones
MEMORY_CELLS = 1024  # of a frame in the memory, half of them of the objects, if they have that many
MEMORY_NEIGHBORS = 16  # of a cell, whose classes the memory read averages
MEMORY_WEIGHT = 0.5  # of that average's logarithm, where the permanent frames do not explain a cell
MEMORY_FLOOR = 0.02  # the least average that counts
MEMORY_LEAST = 0.02  # of the choice for the recent frames: cells below it do not read the memory
CLASSIFIER_WEIGHT = 1.0  # of the classifier's score (-1 to 1) beside similarity / TEMPERATURE
SEARCH_RADIUS = 12  # cells farther than this from every object are background without a look
SEARCH_PROBABILITY = 0.3  # from which a cell is part of an object, for the search
FILTER_RADIUS = 4  # of the guided filter, in pixels of the computation
FILTER_EPS = 1e-3
CERTAIN = 0.005  # cells whose objects are less probable than this need no filter
ABSENT_DISTANCE = 4.0  # the largest squared distance of unit vectors: cosine -1

_SAVED_LISTS = ("permanent_features", "permanent_masks", "recent_keys", "recent_probabilities")
_SAVED_TENSORS = (
    "embedding",
    "permanent_keys",
    "permanent_moments",
    "recent_moments",
)
_MEMORY_OVERHEAD = (1 << 20) + 1024  # bytes of the memory's scratch and alignment, at most
_ALL_CLASSES = 0  # the memory's one object: the classes are channels of its values


@dataclass(frozen=True)
class Evidence:
    """What the cells of a frame say of the classes: background first, then the objects.

    Attributes:
        search: bool (h,w): the cells that were looked at; nothing else here means anything elsewhere.
        permanent: (O+1,h,w) cosines: the mean of the nearest few cells in the permanent frames.
        recent: the same of the nearest cell in a window of a recent frame, for each age of `WINDOWS` that exists.
        nearest: int64 (O+1,h,w): the flat index of that cell in the latest frame, -1 for none.
        local: (h,w) in [0, 1]: how far the recent frames are believed rather than the permanent ones.
        score: (O+1,h,w): the linear classifier's.
        memory: (O+1,h,w): the classes that the memory of frames returns; 0 in all of them where it was not read.
        logits: (O+1,h,w): all of these together; their softmax is the result.
    """

    search: Tensor
    permanent: Tensor
    recent: list[Tensor]
    nearest: Tensor
    local: Tensor
    score: Tensor
    memory: Tensor
    logits: Tensor


P = ParamSpec("P")
R = TypeVar("R")


def _full_precision(method: Callable[P, R]) -> Callable[P, R]:
    """Turn autocast off for a method: only the backbone runs in reduced precision."""

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return method(*args, **kwargs)

    return run


class Propagate(KeepsConfidence):
    """The training-free tracker: a :class:`vosops.models.VideoTracker`.

    backbone: a name for :func:`vosops.models.features.create_backbone`; pretrained=False takes random weights.
    size: the short side of the computation in pixels (frames are resized to it and results are given at the frame's
    own size); -1 computes at the frame's size. device: where everything runs; results stay there.
    memory_budget: limit of the memory for stored frames: bytes, or a string such as "2GB"; before it
    would be exceeded, MemoryBudgetError is raised with the number of permanent frames that fit. memory:
    whether every fifth frame is stored too, in a
    :class:`vosops.memory.MemoryBank`; None: if there is a budget for it.
    Cost: one backbone pass, then time and memory linear in the cells near the objects times those of the
    permanent frames.
    """

    _MORE_OF_LATEST = 0  # numbers that a subclass remembers of each cell and object of the latest frame

    def __init__(
        self,
        backbone: str = "efficientnet_lite0",
        *,
        weights: str | Path | None = None,
        pretrained: bool = True,
        size: int = -1,
        device: str | torch.device = "cpu",
        memory_budget: int | str | None = None,
        memory: bool | None = None,
    ) -> None:
        if weights is not None:
            raise ValueError(
                f"weights must be None, got {weights}: propagate is not trained; choose its features with backbone="
            )
        if size != -1 and size < SIZE_MULTIPLE:
            raise ValueError(f"size must be -1 or at least {SIZE_MULTIPLE}, got {size}")
        self.backbone_name = backbone if pretrained else f"{backbone} (random)"
        self.backbone = create_backbone(backbone, pretrained=pretrained).to(device)
        self.size = size
        self.device = torch.device(device)
        self.memory_budget = None if memory_budget is None else parse_bytes(memory_budget)
        self.with_memory = memory_budget is not None if memory is None else memory
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.object_ids: list[int] = []
        self._frame_size: tuple[int, int] | None = None
        self._permanent_features: list[Tensor] = []  # (C,h,w) each, as they come from the backbone
        self._permanent_masks: list[Tensor] = []  # bool (O+1,h,w) each: a cell is of one class or of none
        self._embedding = torch.empty(0)  # (D,C)
        self._permanent_keys = torch.empty(0)  # (D,T,h,w), embedded
        self._permanent_moments = torch.empty(0)  # (D+1+O+1,D+1), of the classifier
        self._recent_moments = torch.empty(0)
        self._recent_keys: list[Tensor] = []  # (D,h,w) each, the latest last
        self._recent_probabilities: list[Tensor] = []  # (O+1,h,w) each
        self._memory = self._new_memory(None)
        self._steps = 0  # since the memory was begun
        self._confidence = None

    @torch.no_grad()
    def initialize(self, frame: Tensor, labels: Tensor) -> None:
        """Forgets everything and starts from this frame: see :class:`vosops.models.VideoTracker`."""
        check_first(frame, labels)
        self.reset()
        self._frame_size = (frame.shape[1], frame.shape[2])
        features = self._features(self._image(frame))
        background = torch.ones(1, *self._frame_size, device=self.device)
        self._confidence = self._learn(features, labels, background).amax(0)

    @torch.no_grad()
    def step(
        self,
        frame: Tensor,
        labels: Tensor | None = None,
        *,
        permanent: bool = False,
        end: bool = False,
        output: str = "probs",
    ) -> Tensor:
        """Segments the next frame: see :class:`vosops.models.VideoTracker`.

        permanent: keep this frame's result as a reference permanently, as labelled frames are. end: the last frame,
        after which nothing need be remembered. output: "probs", or "labels" for a map of ids (H,W), uint8 where the
        ids fit, else int64.
        """
        features, keys, fine = self._segment(frame, output, whole=permanent or labels is not None)
        probabilities = _resized(fine, (frame.shape[1], frame.shape[2]))
        if labels is not None:
            check_labels(labels, frame)
            probabilities = self._learn(features, labels, probabilities)
        elif not end:
            if permanent:
                self._check_budget(features, len(self.object_ids))
            self._remember(keys, fine)
            if permanent:
                self._keep(features, _hard(self._recent_probabilities[-1]), self._recent_probabilities[-1])
        return self._answer(probabilities, output)

    @torch.no_grad()
    def predict(self, frame: Tensor, *, output: str = "probs") -> Tensor:
        """Segment a frame like `step`, without changing the state: see
        :class:`vosops.models.VideoTracker`.
        """
        _, _, fine = self._segment(frame, output)
        probabilities = _resized(fine, (frame.shape[1], frame.shape[2]))
        return probabilities if output == "probs" else most_probable(probabilities, self.object_ids)

    @torch.no_grad()
    def add_objects(self, frame: Tensor, labels: Tensor) -> None:
        """Add the objects of labels, or correct known ones, in the frame that was segmented last.

        0 in labels is "none of the objects in labels": the other objects keep the pixels that they have there.
        """
        if self._frame_size is None:
            self.initialize(frame, labels)
            return
        check_frame(frame, self._frame_size)
        check_labels(labels, frame)
        previous = _resized(self._recent_probabilities[-1], (frame.shape[1], frame.shape[2]))
        self._confidence = self._learn(self._features(self._image(frame)), labels, previous).amax(0)

    @torch.no_grad()
    def remove_object(self, object_id: int) -> None:
        """Stop tracking an object; its pixels become unknown in the permanent frames."""
        if object_id not in self.object_ids:
            raise ValueError(f"object_id must be one of {self.object_ids}, got {object_id}")
        channel = 1 + self.object_ids.index(object_id)
        self.object_ids.remove(object_id)
        self._permanent_masks = [_without(mask, channel) for mask in self._permanent_masks]
        self._recent_probabilities = [_normalised(_without(x, channel)) for x in self._recent_probabilities]
        self._restart_classifier()
        self._restart_memory()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on; loads with ``torch.load(..., weights_only=True)``."""
        return {
            "backbone": self.backbone_name,
            "size": self.size,
            "with_memory": self.with_memory,
            "object_ids": list(self.object_ids),
            "frame_size": list(self._frame_size or ()),
            **{name: list(getattr(self, f"_{name}")) for name in _SAVED_LISTS},
            **{name: getattr(self, f"_{name}") for name in _SAVED_TENSORS},
            "memory": self._memory.state_dict(),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state of :meth:`state_dict`; the next results are the same to the bit (on the CPU)."""
        expected = self.state_dict()
        if set(state) != set(expected):
            raise ValueError(f"state must have the keys {sorted(expected)}, got {sorted(state)}")
        for option in ("backbone", "size", "with_memory"):
            if state[option] != expected[option]:
                raise ValueError(
                    f"state must be of a model with {option} {expected[option]!r}, got {state[option]!r}"
                )
        self.object_ids = list(state["object_ids"])
        self._frame_size = tuple(state["frame_size"]) or None
        for name in _SAVED_LISTS:
            setattr(self, f"_{name}", [x.to(self.device) for x in state[name]])
        for name in _SAVED_TENSORS:
            setattr(self, f"_{name}", state[name].to(self.device))
        self._memory = self._new_memory(self._memory_room())
        self._memory.load_state_dict(state["memory"])
        self._steps = state["steps"]
        self._confidence = None

    def _check_started(self) -> None:
        if self._frame_size is None:
            raise RuntimeError("initialize must be called before the first step")

    def _segment(self, frame: Tensor, output: str, *, whole: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Features (C,h,w), keys (D,h,w) and probabilities (O+1,*size) of the computation of the next frame.

        whole: the features are wanted of all of the frame, not only of what is searched.
        """
        self._check_started()
        check_frame(frame, self._frame_size)
        check_output(output)
        image = self._image(frame)
        features = self._features(image) if whole else self._searched_features(image)
        keys = self._embedded(features)
        return features, keys, self._classify(keys, image)

    def _classify(self, keys: Tensor, image: Tensor) -> Tensor:
        """Keys (D,h,w) of the image (3,H,W), both of the computation -> probabilities (O+1,H,W)."""
        return self._enlarge(self._match(keys), image)

    def _image(self, frame: Tensor) -> Tensor:
        """Return the frame (3,H,W), float32 in [0, 1], at the size of the computation."""
        image = frame.to(self.device)
        image = image.float().div_(255) if image.dtype == torch.uint8 else image.float()
        height, width = image.shape[1:]
        scale = 1.0 if self.size == -1 else self.size / min(height, width)
        target = tuple(-(-round(side * scale) // SIZE_MULTIPLE) * SIZE_MULTIPLE for side in (height, width))
        if target == (height, width):
            return image
        return functional.interpolate(
            image[None], target, mode="bilinear", align_corners=False, antialias=scale < 1
        )[0]

    def _features(self, image: Tensor) -> Tensor:
        """Image (3,H,W) -> (C,H/8,W/8): both maps of the backbone, of unit length, and their context."""
        return self._joined(*self.backbone(image[None]))

    def _searched_features(self, image: Tensor) -> Tensor:
        """Return `_features`, which may be 0 far from what is searched."""
        return self._features(image)

    @staticmethod
    def _joined(*maps: Tensor) -> Tensor:
        """Join maps (1,C8,h,w) and (1,C16,h/2,w/2) of the backbone to (C,h,w); see `_features`."""
        fine, coarse = (functional.normalize(x.float(), dim=1) for x in maps)
        coarse = functional.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)
        cells = torch.cat([fine, coarse], 1)[0]
        context = functional.normalize(box_mean(cells, CONTEXT_RADIUS), dim=0)
        return torch.cat([cells, CONTEXT_WEIGHT * 2**0.5 * context])  # cells are of length 2**0.5

    @_full_precision
    def _embedded(self, features: Tensor) -> Tensor:
        """(C,...) -> unit vectors (D,...)."""
        return functional.normalize(torch.tensordot(self._embedding, features, 1), dim=0)

    @_full_precision
    def _keep(self, features: Tensor, masks: Tensor, probabilities: Tensor) -> None:
        """Make the latest frame a permanent one, fits embedding and classifier to all of these, and starts anew.

        masks: bool (O+1,h,w), what is sure; probabilities: (O+1,h,w).
        """
        self._permanent_features.append(features)
        self._permanent_masks.append(masks)
        stacked = torch.stack(self._permanent_features, 1)
        self._embedding = _embedding(stacked, self._all_masks())
        self._permanent_keys = self._embedded(stacked)
        self._recent_keys, self._recent_probabilities = [self._permanent_keys[:, -1]], [probabilities]
        self._restart_classifier()
        self._restart_memory()

    def memory_bytes(self) -> int:
        """Return the memory used by stored frames, in bytes."""
        lists = [getattr(self, f"_{name}") for name in _SAVED_LISTS]
        tensors = [*(x for saved in lists for x in saved), self._permanent_keys]
        stored: int = sum(x.numel() * x.element_size() for x in tensors)
        return stored + self._memory.bytes_reserved

    def _check_budget(self, features: Tensor, objects: int) -> None:
        """Raise MemoryBudgetError unless one more permanent frame of these features and this many objects fits."""
        if self.memory_budget is None:
            return
        frames = len(self._permanent_features) + 1
        permanent, recent, memory, scratch = _bytes_of(features, objects, self._MORE_OF_LATEST)
        if not self.with_memory:
            memory = scratch = 0
        each, once = permanent + memory, recent + scratch
        if frames * each + once > self.memory_budget:
            fit = max((self.memory_budget - once) // each, 0)
            raise MemoryBudgetError(
                f"memory_budget must be at least {frames * each + once} bytes for {frames} permanent frames of "
                f"{objects} objects, got {self.memory_budget}: {fit} fit"
            )

    def _memory_room(self) -> int | None:
        """Return the bytes that the budget leaves for the memory, if there is one."""
        if self.memory_budget is None or not self._permanent_features:
            return None
        features, objects = self._permanent_features[0], len(self.object_ids)
        permanent, recent, _, _ = _bytes_of(features, objects, self._MORE_OF_LATEST)
        return self.memory_budget - len(self._permanent_features) * permanent - recent

    def _new_memory(self, budget: int | None) -> MemoryBank:
        return MemoryBank(
            policy="window",
            mem_every=MEMORY_EVERY,
            max_mem_frames=MEMORY_FRAMES + 1,
            top_k=MEMORY_NEIGHBORS,
            similarity="dot",
            scale=1 / TEMPERATURE,
            budget=budget,
            device=self.device,
        )

    @_full_precision
    def _restart_memory(self) -> None:
        """Make the permanent frames all that the memory holds, if there is one."""
        if not self.with_memory:
            return
        self._memory = self._new_memory(self._memory_room())
        self._steps = 0
        for i, masks in enumerate(self._permanent_masks):
            classes = masks.float()
            self._memorize(-1 - i, self._permanent_keys[:, i], classes, classes, permanent=True)

    def _memorize(
        self, number: int, keys: Tensor, probabilities: Tensor, values: Tensor, *, permanent: bool = False
    ) -> None:
        """Add MEMORY_CELLS cells, chosen by probabilities (O+1,h,w): keys (D,h,w) with values (O+1,h,w)."""
        cells = _memory_cells(probabilities)
        key, value = (x.flatten(1)[:, cells][None, :, None] for x in (keys, values))
        self._memory.add(number, key, value[:, None], [_ALL_CLASSES], permanent=permanent)

    def _all_masks(self) -> Tensor:
        """Bool (O+1,T,h,w): the classes of the permanent frames' cells."""
        return torch.stack(self._permanent_masks, 1)

    @_full_precision
    def _restart_classifier(self) -> None:
        """Fits the classifier to the permanent frames alone."""
        classes = self._all_masks().flatten(1).float()
        self._permanent_moments = _moments(self._permanent_keys.flatten(1), classes)
        self._recent_moments = self._permanent_moments

    @_full_precision
    def _remember(self, keys: Tensor, probabilities: Tensor) -> None:
        """Make this frame the latest of the recent ones, and a lesson for the classifier."""
        means = _cell_means(probabilities, (keys.shape[1], keys.shape[2]))
        self._recent_keys = [*self._recent_keys, keys][-max(WINDOWS) :]
        self._recent_probabilities = [*self._recent_probabilities, means][-max(WINDOWS) :]
        near = self._search_region()
        shares = means[:, near]
        confidence = ((shares.amax(0) - CONFIDENT) / (1 - CONFIDENT)).clamp(min=0)
        moments = _moments(keys[:, near], shares * confidence)
        self._recent_moments = torch.lerp(self._recent_moments, moments, RECENT_RATE)
        self._steps += 1
        if self.with_memory and self._steps % MEMORY_EVERY == 0:
            self._memorize(self._steps, keys, means, _evened(means))

    def _learn(self, features: Tensor, labels: Tensor, probabilities: Tensor) -> Tensor:
        """Take labels (H,W) as the truth where they say something -> the corrected probabilities (O+1,H,W).

        Pixels of 0 are none of the objects in labels; other objects keep what they have of them. Pixels of 255, and
        cells that are mostly such, are no reference.
        """
        labels = labels.to(self.device).long()
        ids = ids_of(labels)
        new = [i for i in ids if i not in self.object_ids]
        self._check_budget(features, len(self.object_ids) + len(new))
        self.object_ids += new
        probabilities = torch.cat([probabilities, probabilities.new_zeros(len(new), *labels.shape)])
        probabilities = probabilities.clone()
        self._permanent_masks = [
            torch.cat([mask, mask.new_zeros(len(new), *mask.shape[1:])]) for mask in self._permanent_masks
        ]
        known = labels != IGNORED
        for i in ids:
            channel = 1 + self.object_ids.index(i)
            probabilities[channel] = torch.where(known, 0, probabilities[channel])
        probabilities = _normalised(probabilities)
        for i in ids:
            here = labels == i
            probabilities.masked_fill_(here, 0)
            probabilities[1 + self.object_ids.index(i)].masked_fill_(here, 1)
        cells = (features.shape[1], features.shape[2])
        means = _cell_means(probabilities, cells)
        share_known = _cell_means(known[None].float(), cells)[0]
        masks = _hard(means) & (share_known > 0.5)
        for i in ids:  # an object smaller than a cell has the cell that it covers most
            channel = 1 + self.object_ids.index(i)
            if not masks[channel].any():
                cell = int(means[channel].argmax())
                masks.view(masks.shape[0], -1)[:, cell] = False
                masks.view(masks.shape[0], -1)[channel, cell] = True
        self._keep(features, masks, means)
        return probabilities

    @_full_precision
    def _match(self, query: Tensor) -> Tensor:
        """Return the frame's keys (D,h,w) -> coarse probabilities (O+1,h,w)."""
        evidence = self._evidence(query)
        background = torch.zeros_like(evidence.logits)
        background[0] = 1
        return torch.where(evidence.search, evidence.logits.softmax(0), background)

    @_full_precision
    def _evidence(self, query: Tensor) -> Evidence:
        """Compare the frame's keys (D,h,w) with all that is remembered."""
        search = self._search_region()
        permanent = vosops.global_matching(
            query[None],
            self._permanent_keys[None],
            self._all_masks()[None],
            neighbors=NEIGHBORS,
            normalize=False,
            query_mask=search[None],
        )
        recent = [
            vosops.local_matching(
                query[None],
                self._recent_keys[-age][None],
                self._recent_classes(age)[None],
                radius=radius,
                normalize=False,
                query_mask=search[None],
                return_indices=True,
            )
            for age, radius in WINDOWS.items()
            if age <= len(self._recent_keys)
        ]
        far = _cosine(permanent[0])
        cosines = [_cosine(distance[0]) for distance, _ in recent]
        near = torch.stack(cosines).mean(0)
        # A cell that the permanent frames do not explain follows what the recent ones say.
        gain = near.amax(0) - far.amax(0)
        local = torch.sigmoid((gain - LOCAL_MARGIN) / LOCAL_SLOPE)
        # Local matching knows nothing of a lost object, which takes the background's, and the global difference.
        lost = ~_hard(self._recent_probabilities[-1]).flatten(1).any(1)
        near = torch.where(lost[:, None, None], near[:1] + far - far[:1], near)
        classifier = _ridge(torch.lerp(self._permanent_moments, self._recent_moments, RECENT_WEIGHT))
        score = torch.tensordot(classifier[:, :-1], query, 1) + classifier[:, -1, None, None]
        logits = torch.lerp(far, near, local) / TEMPERATURE + CLASSIFIER_WEIGHT * score
        memory = torch.zeros_like(logits)
        if self.with_memory:
            unexplained = search & (local > MEMORY_LEAST)
            memory[:, unexplained] = self._memory.read(query[:, unexplained][None])[0, 0]
            weight = MEMORY_WEIGHT * local[unexplained]
            logits[:, unexplained] += weight * memory[:, unexplained].clamp(min=MEMORY_FLOOR).log()
        return Evidence(search, far, cosines, recent[0][1][0], local, score, memory, logits)

    def _recent_classes(self, age: int) -> Tensor:
        """Return bool (O+1,h,w): the class of each cell of a recent frame; a cell may be of none."""
        return _hard(self._recent_probabilities[-age])

    def _search_region(self) -> Tensor:
        """bool (h,w): the cells near the objects, or all cells when one of the objects is lost."""
        objects = self._recent_probabilities[-1][1:] > SEARCH_PROBABILITY
        return _around(objects.any(0)) | ~objects.flatten(1).any(1).all()

    def _enlarge(self, coarse: Tensor, image: Tensor) -> Tensor:
        """Coarse probabilities (O+1,h,w) -> (O+1,H,W) at the image's size, along its edges."""
        fine = image.new_zeros(coarse.shape[0], *image.shape[1:])
        fine[0] = 1
        box = _bounding_box(coarse[0] < 1 - CERTAIN)
        if box is None:
            return fine
        stride = image.shape[1] // coarse.shape[1]
        margin = -(-2 * FILTER_RADIUS // stride) + 1  # in cells: what the filter sees, and the interpolation
        rows, columns = (
            slice(max(low - margin, 0), min(high + margin, size))
            for (low, high), size in zip(box, coarse.shape[1:], strict=True)
        )
        inside = (
            slice(None),
            slice(rows.start * stride, rows.stop * stride),
            slice(columns.start * stride, columns.stop * stride),
        )
        guide = image[inside]
        objects = _resized(coarse[1:, rows, columns], (guide.shape[1], guide.shape[2]))
        objects = GuidedFilter(guide, FILTER_RADIUS, FILTER_EPS)(objects)
        classes = torch.cat([1 - objects.sum(0, keepdim=True), objects])
        fine[inside] = _normalised(classes.clamp_(0, 1))
        return fine


def _around(cells: Tensor, radius: int | None = None) -> Tensor:
    """Bool (h,w): the cells within radius of the given ones; None: SEARCH_RADIUS."""
    radius = SEARCH_RADIUS if radius is None else radius
    near = cells[None].float()
    window = 2 * radius + 1
    for kernel, padding in (((window, 1), (radius, 0)), ((1, window), (0, radius))):
        near = functional.max_pool2d(near, kernel, 1, padding)
    return near[0] > 0


def _memory_cells(probabilities: Tensor) -> Tensor:
    """Return indices of the MEMORY_CELLS cells of (O+1,h,w), or all, that stand for a frame in the memory.

    Half of them are of the objects, the others of the background near them, in a fixed random order; where there are
    not enough, cells far from the objects, then more of the objects, then those of which nothing is known.
    """
    best, winner = (x.flatten() for x in probabilities.max(0))
    objects = (winner > 0) & (best > 0)
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(winner), generator=random).to(winner.device)
    rank = order.argsort()  # of each cell in the random order
    place = torch.where(objects[order], 1, 0).cumsum(0)[rank]  # of an object's cell among such cells, from 1
    near = _around(objects.view(probabilities.shape[1:])).flatten()
    kind = torch.where(objects, torch.where(2 * place <= MEMORY_CELLS, 0, 3), torch.where(near, 1, 2))
    kind = torch.where(best > 0, kind, 4)
    return (kind * len(winner) + rank).argsort()[:MEMORY_CELLS]


def _evened(probabilities: Tensor) -> Tensor:
    """Probabilities (O+1,h,w), drawn to equal ones the less sure they are: those up to CONFIDENT say nothing."""
    sure = (probabilities.amax(0) - CONFIDENT) / (1 - CONFIDENT)
    equal = torch.full_like(probabilities, 1 / len(probabilities))
    return torch.lerp(equal, probabilities, sure.clamp(min=0))


def _bytes_of(features: Tensor, objects: int, more: int = 0) -> tuple[int, int, int, int]:
    """Bytes, at most, of a permanent frame, of the recent ones, of a frame in the memory, and of what that needs too.

    features (C,h,w) as they come from the backbone. more: numbers of each cell and object that are remembered of the
    latest frame besides.
    """
    channels, cells = features.shape[0], features[0].numel()
    kept, classes = min(EMBEDDING_CHANNELS, channels), objects + 1
    permanent = cells * (4 * (channels + kept) + classes)  # features and keys; masks
    recent = max(WINDOWS) * cells * 4 * (kept + classes)  # keys and probabilities
    recent += cells * 4 * more * objects
    memory = min(MEMORY_CELLS, cells) * (4 * (kept + classes) + 1)
    return permanent, recent, memory, _MEMORY_OVERHEAD


def _embedding(features: Tensor, masks: Tensor) -> Tensor:
    """Return the linear map (D,C) that whitens features (C,T,h,w) within the classes of masks (O+1,T,h,w).

    The covariance is the mean of the classes' own, shrunk towards a multiple of the identity. Of the whitened
    channels the D principal ones are kept.
    """
    cells, classes = features.flatten(1), masks.flatten(1)
    channels = cells.shape[0]
    identity = torch.eye(channels, device=cells.device)
    own = [cells[:, members] for members in classes]
    covariances = [torch.cov(x, correction=0) for x in own if x.shape[1] > 1]
    covariance = torch.stack(covariances).mean(0) if covariances else identity
    values, vectors = torch.linalg.eigh(covariance + SHRINKAGE * covariance.diagonal().mean() * identity)
    whitening = (vectors * values.clamp(min=1e-12).rsqrt()) @ vectors.T
    white = functional.normalize(whitening @ cells, dim=0)
    principal = torch.linalg.eigh(white @ white.T).eigenvectors[:, -EMBEDDING_CHANNELS:]
    embedding: Tensor = principal.T @ whitening
    return embedding


def _moments(keys: Tensor, shares: Tensor) -> Tensor:
    """Return what the classifier needs to know of cells, keys (D,n) with their shares (O+1,n) of the classes.

    (D+1+O+1,D+1): the Gram matrix of [key; 1], then its products with the classes' targets, which are 1 on a class'
    own cells and -1 on others. All classes weigh the same, whatever their size.
    """
    total = shares.sum(0)
    weight = (shares / shares.sum(1, keepdim=True).clamp(min=FEWEST_CELLS)).sum(0) / len(shares)
    targets = 2 * shares / total.clamp(min=1e-6) - 1
    cells = torch.cat([keys, torch.ones_like(keys[:1])])
    return torch.cat([cells, targets]) @ (cells * weight).T


def _ridge(moments: Tensor) -> Tensor:
    """Return the linear classifier (O+1,D+1), bias last, of :func:`_moments`."""
    size = moments.shape[1]
    identity = torch.eye(size, device=moments.device)
    solution: Tensor = torch.linalg.solve(moments[:size] + RIDGE * identity, moments[size:].T)
    return solution.T


def _cosine(distance: Tensor) -> Tensor:
    """Return the cosine of unit vectors at a squared distance; -1 where there is none (+inf)."""
    return 1 - distance.clamp(max=ABSENT_DISTANCE) / 2


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear: (C,h,w) -> (C,*size)."""
    if tuple(x.shape[1:]) == size:
        return x
    return functional.interpolate(x[None], size, mode="bilinear", align_corners=False)[0]


def _cell_means(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(C,H,W) -> (C,*size): the mean over each cell."""
    return functional.interpolate(x[None], size, mode="area")[0]


def _bounding_box(mask: Tensor) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return the half-open ranges of rows and columns that hold what is true in mask (h,w); None if nothing is."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if len(rows) == 0:
        return None
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)


def _hard(probabilities: Tensor) -> Tensor:
    """(O+1,h,w) -> bool (O+1,h,w): each cell in its most probable class."""
    winner = probabilities.argmax(0)
    return winner == torch.arange(len(probabilities), device=winner.device)[:, None, None]


def _normalised(probabilities: Tensor) -> Tensor:
    """Divides (O+1,h,w) by its sum; where that is zero, the background has it all."""
    total = probabilities.sum(0)
    probabilities = probabilities / torch.where(total > 0, total, 1)
    probabilities[0].masked_fill_(total <= 0, 1)
    return probabilities


def _without(x: Tensor, channel: int) -> Tensor:
    return torch.cat([x[:channel], x[channel + 1 :]])
