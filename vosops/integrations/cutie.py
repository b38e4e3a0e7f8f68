"""Cutie (package rf-cutie) as a tracker whose memory is read by vosops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vosops.integrations import accelerate
from vosops.integrations.checkouts import (
    CheckoutTracker,
    MemoryPlan,
    plan_memory,
    restore,
    saved,
    token_bytes,
    without_pretraining,
)
from vosops.models.weights import read_weights

__all__ = ["Cutie"]

_FEATURES = "pix_feat_proj.weight"
_BASE_CHANNELS = 1024  # of the pixel encoder's features; the small model has 256
_MEMORY_EVERY = 5
_NOT_SAVED = ("object_manager",)


class Cutie(CheckoutTracker):
    """Cutie with its long-term memory (Cheng et al., *Putting the Object Back into Video Object Segmentation*, 2024).

    weights: the published file, cutie-base-mega.pth or cutie-small-mega.pth. config: changes to Cutie's own
    configuration, such as {"mem_every": 10} or {"long_term": {"max_num_tokens": 5000}}. Frames with given labels stay
    in memory permanently. Needs the package rf-cutie: ``pip install 'vosops[cutie]'``.
    """

    name = "cutie"

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        config: dict[str, Any] | None = None,
        size: int = -1,
        device: str | torch.device = "cpu",
        memory_budget: int | str | None = None,
    ) -> None:
        if weights is None:
            raise ValueError("weights must be Cutie's file, such as cutie-base-mega.pth, got None")
        try:
            from cutie.inference.inference_core import InferenceCore
            from cutie.model.cutie import CUTIE
            from cutie.model.utils import resnet
        except ImportError as error:
            raise ImportError(f"cutie needs its package ({error}): pip install 'vosops[cutie]'") from error
        state = read_weights(weights)
        if _FEATURES not in state:
            raise ValueError(f"weights must be Cutie's, got {weights}, without {_FEATURES}")
        self.config = _configuration(state, config)
        with without_pretraining(resnet):
            network = CUTIE(self.config)
        missing = [name for name, _ in network.named_parameters() if name not in state]
        if missing:
            raise ValueError(
                f"weights must be Cutie's, got {weights}, without {missing[0]} ({len(missing)} are missing)"
            )
        network.load_weights(state)
        self.acceleration = accelerate(InferenceCore)
        super().__init__(network, size=size, device=device, memory_budget=memory_budget)

    def _new_core(self) -> Any:
        from cutie.inference.inference_core import InferenceCore

        return InferenceCore(self.network, self.config)

    def _advance(self, image: Tensor, masks: Tensor | None, permanent: bool, end: bool) -> Tensor:
        core = self._core
        permanent = permanent and not end
        if masks is not None:
            numbers = torch.tensor(self.object_ids, device=masks.device)
            labels = (masks * numbers[:, None, None]).sum(0)
            probabilities: Tensor = core.step(
                image, labels, self.object_ids, end=end, force_permanent=permanent
            )
            return probabilities
        if not self.object_ids:
            return image.new_ones(1, *image.shape[1:])
        if permanent:
            self._fit_memory(core.memory.HW, [])
        probabilities = core.step(image, end=end, force_permanent=permanent)
        return probabilities

    def _remove(self, object_id: int) -> None:
        core, channel = self._core, self.object_ids.index(object_id)
        self.object_ids.remove(object_id)
        for store in _stores(
            core.memory
        ):  # Cutie deletes what a bucket without a passing frame does not have
            for name in ("e", "use_cnt", "life_cnt"):
                for bucket in store.buckets:
                    getattr(store, name, {}).setdefault(bucket, None)
        core.delete_objects([object_id])
        core.memory.obj_v.pop(object_id, None)
        for store in _stores(core.memory):
            for name in ("e", "use_cnt", "life_cnt"):
                parts = getattr(store, name, {})
                for bucket in [bucket for bucket, part in parts.items() if part is None]:
                    del parts[bucket]
        kept = [i for i in range(core.last_mask.shape[1]) if i != channel]
        core.last_mask = core.last_mask[:, kept]

    def _save_core(self) -> dict[str, Any]:
        core = self._core
        return {
            "curr_ti": core.curr_ti,
            "last_mem_ti": core.last_mem_ti,
            "last_mask": saved(core.last_mask),
            "memory": saved(core.memory, _NOT_SAVED),
        }

    def _load_core(self, state: dict[str, Any]) -> None:
        self._core.object_manager.add_new_objects(list(self.object_ids))
        restore(self._core, state, self.device)

    def _memory_tensors(self) -> Iterator[Tensor]:
        for store in _stores(self._core.memory):
            for name in ("k", "s", "e", "use_cnt", "life_cnt", "v"):
                yield from getattr(store, name, {}).values()

    def _fit_memory(self, pixels: int, new: Sequence[int]) -> None:
        memory, long_term = self._core.memory, self.config.use_long_term
        work = memory.work_mem
        groups = [len(ids) for ids in work.buckets.values()] + ([len(new)] if new else [])
        key, value = self.config.model.key_dim, self.config.model.value_dim
        one = sum(token_bytes(2 * key + 1 + value * objects) for objects in groups)
        permanent = 1 + max((work.perm_end_pt[b] // pixels for b in work.buckets), default=0)
        own = self.config.long_term
        default = MemoryPlan(
            own.max_mem_frames - 1,
            own.min_mem_frames - 1,
            own.num_prototypes,
            own.max_num_tokens,
            own.buffer_tokens,
        )
        if not long_term:
            frames = self.config.max_mem_frames  # one more than stays, until the oldest is dropped
            default = MemoryPlan(frames, 0, 0, 0, 0)
        plan = plan_memory(default, pixels, permanent, one, self.memory_budget)
        if long_term:
            memory.max_mem_frames, memory.min_mem_frames = plan.work_frames, plan.kept_frames
            memory.num_prototypes, memory.max_long_tokens = plan.prototypes, plan.long_tokens
            memory.buffer_tokens = plan.buffer_tokens
        else:
            memory.max_mem_frames = plan.work_frames - 1
        memory.config_stale = True
        for bucket in work.buckets:  # one frame is about to come
            work.remove_old_memory(bucket, (memory.max_mem_frames - 1) * pixels)
            if long_term and memory.long_mem.size(bucket) > plan.long_tokens:
                memory.long_mem.remove_obsolete_features(bucket, plan.long_tokens)


def _stores(memory: Any) -> list[Any]:
    return [memory.work_mem, *([memory.long_mem] if memory.use_long_term else [])]


def _configuration(state: dict[str, Tensor], changes: dict[str, Any] | None) -> Any:
    """Cutie's configuration for generic videos and the model of these weights."""
    import cutie
    from omegaconf import OmegaConf

    folder = Path(next(iter(cutie.__path__))) / "config"
    evaluation = OmegaConf.load(folder / "eval_config.yaml")
    model: Any = OmegaConf.load(folder / "model" / "base.yaml")
    if state[_FEATURES].shape[1] != _BASE_CHANNELS:
        model = OmegaConf.merge(model, OmegaConf.load(folder / "model" / "small.yaml"))
    own = {"use_long_term": True, "mem_every": _MEMORY_EVERY, "model": model}
    config: Any = OmegaConf.merge(evaluation, own, changes or {})
    for name in ("defaults", "hydra", "datasets"):
        config.pop(name, None)
    config.model.pop("defaults", None)
    return config
