"""The objects of a SAM 2 session read together: one launch a layer, of memories that differ in length.

SAM 2's predictor tracks one object after the other. Objects that came at different frames, or were corrected in others,
remember different numbers of frames, so that their memories do not stack. Here the memories of all objects of a frame
are put together by the model's own code, filled up to the longest, and read at once by `memory_read` with
`memory_lengths`; what was read is then handed to the model as it comes to each object. The pointers of objects follow
the frames of their object, and are not rotated.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vosops.integrations.recipes import Function, Probe, Recipe
from vosops.integrations.rotary import Rotation, rotate
from vosops.ops.memory_read import memory_read

_active = threading.local()


class RaggedMemory(NamedTuple):
    """Memories that are read together: the positions of each, and how many of them, the last, are not rotated."""

    lengths: list[int]
    unrotated: list[int]
    lengths_on_device: Tensor

    @staticmethod
    def current() -> RaggedMemory | None:
        """Return the one that this thread reads."""
        return getattr(_active, "memory", None)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Make this the one that the thread reads."""
        before = self.current()
        _active.memory = self
        try:
            yield
        finally:
            _active.memory = before

    def fits(self, layer: Any, key: Tensor) -> bool:
        """Return whether a layer reads these memories now, and not the frame itself."""
        return key.shape[:2] == (len(self.lengths), max(self.lengths)) and _narrow(layer, key.shape[2])

    def attend(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotation: Rotation,
        output: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Do as `rotary.attend` with key and value (B,M,Cv), of which each batch element has its own length."""
        queries = rotate(layer.q_proj(query), rotation)
        keys = queries.new_empty(key.shape[0], key.shape[1], queries.shape[2])
        for n, (length, unrotated) in enumerate(zip(self.lengths, self.unrotated, strict=True)):
            projected = layer.k_proj(key[n : n + 1, :length])
            rotated = length - unrotated
            keys[n : n + 1, :rotated] = rotate(projected[:, :rotated], rotation)
            keys[n : n + 1, rotated:length] = projected[:, rotated:]
        read = memory_read(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            value.to(keys.dtype).transpose(1, 2),
            memory_lengths=self.lengths_on_device,
        )
        return output(layer.v_proj(read.transpose(1, 2)))


class _Read(NamedTuple):
    """What was read for the objects of a frame, by the dictionaries of their outputs, until each is asked for."""

    state: dict[str, Any]
    frame: int
    reverse: bool
    outputs: dict[int, Tensor]

    def pop(self, given: dict[str, Any]) -> Tensor | None:
        """Return the object's, once; None where this is of another frame."""
        same = self.state is given["inference_state"] and self.frame == given["frame_idx"]
        if not same or self.reverse != given["reverse"]:
            return None
        return self.outputs.pop(id(given["output_dict"]), None)


def _together(original: Function) -> Function:
    """Return `_run_single_frame_inference` that finds its object's memory read with those of the others."""
    signature = inspect.signature(original)

    def _run_single_frame_inference(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if not _tracks(given) or not _reads_ragged(self):
            return original(self, *args, **kwargs)
        latest: _Read | None = getattr(_active, "read", None)
        _active.read = None
        output = None if latest is None else latest.pop(given)
        if output is None:
            latest = _read_all(self, given)
            output = None if latest is None else latest.pop(given)
        if output is None:
            return original(self, *args, **kwargs)
        with _memory_attention(self, functools.partial(_known, output)):
            result = original(self, *args, **kwargs)
        _active.read = latest if latest is not None and latest.outputs else None  # not after an exception
        return result

    return _run_single_frame_inference


def _known(output: Tensor, **_: Any) -> Tensor:
    """Stand in for a memory attention whose output is known."""
    return output


def _tracks(given: dict[str, Any]) -> bool:
    """Whether a call follows one of several objects, and takes no prompts."""
    own = given["inference_state"].get("output_dict_per_obj", {}).values()
    prompts = (given.get("point_inputs"), given.get("mask_inputs"), given.get("prev_sam_mask_logits"))
    return (
        not given["is_init_cond_frame"]
        and given["batch_size"] == 1
        and all(prompt is None for prompt in prompts)
        and len(own) > 1
        and any(each is given["output_dict"] for each in own)
        and not torch.compiler.is_compiling()
    )


def _reads_ragged(model: Any) -> bool:
    """Whether every layer of a model reads memories of different lengths."""
    layers = getattr(getattr(model, "memory_attention", None), "layers", ())
    attentions: list[Any] = [getattr(layer, "cross_attn_image", None) for layer in layers]
    return bool(attentions) and all(
        getattr(getattr(type(each), "forward", None), "_vosops_reads_ragged", False)
        and each.num_heads == 1
        and not (each.training and each.dropout_p > 0)
        and _narrow(each, model.mem_dim)
        for each in attentions
    )


def _narrow(layer: Any, channels: int) -> bool:
    """Whether values of these channels are cheaper to read than to project."""
    return bool(channels < layer.k_proj.out_features)


def _read_all(model: Any, given: dict[str, Any]) -> _Read | None:
    """Read the memories of all objects that are tracked in a frame; None where one is not made of whole frames."""
    state, frame, reverse = given["inference_state"], given["frame_idx"], given["reverse"]
    objects = [
        each for each in state["output_dict_per_obj"].values() if frame not in each["cond_frame_outputs"]
    ]
    *_, features, positions, sizes = model._get_image_feature(state, frame, 1)
    calls: list[dict[str, Any]] = []

    def note(**call: Any) -> Tensor:
        calls.append(call)
        current: Tensor = call["curr"][0]
        return current

    with _memory_attention(model, note):
        for each in objects:
            model._prepare_memory_conditioned_features(
                frame_idx=frame,
                is_init_cond_frame=False,
                current_vision_feats=features[-1:],
                current_vision_pos_embeds=positions[-1:],
                feat_sizes=sizes[-1:],
                output_dict=each,
                num_frames=state["num_frames"],
                track_in_reverse=reverse,
            )
    pixels = features[-1].shape[0]
    lengths = [call["memory"].shape[0] for call in calls]
    pointers = [call["num_obj_ptr_tokens"] for call in calls]
    whole = all((length - n) % pixels == 0 for length, n in zip(lengths, pointers, strict=True))
    if len(calls) != len(objects) or len(objects) < 2 or not whole:
        return None
    memory, memory_pos = (_padded([call[name] for call in calls]) for name in ("memory", "memory_pos"))
    ragged = RaggedMemory(lengths, pointers, torch.tensor(lengths, device=memory.device))
    with ragged.reading():
        out: Tensor = model.memory_attention(
            curr=[features[-1].expand(-1, len(objects), -1)],
            curr_pos=[positions[-1].expand(-1, len(objects), -1)],
            memory=memory,
            memory_pos=memory_pos,
            num_obj_ptr_tokens=0,
        )
    outputs = {id(each): out[:, n : n + 1] for n, each in enumerate(objects)}
    return _Read(state, frame, reverse, outputs)


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """(M,B,C) of B parts (m,1,C), with zeros behind the shorter ones."""
    dtype = functools.reduce(torch.promote_types, [part.dtype for part in parts])
    longest = max(part.shape[0] for part in parts)
    out = parts[0].new_zeros((longest, len(parts), parts[0].shape[2]), dtype=dtype)
    for n, part in enumerate(parts):
        out[: part.shape[0], n] = part[:, 0]
    return out


@contextmanager
def _memory_attention(model: Any, stand_in: Callable[..., Tensor]) -> Iterator[None]:
    """Let a model call something else for its memory attention, a submodule, for a while."""
    vars(model)["memory_attention"] = stand_in  # is found before the submodules
    try:
        yield
    finally:
        del vars(model)["memory_attention"]


def _nothing_to_compare(original: Function) -> Iterator[Probe]:
    """Yield nothing: what is computed changes in the attention, which is compared with its original."""
    return iter(())


TOGETHER_RECIPES = (
    Recipe(
        "_run_single_frame_inference",
        ("self", "inference_state", "output_dict", "frame_idx", "batch_size", "is_init_cond_frame"),
        _together,
        _nothing_to_compare,
    ),
)
