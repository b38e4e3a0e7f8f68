"""FEELVOS: an embedding of every pixel, matched with the first frame and the previous one.

Voigtlaender et al., FEELVOS: Fast End-to-End Embedding Learning for Video Object Segmentation, CVPR 2019. For each
object (the background is one) the distances to its nearest pixels in the first frame and, in a window, in the previous
frame guide one small head that all objects share. ``matching="cfbi"`` takes the distances as CFBI does (Yang et al.,
ECCV 2020). docs/models/feelvos.md has the diagram and what differs from the paper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import vosops
from vosops.memory import MemoryBudgetError
from vosops.models.deeplab import CHANNELS, DeepLabV3Plus, feature_size, truncated_normal_
from vosops.models.feelvos_checkpoint import tensorflow_variables
from vosops.models.network import Masks, Memory, Network, resize_rows
from vosops.models.tensorflow import Variable

__all__ = ["FEELVOS"]

EMBEDDING_CHANNELS = 100
EMBEDDING_KERNEL = 3
EMBEDDING_NOISE = 0.03  # of the identity that the embedding's weights start from
HEAD_CHANNELS = 256
HEAD_LAYERS = 4
HEAD_KERNEL = 7
HEAD_STDS = (0.33, 0.06)  # of the initial depthwise and pointwise weights
LOGIT_STD = 0.01
RADIUS = 15  # of local matching, in pixels of stride 4
CFBI_RADII = (2, 4, 6, 8, 10, 12)  # in pixels of stride 8
NEIGHBORS_IN_TRAINING = 1024  # pixels of each object of the first frame that are matched with
HEAD_BYTES = 1 << 28  # that the head's activations may take at a time, where there is no gradient
LITE0_STRIDE = 16  # sides that EfficientNet-Lite0 takes are multiples of it
NOBODY = -1  # in place of an object that was removed


class Embedded(NamedTuple):
    """What the network sees in a frame: features (N,256,h,w) and never negative keys (N,100,h,w) for matching."""

    features: Tensor
    keys: Tensor


class References(NamedTuple):
    """Frames whose labels are known: keys (1,C,T,h,w), masks (1,O+1,T,h,w) bool."""

    keys: Tensor
    masks: Tensor


class FEELVOS(Network):
    """The network; :func:`vosops.models.create_tracker` tracks objects with it, :meth:`forward` trains it.

    backbone: of DeepLabV3+, a name for :mod:`vosops.models.deeplab`. output_stride: 8, or 16, which is faster and what
    the original is trained with; None: 8 where the backbone can. matching: "feelvos" or "cfbi". radius: of FEELVOS'
    local matching, in pixels of stride 4. backbone_weights: a file of an ImageNet classifier, or a segmentation model
    of torchvision, for the encoder alone. Everything else starts from random weights, as the original does.

        >>> import torch
        >>> from vosops.models.feelvos import FEELVOS
        >>> network = FEELVOS(output_stride=16)
        >>> clips = torch.rand(1, 3, 3, 33, 49)
        >>> labels = torch.randint(0, 3, (1, 2, 33, 49))
        >>> [tuple(x.shape) for x in network(clips, labels, [2])]
        [(1, 3, 9, 13)]
    """

    def __init__(
        self,
        backbone: str = "torchvision:resnet50",
        *,
        output_stride: int | None = None,
        matching: str = "feelvos",
        radius: int = RADIUS,
        backbone_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        if matching not in ("feelvos", "cfbi"):
            raise ValueError(f"matching must be 'feelvos' or 'cfbi', got {matching!r}")
        lite0 = backbone == "efficientnet_lite0"
        self.stride = LITE0_STRIDE if lite0 else 1
        if output_stride is None:
            output_stride = 16 if lite0 else 8
        self.deeplab = DeepLabV3Plus(backbone, output_stride)
        if backbone_weights is not None:
            self.deeplab.load_encoder(backbone_weights)
        self.embedding = _SplitSeparable(CHANNELS, EMBEDDING_CHANNELS, EMBEDDING_KERNEL)
        for conv in (self.embedding.depthwise, self.embedding.pointwise):
            _noisy_identity_(conv.weight)
        self.matching: Matching
        self.matching = FirstAndPreviousMatching(radius) if matching == "feelvos" else NestedMatching()
        self.head = SegmentationHead(self.matching.maps)

    def embed(self, images: Tensor) -> Embedded:
        """Images (N,3,H,W) in [0, 1] -> what the network sees in them, at stride 4."""
        features = self.deeplab(images)
        return Embedded(features, self.embedding(features))

    def logits(
        self,
        current: Embedded,
        first: References,
        previous: References,
        previous_mask: Tensor | None = None,
        naive: bool = False,
    ) -> Tensor:
        """Logits (O+1,h,w) of a frame, background first.

        previous: one frame, whose masks the head sees, too, unless it is given soft ones, previous_mask (O+1,h,w).
        """
        if previous_mask is None:
            previous_mask = previous.masks[0, :, 0].to(current.features)
        maps = self.matching(current.keys, first, previous, previous_mask)
        logits: Tensor = self.head(current.features, maps, naive)
        return logits

    def forward(self, clips: Tensor, labels: Tensor, objects: Sequence[int]) -> list[Tensor]:
        """Logits of the third and all later frames of clips, for training; one tensor (T-2,O+1,h,w) for each clip.

        clips (N,T,3,H,W) in [0, 1]: the first frame, then neighbours in time. labels (N,2,H,W) integer, of the first
        two frames, 255 unknown; objects: O of each clip. From the fourth frame on the previous frame is what was
        predicted: its arg-max for matching, its softmax for the head. In training mode the first frame is matched at
        1024 random pixels of each object. Gradients reach the embeddings of all three frames. Enlarge the logits
        bilinearly with align_corners=True for the loss.
        """
        batch, frames = clips.shape[:2]
        if clips.dim() != 5 or frames < 3:
            raise ValueError(f"clips must be (N,T,3,H,W) of 3 or more frames, got {tuple(clips.shape)}")
        if labels.shape != (batch, 2, *clips.shape[3:]):
            raise ValueError(
                f"labels must be {(batch, 2, *clips.shape[3:])}, of the first two frames, got {tuple(labels.shape)}"
            )
        if labels.is_floating_point():
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if len(objects) != batch:
            raise ValueError(f"objects must be {batch} numbers, one for each clip, got {len(objects)}")
        embedded = self.embed(clips.flatten(0, 1))
        features, keys = (x.unflatten(0, (batch, frames)) for x in embedded)
        labels = self.matching.resize_labels(labels, (keys.shape[-2], keys.shape[-1]))
        return [self._clip(*of_clip) for of_clip in zip(features, keys, labels, objects, strict=True)]

    def clip_logits(self, frames: Tensor, labels: Tensor, objects: int) -> Tensor:
        """See :class:`vosops.models.Network`: the labels of the first two frames are given."""
        batch, size = frames.shape[0], frames.shape[3:]
        logits = torch.cat(self(frames, labels[:, :2].long(), [objects] * batch))
        full: Tensor = functional.interpolate(logits, size, mode="bilinear", align_corners=True)
        return full.unflatten(0, (batch, -1))  # type: ignore[no-any-return]

    def _clip(self, features: Tensor, keys: Tensor, labels: Tensor, objects: int) -> Tensor:
        """features, keys (T,C,h,w), labels (2,h,w) -> logits (T-2,O+1,h,w)."""
        masks = one_hot(labels, objects + 1)[None]
        first_mask = subsample(masks[:, :, :1], NEIGHBORS_IN_TRAINING) if self.training else masks[:, :, :1]
        first = References(keys[None, 0, :, None], first_mask)
        mask, soft = masks[:, :, 1:], None
        logits = []
        for t in range(2, len(keys)):
            previous = References(keys[None, t - 1, :, None], mask)
            current = Embedded(features[t, None], keys[t, None])
            logits.append(self.logits(current, first, previous, soft))
            soft = logits[-1].softmax(0)
            mask = one_hot(logits[-1].argmax(0), objects + 1)[None, :, None]
        return torch.stack(logits)

    def tensorflow_variables(self) -> dict[str, Variable]:
        """Return where the variables of the original's checkpoints go; needs its encoder and matching."""
        if isinstance(self.matching, NestedMatching):
            raise ValueError("matching must be 'feelvos' to load a checkpoint of the original, got 'cfbi'")
        return tensorflow_variables(self)

    def new_memory(self, *, budget: int | None = None, naive: bool = False) -> FEELVOSMemory:
        """See :class:`vosops.models.network.Network`."""
        return FEELVOSMemory(self, budget=budget, naive=naive)

    def evidence(self, scores: Tensor, size: tuple[int, int], rows: range) -> Tensor:
        """Return the probabilities: softmax of the logits, enlarged with align_corners=True."""
        return resize_rows(scores, size, rows, align_corners=True).softmax(0)

    def aggregate(self, evidence: Tensor) -> Tensor:
        """Average, since the mean of probabilities is a probability."""
        return evidence


