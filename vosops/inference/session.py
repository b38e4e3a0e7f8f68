"""`Session`: frames pushed one by one, objects that come, are corrected and go, and a state that can move."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vosops.backends import use_backend
from vosops.io.errors import InputError, ResumeError
from vosops.io.labels import labels_of_array
from vosops.io.outputs import complete_or_absent
from vosops.io.pictures import frame_of_array
from vosops.io.resize import bounded_size, resize_frame, resize_labels, to_labels
from vosops.models._tracking import IGNORED, ids_of
from vosops.models.network import Network

from .create import create_tracker
from .loop import SegmentedFrame
from .settings import DEFAULT_SIZE, ModelSettings, default_model, find_device, find_dtype, make_tracker

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from vosops.models import VideoTracker

_VERSION = 1
_LARGEST_ID = 254


class Session:
    """Tracks objects through frames that arrive one at a time, from a camera, a network or another program.

    Objects can be added, corrected and removed at any time, and the memory never exceeds its budget. Only one thread
    may use a session at a time. Several sessions in one process are independent, and can share a network that is
    passed to each of them.

    Args:
        model: Name of a model, or an existing network or tracker; None: as in `vosops.segment`.
        weights: File of the model's weights, for models that take one.
        device: "cpu", "cuda:1", ...; None takes the GPU if there is one.
        dtype: "float32", or "bfloat16" or "float16" for autocast.
        size: Short side of the computation in pixels; -1 computes at the frames' size.
        memory_budget: Limit of the memory for stored frames: bytes, or a string such as "2GB".
        naive: Run the ops in plain PyTorch.
        scales: Average the network's results at these sizes, relative to ``size``.
        **options: Options of the model's class.

    Raises:
        InputError: The model, device or an option cannot be used.

    A method that raises InputError leaves the session unchanged, so a broken frame can be skipped.

        >>> import numpy as np, vosops
        >>> session = vosops.Session(size=-1, device="cpu")
        >>> frame = np.zeros((32, 48, 3), np.uint8)
        >>> frame[8:16, 8:20] = 200
        >>> session.push(frame).object_ids
        []
        >>> session.add_objects(frame[..., 0] > 0)
        [1]
        >>> session.push(frame).object_ids
        [1]
    """

    def __init__(
        self,
        model: str | Network | VideoTracker | None = None,
        weights: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: str = "float32",
        size: int = DEFAULT_SIZE,
        memory_budget: int | str | None = None,
        naive: bool = False,
        scales: Sequence[float] = (1.0,),
        **options: Any,
    ) -> None:
        self.device = find_device(device)
        self._dtype = find_dtype(dtype)
        self._short_side = size
        self._naive = naive
        self._settings: ModelSettings | None = None
        file = None if weights is None else Path(weights)
        if model is None:
            model = default_model(options, file)
        if isinstance(model, str):
            self._settings = ModelSettings(
                model, file, options, device, dtype, memory_budget, naive, tuple(scales)
            )
            self.tracker: VideoTracker = make_tracker(self._settings)
        else:
            if isinstance(model, Network):
                options |= {"memory_budget": memory_budget, "naive": naive, "scales": tuple(scales)}
            self.tracker = create_tracker(model, weights, **options)
        self._started = False
        self._index = -1
        self._size: tuple[int, int] | None = None
        self._compute_size: tuple[int, int] | None = None
        self._frame: Tensor | None = None
        self._labels: Tensor | None = None
        self._best: Tensor | None = None

    # ---- Frames.

    @property
    def object_ids(self) -> list[int]:
        """The ids of the objects that are followed."""
        return list(self.tracker.object_ids) if self._started else []

    @property
    def index(self) -> int:
        """The number of the latest frame, from 0; -1 before the first."""
        return self._index

    @property
    def labels(self) -> Tensor | None:
        """The (H,W) uint8 label map of the latest frame, with objects added or removed since; None before the first."""
        return None if self._labels is None else self._labels.clone()

    def push(self, frame: Any, labels: Any = None, *, time: float | None = None) -> SegmentedFrame:
        """Segment the next frame.

        Args:
            frame: (H, W, 3) uint8 RGB array or tensor, or uint16, which is scaled. All frames are of one size.
            labels: Known labels of the frame, as in :meth:`add_objects`.
            time: Seconds since the first frame; None: the frame's number.

        Raises:
            InputError: The frame has another size, shape or dtype, or the labels cannot be used; it does not count.
            MemoryBudgetError: What must be remembered exceeds the budget.

        Takes the time of one step of the model. Before an object is added, every pixel is background.
        """
        image = torch.from_numpy(frame_of_array(frame, "frame"))
        size = (image.shape[0], image.shape[1])
        if self._size is not None and size != self._size:
            wanted, came = (f"{width}x{height}" for height, width in (self._size, size))
            raise InputError(f"frame must be {wanted} as the first one, got {came}")
        given = None if labels is None else self._checked(labels, size)
        compute_size: tuple[int, int] = self._compute_size or bounded_size(size, self._short_side)
        small = resize_frame(image.permute(2, 0, 1), compute_size)
        small = small.to(self.device, copy=True)
        if self._started:
            found, best = self._step(small, size)
        else:
            found, best = torch.zeros(size, dtype=torch.uint8), torch.ones(size)
        self._size, self._compute_size = size, compute_size
        self._index += 1
        self._frame, self._labels, self._best = small, found, best
        if given is not None:
            self._add(*given)
        return self._segmented(image, float(self._index) if time is None else time, given is not None)

    def add_objects(self, labels: Any) -> list[int]:
        """Add the objects of labels, or correct known ones, in the latest frame; their ids.

        labels: (H, W) integer ids from 1 to 254, 0 for none of these objects, 255 for unknown; or bool, which is one
        new object with the next free id. Objects that labels do not show keep their other pixels.

        Raises:
            InputError: There is no frame yet, or the labels cannot be used.
        """
        if self._size is None:
            raise InputError("a frame must be pushed before objects are added")
        ids, array = self._checked(labels, self._size)
        self._add(ids, array)
        return ids

    def remove_object(self, object_id: int) -> None:
        """Stop following an object and forget it.

        Raises:
            InputError: It is not followed.
        """
        if object_id not in self.object_ids:
            raise InputError(f"object_id must be one of {self.object_ids}, got {object_id}")
        if len(self.object_ids) == 1:
            self.tracker.reset()
            self._started = False
        else:
            self.tracker.remove_object(object_id)
        if self._labels is not None:
            self._labels = self._labels.masked_fill(self._labels == object_id, 0)

    def reset(self) -> None:
        """Forget everything, for another stream; the model stays."""
        self.tracker.reset()
        self._started, self._index = False, -1
        self._size = self._compute_size = None
        self._frame = self._labels = self._best = None

    # ---- Moving.

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next frame depends on but the weights, for ``torch.save`` and a weights-only load."""
        settings = self._settings
        return {
            "version": _VERSION,
            "model": None
            if settings is None
            else {**settings.arguments(), "options": repr(dict(settings.options))},
            "short_side": self._short_side,
            "size": None if self._size is None else list(self._size),
            "index": self._index,
            "frame": None if self._frame is None else self._frame.cpu(),
            "labels": self._labels,
            "best": self._best,
            "tracker": self.tracker.state_dict() if self._started else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of a session with the same model; on the CPU to the bit.

        Raises:
            ResumeError: It is of another version or another size of the computation.
        """
        if state.get("version") != _VERSION or state["short_side"] != self._short_side:
            raise ResumeError("the session was saved by another version of vosops or with another size")
        self.reset()
        if state["tracker"] is not None:
            self.tracker.load_state_dict(state["tracker"])
            self._started = True
        if state["size"] is not None:
            height, width = state["size"]
            self._size = (height, width)
            self._compute_size = bounded_size(self._size, self._short_side)
            self._frame = state["frame"].to(self.device)
        self._index, self._labels, self._best = state["index"], state["labels"], state["best"]

    def save(self, path: str | Path) -> None:
        """Write the session to a file, which is complete or absent; `load` continues it, here or elsewhere."""
        with complete_or_absent(Path(path), sync=True) as file:
            torch.save(self.state_dict(), file)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        weights: str | Path | None = None,
        device: str | None = None,
        memory_budget: int | str | None = None,
        model: Network | VideoTracker | None = None,
    ) -> Session:
        """Return the session that a file holds.

        Args:
            path: What :meth:`save` wrote, on any machine.
            weights: The model's weights on this machine, which must be the same as before.
            device: Where it continues; None takes the GPU if there is one.
            memory_budget: Another budget; None: as before.
            model: The network or tracker, if the session was created with one.

        Raises:
            ResumeError: The file is no session, or the weights differ.
            InputError: The model cannot be created on this machine.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            saved, short_side = state["model"], state["short_side"]
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist") from error
        except Exception as error:
            raise ResumeError(f"{path} is not a saved session: {' '.join(str(error).split())}") from error
        if saved is None:
            if model is None:
                raise ResumeError(f"{path} was created with a custom network or tracker: pass it as model")
            session = cls(model, device=device, size=short_side, memory_budget=memory_budget)
        else:
            session = cls(
                saved["model"],
                weights,
                device=device,
                dtype=saved["dtype"],
                size=short_side,
                memory_budget=saved["memory-budget"] if memory_budget is None else memory_budget,
                naive=saved["naive"],
                scales=saved["scales"],
                **ast.literal_eval(saved["options"]),
            )
            assert session._settings is not None
            if session._settings.arguments()["weights content"] != saved["weights content"]:
                raise ResumeError(f"{path} was created with other weights than {weights}")
        session.load_state_dict(state)
        return session

    # ---- How it is done.

    def _checked(self, labels: Any, size: tuple[int, int]) -> tuple[list[int], Tensor]:
        """Return the ids in given labels, at least one, and the labels as a uint8 tensor."""
        array = torch.from_numpy(labels_of_array(labels))
        if tuple(array.shape) != size:
            wanted, came = (f"{width}x{height}" for height, width in (size, tuple(array.shape)))
            raise InputError(f"labels must be {wanted} as the frame, got {came}")
        if getattr(labels, "dtype", None) in (torch.bool, bool):
            free = next((i for i in range(1, _LARGEST_ID + 1) if i not in self.object_ids), None)
            if free is None:
                raise InputError(f"a session tracks at most {_LARGEST_ID} objects")
            array = (array > 0).to(torch.uint8) * free
        ids = ids_of(array)
        if not ids:
            raise InputError("labels must show an object, got only background and unknown pixels")
        return ids, array

    def _step(self, frame: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the label map and the probability of each label, at the frames' size, on the CPU."""
        with torch.inference_mode(), self._autocast(), self._backend():
            if tuple(frame.shape[1:]) == size:
                labels = self.tracker.step(frame, output="labels")
                best = self.tracker.confidence()
            else:
                probabilities = self.tracker.step(frame)
                labels, best = to_labels(probabilities, self.tracker.object_ids, size)
        return labels.cpu().clone(), best.float().cpu().clone()

    def _add(self, ids: list[int], labels: Tensor) -> None:
        assert self._frame is not None and self._labels is not None and self._best is not None
        small = resize_labels(labels, tuple(self._frame.shape[1:]), ids).long().to(self.device)  # type: ignore[arg-type]
        with torch.inference_mode(), self._autocast(), self._backend():
            if self._started:
                self.tracker.add_objects(self._frame, small)
            else:
                self.tracker.initialize(self._frame, small)
        self._started = True
        known = labels != IGNORED
        kept = self._labels.masked_fill(
            torch.isin(self._labels, torch.tensor(ids, dtype=torch.uint8)) & known, 0
        )
        shown = (labels > 0) & known
        self._labels = torch.where(shown, labels, kept)
        self._best = self._best.masked_fill(shown, 1)

    def _segmented(self, image: Tensor, time: float, given: bool) -> SegmentedFrame:
        assert self._labels is not None and self._best is not None
        areas = torch.bincount(self._labels.flatten(), minlength=IGNORED + 1)
        sums = torch.bincount(
            self._labels.flatten(), weights=self._best.flatten().double(), minlength=IGNORED + 1
        )
        ids = self.object_ids
        return SegmentedFrame(
            index=self._index,
            name=f"{self._index:07d}",
            time=float(Fraction(time)),
            image=image,
            labels=self._labels.clone(),
            object_ids=ids,
            areas={i: int(areas[i]) for i in ids},
            confidences={i: float(sums[i] / max(1, int(areas[i]))) for i in ids},
            given=given,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    def _backend(self) -> AbstractContextManager[Any]:
        return use_backend("reference") if self._naive else nullcontext()
