"""The tasks of the training loop: a `Task`, found by the name of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vosops.io.errors import InputError
from vosops.models.registry import find_model

if TYPE_CHECKING:
    from vosops.training.config import TrainConfig

__all__ = ["Shard", "Task", "create_task", "register_task"]


@dataclass(frozen=True)
class Shard:
    """Which of the processes that train together this one is, from 0, and how many they are."""

    rank: int = 0
    world: int = 1


class Task(ABC):
    """A network, the batches that it is trained on, the loss of one, and how well it does.

    Devices, precision, optimizer, averages and checkpoints are the loop's (:mod:`vosops.training.loop`). A task is made
    with a configuration and a `Shard`.
    """

    network: nn.Module
    """What is trained: its parameters with ``requires_grad``."""

    @abstractmethod
    def batches(self, first: int) -> Iterator[Any]:
        """Yield batches without end, from number `first` on.

        What batch n holds is a function of the seed, the shard and n alone, so that a resumed run sees what it would
        have seen. With accumulation several batches are a step. A batch goes to the device by its ``to``, if it has
        one; its ``problems``, if it has some, are the files that were skipped, a line each.
        """

    @abstractmethod
    def loss(self, network: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """Return the scalar to minimise, and further figures for the log.

        The mean over the batch of what each sample gives alone, so that several processes compute what one with a
        larger batch does. network: that of the task.
        """

    @abstractmethod
    def evaluate(self, network: nn.Module, out: Path) -> dict[str, float]:
        """Score the network, in eval mode, on held-out data; "score" is maximised.

        Empty where nothing is held out. out: a folder for what it writes.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what steps change beyond the network, for ``torch.save`` and a weights-only load."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  few tasks have a state
        """Go back to a state; what follows is the same to the bit, on the CPU."""

    def pictures(self, network: nn.Module, batch: Any) -> Tensor | None:
        """Return a grid (3,H,W) uint8 of frames, truth and predictions, or None."""
        return None

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the contents of the file of trained weights."""
        return dict(network.state_dict())


_TASKS = {
    "mask network": "vosops.training.masks:MaskTask",
    "semantic network": "vosops.training.semantic:SemanticTask",
    "vosops_s": "vosops.training.stream_task:StreamTask",
}
"""The task of each kind of model, or of one model, by its name, which comes before its kind."""


def register_task(name: str, target: str) -> None:
    """Train the models of a kind, or one model by its name, with another task: "module:class"."""
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        raise ValueError(f"target must be 'module:class', got {target!r}")
    _TASKS[name] = target


def create_task(config: TrainConfig, shard: Shard = Shard()) -> Task:
    """Create what trains the model of a configuration.

    Raises:
        InputError: The model is unknown or cannot be trained, an option or a file of the configuration cannot be.
    """
    try:
        entry = find_model(config.model)
    except ValueError as error:
        raise InputError(str(error)) from error
    target = _TASKS.get(entry.name) or _TASKS.get(entry.kind)
    if target is None:
        raise InputError(f"model must be a network to be trained, got {config.model!r}, a {entry.kind}")
    module, _, attribute = target.partition(":")
    task: Task = getattr(import_module(module), attribute)(config, shard)
    return task
