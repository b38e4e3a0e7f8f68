"""vosops-s: propagate's evidence, weighed and refined by a small trained network.

Each object of a frame has what :class:`vosops.models.Propagate` finds out about its cells (similarities to permanent,
recent and remembered frames, a classifier), its mask in the latest frame, and that mask carried along by the best
matches. A network of strides 8 to 32 and then 4, the same for all objects, adds a correction at stride 2 to propagate's
logit; a softmax joins the objects, a guided filter follows, and the result is what the next frames are compared with.
Untrained it is propagate. The frozen features are those of EfficientNet-Lite2, of strides 2 to 16.
docs/models/vosops_s.md tells how it was trained and what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops.models import propagate as base
from vosops.models.features import EfficientNetLite
from vosops.models.propagate import Evidence, Propagate
from vosops.models.registry import find_model
from vosops.models.weights import load_weights, read_weights

__all__ = ["Look", "Refiner", "RefinerInput", "VosopsS", "load_refiner"]

BACKBONE = "efficientnet_lite2"
BACKBONES = {"efficientnet_lite0": (16, 24, 40, 112), "efficientnet_lite2": (16, 24, 48, 120)}
"""Those that it can be trained with, and the channels of their maps of strides 2, 4, 8 and 16."""
WEIGHTS = "vosops-weights-s"
INSTALL_WEIGHTS = "pip install ./weights in a checkout of vosops"
EVIDENCE_CHANNELS = 19  # of a cell of an object; see VosopsS._evidence_of
MASK_CHANNELS = 8  # of a cell of stride 4: the latest mask and the carried one, four pixels of stride 2 each
LOGIT_LIMIT = 6.0  # of propagate's log-probabilities, so that the network can overrule them
STRIDE = 2  # of the result before the guided filter
CELL = 8 // STRIDE  # pixels of stride 2 in a cell's side
WIDE_SEARCH_RADIUS = 24  # cells, instead of SEARCH_RADIUS while an object is doubtful
DOUBTFUL = 0.6  # an object whose cells are, on average, less probable than this may be elsewhere
STRIDES = (2, 4, 8, 16)  # of the backbone's maps
MAP_SCALES = (1 / 4, 1 / 8, 6.0, 10.0)  # of these maps, so that all of them are of the order of 1
MARGIN = 4  # cells around what is searched, in which the backbone is computed too
MOST_OF_FRAME = 0.85  # of its cells, from which on the backbone is computed on all of a frame
HAS_TILES = torch.cpu._is_amx_tile_supported()  # for which products of bfloat16 cost a fourth of float32's
_COARSEST = 4  # cells in the side of a pixel of stride 32
_SIMILARITY_LIMIT = 0.4  # of a difference of cosines that the network sees


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (N,C,H,W) alone, so that nothing depends on the size of a crop."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), _ChannelNorm(outputs), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = _ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.norm(self.second(self.first(x))))


@dataclass(frozen=True)
class RefinerInput:
    """What the network sees of O objects in F frames: a part of each frame, h x w cells of stride 8.

    Attributes:
        evidence: (O,19,h,w).
        logit: (O,1,h,w): propagate's, against the background.
        masks: (O,8,2h,2w): probabilities at stride 2, where the latest mask is and where it moved to.
        maps: of the backbone, (F,C,8h/s,8w/s) for the strides s = 2, 4, 8, 16.
        frame: int64 (O,): the frame that each object is in.
    """

    evidence: Tensor
    logit: Tensor
    masks: Tensor
    maps: tuple[Tensor, ...]
    frame: Tensor

    @classmethod
    def joined(cls, inputs: list[RefinerInput]) -> RefinerInput:
        """Return those of several frames, whose parts have the same size, as one."""
        before, frames = 0, []
        for one in inputs:
            frames.append(one.frame + before)
            before += len(one.maps[0])
        return cls(
            torch.cat([one.evidence for one in inputs]),
            torch.cat([one.logit for one in inputs]),
            torch.cat([one.masks for one in inputs]),
            tuple(torch.cat(maps) for maps in zip(*(one.maps for one in inputs), strict=True)),
            torch.cat(frames),
        )


class Refiner(nn.Module):
    """The trained network: from evidence and the backbone's maps to a correction of propagate's logit.

    channels: of its layers at strides 4, 8, 16 and 32. dropout: of the backbone's channels, in training. maps: channels
    of the backbone's maps. It starts with a correction of zero. 1.1 million parameters.
    """

    def __init__(
        self,
        channels: tuple[int, int, int, int] = (40, 64, 96, 128),
        dropout: float = 0.1,
        maps: tuple[int, int, int, int] = BACKBONES[BACKBONE],
    ) -> None:
        super().__init__()
        self.maps = maps
        c4, c8, c16, c32 = channels
        self.project2, self.project4 = _conv(4 * maps[0], 16, 1), _conv(maps[1], 24, 1)
        self.project8, self.project16 = _conv(maps[2], 32, 1), _conv(maps[3], 64, 1)
        self.enter8 = nn.Sequential(_conv(EVIDENCE_CHANNELS + 32 + 64, c8), _Residual(c8))
        self.enter16 = nn.Sequential(_conv(c8, c16, 3, 2), _Residual(c16))
        self.enter32 = nn.Sequential(_conv(c16, c32, 3, 2), _Residual(c32))
        self.up16, self.leave16 = _conv(c32, c16, 1), _Residual(c16)
        self.up8, self.leave8 = _conv(c16, c8, 1), _Residual(c8)
        self.up4 = _conv(c8, c4, 1)
        self.enter4 = nn.Sequential(_conv(c4 + 16 + 24 + MASK_CHANNELS + 1, c4), _Residual(c4))
        self.last = nn.Conv2d(c4, STRIDE * STRIDE, 3, padding=1)  # the four pixels of stride 2
        self.gain = nn.Parameter(torch.ones(1))
        self.dropout = dropout
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, inputs: RefinerInput) -> Tensor:
        """Return the logits (O,1,4h,4w) of each object against the background, float32, at stride 2."""
        height, width = inputs.logit.shape[2:]
        inputs = _padded(inputs, -height % _COARSEST, -width % _COARSEST)
        stride2, stride4, stride8, stride16 = inputs.maps
        frame = inputs.frame
        at2 = _of_frames(self._enter2(stride2), frame)
        at4 = _of_frames(self._dropped(self.project4(stride4)), frame)
        at8 = _of_frames(self._dropped(self.project8(stride8)), frame)
        at16 = _of_frames(_twice(self._dropped(self.project16(stride16))), frame)
        x8 = self.enter8(_cat(inputs.evidence, at8, at16))
        x16 = self.enter16(x8)
        x16 = self.leave16(x16 + _twice(self.up16(self.enter32(x16))))
        x8 = self.leave8(x8 + _twice(self.up8(x16)))
        logit4 = _twice(inputs.logit)
        x4 = self.enter4(_cat(_twice(self.up4(x8)), at2, at4, inputs.masks, logit4 / 4))
        correction = functional.pixel_shuffle(self.last(x4).float(), STRIDE)
        logits = self.gain * _twice(logit4.float()) + 2 * correction
        return logits[..., : CELL * height, : CELL * width]

    def _enter2(self, x: Tensor) -> Tensor:
        """Apply `project2` to the four pixels of stride 2 in each of stride 4, as a convolution of stride 2."""
        conv, *rest = self.project2
        assert isinstance(conv, nn.Conv2d)
        x = functional.conv2d(
            x, conv.weight.unflatten(1, (-1, 4)).flatten(2).unflatten(2, (2, 2)), conv.bias, 2
        )
        for layer in rest:
            x = layer(x)
        return x

    def _dropped(self, x: Tensor) -> Tensor:
        return functional.dropout2d(x, self.dropout, self.training)


def _twice(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _of_frames(maps: Tensor, frame: Tensor) -> Tensor:
    """Return the maps (F,C,h,w) of the frames that O objects are in, (O,C,h,w); without a copy if it is one frame."""
    return maps.expand(len(frame), -1, -1, -1) if len(maps) == 1 else maps[frame]


def _cat(*parts: Tensor) -> Tensor:
    """Concatenate channels, in the dtype of the last layer's output before it, channels last."""
    dtype = min((part.dtype for part in parts), key=lambda dtype: torch.finfo(dtype).bits)
    return torch.cat([part.to(dtype).permute(0, 2, 3, 1) for part in parts], 3).permute(0, 3, 1, 2)


