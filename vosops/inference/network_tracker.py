"""`NetworkTracker`: a network tracks the objects of a first frame through a video, a frame at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vosops import _checks, backends
from vosops.memory import MemoryBudgetError, parse_bytes
from vosops.models._tracking import (
    IGNORED,
    check_first,
    check_frame,
    check_labels,
    check_output,
    id_dtype,
    ids_of,
)
from vosops.models.network import Masks, Memory, Network, resize_rows, source_rows

__all__ = ["NetworkTracker", "uncompiled"]

_TILE_BYTES = 16 << 20  # of the probabilities that are made at a time
_GROUP_BYTES = 64 << 20  # of the full-size masks that are kept while a frame is memorised
_FLOAT = 4  # bytes


class NetworkTracker:
    """Tracks objects through a video with a network: a :class:`vosops.models.VideoTracker`.

    :func:`create_tracker` creates it from a network or the name of a model.

    Args:
        model: a :class:`vosops.models.Network`, on whose device everything runs; it is put into eval mode.
        memory_every: networks whose memory grows (STM) store every N-th frame, including the first.
        scales: the network runs at each of these sizes, relative to the frame's, and the results are averaged.
        memory_budget: limit of the memory for stored frames, over all scales: bytes, or a string such as "2GB".
        dtype: torch.bfloat16 or torch.float16 to run the network under autocast; None: as the caller runs.
        channels_last: keep the network's weights and maps in that memory format; None: as the network prefers, but
            contiguous if naive.
        naive: compute in the same way as the original code: reference ops, memory by concatenation, everything at
            full size at once; gives the same results with many times the memory, for comparison.

    Raises TypeError, ValueError for invalid arguments; methods also raise RuntimeError before `initialize`, and
    MemoryBudgetError if the permanent frames do not fit the budget.

    In addition to the network and its memory, a step needs a few tens of megabytes: probabilities exist only a few
    rows at a time, unless they are the output. Not differentiable: networks are trained with their own `forward`.

        >>> import torch
        >>> from vosops.inference import NetworkTracker
        >>> from vosops.models import create_model
        >>> tracker = NetworkTracker(create_model("stm"))
        >>> labels = torch.zeros(32, 32, dtype=torch.uint8)
        >>> labels[8:24, 8:24] = 1
        >>> tracker.initialize(torch.rand(3, 32, 32), labels)
        >>> tracker.step(torch.rand(3, 32, 32)).shape
        torch.Size([2, 32, 32])
    """

    def __init__(
        self,
        model: Network,
        *,
        memory_every: int = 5,
        scales: Sequence[float] = (1.0,),
        memory_budget: int | str | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool | None = None,
        naive: bool = False,
    ) -> None:
        _check_network(model)
        if not scales or not all(0 < scale < math.inf for scale in scales):
            raise ValueError(f"scales must be positive numbers, at least one, got {tuple(scales)}")
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be None, float32, bfloat16 or float16, got {dtype}")
        self.network = model.eval()
        self.memory_every = _checks.check_positive_int("memory_every", memory_every)
        self.scales = tuple(float(scale) for scale in scales)
        self.memory_budget = None if memory_budget is None else parse_bytes(memory_budget)
        self.dtype = dtype
        self.naive = naive
        if channels_last is None:
            channels_last = model.channels_last and not naive
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.reset()

    @property
    def device(self) -> torch.device:
        """Where the network is, and results are."""
        return next(self.network.parameters()).device

    @property
    def object_ids(self) -> list[int]:
        """The ids of the objects that are tracked, in the order of the probabilities."""
        return list(self._object_ids)

    def reset(self) -> None:
        """Forgets everything."""
        self._object_ids: list[int] = []
        self._memories: list[Memory] = []
        self._geometry: _Geometry | None = None
        self._latest: _Segmented | None = None

    def initialize(self, frame: Tensor, labels: Tensor) -> None:
        """Forgets everything and starts from this frame: see :class:`vosops.models.VideoTracker`.

        Pixels of label 255, of which nothing is known, are taken for background.
        """
        check_first(frame, labels)
        self.reset()
        with self._running():
            self._geometry = _Geometry(self.network, _size(frame), self.scales)
            self._memories = self._new_memories()
            known = labels.to(self.device).long()
            known = torch.where(known == IGNORED, 0, known)
            self._latest = _Segmented(0, frame.to(self.device, copy=True), None, [], known, permanent=True)
        self._object_ids = ids_of(labels)

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

        permanent: keep this frame's result permanently, as labelled frames are. end: the last frame; nothing depends
        on it here, since a frame is memorised when the next one comes. output: "probs", or "labels" for a map of ids
        (H,W), uint8 where the ids fit, else int64, which never needs the probabilities of all pixels at once.
        """
        latest = self._started()
        check_frame(frame, _size(latest.frame))
        check_output(output)
        if labels is not None:
            check_labels(labels, frame)
        with self._running():
            self._memorise()
            segmented, ids = self._segment(latest.index + 1, frame, labels, permanent)
            result = self._output(segmented, ids, output)
        self._latest, self._object_ids = segmented, ids
        return result

    def add_objects(self, frame: Tensor, labels: Tensor) -> None:
        """Add the objects of labels, or correct known ones, in the frame that was segmented last.

        0 in labels is "none of the objects in labels": the other objects keep the pixels that they have there. The
        frame counts as labelled: it is kept permanently.
        """
        if self._latest is None:
            self.initialize(frame, labels)
            return
        latest = self._latest
        check_frame(frame, _size(latest.frame))
        check_labels(labels, frame)
        with self._running():
            given = ids_of(labels)
            labels = labels.to(self.device).long()
            before = self._output(latest, self._object_ids, "labels").long()
            others = torch.tensor([i for i in self._object_ids if i not in given], device=self.device)
            merged = torch.where((labels == 0) & torch.isin(before, others), before, labels)
            if latest.labels is not None:
                merged = torch.where(labels == IGNORED, latest.labels, merged)
        self._latest = replace(latest, labels=merged, permanent=True, memorised=())
        self._object_ids += [i for i in given if i not in self._object_ids]

    def remove_object(self, object_id: int) -> None:
        """Stop tracking an object and forgets it; its pixels in the latest frame become background."""
        if object_id not in self._object_ids:
            raise ValueError(f"object_id must be one of {self._object_ids}, got {object_id}")
        latest = self._started()
        with self._running():
            for memory in self._memories:
                if object_id in memory.object_ids:
                    memory.remove_object(object_id)
            labels = latest.labels
            labels = None if labels is None else torch.where(labels == object_id, 0, labels)
        score_ids = [None if i == object_id else i for i in latest.score_ids]
        self._latest = replace(latest, labels=labels, score_ids=score_ids)
        self._object_ids.remove(object_id)

    def predict(self, frame: Tensor, *, output: str = "probs") -> Tensor:
        """Segment a frame like `step`, without changing the state: see :class:`vosops.models.VideoTracker`.

        The latest frame is memorised by this, as the next step would.
        """
        latest = self._started()
        check_frame(frame, _size(latest.frame))
        check_output(output)
        with self._running():
            self._memorise()
            return self._output(*self._segment(latest.index + 1, frame, None, False), output)

    def confidence(self) -> Tensor:
        """Return the probability (H,W) float32 of each pixel's label in the latest frame; 1 where labels were given."""
        latest = self._started()
        with self._running():
            return self._maps(latest, self._object_ids).confidence()

    def memory_bytes(self) -> int:
        """Return the memory used by stored frames, in bytes."""
        return sum(memory.memory_bytes() for memory in self._memories)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on; loads with ``torch.load(..., weights_only=True)``."""
        with self._running():
            return {
                **self._options(),
                "object_ids": list(self._object_ids),
                "memories": [memory.state_dict() for memory in self._memories],
                "latest": None if self._latest is None else dict(vars(self._latest)),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state of :meth:`state_dict`; the next results are the same to the bit (on the CPU)."""
        for option, own in self._options().items():
            if state.get(option) != own:
                raise ValueError(f"state must be of {option} {own!r}, got {state.get(option)!r}")
        self.reset()
        if state["latest"] is None:
            return
        with self._running():
            latest = _Segmented(**state["latest"])
            scores = latest.scores
            latest = replace(
                latest,
                frame=latest.frame.to(self.device, copy=True),
                scores=None if scores is None else [x.to(self.device, copy=True) for x in scores],
                labels=None if latest.labels is None else latest.labels.to(self.device, copy=True),
            )
            self._geometry = _Geometry(self.network, _size(latest.frame), self.scales)
            self._memories = self._new_memories()
            for memory, saved in zip(self._memories, state["memories"], strict=True):
                memory.load_state_dict(saved)
        self._latest, self._object_ids = latest, list(state["object_ids"])

    # ---- How it is done.

    def _options(self) -> dict[str, Any]:
        """Return what a state must agree with."""
        network = type(self.network).__name__
        return {
            "network": network,
            "scales": list(self.scales),
            "memory_every": self.memory_every,
            "naive": self.naive,
        }

    def _started(self) -> _Segmented:
        if self._latest is None:
            raise RuntimeError("initialize must be called before the first step")
        return self._latest

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Without gradients, but with ordinary tensors, whatever the caller's mode is."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            if self.dtype is not None:
                enabled = self.dtype != torch.float32
                stack.enter_context(torch.autocast(self.device.type, self.dtype, enabled=enabled))
            if self.naive:
                stack.enter_context(backends.use_backend("reference"))
            yield

    def _new_memories(self) -> list[Memory]:
        budget = self.memory_budget
        return [
            self.network.new_memory(
                budget=None if budget is None else self._share(budget, n), naive=self.naive
            )
            for n in range(len(self.scales))
        ]

    def _share(self, budget: int, n: int) -> int:
        """Return what a budget gives the memory of a scale: its share of the area."""
        return int(budget * self.scales[n] ** 2 / self._total_area)

    @property
    def _total_area(self) -> float:
        """Of all scales, relative to the frame's."""
        return sum(scale**2 for scale in self.scales)

    def _of_all_scales(self, error: MemoryBudgetError, n: int) -> MemoryBudgetError:
        """Return a scale's error in terms of the whole budget."""
        if error.needed is None or len(self.scales) == 1:
            return error
        needed = math.ceil(error.needed * self._total_area / self.scales[n] ** 2)
        while self._share(needed, n) < error.needed:  # it was rounded
            needed += 1
        what = f"{error.what} at {len(self.scales)} scales"
        return MemoryBudgetError.of(needed, what, self.memory_budget, error.fit)

    def _memorise(self) -> None:
        """Add the latest frame to the memories, unless they have it."""
        latest, geometry = self._latest, self._geometry
        assert latest is not None and geometry is not None
        waiting = [n for n in range(len(self.scales)) if n not in latest.memorised]
        if not waiting or not self._object_ids:
            return
        image = geometry.image(latest.frame, self.memory_format)
        keep = latest.index % self.memory_every == 0
        errors = []
        for n in waiting:
            memory, size = self._memories[n], geometry.sizes[n]
            masks = _FrameMasks(self._maps(latest, self._object_ids), size)
            try:
                memory.add(
                    _resized(image, size), masks, frame=latest.index, permanent=latest.permanent, keep=keep
                )
            except MemoryBudgetError as error:
                errors.append(self._of_all_scales(error, n))
            else:
                latest.memorised += (n,)
        if errors:
            raise max(errors, key=lambda error: error.needed or 0)

    def _segment(
        self, index: int, frame: Tensor, labels: Tensor | None, permanent: bool
    ) -> tuple[_Segmented, list[int]]:
        """Return the frame's scores, without changing the tracker, and the ids of all objects that are known then."""
        assert self._geometry is not None
        frame = frame.to(self.device, copy=True)
        scores: list[Tensor] | None = None
        ids, score_ids = list(self._object_ids), list(self._object_ids)
        if labels is not None:
            ids += [i for i in ids_of(labels) if i not in ids]
            labels = labels.to(self.device, copy=True).long()
        if not score_ids:
            nothing = torch.zeros(frame.shape[1:], dtype=torch.long, device=self.device)
            labels = nothing if labels is None else torch.where(labels == IGNORED, 0, labels)
        elif labels is None or bool((labels == IGNORED).any()):
            image = self._geometry.image(frame, self.memory_format)
            scores = [
                memory.segment(_resized(image, size), frame=index)
                for memory, size in zip(self._memories, self._geometry.sizes, strict=True)
            ]
        kept = permanent or labels is not None
        return _Segmented(index, frame, scores, list(score_ids), labels, permanent=kept), ids

    def _maps(self, segmented: _Segmented, ids: Sequence[int]) -> _Maps:
        assert self._geometry is not None
        return _Maps(self.network, self._geometry, segmented, list(ids), self.naive)

    def _output(self, segmented: _Segmented, ids: Sequence[int], output: str) -> Tensor:
        """Probabilities (O+1,H,W) of the frame, or ids (H,W)."""
        maps = self._maps(segmented, ids)
        return maps.probabilities() if output == "probs" else maps.labels()


