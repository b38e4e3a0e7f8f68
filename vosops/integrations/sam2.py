"""SAM 2 (package sam2, or a clone of Meta's) as a tracker whose memory is read and bounded by vosops."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vosops.inference.prompts import Prompt
from vosops.integrations import accelerate
from vosops.integrations.checkouts import CheckoutTracker, saved
from vosops.integrations.sessions import keep_within, window_of
from vosops.models._tracking import check_frame, check_output, most_probable
from vosops.models.weights import load_weights, read_weights

__all__ = ["SAM2"]

_VARIANTS = {"t": (96, 12), "s": (96, 16), "b+": (112, 24), "l": (144, 48)}  # channels, blocks of the encoder
_STEM, _BLOCK = "image_encoder.trunk.patch_embed.proj.weight", "image_encoder.trunk.blocks."
_OF_2_1 = "no_obj_embed_spatial"  # a parameter that SAM 2.0 has not
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ENDLESS = 1 << 30  # frames of a video whose length is not known
_NOT_SAVED = ("images", "device", "storage_device", "cached_features", "constants")
_CONSTANT = "maskmem_pos_enc"


class SAM2(CheckoutTracker):
    """SAM 2 or 2.1 (Ravi et al., *SAM 2: Segment Anything in Images and Videos*, 2024), prompted by masks.

    weights: a published file, such as sam2.1_hiera_small.pt, whose size and version it shows. variant: "t", "s", "b+"
    or "l", for weights that do not show it. image_size: side of the square that frames are resized to, a multiple of
    32; the published weights are of 1024. config: changes to the model's configuration by their dotted names, such as
    {"num_maskmem": 5}. size, device, memory_budget: of :class:`CheckoutTracker`; the budget holds the outputs of
    frames, of which the oldest leave. Frames with given labels stay permanently. Probabilities are the softmax of the
    objects' logits and 0 for the background. Needs the package sam2: ``pip install 'vosops[sam2]'``, see
    docs/sam2.md.
    """

    name = "sam2"

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        variant: str | None = None,
        image_size: int = 1024,
        config: Mapping[str, Any] | None = None,
        size: int = -1,
        device: str | torch.device = "cpu",
        memory_budget: int | str | None = None,
    ) -> None:
        if weights is None:
            raise ValueError("weights must be SAM 2's file, such as sam2.1_hiera_small.pt, got None")
        if variant is not None and variant not in _VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(_VARIANTS)}, got {variant!r}")
        if image_size < 32 or image_size % 32:
            raise ValueError(f"image_size must be a multiple of 32, got {image_size}")
        try:
            from sam2.build_sam import build_sam2_video_predictor
        except ImportError as error:
            raise ImportError(f"sam2 needs its package ({error}): pip install 'vosops[sam2]'") from error
        state = read_weights(weights)
        if _STEM not in state:
            raise ValueError(f"weights must be SAM 2's, got {weights}, without {_STEM}")
        changes = {"image_size": image_size, **(config or {})}
        predictor = build_sam2_video_predictor(
            _configuration(state, variant, weights),
            device="cpu",
            hydra_overrides_extra=[f"++model.{name}={value}" for name, value in changes.items()],
        )
        load_weights(predictor, weights)
        predictor.fill_hole_area = 0  # needs a compiled extension, and warns of every frame without
        self.acceleration = accelerate(predictor)
        super().__init__(predictor, size=size, device=device, memory_budget=memory_budget)
        self._mean, self._std = (torch.tensor(x, device=self.device)[:, None, None] for x in (_MEAN, _STD))

    def predict(self, frame: Tensor, *, output: str = "probs") -> Tensor:
        """Segment a frame as `step` would, and stay as it was: see :class:`vosops.models.VideoTracker`."""
        self._check_started()
        check_frame(frame, self._frame_size)
        check_output(output)
        core, self._core = self._core, self._core.copy()
        try:
            with torch.inference_mode():
                probabilities = self._sized(self._advance(self._image(frame), None, False, True)).clone()
        finally:
            self._core = core
        return probabilities if output == "probs" else most_probable(probabilities, self.object_ids)

    def labels_of_prompts(self, frame: Tensor, prompts: Mapping[int, Prompt]) -> Tensor:
        """Return the ids (H,W) uint8 of the objects that clicks and boxes mark in a frame (3,H,W).

        Where objects overlap, the one of the greater logit is taken. The tracker stays as it was.
        """
        check_frame(frame)
        with torch.inference_mode():
            core = _Core.of(self.network, (frame.shape[1], frame.shape[2]))
            core.show(self._resized(self._image(frame)))
            logits = core.mark(prompts)
            best, index = logits.max(0)
            ids = torch.tensor(core.object_ids, dtype=torch.uint8, device=logits.device)
            return torch.where(best > 0, ids[index], 0).clone()

    def _new_core(self) -> _Core:
        assert self._frame_size is not None
        return _Core.of(self.network, self._frame_size)

    def _advance(self, image: Tensor, masks: Tensor | None, permanent: bool, end: bool) -> Tensor:
        core = self._core
        core.show(self._resized(image))
        try:
            if masks is not None:
                background = ~masks.any(0, keepdim=True)
                core.give(dict(zip(self.object_ids, masks, strict=True)))
                return torch.cat([background, masks]).float()
            if not self.object_ids:
                return image.new_ones(1, *image.shape[1:])
            logits = core.track()[[core.object_ids.index(i) for i in self.object_ids]]
            return torch.cat([torch.zeros_like(logits[:1]), logits]).softmax(
                0
            )  # one object: SAM 2's own sigmoid
        finally:
            core.frame += 1
            self._fit_memory(0, ())

    def _remove(self, object_id: int) -> None:
        self.object_ids.remove(object_id)
        self._core.remove(object_id)

    def _save_core(self) -> dict[str, Any]:
        return {"frame": self._core.frame, "state": _without_constants(self._core.state)}

    def _load_core(self, state: dict[str, Any]) -> None:
        self._core.load(state["frame"], _moved(state["state"], self.device))

    def _memory_tensors(self) -> Iterator[Tensor]:
        for outputs in self._core.outputs:
            for frames in outputs.values():
                for output in frames.values():
                    yield from (x for x in output.values() if isinstance(x, Tensor))

    def _fit_memory(self, pixels: int, new: Sequence[int]) -> None:
        if self.memory_budget is not None:
            core = self._core
            keep_within(self.memory_budget, core.outputs, core.frame, window_of(self.network))

    def _go_back(self) -> None:
        self._core.frame -= 1

    def _resized(self, image: Tensor) -> Tensor:
        """Return the image (3,h,w) in [0, 1] as the network takes it: square, normalised."""
        side: Any = self.network.image_size
        square = functional.interpolate(
            image[None], (side, side), mode="bilinear", align_corners=False, antialias=True
        )
        return (square[0] - self._mean) / self._std


class _Core:
    """A session of SAM 2's predictor that gets a frame at a time.

    frame: number of the next frame. state: the predictor's.
    """

    def __init__(self, predictor: Any, state: dict[str, Any], frame: int = 0) -> None:
        self._predictor, self.state, self.frame = predictor, state, frame

    @classmethod
    def of(cls, predictor: Any, size: tuple[int, int]) -> _Core:
        """Return a session without frames or objects, of frames of this size."""
        frames = _CurrentFrame()
        load = {"load_video_frames": lambda *_, **__: (frames, *size)}
        with _replaced(sys.modules[type(predictor).__module__], **load):
            predictor._get_image_feature = lambda *_, **__: None  # of a first frame, which is not there yet
            try:
                state = predictor.init_state("")
            finally:
                del predictor._get_image_feature
        state["num_frames"] = _ENDLESS
        return cls(predictor, state)

    @property
    def object_ids(self) -> list[int]:
        return list(self.state["obj_ids"])

    @property
    def outputs(self) -> list[dict[str, dict[int, Any]]]:
        """The outputs of frames, of each object."""
        return list(self.state["output_dict_per_obj"].values())

    def copy(self) -> _Core:
        """Return one that goes on by itself: the tensors are shared, nothing is written into them."""
        return _Core(self._predictor, _copied(self.state), self.frame)

    def show(self, image: Tensor) -> None:
        """Set the current frame, (3,S,S)."""
        self.state["images"] = _CurrentFrame(image)
        self.state["cached_features"] = {}

    def give(self, masks: Mapping[int, Tensor]) -> None:
        """Take the masks (h,w) of objects, old and new, for those in the current frame."""
        for tracked in self.state["frames_tracked_per_obj"].values():
            tracked.pop(self.frame, None)  # what was found there does not count
        for object_id, mask in masks.items():
            self._predictor.add_new_mask(self.state, self.frame, object_id, mask)
        self.track()

    def mark(self, prompts: Mapping[int, Prompt]) -> Tensor:
        """Return the logits (O,H,W) of objects that are marked in the current frame."""
        for object_id, prompt in prompts.items():
            points = torch.tensor([each[:2] for each in prompt.points]).reshape(-1, 2)
            inside = torch.tensor([int(each[2]) for each in prompt.points], dtype=torch.int32)
            box = None if prompt.box is None else torch.tensor(prompt.box)
            *_, logits = self._predictor.add_new_points_or_box(
                self.state, self.frame, object_id, points=points.float(), labels=inside, box=box
            )
        return logits[:, 0].float()  # type: ignore[no-any-return]

    def track(self) -> Tensor:
        """Return the logits (O,h,w) of the objects in the current frame."""
        with _replaced(sys.modules[type(self._predictor).__module__], tqdm=lambda items, **_: items):
            results = list(self._predictor.propagate_in_video(self.state, self.frame, 0))
        for tracked in self.state["frames_tracked_per_obj"].values():
            for number in [n for n in tracked if n < self.frame - 1]:
                del tracked[number]
        masks: Tensor = results[0][2]
        return masks[:, 0].float()

    def remove(self, object_id: int) -> None:
        """Forget an object."""
        self._predictor.remove_object(self.state, object_id, need_output=False)

    def load(self, frame: int, state: dict[str, Any]) -> None:
        """Go on from what was saved."""
        self.frame = frame
        self.state.update(state)
        for outputs in self.outputs:
            for frames in outputs.values():
                for output in frames.values():
                    output[_CONSTANT] = None if output.get("maskmem_features") is None else self._constant()

    def _constant(self) -> list[Tensor]:
        """Return the code of a memory's positions, which is the same for all frames and objects."""
        constants = self.state["constants"]
        if _CONSTANT not in constants:
            side = self._predictor.image_size // 16
            channels = self._predictor.mem_dim
            like = torch.zeros(1, channels, side, side, device=self._predictor.device)
            constants[_CONSTANT] = [self._predictor.memory_encoder.position_encoding(like).to(like.dtype)]
        return list(constants[_CONSTANT])


