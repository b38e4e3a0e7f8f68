"""What trackers around other people's networks have in common: masks, state and a memory within a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops.memory import MemoryBudgetError, parse_bytes
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

_STRIDE = 16  # of the memory's positions, in pixels
_FLOAT = 4  # bytes
_BUFFER_SHARE = 5  # of the long-term memory, at most 1/5 is freed at a time


class MemoryPlan(NamedTuple):
    """How much a checkout's memory may hold, beside its permanent frames."""

    work_frames: int  # at most; when there are this many, the older ones are condensed
    kept_frames: int  # that are not condensed then
    prototypes: int  # that they are condensed to
    long_tokens: int  # positions of long-term memory, at most
    buffer_tokens: int  # positions that are freed beside, when it is full


def plan_memory(
    default: MemoryPlan, pixels: int, permanent: int, token_bytes: int, budget: int | None
) -> MemoryPlan:
    """Return the plan nearest to the default that fits the frame's size and the budget.

    pixels: positions of a frame; permanent: frames that are kept permanently; token_bytes: of a position. Raises
    MemoryBudgetError when the budget does not hold two frames beside the permanent ones and as much long-term memory.
    """
    wanted = default.work_frames + -(-default.long_tokens // pixels)
    frames = wanted
    if budget is not None:
        fit = budget // (pixels * token_bytes)
        frames = min(frames, fit - permanent)
        if frames < 3:
            what = f"{permanent} permanent frames and a working memory"
            raise MemoryBudgetError.of((permanent + 3) * pixels * token_bytes, what, budget, fit)
    work = default.work_frames
    if frames < wanted:
        work = min(work, (frames + 1) // 2 if default.long_tokens else frames)
    kept = max(1, min(default.kept_frames, work - 1))
    long_tokens = min(default.long_tokens, (frames - work) * pixels)
    prototypes = max(1, min(default.prototypes, (work - kept) * pixels, long_tokens // 2))
    buffer = min(default.buffer_tokens, long_tokens // _BUFFER_SHARE, long_tokens - prototypes - 1)
    return MemoryPlan(work, kept, prototypes, long_tokens, max(0, buffer))


class CheckoutTracker(KeepsConfidence, ABC):
    """A tracker around an inference core: a :class:`vosops.models.VideoTracker`.

    size: the short side of the computation in pixels, -1 for the frame's. memory_budget: bytes, or a text such as
    "2GB", that the memory's keys, values and usage may take. Pixels of label 255 take the core's own prediction, on
    the first frame the background.
    """

    name: str

    def __init__(
        self,
        network: nn.Module,
        *,
        size: int = -1,
        device: str | torch.device = "cpu",
        memory_budget: int | str | None = None,
    ) -> None:
        if size != -1 and size < _STRIDE:
            raise ValueError(f"size must be -1 or at least {_STRIDE}, got {size}")
        self.network = network.to(device).eval().requires_grad_(False)
        self.size = size
        self.device = torch.device(device)
        self.memory_budget = None if memory_budget is None else parse_bytes(memory_budget)
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.object_ids: list[int] = []
        self._core: Any = None
        self._frame_size: tuple[int, int] | None = None
        self._confidence = None

    def initialize(self, frame: Tensor, labels: Tensor) -> None:
        """Forgets everything and starts from this frame: see :class:`vosops.models.VideoTracker`."""
        check_first(frame, labels)
        self.reset()
        self._frame_size = (frame.shape[1], frame.shape[2])
        with torch.inference_mode():
            self._core = self._new_core()
            probabilities = self._give(frame, labels, end=False)
        self._confidence = probabilities.clone().amax(0)

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

        permanent: keep this frame permanently, if the checkout can. end: the last frame, which is not remembered.
        output: "probs", or "labels" for a map of ids (H,W).
        """
        self._check_started()
        check_frame(frame, self._frame_size)
        check_output(output)
        with torch.inference_mode():
            if labels is not None:
                check_labels(labels, frame)
                probabilities = self._give(frame, labels, end=end)
            else:
                probabilities = self._sized(self._advance(self._image(frame), None, permanent, end))
        return self._answer(probabilities.clone(), output)  # outside of inference mode: an ordinary tensor

    def predict(self, frame: Tensor, *, output: str = "probs") -> Tensor:
        """Segment a frame as `step` would, and stay as it was: see :class:`vosops.models.VideoTracker`.

        Takes as much memory again as the core remembers: its state is copied, and put back.
        """
        self._check_started()
        check_frame(frame, self._frame_size)
        check_output(output)
        confidence, state = self._confidence, self.state_dict()
        with torch.inference_mode():
            probabilities = self._sized(self._advance(self._image(frame), None, False, True))
        self.load_state_dict(state)
        self._confidence = confidence
        probabilities = probabilities.clone()
        return probabilities if output == "probs" else most_probable(probabilities, self.object_ids)

    def add_objects(self, frame: Tensor, labels: Tensor) -> None:
        """Add objects, or correct known ones, in the frame that was segmented last; 0 leaves the others unchanged."""
        if self._core is None:
            self.initialize(frame, labels)
            return
        check_frame(frame, self._frame_size)
        check_labels(labels, frame)
        with torch.inference_mode():
            given = ids_of(labels)
            labels = labels.to(self.device)
            predicted = self.predict(frame, output="labels").long()
            others = torch.tensor([i for i in self.object_ids if i not in given], device=self.device)
            labels = torch.where((labels == 0) & torch.isin(predicted, others), predicted, labels)
            self._go_back()
            probabilities = self._give(frame, labels, end=False)
        self._confidence = probabilities.clone().amax(0)

    def remove_object(self, object_id: int) -> None:
        """Stop tracking an object."""
        if object_id not in self.object_ids:
            raise ValueError(f"object_id must be one of {self.object_ids}, got {object_id}")
        with torch.inference_mode():
            self._remove(object_id)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on; loads with ``torch.load(..., weights_only=True)``."""
        return {
            "model": self.name,
            "size": self.size,
            "object_ids": list(self.object_ids),
            "frame_size": list(self._frame_size or ()),
            "core": None if self._core is None else self._save_core(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state of :meth:`state_dict`; the next results are the same to the bit (on the CPU)."""
        for option, own in (("model", self.name), ("size", self.size)):
            if state.get(option) != own:
                raise ValueError(f"state must be of {option} {own!r}, got {state.get(option)!r}")
        self.reset()
        self.object_ids = list(state["object_ids"])
        self._frame_size = tuple(state["frame_size"]) or None
        if state["core"] is not None:
            self._core = self._new_core()
            self._load_core(state["core"])

    def memory_bytes(self) -> int:
        """Return the bytes of the keys, values and usage that the memory holds."""
        return 0 if self._core is None else sum(t.numel() * t.element_size() for t in self._memory_tensors())

    # What each checkout does its own way; self._core exists.

    @abstractmethod
    def _new_core(self) -> Any:
        """Return a core that remembers nothing."""

    @abstractmethod
    def _advance(self, image: Tensor, masks: Tensor | None, permanent: bool, end: bool) -> Tensor:
        """One step with image (3,h,w) in [0, 1] and, if given, masks (O,h,w) bool of all objects -> (O+1,h,w)."""

    @abstractmethod
    def _remove(self, object_id: int) -> None:
        """Forget an object, in object_ids too."""

    @abstractmethod
    def _save_core(self) -> dict[str, Any]: ...

    @abstractmethod
    def _load_core(self, state: dict[str, Any]) -> None: ...

    @abstractmethod
    def _memory_tensors(self) -> Iterator[Tensor]:
        """Return what the memory budget counts."""

    @abstractmethod
    def _fit_memory(self, pixels: int, new: Sequence[int]) -> None:
        """Make the memory fit the budget with these new objects and one more permanent frame."""

    def _go_back(self) -> None:
        """Count the frame that was segmented last once more."""
        self._core.curr_ti -= 1

    def _check_started(self) -> None:
        if self._core is None:
            raise RuntimeError("initialize must be called before the first step")

    def _give(self, frame: Tensor, labels: Tensor, end: bool) -> Tensor:
        """Take a step whose labels are given -> (O+1,H,W)."""
        labels = labels.to(self.device).long()
        unknown = labels == IGNORED
        if self.object_ids and bool(unknown.any()):
            labels = torch.where(unknown, self.predict(frame, output="labels").long(), labels)
        new = [i for i in ids_of(labels) if i not in self.object_ids]
        image = self._image(frame)
        height, width = image.shape[1:]
        self._fit_memory(-(-height // _STRIDE) * -(-width // _STRIDE), new)
        self.object_ids += new
        small = functional.interpolate(labels[None, None].float(), (height, width), mode="nearest-exact")[
            0, 0
        ]
        masks = small == torch.tensor(self.object_ids, device=self.device)[:, None, None]
        return self._sized(self._advance(image, masks, True, end))

    def _image(self, frame: Tensor) -> Tensor:
        """Return the frame (3,H,W), float32 in [0, 1], at the size of the computation."""
        image = frame.to(self.device)
        image = image.float().div_(255) if image.dtype == torch.uint8 else image.float()
        if self.size == -1:
            return image
        scale = self.size / min(image.shape[1:])
        target = [max(1, round(side * scale)) for side in image.shape[1:]]
        return functional.interpolate(
            image[None], target, mode="bilinear", align_corners=False, antialias=scale < 1
        )[0]

    def _sized(self, probabilities: Tensor) -> Tensor:
        """(O+1,h,w) -> (O+1,H,W) float32."""
        probabilities = probabilities.float()
        assert self._frame_size is not None
        if tuple(probabilities.shape[1:]) == self._frame_size:
            return probabilities
        return functional.interpolate(
            probabilities[None], self._frame_size, mode="bilinear", align_corners=False
        )[0]


def saved(value: Any, skip: Sequence[str] = ()) -> Any:
    """Return a deep copy of an object's attributes as tensors, numbers, strings, lists and dictionaries."""
    if isinstance(value, Tensor):
        return value.clone()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [saved(item) for item in value]
    items = value if isinstance(value, Mapping) else vars(value)
    return {name: saved(item) for name, item in items.items() if name not in skip}


def restore(target: Any, state: Mapping[str, Any], device: torch.device) -> None:
    """Set the attributes of an object as :func:`saved` found them."""
    for name, value in state.items():
        current = getattr(target, name, None)
        if isinstance(value, Mapping) and isinstance(current, dict):
            current.clear()
            current.update(_on_device(value, device))
        elif isinstance(value, Mapping) and current is not None:
            restore(current, value, device)
        else:
            setattr(target, name, _on_device(value, device))


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, Mapping):
        return {name: _on_device(item, device) for name, item in value.items()}
    return [_on_device(item, device) for item in value] if isinstance(value, list) else value


@contextmanager
def without_pretraining(resnet: ModuleType) -> Iterator[None]:
    """Let a checkout's ResNets start from random weights: those of the file replace them, a download is of no use."""
    originals = {name: getattr(resnet, name) for name in ("resnet18", "resnet50")}

    def plain(original: Any) -> Any:
        return lambda pretrained=True, **options: original(pretrained=False, **options)

    for name, original in originals.items():
        setattr(resnet, name, plain(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(resnet, name, original)


def token_bytes(channels: int, usage: bool = True) -> int:
    """Return the bytes of this many float32 channels of a position, and of the two counts of its usage."""
    return _FLOAT * (channels + 2 * usage)