@dataclass
class _Segmented:
    """A frame and what is known of it: coarse scores, or labels, or labels where they are not 255, else scores.

    score_ids: the object of each of the scores' channels; None for one that was removed. memorised: the scales whose
    memories have it.
    """

    index: int
    frame: Tensor
    scores: list[Tensor] | None
    score_ids: Sequence[int | None]
    labels: Tensor | None
    permanent: bool = False
    memorised: tuple[int, ...] = ()


class _Geometry:
    """The sizes of a video's frames: as they are, padded, and at each scale."""

    def __init__(self, network: Network, frame: tuple[int, int], scales: Sequence[float]) -> None:
        self.frame = frame
        self.padding = network.padding(frame)
        self.left, right, self.top, bottom = self.padding
        self.padded = (frame[0] + self.top + bottom, frame[1] + self.left + right)
        self.sizes = [
            self.padded if scale == 1 else network.scaled_size(self.padded, scale) for scale in scales
        ]

    def image(self, frame: Tensor, memory_format: torch.memory_format) -> Tensor:
        """Return the frame (3,H,W) as (1,3,h,w) float32 in [0, 1], padded with zeros."""
        image = frame.float()
        if frame.dtype == torch.uint8:
            image = image.div_(255)
        return functional.pad(image[None], self.padding).contiguous(memory_format=memory_format)


