"""Propagate: masks through a video by matching frozen features. No training, no download.

Each cell of a coarse grid (stride 8) is compared with the cells of every object, and of the background, in the
permanent frames (global matching: the mean of the nearest few) and in the previous frame (local matching: the nearest
in a window). A softmax over the classes gives coarse probabilities; a guided filter brings them to the frame's edges.
docs/models/propagate.md tells what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import vosops
import vosops.reference
from vosops.models.features import create_backbone
from vosops.models.guided_filter import GuidedFilter

__all__ = ["Propagate"]

STRIDE = 8  # of the grid of cells, in pixels of the computation
SIZE_MULTIPLE = 16  # of the computation's height and width
IGNORED = 255  # the label of pixels about which nothing is known
NEIGHBORS = 5  # of global matching
WINDOW = 8  # radius of local matching, in cells
TEMPERATURE = 0.05  # of the softmax over the classes' cosine similarities
LOCAL_WEIGHT = 0.35  # of the local similarity; the global one has the rest
SEARCH_RADIUS = 12  # cells farther than this from every object are background without a look
SEARCH_PROBABILITY = 0.3  # what makes a cell part of an object, for the search
SHRINKAGE = 0.3  # of the covariance towards its mean variance, before whitening
FILTER_RADIUS = 4  # of the guided filter, in pixels of the computation
FILTER_EPS = 1e-3
ABSENT_DISTANCE = 4.0  # the largest squared distance of unit vectors: cosine -1


class Propagate:
    """The training-free tracker; it follows the protocol of :class:`vosops.models.Tracker`.

    backbone: a name for :func:`vosops.models.features.create_backbone`; pretrained=False takes random weights.
    size: the short side of the computation in pixels (frames are resized to it and results are given at the frame's
    own size); -1 computes at the frame's size. device: where everything runs; results stay there.
    Cost: one backbone pass, then time and memory linear in the cells near the objects times those of the
    permanent frames.
    """

    def __init__(
        self,
        backbone: str = "efficientnet_lite0",
        *,
        weights: str | Path | None = None,
        pretrained: bool = True,
        size: int = 480,
        device: str | torch.device = "cpu",
    ) -> None:
        if weights is not None:
            raise ValueError(
                "weights must be None: propagate is not trained; choose its features by backbone="
            )
        if size != -1 and size < SIZE_MULTIPLE:
            raise ValueError(f"size must be -1 or at least {SIZE_MULTIPLE}, but is {size}")
        self.backbone_name = backbone if pretrained else f"{backbone} (random)"
        self.backbone = create_backbone(backbone, pretrained=pretrained).to(device)
        self.size = size
        self.device = torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.object_ids: list[int] = []
        self._frame_size: tuple[int, int] | None = None
        self._permanent_features: list[Tensor] = []  # (C,h,w) each, not whitened
        self._permanent_masks: list[Tensor] = []  # bool (O+1,h,w) each
        self._whitening = torch.empty(0)
        self._permanent_keys = torch.empty(0)  # (C,T,h,w), whitened
        self._previous_features = torch.empty(0)
        self._previous_keys = torch.empty(0)
        self._previous_probabilities = torch.empty(0)  # (O+1,h,w)

    @torch.no_grad()
    def initialize(self, frame: Tensor, labels: Tensor) -> None:
        """Forgets everything and starts from this frame: see :class:`vosops.models.Tracker`."""
        _check_frame(frame)
        _check_labels(labels, frame)
        if not _ids_of(labels):
            raise ValueError("labels must hold at least one object, but are all background or unknown")
        self.reset()
        self._frame_size = (frame.shape[1], frame.shape[2])
        features = self._features(self._resized(frame))
        background = torch.ones(1, *self._frame_size, device=self.device)
        self._learn(features, labels, background)

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
        """Segments the next frame: see :class:`vosops.models.Tracker`.

        permanent: keep this frame's result as a reference for good, as labelled frames are. end: the last frame,
        after which nothing need be remembered. output: "probs", or "labels" for a map of ids (H,W), uint8 where the
        ids fit, else int64.
        """
        self._check_started()
        _check_frame(frame, self._frame_size)
        if output not in ("probs", "labels"):
            raise ValueError(f"output must be 'probs' or 'labels', but is {output!r}")
        image = self._resized(frame)
        features = self._features(image)
        probabilities = self._enlarge(self._match(features), image)
        if labels is not None:
            _check_labels(labels, frame)
            probabilities = self._learn(features, labels, probabilities)
        elif not end:
            self._remember(features, probabilities)
            if permanent:
                self._keep(features, _hard(self._previous_probabilities))
        return probabilities if output == "probs" else self._to_labels(probabilities)

    @torch.no_grad()
    def add_objects(self, frame: Tensor, labels: Tensor) -> None:
        """Adds the objects of labels, or corrects known ones, in the frame that was segmented last.

        0 in labels is "none of the objects in labels": the other objects keep the pixels that they have there.
        """
        if self._frame_size is None:
            self.initialize(frame, labels)
            return
        _check_frame(frame, self._frame_size)
        _check_labels(labels, frame)
        previous = functional.interpolate(
            self._previous_probabilities[None], self._frame_size, mode="bilinear", align_corners=False
        )[0]
        self._learn(self._features(self._resized(frame)), labels, previous)

    @torch.no_grad()
    def remove_object(self, object_id: int) -> None:
        """Stops tracking an object; what it covered is unknown in the permanent frames."""
        if object_id not in self.object_ids:
            raise ValueError(f"object_id must be one of {self.object_ids}, but is {object_id}")
        channel = 1 + self.object_ids.index(object_id)
        self.object_ids.remove(object_id)
        self._permanent_masks = [_without(mask, channel) for mask in self._permanent_masks]
        self._previous_probabilities = _normalised(_without(self._previous_probabilities, channel))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; loads with ``torch.load(..., weights_only=True)``."""
        return {
            "backbone": self.backbone_name,
            "size": self.size,
            "object_ids": list(self.object_ids),
            "frame_size": list(self._frame_size or ()),
            "permanent_features": list(self._permanent_features),
            "permanent_masks": list(self._permanent_masks),
            "whitening": self._whitening,
            "permanent_keys": self._permanent_keys,
            "previous_features": self._previous_features,
            "previous_keys": self._previous_keys,
            "previous_probabilities": self._previous_probabilities,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state of :meth:`state_dict`; the next results are the same to the bit (on the CPU)."""
        expected = self.state_dict()
        if set(state) != set(expected):
            raise ValueError(f"state must have the keys {sorted(expected)}, but has {sorted(state)}")
        for option in ("backbone", "size"):
            if state[option] != expected[option]:
                raise ValueError(
                    f"state must be of a model with {option} {expected[option]!r}, but has {state[option]!r}"
                )
        self.object_ids = list(state["object_ids"])
        self._frame_size = tuple(state["frame_size"]) or None
        self._permanent_features = [x.to(self.device) for x in state["permanent_features"]]
        self._permanent_masks = [x.to(self.device) for x in state["permanent_masks"]]
        for name in (
            "whitening",
            "permanent_keys",
            "previous_features",
            "previous_keys",
            "previous_probabilities",
        ):
            setattr(self, f"_{name}", state[name].to(self.device))

    def _check_started(self) -> None:
        if self._frame_size is None:
            raise RuntimeError("initialize must be called before the first step")

    def _resized(self, frame: Tensor) -> Tensor:
        """The frame (3,H,W), float32 in [0, 1], at the size of the computation."""
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
        """Image (3,H,W) -> (C,H/8,W/8): both maps of the backbone, each of unit length."""
        fine, coarse = self.backbone(image[None])
        fine, coarse = functional.normalize(fine, dim=1), functional.normalize(coarse, dim=1)
        coarse = functional.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([fine, coarse], 1)[0].contiguous()

    def _whitened(self, features: Tensor) -> Tensor:
        """(C,...) -> (C,...) of unit length, with the covariance within the classes taken out."""
        return functional.normalize(torch.tensordot(self._whitening, features, 1), dim=0)

    def _keep(self, features: Tensor, masks: Tensor) -> None:
        """Adds a permanent frame and fits the whitening to all of them."""
        self._permanent_features.append(features)
        self._permanent_masks.append(masks)
        self._whitening = _whitening(self._permanent_features, self._permanent_masks)
        self._permanent_keys = self._whitened(torch.stack(self._permanent_features, 1))
        if self._previous_features.numel():
            self._previous_keys = self._whitened(self._previous_features)

    def _remember(self, features: Tensor, probabilities: Tensor) -> None:
        """Makes this frame the previous one; probabilities (O+1,H,W) are averaged over the cells."""
        self._previous_features = features
        self._previous_keys = self._whitened(features)
        self._previous_probabilities = functional.interpolate(
            probabilities[None], features.shape[1:], mode="area"
        )[0]

    def _learn(self, features: Tensor, labels: Tensor, probabilities: Tensor) -> Tensor:
        """Takes labels (H,W) as the truth where they say something -> the corrected probabilities (O+1,H,W).

        Pixels of 0 are none of the objects in labels; other objects keep what they have of them. Pixels of 255, and
        cells that are mostly such, are no reference.
        """
        labels = labels.to(self.device).long()
        ids = _ids_of(labels)
        new = [i for i in ids if i not in self.object_ids]
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
        self._previous_probabilities = functional.interpolate(
            probabilities[None], features.shape[1:], mode="area"
        )[0]
        share_known = functional.interpolate(known[None, None].float(), features.shape[1:], mode="area")[0, 0]
        masks = _hard(self._previous_probabilities) & (share_known > 0.5)
        for i in ids:  # an object smaller than a cell has the cell that it covers most
            channel = 1 + self.object_ids.index(i)
            if not masks[channel].any():
                cell = int(self._previous_probabilities[channel].argmax())
                masks.view(masks.shape[0], -1)[:, cell] = False
                masks.view(masks.shape[0], -1)[channel, cell] = True
        self._keep(features, masks)
        self._previous_features = features
        self._previous_keys = self._whitened(features)
        return probabilities

    def _match(self, features: Tensor) -> Tensor:
        """Features (C,h,w) -> coarse probabilities (O+1,h,w)."""
        query = self._whitened(features)[None]
        search = self._search_region()
        previous = _hard(self._previous_probabilities)
        masks = torch.stack(self._permanent_masks, 1)[None]
        to_permanent = vosops.reference.global_matching(
            query,
            self._permanent_keys[None],
            masks,
            neighbors=NEIGHBORS,
            normalize=False,
            query_mask=search[None],
        )
        to_previous = vosops.local_matching(
            query,
            self._previous_keys[None],
            previous[None],
            radius=WINDOW,
            normalize=False,
            query_mask=search[None],
        )
        far = 1 - to_permanent[0].clamp(max=ABSENT_DISTANCE) / 2
        near = 1 - to_previous[0].clamp(max=ABSENT_DISTANCE) / 2
        # Local matching knows nothing of a lost object: the background's similarity, and the global difference.
        lost = ~previous.flatten(1).any(1)
        near = torch.where(lost[:, None, None], near[:1] + far - far[:1], near)
        similarity = torch.lerp(far, near, LOCAL_WEIGHT)
        probabilities = (similarity / TEMPERATURE).softmax(0)
        background = torch.zeros_like(probabilities)
        background[0] = 1
        return torch.where(search, probabilities, background)

    def _search_region(self) -> Tensor:
        """bool (h,w): the cells near the objects, or all cells when one of the objects is lost."""
        objects = self._previous_probabilities[1:] > SEARCH_PROBABILITY
        window = 2 * SEARCH_RADIUS + 1
        near = functional.max_pool2d(objects.any(0)[None].float(), window, 1, SEARCH_RADIUS)[0] > 0
        return near | ~objects.flatten(1).any(1).all()

    def _enlarge(self, coarse: Tensor, image: Tensor) -> Tensor:
        """Coarse probabilities (O+1,h,w) -> (O+1,H,W) at the frame's size, along the image's edges."""
        coarse = functional.interpolate(coarse[None], image.shape[1:], mode="bilinear", align_corners=False)[
            0
        ]
        objects = coarse[1:]
        objects = GuidedFilter(image, FILTER_RADIUS, FILTER_EPS)(objects)
        objects = torch.cat([1 - objects.sum(0, keepdim=True), objects])
        if objects.shape[1:] != self._frame_size:
            objects = functional.interpolate(
                objects[None], self._frame_size, mode="bilinear", align_corners=False
            )[0]
        return _normalised(objects.clamp_(0, 1))

    def _to_labels(self, probabilities: Tensor) -> Tensor:
        """(O+1,H,W) -> (H,W) ids of the most probable class."""
        dtype = torch.uint8 if max(self.object_ids, default=0) <= IGNORED else torch.int64
        ids = torch.tensor([0, *self.object_ids], dtype=dtype, device=self.device)
        return ids[probabilities.argmax(0)]


def _whitening(features: list[Tensor], masks: list[Tensor]) -> Tensor:
    """(C,C): the inverse square root of the mean covariance within the classes, shrunk towards a multiple of one."""
    pixels = torch.stack(features, 1).flatten(1)
    classes = torch.stack(masks, 1).flatten(1)
    covariances = []
    for members in classes:
        own = pixels[:, members]
        if own.shape[1] > 1:
            covariances.append(torch.cov(own, correction=0))
    channels = pixels.shape[0]
    mean = torch.stack(covariances).mean(0) if covariances else torch.eye(channels, device=pixels.device)
    shrunk = mean + SHRINKAGE * mean.diagonal().mean() * torch.eye(channels, device=pixels.device)
    values, vectors = torch.linalg.eigh(shrunk)
    return (vectors * values.clamp(min=1e-12).rsqrt()) @ vectors.T


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


def _ids_of(labels: Tensor) -> list[int]:
    return [i for i in labels.unique().tolist() if i not in (0, IGNORED)]


def _check_frame(frame: Tensor, size: tuple[int, int] | None = None) -> None:
    if frame.ndim != 3 or frame.shape[0] != 3 or 0 in frame.shape:
        raise ValueError(f"frame must be (3,H,W), but is {tuple(frame.shape)}")
    if frame.dtype != torch.uint8 and not frame.is_floating_point():
        raise TypeError(f"frame must be uint8 or floating in [0, 1], but is {frame.dtype}")
    if size is not None and tuple(frame.shape[1:]) != size:
        raise ValueError(f"frame must have the first frame's size {size}, but has {tuple(frame.shape[1:])}")


def _check_labels(labels: Tensor, frame: Tensor) -> None:
    if labels.shape != frame.shape[1:]:
        raise ValueError(f"labels must be (H,W) = {tuple(frame.shape[1:])}, but are {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, but are {labels.dtype}")
    if labels.numel() and int(labels.min()) < 0:
        raise ValueError(f"labels must be >= 0, but hold {int(labels.min())}")
