"""Semantic segmentation of a video, a frame at a time: `SemanticTracker`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from vosops import _checks, backends
from vosops.models._tracking import check_frame, check_output
from vosops.models.rows import Rows
from vosops.models.semantic_network import FrameNetwork, SemanticNetwork, State, bands, labels_dtype

__all__ = ["SemanticTracker"]

WINDOW = 4  # frames that the original's networks were trained on


class SemanticTracker:
    """Predicts the class of every pixel of the frames of a video; no mask is needed.

    Args:
        model: a :class:`~vosops.models.SemanticNetwork`, such as LSTM-ICNet, on whose device everything runs; it is
            put into eval mode.
        window: without streaming each frame is the last of a clip of this many frames (fewer at a video's beginning),
            and the recurrent layers start each clip with zeros, as in the original. Features of single frames are
            computed once and cached, so only the recurrent layers run `window` times; a FrameNetwork with several
            recurrent layers runs as often up to the last of them. 1 for a network without recurrent layers.
        streaming: carry the recurrent state from frame to frame instead: everything is computed once, and a frame
            depends on all previous ones. Results agree for the first `window` frames and differ afterwards.
        dtype: torch.bfloat16 or torch.float16 to run the network under autocast; None: as the caller runs.
        channels_last: keep the network's weights and maps in that memory format.
        naive: compute in the same way as the original code: reference ops, whole clips, full-size probabilities.
        tile: segment tiles of this many rows and columns of a frame one after the other; not for recurrent networks.
        overlap: pixels that neighbouring tiles share; see :meth:`vosops.models.FrameNetwork.predict`.

    Memory in addition to the network: with a window, ``window`` times the features of a frame (LSTM-ICNet: 12 bytes a
    pixel); streaming, the state, twice the maps of the recurrent layers. Not differentiable.

        >>> import torch
        >>> from vosops.inference import SemanticTracker
        >>> from vosops.models import create_model
        >>> tracker = SemanticTracker(create_model("lstm_icnet", version="v5"))
        >>> probabilities = tracker.step(torch.rand(3, 120, 160))
        >>> probabilities.shape
        torch.Size([19, 120, 160])
    """

    def __init__(
        self,
        model: SemanticNetwork,
        *,
        window: int = WINDOW,
        streaming: bool = False,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        naive: bool = False,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> None:
        if not isinstance(model, SemanticNetwork):
            raise TypeError(f"model must be a SemanticNetwork, got {type(model).__name__}")
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be None, float32, bfloat16 or float16, got {dtype}")
        self.model = model.eval()
        window = _checks.check_positive_int("window", window)
        self.window = window if model.recurrent else 1
        self.streaming = streaming
        self.dtype = dtype
        self.naive = naive
        if tile is not None and not self._frames_alone:
            raise ValueError(f"tile must be None for {type(model).__name__}, which is recurrent, got {tile}")
        if tile is None and overlap is not None:
            raise ValueError(f"overlap must be None without tile, got {overlap}")
        if tile is not None and isinstance(model, FrameNetwork):
            model.tiles((1, 1), tile, overlap)  # raises what is wrong with them
        self.tile, self.overlap = tile, overlap
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.reset()

    @property
    def device(self) -> torch.device:
        """Where the model is, and results are."""
        return next(self.model.parameters()).device

    @property
    def num_classes(self) -> int:
        """K; 2, background and foreground, of a network with one logit."""
        return max(2, self.model.num_classes)

    @property
    def _frames_alone(self) -> bool:
        """Whether the model segments each frame alone, a piece at a time."""
        return isinstance(self.model, FrameNetwork) and not self.model.recurrent

    def reset(self) -> None:
        """Forgets the video."""
        self._size: tuple[int, int] | None = None
        self._recent: deque[tuple[Tensor, ...]] = deque(maxlen=self.window)
        self._state: State | None = None

    @torch.inference_mode()
    def step(self, frame: Tensor, *, output: str = "probs", size: tuple[int, int] | None = None) -> Tensor:
        """Segments the next frame.

        frame: (3,h,w) RGB, uint8 or floating in [0, 1], of the model's least size or more; all frames of a
        video have one size. size: (H,W) of the result, the frame's by default and with tiles. output: "probs": (K,H,W)
        float32; "labels": (H,W) uint8 (int64 for more than 256 classes), the most probable class, without ever
        holding the full-size probabilities. Raises ValueError or TypeError for another frame.
        """
        check_output(output)
        if output == "labels":
            return self.labels(frame, size=size)[0]
        size = self._size_of_result(frame, size)
        result = torch.empty(self.num_classes, *size, device=self.device)
        for rows, columns, logits in self._segment(frame, size):
            result[:, rows, columns] = torch.softmax(logits, 0)
        return result

    @torch.inference_mode()
    def labels(self, frame: Tensor, *, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Segments the next frame: (H,W) labels as `step` gives, and (H,W) float32, the probability of each one."""
        size = self._size_of_result(frame, size)
        labels = torch.empty(size, dtype=labels_dtype(self.model.num_classes), device=self.device)
        best = torch.empty(size, device=self.device)
        for rows, columns, logits in self._segment(frame, size):
            highest, labels[rows, columns] = logits.max(0)
            best[rows, columns] = (highest - logits.logsumexp(0)).exp_()
        return labels, best

    def _size_of_result(self, frame: Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
        """Check the next frame and the size that is asked for."""
        check_frame(frame, self._size)
        if min(frame.shape[1:]) < self.model.min_side:
            raise ValueError(
                f"frame must have sides of at least {self.model.min_side}, got {tuple(frame.shape)}"
            )
        own = (frame.shape[1], frame.shape[2])
        if self.tile is not None and size not in (None, own):
            raise ValueError(f"size must be the frame's {own} with tiles, got {size}")
        return own if size is None else size

    def _segment(self, frame: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, slice, Tensor]]:
        """Compute the logits of the next frame a piece at a time: where it is in the result, and (K,rows,columns)."""
        images = self.model.prepare(frame[None].to(self.device)).to(memory_format=self.memory_format)
        logits: Tensor | None = None
        with self._computing():
            if self._frames_alone:
                assert isinstance(self.model, FrameNetwork)
                yield from self.model.pieces(images, size, tile=self.tile, overlap=self.overlap)
            elif isinstance(self.model, FrameNetwork) and not self.naive:
                window = None if self.streaming else self.window
                found, self._state = self.model.advance(images, self._state, window=window, size=size)
                for rows, band in self._bands(found, size):
                    yield rows, slice(None), band
            else:
                logits = self._logits(images)[0]
        self._size = (frame.shape[1], frame.shape[2])
        if logits is not None:
            for rows, band in self._bands(logits, size):
                yield rows, slice(None), band

    def _logits(self, images: Tensor) -> Tensor:
        """(1,K,h,w) of the newest frame."""
        model = self.model
        if self.streaming:
            logits, self._state = model.logits(model.features(images), 1, self._state)
            return logits
        self._recent.append((images,) if self.naive else model.features(images))
        maps = tuple(torch.cat(parts) for parts in zip(*self._recent, strict=True))
        features = model.features(maps[0]) if self.naive else maps
        return model.logits(features, len(self._recent), last=not self.naive)[0][-1:]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.dtype is not None and self.dtype != torch.float32:
                stack.enter_context(torch.autocast(self.device.type, self.dtype))
            if self.naive:
                stack.enter_context(backends.use_backend("reference"))
            yield

    def _bands(self, logits: Tensor | Rows, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        return bands(logits, size, align_corners=self.model.align_corners, whole=self.naive)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, for ``torch.save`` and a weights-only load; copies."""
        state = self._state or {}
        return {
            **self._settings(),
            "size": None if self._size is None else list(self._size),
            "recent": [[x.clone() for x in maps] for maps in self._recent],
            "state": {name: [x.clone() for x in pair] for name, pair in state.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a saved state of a tracker with the same settings; ValueError if they differ."""
        for name, value in self._settings().items():
            if state[name] != value:
                raise ValueError(f"state must be of {name}={value}, got {state[name]}")
        self.reset()
        self._size = None if state["size"] is None else (state["size"][0], state["size"][1])
        self._recent.extend(tuple(self._copy(x) for x in maps) for maps in state["recent"])
        saved = {name: (self._copy(h), self._copy(c)) for name, (h, c) in state["state"].items()}
        self._state = saved or None

    def _settings(self) -> dict[str, Any]:
        return {"window": self.window, "streaming": self.streaming, "naive": self.naive}

    def _copy(self, x: Tensor) -> Tensor:
        return x.to(self.device, copy=True)