class _CurrentFrame:
    """The frames of a session, of which the current one is known."""

    def __init__(self, image: Tensor | None = None) -> None:
        self._image = image

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Tensor:
        assert self._image is not None
        return self._image


def _configuration(state: Mapping[str, Tensor], variant: str | None, weights: str | Path) -> str:
    """Return the name of the package's configuration for weights."""
    if variant is None:
        channels = state[_STEM].shape[0]
        blocks = len({name.split(".")[3] for name in state if name.startswith(_BLOCK)})
        variant = next((name for name, own in _VARIANTS.items() if own == (channels, blocks)), None)
        if variant is None:
            raise ValueError(
                f"variant must be one of {', '.join(_VARIANTS)} for weights of {channels} channels and {blocks} "
                f"blocks, got None with {weights}"
            )
    version = "sam2.1" if _OF_2_1 in state else "sam2"
    return f"configs/{version}/{version}_hiera_{variant}.yaml"


@contextmanager
def _replaced(module: Any, **values: Any) -> Iterator[None]:
    """Give names of a module other values for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _copied(value: Any) -> Any:
    """Return containers anew, with the same tensors."""
    if isinstance(value, Mapping):
        return type(value)((name, _copied(item)) for name, item in value.items())  # type: ignore[call-arg]
    return type(value)(map(_copied, value)) if isinstance(value, (list, tuple, set)) else value


def _without_constants(state: Mapping[str, Any]) -> dict[str, Any]:
    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: clean(item) for name, item in value.items() if name != _CONSTANT}
        return saved(value)

    return {name: clean(value) for name, value in state.items() if name not in _NOT_SAVED}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    return [_moved(item, device) for item in value] if isinstance(value, list) else value
