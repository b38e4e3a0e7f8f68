"""XMem, from a user's checkout, as a tracker whose memory is read by vosops."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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

__all__ = ["XMem"]

_CONFIG = {
    "mem_every": 5,
    "deep_update_every": -1,
    "enable_long_term": True,
    "enable_long_term_count_usage": True,
    "max_mid_term_frames": 10,
    "min_mid_term_frames": 5,
    "num_prototypes": 128,
    "max_long_term_elements": 10000,
    "top_k": 30,
}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet: XMem takes normalised images
_STORED = ("k", "s", "e", "use_count", "life_count")
_NOT_SAVED = ("config",)


class XMem(CheckoutTracker):
    """XMem (Cheng and Schwing, ECCV 2022) with its long-term memory.

    weights: the published file, XMem.pth. checkout: the folder of a clone of hkchengrex/XMem. config: changes to the
    options of its eval.py, such as {"top_k": 50}. Of given frames XMem keeps the first permanently. An object that is
    removed stays in the memory, unseen, until `reset`. Objects may appear at any time; where XMem's eviction would
    then end with NotImplementedError, the least used of the shared positions go.
    """

    name = "xmem"

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        checkout: str | Path | None = None,
        config: dict[str, Any] | None = None,
        size: int = -1,
        device: str | torch.device = "cpu",
        memory_budget: int | str | None = None,
    ) -> None:
        if weights is None:
            raise ValueError("weights must be XMem's file, such as XMem.pth, got None")
        if checkout is None:
            raise ValueError("checkout must be the folder of a clone of XMem, got None")
        read_weights(weights)  # for the errors of what is not a weights file
        modules = _import_checkout(Path(checkout))
        network_module, self._core_module, resnet = modules
        self.config = {**_CONFIG, **(config or {})}
        with without_pretraining(resnet), contextlib.redirect_stdout(io.StringIO()):
            try:
                network = network_module.XMem(self.config, str(weights), map_location="cpu")
            except (KeyError, RuntimeError) as error:
                raise ValueError(f"weights must be XMem's, got {weights}: {error}") from error
        self.acceleration = accelerate(self._core_module.InferenceCore)
        self._mean, self._std = (
            torch.tensor(numbers, device=device)[:, None, None] for numbers in (_MEAN, _STD)
        )
        super().__init__(network, size=size, device=device, memory_budget=memory_budget)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._slots: list[int] = []  # the id of each of the core's objects; -1 for one that was removed

    def _new_core(self) -> Any:
        core = self._core_module.InferenceCore(self.network, dict(self.config))
        if hasattr(core.memory.long_mem, "remove_obsolete_features"):
            store = core.memory.long_mem
            store.remove_obsolete_features = partial(_evict, store, store.remove_obsolete_features)
        return core

    def _advance(self, image: Tensor, masks: Tensor | None, permanent: bool, end: bool) -> Tensor:
        image = (image - self._mean) / self._std
        if masks is None:
            probabilities: Tensor = self._core.step(image, end=end)
        else:
            self._slots += [i for i in self.object_ids if i not in self._slots]
            labels = list(range(1, len(self._slots) + 1))
            self._core.set_all_labels(labels)
            given = masks.new_zeros(len(labels), *masks.shape[1:], dtype=image.dtype)
            given[self._channels()] = masks.to(image.dtype)
            probabilities = self._core.step(image, given, labels, end=end)
        objects = probabilities[1:][self._channels()]
        if len(objects) == len(self._slots):
            return probabilities
        return torch.cat([1 - objects.sum(0, keepdim=True), objects])

    def _channels(self) -> list[int]:
        """Return the core's channels of the objects."""
        return [self._slots.index(i) for i in self.object_ids]

    def _remove(self, object_id: int) -> None:
        self._slots[self._slots.index(object_id)] = -1
        self.object_ids.remove(object_id)

    def _save_core(self) -> dict[str, Any]:
        core = self._core
        names = ("curr_ti", "last_mem_ti", "last_deep_update_ti", "all_labels")
        return {
            "slots": list(self._slots),
            **{name: saved(getattr(core, name)) for name in names if hasattr(core, name)},
            "memory": _without_functions(saved(core.memory, _NOT_SAVED)),
        }

    def _load_core(self, state: dict[str, Any]) -> None:
        self._slots = list(state["slots"])
        restore(self._core, {name: state[name] for name in state if name != "slots"}, self.device)

    def _memory_tensors(self) -> Iterator[Tensor]:
        for store in (self._core.memory.work_mem, self._core.memory.long_mem):
            yield from (part for name in _STORED if (part := getattr(store, name, None)) is not None)
            yield from store.v

    def _fit_memory(self, pixels: int, new: Sequence[int]) -> None:
        memory, config = self._core.memory, self.config
        objects = len(self._slots) + len(new)
        one = token_bytes(2 * config["key_dim"] + 1 + config["value_dim"] * objects)
        default = MemoryPlan(
            config["max_mid_term_frames"] - 1,
            config["min_mid_term_frames"] - 1,
            config["num_prototypes"],
            config["max_long_term_elements"],
            0,
        )
        plan = plan_memory(default, pixels, 1, one, self.memory_budget)
        changed = {
            "max_mid_term_frames": plan.work_frames + 1,
            "min_mid_term_frames": plan.kept_frames + 1,
            "num_prototypes": plan.prototypes,
            "max_long_term_elements": plan.long_tokens,
        }
        if hasattr(memory, "update_config"):
            memory.update_config({**self._core.config, **changed})
        self._core.config.update(changed)
        if self.memory_budget is not None:
            self._shrink(plan, pixels)

    def _shrink(self, plan: MemoryPlan, pixels: int) -> None:
        """Drop what a smaller plan has no room for, one frame being about to come."""
        work, long = self._core.memory.work_mem, self._core.memory.long_mem
        surplus = 0 if work.k is None else work.k.shape[2] - plan.work_frames * pixels
        if surplus > 0:
            kept = torch.ones(work.k.shape[2], dtype=torch.bool, device=work.k.device)
            kept[pixels : pixels + surplus] = False
            _keep(work, kept)
        if long.k is not None and long.k.shape[2] > plan.long_tokens - plan.prototypes:
            _keep(long, _most_used(long, plan.long_tokens - plan.prototypes))