class _Maps:
    """The probabilities of a frame, a range of rows at a time: O+1 classes, background first."""

    def __init__(
        self, network: Network, geometry: _Geometry, segmented: _Segmented, ids: list[int], at_once: bool
    ) -> None:
        self.network = network
        self.geometry = geometry
        self.segmented = segmented
        self.ids = ids
        self.at_once = at_once
        self.device = segmented.frame.device

    def probabilities(self) -> Tensor:
        """(O+1,H,W) float32, of the frame without its padding."""
        out = torch.empty(1 + len(self.ids), *self.geometry.frame, device=self.device)
        for rows in self._tiles():
            out[:, rows.start : rows.stop] = self.rows(rows)
        return out

    def labels(self) -> Tensor:
        """(H,W) ids of the most probable classes."""
        ids = torch.tensor([0, *self.ids], dtype=id_dtype(self.ids), device=self.device)
        out = torch.empty(self.geometry.frame, dtype=ids.dtype, device=self.device)
        for rows in self._tiles():
            out[rows.start : rows.stop] = ids[self.rows(rows).argmax(0)]
        return out

    def confidence(self) -> Tensor:
        """(H,W) float32: the probability of the most probable class."""
        out = torch.empty(self.geometry.frame, device=self.device)
        for rows in self._tiles():
            out[rows.start : rows.stop] = self.rows(rows).amax(0)
        return out

    def classes(self) -> Tensor:
        """(h,w) int64: the index of the most probable class, in the padded frame; 0 in the padding."""
        out = torch.zeros(self.geometry.padded, dtype=torch.long, device=self.device)
        inside = self._inside(out)
        for rows in self._tiles():
            inside[rows.start : rows.stop] = self.rows(rows).argmax(0)
        return out

    def masks(self, classes: range) -> Tensor:
        """(len(classes),h,w) float32: their probabilities in the padded frame."""
        out = torch.zeros(len(classes), *self.geometry.padded, device=self.device)
        chosen = slice(classes.start, classes.stop)
        if self.network.masks_cover_padding:
            height, top = self.geometry.padded[0], self.geometry.top
            for rows in self._tiles(range(-top, height - top)):
                out[:, rows.start + top : rows.stop + top] = self.rows(rows, padded=True)[chosen]
        else:
            inside = self._inside(out)
            for rows in self._tiles():
                inside[:, rows.start : rows.stop] = self.rows(rows)[chosen]
        return out

    def rows(self, rows: range, *, padded: bool = False) -> Tensor:
        """(O+1,len(rows),W): rows of the frame, counted from its first; padded: with what is left and right of it."""
        labels, scores = self.segmented.labels, self.segmented.scores
        width = self.geometry.padded[1] if padded else self.geometry.frame[1]
        with torch.autocast(self.device.type, enabled=False):
            if scores is None:
                out = torch.zeros(1 + len(self.ids), len(rows), width, device=self.device)
            else:
                out = self._ordered(self.network.aggregate(self._evidence(scores, rows, padded)))
        if labels is not None:
            given = self._padded_rows(labels, rows) if padded else labels[rows.start : rows.stop]
            ids = torch.tensor([0, *self.ids], device=self.device)[:, None, None]
            out = torch.where(given == IGNORED, out, (given == ids).float())
        return out

    def _evidence(self, scores: list[Tensor], rows: range, padded: bool) -> Tensor:
        """Return the evidence of rows of the frame, averaged over the scales."""
        geometry = self.geometry
        wanted = range(rows.start + geometry.top, rows.stop + geometry.top)
        total: Tensor | None = None
        for coarse, size in zip(scores, geometry.sizes, strict=True):
            if size == geometry.padded:
                part = self.network.evidence(coarse, size, wanted)
            else:
                source = source_rows(size[0], geometry.padded[0], wanted)
                part = self.network.evidence(coarse, size, source)
                part = resize_rows(part, geometry.padded, wanted, first=source.start, height=size[0])
            total = part if total is None else total + part
        assert total is not None
        total = total if len(scores) == 1 else total / len(scores)
        return total if padded else total[:, :, geometry.left : geometry.left + geometry.frame[1]]

    def _ordered(self, probabilities: Tensor) -> Tensor:
        """Return the scores' classes in the order of the ids: new objects have 0, those removed are background."""
        if list(self.segmented.score_ids) == self.ids:
            return probabilities
        out = probabilities.new_zeros(1 + len(self.ids), *probabilities.shape[1:])
        out[0] = probabilities[0]
        for channel, object_id in enumerate(self.segmented.score_ids, 1):
            place = 0 if object_id is None else 1 + self.ids.index(object_id)
            out[place] += probabilities[channel]
        return out

    def _padded_rows(self, labels: Tensor, rows: range) -> Tensor:
        """Rows of labels, some of them in the padding, which is background."""
        height = self.geometry.frame[0]
        start, stop = (min(max(row, 0), height) for row in (rows.start, rows.stop))
        sides = (self.geometry.left, self.geometry.padded[1] - self.geometry.left - self.geometry.frame[1])
        return functional.pad(labels[start:stop], (*sides, start - rows.start, rows.stop - stop))

    def _inside(self, x: Tensor) -> Tensor:
        """Return the frame in its padded map."""
        top, left = self.geometry.top, self.geometry.left
        height, width = self.geometry.frame
        return x[..., top : top + height, left : left + width]

    def _tiles(self, rows: range | None = None) -> Iterator[range]:
        """Ranges of rows whose probabilities are made together."""
        rows = range(self.geometry.frame[0]) if rows is None else rows
        most = _TILE_BYTES // (_FLOAT * (1 + len(self.ids)) * self.geometry.padded[1])
        size = len(rows) if self.at_once else max(1, most)
        for start in range(rows.start, rows.stop, size):
            yield range(start, min(start + size, rows.stop))


