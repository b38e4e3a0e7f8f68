"""Training of networks that track masks: clips whose first frames' labels are given, several objects at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vosops.inference.api import segment
from vosops.io.annotations import annotation_style, values_of
from vosops.io.errors import InputError
from vosops.io.labels import read_labels
from vosops.io.listing import pictures, shown
from vosops.metrics import evaluate_sequence
from vosops.models.network import Network
from vosops.models.video_tracker import VideoTracker
from vosops.training.clips_task import ClipTask
from vosops.training.config import HeldOut, Source, TrainConfig
from vosops.training.loading import Batch
from vosops.training.objectives import sample_loss
from vosops.training.sources import IGNORED, AnnotatedFrames, sequences_of
from vosops.training.task import Shard

__all__ = ["MaskTask", "scores_of_videos"]


class MaskTask(ClipTask):
    """Trains a :class:`vosops.models.Network` by its `clip_logits`.

    The loss of a clip is the cross entropy of background and objects, fused as the network fuses them, over the frames
    that it predicts. The score is J&F, as ``vosops eval`` computes it, of the held-out videos, segmented with
    ``vosops.segment`` from the first mask on; stills cannot be held out.
    """

    objects = True

    def __init__(self, config: TrainConfig, shard: Shard) -> None:
        if any(source.kind == "stills" for source in config.data.held_out.sources):
            raise InputError("data.held_out.sources must be videos for a tracking network, got stills")
        super().__init__(config, shard)

    def side(self, wanted: int) -> int:
        """See :class:`ClipTask`."""
        network = self.network
        assert isinstance(network, Network)
        return -(-wanted // network.stride) * network.stride

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """See :class:`Task`: clips of equally many objects are computed together."""
        frames, step = self.frames_of(batch), self.step_of(batch)
        losses = []
        for objects in sorted(set(batch.objects)):
            some = [place for place, count in enumerate(batch.objects) if count == objects]
            logits = self._logits(network, frames[some], batch.labels[some], objects)
            truth = batch.labels[some][:, -logits.shape[1] :]
            losses += [sample_loss(x, y, self.config.loss, step) for x, y in zip(logits, truth, strict=True)]
        total = torch.stack(losses).mean()
        return total, {"objects": sum(batch.objects) / len(batch.objects)}

    def _logits(self, network: nn.Module, frames: Tensor, labels: Tensor, objects: int) -> Tensor:
        if not isinstance(network, Network):
            raise TypeError(f"network must be a Network, got {type(network).__name__}")
        try:
            return network.clip_logits(frames, labels, objects)
        except NotImplementedError as error:
            raise InputError(f"model {self.config.model} cannot be trained: {error}") from error

    def predicted(self, network: nn.Module, batch: Batch) -> Tensor:
        """See :class:`ClipTask`."""
        frames = self.frames_of(batch)
        found = [
            self._logits(network, frames[n : n + 1], batch.labels[n : n + 1], objects)[0, -1].argmax(0)
            for n, objects in enumerate(batch.objects)
        ]
        return torch.stack(found).to(torch.uint8)

    def evaluate(self, network: nn.Module, out: Path) -> dict[str, float]:
        """See :class:`Task`: what :func:`scores_of_videos` gives."""
        assert isinstance(network, Network)
        device = str(next(network.parameters()).device)
        return scores_of_videos(network, self.config.data.held_out, self.config.precision, device)


def scores_of_videos(
    model: Network | VideoTracker, held_out: HeldOut, precision: str = "float32", device: str | None = None
) -> dict[str, float]:
    """Segment held-out videos from their first mask on, and score the objects that it shows.

    model: a network or a tracker. precision: "float32", or "bfloat16" or "float16" for autocast. device: the device
    of the model. Returns "score", J&F, "J" and "F" over all objects, and J&F of each video; nothing if none is held
    out.

    Raises:
        InputError: A video cannot be read, or shows no object.
    """
    scores = {}
    for source in held_out.sources:
        for sequence in sequences_of(source):
            scores[sequence.name] = _score(model, sequence, source, held_out, precision, device)
    if not scores:
        return {}
    each = [pair for pairs in scores.values() for pair in pairs]
    j, f = (float(np.mean([pair[n] for pair in each])) for n in (0, 1))
    videos = {name: float(np.mean(pairs)) for name, pairs in scores.items()}
    return {"score": (j + f) / 2, "J": j, "F": f, **videos}


def _score(
    model: Network | VideoTracker,
    sequence: AnnotatedFrames,
    source: Source,
    held_out: HeldOut,
    precision: str,
    device: str | None,
) -> list[tuple[float, float]]:
    """Return J and F of each object of a video."""
    truth: dict[str, Any] = {frame.stem: read_labels(labels)[0] for frame, labels in sequence.frames}
    style = annotation_style((name, values_of(labels)) for name, labels in truth.items())
    if style.first is None:
        raise InputError(f"{shown(sequence.frames[0][1].parent)} shows no object")
    names = list(truth)[list(truth).index(style.first) :]
    names = names if held_out.frames is None else names[: held_out.frames + 1]
    if style.binary if source.binary is None else source.binary:
        truth = {name: (labels > 0).astype(np.uint8) for name, labels in truth.items()}
    given = truth[names[0]]
    folder = sequence.frames[0][0].parent
    every = list(pictures(folder))
    frames = segment(
        folder,
        {names[0]: given},
        model=model,
        device=device,
        dtype=precision,
        size=held_out.size,
        start=every.index(names[0]),
        end=every.index(names[-1]) + 1,
    )
    found = {frame.name: frame.labels.cpu().numpy() for frame in frames}
    known = [0, *(values_of(given) - {IGNORED})]
    followed = [np.where(np.isin(truth[name], known), truth[name], 0) for name in names]
    scores = evaluate_sequence([found[name] for name in names], followed, name=sequence.name)
    return [(score.j.mean, score.f.mean) for score in scores]
