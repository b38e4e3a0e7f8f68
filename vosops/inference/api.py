"""``vosops.segment``: a video and its masks in, a generator of segmented frames out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vosops.io.datasets import open_source
from vosops.io.errors import IncompleteInputError, InputError
from vosops.io.frames import ArraySource, FrameSource
from vosops.io.masks import MaskSet, masks_from_python
from vosops.io.streams import FrameStream
from vosops.models.network import Network
from vosops.models.registry import find_model, list_models

from .create import create_tracker
from .loop import SegmentedFrame, TrackingLoop, frame_range
from .settings import DEFAULT_SIZE, ModelSettings, default_model, find_device, find_dtype, make_tracker

if TYPE_CHECKING:
    from vosops.models import VideoTracker


def segment(
    video: Any,
    mask: Any,
    *,
    model: str | Network | VideoTracker | None = None,
    weights: str | Path | None = None,
    device: str | None = None,
    dtype: str = "float32",
    size: int = DEFAULT_SIZE,
    memory_budget: int | str | None = None,
    naive: bool = False,
    scales: Sequence[float] = (1.0,),
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
    probabilities: bool = False,
    **options: Any,
) -> Iterator[SegmentedFrame]:
    """Segment the objects of a mask through a video, one frame at a time.

    Args:
        video: A video file, a folder of frames, a file of many pictures (a TIFF stack, an animated GIF, WebP, AVIF or
            PNG), a pipe or an http(s) URL, which is copied to a temporary file first; or frames in memory: a (T, H,
            W, 3) uint8 RGB array or tensor, a sequence of (H, W, 3), or an iterator of them, which is read once;
            frames before the earliest mask are kept in memory. uint16 is scaled to uint8.
        mask: A (H, W) bool or integer array or tensor for the first frame; a PNG, ``"FRAME=PNG"`` or a folder of PNGs
            named by frame; a list of those; or a dict from frame to PNG or array. Integer keys (of Python, numpy or
            torch) are always frame numbers, counted from 0; strings are names of frames or, failing that, numbers. 0
            is background, 255 is ignored, other values are object ids; a mask with only 0 and 255 is one object with
            id 255.
        model: Name of a model (``vosops.models.list_models()``), or an existing network or tracker; None:
            ``vosops_s`` if its weights are installed (CC BY-NC 4.0), otherwise ``propagate``.
        weights: File of the model's weights, for models that take one.
        device: "cpu", "cuda:1", ...; None takes the GPU if there is one.
        dtype: "float32", or "bfloat16" or "float16" for autocast.
        size: Short side of the computation in pixels; -1 computes at the input's size.
        memory_budget: Limit of the memory for stored frames: bytes, or a string such as "2GB".
        naive: Compute in the same way as the original code, with its memory use: ops in plain PyTorch, memory by
            concatenation.
        scales: Average the network's results at these sizes, relative to ``size``: (0.5, 0.75, 1.0) is the setting of
            RGMP's authors.
        start: First frame number to process.
        end: Frame number at which to stop (exclusive).
        step: Process every ``step``-th frame.
        probabilities: Keep each frame's (O+1, H, W) probabilities.
        **options: Options of the model's class, if model is a name: ``backbone="timm:resnet50"``,
            ``checkout="path/to/XMem"``.

    Yields:
        :class:`SegmentedFrame`, as soon as it is computed: from the earliest mask forward to the end, then from the
        earliest mask backward to the start. Memory does not grow with the length of the video, except for stm without
        a memory budget.

    Raises:
        TypeError: The model is neither a name, a network nor a tracker, or does not have an option.
        InputError: At the first frame, if an argument cannot be used.
        VosopsError: The permanent frames exceed the memory budget.
        IncompleteInputError: After the last frame that could be read, when the video ended early.

    Example:
        >>> for frame in vosops.segment("video.mp4", "first.png"):  # doctest: +SKIP
        ...     print(frame.index, frame.areas)
    """
    source = _open(video, start, end, step)
    indices = frame_range(start, end, step, source.count if source.count_is_exact else None)
    masks = MaskSet(masks_from_python(mask, source, indices), source.size)
    place = find_device(device)
    kind = find_dtype(dtype)
    if model is None:
        model = default_model(options, None if weights is None else Path(weights))
    if isinstance(model, str):
        if model in list_models():
            find_model(model).check_options(options)
        model = make_tracker(
            ModelSettings(
                model,
                None if weights is None else Path(weights),
                options,
                device,
                memory_budget=memory_budget,
                naive=naive,
                scales=tuple(scales),
            )
        )
    else:
        if isinstance(model, Network):
            options |= {"memory_budget": memory_budget, "naive": naive, "scales": scales}
        model = create_tracker(model, weights, **options)
    loop = TrackingLoop(
        model,
        source,
        masks,
        indices,
        short_side=size,
        device=place,
        dtype=kind,
        keep_probabilities=probabilities,
        naive=naive,
    )
    yield from loop
    if loop.problem:
        raise IncompleteInputError(loop.problem)


def _open(video: Any, start: int | None, end: int | None, step: int) -> FrameSource:
    """Return the frames of what the caller gave."""
    if isinstance(video, (str, os.PathLike)):
        return open_source(video, wanted=frame_range(start, end, step, None))
    if hasattr(video, "__len__") and hasattr(video, "__getitem__") and not isinstance(video, Mapping):
        return ArraySource(video, wanted=frame_range(start, end, step, None))
    if hasattr(video, "__iter__") and not isinstance(video, (Mapping, Set)):
        return FrameStream(video, frame_range(start, end, step, None))
    raise InputError(f"video must be a path, a URL, or frames in memory, got {type(video).__name__}")