class _FrameMasks(Masks):
    """The masks of a frame for a network, made from coarse scores a few objects at a time."""

    def __init__(self, maps: _Maps, size: tuple[int, int]) -> None:
        self._of_frame = maps
        self.object_ids = list(maps.ids)
        self.size = size
        self._group, self._classes = torch.empty(0), range(0)

    def of(self, index: int) -> Tensor:
        """Return the probability (h,w) of a class."""
        if index not in self._classes:
            self._group = torch.empty(0)
            height, width = self._of_frame.geometry.padded
            last = 1 + len(self.object_ids)
            most = last if self._of_frame.at_once else max(1, _GROUP_BYTES // (_FLOAT * height * width))
            self._classes = range(index, min(index + most, last))
            if most >= last:
                self._classes = range(last)
            self._group = _resized(self._of_frame.masks(self._classes)[None], self.size)[0]
        return self._group[index - self._classes.start]

    def labels(self) -> Tensor:
        """Return the most probable class (h,w) of each pixel."""
        classes = self._of_frame.classes()
        if self.size == self._of_frame.geometry.padded:
            return classes
        resized = functional.interpolate(classes[None, None].float(), self.size, mode="nearest-exact")
        return resized[0, 0].long()


def uncompiled(model: Any) -> Any:
    """Return the network that `torch.compile` wrapped, or the model itself."""
    return getattr(model, "_orig_mod", model)


def _check_network(model: Any) -> None:
    """Raise TypeError, with what to do, unless model is a network as it is."""
    if isinstance(model, Network):
        return
    if isinstance(uncompiled(model), Network):
        raise TypeError(
            "model must be a Network, got one wrapped by torch.compile, whose parts would run uncompiled: compile "
            "these, as in network.query = torch.compile(network.query)"
        )
    if hasattr(model, "initialize"):
        raise TypeError(
            f"model must be a Network, got a {type(model).__name__}, which is already a tracker: use it directly, or "
            "let create_tracker(model) decide"
        )
    raise TypeError(f"model must be a Network, got {type(model).__name__}")


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(1,C,H,W) -> (1,C,*size), bilinear."""
    if tuple(x.shape[2:]) == size:
        return x
    return functional.interpolate(x, size, mode="bilinear", align_corners=False)


def _size(frame: Tensor) -> tuple[int, int]:
    return frame.shape[1], frame.shape[2]