def _import_checkout(folder: Path) -> tuple[Any, Any, Any]:
    """Return the modules model.network, inference.inference_core and model.resnet of a clone of XMem."""
    folder = folder.resolve()
    if not (folder / "model" / "network.py").is_file():
        raise ValueError(
            f"checkout must be the folder of a clone of XMem, got {folder}, without model/network.py"
        )
    sys.path.insert(0, str(folder))
    try:
        names = ("model.network", "inference.inference_core", "model.resnet")
        modules = tuple(importlib.import_module(name) for name in names)
    finally:
        sys.path.remove(str(folder))
    for module in modules:
        if not Path(str(module.__file__)).resolve().is_relative_to(folder):
            raise ImportError(
                f"checkout must be the only package with {module.__name__}, got {folder}, but {module.__file__} was "
                "imported before"
            )
    return modules  # type: ignore[return-value]


def _without_functions(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state without the eviction that `XMem._new_core` sets."""
    state["long_mem"].pop("remove_obsolete_features", None)
    return state


def _evict(store: Any, original: Callable[[int], None], max_size: int) -> None:
    """XMem's eviction of the least used; with several groups, which XMem does not support, exactly that many."""
    if store.k.shape[2] > max_size and len(store.v) > 1:
        _keep(store, _most_used(store, max_size))
    elif store.k.shape[2] > max_size:
        original(max_size)


def _most_used(store: Any, count: int) -> Tensor:
    """Return a mask (M,) of the most used positions; of each group's values at least one stays."""
    usage = (store.use_count / store.life_count).flatten().nan_to_num(nan=-1.0)  # which topk would take first
    kept = torch.zeros_like(usage, dtype=torch.bool)
    kept[usage.topk(max(1, count)).indices] = True
    for value in store.v:
        first = len(usage) - value.shape[2]
        if not kept[first:].any():
            kept[first + int(usage[first:].argmax())] = True
    return kept


def _keep(store: Any, kept: Tensor) -> None:
    """Keep the positions of a mask (M,); a group's values belong to the last positions."""
    for name in _STORED:
        part = getattr(store, name, None)
        if part is not None:
            setattr(store, name, part[:, :, kept])
    store.v = [value[:, :, kept[len(kept) - value.shape[2] :]] for value in store.v]