class FEELVOSMemory(Memory):
    """The keys and labels of permanent frames, and of the previous frame: constant but for the permanent ones."""

    def __init__(self, network: FEELVOS, *, budget: int | None, naive: bool) -> None:
        self.network = network
        self.budget = budget
        self.naive = naive
        self.object_ids: list[int] = []
        device = next(network.parameters()).device
        self._keys = torch.empty(0, device=device)  # (1,C,T,h,w), of the permanent frames
        self._labels = torch.empty(0, dtype=torch.int64, device=device)  # (T,h,w): 0, ids, or NOBODY
        self._previous_keys = torch.empty(0, device=device)  # (1,C,1,h,w)
        self._previous_labels = torch.empty(0, dtype=torch.int64, device=device)  # (1,h,w)
        self._seen: tuple[int, Tensor] | None = None  # number and keys of the frame segmented last

    def add(self, image: Tensor, masks: Masks, *, frame: int, permanent: bool, keep: bool) -> None:
        """See :class:`vosops.models.network.Memory`."""
        size = feature_size(image.shape[2], image.shape[3])
        if permanent:
            self._check_budget(size)
        keys = self._keys_of(image, frame)[:, :, None]
        labels = self._labels_of(masks, size, permanent)[None]
        self.object_ids = list(masks.object_ids)
        self._previous_keys, self._previous_labels = keys, labels
        if permanent and self._keys.numel():
            self._keys, self._labels = torch.cat([self._keys, keys], 2), torch.cat([self._labels, labels])
        elif permanent:
            self._keys, self._labels = keys, labels

    def segment(self, image: Tensor, *, frame: int) -> Tensor:
        """See :class:`vosops.models.network.Memory`: the logits (O+1,h,w)."""
        current = self.network.embed(image)
        self._seen = (frame, current.keys)
        first = References(self._keys, self._masks_of(self._labels))
        previous = References(self._previous_keys, self._masks_of(self._previous_labels))
        return self.network.logits(current, first, previous, naive=self.naive)

    def remove_object(self, object_id: int) -> None:
        """See :class:`vosops.models.network.Memory`: what it covered belongs to nobody."""
        self.object_ids.remove(object_id)
        self._labels = self._labels.where(self._labels != object_id, NOBODY)
        self._previous_labels = self._previous_labels.where(self._previous_labels != object_id, NOBODY)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`vosops.models.network.Memory`."""
        return {
            "object_ids": list(self.object_ids),
            **{name: getattr(self, f"_{name}").clone() for name in _SAVED},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`vosops.models.network.Memory`."""
        self.object_ids = list(state["object_ids"])
        for name in _SAVED:
            setattr(self, f"_{name}", state[name].to(self._keys.device, copy=True))
        self._seen = None

    def memory_bytes(self) -> int:
        """Return the bytes of keys and labels."""
        return sum(tensor.nbytes for tensor in (getattr(self, f"_{name}") for name in _SAVED))

    def _keys_of(self, image: Tensor, frame: int) -> Tensor:
        if self._seen is not None and self._seen[0] == frame:
            return self._seen[1]
        return self.network.embed(image).keys

    def _labels_of(self, masks: Masks, size: tuple[int, int], permanent: bool) -> Tensor:
        """Return the ids (h,w) at the keys' size; on a permanent frame no object is lost for being small."""
        classes = masks.labels()
        small = self.network.matching.resize_labels(classes, size)
        if permanent:
            for index in range(1, 1 + len(masks.object_ids)):
                if not (small == index).any():
                    _keep_small(index, classes, small)
        return torch.tensor([0, *masks.object_ids], device=small.device)[small]

    def _masks_of(self, labels: Tensor) -> Tensor:
        """Ids (T,h,w) -> masks (1,O+1,T,h,w)."""
        ids = torch.tensor([0, *self.object_ids], device=labels.device)
        return (labels == ids[:, None, None, None])[None]

    def _check_budget(self, size: tuple[int, int]) -> None:
        if self.budget is None:
            return
        cells = size[0] * size[1]
        each = cells * (EMBEDDING_CHANNELS * 4 + 8)  # of keys in float32 and labels in int64
        frames = self._labels.shape[0] + 1
        if (frames + 1) * each > self.budget:
            fit = max(0, self.budget // each - 1)
            what = f"{frames} permanent frames and the previous one"
            raise MemoryBudgetError.of((frames + 1) * each, what, self.budget, fit)


_SAVED = ("keys", "labels", "previous_keys", "previous_labels")


class _SplitSeparable(nn.Module):
    """A convolution of each channel, then a 1x1 of all, a ReLU after both."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, kernel, padding=kernel // 2, groups=inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1)
        for conv in (self.depthwise, self.pointwise):
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.pointwise(torch.relu(self.depthwise(x))))

    def shared(self, common: Tensor, own: Tensor) -> Tensor:
        """forward(cat([common, own[i]])) for every i; what depends on common (1,C,H,W) alone is computed once.

        own: (O,K,H,W).
        """
        split = common.shape[1]
        depthwise, pointwise = self.depthwise, self.pointwise
        assert depthwise.bias is not None
        sums = []
        for x, part in ((common, slice(0, split)), (own, slice(split, None))):
            weight, bias = depthwise.weight[part], depthwise.bias[part]
            y = functional.conv2d(x, weight, bias, padding=depthwise.padding, groups=x.shape[1])
            sums.append(functional.conv2d(torch.relu(y), pointwise.weight[:, part]))
        assert pointwise.bias is not None
        return torch.relu(sums[0] + sums[1] + pointwise.bias[:, None, None])


class SegmentationHead(nn.Module):
    """The dynamic segmentation head: features (1,C,h,w) and each object's maps (O,K,h,w) -> logits (O,h,w).

    One set of weights for all objects, so that their number is free. Without gradients large maps are computed
    in bands of rows and groups of objects, whose activations take HEAD_BYTES at most; the result is the same.
    """

    def __init__(self, maps: int, features: int = CHANNELS) -> None:
        super().__init__()
        inputs = [features + maps] + [HEAD_CHANNELS] * (HEAD_LAYERS - 1)
        self.layers = nn.ModuleList([_SplitSeparable(n, HEAD_CHANNELS, HEAD_KERNEL) for n in inputs])
        self.logit = nn.Conv2d(HEAD_CHANNELS, 1, 1)
        for layer in self.layers:
            assert isinstance(layer, _SplitSeparable)
            for conv, std in zip((layer.depthwise, layer.pointwise), HEAD_STDS, strict=True):
                truncated_normal_(conv.weight, std)
        truncated_normal_(self.logit.weight, LOGIT_STD)
        assert self.logit.bias is not None
        nn.init.zeros_(self.logit.bias)

    def forward(self, features: Tensor, maps: Tensor, naive: bool = False) -> Tensor:
        """See the class. naive: with the features repeated for every object, as the original does."""
        if naive:
            x = torch.cat([features.expand(len(maps), -1, -1, -1), maps], 1)
            for layer in self.layers:
                x = layer(x)
            logits: Tensor = self.logit(x)[:, 0]
            return logits
        if torch.is_grad_enabled():
            return self._logits(features, maps)
        objects, _, height, width = maps.shape
        halo = HEAD_LAYERS * (HEAD_KERNEL // 2)
        row_bytes = 3 * HEAD_CHANNELS * width * maps.element_size()  # of a layer's input, middle and output
        group = min(objects, max(1, HEAD_BYTES // (row_bytes * height)))
        band = min(height, max(4 * halo, HEAD_BYTES // (row_bytes * group) - 2 * halo))
        logits = maps.new_empty(objects, height, width)
        for top in range(0, height, band):
            rows = slice(max(0, top - halo), min(height, top + band + halo))
            own = slice(top - rows.start, min(height, top + band) - rows.start)
            for start in range(0, objects, group):
                some = slice(start, start + group)
                part = self._logits(features[:, :, rows], maps[some, :, rows])
                logits[some, top : top + band] = part[:, own]
        return logits

    def _logits(self, features: Tensor, maps: Tensor) -> Tensor:
        first, *others = self.layers
        assert isinstance(first, _SplitSeparable)
        x = first.shared(features, maps)
        for layer in others:
            x = layer(x)
        logits: Tensor = self.logit(x)[:, 0]
        return logits


class Matching(nn.Module, ABC):
    """How a frame's keys become maps for the head: of each class (background first) the channels ``maps``."""

    maps: int

    @abstractmethod
    def forward(
        self, query: Tensor, first: References, previous: References, previous_mask: Tensor
    ) -> Tensor:
        """query (1,C,h,w), the first frame (and others known for sure), the previous one -> (O+1,maps,h,w).

        previous_mask: (O+1,h,w), the previous frame's mask as the head receives it.
        """

    @abstractmethod
    def resize_labels(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """Return labels (...,H,W) to the size of the keys, nearest."""


class FirstAndPreviousMatching(Matching):
    """FEELVOS: distance to the first frame, previous mask, distance to the previous frame within radius pixels."""

    maps = 3

    def __init__(self, radius: int = RADIUS) -> None:
        super().__init__()
        self.radius = radius

    def forward(
        self, query: Tensor, first: References, previous: References, previous_mask: Tensor
    ) -> Tensor:
        """See :class:`Matching`."""
        far = vosops.global_matching(query, first.keys, first.masks)
        near = vosops.local_matching(
            query, previous.keys[:, :, 0], previous.masks[:, :, 0], radius=self.radius
        )
        assert isinstance(far, Tensor) and isinstance(near, Tensor)
        return torch.stack([far[0].to(query), previous_mask, near[0].to(query)], 1)

    def resize_labels(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """As TensorFlow does with align_corners=True: corners stay corners, halves go up."""
        for dim, length in zip((-2, -1), size, strict=True):
            labels = labels.index_select(dim, _aligned(labels.shape[dim], length).to(labels.device))
        return labels


class NestedMatching(Matching):
    """CFBI: nested windows at half the size, learned biases of background and objects, and the nearest other class.

    Channels: distance to the first frame, to the previous one in each window (the largest first, then ascending),
    previous mask; then the windows' and the first frame's distances to the nearest of the other classes.
    """

    def __init__(self, radii: Sequence[int] = CFBI_RADII) -> None:
        super().__init__()
        self.radii = tuple(radii)
        self.maps = 2 * (1 + len(self.radii)) + 1
        self.background_bias = nn.Parameter(torch.zeros(1))
        self.object_bias = nn.Parameter(torch.zeros(1))

    def forward(
        self, query: Tensor, first: References, previous: References, previous_mask: Tensor
    ) -> Tensor:
        """See :class:`Matching`."""
        bias = self.bias(previous_mask.shape[0] - 1)
        far = vosops.global_matching(query, first.keys, first.masks, bias=bias)
        assert isinstance(far, Tensor)
        far = far[0].to(query)[:, None]
        near = self._near(query, previous, bias)
        others = [nearest_other(x) for x in (near, far)]
        return torch.cat([far, near, previous_mask[:, None], *others], 1)

    def bias(self, objects: int) -> Tensor:
        """Return what is added to the squared distances of each class, background first: (O+1,)."""
        return torch.cat([self.background_bias, self.object_bias.expand(objects)])

    def _near(self, query: Tensor, previous: References, bias: Tensor) -> Tensor:
        """(O+1,R,h,w), the largest window first."""
        size = (query.shape[2], query.shape[3])
        half = (size[0] // 2 + 1, size[1] // 2 + 1)
        now, before = (_bilinear(x, half) for x in (query, previous.keys[:, :, 0]))
        masks = functional.interpolate(previous.masks[:, :, 0].to(query), half, mode="nearest") > 0.5
        near = vosops.local_matching(now, before, masks, radius=self.radii, bias=bias)
        assert isinstance(near, Tensor)
        near = torch.cat([near[0, :, -1:], near[0, :, :-1]], 1).to(query)
        return _bilinear(near, size)

    def resize_labels(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """As PyTorch's mode "nearest" does."""
        for dim, length in zip((-2, -1), size, strict=True):
            index = torch.arange(length, device=labels.device) * labels.shape[dim] // length
            labels = labels.index_select(dim, index)
        return labels


def nearest_other(distances: Tensor) -> Tensor:
    """(O+1,...) -> of each class the least of the other classes' distances; a single class keeps its own."""
    if distances.shape[0] == 1:
        return distances
    least, second = distances.topk(2, 0, largest=False).values
    mine = torch.arange(distances.shape[0], device=distances.device)
    is_least = distances.argmin(0) == mine.view(-1, *(1,) * (distances.dim() - 1))
    return torch.where(is_least, second, least)


def _keep_small(index: int, labels: Tensor, small: Tensor) -> None:
    """Give a class of labels (H,W) one pixel of small (h,w), where it is, if there is any."""
    pixels = (labels == index).nonzero()
    if len(pixels):
        place = pixels[len(pixels) // 2].tolist()
        sides = zip(place, small.shape, labels.shape, strict=True)
        row, column = (round(x * (new - 1) / max(old - 1, 1)) for x, new, old in sides)
        small[row, column] = index


def _noisy_identity_(weight: Tensor) -> None:
    """As the original's embedding starts: truncated noise, plus 1 in the centre from channel i to channel i.

    Of a depthwise weight (C,1,k,k), which has but one input channel, that is channel 0 alone.
    """
    truncated_normal_(weight, EMBEDDING_NOISE)
    with torch.no_grad():
        same = torch.arange(min(weight.shape[:2]))
        weight[same, same, weight.shape[2] // 2, weight.shape[3] // 2] += 1


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Return labels (...,h,w) integer -> bool (classes,...,h,w); a label that is no class is in none."""
    return labels == torch.arange(classes, device=labels.device).view(-1, *(1,) * labels.dim())


def subsample(masks: Tensor, most: int) -> Tensor:
    """Keep at most `most` random pixels of each mask (...,h,w), bool."""
    flat = masks.flatten(-2)
    if flat.shape[-1] <= most:
        return masks
    chances = torch.where(flat, torch.rand(flat.shape, device=flat.device), -1.0)
    chosen = torch.zeros_like(flat).scatter_(-1, chances.topk(most, -1).indices, True)
    return (chosen & flat).view_as(masks)


def _aligned(inputs: int, outputs: int) -> Tensor:
    """For every output the nearest input, both ends aligned; in float32 as TensorFlow counts."""
    if outputs == 1:
        return torch.zeros(1, dtype=torch.int64)
    scale = torch.tensor(inputs - 1, dtype=torch.float32) / (outputs - 1)
    places = (torch.arange(outputs, dtype=torch.float32) * scale).double()
    return (places + 0.5).floor().long().clamp(max=inputs - 1)


def _bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(x, size, mode="bilinear", align_corners=True)
