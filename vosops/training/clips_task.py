"""What the tasks of networks for masks and for classes share: their network, and batches of clips."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vosops.io.errors import InputError
from vosops.io.labels import davis_palette
from vosops.models.create import create_model
from vosops.training.config import TrainConfig
from vosops.training.loading import Batch, batches
from vosops.training.samples import ClipSamples
from vosops.training.sources import sequences_of
from vosops.training.task import Shard, Task

__all__ = ["ClipTask", "create_network", "is_batch_norm", "recompute"]

_SHOWN = 4  # clips in a grid of pictures
_BYTE = 255.0


class ClipTask(Task):
    """A task whose batches are clips of labelled frames.

    Whether labels are of objects, and to which multiple the crop's sides are rounded up, is the subclass'.
    """

    objects: bool

    def __init__(self, config: TrainConfig, shard: Shard) -> None:
        self.config = config
        self.shard = shard
        self.network = create_network(config)
        for source in config.data.held_out.sources:
            sequences_of(source)  # so that a source with nothing in it is refused before hours of training
        height, width = config.data.clips.size
        self.samples = ClipSamples(
            config.data,
            (self.side(height), self.side(width)),
            seed=config.seed,
            per_step=config.batch * config.accumulate * shard.world,
            objects=self.objects,
        )

    @abstractmethod
    def side(self, wanted: int) -> int:
        """Return the least side of a crop that the network takes and that is not below this one."""

    @abstractmethod
    def predicted(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return labels (N,H,W) uint8 of the last frame of each clip."""

    def batches(self, first: int) -> Iterator[Batch]:
        """See :class:`Task`."""
        pinned = torch.cuda.is_available() and self.config.device != "cpu"
        return batches(
            self.samples,
            first,
            batch=self.config.batch,
            shard=self.shard,
            workers=self.config.data.workers,
            pinned=pinned,
        )

    def frames_of(self, batch: Batch) -> Tensor:
        """Return the frames (N,T,3,H,W) float32 in [0, 1]."""
        frames = batch.frames.float() / _BYTE
        if self.config.channels_last:
            within = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            frames = within.unflatten(0, frames.shape[:2])
        return frames

    def step_of(self, batch: Batch) -> int:
        """Return the step that a batch belongs to."""
        return batch.number // self.config.accumulate

    @torch.no_grad()
    def pictures(self, network: nn.Module, batch: Batch) -> Tensor:
        """See :class:`Task`: a row for each of some clips: its first and last frame, the truth and the prediction."""
        some = Batch(batch.frames[:_SHOWN], batch.labels[:_SHOWN], batch.objects[:_SHOWN], batch.number)
        labels = self.predicted(network, some)
        colours = torch.frombuffer(bytearray(davis_palette()), dtype=torch.uint8).view(-1, 3)
        rows = []
        for frames, truth, found in zip(some.frames.cpu(), some.labels.cpu(), labels.cpu(), strict=True):
            parts = [frames[0], frames[-1], *(_painted(frames[-1], x, colours) for x in (truth[-1], found))]
            rows.append(torch.cat(parts, 2))
        return torch.cat(rows, 1)


def _painted(frame: Tensor, labels: Tensor, colours: Tensor) -> Tensor:
    """Lay the colours of labels (H,W) over a frame (3,H,W) uint8."""
    over = colours[labels.long()].permute(2, 0, 1)
    return torch.where(labels == 0, frame, (frame.int() + over.int()).div(2, rounding_mode="floor").byte())


def create_network(config: TrainConfig) -> nn.Module:
    """Create the network of a configuration, ready to be trained.

    Raises:
        InputError: Its options, weights or patterns cannot be.
    """
    try:
        network: nn.Module = create_model(config.model, config.weights, **config.options)
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise InputError(f"{config.model} cannot be created: {error}") from error
    for pattern in config.freeze:
        frozen = [p for name, p in network.named_parameters() if fnmatchcase(name, pattern)]
        if not frozen:
            raise InputError(f"freeze must match a parameter of {config.model}, got {pattern!r}")
        for parameter in frozen:
            parameter.requires_grad_(False)
    recompute(network, config.recompute, norms_are_fixed=config.freeze_batch_norm)
    return network


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module normalises by the batch in training."""
    own = type(module).forward
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and own in (
        nn.modules.batchnorm._BatchNorm.forward,
        nn.SyncBatchNorm.forward,
    )


def recompute(network: nn.Module, patterns: Sequence[str], *, norms_are_fixed: bool) -> None:
    """Let modules keep nothing of what they compute but the result: the gradients compute it again.

    patterns: of their names, such as ``Encoder.res*``. norms_are_fixed: batch norm keeps its statistics in training.

    Raises:
        InputError: A pattern matches nothing, or batch norm that would take each batch's statistics twice.
    """
    for pattern in patterns:
        chosen = [module for name, module in network.named_modules() if fnmatchcase(name, pattern)]
        if not chosen:
            raise InputError(f"recompute must match a module of the network, got {pattern!r}")
        for module in chosen:
            if not norms_are_fixed and any(is_batch_norm(x) for x in module.modules()):
                raise InputError(
                    "recompute must not match batch norm in training mode, which would see each batch twice, "
                    f"got {pattern!r}: set freeze_batch_norm, or choose other modules"
                )
            module.__class__ = _recomputing(type(module))  # type: ignore[arg-type]


@cache
def _recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class of modules that keep nothing of what they compute but the result, with gradients."""

    def forward(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *arguments, **options)
        return checkpoint(kind.forward, self, *arguments, use_reentrant=False, **options)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
