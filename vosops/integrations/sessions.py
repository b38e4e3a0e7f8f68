"""Sessions of SAM 2 and transformers' Sam2VideoModel in fixed bytes: frames on demand, and outputs that leave.

A session keeps the output of every frame, and every frame. What a later frame reads is the outputs of the frames with
prompts, the mask memory of the latest `num_maskmem` frames and the object pointers of the latest
`max_obj_ptrs_in_encoder`: the window. When the outputs take more than the budget, those outside of the window leave,
those farthest from the frame that was tracked last first.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vosops.integrations.recipes import Function, Probe, Recipe
from vosops.integrations.rotary import KeyCache
from vosops.memory import MemoryBudgetError

_JPEG = (".jpg", ".jpeg")
_OTHERS = "non_cond_frame_outputs"  # of frames without prompts, in sam2 and in transformers
_PROMPTED = "cond_frame_outputs"


def session_recipes(budget: int) -> tuple[Recipe, ...]:
    """Return the recipes that keep sessions within a budget of bytes."""
    return (
        Recipe(
            "propagate_in_video",
            ("self", "inference_state"),
            functools.partial(_bounded_propagation, budget),
            _no_probes,
        ),
        Recipe(
            "load_video_frames",
            ("video_path", "image_size", "offload_video_to_cpu"),
            _frames_on_demand,
            _no_probes,
        ),
        Recipe(
            "forward",
            ("self", "inference_session", "frame_idx", "frame", "reverse", "run_mem_encoder", "kwargs"),
            functools.partial(_bounded_forward, budget),
            _no_probes,
        ),
    )


def reachable_bytes(holder: Any) -> int:
    """Return the bytes of the tensors that lists, dictionaries, sets and attributes lead to, each storage once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [holder]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, (list, tuple, set)):
            waiting += each
        elif not isinstance(each, (torch.nn.Module, type)):
            waiting += getattr(each, "__dict__", {}).values()
    return sum(storages.values())


def keep_within(
    budget: int, outputs: Iterable[dict[str, dict[int, Any]]], frame: int, window: int, others: int = 0
) -> None:
    """Let outputs of frames leave until what is held fits a budget.

    budget: bytes. outputs: dictionaries of the outputs of frames with and without prompts, by their numbers. frame:
    that was tracked last. window: how far from it frames are still read. others: bytes that are held beside. Raises
    MemoryBudgetError if what is still read does not fit.
    """
    outputs = list(outputs)
    held = reachable_bytes(outputs) + others
    numbers = sorted({n for each in outputs for n in each[_OTHERS]}, key=lambda n: abs(n - frame))
    while held > budget and numbers and abs(numbers[-1] - frame) > window:
        number = numbers.pop()
        for each in outputs:
            each[_OTHERS].pop(number, None)
        held = reachable_bytes(outputs) + others
    if held > budget:
        read = len({n for each in outputs for n in (*each[_OTHERS], *each[_PROMPTED])})
        raise MemoryBudgetError.of(held, f"the {read} frames that are read", budget)


# ---- sam2: sam2/sam2_video_predictor.py, sam2/utils/misc.py.


def _bounded_propagation(budget: int, original: Function) -> Function:
    def propagate_in_video(self: Any, inference_state: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for result in original(self, inference_state, *args, **kwargs):
            # What is held by all objects together, and by each in turn: which of them, depends on the version.
            outputs = [*inference_state["output_dict_per_obj"].values()]
            outputs += [inference_state["output_dict"]] if "output_dict" in inference_state else []
            keep_within(budget, outputs, result[0], window_of(self), _bytes_of_keys(self))
            yield result

    return propagate_in_video


def _frames_on_demand(original: Function) -> Function:
    signature = inspect.signature(original)
    read = getattr(original, "__globals__", {}).get("_load_img_as_tensor")

    def load_video_frames(video_path: Any, *args: Any, **kwargs: Any) -> Any:
        if read is None or not isinstance(video_path, (str, os.PathLike)) or not os.path.isdir(video_path):
            return original(video_path, *args, **kwargs)
        given = signature.bind(video_path, *args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        device = "cpu" if options["offload_video_to_cpu"] else options.get("compute_device", "cuda")
        try:
            frames = FramesOnDemand(
                Path(video_path), options["image_size"], options["img_mean"], options["img_std"], device, read
            )
        except (
            KeyError,
            ValueError,
        ):  # not numbered JPEG files: the original's words for it, or its own ways
            return original(video_path, *args, **kwargs)
        return frames, *frames.size

    return load_video_frames


class FramesOnDemand:
    """The numbered JPEG files of a folder as SAM 2 takes them, each read when it is asked for.

    Items are (3,S,S) float32 on the device. read(path, S) is the system's own reader of a picture: the picture
    (3,S,S) in [0, 1], its height and its width.
    """

    def __init__(
        self, folder: Path, side: int, mean: Any, std: Any, device: str | torch.device, read: Function
    ) -> None:
        paths = [path for path in folder.iterdir() if path.suffix.lower() in _JPEG]
        if not paths:
            raise ValueError(f"folder must hold JPEG files, got {folder}")
        self.paths = sorted(paths, key=lambda path: int(path.stem))
        self._side, self._device, self._read = side, device, read
        self._mean, self._std = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
        _, height, width = read(str(self.paths[0]), side)
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image, *_ = self._read(str(self.paths[index]), self._side)
        normalised: Tensor = (image.float() - self._mean) / self._std
        return normalised.to(self._device)


# ---- transformers: models/sam2_video/modeling_sam2_video.py.


def _bounded_forward(budget: int, original: Function) -> Function:
    def forward(self: Any, inference_session: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, inference_session, *args, **kwargs)
        frame, streamed = (
            result.frame_idx,
            kwargs.get("frame", args[1] if len(args) > 1 else None) is not None,
        )
        outputs = inference_session.output_dict_per_obj.values()
        frames = inference_session.processed_frames
        if streamed:  # the others, if any, are the caller's
            numbers = sorted(frames) if isinstance(frames, dict) else range(len(frames))
            for number in numbers[:-1]:
                frames[number] = None
        others = (reachable_bytes(frames) if streamed else 0) + _bytes_of_keys(self)
        keep_within(budget, outputs, frame, window_of(self), others)
        return result

    return forward


def window_of(model: Any) -> int:
    """Return how far from a frame the frames are that are read with it."""
    stride = getattr(model, "memory_temporal_stride_for_eval", 1)
    pointers = getattr(model, "max_obj_ptrs_in_encoder", None)
    if pointers is None:
        pointers = getattr(model.config, "max_object_pointers_in_encoder", 0)
    return int(max(model.num_maskmem * stride, pointers))


def _bytes_of_keys(model: torch.nn.Module) -> int:
    return sum(key.numel() * key.element_size() for part in model.modules() for key in KeyCache.held_by(part))


def _no_probes(original: Function) -> Iterator[Probe]:
    """Yield nothing: no result changes."""
    return iter(())
