"""vosops-s as a task of the training loop: streams of the configuration's sources, and J&F of held-out videos."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vosops.inference.settings import find_device
from vosops.io.errors import InputError
from vosops.io.pictures import read_frame
from vosops.models.vosops_s import BACKBONE, BACKBONES, STRIDE, Refiner, VosopsS
from vosops.models.weights import load_weights
from vosops.training.config import Source, TrainConfig
from vosops.training.footage import Shot
from vosops.training.masks import scores_of_videos
from vosops.training.sources import sequences_of
from vosops.training.streams import Batch, Streams, StreamSettings, StreamTrainer
from vosops.training.task import Shard, Task

__all__ = ["StreamTask"]

ROWS = 480  # of videos, in the computation
_OPTIONS = ("backbone", "pretrained")


class StreamTask(Task):
    """Trains :class:`vosops.models.vosops_s.Refiner` in streams; see :mod:`vosops.training.streams`.

    Of the configuration it reads `data.train` (videos and stills; their weights and steps do not matter), `batch`, the
    number of streams of a process, `seed`, `task`, which are `StreamSettings` by their names, `data.held_out`, and of
    `options` `backbone`, one of :data:`vosops.models.vosops_s.BACKBONES`.
    The score is J&F of the held-out videos, as ``vosops eval`` computes it.
    """

    def __init__(self, config: TrainConfig, shard: Shard = Shard()) -> None:  # noqa: B008
        if config.data.workers:
            raise InputError(f"data.workers must be 0 for vosops_s, got {config.data.workers}")
        self.config = config
        unknown = sorted(set(config.options) - set(_OPTIONS))
        if unknown:
            raise InputError(f"options of vosops_s must be among {', '.join(_OPTIONS)}, got {unknown[0]}")
        try:
            settings = StreamSettings.parsed(config.task)
        except (TypeError, ValueError) as error:
            raise InputError(f"task: {error}") from error
        backbone = config.options.get("backbone", BACKBONE)
        if backbone not in BACKBONES:
            raise InputError(f"options.backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
        self.network = Refiner(maps=BACKBONES[backbone])
        if config.weights is not None:
            try:
                load_weights(self.network, config.weights)
            except (ValueError, FileNotFoundError) as error:
                raise InputError(f"vosops_s cannot be created: {error}") from error
        shots: dict[str, list[Shot]] = {"videos": [], "stills": []}
        for source in config.data.train:
            shots[source.kind] += _shots_of(source)
        first = shard.rank * config.batch
        self.streams = Streams(shots["videos"], shots["stills"], settings, config.batch, config.seed, first)
        self.device = find_device(config.device)
        self.pretrained = bool(config.options.get("pretrained", True))
        self.trainer = StreamTrainer(
            self.network, settings, config.batch, pretrained=self.pretrained, device=self.device
        )

    def batches(self, first: int) -> Iterator[Batch]:
        """See :class:`Task`: a batch is a frame of each stream."""
        return self.streams.batches(first)

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """See :class:`Task`; the streams go on by a frame."""
        return self.trainer.loss(network, batch.frames)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Task`: what the trackers of the streams remember."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`Task`."""
        self.trainer.load_state_dict(state)

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """See :class:`Task`: in float16, as they are shipped."""
        return {name: x.half() for name, x in network.state_dict().items()}

    def pictures(self, network: nn.Module, batch: Batch) -> Tensor | None:
        """See :class:`Task`: each stream's frame, its truth and what its tracker found."""
        columns = []
        for tracker, frame in zip(self.trainer.trackers, batch.frames, strict=True):
            image = (frame.image * 255).byte().cpu()
            found = torch.zeros_like(frame.labels)
            if tracker.object_ids:
                found = tracker.latest().argmax(0).to(torch.uint8).cpu()
                found = found.repeat_interleave(STRIDE, 0).repeat_interleave(STRIDE, 1)
            columns.append(torch.cat([image, _painted(image, frame.labels), _painted(image, found)], 1))
        return torch.cat(columns, 2)

    def evaluate(self, network: nn.Module, out: Path) -> dict[str, float]:
        """See :class:`Task`."""
        if not self.config.data.held_out.sources:
            return {}
        assert isinstance(network, Refiner)
        tracker = VosopsS(network, pretrained=self.pretrained, device=self.device)
        held_out, precision = self.config.data.held_out, self.config.precision
        return scores_of_videos(tracker, held_out, precision, str(self.device))


def _shots_of(source: Source) -> list[Shot]:
    """Return what a source shows; videos are enlarged to `ROWS` rows."""
    shots = []
    for sequence in sequences_of(source):
        scale = ROWS / read_frame(sequence.frames[0][0]).shape[0] if source.kind == "videos" else 1.0
        shots.append(Shot(sequence.name, sequence.frames, scale))
    return shots


def _painted(image: Tensor, labels: Tensor) -> Tensor:
    """Return an image (3,H,W) uint8 with objects of labels (H,W) brighter, each in a channel of its own."""
    painted = image.clone()
    for number in (1, 2):
        channel = painted[number - 1]
        channel[labels == number] = 255
    return painted