def _padded(inputs: RefinerInput, rows: int, columns: int) -> RefinerInput:
    """Return the inputs with more rows and columns of cells, even numbers, of which nothing is known."""
    if rows == columns == 0:
        return inputs

    def pad(x: Tensor, stride: int) -> Tensor:
        return functional.pad(x, (0, columns * 8 // stride, 0, rows * 8 // stride))

    return RefinerInput(
        pad(inputs.evidence, 8),
        pad(inputs.logit, 8),
        pad(inputs.masks, 4),
        tuple(pad(x, stride) for x, stride in zip(inputs.maps, STRIDES, strict=True)),
        inputs.frame,
    )


@dataclass(frozen=True)
class _Box:
    """A part of the grid of cells, which begins at a multiple of 4 and ends at one or with the grid."""

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def around(cls, cells: Tensor) -> _Box:
        """Return the least that holds the cells of a bool (h,w), of which one at least is true."""
        found = base._bounding_box(cells)
        assert found is not None
        low = [start - start % _COARSEST for start, _ in found]
        high = [min(end + -end % _COARSEST, size) for (_, end), size in zip(found, cells.shape, strict=True)]
        return cls(low[0], high[0], low[1], high[1])

    @classmethod
    def whole(cls, height: int, width: int) -> _Box:
        """Return all of a grid."""
        return cls(0, height, 0, width)

    @property
    def area(self) -> int:
        """Its cells."""
        return (self.bottom - self.top) * (self.right - self.left)

    def within(self, other: _Box) -> _Box:
        """Return where it is in a box that holds it."""
        return _Box(
            self.top - other.top, self.bottom - other.top, self.left - other.left, self.right - other.left
        )

    def of(self, x: Tensor, stride: int) -> Tensor:
        """Return the part of a map (...,8h/stride,8w/stride)."""
        rows, columns = (
            slice(low * 8 // stride, high * 8 // stride)
            for low, high in ((self.top, self.bottom), (self.left, self.right))
        )
        return x[..., rows, columns]


@dataclass(frozen=True)
class Look:
    """What a tracker knows of the next frame before the network has judged it.

    Attributes:
        keys: (D,h,w), of the whole frame.
        search: bool (h,w): cells that may be of an object.
        box: the part of the frame that the network sees.
        inputs: what it sees.
    """

    keys: Tensor
    search: Tensor
    box: _Box
    inputs: RefinerInput

    def searched(self) -> Tensor:
        """Return bool (4h',4w'): the pixels of stride 2 in the box that may be of an object."""
        return self.box.of(self.search, 8).repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)


class VosopsS(Propagate):
    """The tracker: a :class:`vosops.models.VideoTracker` for any number of objects.

    weights: a file of the network's, as ``vosops train`` writes it; or a `Refiner`, trained or not; None takes those of
    the distribution ``vosops-weights-s`` (CC BY-NC 4.0), and is a ValueError where that is not installed. The backbone
    is the one of `BACKBONES` that the network was trained with, EfficientNet-Lite2 for the distribution's. pretrained:
    False takes random weights for the backbone. size, device and memory_budget: as of :class:`vosops.models.Propagate`.
    memory: whether every fifth frame is remembered, which the network was trained with. bfloat16: whether backbone
    and network, not the matching, compute by autocast to bfloat16, as in training; None: on CPUs with AMX.
    Raises ValueError also for a file that is not the network's, FileNotFoundError, and ImportError without the
    backbone's package.
    Cost: propagate's, with a larger backbone, and the network on the part of the frame that is searched.
    """

    _MORE_OF_LATEST = CELL * CELL

    def __init__(
        self,
        weights: str | Path | Refiner | None = None,
        *,
        pretrained: bool = True,
        size: int = -1,
        device: str | torch.device = "cpu",
        memory_budget: int | str | None = None,
        memory: bool = True,
        bfloat16: bool | None = None,
    ) -> None:
        refiner = weights if isinstance(weights, Refiner) else load_refiner(weights)
        super().__init__(
            backbone_of(refiner.maps),
            pretrained=pretrained,
            size=size,
            device=device,
            memory_budget=memory_budget,
            memory=memory,
        )
        self.refiner = refiner.to(device)
        self.bfloat16 = HAS_TILES and self.device.type == "cpu" if bfloat16 is None else bfloat16

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._latest = torch.empty(
            0
        )  # (O,4h,4w): the objects' probabilities in the latest frame, at stride 2
        self._maps: tuple[Tensor, ...] = ()  # of a part of the frame that is being segmented
        self._seen = _Box.whole(0, 0)  # that part

    def remove_object(self, object_id: int) -> None:
        """Stop tracking an object: see :class:`vosops.models.Propagate`."""
        place = self.object_ids.index(object_id) if object_id in self.object_ids else 0
        super().remove_object(object_id)
        self._latest = torch.cat([self._latest[:place], self._latest[place + 1 :]])

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, but for the network's weights."""
        return {**super().state_dict(), "latest": self._latest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state of :meth:`state_dict`."""
        super().load_state_dict(state)
        self._latest = state["latest"].to(self.device)

    def memory_bytes(self) -> int:
        """Return the bytes of what is remembered of the frames."""
        return super().memory_bytes() + self._latest.numel() * self._latest.element_size()

    @torch.no_grad()
    def pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (N,3,H,W) in [0, 1], H and W multiples of 16 -> the backbone's maps of strides 2, 4, 8 and 16."""
        assert isinstance(self.backbone, EfficientNetLite)
        return self.backbone.pyramid(images)

    def _own_pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute `pyramid` in the tracker's own arithmetic; in training the trainer chooses it."""
        if not self.bfloat16:
            return self.pyramid(images)
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.pyramid(images)

    @torch.no_grad()
    def begin(self, pyramid: tuple[Tensor, ...], labels: Tensor) -> None:
        """Forget everything and start from labels (H,W) of a frame, given as its maps (1,C,h,w); for training."""
        self.reset()
        self._frame_size = (labels.shape[0], labels.shape[1])
        background = torch.ones(1, *labels.shape, device=self.device)
        self._learn(self._see(pyramid), labels, background)

    @torch.no_grad()
    def take(self, pyramid: tuple[Tensor, ...], probabilities: Tensor, *, memorize: bool = False) -> None:
        """Take probabilities (O+1,H,W) as the result of a frame, given as its maps; for training.

        As if frames before it had passed unseen: it is the only recent one. memorize: it enters the memory.
        """
        if memorize:
            self._steps = base.MEMORY_EVERY - 1
        self._remember(self._embedded(self._see(pyramid)), probabilities)
        self._recent_keys, self._recent_probabilities = (
            self._recent_keys[-1:],
            self._recent_probabilities[-1:],
        )

    @torch.no_grad()
    def look(self, pyramid: tuple[Tensor, ...], *, whole: bool = False) -> Look:
        """Return what is known of the next frame, given as its maps. whole: of all of it, not what is searched only."""
        keys = self._embedded(self._see(pyramid))
        return self._look(keys, whole)

    @torch.no_grad()
    def settle(self, look: Look, logits: Tensor, image: Tensor) -> Tensor:
        """Make the network's logits (O,4h,4w) the result of the frame, and return its probabilities (O+1,H,W)."""
        probabilities = self._enlarge(self._joint(logits, look), image)
        self._remember(look.keys, probabilities)
        return probabilities

    def _searched_features(self, image: Tensor) -> Tensor:
        """Compute the backbone on what is searched and a margin around it; all else is 0."""
        search = self._search_region()
        box = _Box.around(base._around(search, MARGIN)) if search.any() else None
        if box is None or box.area > MOST_OF_FRAME * search.numel():
            return self._features(image)
        pyramid = self._own_pyramid(box.of(image[None], 1))
        self._keep_maps(pyramid, box)
        matched = []
        for x, stride in zip(pyramid[2:], STRIDES[2:], strict=True):
            whole = x.new_zeros(1, x.shape[1], *(side * 8 // stride for side in search.shape))
            whole = whole.contiguous(memory_format=torch.channels_last)
            box.of(whole, stride).copy_(x)
            matched.append(whole)
        return self._joined(*matched)

    def _recent_classes(self, age: int) -> Tensor:
        """Propagate's, but cells whose features were not computed are of none."""
        return super()._recent_classes(age) & self._recent_keys[-age].any(0)

    def latest(self) -> Tensor:
        """Return the probabilities (O+1,H/2,W/2) of the latest frame, at half the size of the computation."""
        return torch.cat([1 - self._latest.sum(0, keepdim=True), self._latest])

    def _features(self, image: Tensor) -> Tensor:
        return self._see(self._own_pyramid(image[None]))

    def _see(self, pyramid: tuple[Tensor, ...]) -> Tensor:
        """Keep the maps (1,C,h,w) of a frame for the network, and return its features (C,H/8,W/8)."""
        _, _, stride8, stride16 = pyramid
        self._keep_maps(pyramid, _Box.whole(*stride8.shape[2:]))
        return self._joined(stride8, stride16)

    def _keep_maps(self, pyramid: tuple[Tensor, ...], box: _Box) -> None:
        """Keep the maps (1,C,h,w) of a part of a frame for the network."""
        stride2, stride4, stride8, stride16 = pyramid
        unit8, unit16 = (functional.normalize(x.float(), dim=1).to(x.dtype) for x in (stride8, stride16))
        self._maps = tuple(
            x * scale for x, scale in zip((stride2, stride4, unit8, unit16), MAP_SCALES, strict=True)
        )
        self._seen = box

    def _classify(self, keys: Tensor, image: Tensor) -> Tensor:
        if not self.object_ids:
            return self._enlarge(self._match(keys), image)
        look = self._look(keys)
        logits = self._judged(look.inputs)[:, 0]
        return self._enlarge(self._joint(logits, look), image)

    def _judged(self, inputs: RefinerInput) -> Tensor:
        """Return the network's logits (O,1,4h,4w), float32."""
        logits: Tensor
        if not self.bfloat16:
            logits = self.refiner(inputs)
            return logits
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.refiner(inputs)
        return logits

    def _look(self, keys: Tensor, whole: bool = False) -> Look:
        evidence = self._evidence(keys)
        box = _Box.around(torch.ones_like(evidence.search) if whole else evidence.search)
        return Look(keys, evidence.search, box, self._refiner_input(evidence, box))

    @base._full_precision
    def _refiner_input(self, evidence: Evidence, box: _Box) -> RefinerInput:
        """Return what the network sees of the latest frame and the evidence in it."""
        shares = evidence.logits.log_softmax(0).clamp(min=-LOGIT_LIMIT)
        logit = torch.where(evidence.search, shares[1:] - shares[:1], -2 * LOGIT_LIMIT)
        logit = logit.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        carried, motion = self._carried(evidence)
        channels = self._evidence_of(evidence, carried, motion)
        seen = box.within(self._seen)
        latest, moved = (functional.pixel_unshuffle(x[:, None], 2) * 2 - 1 for x in (self._latest, carried))
        return RefinerInput(
            box.of(channels, 8),
            box.of(logit[:, None], 8),
            box.of(torch.cat([latest, moved], 1), 4),
            tuple(seen.of(x, stride) for x, stride in zip(self._maps, STRIDES, strict=True)),
            torch.zeros(len(logit), dtype=torch.long, device=logit.device),
        )

    def _carried(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Return the latest masks (O,4h,4w), each cell from where it matches best, and how far that is (2,h,w)."""
        height, width = evidence.search.shape
        here = torch.arange(height * width, device=evidence.search.device).view(height, width)
        best = evidence.nearest.gather(0, evidence.recent[0].argmax(0, keepdim=True))[0]
        best = torch.where(evidence.search & (best >= 0), best, here)
        cells = functional.pixel_unshuffle(self._latest[:, None], CELL).flatten(2)
        carried = functional.pixel_shuffle(cells[:, :, best.flatten()].unflatten(2, best.shape), CELL)[:, 0]
        rows = best.div(width, rounding_mode="floor") - here.div(width, rounding_mode="floor")
        motion = torch.stack([rows, best % width - here % width]).float() / base.WINDOWS[1]
        return carried, motion

    def _evidence_of(self, evidence: Evidence, carried: Tensor, motion: Tensor) -> Tensor:
        """Return the channels (O,19,h,w) of each object against all other classes; 0 where it was not searched."""
        channels: list[Tensor] = []
        for cosines in (evidence.permanent, evidence.recent[0], evidence.recent[-1]):
            own, other = cosines[1:], _other(cosines)
            difference = (own - other).clamp(-_SIMILARITY_LIMIT, _SIMILARITY_LIMIT)
            channels += [own.clamp(min=0), other.clamp(min=0), difference * 4]
        shares = evidence.logits.log_softmax(0)
        against = shares[1:].clamp(min=-LOGIT_LIMIT) - _other(shares).clamp(min=-LOGIT_LIMIT)
        objects = len(against)
        channels += [
            evidence.local.expand(objects, -1, -1),
            (evidence.score[1:] - _other(evidence.score)) / 2,
            against / 4,
            self._recent_probabilities[-1][1:] * 2 - 1,
            self._recent_probabilities[0][1:] * 2 - 1,
            evidence.memory[1:] - _other(evidence.memory),
            *motion[:, None].expand(-1, objects, -1, -1),
            functional.avg_pool2d(carried, CELL) * 2 - 1,
            torch.ones_like(against),
        ]
        return torch.stack(channels, 1) * evidence.search

    @base._full_precision
    def _joint(self, logits: Tensor, look: Look) -> Tensor:
        """Logits (O,4h,4w) of a part of the frame -> probabilities (O+1,H/2,W/2), background elsewhere."""
        height, width = (side * CELL for side in look.search.shape)
        probabilities = logits.new_zeros(1 + len(logits), height, width)
        probabilities[0] = 1
        inside = look.box.of(probabilities, STRIDE)
        searched = look.searched()
        classes = torch.cat([torch.zeros_like(logits[:1]), logits]).softmax(0)
        inside.copy_(torch.where(searched, classes, inside))
        return probabilities

    def _remember(self, keys: Tensor, probabilities: Tensor) -> None:
        super()._remember(keys, probabilities)
        self._keep_latest(probabilities)

    def _learn(self, features: Tensor, labels: Tensor, probabilities: Tensor) -> Tensor:
        probabilities = super()._learn(features, labels, probabilities)
        self._keep_latest(probabilities)
        return probabilities

    def _keep_latest(self, probabilities: Tensor) -> None:
        height, width = (side * CELL for side in self._recent_keys[-1].shape[1:])
        self._latest = base._cell_means(probabilities[1:], (height, width))

    def _search_region(self) -> Tensor:
        """Propagate's, but wider around objects that are doubtful."""
        search = super()._search_region()
        objects = self._recent_probabilities[-1][1:]
        cells = objects > base.SEARCH_PROBABILITY
        doubtful = (objects * cells).sum((1, 2)) < DOUBTFUL * cells.sum((1, 2))
        if not doubtful.any():
            return search
        return search | base._around(cells[doubtful].any(0), WIDE_SEARCH_RADIUS)


def _other(x: Tensor) -> Tensor:
    """(O+1,h,w) -> (O,h,w): for each object the greatest value of all other classes."""
    return torch.stack([torch.cat([x[:o], x[o + 1 :]]).amax(0) for o in range(1, len(x))])


def backbone_of(maps: tuple[int, ...]) -> str:
    """Return the backbone whose maps have these channels; ValueError where none has."""
    name = next((name for name, channels in BACKBONES.items() if channels == maps), None)
    if name is None:
        raise ValueError(f"maps must be the channels of one of {', '.join(BACKBONES)}, got {maps}")
    return name


def load_refiner(weights: str | Path | None = None) -> Refiner:
    """Load the trained network, in evaluation mode, from a file; None: from the installed distribution.

    The shapes in the file tell with which of `BACKBONES` it was trained.
    """
    path = find_model("vosops_s").installed_weights if weights is None else weights
    if path is None:
        raise ValueError(
            f"weights must be a file where {WEIGHTS} is not installed, got None: {INSTALL_WEIGHTS}"
        )
    refiner = Refiner(maps=_maps_in(read_weights(path)))
    load_weights(refiner, path)
    return refiner.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def _maps_in(weights: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
    """Return the channels of the maps that weights are for; of what no known backbone has, the default's."""
    names = ("project8.0.weight", "project16.0.weight")
    inputs = [tuple(weights[name].shape[1:2]) for name in names if name in weights]
    for maps in BACKBONES.values():
        if inputs == [(channels,) for channels in maps[2:]]:
            return maps
    return BACKBONES[BACKBONE]
